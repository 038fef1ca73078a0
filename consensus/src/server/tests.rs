//! Control nodes over real links and real disks, in one process.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use forebay_link::{Alpn, Authority, CredentialPaths, Credentials, Endpoint, Expect, Link};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::control::{self, failure::Failure, request::Request, response::Response};
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Level, Role};
use prost::Message;
use wire::command::Action;

use super::{Config, ControlNode, ServerError, Settings, start_with};
use crate::replica::ReplicaOptions;

mod crowd;
mod founding;
mod large;
mod leases;
mod membership;
mod planning;
mod rot;
mod strangers;
mod watching;

const PATIENCE: Duration = Duration::from_secs(3);

/// A cell on loopback: its CA, and the addresses that its nodes keep over restarts.
struct Cell {
    dir: tempfile::TempDir,
    authority: Authority,
    addresses: Vec<String>,
    nodes: Vec<Option<(tokio::runtime::Runtime, tokio::sync::oneshot::Sender<()>)>>,
    controls: Vec<Option<ControlNode>>,
    runtime: tokio::runtime::Runtime,
    operator: Option<Endpoint>,
    settings: Settings,
    replica: ReplicaOptions,
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap()
}

/// Below the ports that systems give out: a node that is down must find its own free when it returns.
fn free_port() -> u16 {
    let mut ports = std::iter::repeat_with(|| rand::random_range(10_000..32_000_u16));
    let is_free = |port: &u16| std::net::UdpSocket::bind(("127.0.0.1", *port)).is_ok();
    ports.find(is_free).unwrap()
}

impl Cell {
    fn new(size: usize) -> Self {
        Self::with(size, Settings::default())
    }

    fn with(size: usize, settings: Settings) -> Self {
        Self::with_replicas(size, settings, ReplicaOptions::default())
    }

    fn with_replicas(size: usize, settings: Settings, replica: ReplicaOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create("test", 9).unwrap();
        authority.save(dir.path()).unwrap();
        let mut cell = Self {
            addresses: (0..size)
                .map(|_| format!("127.0.0.1:{}", free_port()))
                .collect(),
            nodes: (0..size).map(|_| None).collect(),
            controls: (0..size).map(|_| None).collect(),
            dir,
            authority,
            runtime: runtime(),
            operator: None,
            settings,
            replica,
        };
        for node in 0..size {
            cell.start(node);
        }
        cell
    }

    fn paths(&self, role: Role, name: &str) -> CredentialPaths {
        let dir = self
            .dir
            .path()
            .join(format!("{role}-{name}").replace('/', "-"));
        let ca = self.dir.path().join("ca.pem");
        if !dir.exists() {
            self.authority
                .issue(role, name, 30)
                .unwrap()
                .save(&dir)
                .unwrap();
        }
        let (cert, key) = (
            dir.join(format!("{name}.pem")),
            dir.join(format!("{name}-key.pem")),
        );
        CredentialPaths { ca, cert, key }
    }

    fn disk(&self, node: usize) -> PathBuf {
        self.dir.path().join(format!("disk{}", node + 1))
    }

    fn start(&mut self, node: usize) {
        self.try_start(node).unwrap();
    }

    fn try_start(&mut self, node: usize) -> Result<(), ServerError> {
        let config = Config {
            data_dir: self.disk(node),
            listen: self.addresses[node].parse().unwrap(),
            credentials: self.paths(Role::Control, &format!("c{}", node + 1)),
            replica: ReplicaOptions {
                seed: rand::random(),
                ..self.replica
            },
            audit_bytes: 1 << 20,
        };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let own = runtime();
        let started: ControlNode = own.block_on(start_with(config, self.settings))?;
        self.controls[node] = Some(started.clone());
        own.spawn(started.run(async {
            let _ = stopped.await;
        }));
        self.nodes[node] = Some((own, stop));
        Ok(())
    }

    /// Ends a node and waits until its disk is free.
    fn stop(&mut self, node: usize) {
        self.controls[node] = None;
        let (own, stop) = self.nodes[node].take().unwrap();
        let _ = stop.send(());
        std::thread::sleep(Duration::from_millis(300));
        own.shutdown_timeout(PATIENCE);
    }

    fn link(&mut self, node: usize, role: Role) -> Link {
        let paths = self.paths(role, "tester");
        let address = self.addresses[node].clone();
        let (endpoint, link) = self.runtime.block_on(async {
            let endpoint = Endpoint::client(&Credentials::load(&paths).unwrap()).unwrap();
            let expect = Expect::role(Role::Control);
            let link = endpoint
                .connect(&address, Alpn::Control, &expect, PATIENCE)
                .await
                .unwrap();
            (endpoint, link)
        });
        self.operator = Some(endpoint);
        link
    }

    fn ask_as(&mut self, role: Role, node: usize, request: Request) -> Response {
        let link = self.link(node, role);
        self.runtime.block_on(async {
            let (mut send, mut recv) = link.open().unwrap();
            let request = control::Request {
                request: Some(request),
            };
            send.send(&Frame::message(Kind::Request, &request))
                .await
                .unwrap();
            send.finish();
            let frame = recv.recv().await.unwrap().unwrap();
            frame
                .decode::<control::Response>()
                .unwrap()
                .response
                .unwrap()
        })
    }

    fn ask(&mut self, node: usize, request: Request) -> Response {
        self.ask_as(Role::Operator(Level::Admin), node, request)
    }

    fn status(&mut self, node: usize) -> control::NodeStatus {
        match self.ask(node, Request::Probe(control::Probe {})) {
            Response::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    fn members(&mut self) -> Vec<wire::Member> {
        (0..self.addresses.len())
            .map(|node| wire::Member {
                id: node as u64 + 1,
                name: format!("c{}", node + 1),
                address: self.addresses[node].clone(),
                store_id: self.status(node).store_id,
                learner: false,
            })
            .collect()
    }

    fn bootstrap(&mut self, cluster: u8, members: &[wire::Member]) -> Vec<Response> {
        let cluster_id = vec![cluster; 16];
        (0..members.len())
            .map(|node| {
                let (cluster_id, members) = (cluster_id.clone().into(), members.to_vec());
                self.ask(
                    node,
                    Request::Bootstrap(control::Bootstrap {
                        cluster_id,
                        members,
                        feature_level: None,
                    }),
                )
            })
            .collect()
    }

    fn initialised(size: usize) -> Self {
        Self::initialised_with(size, Settings::default())
    }

    fn initialised_with(size: usize, settings: Settings) -> Self {
        Self::with(size, settings).founded()
    }

    fn founded(self) -> Self {
        let mut cell = self;
        let members = cell.members();
        for response in cell.bootstrap(1, &members) {
            assert!(
                matches!(response, Response::Bootstrapped(_)),
                "{response:?}"
            );
        }
        cell
    }

    fn within<T>(&mut self, limit: Duration, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(began.elapsed() < limit, "not within {limit:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn leader(&mut self) -> usize {
        self.within(PATIENCE, |cell| {
            let alive = (0..cell.nodes.len()).filter(|node| cell.nodes[*node].is_some());
            let leaders: Vec<usize> = alive.collect();
            leaders
                .into_iter()
                .find(|node| cell.status(*node).role == "leader")
        })
    }

    fn apply_config(&mut self, node: usize, sequence: u64, toml: &str, expected: u64) -> Response {
        let config = forebay_proto::config::Config::from_toml(toml)
            .unwrap()
            .to_wire();
        let action = Action::ApplyConfig(wire::ApplyConfig {
            config,
            expected_revision: expected,
        });
        let command = wire::Command {
            action: Some(action),
        }
        .encode_to_vec()
        .into();
        self.ask(
            node,
            Request::Propose(control::Propose {
                client: vec![5; 16].into(),
                sequence,
                command,
                reason: "a test".into(),
                deadline_ms: 2_000,
            }),
        )
    }

    fn facts(&mut self, node: usize) -> wire::Facts {
        match self.ask(node, Request::Read(control::Read { deadline_ms: 3_000 })) {
            Response::Facts(facts) => facts,
            other => panic!("{other:?}"),
        }
    }
}

fn revision(response: &Response) -> u64 {
    match response {
        Response::Outcome(wire::Outcome {
            outcome: Some(wire::outcome::Outcome::Done(done)),
        }) => done.revision,
        other => panic!("{other:?}"),
    }
}

fn wipe(disk: &Path) {
    std::fs::remove_dir_all(disk).unwrap();
}

const TWO_POOLS: &str = "[[pools]]\nname = \"default\"\n[[pools]]\nname = \"batch\"\n";

#[test]
fn a_node_waits_uninitialised_and_a_single_one_becomes_a_cluster() {
    let mut cell = Cell::new(1);
    assert_eq!(cell.status(0).role, "uninitialised");
    let read = cell.ask(0, Request::Read(control::Read { deadline_ms: 100 }));
    assert!(
        matches!(&read, Response::Failure(f) if matches!(f.failure, Some(Failure::Uninitialised(_)))),
        "{read:?}"
    );
    let members = cell.members();
    cell.bootstrap(1, &members);
    cell.leader();
    let again = cell.bootstrap(1, &members);
    assert!(
        matches!(again[0], Response::Bootstrapped(_)),
        "a repetition succeeds: {again:?}"
    );
    let other = cell.bootstrap(2, &members);
    assert!(
        matches!(&other[0], Response::Failure(f) if matches!(f.failure, Some(Failure::AlreadyInitialised(_)))),
        "{other:?}"
    );
}

#[test]
fn three_nodes_agree_survive_their_leader_and_restart_with_everything() {
    let mut cell = Cell::initialised(3);
    let leader = cell.leader();
    let written = cell.apply_config(leader, 1, TWO_POOLS, 0);
    assert!(revision(&written) > 1);
    let repeated = cell.apply_config(leader, 1, TWO_POOLS, 0);
    assert_eq!(
        revision(&repeated),
        revision(&written),
        "a repetition applies once"
    );
    for node in 0..3 {
        assert_eq!(
            cell.facts(node).config_revision,
            revision(&written),
            "node {node}"
        );
    }

    let follower = (leader + 1) % 3;
    let refused = cell.apply_config(follower, 2, TWO_POOLS, 0);
    assert!(
        matches!(&refused, Response::Failure(f) if matches!(&f.failure, Some(Failure::NotLeader(n)) if n.leader_address == cell.addresses[leader])),
        "{refused:?}"
    );

    cell.stop(leader);
    let next = cell.leader();
    assert_ne!(next, leader);
    let third = "[[pools]]\nname = \"default\"\n";
    let rewritten = cell.apply_config(next, 3, third, revision(&written));
    assert!(revision(&rewritten) > revision(&written));

    for node in (0..3).filter(|node| *node != leader) {
        cell.stop(node);
    }
    for node in 0..3 {
        cell.start(node);
    }
    cell.leader();
    for node in 0..3 {
        assert_eq!(
            cell.facts(node).config_revision,
            revision(&rewritten),
            "node {node}"
        );
    }
}

#[test]
fn a_member_with_a_wiped_disk_takes_no_part_and_says_why() {
    let mut cell = Cell::initialised(3);
    let leader = cell.leader();
    let written = revision(&cell.apply_config(leader, 1, TWO_POOLS, 0));
    let lost = (leader + 1) % 3;
    cell.stop(lost);
    wipe(&cell.disk(lost));
    cell.start(lost);
    let problem = cell.within(PATIENCE, |cell| {
        let status = cell.status(lost);
        assert_eq!(status.role, "uninitialised");
        (!status.problem.is_empty()).then_some(status.problem)
    });
    assert!(problem.contains("lost its disk"), "{problem}");
    assert_eq!(
        cell.facts(leader).config_revision,
        written,
        "the others go on"
    );

    // Two of three: no quorum, no second history, and init refuses to begin one.
    let second = (leader + 2) % 3;
    cell.stop(second);
    wipe(&cell.disk(second));
    cell.start(second);
    cell.within(PATIENCE, |cell| {
        (!cell.status(second).problem.is_empty()).then_some(())
    });
    let read = cell.ask(leader, Request::Read(control::Read { deadline_ms: 300 }));
    assert!(
        matches!(&read, Response::Failure(f) if matches!(f.failure, Some(Failure::NoQuorum(_)))),
        "{read:?}"
    );
    let wiped: Vec<_> = cell
        .members()
        .into_iter()
        .filter(|m| m.id != leader as u64 + 1)
        .collect();
    for node in [lost, second] {
        let (cluster_id, members) = (vec![7; 16].into(), wiped.clone());
        let request = control::Bootstrap {
            cluster_id,
            members,
            feature_level: None,
        };
        let refused = cell.ask(node, Request::Bootstrap(request));
        assert!(
            matches!(&refused, Response::Failure(f) if matches!(f.failure, Some(Failure::Uninitialised(_)))),
            "{refused:?}"
        );
    }
}

#[test]
fn what_a_role_may_not_ask_is_denied() {
    let mut cell = Cell::initialised(1);
    cell.leader();
    let denied = |response: &Response| matches!(response, Response::Failure(f) if matches!(f.failure, Some(Failure::Unauthorized(_))));
    let read = || Request::Read(control::Read { deadline_ms: 100 });
    assert!(denied(&cell.ask_as(Role::Balancer, 0, read())));
    assert!(denied(&cell.ask_as(Role::Agent, 0, read())));
    let register = Action::Register(wire::RegisterWorker {
        name: "somebody-else".into(),
        ..wire::RegisterWorker::default()
    });
    let command = wire::Command {
        action: Some(register),
    }
    .encode_to_vec();
    let propose = |command: &[u8]| {
        Request::Propose(control::Propose {
            client: vec![1; 16].into(),
            sequence: 1,
            command: command.to_vec().into(),
            reason: String::new(),
            deadline_ms: 1_000,
        })
    };
    assert!(
        denied(&cell.ask_as(Role::Agent, 0, propose(&command))),
        "another worker's name"
    );
    assert!(
        denied(&cell.ask(0, propose(&command))),
        "an operator is no agent"
    );
    let garbage = cell.ask(0, propose(b"\xff\xff"));
    assert!(
        matches!(&garbage, Response::Failure(f) if matches!(f.failure, Some(Failure::BadRequest(_)))),
        "{garbage:?}"
    );
}
