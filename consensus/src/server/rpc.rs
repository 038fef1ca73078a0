//! Requests of agents, balancers, operators and other nodes. What the table does not allow is denied.

use std::sync::Arc;
use std::time::Duration;

use forebay_link::{FrameReceiver, FrameSender, Link};
use forebay_proto::fleet::Member;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::rpc::Rpc;
use forebay_proto::wire::control::{self, failure::Failure, request::Request, response::Response};
use forebay_proto::wire::fleet::{self as wire, command::Action};
use forebay_proto::{ClientId, Identity, Incarnation, Millis, NodeId, Role};
use prost::Message;
use tokio::time::Instant;

use super::callers::{Bounds, Caller};
use super::lifecycle::{Phase, Running, Shared};
use super::{bootstrap, membership, plans, watchers};
use crate::fleet::lease::{Lease, RenewError};
use crate::fleet::reign::{self, Asked};
use crate::fleet::{MAX_NAMES, too_new};
use crate::node::Role as RaftRole;
use crate::replica::{ProposeError, ReadError};

/// A stream that does not say what it wants is ended.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
/// No caller waits longer than this for one answer.
const MAX_DEADLINE: Duration = Duration::from_secs(10);
/// A renewal waits no longer for a node that was just elected: the next one comes in a second.
const RENEW_PATIENCE: Duration = Duration::from_millis(500);

/// Largest request of a peer: whole documents come from operators only.
const fn most_bytes(role: Role) -> usize {
    match role {
        Role::Operator(_) => Kind::Request.max_bytes(),
        Role::Control | Role::Balancer | Role::Agent => 64 << 10,
    }
}

/// Answers the streams of one link.
pub(crate) async fn serve(shared: &Arc<Shared>, caller: &Caller, link: &Link) {
    while let Ok((mut send, recv)) = link.accept().await {
        let Ok(stream) = caller.bounds.streams.clone().try_acquire_owned() else {
            // Fits the window of a new stream, so it does not wait.
            let refused = respond(Err(overloaded("streams of this caller")), &mut send);
            let _ = tokio::time::timeout(Duration::ZERO, refused).await;
            continue;
        };
        let (shared, link, bounds) = (shared.clone(), link.clone(), caller.bounds.clone());
        tokio::spawn(async move {
            answer(&shared, &bounds, &link, send, recv).await;
            drop(stream);
        });
    }
}

async fn answer(
    shared: &Arc<Shared>,
    bounds: &Bounds,
    link: &Link,
    mut send: FrameSender,
    mut recv: FrameReceiver,
) {
    let receive = async {
        let _turn = bounds.receiving.acquire().await;
        recv.recv_at_most(most_bytes(link.peer().role)).await
    };
    let response = match tokio::time::timeout(REQUEST_PATIENCE, receive).await {
        Ok(Ok(Some(frame))) if frame.kind == Kind::Request => match shared.rpcs.try_acquire() {
            Ok(permit) => match authorise(link.peer(), &frame) {
                Ok((Request::Watch(watch), _)) => {
                    drop((permit, frame));
                    watch_or_fail(shared, link, &watch, &mut send, &mut recv).await
                }
                Ok((request, action)) => Some(execute(shared, link, request, action).await),
                Err(failure) => Some(Err(failure)),
            },
            Err(_) => Some(Err(overloaded("requests under way on this node"))),
        },
        Ok(Ok(Some(_))) => Some(Err(bad("expected a Request frame"))),
        Ok(Ok(None) | Err(_)) | Err(_) => return,
    };
    if let Some(result) = response {
        // A caller that does not take its answer holds this stream no longer than any other wait.
        let _ = tokio::time::timeout(MAX_DEADLINE, respond(result, &mut send)).await;
    }
}

async fn respond(result: Result<Response, Failure>, send: &mut FrameSender) {
    let response = result.unwrap_or_else(|failure| {
        Response::Failure(control::Failure {
            failure: Some(failure),
        })
    });
    let response = control::Response {
        response: Some(response),
    };
    if send
        .send(&Frame::message(Kind::Response, &response))
        .await
        .is_ok()
    {
        send.finish();
    }
}

async fn watch_or_fail(
    shared: &Arc<Shared>,
    link: &Link,
    watch: &control::Watch,
    send: &mut FrameSender,
    recv: &mut FrameReceiver,
) -> Option<Result<Response, Failure>> {
    match informed(shared) {
        Ok(running) => {
            watchers::feed(&running, link.peer(), watch, send, recv).await;
            None
        }
        Err(failure) => Some(Err(failure)),
    }
}

pub(crate) fn bad(problem: impl Into<String>) -> Failure {
    Failure::BadRequest(control::BadRequest {
        problem: problem.into(),
    })
}

/// Decodes a request and checks that its caller may make it.
fn authorise(peer: &Identity, frame: &Frame) -> Result<(Request, Option<Action>), Failure> {
    let request = frame
        .decode::<control::Request>()
        .map_err(|error| bad(error.to_string()))?
        .request
        .ok_or_else(|| bad("an RPC that this version does not know: update the control nodes"))?;
    let action = match &request {
        Request::Propose(propose) => {
            wire::Command::decode(propose.command.clone())
                .map_err(|_| bad("the command does not decode"))?
                .action
        }
        _ => None,
    };
    let rpc = Rpc::of(&request, action.as_ref()).ok_or_else(|| {
        bad("a command that this version does not know: update the control nodes")
    })?;
    if !rpc.allows(peer.role) {
        tracing::warn!(peer = peer.short(), ?rpc, "denied");
        let (rpc, identity) = (format!("{rpc:?}"), peer.short());
        return Err(Failure::Unauthorized(control::Unauthorized {
            rpc,
            identity,
        }));
    }
    Ok((request, action))
}

async fn execute(
    shared: &Arc<Shared>,
    link: &Link,
    request: Request,
    action: Option<Action>,
) -> Result<Response, Failure> {
    match (request, action) {
        (Request::Probe(_), _) => Ok(Response::Status(status(shared))),
        (Request::Bootstrap(request), _) => bootstrap::bootstrap(shared, &request)
            .await
            .map(Response::Bootstrapped),
        (Request::Join(request), _) => bootstrap::join(shared, &request)
            .await
            .map(Response::Bootstrapped),
        (Request::Transfer(request), _) => {
            membership::transfer(&*member(shared)?, link.peer(), &request).await
        }
        (Request::Snapshot(request), _) => membership::snapshot(&*member(shared)?, request)
            .await
            .map(Response::Snapshot),
        (Request::Measure(request), _) => membership::measure(&*member(shared)?, request)
            .await
            .map(Response::Measured),
        (Request::Read(read), _) => {
            let running = member(shared)?;
            up_to_date(shared, &running, read.deadline_ms).await?;
            Ok(Response::Facts(for_operators(&running.published.facts())))
        }
        (Request::Audit(audit), _) => {
            let limit = usize::try_from(audit.limit).unwrap_or(usize::MAX);
            let running = informed(shared)?;
            if audit.from > 0 {
                let read = running.audit.read(audit.from, limit).await;
                return read
                    .map(Response::Audit)
                    .map_err(|error| bad(error.to_string()));
            }
            if audit.deadline_ms > 0 {
                up_to_date(shared, &running, audit.deadline_ms).await?;
            }
            let (entries, head, count) = running.published.audit(limit);
            Ok(Response::Audit(control::AuditTail {
                entries,
                head: bytes::Bytes::copy_from_slice(&head),
                count: Some(count),
                begins: None,
            }))
        }
        (Request::Holders(asked), _) => holders(shared, &asked).await.map(Response::Holders),
        (Request::Arrivals(told), _) => {
            arrivals(&*member(shared)?, link.peer(), told)?;
            Ok(Response::ArrivalsTaken(control::ArrivalsTaken {}))
        }
        (Request::Plan(asked), _) => plans::plan(shared, &member(shared)?, asked)
            .await
            .map(Response::Planned),
        (Request::Renew(renew), _) => renewed(shared, link.peer(), &renew)
            .await
            .map(Response::Renewed),
        (Request::Propose(request), Some(action)) => propose(shared, link, request, &action)
            .await
            .map(Response::Outcome),
        (Request::Propose(_), None) => Err(bad("the proposal has no command")),
        (Request::Watch(_), _) => Err(bad("a watch takes its stream for itself")),
    }
}

/// Waits until this node has applied what was agreed on before.
async fn up_to_date(shared: &Shared, running: &Running, deadline_ms: u32) -> Result<(), Failure> {
    let waited_ms = u64::from(deadline_ms);
    match running.replica.read_index(deadline(deadline_ms)).await {
        Ok(_) => Ok(()),
        Err(ReadError::Timeout) => Err(Failure::NoQuorum(control::NoQuorum { waited_ms })),
        Err(ReadError::Overloaded) => Err(overloaded("reads")),
        Err(ReadError::Stopped) => Err(stopped(shared)),
    }
}

fn member(shared: &Shared) -> Result<Arc<Running>, Failure> {
    match &*shared.phase.borrow() {
        Phase::Running(running) => Ok(running.clone()),
        Phase::Uninitialised => {
            let mut problem = shared.problem.lock().clone();
            if problem.is_empty() {
                problem = format!(
                    "{} waits for `forebay init` or `forebay raft add`",
                    shared.name
                );
            }
            Err(Failure::Uninitialised(control::Uninitialised { problem }))
        }
        Phase::Stopped(reason) => Err(Failure::Stopped(control::Stopped {
            reason: reason.to_string(),
        })),
    }
}

/// A member that has a state: one that joins has none before the leader's first snapshot, and nobody
/// may take that for an empty fleet.
fn informed(shared: &Shared) -> Result<Arc<Running>, Failure> {
    let running = member(shared)?;
    if running.replica.status().borrow().applied > 0 {
        return Ok(running);
    }
    let problem = format!("{} joins and waits for the leader's snapshot", shared.name);
    Err(Failure::Uninitialised(control::Uninitialised { problem }))
}

pub(crate) fn deadline(ms: u32) -> Instant {
    Instant::now() + Duration::from_millis(ms.into()).min(MAX_DEADLINE)
}

pub(crate) fn overloaded(what: &str) -> Failure {
    Failure::Overloaded(control::Overloaded { what: what.into() })
}

fn stopped(shared: &Shared) -> Failure {
    match member(shared) {
        Err(failure) => failure,
        Ok(_) => Failure::Stopped(control::Stopped {
            reason: "stopping".into(),
        }),
    }
}

pub(crate) fn not_leader(running: &Running, leader: Option<NodeId>) -> Failure {
    let leader_address = leader
        .map(|id| running.leader.address_of(id))
        .unwrap_or_default();
    let leader = leader.map_or(0, |id| id.0);
    Failure::NotLeader(control::NotLeader {
        leader,
        leader_address,
    })
}

/// No operator needs the keys, and none may have them; which is the newest is no secret.
fn for_operators(facts: &wire::Facts) -> wire::Facts {
    let newest = facts.keys.as_ref().and_then(|ring| ring.keys.last());
    wire::Facts {
        key_epoch: newest.map_or(0, |key| key.epoch),
        keys: None,
        ..facts.clone()
    }
}

/// An agent speaks of its own worker only.
fn check_name(running: &Running, peer: &Identity, action: &Action) -> Result<(), Failure> {
    let denied = |what: String| {
        let identity = peer.short();
        Err(Failure::Unauthorized(control::Unauthorized {
            rpc: what,
            identity,
        }))
    };
    let about = match action {
        Action::Register(register) if register.name == peer.name => return Ok(()),
        Action::Register(register) => return denied(format!("RegisterWorker {}", register.name)),
        Action::Observe(observe) => &observe.incarnation,
        Action::Goodbye(goodbye) => &goodbye.incarnation,
        Action::AccuseRequests(accuse) => &accuse.incarnation,
        Action::ClearRequests(clear) => &clear.incarnation,
        Action::SetDesired(_)
        | Action::SetDesiredOf(_)
        | Action::StartDrain(_)
        | Action::CancelDrain(_)
        | Action::PassDrainDeadline(_)
        | Action::AssignHomes(_)
        | Action::StartRebalance(_)
        | Action::StepRebalance(_)
        | Action::StopRebalance(_)
        | Action::CancelRebalance(_)
        | Action::LiftQuarantine(_)
        | Action::ForgetSuspects(_)
        | Action::Remove(_)
        | Action::ApplyConfig(_)
        | Action::Expire(_)
        | Action::RotateKey(_)
        | Action::ChangeMembers(_)
        | Action::RaiseFeatureLevel(_) => return Ok(()),
    };
    let id = about.as_ref().map(|incarnation| incarnation.worker);
    let facts = running.published.facts();
    let own = facts.workers.iter().find(|worker| worker.name == peer.name);
    match (id, own) {
        (Some(id), Some(own)) if own.id == id => Ok(()),
        _ => denied("a command about another worker".into()),
    }
}

async fn propose(
    shared: &Shared,
    link: &Link,
    request: control::Propose,
    action: &Action,
) -> Result<wire::Outcome, Failure> {
    let running = member(shared)?;
    let deadline = deadline(request.deadline_ms);
    // Only the leader's facts are new enough to judge whom a command is about.
    if !running.leader.leads(deadline).await {
        let leader = running.replica.status().borrow().leader;
        return Err(not_leader(&running, leader));
    }
    check_name(&running, link.peer(), action)?;
    if let Some(refusal) = too_new(action, running.published.facts().feature_level) {
        return Ok(wire::Outcome {
            outcome: Some(wire::outcome::Outcome::Refusal(refusal.to_wire())),
        });
    }
    if request.sequence == 0 {
        return Err(bad("sequence numbers begin at 1"));
    }
    let registers = match action {
        Action::Register(register) => Some(register.name.clone()),
        _ => None,
    };
    if ClientId::from_wire(&request.client).is_err() {
        return Err(bad("a client's id has 16 bytes"));
    }
    let asked = Asked {
        actor: wire::Actor {
            identity: link.peer().short(),
            address: link.remote().to_string(),
        },
        client: request.client,
        sequence: request.sequence,
        command: request.command,
        reason: request.reason.chars().take(500).collect(),
        registers,
        takes_capacity: reign::takes_capacity(action),
    };
    let proposed = match membership::change(action) {
        None => running.leader.propose_for(asked, None, deadline).await,
        Some(change) => membership::propose(&running, asked, change, deadline).await,
    };
    if let (Ok(outcome), Action::Register(register)) = (&proposed, action) {
        note_registered(&running, &register.name, outcome);
    }
    if let Err(ProposeError::Change(refused)) = &proposed {
        // Nothing was proposed, so nothing is audited; but it is a refusal for whoever asked.
        return Ok(membership::unfit(refused.to_string()));
    }
    proposed.map_err(|error| match error {
        ProposeError::NotLeader { leader } => not_leader(&running, leader),
        ProposeError::Overloaded => overloaded("proposals"),
        ProposeError::Size(_) | ProposeError::Change(_) => bad(error.to_string()),
        ProposeError::Timeout | ProposeError::LeadershipLost => {
            Failure::Unknown(control::Unknown {})
        }
        ProposeError::Stopped => stopped(shared),
    })
}

/// Who has just registered lives, even if its lease ran out long ago.
fn note_registered(running: &Running, name: &str, outcome: &wire::Outcome) {
    if let Some(wire::outcome::Outcome::Done(done)) = &outcome.outcome
        && let Some(worker) = &done.worker
        && let Ok(incarnation) = Incarnation::from_wire(worker.incarnation.as_ref())
    {
        running.leader.registered(name, incarnation);
    }
}

async fn renewed(
    shared: &Shared,
    peer: &Identity,
    renew: &control::Renew,
) -> Result<control::Renewed, Failure> {
    let running = member(shared)?;
    let incarnation = Incarnation::from_wire(renew.incarnation.as_ref()).ok();
    running.leader.leads(Instant::now() + RENEW_PATIENCE).await;
    let taken = running
        .leader
        .renewed(|leases, now| leases.renewed(now, peer, renew));
    match taken {
        None => Err(not_leader(
            &running,
            running.replica.status().borrow().leader,
        )),
        Some(Ok(ttl)) => {
            let facts = running.published.facts();
            if let (Role::Agent, Some(incarnation)) = (peer.role, incarnation) {
                note_observed(&running, &facts, &peer.name, incarnation, renew);
            }
            let ttl_ms = Millis::from_duration(ttl).wire();
            let mut renewed = control::Renewed {
                ttl_ms,
                revision: facts.revision,
                ..Default::default()
            };
            if let Some(incarnation) = incarnation.filter(|_| peer.role == Role::Agent) {
                running.plans.wants(incarnation, &mut renewed);
            }
            Ok(renewed)
        }
        Some(Err(RenewError::Superseded { current })) => {
            Err(Failure::Superseded(control::Superseded {
                current: Some(current.to_wire()),
            }))
        }
        Some(Err(error @ (RenewError::NotRegistered | RenewError::NotAHolder))) => {
            Err(bad(error.to_string()))
        }
        Some(Err(RenewError::Full)) => Err(overloaded("balancers with a lease")),
    }
}

/// Takes what an agent recorded of its own worker, if a plan is made that asked for it.
fn arrivals(running: &Running, peer: &Identity, told: control::Arrivals) -> Result<(), Failure> {
    let incarnation = Incarnation::from_wire(told.incarnation.as_ref());
    let incarnation = incarnation.map_err(|error| bad(error.to_string()))?;
    let facts = running.published.facts();
    let own = facts.workers.iter().find(|worker| worker.name == peer.name);
    if own.is_none_or(|own| own.incarnation != told.incarnation) {
        return Err(bad(format!(
            "{incarnation} is not registered as {}",
            peer.name
        )));
    }
    running.plans.take(incarnation, told);
    Ok(())
}

/// Who was heard lately, by the leader's own memory.
async fn holders(
    shared: &Shared,
    asked: &control::Holders,
) -> Result<control::HeldLeases, Failure> {
    let running = member(shared)?;
    if !running.leader.leads(Instant::now() + RENEW_PATIENCE).await {
        let leader = running.replica.status().borrow().leader;
        return Err(not_leader(&running, leader));
    }
    let held = running.leader.with_leases(|leases, now| {
        let holder = |name: &str, lease: &Lease| control::Holder {
            name: name.into(),
            heard_ms: lease
                .heard
                .then(|| Millis::from_duration(now.since(lease.last)).0),
            applied_revision: lease.applied.0,
            work: lease.work.clone(),
        };
        let agents = asked.workers.iter().take(MAX_NAMES).filter_map(|name| {
            let (_, lease) = leases.of(name)?;
            Some(holder(name, &lease))
        });
        control::HeldLeases {
            agents: agents.collect(),
            balancers: leases
                .all_balancers()
                .map(|(name, lease)| holder(name, lease))
                .collect(),
        }
    });
    Ok(held)
}

/// Commits what an agent says of itself where the facts say otherwise.
fn note_observed(
    running: &Running,
    facts: &wire::Facts,
    name: &str,
    incarnation: Incarnation,
    renew: &control::Renew,
) {
    let Some(worker) = facts.workers.iter().find(|worker| worker.name == name) else {
        return;
    };
    let (said, is_news) = reign::said(worker, incarnation, renew);
    running.leader.observe(incarnation.worker, said, is_news);
}

/// What this node knows of itself; works without a quorum.
pub(crate) fn status(shared: &Shared) -> control::NodeStatus {
    let mut status = control::NodeStatus {
        name: shared.name.clone(),
        store_id: shared.store_id.to_wire(),
        build: concat!("forebay/", env!("CARGO_PKG_VERSION")).into(),
        feature_level: forebay_proto::FEATURE_LEVEL,
        problem: shared.problem.lock().clone(),
        role: "uninitialised".into(),
        ..control::NodeStatus::default()
    };
    match &*shared.phase.borrow() {
        Phase::Uninitialised => {}
        Phase::Stopped(reason) => {
            status.role = "stopped".into();
            status.problem = reason.to_string();
        }
        Phase::Running(running) => {
            let replica = running.replica.status().borrow().clone();
            status.initialised = true;
            status.cluster_id = running.cluster.cluster_id.to_wire();
            status.node_id = running.cluster.node_id.0;
            status.leader = replica.leader.map_or(0, |id| id.0);
            status.term = replica.term;
            status.commit = replica.commit;
            status.applied = replica.applied;
            status.last_index = replica.last_index;
            status.leader_heard_ms = replica.leader_heard_ms;
            let members = running.group.members();
            let peer = |(id, matched): &(NodeId, u64)| control::PeerStatus {
                node_id: id.0,
                matched: *matched,
                heard_ms: running
                    .group
                    .heard_ago(*id)
                    .map(|ago| Millis::from_duration(ago).0),
            };
            status.members = members.iter().map(Member::to_wire).collect();
            status.newest_member = running.group.newest().0;
            status.peers = replica.peers.iter().map(peer).collect();
            let learns = replica
                .members
                .learners()
                .contains(&running.cluster.node_id);
            status.role = match replica.role {
                RaftRole::Leader => "leader",
                RaftRole::Follower if learns => "learner",
                RaftRole::Follower => "follower",
                RaftRole::Candidate | RaftRole::PreCandidate => "candidate",
            }
            .into();
        }
    }
    status
}
