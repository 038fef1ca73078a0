//! What the agent does about balancers that stall and engines that fail a little, beside an engine
//! that does what a test says.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    dead_code
)] // a test of the rims: sockets and clocks

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{Agent, PATIENCE, place};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::fleet::Observed;
use forebay_proto::wire::work::End;
use forebay_worker_agent::Patience;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

const SHORT: Duration = Duration::from_millis(300);
const MODELS: &str = r#"{"data":[{"id":"m"}]}"#;

/// An engine as a test wants it.
struct Scripted {
    address: SocketAddr,
    said: Arc<Said>,
    /// Path and id of each request for an answer.
    asked: mpsc::UnboundedReceiver<(String, String)>,
}

/// Statuses that it answers with, and how often it was asked.
struct Said {
    health: AtomicU16,
    looks: AtomicU32,
    models: AtomicU16,
    reads: AtomicU32,
    /// Floods that broke because nobody read them.
    broken: AtomicU32,
}

impl Scripted {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let said = Arc::new(Said {
            health: AtomicU16::new(200),
            looks: AtomicU32::new(0),
            models: AtomicU16::new(200),
            reads: AtomicU32::new(0),
            broken: AtomicU32::new(0),
        });
        let (tell, asked) = mpsc::unbounded_channel();
        let inside = said.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(converse(stream, inside.clone(), tell.clone()));
            }
        });
        Self {
            address,
            said,
            asked,
        }
    }

    async fn agent(&self, change: impl FnOnce(&mut Patience)) -> Agent {
        let mut patience = Patience::default();
        change(&mut patience);
        Agent::at(self.address, 4, 0, patience).await
    }
}

async fn converse(
    mut stream: TcpStream,
    said: Arc<Said>,
    asked: mpsc::UnboundedSender<(String, String)>,
) -> Option<()> {
    let mut read = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = read.windows(4).position(|part| part == b"\r\n\r\n") {
                break end + 4;
            }
            more(&mut stream, &mut read).await?;
        };
        let head = String::from_utf8(read.drain(..end).collect()).unwrap();
        let header = |name: &str| {
            let line = head.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim().to_owned()
        };
        let length: usize = header("content-length:").parse().unwrap_or(0);
        while read.len() < length {
            more(&mut stream, &mut read).await?;
        }
        read.drain(..length);
        let path = head.split(' ').nth(1).unwrap();
        let (status, body) = match path {
            "/health" => {
                said.looks.fetch_add(1, Ordering::Relaxed);
                (said.health.load(Ordering::Relaxed), "")
            }
            "/v1/models" => {
                said.reads.fetch_add(1, Ordering::Relaxed);
                (said.models.load(Ordering::Relaxed), MODELS)
            }
            // Nobody says which process it is, or how prompts are rendered.
            "/metrics" | "/tokenize" => (404, ""),
            "/v1/chat/completions" => {
                let _ = asked.send((path.into(), header("x-request-id:")));
                flood(&mut stream, &said).await;
                return None;
            }
            "/v1/completions" | "/v1/embeddings" => {
                let _ = asked.send((path.into(), header("x-request-id:")));
                (200, "{}")
            }
            // Nobody asks how it renders, where its events are, and the like.
            _ => (404, ""),
        };
        let length = body.len();
        let answer = format!("HTTP/1.1 {status} x\r\ncontent-length: {length}\r\n\r\n{body}");
        stream.write_all(answer.as_bytes()).await.ok()?;
    }
}

async fn more(stream: &mut TcpStream, read: &mut Vec<u8>) -> Option<()> {
    (stream.read_buf(read).await.ok()? > 0).then_some(())
}

/// Answers without end, until nobody takes it.
async fn flood(stream: &mut TcpStream, said: &Said) {
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    let mut next = "HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    while stream.write_all(next.as_bytes()).await.is_ok() {
        next.clone_from(&chunk);
    }
    said.broken.fetch_add(1, Ordering::Relaxed);
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_balancer_that_reads_nothing_is_cancelled_and_holds_up_no_other() {
    let engine = Scripted::start().await;
    let agent = engine.agent(|patience| patience.slow_reader = SHORT).await;
    let balancer = agent.balancer("b1").await;
    let mut stalled = balancer.place("{}").await;
    // On the same link, while the first one stalls.
    let mut offer = place(2);
    offer.path = "/v1/embeddings".into();
    let mut other = balancer.offer(&offer).await;
    other.accepted().await;
    other.send_body("{}").await;
    assert_eq!(other.answer().await.end(), End::Complete);
    agent.until_idle(PATIENCE).await;
    until("the engine is let go", || {
        engine.said.broken.load(Ordering::Relaxed) == 1
    })
    .await;
    let end = loop {
        match stalled.receiver.recv().await {
            Ok(Some(frame)) => assert!(matches!(frame.kind, Kind::Head | Kind::Data)),
            end => break end,
        }
    };
    assert!(end.is_err(), "what was cut off has no clean end");
}

#[tokio::test]
async fn a_body_that_stops_coming_gives_its_slot_back() {
    let engine = Scripted::start().await;
    let agent = engine.agent(|patience| patience.peer = SHORT).await;
    let balancer = agent.balancer("b1").await;
    let mut placed = balancer.offer(&place(100)).await;
    placed.accepted().await;
    let piece = Frame::new(Kind::Body, Bytes::from_static(b"{"));
    placed.sender.send(&piece).await.unwrap();
    assert_eq!(agent.work.status().borrow().in_flight, 1);
    agent.until_idle(PATIENCE).await;
    assert!(placed.receiver.recv().await.is_err());
}

#[tokio::test]
async fn an_engine_is_down_at_the_third_bad_look_in_a_row_and_not_before() {
    let engine = Scripted::start().await;
    let agent = engine.agent(|patience| patience.looks = SHORT / 10).await;
    let said = &engine.said;
    let mut status = agent.work.status();
    for _ in 0..3 {
        said.health.store(500, Ordering::Relaxed);
        let bad = said.looks.load(Ordering::Relaxed);
        until("a bad look", || said.looks.load(Ordering::Relaxed) > bad).await;
        said.health.store(200, Ordering::Relaxed);
        let good = said.looks.load(Ordering::Relaxed);
        until("a good look", || said.looks.load(Ordering::Relaxed) > good).await;
        assert_eq!(status.borrow_and_update().observed, Observed::Ready);
    }
    said.health.store(500, Ordering::Relaxed);
    said.models.store(500, Ordering::Relaxed);
    let bad = said.looks.load(Ordering::Relaxed);
    let down = status.wait_for(|status| status.observed == Observed::EngineDown);
    tokio::time::timeout(PATIENCE, down).await.unwrap().unwrap();
    assert!(said.looks.load(Ordering::Relaxed) >= bad + 2);
    said.health.store(200, Ordering::Relaxed);
    said.models.store(200, Ordering::Relaxed);
    let up = status.wait_for(|status| status.observed == Observed::Ready);
    tokio::time::timeout(PATIENCE, up).await.unwrap().unwrap();
}

#[tokio::test]
async fn one_list_of_models_that_cannot_be_read_takes_no_worker_away() {
    let engine = Scripted::start().await;
    let agent = engine.agent(|patience| patience.looks = SHORT / 30).await;
    let said = &engine.said;
    said.models.store(500, Ordering::Relaxed);
    let before = said.reads.load(Ordering::Relaxed);
    until("two more reads", || {
        said.reads.load(Ordering::Relaxed) >= before + 2
    })
    .await;
    let status = agent.work.status().borrow().clone();
    assert_eq!(status.observed, Observed::Ready);
    assert_eq!(*status.models, ["m".to_owned()]);
}

#[tokio::test]
async fn an_engine_never_sees_an_id_twice() {
    let mut engine = Scripted::start().await;
    let agent = engine.agent(|_| {}).await;
    let balancer = agent.balancer("b1").await;
    let mut seen = Vec::new();
    for path in ["/v1/embeddings", "/v1/completions", "/v1/embeddings"] {
        let mut offer = place(2);
        offer.path = path.into();
        let mut placed = balancer.offer(&offer).await;
        placed.accepted().await;
        placed.send_body("{}").await;
        assert_eq!(placed.answer().await.end(), End::Complete);
        let (asked, id) = engine.asked.recv().await.unwrap();
        assert_eq!(asked, path);
        assert!(id.starts_with("r1-"), "{id}");
        assert!(!seen.contains(&id), "{id}");
        seen.push(id);
    }
}
