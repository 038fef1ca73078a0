//! From an opened disk to a running member, and to its end.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use forebay_link::{Alpn, Code, Credentials, Endpoint, Link};
use forebay_proto::fleet::Member;
use forebay_proto::{Role, StoreId};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use super::callers::Callers;
use super::group::Group;
use super::leader::Leader;
use super::peers;
use super::plans::{Planner, Plans};
use super::publish::Publisher;
use super::segments::{Bounds, Kept};
use super::{Config, ServerError, Settings, rpc, snapshots, watchers};
use crate::fleet::{Applied, Fleet};
use crate::node::Restored;
use crate::replica::{self, ReplicaHandle, ReplicaOptions, StartError, StopReason};
use crate::store::{ClusterFile, Opened, Store, StoreOptions, Uninitialised};

/// RPCs under way on one node; more are refused as overloaded.
const MAX_RPCS: usize = 4_096;

/// A member: everything that exists once a disk belongs to a cluster.
pub(crate) struct Running {
    pub(crate) cluster: ClusterFile,
    pub(crate) replica: ReplicaHandle<Applied>,
    pub(crate) published: Arc<Publisher>,
    pub(crate) leader: Leader,
    pub(crate) group: Group,
    /// Wakes whoever watches.
    pub(crate) wakes: watch::Sender<u64>,
    /// What comes in of snapshots.
    pub(crate) snapshots: snapshots::Inbound,
    /// The plan that is made here, if one is.
    pub(crate) plans: Arc<Plans>,
    /// The audit, in files.
    pub(crate) audit: Kept,
}

/// What a node is in.
#[derive(Clone)]
pub(crate) enum Phase {
    /// Waits for `forebay init` or `forebay raft add`.
    Uninitialised,
    /// Takes part.
    Running(Arc<Running>),
    /// Has ended by itself, or is about to.
    Stopped(Arc<StopReason>),
}

/// What every task of a node shares.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) store_id: StoreId,
    pub(crate) endpoint: Endpoint,
    pub(crate) phase: watch::Sender<Phase>,
    /// The disk of a node that is not a member yet.
    pub(crate) waiting: tokio::sync::Mutex<Option<Uninitialised>>,
    /// What keeps this node from taking part, for its operator.
    pub(crate) problem: Mutex<String>,
    pub(crate) rpcs: Semaphore,
    pub(crate) started: Instant,
    pub(crate) callers: Callers,
    /// Who makes plans, once somebody was handed in.
    pub(crate) planner: OnceLock<Arc<dyn Planner>>,
    options: ReplicaOptions,
    settings: Settings,
    audit: Kept,
}

impl Shared {
    pub(crate) fn running(&self) -> Option<Arc<Running>> {
        match &*self.phase.borrow() {
            Phase::Running(running) => Some(running.clone()),
            Phase::Uninitialised | Phase::Stopped(_) => None,
        }
    }

    /// Notes what is wrong; says it once.
    pub(crate) fn set_problem(&self, problem: &str) {
        let mut held = self.problem.lock();
        if *held != problem {
            if !problem.is_empty() {
                tracing::warn!(problem, "this node needs its operator");
            }
            problem.clone_into(&mut held);
        }
    }
}

/// A started control node. Cheap to clone: every clone is the same node.
#[derive(Clone)]
pub struct ControlNode {
    pub(super) shared: Arc<Shared>,
}

/// Opens the disk, listens, and takes part if the disk belongs to a cluster.
///
/// # Errors
///
/// Returns [`ServerError`] with what to do.
pub async fn start(config: Config) -> Result<ControlNode, ServerError> {
    start_with(config, Settings::default()).await
}

/// As [`start`], with other settings than production's.
///
/// # Errors
///
/// As [`start`].
pub async fn start_with(config: Config, settings: Settings) -> Result<ControlNode, ServerError> {
    let credentials = Credentials::load(&config.credentials)?;
    let identity = credentials.identity();
    if identity.role != Role::Control {
        return Err(ServerError::WrongRole {
            found: identity.short(),
        });
    }
    let opened = Store::open(&config.data_dir, StoreOptions::default())?;
    if let Opened::Member(store, _) = &opened
        && store.cluster().node_name != identity.name
    {
        return Err(ServerError::OtherNode {
            dir: config.data_dir,
            found: store.cluster().node_name.clone(),
            name: identity.name.clone(),
        });
    }
    let endpoint = Endpoint::bind(config.listen, &credentials, &[Alpn::Raft, Alpn::Control])?;
    let (store_id, waiting, member) = match opened {
        Opened::Uninitialised(disk) => (disk.store_id(), Some(disk), None),
        Opened::Member(store, restored) => (store.store_id(), None, Some((*store, *restored))),
    };
    endpoint.update_hello(|hello| {
        hello.store_id = store_id.to_wire();
        hello.takes_snapshot_pieces = true;
    });
    let shared = Arc::new(Shared {
        name: identity.name.clone(),
        store_id,
        endpoint,
        phase: watch::Sender::new(Phase::Uninitialised),
        waiting: tokio::sync::Mutex::new(waiting),
        problem: Mutex::default(),
        rpcs: Semaphore::new(MAX_RPCS),
        started: Instant::now(),
        callers: Callers::default(),
        planner: OnceLock::new(),
        options: config.replica,
        settings,
        audit: Kept::new(
            config.data_dir.join("audit"),
            Bounds {
                segment_bytes: settings.audit_file_bytes,
                all_bytes: config.audit_bytes,
            },
        ),
    });
    match member {
        Some((store, restored)) => run_member(&shared, store, restored)?,
        None => tracing::info!(
            name = shared.name,
            store = %shared.store_id,
            "uninitialised: waiting for `forebay init` or `forebay raft add`"
        ),
    }
    tokio::spawn(accept_loop(shared.clone()));
    Ok(ControlNode { shared })
}

/// Starts the replica and everything around it.
pub(crate) fn run_member(
    shared: &Arc<Shared>,
    store: Store,
    restored: Restored,
) -> Result<(), StartError> {
    let cluster = store.cluster().clone();
    let members: Vec<Member> = cluster.members.iter().map(member).collect();
    shared.endpoint.update_hello(|hello| {
        hello.cluster_id = cluster.cluster_id.to_wire();
        hello.node_id = cluster.node_id.0;
    });
    let settings = &shared.settings;
    let published = Publisher::new(cluster.cluster_id, settings.watch_deltas);
    let published = Arc::new(published);
    let fleet = Fleet::bootstrap(cluster.cluster_id, members);
    let group = Group::new(&cluster);
    let (hook, following, outbound) = (published.clone(), group.clone(), group.clone());
    let replica = replica::start(
        shared.options,
        (store, restored),
        fleet,
        move |to, message| outbound.send(to, message),
        move |fleet: &Fleet, applied, outputs: &[replica::Applied<Applied>]| {
            following.follow(fleet.members(), fleet.newest_member());
            hook.publish(fleet, applied, outputs);
        },
    )?;
    tokio::spawn(peers::attend(
        group.clone(),
        cluster.clone(),
        shared.clone(),
        replica.clone(),
    ));
    let leader = Leader::new(
        shared.started,
        replica.clone(),
        published.clone(),
        group.clone(),
        settings.pace,
    );
    tokio::spawn(leader.clone().follow());
    let audit = shared.audit.clone();
    tokio::spawn(audit.clone().follow(Arc::downgrade(&published)));
    let wakes = watch::Sender::new(0);
    tokio::spawn(watchers::wake(published.clone(), wakes.clone()));
    let running = Running {
        cluster,
        replica: replica.clone(),
        published,
        leader,
        group,
        wakes,
        snapshots: snapshots::Inbound::default(),
        plans: Arc::default(),
        audit,
    };
    tracing::info!(
        name = shared.name,
        node = %running.cluster.node_id,
        cluster = %running.cluster.cluster_id,
        "taking part"
    );
    shared.phase.send_replace(Phase::Running(Arc::new(running)));
    let phase = shared.phase.clone();
    tokio::spawn(async move {
        let reason = replica.stopped().await;
        phase.send_replace(Phase::Stopped(reason));
    });
    Ok(())
}

pub(crate) fn member(record: &crate::store::MemberRecord) -> Member {
    Member {
        id: record.id,
        name: record.name.clone(),
        address: record.address.clone(),
        store_id: record.store_id,
        learner: false,
    }
}

async fn accept_loop(shared: Arc<Shared>) {
    while let Some(link) = shared.endpoint.accept().await {
        let shared = shared.clone();
        tokio::spawn(async move { serve(&shared, link).await });
    }
}

async fn serve(shared: &Arc<Shared>, link: Link) {
    let caller = shared.callers.admit(&link);
    match link.alpn() {
        Alpn::Raft => peers::receive(shared, &link).await,
        Alpn::Control => rpc::serve(shared, &caller, &link).await,
        Alpn::Work => link.close(Code::Protocol, "a control node places nothing"),
    }
}

impl ControlNode {
    /// Where it listens.
    ///
    /// # Errors
    ///
    /// Returns what the system says.
    pub fn local_addr(&self) -> std::io::Result<std::net::SocketAddr> {
        self.shared.endpoint.local_addr()
    }

    /// Its name, from its certificate.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Lets this one make plans of rebalances while the node leads; only the first that is handed in does.
    pub fn plan_with(&self, planner: Arc<dyn Planner>) {
        // A second one changes nothing.
        let _ = self.shared.planner.set(planner);
    }

    /// Its side of leading, once it is a member: waits until then. `None` if it stops before.
    pub async fn leader(&self) -> Option<Leader> {
        let mut phase = self.shared.phase.subscribe();
        let ready = phase
            .wait_for(|phase| !matches!(phase, Phase::Uninitialised))
            .await
            .ok()?;
        match &*ready {
            Phase::Running(running) => Some(running.leader.clone()),
            Phase::Uninitialised | Phase::Stopped(_) => None,
        }
    }

    /// What it knows of itself, as `forebay members` shows it.
    #[must_use]
    pub fn status(&self) -> forebay_proto::wire::control::NodeStatus {
        rpc::status(&self.shared)
    }

    /// Runs until `shutdown`, then stops cleanly; or until the replica ends by itself.
    ///
    /// # Errors
    ///
    /// Returns [`ServerError::Stopped`] when the replica ended by itself: the process should exit.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServerError> {
        let mut phase = self.shared.phase.subscribe();
        let failed = async {
            loop {
                if let Phase::Stopped(reason) = &*phase.borrow_and_update() {
                    return reason.clone();
                }
                // The sender lives as long as `self`.
                let _ = phase.changed().await;
            }
        };
        tokio::select! {
            reason = failed => {
                self.shared.endpoint.close("stopped");
                return Err(ServerError::Stopped(reason));
            }
            () = shutdown => {}
        }
        if let Some(running) = self.shared.running() {
            let stopping = running.replica.stop();
            if tokio::time::timeout(Duration::from_secs(5), stopping)
                .await
                .is_err()
            {
                tracing::warn!("the replica did not stop in time; its log is safe");
            }
        }
        self.shared.endpoint.close("shutting down");
        self.shared.endpoint.wait_idle().await;
        Ok(())
    }
}
