//! A balancer follows the facts of a real control node for as long as there are any to follow.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::{Answer, Client, PATIENCE, Script, WHOLE, agent, credentials, loopback};
use forebay_balancer::{Config, run};
use forebay_consensus::server;
use forebay_control_client::ControlClient;
use forebay_link::{Authority, Credentials, Endpoint};
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::{Desired, RegisterWorker, SetDesired};
use forebay_proto::{ClientId, ClusterId, Level, Role};
use tokio::sync::oneshot;

async fn chat(listen: SocketAddr) -> Answer {
    let mut client = Client::to(listen).await;
    client.chat(false).await;
    client.answer().await
}

/// Asks until it is answered so.
async fn until(listen: SocketAddr, what: &str, holds: impl Fn(&Answer) -> bool) {
    let began = Instant::now();
    loop {
        let answer = chat(listen).await;
        if holds(&answer) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{what}: {}", answer.body);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Below the ports that systems give out: a node that is down must find its own free when it returns.
fn free_port() -> SocketAddr {
    let mut ports = std::iter::repeat_with(|| rand::random_range(10_000..32_000_u16));
    let is_free = |port: &u16| std::net::UdpSocket::bind(("127.0.0.1", *port)).is_ok();
    SocketAddr::from(([127, 0, 0, 1], ports.find(is_free).unwrap()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_change_of_the_facts_arrives_and_the_last_ones_outlive_the_control_plane() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create("test", 1).unwrap();
    let paths = |role, name: &str| credentials(dir.path(), &authority, role, name);
    let load = |role, name: &str| Credentials::load(&paths(role, name)).unwrap();
    let node = server::start(server::Config {
        data_dir: dir.path().join("control"),
        listen: loopback(),
        credentials: paths(Role::Control, "c1"),
        replica: Default::default(),
        audit_bytes: 1 << 20,
    });
    let node = node.await.unwrap();
    let control = vec![node.local_addr().unwrap().to_string()];
    let (stop_control, stopped) = oneshot::channel::<()>();
    let controlling = tokio::spawn(async move {
        node.run(async { drop(stopped.await) }).await.unwrap();
    });
    let client = |credentials: &Credentials, id| {
        let endpoint = Endpoint::client(credentials).unwrap();
        ControlClient::new(endpoint, control.clone(), ClientId([id; 16]), 1)
    };
    let admin = client(&load(Role::Operator(Level::Admin), "alice"), 1);
    admin.init(ClusterId([5; 16]), PATIENCE).await.unwrap();

    let listen = free_port();
    let config = Config {
        listen,
        admin: None,
        control: control.clone(),
        data_dir: dir.path().join("balancer"),
        credentials: paths(Role::Balancer, "b1"),
        keys: None,
        any_key_tenant: Some("dev".into()),
        tls: None,
        max_body_bytes: 32 << 20,
        hold_headers_ms: 15_000,
        drain_timeout_ms: 1_000,
        receipts: 0,
    };
    let (stop, stopped) = oneshot::channel::<()>();
    let balancing = tokio::spawn(run(config, async { drop(stopped.await) }));
    while tokio::net::TcpStream::connect(listen).await.is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let unknown = |answer: &Answer| answer.status == 404;
    until(listen, "facts without workers", unknown).await;

    let own = load(Role::Agent, "w1");
    let worker = agent(&own, "w1", 1, 4, &Script::default());
    let register = Action::Register(RegisterWorker {
        name: "w1".into(),
        spec: worker.known.spec.to_wire(),
        held: None,
        start: 1,
        takeover: false,
    });
    let registrar = client(&own, 2);
    let done = registrar.propose(register, "test", PATIENCE).await.unwrap();
    let granted = done.worker.unwrap().incarnation.to_wire();
    let endpoint = worker.endpoint.as_ref().unwrap();
    endpoint.update_hello(|hello| hello.incarnation = Some(granted));
    let served = |answer: &Answer| answer.body == WHOLE;
    until(listen, "a worker that registered", served).await;

    for (desired, status) in [(Desired::Cordoned, 503), (Desired::Ready, 200)] {
        let action = Action::SetDesired(SetDesired {
            name: "w1".into(),
            desired: desired.into(),
            override_guard: true,
        });
        admin.propose(action, "test", PATIENCE).await.unwrap();
        until(listen, desired.as_str_name(), |a| a.status == status).await;
    }

    stop_control.send(()).unwrap();
    controlling.await.unwrap();
    for _ in 0..3 {
        assert!(served(&chat(listen).await));
    }
    stop.send(()).unwrap();
    balancing.await.unwrap().unwrap();
}
