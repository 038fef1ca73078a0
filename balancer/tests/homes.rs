//! Homes of families: the copy is made where it is to be, and a drain's or a rebalance's homes are warmed beside
//! live requests, never in their way.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Act, Answer, EVENT, REST, Saw, Setup, World};
use forebay_balancer::Fleet;
use forebay_proto::wire::work::{End, Place, RefusalReason};
use forebay_proto::{Family, FingerprintKey, Revision, WorkerId};
use serde_json::json;

const KEY: FingerprintKey = FingerprintKey {
    epoch: 3,
    bytes: [7; 16],
};

/// A prompt of some 4,000 bytes.
fn body(stream: bool) -> String {
    let text: String = (0..700).map(|n| format!("{n:05} ")).collect();
    let messages = json!([{"role": "user", "content": text}]);
    json!({"model": "m", "messages": messages, "max_tokens": 77, "stream": stream}).to_string()
}

async fn ask(world: &World, stream: bool) -> Answer {
    let mut client = world.client().await;
    let headers = "authorization: Bearer any\r\ncontent-type: application/json\r\n";
    client
        .post("/v1/chat/completions", headers, &body(stream))
        .await;
    client.answer().await
}

/// A world of two workers with a request's first four chunks as a family, and worker 2 as its home.
async fn world(pinned: bool, held: bool) -> (World, Vec<u64>) {
    let mut setup = Setup {
        agents: 2,
        key: Some(KEY),
        ..Setup::default()
    };
    // It goes where nobody counts homes: the copy's way does not depend on the rule.
    setup.pool.policy = "longest-prefix".into();
    let world = World::new(setup).await;
    assert_eq!(ask(&world, false).await.status, 200);
    let chunks = world
        .agents
        .iter()
        .find_map(|agent| agent.placed.lock().pop())
        .unwrap()
        .chunks;
    let chunks_of: Vec<(u64, u32)> = (1..)
        .zip(&chunks)
        .map(|(n, chunk)| (*chunk, n * 64))
        .collect();
    if held {
        world.agents[0].holds(&chunks_of);
        let all = format!("forebay_balancer_residency_chunks {}", chunks_of.len());
        world.until("/metrics", |_, text| text.contains(&all)).await;
    }
    let family = Family {
        pool: "default".into(),
        chunk: chunks[3],
        key_epoch: KEY.epoch,
        chunks: 4,
        tokens: 256,
        homes: vec![world.agents[1].known.incarnation.worker],
        saves: 1,
        takes: 1,
        pinned,
    };
    world.fleet.send_modify(|fleet| {
        let mut next = Fleet::clone(fleet.as_ref().unwrap());
        next.revision = Revision(next.revision.0 + 1);
        next.families = vec![family];
        *fleet = Some(Arc::new(next));
    });
    world
        .until("/metrics", |_, text| {
            text.contains("forebay_balancer_families 1\n")
        })
        .await;
    (world, chunks)
}

async fn shadows(world: &World, outcome: &str, count: u64) {
    let line = format!("forebay_balancer_shadows_total{{outcome=\"{outcome}\"}} {count}\n");
    world
        .until("/metrics", |_, text| text.contains(&line))
        .await;
}

fn copies(world: &World) -> Vec<Place> {
    let placed = world.agents[1].placed.lock();
    placed
        .iter()
        .filter(|place| place.shadow)
        .cloned()
        .collect()
}

#[tokio::test]
async fn a_pinned_home_is_warmed_once_by_a_copy_of_a_live_request() {
    let (world, chunks) = world(true, true).await;
    world.agents[0].will(&[Act::Slow(Duration::from_millis(300))]);
    let answer = ask(&world, true).await;
    // The client sees its own answer and nothing else.
    assert_eq!(
        (answer.status, answer.body),
        (200, format!("{EVENT}{REST}"))
    );
    shadows(&world, "complete", 1).await;
    let [copy] = &copies(&world)[..] else {
        panic!("one copy")
    };
    assert_eq!(
        (copy.max_tokens, copy.stream, copy.must_queue),
        (1, false, true)
    );
    assert_eq!((copy.ttft_target_ms, copy.expected_ttft_ms), (None, None));
    assert_eq!(copy.chunks, chunks);
    assert!(copy.request_id.ends_with("-shadow"));
    let own = world.agents[0].placed.lock().pop().unwrap();
    assert!(!own.shadow && copy.cache_salt == own.cache_salt);
    // Once is enough; and of a request what its engine counts is its own alone.
    assert_eq!(ask(&world, true).await.status, 200);
    assert_eq!(copies(&world).len(), 1);
    world.settles().await;
}

#[tokio::test]
async fn a_home_that_the_leader_chose_by_heat_is_not_warmed_by_copies() {
    let (world, _) = world(false, true).await;
    assert_eq!(ask(&world, true).await.status, 200);
    assert!(copies(&world).is_empty());
    world.settles().await;
}

#[tokio::test]
async fn a_copy_that_fails_or_is_refused_fails_nobodys_request() {
    let refused = Act::Refuse(RefusalReason::RefusalFull);
    for (act, outcome) in [
        (refused, "refused"),
        (Act::End(End::EngineFailed), "failed"),
        (Act::Break, "failed"),
        (Act::Status(500, "no"), "failed"),
    ] {
        let (world, _) = world(true, true).await;
        world.agents[0].will(&[Act::Slow(Duration::from_millis(300))]);
        world.agents[1].will(std::slice::from_ref(&act));
        let answer = ask(&world, true).await;
        assert_eq!(answer.body, format!("{EVENT}{REST}"), "{act:?}");
        shadows(&world, outcome, 1).await;
        world.settles().await;
    }
}

#[tokio::test]
async fn a_copy_is_given_up_when_its_request_is_over() {
    let (mut world, _) = world(true, true).await;
    world.agents[1].will(&[Act::Hang]);
    let answer = ask(&world, true).await;
    assert_eq!(answer.status, 200);
    shadows(&world, "cancelled", 1).await;
    world.agents[1].sees(&Saw::Cancelled).await;
    world.settles().await;
}

#[tokio::test]
async fn a_home_without_the_family_gets_the_request_and_is_told_the_truth() {
    // Nobody holds it: the home is as good as anyone, and better for being one.
    let (world, _) = world(false, false).await;
    world.fleet.send_modify(|fleet| {
        let mut next = Fleet::clone(fleet.as_ref().unwrap());
        next.revision = Revision(next.revision.0 + 1);
        next.config.pools[0].policy = "forebay".into();
        *fleet = Some(Arc::new(next));
    });
    world
        .until("/metrics", |_, text| {
            text.contains("forebay_balancer_facts_revision 3\n")
        })
        .await;
    assert_eq!(WorkerId(2), world.agents[1].known.incarnation.worker);
    assert_eq!(ask(&world, true).await.status, 200);
    let placed = world.agents[1].placed.lock().pop();
    let place = placed.expect("the home got it");
    assert_eq!((place.shadow, place.expected_cached_tokens), (false, 0));
    let (_, metrics) = world.page("/metrics").await;
    assert!(metrics.contains("forebay_balancer_home_copies_total 1\n"));
    world.settles().await;
}
