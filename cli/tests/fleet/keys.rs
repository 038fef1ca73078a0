//! What is cached stays of use: through a rotation of the fingerprint key and restarts of agents.

use std::time::Duration;

use crate::harness::{FAST_ENGINE, Fleet, get, metric, post, within};

/// Conversations that are asked again and again.
const CHATS: usize = 6;

fn body(chat: usize) -> String {
    let text: String = (0..700).map(|word| format!("{chat}-{word} ")).collect();
    serde_json::json!({
        "model": "emulated",
        "max_tokens": 2,
        "messages": [{"role": "user", "content": text}],
    })
    .to_string()
}

/// Asks all conversations once. Returns the share of their prompt tokens that was cached.
fn ask_all(fleet: &Fleet) -> f64 {
    let balancer = fleet.admin("b1");
    let read = || {
        ["cached_tokens_reported", "prompt_tokens"]
            .map(|name| metric(&balancer, &format!("forebay_balancer_{name}_total")))
    };
    let [cached, all] = read();
    for chat in 0..CHATS {
        let url = format!("{}/v1/chat/completions", fleet.url);
        let (status, answer) = post(&url, &body(chat));
        assert_eq!(status, 200, "{answer}");
    }
    // What was served is told within 20 ms.
    std::thread::sleep(Duration::from_millis(300));
    let [cached_then, all_then] = read();
    (cached_then - cached) / (all_then - all)
}

fn resident(fleet: &Fleet) -> f64 {
    metric(&fleet.admin("b1"), "forebay_balancer_residency_chunks")
}

/// A fleet whose balancer has the first key, and whose engines have all conversations.
fn warm() -> Fleet {
    let fleet = Fleet::start(&[&["--workers", "2"], &FAST_ENGINE[..]].concat());
    within(Duration::from_secs(20), "the first key", || {
        ask_all(&fleet);
        (resident(&fleet) > 0.0).then_some(())
    });
    ask_all(&fleet);
    fleet
}

fn rotate(fleet: &Fleet) -> u64 {
    let rotated = fleet.json(&["keys", "rotate", "--reason", "a test"]);
    assert_eq!(rotated["schema_version"], 1);
    let revision: f64 = rotated["revision"]
        .to_string()
        .trim_matches('"')
        .parse()
        .unwrap();
    let balancer = fleet.admin("b1");
    within(Duration::from_secs(5), "the balancer has the key", || {
        (metric(&balancer, "forebay_balancer_facts_revision") >= revision).then_some(())
    });
    assert_eq!(rotated.as_object().unwrap().len(), 4, "no key: {rotated}");
    rotated["epoch"].as_u64().unwrap()
}

#[test]
fn a_rotation_costs_no_hit_at_once_and_a_second_one_all() {
    let fleet = warm();
    let before = ask_all(&fleet);
    assert_eq!(rotate(&fleet), 2);
    let after = ask_all(&fleet);
    let conflict = fleet.run(&["keys", "rotate", "--expected-epoch", "1"]);
    assert_eq!(conflict.status.code(), Some(8), "it is 2 by now");
    assert_eq!(rotate(&fleet), 3);
    let forgotten = ask_all(&fleet);
    let again = ask_all(&fleet);
    eprintln!(
        "share of prompt tokens cached: before {before:.3}, right after a rotation {after:.3}, \
         after a second one {forgotten:.3}, served again {again:.3}"
    );
    assert!(before > 0.9);
    assert!(after > before - 0.02);
    assert!(forgotten < 0.05);
    assert!(again > before - 0.02);
}

#[test]
fn a_killed_agent_comes_back_with_the_map_of_its_engine() {
    let fleet = warm();
    let names = |role: &str| -> Vec<String> {
        let processes = fleet.of_role(role).into_iter();
        processes.map(|process| process.name).collect()
    };
    let (agents, engines) = (names("agent"), names("engine"));
    let restart = |names: &[String]| {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        names.iter().for_each(|name| fleet.kill(name));
        fleet.start_again(&names);
        let balancer = fleet.admin("b1");
        within(Duration::from_secs(20), "the workers are back", || {
            let (_, page) = get(&format!("{balancer}/debug/workers"));
            let back = page.matches("\"acceptance\":\"Open\"").count() == 2
                && page.matches("\"residency\":\"inferred\"").count() == 2;
            back.then_some(())
        });
        std::thread::sleep(Duration::from_millis(500));
    };
    let (before, held) = (ask_all(&fleet), resident(&fleet));
    // A map is written every five seconds.
    std::thread::sleep(Duration::from_secs(6));
    restart(&agents);
    let known = resident(&fleet);
    let after = ask_all(&fleet);
    eprintln!(
        "cached before {before:.3}, after both agents were killed {after:.3}; chunks known {held} and {known}"
    );
    assert!(after > before - 0.02);
    assert!((known - held).abs() < 1.0, "before anything is asked");

    std::thread::sleep(Duration::from_secs(6));
    restart(&engines);
    let gone = within(Duration::from_secs(20), "the maps are dropped", || {
        (resident(&fleet) < 1.0).then(|| ask_all(&fleet))
    });
    assert!(gone < 0.05, "{gone}");
}
