//! An agent's work side between an emulated engine and a balancer that is a test.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use forebay_link::{
    Alpn, Authority, CredentialPaths, Credentials, Endpoint, Expect, FrameReceiver, FrameSender,
    Link,
};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::fleet::Desired;
use forebay_proto::wire::work::{Accepted, End, Head, Place, Refused, Trailer};
use forebay_proto::{Incarnation, Revision, Role, WorkerId};
use forebay_scheduler::model::Profile;
use forebay_sim::engine;
use forebay_worker_agent::core::Settings;
use forebay_worker_agent::{KvEvents, Manner, Patience, Setup, Work};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

pub const OWN: Incarnation = Incarnation {
    worker: WorkerId(1),
    grant: 5,
    start: 2,
};
pub const PATIENCE: Duration = Duration::from_secs(10);

pub struct Engine {
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Engine {
    pub async fn start(listen: SocketAddr, change: impl FnOnce(&mut engine::Config)) -> Self {
        let mut config = engine::Config {
            listen,
            models: vec!["m".into()],
            speed: 50.0,
            ..engine::Config::default()
        };
        change(&mut config);
        let (sender, ready) = oneshot::channel();
        let task = tokio::spawn(async move {
            let told = |address| sender.send(address).unwrap();
            engine::serve(config, told, std::future::pending())
                .await
                .unwrap();
        });
        Self {
            address: ready.await.unwrap(),
            task,
        }
    }

    /// The engine dies with all its connections.
    pub async fn kill(mut self) -> SocketAddr {
        self.task.abort();
        let _ = (&mut self.task).await;
        self.address
    }

    /// The body of the answer to a request on a connection of its own.
    pub async fn ask(&self, head: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!(
            "{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\nx-request-id: r1\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        if head.contains("chunked") {
            dechunked(body)
        } else {
            body.to_owned()
        }
    }

    pub async fn open_requests(&self) -> u32 {
        let page = self.ask("GET /metrics", "").await;
        let value = |name: &str| -> f64 {
            let line = page.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        (value("vllm:num_requests_running{") + value("vllm:num_requests_waiting{")) as u32
    }

    pub async fn until_open(&self, count: u32, within: Duration) {
        let start = Instant::now();
        while self.open_requests().await != count {
            assert!(
                start.elapsed() < within,
                "not {count} open within {within:?}"
            );
        }
    }
}

fn dechunked(mut body: &str) -> String {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").unwrap();
        match usize::from_str_radix(size, 16).unwrap() {
            0 => return whole,
            size => {
                whole.push_str(&rest[..size]);
                body = &rest[size + 2..];
            }
        }
    }
}

/// A cell's CA and where its files are.
pub struct Cell {
    dir: tempfile::TempDir,
    authority: Authority,
}

impl Cell {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create("test", 1).unwrap();
        Self { dir, authority }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn paths(&self, role: Role, name: &str) -> CredentialPaths {
        let own = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        self.authority.save(&own).unwrap();
        let issued = self.authority.issue(role, name, 30).unwrap();
        let (cert, key) = issued.save(&own).unwrap();
        let ca = own.join("ca.pem");
        CredentialPaths { ca, cert, key }
    }

    pub fn credentials(&self, role: Role, name: &str) -> Credentials {
        Credentials::load(&self.paths(role, name)).unwrap()
    }
}

/// The work side of one agent, and the cell that it is in.
pub struct Agent {
    pub cell: Cell,
    pub work: Work,
    pub endpoint: Endpoint,
    pub address: String,
}

impl Agent {
    /// Ready, beside this engine.
    pub async fn start(engine: &Engine, slots: u32, queue_limit: u32) -> Self {
        Self::at(engine.address, slots, queue_limit, Patience::default()).await
    }

    /// Ready, beside the engine at this address.
    pub async fn at(engine: SocketAddr, slots: u32, queue_limit: u32, patience: Patience) -> Self {
        Self::with(engine, slots, queue_limit, patience, None).await
    }

    /// The same with a word on how fast the engine is.
    pub async fn with(
        engine: SocketAddr,
        slots: u32,
        queue_limit: u32,
        patience: Patience,
        profile: Option<Profile>,
    ) -> Self {
        let change = |setup: &mut Setup| {
            setup.settings.slots = slots;
            setup.settings.queue_limit = queue_limit;
            setup.settings.profile = profile;
            setup.patience = patience;
        };
        Self::set_up(engine, change).await
    }

    /// Ready, beside the engine at this address, and otherwise as `change` will have it.
    pub async fn set_up(engine: SocketAddr, change: impl FnOnce(&mut Setup)) -> Self {
        let cell = Cell::new();
        let endpoint = Endpoint::bind(
            ([127, 0, 0, 1], 0).into(),
            &cell.credentials(Role::Agent, "w1"),
            &[Alpn::Work],
        )
        .unwrap();
        let address = endpoint.local_addr().unwrap().to_string();
        let mut setup = Setup {
            incarnation: OWN,
            settings: Settings {
                at_once: false,
                slots: 2,
                queue_limit: 2,
                body_budget_bytes: 1 << 20,
                kv_tokens: 100_000,
                profile: None,
            },
            zone: "a".into(),
            engine: format!("http://{engine}").parse().unwrap(),
            patience: Patience::default(),
            manner: Manner {
                kind: Some("vllm".into()),
                ..Manner::default()
            },
            map: None,
            kv_events: KvEvents::default(),
        };
        change(&mut setup);
        let work = Work::start(&endpoint, setup);
        work.apply(Desired::Ready, Revision(9));
        let mut status = work.status();
        let known = status.wait_for(|status| !status.models.is_empty());
        drop(timeout(PATIENCE, known).await.unwrap().unwrap());
        Self {
            cell,
            work,
            endpoint,
            address,
        }
    }

    pub async fn balancer(&self, name: &str) -> Balancer {
        let endpoint = Endpoint::client(&self.cell.credentials(Role::Balancer, name)).unwrap();
        let expect = Expect::named(Role::Agent, "w1");
        let link = endpoint.connect(&self.address, Alpn::Work, &expect, PATIENCE);
        Balancer {
            link: link.await.unwrap(),
            _endpoint: endpoint,
        }
    }

    pub async fn until_idle(&self, within: Duration) {
        timeout(within, self.work.idle())
            .await
            .expect("idle in time");
    }
}

pub struct Balancer {
    pub link: Link,
    _endpoint: Endpoint,
}

/// A placement as the balancer holds it.
pub struct Placed {
    pub sender: FrameSender,
    pub receiver: FrameReceiver,
}

/// Everything that came for a placement that was accepted.
#[derive(Default)]
pub struct Answer {
    pub head: Option<Head>,
    pub text: Vec<u8>,
    pub trailer: Option<Trailer>,
}

pub fn place(body_bytes: usize) -> Place {
    Place {
        request_id: "r1".into(),
        incarnation: Some(OWN.to_wire()),
        model: "m".into(),
        tenant: "t".into(),
        path: "/v1/chat/completions".into(),
        body_bytes: body_bytes as u64,
        deadline_ms: 20_000,
        expected_ttft_ms: Some(60_000),
        ..Place::default()
    }
}

pub fn chat(stream: bool, tokens: u32) -> String {
    format!(
        r#"{{"model":"m","stream":{stream},"max_tokens":{tokens},"messages":[{{"role":"user","content":"hi there"}}]}}"#
    )
}

impl Balancer {
    pub async fn offer(&self, place: &Place) -> Placed {
        let (mut sender, receiver) = self.link.open().unwrap();
        let place = Frame::message(Kind::Place, place);
        sender.send(&place).await.unwrap();
        Placed { sender, receiver }
    }

    /// Places a body whole; the agent must accept it.
    pub async fn place(&self, body: &str) -> Placed {
        let mut placed = self.offer(&place(body.len())).await;
        placed.accepted().await;
        placed.send_body(body).await;
        placed
    }

    pub async fn refusal(&self, place: &Place) -> Refused {
        let mut placed = self.offer(place).await;
        let frame = placed.next().await.unwrap();
        assert_eq!(frame.kind, Kind::Refused);
        assert!(placed.next().await.is_none(), "a refusal is the end");
        frame.decode().unwrap()
    }
}

impl Placed {
    pub async fn next(&mut self) -> Option<Frame> {
        timeout(PATIENCE, self.receiver.recv())
            .await
            .unwrap()
            .unwrap()
    }

    pub async fn accepted(&mut self) -> Accepted {
        let frame = self.next().await.unwrap();
        assert_eq!(frame.kind, Kind::Accepted);
        frame.decode().unwrap()
    }

    pub async fn send_body(&mut self, body: &str) {
        for piece in body.as_bytes().chunks(64 << 10) {
            let frame = Frame::new(Kind::Body, Bytes::copy_from_slice(piece));
            self.sender.send(&frame).await.unwrap();
        }
        let end = Frame::new(Kind::BodyEnd, Bytes::new());
        self.sender.send(&end).await.unwrap();
    }

    /// Reads to the end, which must be a trailer and a clean end of the stream.
    pub async fn answer(&mut self) -> Answer {
        let mut answer = Answer::default();
        while let Some(frame) = self.next().await {
            assert!(answer.trailer.is_none(), "nothing follows a trailer");
            match frame.kind {
                Kind::Head => answer.head = Some(frame.decode().unwrap()),
                Kind::Data => answer.text.extend_from_slice(&frame.payload),
                Kind::Trailer => answer.trailer = Some(frame.decode().unwrap()),
                other => panic!("{other:?} is no part of an answer"),
            }
        }
        answer
    }
}

impl Answer {
    pub fn end(&self) -> End {
        self.trailer.as_ref().expect("a trailer").end()
    }
}
