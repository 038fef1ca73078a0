//! `forebay_agent_unseen_arrivals`: what a balancer did not know of when it placed, and nothing else.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    dead_code
)] // a test of the rims: sockets and clocks

mod common;

use std::time::Duration;

use common::{Agent, Balancer, Engine, PATIENCE, Placed, chat};
use forebay_admin::prometheus_client::encoding::text::encode;
use forebay_admin::prometheus_client::registry::Registry;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::work::{LoadReport, Question};
use tokio::time::timeout;

const SLOTS: u32 = 64;

/// An agent whose answers take far longer than a test, and two balancers.
struct World {
    _engine: Engine,
    agent: Agent,
    registry: Registry,
    balancers: [Balancer; 2],
}

impl World {
    async fn new() -> Self {
        let listen = ([127, 0, 0, 1], 0).into();
        let engine = Engine::start(listen, |config| config.speed = 0.01).await;
        let agent = Agent::start(&engine, SLOTS, 0).await;
        let mut registry = Registry::default();
        agent.work.register_metrics(&mut registry);
        let balancers = [agent.balancer("b1").await, agent.balancer("b2").await];
        Self {
            _engine: engine,
            agent,
            registry,
            balancers,
        }
    }

    fn counted(&self, name: &str) -> u64 {
        let mut page = String::new();
        encode(&mut page, &self.registry).unwrap();
        let mut lines = page.lines();
        let line =
            lines.find_map(|line| line.strip_prefix(&format!("forebay_agent_{name}_total ")));
        line.unwrap().parse().unwrap()
    }

    /// How many unseen arrivals are counted while this is done.
    async fn unseen<T>(&self, act: impl Future<Output = T>) -> (u64, T) {
        let before = self.counted("unseen_arrivals");
        let done = act.await;
        (self.counted("unseen_arrivals") - before, done)
    }
}

/// Reads reports until one says that so many run.
async fn hears_of(balancer: &Balancer, running: u32) {
    let hearing = async { while next_report(balancer).await != running {} };
    timeout(PATIENCE, hearing).await.expect("a report");
}

/// How many run, as the next report says.
async fn next_report(balancer: &Balancer) -> u32 {
    loop {
        let frame = balancer.link.read_datagram().await.unwrap();
        if frame.kind == Kind::Load {
            return frame.decode::<LoadReport>().unwrap().running;
        }
    }
}

/// How many run, as reports say that came and were not read.
async fn told_meanwhile(balancer: &Balancer) -> Vec<u32> {
    let mut told = Vec::new();
    while let Ok(running) = timeout(Duration::ZERO, next_report(balancer)).await {
        told.push(running);
    }
    told
}

async fn places(balancer: &Balancer, count: usize) -> Vec<Placed> {
    let mut placed = Vec::new();
    for _ in 0..count {
        placed.push(balancer.place(&chat(true, 1_000)).await);
    }
    placed
}

#[tokio::test]
async fn what_others_placed_since_a_balancer_was_told_anything_counts_when_it_places() {
    let world = World::new().await;
    let [one, other] = &world.balancers;
    // Who has not used the worker hears of it every 250 ms: a busy machine may need longer for this.
    for _ in 0..20 {
        hears_of(other, 0).await;
        let (own, first) = world.unseen(places(one, 3)).await;
        assert_eq!(own, 0, "nobody else placed");
        let (unseen, second) = world.unseen(places(other, 1)).await;
        let told = told_meanwhile(other).await;
        if told.iter().all(|running| [0, 4].contains(running)) {
            assert_eq!(unseen, 3);
            return;
        }
        assert!(unseen < 3, "{told:?}");
        drop((first, second));
        world.agent.until_idle(PATIENCE).await;
    }
    panic!("a report came between, each time");
}

#[tokio::test]
async fn an_answer_or_a_report_tells_and_then_nothing_is_unseen() {
    let world = World::new().await;
    let [one, other] = &world.balancers;
    let before = places(one, 2).await;
    let _first = places(other, 1).await;
    let (after_its_own, _second) = world.unseen(places(other, 2)).await;
    assert_eq!(after_its_own, 0, "its first was answered with the state");
    hears_of(one, 5).await;
    let (after_a_report, _third) = world.unseen(places(one, 1)).await;
    assert_eq!(after_a_report, 0);
    let _fourth = places(other, 1).await;
    let question = Question {
        id: 1,
        ..Question::default()
    };
    let question = Frame::message(Kind::Question, &question);
    one.link.send_datagram(&question);
    while one.link.read_datagram().await.unwrap().kind != Kind::Quote {}
    let (after_a_quote, _fifth) = world.unseen(places(one, 1)).await;
    assert_eq!(after_a_quote, 0);
    drop(before);
}
