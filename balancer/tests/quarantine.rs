//! Requests that engines die under: how often they are tried, and who refuses them when.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Act, Answer, Setup, WHOLE, World};
use forebay_proto::suspect::{EngineDeath, Suspect};
use forebay_proto::{FingerprintKey, Millis, Revision, WorkerId};

const KEY: FingerprintKey = FingerprintKey {
    epoch: 1,
    bytes: [7; 16],
};

async fn world(agents: usize, quarantine: bool) -> World {
    let mut setup = Setup {
        agents,
        key: Some(KEY),
        ..Setup::default()
    };
    setup.pool.quarantine = quarantine;
    World::new(setup).await
}

async fn ask(world: &World, prompt: &str, more: &str) -> Answer {
    let body =
        format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{prompt}"}}]{more}}}"#);
    let mut client = world.client().await;
    let headers = "authorization: Bearer any\r\ncontent-type: application/json\r\n";
    client.post("/v1/chat/completions", headers, &body).await;
    client.answer().await
}

/// Every placement of every agent: the name that it had, and whether it was suspected.
fn placed(world: &World) -> Vec<(u64, bool)> {
    let agents = world.agents.iter();
    let placed = agents.flat_map(|agent| agent.placed.lock().clone());
    placed
        .map(|place| (place.suspect_key, place.suspected))
        .collect()
}

fn quarantined() -> (u16, String) {
    (422, "quarantined".to_owned())
}

/// As the cell would agree on it.
fn agreed(key: u64) -> Suspect {
    let mut suspect = Suspect {
        key,
        key_epoch: KEY.epoch,
        tenant: "dev".into(),
        model: "m".into(),
        shape: "chat".into(),
        deaths: vec![],
        cleared: 0,
        quarantined_at: None,
    };
    for worker in [1, 2] {
        suspect.accuse(EngineDeath {
            worker: WorkerId(worker),
            share: 1_000,
            at: Millis(1_000),
        });
    }
    suspect
}

fn agree(world: &World, suspects: Vec<Suspect>) {
    world.fleet.send_modify(|fleet| {
        let mut next = (**fleet.as_ref().unwrap()).clone();
        next.revision = Revision(next.revision.0 + 1);
        next.cell_time = Millis(2_000);
        next.suspects = suspects;
        *fleet = Some(Arc::new(next));
    });
}

async fn active(world: &World, expected: usize) {
    let line = format!("forebay_balancer_quarantine_active {expected}");
    world
        .until("/metrics", |_, page| page.contains(&line))
        .await;
}

#[tokio::test]
async fn after_two_deaths_there_is_no_third_attempt_and_no_attempt_at_all() {
    let world = world(4, true).await;
    world.next(&[Act::Dies(250), Act::Dies(1_500)]);
    assert_eq!(ask(&world, "kills", "").await.code(), quarantined());
    let tried = placed(&world);
    assert_eq!(tried.len(), 2);
    assert_eq!(tried[0].0, tried[1].0);
    assert_eq!(
        tried.iter().filter(|(_, suspected)| *suspected).count(),
        1,
        "the retry is known to be suspected"
    );
    let mut fastest = Duration::MAX;
    for _ in 0..20 {
        let began = Instant::now();
        assert_eq!(ask(&world, "kills", "").await.code(), quarantined());
        fastest = fastest.min(began.elapsed());
    }
    eprintln!("refused in {fastest:.2?} at the fastest, connection included");
    assert!(fastest < Duration::from_millis(50), "{fastest:?}");
    assert_eq!(placed(&world).len(), 2, "no worker is asked");
    // Another prompt, and the same with other parameters, are other requests.
    for (prompt, more) in [("is well", ""), ("kills", r#","seed":1"#)] {
        let answer = ask(&world, prompt, more).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, WHOLE));
    }
    world.settles().await;
}

#[tokio::test]
async fn two_deaths_in_company_are_not_enough() {
    let world = world(4, true).await;
    world.next(&[Act::Dies(250), Act::Dies(666)]);
    let answer = ask(&world, "was there", "").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, WHOLE));
    assert_eq!(placed(&world).len(), 3);
    world.settles().await;
}

#[tokio::test]
async fn what_the_cell_agreed_on_is_refused_and_what_it_lifted_is_not() {
    let world = world(2, true).await;
    assert_eq!(ask(&world, "kills", "").await.status, 200);
    let (key, suspected) = placed(&world)[0];
    assert!(key != 0 && !suspected);
    agree(&world, vec![agreed(key)]);
    active(&world, 1).await;
    assert_eq!(ask(&world, "kills", "").await.code(), quarantined());
    assert_eq!(ask(&world, "is well", "").await.status, 200);
    agree(&world, vec![]);
    active(&world, 0).await;
    assert_eq!(ask(&world, "kills", "").await.status, 200);
    world.settles().await;
}

#[tokio::test]
async fn a_pool_may_do_without() {
    let world = world(4, false).await;
    world.next(&[Act::Dies(1_000), Act::Dies(1_500)]);
    let answer = ask(&world, "kills", "").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, WHOLE));
    assert!(placed(&world).iter().all(|(key, _)| *key == 0));
    world.settles().await;
}
