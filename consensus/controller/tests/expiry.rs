//! Expiry from end to end: control nodes, their controllers, agents that renew, fall silent and return.

#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // real sockets and disks in real time

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use forebay_consensus::server::{Config, ControlNode, Settings, start_with};
use forebay_control_client::{ControlClient, Facts, RenewState, Renewing, Watching};
use forebay_link::{Authority, CredentialPaths, Credentials, Endpoint};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::{self, Observed};
use forebay_proto::{ClientId, ClusterId, Incarnation, Level, Role};
use tokio::sync::{oneshot, watch};

const DEADLINE: Duration = Duration::from_secs(10);

/// A lease of ten seconds runs out in two and a half, and renewals come every second.
const PACE: u32 = 4;

struct Cell {
    directory: tempfile::TempDir,
    authority: Authority,
    nodes: Vec<ControlNode>,
    /// Stops the node of the same number when it is dropped.
    stops: Vec<Option<oneshot::Sender<()>>>,
    clients: AtomicU8,
}

impl Cell {
    async fn start(nodes: usize) -> Self {
        let mut cell = Self {
            directory: tempfile::tempdir().unwrap(),
            authority: Authority::create("test", 1).unwrap(),
            nodes: vec![],
            stops: vec![],
            clients: AtomicU8::new(1),
        };
        for number in 0..nodes {
            let name = format!("c{number}");
            let config = Config {
                data_dir: cell.directory.path().join(format!("{name}-data")),
                listen: ([127, 0, 0, 1], 0).into(),
                credentials: cell.issue(Role::Control, &name),
                replica: Default::default(),
                audit_bytes: 1 << 20,
            };
            let settings = Settings {
                pace: PACE,
                ..Settings::default()
            };
            let node = start_with(config, settings).await.unwrap();
            let (stop, stopped) = oneshot::channel::<()>();
            tokio::spawn(node.clone().run(async move { drop(stopped.await) }));
            cell.stops.push(Some(stop));
            let member = node.clone();
            tokio::spawn(async move {
                let leader = member.leader().await.unwrap();
                forebay_controller::run(Arc::new(leader)).await;
            });
            cell.nodes.push(node);
        }
        cell
    }

    fn issue(&self, role: Role, name: &str) -> CredentialPaths {
        let own = tempfile::tempdir_in(self.directory.path()).unwrap().keep();
        self.authority.save(&own).unwrap();
        let issued = self.authority.issue(role, name, 30).unwrap();
        let (cert, key) = issued.save(&own).unwrap();
        let ca = Path::join(&own, "ca.pem");
        CredentialPaths { ca, cert, key }
    }

    fn client(&self, role: Role, name: &str) -> ControlClient {
        let credentials = Credentials::load(&self.issue(role, name)).unwrap();
        let endpoint = Endpoint::client(&credentials).unwrap();
        let nodes = self.nodes.iter();
        let addresses = nodes.map(|node| node.local_addr().unwrap().to_string());
        // Every process draws its own: a start is not a repetition of the start before.
        let number = self.clients.fetch_add(1, Ordering::Relaxed);
        let id = ClientId([number; 16]);
        ControlClient::new(endpoint, addresses.collect::<Vec<_>>(), id, number.into())
    }

    /// An agent that renews for as long as what is returned lives.
    async fn agent(&self, name: &str, held: Option<(Incarnation, u32)>) -> Agent {
        let client = self.client(Role::Agent, name);
        let register = register(name, held);
        let done = client.propose(register, "start", DEADLINE).await.unwrap();
        let incarnation = done.worker.unwrap().incarnation;
        let (state, said) = watch::channel(RenewState {
            incarnation: Some(incarnation),
            applied_revision: done.revision,
            observed: Observed::Ready,
            work: None,
            heat: None,
        });
        let renewing = client.spawn_renew(said);
        Agent {
            incarnation,
            _state: state,
            _renewing: renewing,
        }
    }
}

struct Agent {
    incarnation: Incarnation,
    _state: watch::Sender<RenewState>,
    _renewing: Renewing,
}

fn register(name: &str, held: Option<(Incarnation, u32)>) -> Action {
    let spec = WorkerSpec {
        pool: "default".into(),
        advertise: "127.0.0.1:7420".into(),
        engine: "emulated".into(),
        models: vec!["m".into()],
        revision: String::new(),
        gpu_type: String::new(),
        gpu_count: 0,
        kv_tokens: 0,
        max_context_tokens: 0,
        adapters: vec![],
        zone: String::new(),
        labels: BTreeMap::new(),
        slots: 4,
    };
    Action::Register(fleet::RegisterWorker {
        name: name.into(),
        spec: spec.to_wire(),
        held: held.map(|(held, _)| held.to_wire()),
        start: held.map_or(0, |(_, start)| start),
        takeover: false,
    })
}

/// Waits until the workers that are lost, and the pools with an alarm, are these; says how long.
async fn until(watching: &mut Watching, lost: &[&str], alarmed: &[&str]) -> Duration {
    let began = Instant::now();
    let as_wanted = |facts: &Option<Arc<Facts>>| {
        facts.as_ref().is_some_and(|facts| {
            let workers = facts.workers.values().filter(|worker| worker.lost);
            let names = workers.map(|worker| worker.name.as_str());
            names.eq(lost.iter().copied()) && facts.correlated_expiry.iter().eq(alarmed)
        })
    };
    let seen = tokio::time::timeout(DEADLINE, watching.facts.wait_for(as_wanted)).await;
    let in_time = seen.is_ok();
    drop(seen);
    let facts = watching.facts.borrow().clone();
    assert!(
        in_time,
        "not {lost:?} lost and {alarmed:?} alarmed: {facts:?}"
    );
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_agent_is_lost_after_its_lease_and_found_again_when_it_returns() {
    let cell = Cell::start(3).await;
    let admin = cell.client(Role::Operator(Level::Admin), "alice");
    admin.init(ClusterId([5; 16]), DEADLINE).await.unwrap();
    let mut watching = cell.client(Role::Balancer, "b1").spawn_watch(None);
    let _living = cell.agent("w1", None).await;
    let agent = cell.agent("w2", None).await;
    until(&mut watching, &[], &[]).await;

    let incarnation = agent.incarnation;
    drop(agent);
    let after = until(&mut watching, &["w2"], &[]).await;
    // Ten seconds of the leader's clock since the last renewal, and a step of the controller.
    assert!(after >= Duration::from_millis(1_300), "{after:?}");

    let back = cell.agent("w2", Some((incarnation, 1))).await;
    assert!(back.incarnation > incarnation);
    until(&mut watching, &[], &[]).await;
    // It stays found: no lease of the start before is left.
    tokio::time::sleep(Duration::from_secs(3)).await;
    until(&mut watching, &[], &[]).await;
    let tail = admin.audit(100, DEADLINE).await.unwrap();
    let expired = tail.entries.iter();
    let expired = expired.filter(|entry| entry.action == "expire-leases");
    assert_eq!(expired.count(), 1, "{:?}", tail.entries);

    // A lost worker's own renewal finds it, without a registration.
    let said = RenewState {
        incarnation: Some(back.incarnation),
        applied_revision: forebay_proto::Revision(1),
        observed: Observed::Ready,
        work: None,
        heat: None,
    };
    drop(back);
    until(&mut watching, &["w2"], &[]).await;
    let (_state, said) = watch::channel(said);
    let _renewing = cell.client(Role::Agent, "w2").spawn_renew(said);
    until(&mut watching, &[], &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_falls_silent_at_once_is_an_alarm_and_nobody_is_lost() {
    let cell = Cell::start(1).await;
    let admin = cell.client(Role::Operator(Level::Admin), "alice");
    admin.init(ClusterId([5; 16]), DEADLINE).await.unwrap();
    let mut watching = cell.client(Role::Balancer, "b1").spawn_watch(None);
    let agents = [cell.agent("w1", None).await, cell.agent("w2", None).await];
    until(&mut watching, &[], &[]).await;
    let held = agents.each_ref().map(|agent| agent.incarnation);
    drop(agents);
    until(&mut watching, &[], &["default"]).await;
    let mut back = vec![];
    for (name, incarnation) in ["w1", "w2"].into_iter().zip(held) {
        back.push(cell.agent(name, Some((incarnation, 1))).await);
    }
    until(&mut watching, &[], &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_leader_counts_silence_from_its_own_beginning() {
    let mut cell = Cell::start(3).await;
    let admin = cell.client(Role::Operator(Level::Admin), "alice");
    admin.init(ClusterId([5; 16]), DEADLINE).await.unwrap();
    let mut watching = cell.client(Role::Balancer, "b1").spawn_watch(None);
    let _living = cell.agent("w1", None).await;
    let silent = cell.agent("w2", None).await;
    until(&mut watching, &[], &[]).await;
    let at = watching.first().await.cell_time;

    drop(silent);
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let leads = cell.nodes.iter().map(|node| node.status().role == "leader");
    let leader = leads.collect::<Vec<_>>().iter().position(|leads| *leads);
    drop(cell.stops[leader.unwrap()].take());
    let after = until(&mut watching, &["w2"], &[]).await;
    assert!(after >= Duration::from_millis(2_500), "{after:?}");
    // Cell time went on over the change of leaders, at the pace of the leases.
    let passed = watching.first().await.cell_time.0 - at.0;
    assert!(passed >= 4 * 2_500, "{passed} ms");
}
