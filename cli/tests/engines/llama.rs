//! llama.cpp's server: what it is known as, how it is left, and how it dies.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::client::{Asked, CHAT, ask, chat};
use super::harness::{Fleet, metric, within};
use super::real::{self, Real, have};

const SOON: Duration = Duration::from_secs(30);
const MODEL: &str = "tiny-llama";

/// Two balancers before these engines; a hanging one is given up after two seconds.
fn before(engines: &[&Real]) -> (Fleet, [String; 2]) {
    real::before(engines, MODEL, &["--engine-stall-ms", "2000"])
}

fn started(count: usize) -> Vec<Real> {
    let mut engines: Vec<_> = (0..count)
        .map(|_| Real::spawn("llama.cpp", &[], &[]))
        .collect();
    for engine in &mut engines {
        engine.until_healthy();
    }
    engines
}

/// Asks until something is known to be cached: a young cell has no key to fingerprint prompts with.
fn until_fingerprinted(agent: &str, url: &str, text: &str) {
    within(SOON, "its cache is known", || {
        assert!(ask(url, &chat(MODEL, text, false, 4)).is_complete());
        (metric(agent, "forebay_agent_resident_chunks") > 0.0).then_some(())
    });
}

#[test]
fn it_is_known_and_serves_streams_and_errors_as_its_own() {
    if !have("llama.cpp") {
        return;
    }
    let engines = started(1);
    let (fleet, urls) = before(&[&engines[0]]);
    let workers = fleet.json(&["workers"]);
    let worker = &workers["workers"][0];
    assert_eq!(worker["engine"], "llama.cpp");
    assert_eq!(worker["slots"], 4, "as it says");
    assert_eq!(
        (&worker["kv_tokens"], &worker["max_context_tokens"]),
        (&8_192.into(), &2_048.into())
    );
    assert_eq!(
        worker["labels"]["render-profile"],
        "system_tools+no_reasoning"
    );

    let agent = fleet.admin("w1");
    let text = "word ".repeat(200);
    until_fingerprinted(&agent, &urls[0], &text);
    for (turn, url) in urls.iter().cycle().take(6).enumerate() {
        let answer = ask(url, &chat(MODEL, &text, turn.is_multiple_of(2), 8));
        assert!(answer.is_complete(), "{answer:?}");
        let streamed = turn.is_multiple_of(2);
        assert_eq!(answer.text.contains("[DONE]"), streamed);
        assert_eq!(
            answer.text.contains("\"usage\":{"),
            !streamed,
            "nobody asked for it in a stream"
        );
    }
    let counted = chat(MODEL, &text, true, 8).replacen(
        '{',
        r#"{"stream_options":{"include_usage":true},"#,
        1,
    );
    assert!(ask(&urls[0], &counted).text.contains("\"cached_tokens\":"));

    assert!(
        metric(&agent, "forebay_agent_residency_trusted") > 0.0,
        "grade inferred"
    );
    let (predicted, reported) = (
        metric(&agent, "forebay_agent_cached_tokens_predicted"),
        metric(&agent, "forebay_agent_cached_tokens_reported"),
    );
    eprintln!("llama.cpp: cached tokens predicted {predicted}, reported {reported}");
    assert!(
        reported > 0.0 && predicted <= reported,
        "{predicted} of {reported}"
    );

    let long = ask(&urls[1], &chat(MODEL, &"word ".repeat(9_000), false, 1));
    assert_eq!(long.status, 400, "{long:?}");
    assert!(long.text.contains("exceed_context_size_error"), "{long:?}");
    let unknown = ask(&urls[0], &chat("nope", "x", false, 1));
    assert_eq!(unknown.status, 404, "{unknown:?}");
    assert!(unknown.text.contains("model_not_found"));
}

#[test]
fn a_client_that_leaves_is_forgotten_by_the_engine() {
    if !have("llama.cpp") {
        return;
    }
    let engines = started(1);
    let (_fleet, urls) = before(&[&engines[0]]);
    let engine = &engines[0];
    let mut took = vec![];
    for url in urls.iter().cycle().take(6) {
        let mut asked = Asked::of(url, CHAT, &chat(MODEL, "go on", true, 1_900));
        asked.until_events(3);
        assert_eq!(engine.running(), Some(1));
        let left = Instant::now();
        drop(asked);
        within(SOON, "the engine runs nothing", || {
            (engine.running() == Some(0)).then_some(())
        });
        took.push(left.elapsed());
    }
    took.sort();
    eprintln!("llama.cpp: from leaving to idle, in its metrics: {took:.0?}");
    assert!(took[took.len() / 2] < Duration::from_secs(2), "{took:?}");
}

#[test]
fn an_engine_that_dies_fails_what_ran_on_it_and_comes_back_with_an_empty_cache() {
    if !have("llama.cpp") {
        return;
    }
    let mut engines = started(1);
    let (fleet, urls) = before(&[&engines[0]]);
    let agent = fleet.admin("w1");
    let text = "word ".repeat(300);
    until_fingerprinted(&agent, &urls[0], &text);
    let mut asked = Asked::of(&urls[0], CHAT, &chat(MODEL, "go on", true, 1_900));
    asked.until_events(3);
    engines[0].kill();
    let broken = asked.whole();
    assert!(broken.is_typed_error(), "{broken:?}");
    let down = ask(&urls[1], &chat(MODEL, "again", false, 4));
    assert!(matches!(down.status, 502 | 503), "{down:?}");
    assert!(down.is_typed_error(), "{down:?}");

    engines[0].spawn_again();
    engines[0].until_healthy();
    within(SOON, "it serves again", || {
        ask(&urls[1], &chat(MODEL, "hi", false, 4))
            .is_complete()
            .then_some(())
    });
    assert_eq!(
        metric(&agent, "forebay_agent_resident_chunks"),
        0.0,
        "it is another process"
    );
    let (status, answer) = super::harness::post(
        &format!("{}{CHAT}", engines[0].url()),
        &chat(MODEL, &text, false, 1),
    );
    assert_eq!(status, 200);
    assert!(!answer.contains("\"cached_tokens\":300"), "{answer}");
}

#[test]
fn an_engine_that_freezes_fails_what_ran_on_it_and_is_used_again_when_it_works() {
    if !have("llama.cpp") {
        return;
    }
    let engines = started(1);
    let (_fleet, urls) = before(&[&engines[0]]);
    let mut asked = Asked::of(&urls[0], CHAT, &chat(MODEL, "go on", true, 1_900));
    asked.until_events(3);
    engines[0].signal(Signal::STOP);
    let frozen = Instant::now();
    let broken = asked.whole();
    eprintln!(
        "llama.cpp: from SIGSTOP to a typed end {:.1?}",
        frozen.elapsed()
    );
    assert!(broken.is_typed_error(), "{broken:?}");
    let meanwhile = ask(&urls[1], &chat(MODEL, "again", false, 4));
    assert!(meanwhile.is_typed_error(), "{meanwhile:?}");
    engines[0].signal(Signal::CONT);
    within(SOON, "it serves again", || {
        ask(&urls[0], &chat(MODEL, "hi", false, 4))
            .is_complete()
            .then_some(())
    });
}

#[test]
fn an_agent_that_dies_fails_what_it_carried_and_the_rest_goes_elsewhere() {
    if !have("llama.cpp") {
        return;
    }
    let engines = started(2);
    let (fleet, urls) = before(&[&engines[0], &engines[1]]);
    let mut asked = Asked::of(&urls[0], CHAT, &chat(MODEL, "go on", true, 1_900));
    asked.until_events(3);
    let on_first = engines[0].running() == Some(1);
    let (agent, engine) = if on_first {
        ("w1", &engines[0])
    } else {
        ("w2", &engines[1])
    };
    fleet.kill(agent);
    let broken = asked.whole();
    assert!(broken.is_typed_error(), "{broken:?}");
    within(SOON, "the engine was left", || {
        (engine.running() == Some(0)).then_some(())
    });
    for turn in 0..20 {
        let answer = ask(
            &urls[turn % 2],
            &chat(MODEL, &format!("turn {turn}"), turn.is_multiple_of(3), 4),
        );
        assert!(answer.is_complete(), "{answer:?}");
    }
    fleet.start_again(&[agent]);
    within(SOON, "it serves again", || {
        let workers = fleet.json(&["workers"]);
        let workers = workers["workers"].as_array()?.clone();
        let ready =
            |worker: &serde_json::Value| worker["observed"] == "ready" && worker["lost"] == false;
        workers.iter().all(ready).then_some(())
    });
}
