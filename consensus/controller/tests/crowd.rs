//! A thousand agents and watchers over real links: what they cost the leader and its commits.

#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // real sockets and disks in real time
#![allow(clippy::print_stdout)] // the figures are what these tests are for

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_consensus::server::{Config, Leader, start};
use forebay_control_client::{ControlClient, RenewState, Renewing, Watching};
use forebay_link::{Authority, CredentialPaths, Credentials, Endpoint};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::{self, Observed};
use forebay_proto::{ClientId, ClusterId, Incarnation, Level, Revision, Role};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinSet;

const PATIENCE: Duration = Duration::from_secs(30);
/// Writes in a row that a median is taken of.
const WRITES: usize = 60;

/// Three control nodes with their controllers, on threads of their own.
struct Cell {
    nodes: Runtime,
    /// Everyone who asks.
    clients: Runtime,
    directory: tempfile::TempDir,
    authority: Authority,
    addresses: Vec<String>,
    leaders: Vec<Leader>,
}

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap()
}

impl Cell {
    fn founded() -> (Self, ControlClient) {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::create("test", 1).unwrap();
        authority.save(directory.path()).unwrap();
        let mut cell = Self {
            nodes: runtime(),
            clients: runtime(),
            directory,
            authority,
            addresses: Vec::new(),
            leaders: Vec::new(),
        };
        let mut started = Vec::new();
        for name in ["c1", "c2", "c3"] {
            let config = Config {
                data_dir: cell.directory.path().join(format!("{name}-data")),
                listen: ([127, 0, 0, 1], 0).into(),
                credentials: cell.issue(Role::Control, name),
                replica: Default::default(),
                audit_bytes: 1 << 20,
            };
            let node = cell.nodes.block_on(start(config)).unwrap();
            cell.addresses.push(node.local_addr().unwrap().to_string());
            cell.nodes.spawn(node.clone().run(std::future::pending()));
            started.push(node);
        }
        let admin = cell.client(Role::Operator(Level::Admin), "alice", 1);
        let founding = admin.init(ClusterId([5; 16]), PATIENCE);
        cell.clients.block_on(founding).unwrap();
        for node in started {
            let leader = cell.nodes.block_on(node.leader()).unwrap();
            cell.nodes
                .spawn(forebay_controller::run(Arc::new(leader.clone())));
            cell.leaders.push(leader);
        }
        // The first answer comes once somebody leads.
        cell.clients.block_on(admin.read(PATIENCE)).unwrap();
        (cell, admin)
    }

    fn issue(&self, role: Role, name: &str) -> CredentialPaths {
        let own = self.directory.path().join(name);
        let issued = self.authority.issue(role, name, 30).unwrap();
        let (cert, key) = issued.save(&own).unwrap();
        let ca = self.directory.path().join("ca.pem");
        CredentialPaths { ca, cert, key }
    }

    fn client(&self, role: Role, name: &str, id: u32) -> ControlClient {
        let paths = self.issue(role, name);
        self.client_of(&Credentials::load(&paths).unwrap(), id)
    }

    fn client_of(&self, credentials: &Credentials, id: u32) -> ControlClient {
        let _runtime = self.clients.enter();
        let endpoint = Endpoint::client(credentials).unwrap();
        let mut bytes = [0xc0; 16];
        bytes[..4].copy_from_slice(&id.to_be_bytes());
        ControlClient::new(endpoint, self.addresses.clone(), ClientId(bytes), id.into())
    }

    /// Who leads in which term, by the address.
    fn reign(&self, admin: &ControlClient) -> (String, u64) {
        let probed = self.clients.block_on(admin.probe_all(PATIENCE));
        let leads = probed.into_iter().find_map(|(address, status)| {
            let status = status.ok()?;
            (status.role == "leader").then_some((address, status.term))
        });
        leads.expect("somebody leads")
    }

    /// How many agents the leader holds a lease of that ran out, and for how many it holds one.
    fn leases(&self) -> (usize, usize) {
        let leader = self.leaders.iter().find(|leader| leader.is_leader());
        leader.map_or((0, 0), |leader| {
            leader.with_leases(|leases, now| {
                let ttl = forebay_consensus::fleet::lease::AGENT_TTL;
                (leases.expired(now, ttl).len(), leases.agents().len())
            })
        })
    }

    /// Writes, each begun when all of these have seen the one before: how long each took.
    fn watched_writes(&self, admin: &ControlClient, watching: &mut [Watching]) -> Vec<Duration> {
        let mut took = Vec::new();
        for number in 0..WRITES {
            took.push(self.clients.block_on(write(admin, number)));
            let all_saw = async {
                let newest = admin.read(PATIENCE).await.unwrap().revision;
                for watching in &mut *watching {
                    let saw = watching.facts.wait_for(|facts| {
                        facts.as_ref().is_some_and(|facts| facts.revision >= newest)
                    });
                    tokio::time::timeout(PATIENCE, saw).await.unwrap().unwrap();
                }
            };
            self.clients.block_on(all_saw);
        }
        took.sort();
        took
    }

    /// Writes of somebody else, one after the other: how long each took.
    fn writes(&self, admin: &ControlClient, count: usize) -> Vec<Duration> {
        let mut took: Vec<_> = (0..count)
            .map(|number| self.clients.block_on(write(admin, number)))
            .collect();
        took.sort();
        took
    }
}

async fn write(admin: &ControlClient, number: usize) -> Duration {
    let pools = ["default", "default\"\n[[pools]]\nname = \"batch"][number % 2];
    let text = format!("[[pools]]\nname = \"{pools}\"\n");
    let config = forebay_proto::config::Config::from_toml(&text)
        .unwrap()
        .to_wire();
    let held = admin.read(PATIENCE).await.unwrap().config_revision;
    let apply = Action::ApplyConfig(fleet::ApplyConfig {
        config,
        expected_revision: held.0,
    });
    let asked = Instant::now();
    admin.propose(apply, "a write", PATIENCE).await.unwrap();
    asked.elapsed()
}

/// One agent as the worker's agent runs it.
struct Agent {
    _client: ControlClient,
    incarnation: Incarnation,
    _watching: Watching,
    renewing: Renewing,
    _state: watch::Sender<RenewState>,
}

impl Agent {
    /// Registers, watches, and has renewed once.
    async fn start(client: ControlClient, name: String, held: Option<(Incarnation, u32)>) -> Self {
        let began = Instant::now();
        let watching = client.spawn_watch(None);
        let incarnation = loop {
            let register = register(&name, held);
            match client.propose(register, "start", PATIENCE).await {
                Ok(done) => break done.worker.unwrap().incarnation,
                Err(error) => assert!(began.elapsed() < PATIENCE, "{name}: {error}"),
            }
        };
        let (state, said) = watch::channel(RenewState {
            incarnation: Some(incarnation),
            applied_revision: Revision(1),
            observed: Observed::Ready,
            work: None,
            heat: None,
        });
        let mut renewing = client.spawn_renew(said);
        let renewed = renewing.status.wait_for(|status| status.renewed.is_some());
        tokio::time::timeout(PATIENCE, renewed)
            .await
            .unwrap()
            .unwrap();
        Self {
            _client: client,
            incarnation,
            _watching: watching,
            renewing,
            _state: state,
        }
    }

    fn silent_for(&self) -> Duration {
        let renewed = self.renewing.status.borrow().renewed;
        renewed.unwrap().elapsed()
    }
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
        held: held.map(|(incarnation, _)| incarnation.to_wire()),
        start: held.map_or(0, |(_, start)| start),
        takeover: false,
    })
}

fn p(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

fn agents_come_back_at_once(count: u32) {
    let (cell, admin) = Cell::founded();
    let began = Instant::now();
    let credentials: Vec<_> = (0..count)
        .map(|number| {
            let name = format!("w{number}");
            let paths = cell.issue(Role::Agent, &name);
            (name, Credentials::load(&paths).unwrap())
        })
        .collect();
    println!("{count} certificates in {:?}", began.elapsed());
    let began = Instant::now();
    let first = credentials
        .iter()
        .zip(100..)
        .map(|((name, credentials), id)| (cell.client_of(credentials, id), name.clone(), None));
    let agents = cell.clients.block_on(all(first.collect()));
    println!("{count} agents registered in {:?}", began.elapsed());
    let quiet = cell.writes(&admin, WRITES);
    let (leader, term) = cell.reign(&admin);

    // All links are gone at once, and every process is back as its next start.
    let again = credentials
        .iter()
        .zip(10_000..)
        .map(|((name, credentials), id)| {
            let held = agents[name].incarnation;
            (
                cell.client_of(credentials, id),
                name.clone(),
                Some((held, 1)),
            )
        });
    let again: Vec<_> = again.collect();
    drop(agents);
    let began = Instant::now();
    let back = cell.clients.spawn(all(again));
    let (mut storm, mut expired) = (Vec::new(), 0);
    while !back.is_finished() {
        let number = storm.len();
        storm.push(cell.clients.block_on(write(&admin, number)));
        expired = expired.max(cell.leases().0);
    }
    let took = began.elapsed();
    let agents = cell.clients.block_on(back).unwrap();
    storm.sort();
    println!(
        "{count} agents back in {took:?}; writes p50 {:?} p99 {:?} before, p50 {:?} p99 {:?} of {} meanwhile",
        p(&quiet, 50),
        p(&quiet, 99),
        p(&storm, 50),
        p(&storm, 99),
        storm.len(),
    );
    assert_eq!(agents.len(), count as usize);
    assert_eq!(cell.reign(&admin), (leader, term), "the leader stands");
    assert_eq!(expired, 0, "no lease ran out");
    assert_eq!(cell.leases(), (0, count as usize));
    let silent = agents.values().map(Agent::silent_for).max().unwrap();
    assert!(silent < Duration::from_secs(5), "{silent:?}");
    assert!(took < PATIENCE, "{took:?}");
    assert!(p(&storm, 99) < Duration::from_secs(2), "{storm:?}");
    let facts = cell.clients.block_on(admin.read(PATIENCE)).unwrap();
    assert!(facts.workers.values().all(|worker| !worker.lost));
    drop(agents);
}

/// A process that starts: its client, its name, and what it was before.
type Starting = (ControlClient, String, Option<(Incarnation, u32)>);

async fn all(asked: Vec<Starting>) -> BTreeMap<String, Agent> {
    let mut starting = JoinSet::new();
    for (client, name, held) in asked {
        starting.spawn(async move { (name.clone(), Agent::start(client, name, held).await) });
    }
    starting.join_all().await.into_iter().collect()
}

fn watchers_cost_commits_little(count: u32) {
    let (cell, admin) = Cell::founded();
    let alone = cell.watched_writes(&admin, &mut []);
    let clients: Vec<_> = (0..count)
        .map(|number| cell.client(Role::Balancer, &format!("b{number}"), 100 + number))
        .collect();
    let began = Instant::now();
    let watching = async {
        let mut watching: Vec<_> = clients
            .iter()
            .map(|client| client.spawn_watch(None))
            .collect();
        for watching in &mut watching {
            watching.first().await;
        }
        watching
    };
    let mut watching = cell.clients.block_on(watching);
    println!("{count} watchers in {:?}", began.elapsed());
    let began = Instant::now();
    let watched = cell.watched_writes(&admin, &mut watching);
    let round = began.elapsed() / WRITES as u32;
    let ratio = |percent| p(&watched, percent).as_secs_f64() / p(&alone, percent).as_secs_f64();
    println!(
        "commits alone p50 {:?} p99 {:?}, with {count} watchers p50 {:?} p99 {:?}: {:.2} and {:.2} times; \
         {round:?} until the last watcher has one",
        p(&alone, 50),
        p(&alone, 99),
        p(&watched, 50),
        p(&watched, 99),
        ratio(50),
        ratio(99),
    );
    // On a machine that does much else the ratio of two short times says little.
    assert!(
        ratio(50) <= 3.0 || p(&watched, 50) < Duration::from_millis(30),
        "{watched:?}"
    );
    assert!(p(&watched, 99) < Duration::from_secs(1), "{watched:?}");
}

#[test]
fn agents_that_come_back_at_once_depose_nobody_and_lose_no_lease() {
    agents_come_back_at_once(60);
}

#[test]
fn watchers_do_not_slow_commits() {
    watchers_cost_commits_little(100);
}

/// `cargo test --release -p forebay-controller --test crowd -- --ignored --nocapture --test-threads 1`
#[test]
#[ignore = "needs a machine of its own, and a release build"]
fn a_thousand_agents_come_back_at_once() {
    agents_come_back_at_once(1_000);
}

#[test]
#[ignore = "needs a machine of its own, and a release build"]
fn a_thousand_watchers_do_not_slow_commits() {
    watchers_cost_commits_little(1_000);
}
