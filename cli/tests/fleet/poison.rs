//! A request that kills its engine, sent to a fleet that serves others: two engines die of it and no third, every
//! balancer refuses it from then on, and an operator lets it through again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{FAST_ENGINE, Fleet, get, metric, post, within};

const SOON: Duration = Duration::from_secs(30);
const CHAT: &str = "v1/chat/completions";

/// What kills an emulated engine that was told to die of seeds; `seed` is the only difference to what does not.
fn chat(prompt: &str, seed: Option<u32>) -> String {
    let mut body = serde_json::json!({
        "model": "emulated", "max_tokens": 4,
        "messages": [{"role": "user", "content": prompt.repeat(200)}],
    });
    if let Some(seed) = seed {
        body["seed"] = seed.into();
    }
    body.to_string()
}

/// Others' requests, each of its own prompt, at every balancer until it is stopped.
struct Others {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    lost: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Others {
    fn start(urls: &[String]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (asked, lost) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let threads = urls.iter().enumerate().map(|(at, url)| {
            let (url, stop) = (url.clone(), stop.clone());
            let (asked, lost) = (asked.clone(), lost.clone());
            std::thread::spawn(move || {
                for number in 0_u64.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let body = chat(&format!("other {at} {number} "), None);
                    let (status, text) = post(&format!("{url}/{CHAT}"), &body);
                    asked.fetch_add(1, Ordering::Relaxed);
                    if status != 200 {
                        eprintln!("lost: {status} {text:.200}");
                        lost.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        });
        let threads = threads.collect();
        Self {
            stop,
            asked,
            lost,
            threads,
        }
    }

    /// How many were asked, and how many of them got no answer.
    fn end(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        let count = |number: Arc<AtomicU64>| number.load(Ordering::Relaxed);
        (count(self.asked), count(self.lost))
    }
}

struct Poisoned {
    fleet: Fleet,
    balancers: Vec<String>,
}

impl Poisoned {
    fn start() -> Self {
        let args = [
            "--workers",
            "4",
            "--balancers",
            "2",
            "--engines-die-of-seed",
        ];
        let fleet = Fleet::start(&[&args[..], &FAST_ENGINE[..]].concat());
        let balancers = fleet.of_role("balancer").into_iter();
        let balancers = balancers.map(|one| format!("http://{}", one.addresses["http"]));
        let balancers: Vec<String> = balancers.collect();
        Self { fleet, balancers }
    }

    fn dead_engines(&self) -> Vec<String> {
        let engines = self.fleet.of_role("engine").into_iter();
        let dead = engines.filter(|engine| !engine.running);
        dead.map(|engine| engine.name).collect()
    }

    /// Sends what kills through this balancer until it is refused; which engines are dead then.
    fn poison(&self, balancer: usize, body: &str) -> Vec<String> {
        let began = Instant::now();
        let (status, text) = post(&format!("{}/{CHAT}", self.balancers[balancer]), body);
        eprintln!("the killer ended after {:.1?}: {status}", began.elapsed());
        assert_eq!(status, 422, "{text}");
        assert!(text.contains("\"code\":\"quarantined\""), "{text}");
        // The supervisor notices an end a moment later.
        std::thread::sleep(Duration::from_secs(1));
        self.dead_engines()
    }

    /// Every balancer refuses it and no engine is asked: the slowest and the middle one of so many.
    fn refused_everywhere(&self, body: &str) {
        for (number, url) in self.balancers.iter().enumerate() {
            let admin = self.fleet.admin(&format!("b{}", number + 1));
            within(SOON, "the fact is at the balancer", || {
                (metric(&admin, "forebay_balancer_quarantine_active") >= 1.0).then_some(())
            });
            let placed = metric(&admin, "forebay_balancer_placements_total");
            let mut times: Vec<Duration> = (0..50)
                .map(|_| {
                    let began = Instant::now();
                    let (status, text) = post(&format!("{url}/{CHAT}"), body);
                    assert_eq!(status, 422, "{text}");
                    began.elapsed()
                })
                .collect();
            times.sort_unstable();
            eprintln!(
                "{url}: refused in {:.2?} (p50), {:.2?} (p98), connection and all",
                times[25], times[48]
            );
            assert!(times[25] < Duration::from_millis(50), "{:?}", times[25]);
            let refusals = metric(&admin, "forebay_balancer_quarantine_refusals_total");
            assert!(refusals >= 50.0, "{refusals}");
            let placed_since = metric(&admin, "forebay_balancer_placements_total") - placed;
            assert!(placed_since < 1.0, "{placed_since} placements");
        }
    }

    fn start_engines_again(&self, names: &[String]) {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.fleet.start_again(&names);
        within(SOON, "all workers are ready", || {
            let workers = self.fleet.json(&["workers"]);
            let workers = workers["workers"].as_array()?.clone();
            let ready = |worker: &&Value| worker["observed"] == "ready";
            (workers.iter().filter(ready).count() == 4).then_some(())
        });
    }

    fn listed(&self) -> Vec<Value> {
        let list = self.fleet.json(&["quarantine", "list"]);
        list["requests"].as_array().unwrap().clone()
    }
}

#[test]
fn a_request_that_kills_engines_kills_two_and_no_more_until_it_is_let_through() {
    let poisoned = Poisoned::start();
    let others = Others::start(&poisoned.balancers);
    std::thread::sleep(Duration::from_secs(2));
    let killer = chat("poison ", Some(7));

    let dead = poisoned.poison(0, &killer);
    assert_eq!(dead.len(), 2, "{dead:?}");
    let (asked, lost) = others.end();
    eprintln!("others: {lost} of {asked} lost while two of four engines died");
    assert!(asked > 50 && lost * 100 <= asked, "{lost} of {asked}");
    poisoned.refused_everywhere(&killer);
    assert_eq!(poisoned.dead_engines().len(), 2);

    // Its name, and nothing of its text.
    let listed = poisoned.listed();
    assert_eq!(listed.len(), 1, "{listed:?}");
    let name = listed[0]["name"].as_str().unwrap().to_owned();
    assert_eq!(listed[0]["shape"], "chat, max_tokens<=16, seed");
    assert_eq!(listed[0]["deaths"].as_array().unwrap().len(), 2);
    let shown = poisoned.fleet.run(&["quarantine", "show", &name]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("refused since"), "{shown}");
    assert!(!shown.contains("poison"), "{shown}");
    let check = poisoned.fleet.run(&["check", "--all"]);
    let check = String::from_utf8(check.stdout).unwrap();
    assert!(
        check.contains("requests.quarantined") && check.contains(&name),
        "{check}"
    );

    // The same with another seed is the same request; without one it is another, and runs.
    for body in [chat("poison ", Some(8)), killer.clone()] {
        let (status, text) = post(&format!("{}/{CHAT}", poisoned.balancers[1]), &body);
        assert_eq!(status, 422, "{text}");
    }
    let harmless = chat("poison ", None);
    let (status, text) = post(&format!("{}/{CHAT}", poisoned.balancers[1]), &harmless);
    assert_eq!(status, 200, "{text}");

    // Let through again, it kills again.
    poisoned.start_engines_again(&dead);
    let look = poisoned
        .fleet
        .json(&["quarantine", "lift", &name, "--dry-run"]);
    assert_eq!(
        (&look["affected"], &look["dry_run"]),
        (&1.into(), &true.into())
    );
    assert_eq!(poisoned.listed().len(), 1);
    let lifted = poisoned
        .fleet
        .json(&["quarantine", "lift", &name, "--reason", "a test"]);
    assert_eq!(lifted["affected"], 1);
    for number in 1..=2 {
        let admin = poisoned.fleet.admin(&format!("b{number}"));
        within(SOON, "the lift is at the balancer", || {
            (metric(&admin, "forebay_balancer_quarantine_active") < 1.0).then_some(())
        });
    }
    let dead = poisoned.poison(1, &killer);
    assert_eq!(dead.len(), 2, "{dead:?}");
    poisoned.refused_everywhere(&killer);
    let audit = poisoned.fleet.json(&["audit", "tail"]);
    let audit = audit.to_string();
    for action in ["engine-died", "lift-quarantine"] {
        assert!(audit.contains(action), "no {action} in {audit}");
    }
    let again = poisoned
        .fleet
        .run(&["quarantine", "lift", "00000000000000aa"]);
    assert_eq!(again.status.code(), Some(5));
    let (status, _) = get(&format!("{}/health", poisoned.balancers[0]));
    assert_eq!(status, 200);
}
