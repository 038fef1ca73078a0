//! What the agent says of its engine's cache, over real QUIC and HTTP.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    dead_code
)] // a test of the rims: sockets and clocks

mod common;

use std::path::Path;
use std::time::Duration;

use common::*;
use forebay_proto::Incarnation;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::work;
use forebay_scheduler::residency::{Follower, KeptItem, Op};
use forebay_worker_agent::MapFile;

/// A balancer's view of the agent's cache.
struct Following {
    sender: forebay_link::FrameSender,
    receiver: forebay_link::FrameReceiver,
    follower: Follower,
}

impl Following {
    async fn start(balancer: &Balancer) -> Self {
        Self::from(balancer, &work::Follow::default()).await
    }

    /// Follows from what it says it holds.
    async fn from(balancer: &Balancer, held: &work::Follow) -> Self {
        let (mut sender, receiver) = balancer.link.open().unwrap();
        let follow = Frame::message(Kind::Follow, held);
        sender.send(&follow).await.unwrap();
        let own: Incarnation = OWN;
        Self {
            sender,
            receiver,
            follower: Follower::new(own),
        }
    }

    async fn next(&mut self) -> Vec<Op> {
        let frame = tokio::time::timeout(PATIENCE, self.receiver.recv()).await;
        let frame = frame.unwrap().unwrap().unwrap();
        match frame.kind {
            Kind::ResidencySnapshot => self.follower.snapshot(&frame.decode().unwrap()),
            Kind::ResidencyDelta => self.follower.delta(&frame.decode().unwrap()),
            other => panic!("{other:?}"),
        }
        .unwrap()
    }
}

/// Serves one request with a prompt of three chunks.
async fn serve(balancer: &Balancer) {
    let body = chat(true, 3);
    let mut placed = balancer.offer(&prompted(&body)).await;
    placed.accepted().await;
    placed.send_body(&body).await;
    assert!(placed.answer().await.trailer.is_some());
}

fn prompted(body: &str) -> work::Place {
    work::Place {
        chunks: vec![11, 12, 13],
        prompt_bytes: 800,
        chunk_bytes: 256,
        prompt_tokens: 200,
        stream: true,
        cache_salt: "0123abcd".into(),
        ..place(body.len())
    }
}

#[tokio::test]
async fn a_prompt_that_was_served_is_told_as_resident_and_counted() {
    let engine = Engine::start(([127, 0, 0, 1], 0).into(), |_| {}).await;
    let agent = Agent::start(&engine, 2, 2).await;
    let balancer = agent.balancer("b1").await;
    let mut following = Following::start(&balancer).await;
    assert_eq!(following.next().await, [Op::Clear]);
    let body = chat(true, 3);
    let mut placed = balancer.offer(&prompted(&body)).await;
    placed.accepted().await;
    placed.send_body(&body).await;
    let answer = placed.answer().await;
    let trailer = answer.trailer.unwrap();
    assert_eq!(trailer.completion_tokens, Some(3));
    assert!(trailer.prompt_tokens.is_some() && trailer.cached_tokens.is_some());
    let text = String::from_utf8(answer.text).unwrap();
    assert!(
        !text.contains("\"usage\":{"),
        "the client did not ask for it: {text}"
    );
    assert!(text.ends_with("data: [DONE]\n\n"));
    let ops = following.next().await;
    let mut stored: Vec<u64> = ops
        .iter()
        .map(|op| match op {
            Op::Store(chunk, _) => *chunk,
            other => panic!("{other:?}"),
        })
        .collect();
    stored.sort_unstable();
    assert_eq!(stored, [11, 12, 13]);

    let mut late = Following::start(&balancer).await;
    assert_eq!(late.next().await.len(), 4, "a snapshot of three");
    following.sender.finish();
    let end = tokio::time::timeout(Duration::from_secs(5), following.receiver.recv()).await;
    assert!(
        !matches!(end, Ok(Ok(Some(_)))),
        "who leaves is told no more"
    );
}

#[tokio::test]
async fn counts_that_the_client_asked_for_stay() {
    let engine = Engine::start(([127, 0, 0, 1], 0).into(), |_| {}).await;
    let agent = Agent::start(&engine, 2, 2).await;
    let balancer = agent.balancer("b1").await;
    let body = chat(true, 3).replacen('{', r#"{"stream_options":{"include_usage":true},"#, 1);
    let mut placed = balancer.offer(&prompted(&body)).await;
    placed.accepted().await;
    placed.send_body(&body).await;
    let answer = placed.answer().await;
    let text = String::from_utf8(answer.text).unwrap();
    assert!(text.contains("\"usage\":{"), "{text}");
}

#[tokio::test]
async fn who_comes_back_is_told_what_it_missed_and_who_is_lost_is_told_everything() {
    let engine = Engine::start(([127, 0, 0, 1], 0).into(), |_| {}).await;
    let agent = Agent::start(&engine, 2, 2).await;
    let balancer = agent.balancer("b1").await;
    let mut first = Following::start(&balancer).await;
    first.next().await;
    let held = first.follower.cursor().unwrap();
    drop(first);
    serve(&balancer).await;

    let known = work::Follow {
        incarnation: Some(OWN.to_wire()),
        cache: held.cache,
        seq: held.seq,
    };
    let mut back = Following::from(&balancer, &known).await;
    let frame = tokio::time::timeout(PATIENCE, back.receiver.recv()).await;
    assert_eq!(frame.unwrap().unwrap().unwrap().kind, Kind::ResidencyDelta);

    for other in [
        work::Follow {
            cache: held.cache ^ 1,
            ..known
        },
        work::Follow {
            seq: held.seq + 1_000,
            ..known
        },
    ] {
        let mut lost = Following::from(&balancer, &other).await;
        assert_eq!(lost.next().await.len(), 4, "all of it: {other:?}");
    }
}

#[tokio::test]
async fn an_engine_that_went_away_is_followed_into_an_empty_cache() {
    let engine = Engine::start(([127, 0, 0, 1], 0).into(), |_| {}).await;
    let agent = Agent::start(&engine, 2, 2).await;
    let balancer = agent.balancer("b1").await;
    let mut following = Following::start(&balancer).await;
    following.next().await;
    serve(&balancer).await;
    following.next().await;
    let cache = following.follower.cursor().unwrap().cache;
    assert_eq!(following.follower.len(), 3);
    let address = engine.kill().await;
    let ops = loop {
        let ops = following.next().await;
        if following.follower.cursor().unwrap().cache != cache {
            break ops;
        }
    };
    assert_eq!(ops, [Op::Clear]);
    assert!(following.follower.is_empty());
    let _engine = Engine::start(address, |_| {}).await;
}

#[tokio::test]
async fn a_prompt_that_the_engine_refused_is_not_resident() {
    let engine = Engine::start(([127, 0, 0, 1], 0).into(), |_| {}).await;
    let agent = Agent::start(&engine, 2, 2).await;
    let balancer = agent.balancer("b1").await;
    let body = r#"{"model":"m","messages":[]}"#;
    let place = work::Place {
        stream: false,
        ..prompted(body)
    };
    let mut placed = balancer.offer(&place).await;
    placed.accepted().await;
    placed.send_body(body).await;
    let answer = placed.answer().await;
    assert_eq!(answer.head.unwrap().status, 400);
    let mut following = Following::start(&balancer).await;
    assert_eq!(following.next().await, [Op::Clear]);
}

/// Beside this engine, with its map in this file.
async fn keeping(engine: std::net::SocketAddr, path: &Path) -> Agent {
    let map = MapFile {
        path: path.to_owned(),
        every: Duration::from_millis(5),
    };
    Agent::set_up(engine, |setup| setup.map = Some(map)).await
}

/// Serves a prompt whose chunks are these, and returns how many of its tokens the engine had.
async fn serve_long(balancer: &Balancer, chunks: std::ops::Range<u64>) -> u32 {
    let text = "so long a text that blocks of it are cached ".repeat(60);
    let body = format!(
        r#"{{"model":"m","stream":true,"max_tokens":3,"messages":[{{"role":"user","content":"{text}"}}]}}"#
    );
    let place = work::Place {
        chunks: chunks.collect(),
        prompt_bytes: text.len() as u64,
        prompt_tokens: text.len() as u32 / 4,
        ..prompted(&body)
    };
    let mut placed = balancer.offer(&place).await;
    placed.accepted().await;
    placed.send_body(&body).await;
    placed
        .answer()
        .await
        .trailer
        .unwrap()
        .cached_tokens
        .unwrap()
}

/// Waits until the file holds a map of so many chunks.
async fn until_kept(path: &Path, chunks: usize) {
    let began = tokio::time::Instant::now();
    loop {
        let map = std::fs::read(path).ok();
        let map = map.and_then(|bytes| forebay_worker_agent::core::Map::decode(&bytes).ok());
        let held = |item: &&KeptItem| matches!(item, KeptItem::Chunk { .. });
        if map.is_some_and(|map| map.kept.items.iter().filter(held).count() == chunks) {
            return;
        }
        assert!(began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn resident(agent: &Agent) -> usize {
    let mut following = Following::start(&agent.balancer("b2").await).await;
    following.next().await.len() - 1
}

#[tokio::test]
async fn a_killed_agent_goes_on_with_the_map_of_an_engine_that_ran_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.map");
    let engine = Engine::start(([127, 0, 0, 1], 0).into(), |_| {}).await;
    let agent = keeping(engine.address, &path).await;
    assert_eq!(serve_long(&agent.balancer("b1").await, 1..11).await, 0);
    until_kept(&path, 10).await;
    // Nothing is said or written any more.
    drop(agent);

    let agent = keeping(engine.address, &path).await;
    assert_eq!(resident(&agent).await, 10, "known before it is used again");
    let cached = serve_long(&agent.balancer("b1").await, 1..11).await;
    assert!(cached > 500, "and true: {cached}");
    drop(agent);

    // Another engine at the same address: the map is of a process that is gone.
    let address = engine.kill().await;
    let engine = Engine::start(address, |_| {}).await;
    let agent = keeping(engine.address, &path).await;
    assert_eq!(resident(&agent).await, 0);
    assert_eq!(serve_long(&agent.balancer("b1").await, 1..11).await, 0);
}

#[tokio::test]
async fn a_damaged_map_is_passed_over_and_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.map");
    let engine = Engine::start(([127, 0, 0, 1], 0).into(), |_| {}).await;
    let agent = keeping(engine.address, &path).await;
    serve_long(&agent.balancer("b1").await, 1..11).await;
    until_kept(&path, 10).await;
    drop(agent);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();

    let agent = keeping(engine.address, &path).await;
    assert_eq!(resident(&agent).await, 0);
    serve_long(&agent.balancer("b1").await, 1..6).await;
    until_kept(&path, 5).await;
}

#[tokio::test]
async fn an_engine_that_was_out_of_sight_and_ran_on_keeps_its_map() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.map");
    let engine = Engine::start(([127, 0, 0, 1], 0).into(), |_| {}).await;
    let between = Between::start(engine.address).await;
    let agent = keeping(between.address, &path).await;
    serve_long(&agent.balancer("b1").await, 1..11).await;
    assert_eq!(resident(&agent).await, 10);
    let mut following = Following::start(&agent.balancer("b3").await).await;
    following.next().await;
    let address = between.cut();
    assert_eq!(following.next().await, [Op::Clear], "it may be gone");
    let _between = Between::at(address, engine.address).await;
    assert_eq!(following.next().await.len(), 11, "it was not");
}

/// A way to the engine that can be cut.
struct Between {
    address: std::net::SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Between {
    async fn start(engine: std::net::SocketAddr) -> Self {
        Self::at(([127, 0, 0, 1], 0).into(), engine).await
    }

    async fn at(listen: std::net::SocketAddr, engine: std::net::SocketAddr) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(listen).unwrap();
        let listener = socket.listen(64).unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut ways = tokio::task::JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                ways.spawn(async move {
                    let mut far = tokio::net::TcpStream::connect(engine).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
        Self { address, task }
    }

    fn cut(self) -> std::net::SocketAddr {
        self.task.abort();
        self.address
    }
}
