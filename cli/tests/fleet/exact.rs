//! Engines that publish their caches' events: what agents predict is what engines find.
//!
//! The emulated engine writes them as vLLM does, over local sockets.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{FAST_ENGINE, Fleet, metric, post, within};

/// Tokens of an engine's cache, and of its blocks.
const KV_TOKENS: u64 = 16_000;
const KV: [&str; 3] = ["--kv-events", "--engine-kv-tokens", "16000"];

/// What agents counted of their predictions.
#[derive(Debug, Default)]
struct Counted {
    settled: f64,
    settled_over: f64,
    settled_predicted: f64,
    settled_reported: f64,
    promised: f64,
    promised_over: f64,
    predicted: f64,
    reported: f64,
}

fn counted(agents: &[String]) -> Counted {
    let sum = |name: &str| -> f64 {
        let of = |admin: &String| metric(admin, &format!("forebay_agent_kv_{name}"));
        agents.iter().map(of).sum()
    };
    let settled_predicted = sum("settled_predicted_tokens");
    let settled_reported = sum("settled_reported_tokens");
    Counted {
        settled: sum("settled_answers"),
        settled_over: sum("settled_over"),
        settled_predicted,
        settled_reported,
        promised: sum("promised_answers"),
        promised_over: sum("promised_over"),
        predicted: settled_predicted + sum("promised_predicted_tokens"),
        reported: settled_reported + sum("promised_reported_tokens"),
    }
}

fn agent(admin: &str, name: &str) -> f64 {
    metric(admin, &format!("forebay_agent_{name}"))
}

fn is_exact(admin: &str) -> bool {
    agent(admin, "residency_exact") == 1.0
}

/// Conversations on a few shared beginnings, which grow, end and begin anew.
struct Chats {
    rng: StdRng,
    beginnings: Vec<String>,
    open: Vec<Vec<serde_json::Value>>,
}

impl Chats {
    fn new(seed: u64, open: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let beginnings = (0..4).map(|_| words(&mut rng, 900)).collect();
        let mut chats = Self {
            rng,
            beginnings,
            open: Vec::new(),
        };
        for _ in 0..open {
            let chat = chats.begin();
            chats.open.push(chat);
        }
        chats
    }

    fn begin(&mut self) -> Vec<serde_json::Value> {
        let beginning = self.rng.random_range(0..self.beginnings.len());
        let question = words(&mut self.rng, 60);
        vec![
            serde_json::json!({"role": "system", "content": self.beginnings[beginning]}),
            serde_json::json!({"role": "user", "content": question}),
        ]
    }

    /// One more turn of one of them; the streamed ones and the others alike.
    fn turn(&mut self, fleet: &Fleet) {
        let at = self.rng.random_range(0..self.open.len());
        let stream: bool = self.rng.random();
        let body = serde_json::json!({
            "model": "emulated", "max_tokens": self.rng.random_range(1..6), "stream": stream,
            "messages": self.open[at],
        });
        let url = format!("{}/v1/chat/completions", fleet.url);
        let (status, answer) = post(&url, &body.to_string());
        assert_eq!(status, 200, "{answer}");
        assert!(!answer.contains("token_ids\":["), "{answer}");
        if self.open[at].len() >= 12 {
            self.open[at] = self.begin();
            return;
        }
        let (said, next) = (words(&mut self.rng, 30), words(&mut self.rng, 90));
        self.open[at].push(serde_json::json!({"role": "assistant", "content": said}));
        self.open[at].push(serde_json::json!({"role": "user", "content": next}));
    }
}

fn words(rng: &mut StdRng, count: usize) -> String {
    let word = |rng: &mut StdRng| format!("{:x} ", rng.random_range(0..1_u32 << 24));
    (0..count).map(|_| word(rng)).collect()
}

#[test]
fn what_events_say_is_what_the_engine_finds() {
    let fleet = Fleet::start(&[&["--workers", "2"], &KV[..], &FAST_ENGINE[..]].concat());
    let agents = ["w1", "w2"].map(|name| fleet.admin(name));
    within(Duration::from_secs(20), "grade exact", || {
        agents.iter().all(|admin| is_exact(admin)).then_some(())
    });
    // 160 conversations with 600 tokens of their own in the mean: three times what both caches hold.
    let mut chats = Chats::new(7, 160);
    let began = std::time::Instant::now();
    for _ in 0..900 {
        chats.turn(&fleet);
    }
    std::thread::sleep(Duration::from_millis(300));
    let counted = counted(&agents);
    let prompt_tokens = metric(&fleet.admin("b1"), "forebay_balancer_prompt_tokens_total");
    println!(
        "{counted:?} of {prompt_tokens} prompt tokens in {:?}",
        began.elapsed()
    );
    println!(
        "predicted / reported: {:.4}, settled alone {:.4}",
        counted.predicted / counted.reported,
        counted.settled_predicted / counted.settled_reported
    );
    assert!(counted.settled >= 500.0, "{counted:?}");
    assert!(counted.reported > 3.0 * 2.0 * KV_TOKENS as f64);
    assert!(counted.predicted >= 0.95 * counted.reported, "{counted:?}");
    assert!(
        counted.settled_over <= 0.001 * counted.settled,
        "{counted:?}"
    );
    assert!(counted.promised_over <= 0.02 * (counted.settled + counted.promised));
    for admin in &agents {
        assert!(is_exact(admin));
        assert_eq!(agent(admin, "kv_gaps") + agent(admin, "kv_losses"), 0.0);
        assert_eq!(agent(admin, "kv_unknown_removals"), 0.0);
        assert_eq!(agent(admin, "unaligned_prompts"), 0.0);
    }
    let evicted: f64 = agents
        .iter()
        .map(|admin| agent(admin, "kv_absent_chunks"))
        .sum();
    assert!(evicted > 20.0, "{evicted} chunks were evicted");
}

#[test]
fn what_several_clients_evict_from_each_other_is_foretold() {
    let fleet = Fleet::start(&[&["--workers", "1"], &KV[..], &FAST_ENGINE[..]].concat());
    let agent_of = [fleet.admin("w1")];
    within(Duration::from_secs(20), "grade exact", || {
        is_exact(&agent_of[0]).then_some(())
    });
    // Room for eight of their prompts, of which four are under way.
    std::thread::scope(|scope| {
        for client in 0..4 {
            let fleet = &fleet;
            scope.spawn(move || {
                let mut chats = Chats::new(30 + client, 20);
                (0..150).for_each(|_| chats.turn(fleet));
            });
        }
    });
    std::thread::sleep(Duration::from_millis(300));
    let counted = counted(&agent_of);
    println!("{counted:?}");
    assert!(counted.settled + counted.promised >= 500.0, "{counted:?}");
    assert!(counted.settled_over <= 0.001 * counted.settled);
    assert!(counted.promised_over <= 0.02 * (counted.settled + counted.promised));
    assert!(counted.predicted >= 0.93 * counted.reported, "{counted:?}");
    let evicted = agent(&agent_of[0], "kv_absent_chunks");
    assert!(evicted > 20.0, "{evicted} chunks were evicted");
}

#[test]
fn a_map_outlives_its_agent_and_not_its_engine() {
    let args = [&["--workers", "1"], &KV[..], &FAST_ENGINE[..]].concat();
    let fleet = Fleet::start(&args);
    let admin = || fleet.admin("w1");
    let exact = |what: &str| {
        within(Duration::from_secs(20), what, || {
            let up = answers(&admin());
            (up && is_exact(&admin())).then_some(())
        });
    };
    exact("grade exact");
    let mut chats = Chats::new(11, 12);
    (0..60).for_each(|_| chats.turn(&fleet));
    // Longer than from one writing of the map to the next.
    std::thread::sleep(Duration::from_secs(6));
    let before = agent(&admin(), "kv_batches");
    fleet.kill("w1");
    fleet.start_again(&["w1"]);
    exact("exact again");
    assert!(agent(&admin(), "resident_chunks") > 100.0);
    let told_again = agent(&admin(), "kv_batches");
    assert!(
        told_again < before / 2.0,
        "{told_again} of {before} batches"
    );
    within(Duration::from_secs(20), "the worker serves", || {
        let body =
            r#"{"model":"emulated","max_tokens":1,"messages":[{"role":"user","content":"a"}]}"#;
        let (status, _) = post(&format!("{}/v1/chat/completions", fleet.url), body);
        (status == 200).then_some(())
    });
    (0..60).for_each(|_| chats.turn(&fleet));
    let counted_then = counted(&[admin()]);
    println!("after the agent's end: {counted_then:?}, {told_again} batches told again");
    assert!(counted_then.settled >= 20.0 && counted_then.settled_over == 0.0);
    assert!(counted_then.predicted >= 0.9 * counted_then.reported);
    // The engine's cache goes with its process.
    fleet.kill("e1");
    within(Duration::from_secs(10), "the engine is missed", || {
        (!is_exact(&admin())).then_some(())
    });
    fleet.start_again(&["e1"]);
    exact("exact with another engine");
    assert_eq!(agent(&admin(), "resident_chunks"), 0.0);
    (0..60).for_each(|_| chats.turn(&fleet));
    let counted = counted(&[admin()]);
    println!("after the engine's end: {counted:?}");
    assert!(counted.settled > counted_then.settled + 20.0);
    assert_eq!(
        counted.settled_over, 0.0,
        "nothing of the dead engine is believed"
    );
}

#[test]
fn what_an_engine_cannot_tell_again_is_not_claimed() {
    // Two batches can be told again.
    let buffer = ["--kv-buffer", "2"];
    let args = [&["--workers", "1"], &KV[..], &buffer[..], &FAST_ENGINE[..]].concat();
    let fleet = Fleet::start(&args);
    let admin = fleet.admin("w1");
    within(Duration::from_secs(20), "grade exact", || {
        is_exact(&admin).then_some(())
    });
    let mut chats = Chats::new(13, 40);
    (0..20).for_each(|_| chats.turn(&fleet));
    assert!(is_exact(&admin));
    // While the agent is away its engine goes on, for others.
    let agent_process = fleet.process("w1");
    let engine = fleet.process("e1").addresses["http"].clone();
    std::thread::sleep(Duration::from_secs(6));
    let pid = Pid::from_raw(agent_process.pid).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    within(Duration::from_secs(5), "gone", || {
        (!fleet.process("w1").running).then_some(())
    });
    for chat in 0..8 {
        let text = words(&mut StdRng::seed_from_u64(chat), 400);
        let body = serde_json::json!({"model": "emulated", "max_tokens": 2, "prompt": text});
        let (status, _) = post(
            &format!("http://{engine}/v1/completions"),
            &body.to_string(),
        );
        assert_eq!(status, 200);
    }
    fleet.start_again(&["w1"]);
    let admin = fleet.admin("w1");
    within(Duration::from_secs(20), "the loss is noticed", || {
        (answers(&admin) && agent(&admin, "kv_losses") >= 1.0).then_some(())
    });
    assert!(!is_exact(&admin), "what is missing is not known");
    // What is told from here on fills the cache, and then everything in it is known.
    within(Duration::from_secs(60), "exact again", || {
        (0..5).for_each(|_| chats.turn(&fleet));
        is_exact(&admin).then_some(())
    });
    let before = counted(std::slice::from_ref(&admin));
    (0..60).for_each(|_| chats.turn(&fleet));
    let after = counted(&[admin]);
    println!("{before:?}\n{after:?}");
    assert!(after.settled - before.settled >= 20.0);
    assert_eq!(after.settled_over, 0.0);
}

/// Whether somebody answers there.
fn answers(admin: &str) -> bool {
    std::net::TcpStream::connect(admin.strip_prefix("http://").unwrap()).is_ok()
}
