//! What the agent says of its engine's cache, over real QUIC and HTTP.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    dead_code
)] // a test of the rims: sockets and clocks

mod common;

use std::time::Duration;

use common::*;
use forebay_proto::Incarnation;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::work;
use forebay_scheduler::residency::{Follower, Op};

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
