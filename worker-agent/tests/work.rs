//! Placements over real links, beside an emulated engine.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    dead_code
)] // a test of the rims: sockets and clocks

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{Agent, Engine, OWN, PATIENCE, chat, place};
use forebay_link::{Code, RecvError};
use forebay_proto::Revision;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::fleet::{Desired, Observed};
use forebay_proto::wire::work::{End, Place, Question, Quote, RefusalReason};
use forebay_scheduler::{Acceptance, Load};
use tokio::time::{Instant, timeout};

/// From a cancel to an engine without open requests, at the median; one may be late on a busy
/// machine.
const ABORT: Duration = Duration::from_millis(100);
/// Reports are never further apart than 250 ms; the rest is the machine's.
const INTERVAL: Duration = Duration::from_millis(300);
const SOON: Duration = Duration::from_secs(2);
const ANYWHERE: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

async fn world(slots: u32, queue: u32) -> (Engine, Agent) {
    let engine = Engine::start(ANYWHERE.into(), |_| {}).await;
    let agent = Agent::start(&engine, slots, queue).await;
    (engine, agent)
}

/// An engine whose answers take far longer than a test.
async fn slow_world(slots: u32, queue: u32) -> (Engine, Agent) {
    let engine = Engine::start(ANYWHERE.into(), |config| config.speed = 0.2).await;
    let agent = Agent::start(&engine, slots, queue).await;
    (engine, agent)
}

/// What differs from answer to answer.
fn without_id(text: &str) -> String {
    let mut text = text.to_owned();
    for key in ["\"created\":", "\"id\":\"chatcmpl-r1"] {
        while let Some(at) = text.find(key) {
            let end = text[at..].find([',', '}']).unwrap();
            text.replace_range(at..at + end, "");
        }
    }
    text
}

#[tokio::test]
async fn an_answer_is_relayed_byte_for_byte() {
    let (engine, agent) = world(4, 4).await;
    let balancer = agent.balancer("b1").await;
    for stream in [true, false] {
        let body = chat(stream, 40);
        let direct = engine.ask("POST /v1/chat/completions", &body).await;
        let mut placed = balancer.place(&body).await;
        let answer = placed.answer().await;
        assert_eq!(answer.end(), End::Complete);
        let text = String::from_utf8(answer.text.clone()).unwrap();
        assert_eq!(without_id(&text), without_id(&direct));
        let head = answer.head.unwrap();
        assert_eq!((head.status, head.headers.len()), (200, 1));
        assert_eq!(head.headers[0].key, "content-type");
    }
    agent.until_idle(PATIENCE).await;
}

#[tokio::test]
async fn a_balancer_that_leaves_links_behind_takes_no_other_balancers_place() {
    let (_engine, agent) = world(1, 1).await;
    let other = agent.balancer("b2").await;
    let mut links = Vec::new();
    for _ in 0..17 {
        let balancer = agent.balancer("b1").await;
        // Its first report: by now it is listed.
        timeout(PATIENCE, balancer.link.read_datagram())
            .await
            .unwrap()
            .unwrap();
        links.push(balancer);
    }
    let closed = timeout(PATIENCE, links[0].link.closed()).await.unwrap();
    assert!(closed.to_string().contains("too many links"), "{closed}");
    for balancer in links[1..].iter().chain([&other]) {
        assert!(balancer.link.close_reason().is_none());
    }
    let mut placed = other.place(&chat(false, 1)).await;
    assert_eq!(placed.answer().await.end(), End::Complete);
}

#[tokio::test]
async fn a_large_body_arrives_whole_also_after_a_wait() {
    let (_engine, agent) = world(1, 1).await;
    let balancer = agent.balancer("b1").await;
    let text = "word ".repeat(100_000);
    let body = chat(false, 5).replace("hi there", &text);
    let mut both = [balancer.place(&body).await, balancer.place(&body).await];
    for placed in &mut both {
        let answer = placed.answer().await;
        let usage = format!("\"prompt_tokens\":{}", text.len() / 4);
        let text = String::from_utf8(answer.text).unwrap();
        assert!(text.contains(&usage), "{text}");
    }
}

#[tokio::test]
async fn the_engines_own_error_is_an_answer() {
    let (_engine, agent) = world(4, 4).await;
    let balancer = agent.balancer("b1").await;
    let mut placed = balancer.place("{not json").await;
    let answer = placed.answer().await;
    assert_eq!(
        (answer.end(), answer.head.unwrap().status),
        (End::Complete, 400)
    );
}

#[tokio::test]
async fn a_cancelled_placement_aborts_the_engine_at_once() {
    let (engine, agent) = slow_world(4, 4).await;
    let balancer = agent.balancer("b1").await;
    let mut took = vec![];
    for stream in [true, false, true, false] {
        for dropped in [true, false] {
            let mut placed = balancer.place(&chat(stream, 1_000)).await;
            engine.until_open(1, PATIENCE).await;
            let cancelled = Instant::now();
            if dropped {
                // As a balancer's task that is dropped: both directions are given up.
                drop(placed);
            } else {
                placed.sender.reset(Code::Cancelled);
            }
            engine.until_open(0, SOON).await;
            agent.until_idle(SOON).await;
            took.push(cancelled.elapsed());
        }
    }
    took.sort();
    assert!(took[took.len() / 2] < ABORT, "{took:?}");
}

#[tokio::test]
async fn a_finished_sender_cancels_by_reading_no_more() {
    let (engine, agent) = slow_world(4, 4).await;
    let balancer = agent.balancer("b1").await;
    let mut placed = balancer.place(&chat(true, 1_000)).await;
    placed.sender.finish();
    engine.until_open(1, PATIENCE).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(engine.open_requests().await, 1, "an end is no cancel");
    drop(placed);
    engine.until_open(0, SOON).await;
    agent.until_idle(SOON).await;
}

#[tokio::test]
async fn a_lost_link_cancels_all_that_it_carried() {
    let (engine, agent) = slow_world(2, 2).await;
    let balancer = agent.balancer("b1").await;
    let mut placed = vec![];
    for _ in 0..4 {
        placed.push(balancer.place(&chat(true, 1_000)).await);
    }
    engine.until_open(2, PATIENCE).await;
    balancer.link.close(Code::Shutdown, "gone");
    engine.until_open(0, SOON).await;
    agent.until_idle(SOON).await;
}

#[tokio::test]
async fn every_refusal_comes_before_the_body_and_says_why() {
    let (_engine, agent) = slow_world(1, 1).await;
    let balancer = agent.balancer("b1").await;
    let check = async |reason, change: &dyn Fn(&mut forebay_proto::wire::work::Place)| {
        let mut place = place(10);
        change(&mut place);
        let refused = balancer.refusal(&place).await;
        assert_eq!(refused.reason(), reason);
        assert_eq!(refused.current, Some(OWN.to_wire()));
        Load::from_wire(&refused.load.unwrap()).unwrap()
    };
    use RefusalReason as R;
    check(R::RefusalFenced, &|p| {
        p.incarnation.as_mut().unwrap().start = 1;
    })
    .await;
    check(R::RefusalInvalid, &|p| p.incarnation = None).await;
    check(R::RefusalInvalid, &|p| p.path = "/metrics".into()).await;
    check(R::RefusalWrongModel, &|p| p.model = "n".into()).await;
    check(R::RefusalWrongZone, &|p| p.zone = "b".into()).await;
    check(R::RefusalDeadline, &|p| p.deadline_ms = 0).await;
    check(R::RefusalBodyBudget, &|p| p.body_bytes = (1 << 20) + 1).await;
    let _running = balancer.place(&chat(true, 1_000)).await;
    let load = check(R::RefusalStaleView, &|p| p.expected_ttft_ms = Some(0)).await;
    assert_eq!((load.running, load.queued), (1, 0));
    let _waiting = balancer.place(&chat(true, 1_000)).await;
    check(R::RefusalFull, &|p| p.must_queue = true).await;
    agent.work.apply(Desired::Cordoned, Revision(10));
    let load = check(R::RefusalCordoned, &|_| {}).await;
    assert_eq!((load.acceptance, load.queued), (Acceptance::Cordoned, 1));
    agent.work.apply(Desired::Draining, Revision(11));
    let load = check(R::RefusalDraining, &|_| {}).await;
    assert_eq!((load.running, load.queued), (1, 0));
}

#[tokio::test]
async fn a_question_is_answered_by_datagram_and_what_is_no_question_is_passed_over() {
    let (_engine, agent) = world(4, 4).await;
    let balancer = agent.balancer("b1").await;
    let place = Place {
        chunks: vec![1, 2, 3, 4],
        prompt_bytes: 1_024,
        chunk_bytes: 256,
        prompt_tokens: 400,
        ..place(10)
    };
    let mut running = balancer.offer(&place).await;
    running.accepted().await;
    balancer
        .link
        .send_datagram(&Frame::new(Kind::Question, Bytes::from_static(b"\xff")));
    let question = Question {
        id: 7,
        prompt_tokens: 500,
        chunks: vec![2, 3, 99],
    };
    let asked = Frame::message(Kind::Question, &question);
    assert!(balancer.link.send_datagram(&asked));
    let quote = async {
        loop {
            let frame = balancer.link.read_datagram().await.unwrap();
            if frame.kind == Kind::Quote {
                return frame.decode::<Quote>().unwrap();
            }
        }
    };
    let quote = tokio::time::timeout(PATIENCE, quote).await.unwrap();
    assert_eq!((quote.id, quote.cached_tokens), (7, 300));
    assert_eq!(quote.load.unwrap().running, 1);
}

#[tokio::test]
async fn what_waits_starts_when_a_slot_is_free_and_its_trailer_tells_the_wait() {
    let (_engine, agent) = world(1, 4).await;
    let balancer = agent.balancer("b1").await;
    let began = Instant::now();
    // Each takes longer than this test is ever held up.
    let (body, mut placed) = (chat(true, 600), vec![]);
    for _ in 0..4 {
        let mut next = balancer.offer(&place(body.len())).await;
        // Streams have no order among each other.
        next.accepted().await;
        let accepted = began.elapsed();
        next.send_body(&body).await;
        placed.push((accepted, next));
    }
    let mut starts = vec![];
    for (accepted, placed) in &mut placed {
        let answer = placed.answer().await;
        assert_eq!(answer.end(), End::Complete);
        let wait = answer.trailer.unwrap().queue_ms;
        starts.push(*accepted + Duration::from_millis(wait.into()));
    }
    assert!(starts.is_sorted(), "{starts:?}");
    assert!(
        starts[3] - starts[0] > Duration::from_millis(300),
        "one at a time: {starts:?}"
    );
    agent.until_idle(PATIENCE).await;
}

#[tokio::test]
async fn a_deadline_ends_what_waits_and_what_runs() {
    let (engine, agent) = slow_world(1, 1).await;
    let balancer = agent.balancer("b1").await;
    let body = chat(true, 1_000);
    let mut short = place(body.len());
    short.deadline_ms = 300;
    let mut both = vec![];
    for _ in 0..2 {
        let mut placed = balancer.offer(&short).await;
        placed.accepted().await;
        placed.send_body(&body).await;
        both.push(placed);
    }
    for placed in &mut both {
        assert_eq!(placed.answer().await.end(), End::Timeout);
    }
    engine.until_open(0, SOON).await;
    agent.until_idle(SOON).await;
}

#[tokio::test]
async fn an_engine_that_dies_mid_stream_is_told_as_such_and_its_return_is_noticed() {
    let (engine, agent) = slow_world(2, 0).await;
    let balancer = agent.balancer("b1").await;
    let mut placed = balancer.place(&chat(true, 1_000)).await;
    assert_eq!(placed.next().await.unwrap().kind, Kind::Head);
    let address = engine.kill().await;
    assert_eq!(placed.answer().await.end(), End::EngineFailed);
    // Until the agent noticed it, a placement is accepted and not started.
    loop {
        let mut placed = balancer.offer(&place(chat(true, 5).len())).await;
        let frame = placed.next().await.unwrap();
        if frame.kind == Kind::Refused {
            let refused: forebay_proto::wire::work::Refused = frame.decode().unwrap();
            assert_eq!(refused.reason(), RefusalReason::RefusalEngineDown);
            break;
        }
        placed.send_body(&chat(true, 5)).await;
        assert_eq!(placed.answer().await.end(), End::NotStarted);
    }
    let _again = Engine::start(address, |_| {}).await;
    let mut status = agent.work.status();
    let ready = status.wait_for(|s| s.observed == forebay_proto::wire::fleet::Observed::Ready);
    drop(timeout(PATIENCE, ready).await.unwrap().unwrap());
    let mut placed = balancer.place(&chat(true, 5)).await;
    assert_eq!(placed.answer().await.end(), End::Complete);
}

#[tokio::test]
async fn a_body_that_is_not_as_announced_breaks_its_own_stream_only() {
    let (_engine, agent) = world(2, 0).await;
    let balancer = agent.balancer("b1").await;
    let body = chat(true, 300);
    let mut good = balancer.place(&body).await;
    for announced in [body.len() - 1, body.len() + 1] {
        let mut placed = balancer.offer(&place(announced)).await;
        placed.accepted().await;
        placed.send_body(&body).await;
        let end = timeout(PATIENCE, placed.receiver.recv()).await.unwrap();
        assert_eq!(end, Err(RecvError::Reset(Code::Protocol as u64)));
    }
    assert_eq!(good.answer().await.end(), End::Complete);
    agent.until_idle(PATIENCE).await;
}

#[tokio::test]
async fn garbage_on_a_stream_hurts_nobody_else() {
    let (_engine, agent) = world(2, 0).await;
    let balancer = agent.balancer("b1").await;
    let mut good = balancer.place(&chat(true, 300)).await;
    let garbage = [
        Frame::new(Kind::Data, Bytes::from_static(b"x")),
        Frame::new(Kind::BodyEnd, Bytes::new()),
        Frame::new(Kind::Load, Bytes::from_static(b"x")),
    ];
    for frame in garbage {
        let (mut sender, mut receiver) = balancer.link.open().unwrap();
        sender.send(&frame).await.unwrap();
        let end = timeout(PATIENCE, receiver.recv()).await.unwrap();
        assert_eq!(end, Err(RecvError::Reset(Code::Protocol as u64)));
    }
    let (mut sender, mut receiver) = balancer.link.open().unwrap();
    let header = Frame::new(Kind::Place, Bytes::from_static(b"\xff\xff\xff"));
    sender.send(&header).await.unwrap();
    let answer = timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap();
    let refused: forebay_proto::wire::work::Refused = answer.unwrap().decode().unwrap();
    assert_eq!(refused.reason(), RefusalReason::RefusalInvalid);
    balancer
        .link
        .send_datagram(&Frame::new(Kind::Load, Bytes::from_static(b"?")));
    assert_eq!(good.answer().await.end(), End::Complete);
}

#[tokio::test]
async fn reports_come_at_once_and_at_the_promised_interval() {
    let (_engine, agent) = slow_world(2, 2).await;
    let (first, second) = (agent.balancer("b1").await, agent.balancer("b2").await);
    let mut placed = first.offer(&place(10)).await;
    let accepted = placed.accepted().await;
    for balancer in [&first, &second] {
        let mut newest = 0;
        while newest < accepted.report_seq {
            let report = timeout(PATIENCE, balancer.link.read_datagram());
            let report = report.await.unwrap().unwrap();
            let load = Load::from_wire(&report.decode().unwrap()).unwrap();
            assert!(load.seq >= newest, "in order on a quiet link");
            assert_eq!(load.running, u32::from(load.seq >= accepted.report_seq));
            newest = load.seq;
        }
    }
    // At the median; one may be late on a busy machine.
    let mut gaps = vec![];
    for _ in 0..7 {
        let asked = Instant::now();
        let report = timeout(PATIENCE, first.link.read_datagram()).await;
        report.unwrap().unwrap();
        gaps.push(asked.elapsed());
    }
    gaps.sort();
    assert!(gaps[gaps.len() / 2] < INTERVAL, "{gaps:?}");
}

#[tokio::test]
async fn what_runs_at_a_drains_deadline_is_ended_and_the_end_says_why() {
    let (engine, agent) = slow_world(2, 2).await;
    let balancer = agent.balancer("b1").await;
    let mut running = balancer.place(&chat(true, 1_000)).await;
    let mut status = agent.work.status();
    engine.until_open(1, PATIENCE).await;
    agent.work.apply(Desired::Draining, Revision(11));
    let drained = |status: &forebay_worker_agent::Status| status.observed == Observed::Drained;
    let early = timeout(Duration::from_millis(300), status.wait_for(drained))
        .await
        .is_err();
    assert!(early, "it goes on until the deadline");
    agent.work.end_streams();
    assert_eq!(running.answer().await.end(), End::Drained);
    timeout(PATIENCE, status.wait_for(drained))
        .await
        .unwrap()
        .unwrap();
    engine.until_open(0, PATIENCE).await;
    agent.work.apply(Desired::Ready, Revision(12));
    let mut again = balancer.place(&chat(true, 2)).await;
    assert_eq!(again.answer().await.end(), End::Complete);
}

#[tokio::test]
async fn a_stop_takes_nothing_new_and_finishes_what_runs() {
    let (_engine, agent) = world(2, 2).await;
    let balancer = agent.balancer("b1").await;
    let mut running = balancer.place(&chat(true, 300)).await;
    agent.work.stop();
    let refused = balancer.refusal(&place(10)).await;
    assert_eq!(refused.reason(), RefusalReason::RefusalDraining);
    assert_eq!(running.answer().await.end(), End::Complete);
    agent.until_idle(PATIENCE).await;
}
