//! How a node with an empty disk becomes a member: one of the first of a new cluster, or a later one.

use std::sync::Arc;

use forebay_proto::fleet::Member;
use forebay_proto::ids::check_name;
use forebay_proto::wire::control::{self, failure::Failure};
use forebay_proto::wire::fleet;
use forebay_proto::{ClusterId, FEATURE_LEVEL, NodeId};

use super::BOOTSTRAP_AFTER;
use super::lifecycle::{Phase, Shared, run_member};
use crate::fleet::{FOUNDING_LEVEL, Fleet};
use crate::node::{Members, Snapshot};
use crate::replica::StopReason;
use crate::store::{ClusterFile, MemberRecord, Uninitialised};

/// How long the answer to a failed init may take to leave.
const TELL_PATIENCE: std::time::Duration = std::time::Duration::from_millis(250);

fn bad(problem: impl Into<String>) -> Failure {
    Failure::BadRequest(control::BadRequest {
        problem: problem.into(),
    })
}

/// Makes this node a member, or says why not. A repetition of the same request succeeds.
pub(crate) async fn bootstrap(
    shared: &Arc<Shared>,
    request: &control::Bootstrap,
) -> Result<control::Bootstrapped, Failure> {
    let cluster_id = ClusterId::from_wire(&request.cluster_id).map_err(|e| bad(e.to_string()))?;
    let members = members(&request.members)?;
    let own = members
        .iter()
        .find(|member| member.name == shared.name)
        .ok_or_else(|| bad(format!("{} is not among the members", shared.name)))?
        .id;
    tokio::time::sleep(BOOTSTRAP_AFTER.saturating_sub(shared.started.elapsed())).await;
    let mut waiting = shared.waiting.lock().await;
    if let Some(running) = shared.running() {
        return already(&running.cluster, cluster_id, &members);
    }
    let problem = shared.problem.lock().clone();
    if !problem.is_empty() {
        return Err(Failure::Uninitialised(control::Uninitialised { problem }));
    }
    if members
        .iter()
        .any(|member| member.id == own && member.store_id != shared.store_id)
    {
        return Err(bad(format!(
            "{} was asked with another store id than {}: it restarted on another disk; run init again",
            shared.name, shared.store_id
        )));
    }
    check_distinct(&members)?;
    let level = request.feature_level.unwrap_or(0).max(FOUNDING_LEVEL);
    if level > FEATURE_LEVEL {
        let problem = format!(
            "{} understands feature level {FEATURE_LEVEL}, not {level}",
            shared.name
        );
        return Err(bad(problem));
    }
    let snapshot = first_snapshot(cluster_id, &members, level);
    let snapshot = snapshot.map_err(|error| bad(error.to_string()))?;
    let file = ClusterFile::new(cluster_id, own, shared.name.clone(), members);
    begin(shared, waiting.take(), file, &snapshot)?;
    Ok(control::Bootstrapped {
        cluster_id: cluster_id.to_wire(),
        node_id: own.0,
    })
}

/// Makes this node a member of a cluster that has added it, with an empty log: the leader sends it what
/// it needs. A repetition succeeds.
///
/// What it asks for holds even where the node was told that it lost its disk: the cluster has agreed on
/// this disk since.
pub(crate) async fn join(
    shared: &Arc<Shared>,
    request: &control::Join,
) -> Result<control::Bootstrapped, Failure> {
    let cluster_id = ClusterId::from_wire(&request.cluster_id).map_err(|e| bad(e.to_string()))?;
    let own = NodeId(request.node_id);
    let members = members(&request.members)?;
    let mut waiting = shared.waiting.lock().await;
    if let Some(running) = shared.running() {
        let (cluster, node_id) = (&running.cluster, running.cluster.node_id);
        let cluster_id_of = cluster.cluster_id.to_wire();
        if cluster.cluster_id == cluster_id && node_id == own {
            return Ok(control::Bootstrapped {
                cluster_id: cluster_id_of,
                node_id: own.0,
            });
        }
        return Err(Failure::AlreadyInitialised(control::AlreadyInitialised {
            cluster_id: cluster_id_of,
        }));
    }
    let same = |member: &&MemberRecord| {
        member.id == own && member.name == shared.name && member.store_id == shared.store_id
    };
    if !members.iter().any(|member| same(&member)) {
        return Err(bad(format!(
            "the cluster did not add {} with store {} as node {own}: it restarted on another disk; \
             remove that node and add this one anew",
            shared.name, shared.store_id
        )));
    }
    check_distinct(&members)?;
    let file = ClusterFile::new(cluster_id, own, shared.name.clone(), members);
    begin(shared, waiting.take(), file, &Snapshot::of_a_joiner())?;
    shared.set_problem("");
    Ok(control::Bootstrapped {
        cluster_id: cluster_id.to_wire(),
        node_id: own.0,
    })
}

/// Writes what a member begins with, and takes part. Last of all: whatever is wrong with a request, the
/// disk stays fit for a better one.
fn begin(
    shared: &Arc<Shared>,
    disk: Option<Uninitialised>,
    file: ClusterFile,
    snapshot: &Snapshot,
) -> Result<(), Failure> {
    let disk = disk.ok_or_else(|| {
        let reason = "the disk failed during an earlier init: see this node's log".to_owned();
        Failure::Stopped(control::Stopped { reason })
    })?;
    let (store, restored) = disk
        .bootstrap(file, snapshot)
        .map_err(|error| ended(shared, StopReason::Store(error)))?;
    run_member(shared, store, restored).map_err(|error| ended(shared, StopReason::Start(error)))
}

/// The disk is in an unknown state, which only a new start of the process sorts out.
fn ended(shared: &Arc<Shared>, reason: StopReason) -> Failure {
    let (told, reason) = (reason.to_string(), Arc::new(reason));
    shared.set_problem(&told);
    let shared = shared.clone();
    tokio::spawn(async move {
        // Whoever asked is told before the endpoint closes.
        tokio::time::sleep(TELL_PATIENCE).await;
        shared.phase.send_replace(Phase::Stopped(reason));
    });
    Failure::Stopped(control::Stopped { reason: told })
}

/// No two members may be one: peers are told apart by their names and disks.
fn check_distinct(members: &[MemberRecord]) -> Result<(), Failure> {
    for (position, one) in members.iter().enumerate() {
        let same = |other: &&MemberRecord| {
            other.name == one.name || other.address == one.address || other.store_id == one.store_id
        };
        if let Some(other) = members[..position].iter().find(same) {
            let problem = format!(
                "members {} and {} have the same name, address or store id: list each node once",
                other.id, one.id
            );
            return Err(bad(problem));
        }
    }
    Ok(())
}

fn members(wire: &[fleet::Member]) -> Result<Vec<MemberRecord>, Failure> {
    let mut records = Vec::new();
    for wire in wire.iter().take(Members::MAX + 1) {
        let member = Member::from_wire(wire).map_err(|error| bad(error.to_string()))?;
        check_name("member", &member.name).map_err(|error| bad(error.to_string()))?;
        forebay_proto::fleet::check_address(&member.address).map_err(bad)?;
        let Member {
            id,
            name,
            address,
            store_id,
            learner: _,
        } = member;
        records.push(MemberRecord {
            id,
            name,
            address,
            store_id,
        });
    }
    Ok(records)
}

fn already(
    cluster: &ClusterFile,
    asked: ClusterId,
    members: &[MemberRecord],
) -> Result<control::Bootstrapped, Failure> {
    let cluster_id = cluster.cluster_id.to_wire();
    if cluster.cluster_id == asked && cluster.members == members {
        return Ok(control::Bootstrapped {
            cluster_id,
            node_id: cluster.node_id.0,
        });
    }
    Err(Failure::AlreadyInitialised(control::AlreadyInitialised {
        cluster_id,
    }))
}

/// What every first member starts from, alike to the byte.
fn first_snapshot(
    cluster_id: ClusterId,
    members: &[MemberRecord],
    level: u32,
) -> Result<Snapshot, crate::node::MembersError> {
    let voters: Vec<NodeId> = members.iter().map(|member| member.id).collect();
    let facts = members.iter().map(super::lifecycle::member).collect();
    let fleet = Fleet::bootstrap(cluster_id, facts).with_feature_level(level);
    Ok(Snapshot::bootstrap(
        Members::new(voters, [])?,
        fleet.snapshot().into(),
    ))
}
