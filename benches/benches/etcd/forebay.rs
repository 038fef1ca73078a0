//! Three control nodes, and agents that declare their workers.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use forebay_benches::servers::{Servers, free_ports};
use forebay_control_client::ControlClient;
use forebay_link::{Authority, CredentialPaths, Credentials, Endpoint};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::{RegisterWorker, command::Action};
use forebay_proto::{ClientId, ClusterId, Incarnation, Level, Role};

use crate::VALUE_BYTES;

const DEADLINE: Duration = Duration::from_secs(10);

/// One client: an agent that says anew what its worker is.
pub(crate) struct Agent {
    name: String,
    client: ControlClient,
    held: Option<Incarnation>,
    writes: u64,
}

impl Agent {
    pub(crate) async fn write(&mut self) {
        self.writes += 1;
        let action = Action::Register(RegisterWorker {
            name: self.name.clone(),
            spec: spec(self.writes).to_wire(),
            held: self.held.map(Incarnation::to_wire),
            start: 0,
            takeover: false,
        });
        let done = self.client.propose(action, "", DEADLINE).await;
        let done = done.unwrap_or_else(|problem| panic!("{}: {problem}", self.name));
        assert!(!done.unchanged, "each write is one");
        self.held = done.worker.map(|worker| worker.incarnation);
    }
}

/// A declaration as large as the values of the other side.
fn spec(number: u64) -> WorkerSpec {
    let mut spec = WorkerSpec {
        pool: "default".into(),
        advertise: "127.0.0.1:7420".into(),
        engine: "emulated".into(),
        models: vec!["m".into()],
        revision: format!("{number:020}"),
        gpu_type: String::new(),
        gpu_count: 0,
        kv_tokens: 0,
        max_context_tokens: 0,
        adapters: vec![],
        zone: String::new(),
        labels: BTreeMap::new(),
        slots: 4,
    };
    let label = |bytes| BTreeMap::from([("value".to_owned(), "x".repeat(bytes))]);
    spec.labels = label(1);
    let rest = VALUE_BYTES.saturating_sub(spec.to_wire().len());
    spec.labels = label(rest);
    spec
}

pub(crate) async fn start(program: &Path, dir: &Path, clients: usize) -> (Servers, Vec<Agent>) {
    let authority = Authority::create("bench", 1).unwrap();
    let issue = |role, name: &str| {
        let own = dir.join(name);
        authority.save(&own).unwrap();
        let (cert, key) = authority.issue(role, name, 30).unwrap().save(&own).unwrap();
        let ca = own.join("ca.pem");
        CredentialPaths { ca, cert, key }
    };
    let control = free_ports::<3>().map(|port| format!("127.0.0.1:{port}"));
    let client = |role, name: &str| {
        let credentials = Credentials::load(&issue(role, name)).unwrap();
        let endpoint = Endpoint::client(&credentials).unwrap();
        let (id, seed) = (ClientId(rand::random()), rand::random());
        ControlClient::new(endpoint, control.to_vec(), id, seed)
    };
    let nodes = control.iter().zip(1..).map(|(address, number)| {
        let name = format!("c{number}");
        let paths = issue(Role::Control, &name);
        let mut node = Command::new(program);
        node.args(["control", "--admin", "127.0.0.1:0", "--listen", address]);
        node.arg("--data-dir").arg(dir.join(&name).join("data"));
        node.arg("--ca").arg(paths.ca).arg("--cert").arg(paths.cert);
        node.arg("--key").arg(paths.key).env("FOREBAY_LOG", "error");
        node
    });
    let nodes = Servers::start(nodes);
    let admin = client(Role::Operator(Level::Admin), "admin");
    while admin
        .init(ClusterId(rand::random()), DEADLINE)
        .await
        .is_err()
    {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut agents = vec![];
    for number in 0..clients {
        let name = format!("w{number}");
        let mut agent = Agent {
            client: client(Role::Agent, &name),
            name,
            held: None,
            writes: 0,
        };
        agent.write().await;
        agents.push(agent);
    }
    (nodes, agents)
}
