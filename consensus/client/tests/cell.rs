//! The client against real control nodes in one process: founding, agreeing, following, failing over.

#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // real sockets and disks in real time

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use forebay_consensus::server::{Config, start};
use forebay_control_client::{ClientError, ControlClient, Facts, RenewState, WatchProblem};
use forebay_link::{Authority, CredentialPaths, Credentials, Endpoint};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::{self, Desired, Observed};
use forebay_proto::{ClientId, ClusterId, Incarnation, Level, Role};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

const DEADLINE: Duration = Duration::from_secs(10);

struct Cell {
    directory: tempfile::TempDir,
    authority: Authority,
    nodes: BTreeMap<String, (oneshot::Sender<()>, JoinHandle<()>)>,
    clients: u8,
}

impl Cell {
    async fn start(nodes: usize) -> Self {
        let mut cell = Self {
            directory: tempfile::tempdir().unwrap(),
            authority: Authority::create("test", 1).unwrap(),
            nodes: BTreeMap::new(),
            clients: 0,
        };
        for number in 0..nodes {
            let name = format!("c{number}");
            let node = start(Config {
                data_dir: cell.directory.path().join(format!("{name}-data")),
                listen: ([127, 0, 0, 1], 0).into(),
                credentials: cell.issue(Role::Control, &name),
                replica: Default::default(),
                audit_bytes: 1 << 20,
            });
            let node = node.await.unwrap();
            let address = node.local_addr().unwrap().to_string();
            let (stop, stopped) = oneshot::channel();
            let run = tokio::spawn(async move {
                let stopped = async { drop(stopped.await) };
                node.run(stopped).await.unwrap();
            });
            cell.nodes.insert(address, (stop, run));
        }
        cell
    }

    fn issue(&self, role: Role, name: &str) -> CredentialPaths {
        let own: PathBuf = tempfile::tempdir_in(self.directory.path()).unwrap().keep();
        self.authority.save(&own).unwrap();
        let issued = self.authority.issue(role, name, 30).unwrap();
        let (cert, key) = issued.save(&own).unwrap();
        let ca = own.join("ca.pem");
        CredentialPaths { ca, cert, key }
    }

    fn addresses(&self) -> Vec<String> {
        self.nodes.keys().cloned().collect()
    }

    fn client(&mut self, role: Role, name: &str) -> ControlClient {
        self.clients += 1;
        let credentials = Credentials::load(&self.issue(role, name)).unwrap();
        let endpoint = Endpoint::client(&credentials).unwrap();
        let id = ClientId([self.clients; 16]);
        ControlClient::new(endpoint, self.addresses(), id, self.clients.into())
    }

    async fn leader(&self, client: &ControlClient) -> String {
        for (address, status) in client.probe_all(DEADLINE).await {
            if status.is_ok_and(|status| status.role == "leader") {
                return address;
            }
        }
        panic!("nobody leads")
    }

    async fn stop(&mut self, address: &str) {
        let (stop, run) = self.nodes.remove(address).unwrap();
        let _ = stop.send(());
        run.await.unwrap();
    }
}

fn register(name: &str, held: Option<Incarnation>, start: u32) -> Action {
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
        held: held.map(Incarnation::to_wire),
        start,
        takeover: false,
    })
}

fn cordon(name: &str, override_guard: bool) -> Action {
    Action::SetDesired(fleet::SetDesired {
        name: name.into(),
        desired: Desired::Cordoned.into(),
        override_guard,
    })
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(DEADLINE, future).await;
    done.expect("in time")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cell_is_founded_agrees_and_survives_its_leader() {
    let mut cell = Cell::start(3).await;
    let admin = cell.client(Role::Operator(Level::Admin), "alice");
    let error = admin.read(DEADLINE).await.unwrap_err();
    assert!(
        matches!(error, ClientError::Uninitialised { .. }),
        "{error}"
    );

    let founded = admin.init(ClusterId([5; 16]), DEADLINE).await.unwrap();
    assert_eq!(founded.members.len(), 3);
    assert!(admin.init(ClusterId([6; 16]), DEADLINE).await.is_err());

    let agent = cell.client(Role::Agent, "w1");
    let data = tempfile::tempdir().unwrap();
    let mut watching = agent.spawn_watch(Some(data.path()));
    let done = agent
        .propose(register("w1", None, 0), "start", DEADLINE)
        .await;
    let incarnation = done.unwrap().worker.unwrap().incarnation;
    let seen = watching.facts.wait_for(|facts| known(facts.as_deref()));
    within(seen).await.unwrap();

    let (state, said) = watch::channel(RenewState {
        incarnation: Some(incarnation),
        applied_revision: watching.first().await.revision,
        observed: Observed::Ready,
        work: None,
        heat: None,
    });
    let mut renewing = agent.spawn_renew(said);
    let renewed = renewing.status.wait_for(|status| status.renewed.is_some());
    within(renewed).await.unwrap();

    let refused = admin.propose(cordon("w1", false), "", DEADLINE).await;
    assert!(matches!(
        refused,
        Err(ClientError::Refused(Refusal::LeavesModelEmpty { .. }))
    ));

    let leader = cell.leader(&admin).await;
    cell.stop(&leader).await;
    let began = Instant::now();
    let cordoned = admin.propose(cordon("w1", true), "", DEADLINE).await;
    let took = began.elapsed();
    let cordoned = cordoned.unwrap();
    println!("a command was back {took:?} after its leader was stopped");
    assert!(took < Duration::from_secs(3), "{took:?}");

    // The agent hears of it, says so, and the cordon is in force.
    let heard = watching.facts.wait_for(|facts| {
        facts
            .as_ref()
            .is_some_and(|f| f.revision >= cordoned.revision)
    });
    let revision = within(heard).await.unwrap().as_ref().unwrap().revision;
    state.send_modify(|state| {
        state.applied_revision = revision;
        state.observed = Observed::Cordoned;
    });
    let in_force = watching.facts.wait_for(|facts| {
        let worker = facts.as_ref().and_then(|facts| facts.workers.get("w1"));
        worker.is_some_and(|worker| worker.is_in_force() && worker.observed == Observed::Cordoned)
    });
    within(in_force).await.unwrap();

    let again = agent
        .propose(register("w1", Some(incarnation), 1), "restart", DEADLINE)
        .await;
    let worker = again.unwrap().worker.unwrap();
    assert!(worker.incarnation > incarnation);
    assert_eq!(worker.desired, Desired::Cordoned);
    let superseded = renewing.status.wait_for(|status| status.problem.is_some());
    let problem = within(superseded).await.unwrap().problem.clone();
    assert!(
        matches!(problem, Some(ClientError::Superseded { .. })),
        "{problem:?}"
    );
    let tail = admin.audit(10, DEADLINE).await.unwrap();
    assert!(tail.entries.len() >= 4);

    // Without a quorum facts stay, and a command says so.
    let last = cell.addresses();
    cell.stop(&last[0]).await;
    let brief = Duration::from_secs(3);
    let error = admin.propose(cordon("w1", true), "", brief).await;
    assert!(matches!(
        error,
        Err(ClientError::NoQuorum { .. } | ClientError::DeadlineExceeded { .. })
    ));
    assert!(known(watching.facts.borrow().as_deref()));
}

fn known(facts: Option<&Facts>) -> bool {
    facts.is_some_and(|facts| facts.workers.contains_key("w1"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_with_facts_of_one_cluster_does_not_speak_to_another() {
    let mut ours = Cell::start(1).await;
    let founder = ours.client(Role::Operator(Level::Admin), "alice");
    founder.init(ClusterId([5; 16]), DEADLINE).await.unwrap();
    let client = ours.client(Role::Balancer, "b1");
    let data = tempfile::tempdir().unwrap();
    let held = fleet::Facts {
        cluster_id: ClusterId([6; 16]).to_wire(),
        revision: 9,
        config: forebay_proto::config::Config::default().to_wire(),
        ..Default::default()
    };
    let held = Facts::from_wire(held).unwrap();
    forebay_control_client::FactsFile::new(data.path())
        .save(&held)
        .unwrap();
    let mut watching = client.spawn_watch(Some(data.path()));
    let refused = watching
        .status
        .wait_for(|status| matches!(status.problem, Some(WatchProblem::WrongCluster { .. })));
    within(refused).await.unwrap();
    let brief = Duration::from_millis(500);
    let error = client.read(brief).await.unwrap_err().to_string();
    assert!(error.contains("another data directory"), "{error}");
    assert_eq!(watching.first().await.cluster_id, held.cluster_id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_inits_at_once_found_one_cluster() {
    let mut cell = Cell::start(3).await;
    let mut one = cell.addresses();
    let founders = [[5; 16], [6; 16]].map(|id| {
        one.reverse();
        let credentials = Credentials::load(&cell.issue(Role::Operator(Level::Admin), "alice"));
        let endpoint = Endpoint::client(&credentials.unwrap()).unwrap();
        let client = ControlClient::new(endpoint, one.clone(), ClientId(id), id[0].into());
        tokio::spawn(async move { client.init(ClusterId(id), DEADLINE).await })
    });
    let mut founded = vec![];
    for founder in founders {
        founded.extend(founder.await.unwrap());
    }
    assert_eq!(founded.len(), 1, "one of them");
    let admin = cell.client(Role::Operator(Level::Admin), "alice");
    for (address, status) in admin.probe_all(DEADLINE).await {
        let found = ClusterId::from_wire(&status.unwrap().cluster_id).unwrap();
        assert_eq!(found, founded[0].cluster_id, "{address}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_added_at_once_and_an_add_that_was_interrupted_is_finished() {
    let mut cell = Cell::start(4).await;
    let addresses = cell.addresses();
    let mut client = |control: &[String]| {
        cell.clients += 1;
        let paths = cell.issue(Role::Operator(Level::Admin), "alice");
        let endpoint = Endpoint::client(&Credentials::load(&paths).unwrap()).unwrap();
        let id = ClientId([cell.clients; 16]);
        ControlClient::new(endpoint, control.to_vec(), id, cell.clients.into())
    };
    let first = &addresses[..1];
    let (one, other) = (client(first), client(first));
    one.init(ClusterId([1; 16]), DEADLINE).await.unwrap();

    // Both would take the same id; whoever comes second takes the next.
    let (two, three) = tokio::join!(
        one.add_member(&addresses[1], "a test", DEADLINE),
        other.add_member(&addresses[2], "a test", DEADLINE),
    );
    let mut ids = [two.unwrap().0.id.0, three.unwrap().0.id.0];
    ids.sort_unstable();
    assert_eq!(ids, [2, 3]);

    // Agreed on, and then whoever asked was gone.
    one.read(DEADLINE).await.unwrap();
    let probed = one.probe_all(DEADLINE).await;
    assert_eq!(probed.len(), 3, "members are learnt");
    let spare = client(&addresses[3..]).probe_all(DEADLINE).await;
    let spare = spare[0].1.clone().unwrap();
    let added = fleet::Member {
        id: 4,
        name: spare.name,
        address: addresses[3].clone(),
        store_id: spare.store_id,
        learner: true,
    };
    let change = fleet::ChangeMembers {
        add: vec![added],
        ..fleet::ChangeMembers::default()
    };
    one.change_members(change, "a test", DEADLINE)
        .await
        .unwrap();
    let (member, unchanged) = one
        .add_member(&addresses[3], "a test", DEADLINE)
        .await
        .unwrap();
    assert_eq!((member.id.0, unchanged), (4, false));
    assert!(one.caught_up(&member, DEADLINE).await);
    let again = one.add_member(&addresses[3], "a test", DEADLINE).await;
    assert_eq!(again, Ok((member, true)));
}
