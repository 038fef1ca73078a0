//! One worker has all of a hot family: a plan evens it out, and what it predicted comes true, although the
//! leader dies while it is carried out.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;

use crate::harness::{Fleet, forebay, post, within};

/// What all conversations begin with, and what each asks, in bytes: about 7,500 and 1,500 tokens.
const SHARED: usize = 30_000;
const OWN: usize = 6_000;
/// Requests a second: they take not quite half of one worker's time, so that the family needs one home.
const RATE: f64 = 2.7;
/// How long is looked at, before and after.
const WINDOW: Duration = Duration::from_secs(75);
/// Copies are made in this time.
const SETTLES: Duration = Duration::from_secs(15);

/// Conversations that begin alike, at irregular times.
struct Crowd {
    stop: Arc<AtomicBool>,
    failed: Arc<AtomicU64>,
    sender: Option<std::thread::JoinHandle<u64>>,
}

impl Crowd {
    fn start(fleet: &Fleet) -> Self {
        let url = format!("{}/v1/chat/completions", fleet.url);
        let (stop, failed) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, lost) = (Arc::clone(&stop), Arc::clone(&failed));
        let sender = std::thread::spawn(move || {
            let mut rng = StdRng::seed_from_u64(7);
            let shared = text(&mut rng, SHARED);
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) {
                let (url, lost) = (url.clone(), Arc::clone(&lost));
                let own = text(&mut rng, OWN);
                let body = format!(
                    r#"{{"model":"emulated","max_tokens":40,"messages":[{{"role":"system","content":"{shared}"}},{{"role":"user","content":"{own}"}}]}}"#
                );
                std::thread::spawn(move || {
                    if post(&url, &body).0 != 200 {
                        lost.fetch_add(1, Ordering::Relaxed);
                    }
                });
                sent += 1;
                // The same load in each stretch: by chance it would differ by a tenth.
                let pause = rng.random_range(0.5..1.5) / RATE;
                std::thread::sleep(Duration::from_secs_f64(pause));
            }
            sent
        });
        Self {
            stop,
            failed,
            sender: Some(sender),
        }
    }

    /// How many were sent, and how many of them failed.
    fn end(mut self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.take().unwrap().join().unwrap();
        std::thread::sleep(Duration::from_secs(5));
        (sent, self.failed.load(Ordering::Relaxed))
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Words of small letters.
fn text(rng: &mut StdRng, bytes: usize) -> String {
    let letter = |_| match rng.random_range(0..7) {
        0 => ' ',
        _ => char::from(rng.random_range(b'a'..=b'z')),
    };
    (0..bytes).map(letter).collect()
}

/// Loads by worker, in the order of their names.
fn loads(forecast: &Value) -> Vec<f64> {
    let workers = forecast["workers"].as_array().unwrap();
    let mut loads: Vec<(&str, f64)> = workers
        .iter()
        .map(|one| (one["name"].as_str().unwrap(), one["load"].as_f64().unwrap()))
        .collect();
    loads.sort_by(|one, other| one.0.cmp(other.0));
    loads.into_iter().map(|(_, load)| load).collect()
}

fn most(loads: &[f64]) -> f64 {
    loads.iter().copied().fold(0.0, f64::max)
}

fn mean(loads: &[f64]) -> f64 {
    loads.iter().sum::<f64>() / loads.len() as f64
}

#[test]
fn a_plan_predicts_what_its_moves_do_and_goes_on_without_the_leader_that_began_it() {
    let fleet = Fleet::start(&["--control", "3", "--workers", "4"]);
    fleet.wait_for_control(3);
    let crowd = Crowd::start(&fleet);
    within(Duration::from_secs(60), "the family has a home", || {
        let homes = fleet.json(&["homes"]);
        homes["families"].as_array()?.first().cloned()
    });
    std::thread::sleep(WINDOW);

    let window = format!("{}s", WINDOW.as_secs());
    let plan = ["rebalance", "plan", "--window", &window];
    let planned = fleet.run(&[&plan[..], &["--out", "plan.json"]].concat());
    let said = String::from_utf8_lossy(&planned.stdout).into_owned();
    assert!(planned.status.success(), "{planned:?}");
    eprintln!("{said}");
    let path = fleet.dir.path().join("plan.json");
    let written: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let moves = written["moves"].as_array().unwrap().len();
    let before = loads(&written["before"]);
    assert!(most(&before) > 1.5 * mean(&before), "skewed: {before:?}");
    assert!(moves > 0, "{written}");

    let leader = fleet.wait_for_control(3);
    let apply = [
        "rebalance",
        "apply",
        "plan.json",
        "--yes",
        "--interval",
        "4s",
    ];
    let operator = forebay()
        .current_dir(fleet.dir.path())
        .args([&apply[..], &["--measure", "none", "--output", "json"]].concat())
        .env("FOREBAY_CONTEXT", fleet.data().join("context.toml"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    within(Duration::from_secs(20), "it began", || {
        let status = fleet.json(&["rebalance", "status"]);
        status["rebalances"].as_array()?.first().cloned()
    });
    fleet.kill(&leader);
    let began = Instant::now();
    let applied = operator.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&applied.stderr).into_owned();
    assert!(applied.status.success(), "{stderr}");
    let applied: Value = serde_json::from_slice(&applied.stdout).unwrap();
    assert_eq!(applied["state"], "done", "{applied}");
    assert_eq!(applied["done"].as_u64(), Some(moves as u64));
    let homes = fleet.json(&["homes"]);
    assert_eq!(homes["families"][0]["pinned"], true, "{homes}");
    eprintln!(
        "{moves} moves, the last one {:.1} s after the leader died",
        began.elapsed().as_secs_f64()
    );

    std::thread::sleep(SETTLES + WINDOW);
    let after = fleet.json(&plan);
    let (sent, failed) = crowd.end();
    let predicted = loads(&written["after"]);
    let measured = loads(&after["measured"]);
    let hits = |forecast: &Value| forecast["hit_ratio"].as_f64().unwrap();
    let (predicted_hits, measured_hits) = (hits(&written["after"]), hits(&after["measured"]));
    eprintln!(
        "loads {before:.3?} -> predicted {predicted:.3?}, measured {measured:.3?}; hit ratio predicted \
         {predicted_hits:.3}, measured {measured_hits:.3}; {sent} requests, {failed} failed"
    );
    assert_eq!(failed, 0);
    assert!((predicted_hits - measured_hits).abs() <= 0.05);
    // Which worker gets how many of so few is a matter of chance: a part of its time is what can be held to.
    for (predicted, measured) in predicted.iter().zip(&measured) {
        assert!((predicted - measured).abs() <= 0.1);
    }
    assert!(most(&measured) < 0.7 * most(&before));
    let total = mean(&measured) / mean(&predicted);
    assert!((0.85..=1.15).contains(&total), "{total}");
}
