//! The whole agent beside a real control node: it joins, obeys, restarts, is superseded, leaves.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    dead_code
)] // a test of the rims: sockets and clocks

mod common;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::{Cell, Engine, PATIENCE, chat, place};
use forebay_consensus::server;
use forebay_control_client::{ControlClient, Facts, WorkerFact};
use forebay_link::{Alpn, Credentials, Endpoint, Expect, Link};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::{Desired, Observed, RegisterWorker, RemoveWorker, SetDesired};
use forebay_proto::wire::work::{End, RefusalReason, Refused, Trailer};
use forebay_proto::{ClientId, ClusterId, Incarnation, Level, Role};
use forebay_worker_agent::{AgentError, Config, run};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

const ANYWHERE: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

struct World {
    cell: Cell,
    control: String,
    node: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
    admin: ControlClient,
    engine: Engine,
}

struct Process {
    listen: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), AgentError>>,
}

impl World {
    async fn new() -> Self {
        let cell = Cell::new();
        let node = server::start(server::Config {
            data_dir: cell.path().join("control"),
            listen: ANYWHERE.into(),
            credentials: cell.paths(Role::Control, "c1"),
            replica: Default::default(),
            audit_bytes: 1 << 20,
        });
        let node = node.await.unwrap();
        let control = node.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            node.run(async { drop(stopped.await) }).await.unwrap();
        });
        let credentials = cell.credentials(Role::Operator(Level::Admin), "alice");
        let endpoint = Endpoint::client(&credentials).unwrap();
        let admin = ControlClient::new(endpoint, vec![control.clone()], ClientId([1; 16]), 1);
        admin.init(ClusterId([5; 16]), PATIENCE).await.unwrap();
        Self {
            cell,
            control,
            node: Some((stop, task)),
            admin,
            engine: Engine::start(ANYWHERE.into(), |_| {}).await,
        }
    }

    async fn stop_control(&mut self) {
        let (stop, task) = self.node.take().unwrap();
        stop.send(()).unwrap();
        task.await.unwrap();
    }

    fn data_dir(&self) -> PathBuf {
        self.cell.path().join("agent")
    }

    fn config(&self) -> Config {
        let free = std::net::UdpSocket::bind(SocketAddr::from(ANYWHERE)).unwrap();
        Config {
            name: Some("w1".into()),
            listen: free.local_addr().unwrap(),
            advertise: None,
            admin: None,
            engine_url: format!("http://{}", self.engine.address),
            engine_kind: "emulated".into(),
            tenant: None,
            engine_priority: false,
            engine_command: None,
            engine_start_ms: 60_000,
            engine_stall_ms: 60_000,
            kv_events: "auto".into(),
            kv_replay: None,
            tokenizer: None,
            pool: "default".into(),
            slots: Some(2),
            queue_limit: None,
            max_context_tokens: 0,
            kv_tokens: 0,
            profile: None,
            profile_speed: 1.0,
            zone: String::new(),
            labels: BTreeMap::new(),
            gpu_type: String::new(),
            gpu_count: 0,
            revision: String::new(),
            control: vec![self.control.clone()],
            data_dir: self.data_dir(),
            credentials: self.cell.paths(Role::Agent, "w1"),
            takeover: false,
            drain_timeout_ms: 10_000,
        }
    }

    fn start(&self) -> Process {
        Process::start(self.config())
    }

    async fn facts(&self) -> Facts {
        self.admin.read(PATIENCE).await.unwrap()
    }

    async fn until(&self, what: impl Fn(&WorkerFact) -> bool) -> Arc<WorkerFact> {
        let start = Instant::now();
        loop {
            let facts = self.facts().await;
            match facts.workers.get("w1") {
                Some(worker) if what(worker) => return worker.clone(),
                found => assert!(start.elapsed() < PATIENCE, "{found:?}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn desire(&self, desired: Desired) {
        let action = Action::SetDesired(SetDesired {
            name: "w1".into(),
            desired: desired.into(),
            override_guard: true,
        });
        self.admin.propose(action, "test", PATIENCE).await.unwrap();
    }

    async fn balancer(&self, process: &Process) -> (Link, Endpoint) {
        let endpoint = Endpoint::client(&self.cell.credentials(Role::Balancer, "b1")).unwrap();
        let expect = Expect::named(Role::Agent, "w1");
        let start = Instant::now();
        loop {
            let address = process.listen.to_string();
            match endpoint
                .connect(&address, Alpn::Work, &expect, PATIENCE)
                .await
            {
                Ok(link) => return (link, endpoint),
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
        }
    }
}

impl Process {
    fn start(config: Config) -> Self {
        let listen = config.listen;
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async { drop(stopped.await) };
        let task = tokio::spawn(run(config, shutdown));
        Self {
            listen,
            stop: Some(stop),
            task,
        }
    }

    /// Ends as kill -9 would: nothing is said.
    async fn kill(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }

    async fn end(&mut self) -> Result<(), AgentError> {
        timeout(PATIENCE, &mut self.task).await.unwrap().unwrap()
    }

    async fn error(&mut self) -> AgentError {
        self.end().await.unwrap_err()
    }
}

/// How a placement on this incarnation goes.
async fn attempt(link: &Link, incarnation: Incarnation) -> Result<End, RefusalReason> {
    let body = chat(true, 5);
    let mut place = place(body.len());
    place.incarnation = Some(incarnation.to_wire());
    let (mut sender, mut receiver) = link.open().unwrap();
    sender
        .send(&Frame::message(Kind::Place, &place))
        .await
        .unwrap();
    let mut trailer = None;
    while let Some(frame) = timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap() {
        match frame.kind {
            Kind::Refused => return Err(frame.decode::<Refused>().unwrap().reason()),
            Kind::Accepted => {
                let body = Frame::new(Kind::Body, body.clone().into());
                sender.send(&body).await.unwrap();
                let end = Frame::new(Kind::BodyEnd, Default::default());
                sender.send(&end).await.unwrap();
            }
            Kind::Trailer => trailer = Some(frame.decode::<Trailer>().unwrap().end()),
            _ => {}
        }
    }
    Ok(trailer.unwrap())
}

/// Places until it is not refused for this reason any more.
async fn until_not(
    link: &Link,
    on: Incarnation,
    reason: RefusalReason,
) -> Result<End, RefusalReason> {
    let start = Instant::now();
    loop {
        let found = attempt(link, on).await;
        if found != Err(reason) {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "still {reason:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn hello(link: &Link) -> Incarnation {
    Incarnation::from_wire(link.hello().incarnation.as_ref()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_joins_obeys_and_serves_again_without_the_control_plane() {
    let mut world = World::new().await;
    let first = world.start();
    let worker = world.until(|w| w.observed == Observed::Ready).await;
    assert_eq!(worker.spec.models, ["m"]);
    assert_eq!(worker.spec.advertise, first.listen.to_string());
    let (link, _endpoint) = world.balancer(&first).await;
    assert_eq!(hello(&link), worker.incarnation);
    assert_eq!(attempt(&link, worker.incarnation).await, Ok(End::Complete));

    let taken = Process::start(world.config()).error().await;
    assert!(
        matches!(taken, AgentError::DirectoryTaken { .. }),
        "{taken}"
    );

    world.desire(Desired::Cordoned).await;
    world
        .until(|w| w.is_in_force() && w.observed == Observed::Cordoned)
        .await;
    let refused = attempt(&link, worker.incarnation).await;
    assert_eq!(refused, Err(RefusalReason::RefusalCordoned));
    world.desire(Desired::Ready).await;
    world
        .until(|w| w.is_in_force() && w.observed == Observed::Ready)
        .await;

    // Control is gone; the agent serves on, and again after a crash, as its next start.
    world.stop_control().await;
    assert_eq!(attempt(&link, worker.incarnation).await, Ok(End::Complete));
    first.kill().await;
    let second = world.start();
    let (link, _endpoint) = world.balancer(&second).await;
    let next = hello(&link);
    assert_eq!(next.start, worker.incarnation.start + 1);
    assert_eq!(
        attempt(&link, worker.incarnation).await,
        Err(RefusalReason::RefusalFenced)
    );
    let served = until_not(&link, next, RefusalReason::RefusalEngineDown).await;
    assert_eq!(served, Ok(End::Complete));
    second.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_metrics_are_served_and_say_why_not() {
    let world = World::new().await;
    let free = std::net::TcpListener::bind(SocketAddr::from(ANYWHERE)).unwrap();
    let admin = free.local_addr().unwrap();
    drop(free);
    let mut config = world.config();
    config.admin = Some(admin);
    let process = Process::start(config);
    let worker = world.until(|w| w.observed == Observed::Ready).await;
    let (link, _endpoint) = world.balancer(&process).await;
    attempt(&link, worker.incarnation).await.unwrap();
    assert!(page(admin, "/readyz").await.starts_with("HTTP/1.1 200"));
    let metrics = page(admin, "/metrics").await;
    for line in [
        "forebay_agent_slots 2",
        "forebay_agent_running 0",
        "forebay_agent_engine_up 1",
        "forebay_agent_accepted_total 1",
        r#"forebay_agent_refused_total{reason="full"} 0"#,
        r#"forebay_agent_ended_total{end="complete"} 1"#,
        "forebay_agent_service_ms_count 1",
    ] {
        assert!(
            metrics.lines().any(|found| found == line),
            "{line}: {metrics}"
        );
    }
    world.desire(Desired::Cordoned).await;
    world.until(|w| w.observed == Observed::Cordoned).await;
    let cordoned = page(admin, "/readyz").await;
    assert!(cordoned.starts_with("HTTP/1.1 503"), "{cordoned}");
    assert!(cordoned.contains("the worker is cordoned"), "{cordoned}");
}

async fn page(admin: SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(admin).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cordon_outlives_a_restart() {
    let world = World::new().await;
    let first = world.start();
    world.until(|w| w.observed == Observed::Ready).await;
    world.desire(Desired::Cordoned).await;
    world.until(|w| w.observed == Observed::Cordoned).await;
    first.kill().await;
    let second = world.start();
    let (link, _endpoint) = world.balancer(&second).await;
    let found = until_not(&link, hello(&link), RefusalReason::RefusalEngineDown).await;
    assert_eq!(found, Err(RefusalReason::RefusalCordoned));
    let again = hello(&link);
    world
        .until(|w| w.incarnation == again && w.observed == Observed::Cordoned)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_says_goodbye_and_a_start_comes_back() {
    let world = World::new().await;
    let mut first = world.start();
    let worker = world.until(|w| w.observed == Observed::Ready).await;
    first.stop.take().unwrap().send(()).unwrap();
    first.end().await.unwrap();
    world.until(|w| w.departed).await;
    let _second = world.start();
    let back = world
        .until(|w| !w.departed && w.observed == Observed::Ready)
        .await;
    assert!(back.incarnation > worker.incarnation);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_outlasts_the_drain_timeout_is_cut_off_and_not_passed_off_as_complete() {
    let mut world = World::new().await;
    world.engine = Engine::start(ANYWHERE.into(), |config| config.speed = 0.2).await;
    let mut process = Process::start(Config {
        drain_timeout_ms: 300,
        ..world.config()
    });
    world.until(|w| w.observed == Observed::Ready).await;
    let (link, _endpoint) = world.balancer(&process).await;
    let body = chat(true, 10_000);
    let mut offer = place(body.len());
    offer.incarnation = Some(hello(&link).to_wire());
    let (mut sender, mut receiver) = link.open().unwrap();
    for frame in [
        Frame::message(Kind::Place, &offer),
        Frame::new(Kind::Body, body.into()),
        Frame::new(Kind::BodyEnd, Default::default()),
    ] {
        sender.send(&frame).await.unwrap();
    }
    while receiver.recv().await.unwrap().unwrap().kind != Kind::Data {}
    let told = Instant::now();
    process.stop.take().unwrap().send(()).unwrap();
    process.end().await.unwrap();
    let took = told.elapsed();
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(5));
    let end = loop {
        match timeout(PATIENCE, receiver.recv()).await.unwrap() {
            Ok(Some(frame)) => assert_eq!(frame.kind, Kind::Data),
            end => break end,
        }
    };
    assert!(end.is_err(), "a stream that was cut off has no clean end");
    world.engine.until_open(0, PATIENCE).await;
    world.until(|w| w.departed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_superseded_process_stops_and_says_why() {
    let world = World::new().await;
    let mut first = world.start();
    let worker = world.until(|w| w.observed == Observed::Ready).await;
    let credentials = Credentials::load(&world.cell.paths(Role::Agent, "w1")).unwrap();
    let endpoint = Endpoint::client(&credentials).unwrap();
    let other = ControlClient::new(endpoint, vec![world.control.clone()], ClientId([9; 16]), 9);
    let newer = Action::Register(RegisterWorker {
        name: "w1".into(),
        spec: worker.spec_bytes.clone(),
        held: Some(worker.incarnation.to_wire()),
        start: worker.incarnation.start + 7,
        takeover: false,
    });
    other.propose(newer, "test", PATIENCE).await.unwrap();
    let error = first.error().await;
    assert!(
        matches!(
            error,
            AgentError::Superseded {
                current: Some(_),
                ..
            }
        ),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .starts_with("a newer start of w1 is registered: w"),
        "{error}"
    );

    // The same disk is behind the other one: its next start is refused as well.
    let error = world.start().error().await;
    assert!(matches!(error, AgentError::Superseded { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_lives_is_taken_over_only_when_asked_for() {
    let world = World::new().await;
    let mut first = world.start();
    let worker = world.until(|w| w.observed == Observed::Ready).await;
    let mut config = world.config();
    config.data_dir = world.cell.path().join("another");
    let patient = Process::start(config.clone());
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(
        !patient.task.is_finished(),
        "it waits for the lease to run out"
    );
    assert_eq!(
        world.facts().await.workers["w1"].incarnation,
        worker.incarnation
    );
    patient.kill().await;
    config.takeover = true;
    let _second = Process::start(Config {
        listen: world.config().listen,
        ..config
    });
    let error = first.error().await;
    assert!(matches!(error, AgentError::Superseded { .. }), "{error}");
    let taken = world.until(|w| w.observed == Observed::Ready).await;
    assert!(taken.incarnation.grant > worker.incarnation.grant);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_worker_stops_and_does_not_come_back_by_itself() {
    let world = World::new().await;
    let mut first = world.start();
    world.until(|w| w.observed == Observed::Ready).await;
    let remove = Action::Remove(RemoveWorker {
        name: "w1".into(),
        override_guard: true,
    });
    world.admin.propose(remove, "test", PATIENCE).await.unwrap();
    for process in [&mut first, &mut world.start()] {
        let error = process.error().await;
        assert!(matches!(error, AgentError::Removed { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_models_are_registered_by_the_same_start() {
    let mut world = World::new().await;
    let _process = world.start();
    let worker = world.until(|w| w.observed == Observed::Ready).await;
    let other = Engine::start(ANYWHERE.into(), |config| config.models = vec!["n".into()]).await;
    let address = std::mem::replace(&mut world.engine, other).kill().await;
    world.until(|w| w.observed == Observed::EngineDown).await;
    let models = |config: &mut forebay_sim::engine::Config| {
        config.models = vec!["m2".into(), "m1".into()];
    };
    let _engine = Engine::start(address, models).await;
    let now = world.until(|w| w.spec.models == ["m1", "m2"]).await;
    assert_eq!(now.incarnation, worker.incarnation, "running streams go on");
    world.until(|w| w.observed == Observed::Ready).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_belong_together_is_told() {
    let world = World::new().await;
    let check = async |change: &dyn Fn(&mut Config), has: &str| {
        let mut config = world.config();
        change(&mut config);
        let error = Process::start(config).error().await.to_string();
        assert!(error.contains(has), "{error}");
    };
    check(
        &|c| c.name = Some("w2".into()),
        "names agent/w1, this process is agent/w2",
    )
    .await;
    let balancer = world.cell.paths(Role::Balancer, "w1");
    check(&|c| c.credentials = balancer.clone(), "names balancer/w1").await;
    check(&|c| c.engine_url = "https://e:1".into(), "http://host:port").await;
    check(&|c| c.slots = Some(0), "--slots").await;
    let label = (
        "render-profile".to_owned(),
        "system_tools+nonsense".to_owned(),
    );
    check(&|c| c.labels.extend([label.clone()]), "--label").await;
    check(&|c| c.control.clear(), "--control").await;
    check(&|c| c.listen = ([0, 0, 0, 0], 0).into(), "--advertise").await;
    check(&|c| c.pool = "nowhere".into(), "there is no pool nowhere").await;
    let other = world.cell.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let record = r#"{"format":1,"cluster_id":"07070707070707070707070707070707","worker":1,"name":"w1","grant":9,"start":1}"#;
    std::fs::write(other.join("agent.json"), record).unwrap();
    check(&|c| c.data_dir = other.clone(), "an empty data directory").await;
}
