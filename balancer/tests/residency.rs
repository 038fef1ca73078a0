//! What a worker tells of its cache reaches the index over a real link, and is gone with the link.
#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)] // a test of the shell

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use forebay_balancer::{Fleet, serve};
use forebay_link::{Alpn, Authority, Credentials, Endpoint, FrameReceiver, FrameSender, Link};
use forebay_proto::config::{Config, Pool};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::fleet::Desired;
use forebay_proto::wire::work;
use forebay_proto::{Incarnation, Revision, Role, WorkerId};
use forebay_scheduler::Known;
use forebay_scheduler::residency::{Change, Cursor, Grade, Next, Publisher};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

const WORKER: Incarnation = Incarnation {
    worker: WorkerId(1),
    grant: 1,
    start: 1,
};

/// One stream on which a balancer follows.
struct Told {
    sender: FrameSender,
    _receiver: FrameReceiver,
    from: work::Follow,
}

impl Told {
    async fn next(link: &Link) -> Self {
        let (sender, mut receiver) = timeout(PATIENCE, link.accept()).await.unwrap().unwrap();
        let frame = receiver.recv().await.unwrap().unwrap();
        assert_eq!(frame.kind, Kind::Follow);
        Self {
            sender,
            _receiver: receiver,
            from: frame.decode().unwrap(),
        }
    }

    fn cursor(&self) -> Option<Cursor> {
        let Self { from, .. } = self;
        (from.cache != 0).then_some(Cursor {
            cache: from.cache,
            seq: from.seq,
        })
    }

    async fn send(&mut self, next: Next, damage: impl Fn(&mut work::ResidencyDelta)) {
        let frames: Vec<Frame> = match next {
            Next::Nothing => Vec::new(),
            Next::Snapshot(pieces) => pieces
                .iter()
                .map(|piece| Frame::message(Kind::ResidencySnapshot, piece))
                .collect(),
            Next::Deltas(deltas) => deltas
                .iter()
                .map(|delta| {
                    let mut delta = (**delta).clone();
                    damage(&mut delta);
                    Frame::message(Kind::ResidencyDelta, &delta)
                })
                .collect(),
        };
        for frame in frames {
            self.sender.send(&frame).await.unwrap();
        }
    }
}

async fn metric(admin: std::net::SocketAddr, name: &str, value: u64) {
    let line = format!("\nforebay_balancer_residency_{name} {value}\n");
    let began = Instant::now();
    loop {
        let mut client = Client::to(admin).await;
        client
            .send("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
            .await;
        let head = client.head().await;
        let text = client.body(&head).await.unwrap();
        if text.contains(&line) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{line}: {text}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn stored(publisher: &mut Publisher, chunks: std::ops::Range<u64>) {
    publisher.note(chunks.map(|chunk| Change::Stored { chunk, tokens: 9 }));
    assert!(publisher.flush());
}

/// A balancer and the end of its link to the one agent, which is the test.
struct Standing {
    agent: Endpoint,
    admin: std::net::SocketAddr,
    link: Link,
    serving: tokio::task::JoinHandle<()>,
    _fleet: watch::Sender<Option<Arc<Fleet>>>,
    _dir: tempfile::TempDir,
}

async fn standing() -> Standing {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create("test", 1).unwrap();
    let load =
        |role, name| Credentials::load(&credentials(dir.path(), &authority, role, name)).unwrap();
    let agent = Endpoint::bind(loopback(), &load(Role::Agent, "w1"), &[Alpn::Work]).unwrap();
    agent.update_hello(|hello| hello.incarnation = Some(WORKER.to_wire()));
    let fleet = Fleet {
        revision: Revision(1),
        workers: vec![Known {
            incarnation: WORKER,
            name: "w1".into(),
            desired: Desired::Ready,
            spec: WorkerSpec {
                pool: "default".into(),
                advertise: agent.local_addr().unwrap().to_string(),
                engine: "vllm".into(),
                models: vec!["m".into()],
                revision: String::new(),
                gpu_type: String::new(),
                gpu_count: 0,
                kv_tokens: 0,
                max_context_tokens: 0,
                adapters: Vec::new(),
                zone: String::new(),
                labels: Default::default(),
                slots: 4,
            },
            departed: false,
        }],
        config: Config {
            pools: vec![Pool::named("default")],
        },
        keys: Vec::new(),
        families: Vec::new(),
        suspects: Vec::new(),
        cell_time: forebay_proto::Millis(0),
    };
    let (_fleet, facts) = watch::channel(Some(Arc::new(fleet)));
    let balancer = Endpoint::client(&load(Role::Balancer, "b1")).unwrap();
    let (tell, bound) = oneshot::channel();
    let serving = tokio::spawn(async move {
        let bound = |bound| tell.send(bound).unwrap();
        let settings = Setup::default().settings;
        serve(settings, balancer, facts, bound, std::future::pending())
            .await
            .unwrap();
    });
    let admin = bound.await.unwrap().admin.unwrap();
    let link = timeout(PATIENCE, agent.accept()).await.unwrap().unwrap();

    Standing {
        agent,
        admin,
        link,
        serving,
        _fleet,
        _dir: dir,
    }
}

#[tokio::test]
async fn the_index_follows_a_worker_through_damage_and_forgets_it_with_its_link() {
    let standing = standing().await;
    let Standing {
        admin,
        link,
        serving,
        agent: _agent,
        ..
    } = &standing;
    let admin = *admin;
    let mut publisher = Publisher::new(WORKER, 7, Grade::Inferred);
    stored(&mut publisher, 0..2);
    let mut told = Told::next(link).await;
    assert_eq!(told.cursor(), None, "it knows nothing yet");
    told.send(publisher.since(None), |_| {}).await;
    metric(admin, "chunks", 2).await;

    let before = publisher.newest();
    stored(&mut publisher, 2..3);
    told.send(publisher.since(Some(before)), |_| {}).await;
    metric(admin, "chunks", 3).await;

    // A stream that only ends is taken up where it was.
    drop(told);
    let mut told = Told::next(link).await;
    assert_eq!(told.cursor(), Some(publisher.newest()));
    metric(admin, "chunks", 3).await;
    metric(admin, "resyncs_total", 0).await;

    let before = publisher.newest();
    stored(&mut publisher, 3..4);
    let damage = |delta: &mut work::ResidencyDelta| delta.checksum ^= 1;
    told.send(publisher.since(Some(before)), damage).await;
    metric(admin, "resyncs_total", 1).await;
    metric(admin, "chunks", 0).await;
    let mut told = Told::next(link).await;
    assert_eq!(told.cursor(), None);
    told.send(publisher.since(None), |_| {}).await;
    metric(admin, "chunks", 4).await;

    link.close(forebay_link::Code::Normal, "the test leaves");
    metric(admin, "chunks", 0).await;
    serving.abort();
}

async fn ready(admin: std::net::SocketAddr) -> (u16, String) {
    let mut client = Client::to(admin).await;
    client.send("GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let head = client.head().await;
    (head.status, client.body(&head).await.unwrap())
}

#[tokio::test]
async fn a_balancer_is_ready_when_it_knows_the_caches_of_those_that_it_reaches() {
    let standing = standing().await;
    let mut told = Told::next(&standing.link).await;
    metric(standing.admin, "pending", 1).await;
    let (status, reasons) = ready(standing.admin).await;
    assert_eq!(status, 503);
    assert!(reasons.contains("caches of 1 workers"), "{reasons}");
    let publisher = Publisher::new(WORKER, 7, Grade::Blind);
    told.send(publisher.since(None), |_| {}).await;
    metric(standing.admin, "pending", 0).await;
    metric(standing.admin, "blind", 1).await;
    let (status, reasons) = ready(standing.admin).await;
    // A state that no report was heard of is enough to be sent there.
    assert_eq!(status, 200, "{reasons}");
}

#[tokio::test]
async fn a_worker_that_does_not_tell_holds_a_balancer_up_for_a_while_only() {
    let began = Instant::now();
    let standing = standing().await;
    let _told = Told::next(&standing.link).await;
    metric(standing.admin, "pending", 1).await;
    assert_eq!(ready(standing.admin).await.0, 503);
    while ready(standing.admin).await.0 != 200 {
        assert!(began.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(began.elapsed() > Duration::from_secs(9));
}
