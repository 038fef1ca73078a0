//! A real vLLM behind an agent that follows its cache's events: what is predicted is what it finds.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::harness::{Fleet, metric, post, within};
use super::real::{Real, have};

/// Blocks of 32 tokens; one is reserved.
const BLOCKS: u64 = 401;
const SOON: Duration = Duration::from_secs(60);

const WORDS: [&str; 16] = [
    "the",
    "cache",
    "block",
    "token",
    "prefix",
    "chat",
    "turn",
    "system",
    "user",
    "answer",
    "careful",
    "assistant",
    "counts",
    "bytes",
    "engine",
    "worker",
];

fn words(rng: &mut StdRng, count: usize) -> String {
    let word = |rng: &mut StdRng| WORDS[rng.random_range(0..WORDS.len())];
    (0..count).map(|_| word(rng)).collect::<Vec<_>>().join(" ")
}

struct Chats {
    rng: StdRng,
    beginnings: Vec<String>,
    open: Vec<Vec<serde_json::Value>>,
}

impl Chats {
    fn new(seed: u64, open: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let beginnings = (0..4).map(|_| words(&mut rng, 300)).collect();
        let mut chats = Self {
            rng,
            beginnings,
            open: vec![Vec::new(); open],
        };
        (0..open).for_each(|at| chats.begin(at));
        chats
    }

    fn begin(&mut self, at: usize) {
        let beginning = self.rng.random_range(0..self.beginnings.len());
        let question = words(&mut self.rng, 60);
        self.open[at] = vec![
            serde_json::json!({"role": "system", "content": self.beginnings[beginning]}),
            serde_json::json!({"role": "user", "content": question}),
        ];
    }

    fn turn(&mut self, url: &str) {
        let at = self.rng.random_range(0..self.open.len());
        let stream: bool = self.rng.random();
        let body = serde_json::json!({
            "model": "tiny", "max_tokens": self.rng.random_range(1..8), "temperature": 0,
            "stream": stream, "messages": self.open[at],
        });
        let (status, answer) = post(&format!("{url}/v1/chat/completions"), &body.to_string());
        assert_eq!(status, 200, "{answer}");
        assert!(
            !answer.contains("token_ids\":["),
            "ids were asked for by nobody else: {answer}"
        );
        if self.open[at].len() >= 10 {
            return self.begin(at);
        }
        let (said, next) = (words(&mut self.rng, 8), words(&mut self.rng, 25));
        self.open[at].push(serde_json::json!({"role": "assistant", "content": said}));
        self.open[at].push(serde_json::json!({"role": "user", "content": next}));
    }
}

/// A worker whose engine publishes its cache's events.
struct World {
    fleet: Fleet,
    engine: Real,
    chats: Chats,
    _sockets: tempfile::TempDir,
}

#[test]
fn a_real_vllm_has_what_its_events_say() {
    if !have("vllm") {
        return;
    }
    let mut world = World::start();
    world.until_exact("grade exact");
    world.turns(350);
    assert!(world.report("a first agent") >= 300.0);
    assert!(
        world.seen("kv_absent_chunks") > 100.0,
        "there were evictions"
    );
    world.a_map_outlives_its_agent();
    world.and_not_its_engine();
}

impl World {
    fn start() -> Self {
        let sockets = tempfile::tempdir().unwrap();
        let directory = sockets.path().display();
        let events = format!(
            r#"{{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"ipc://{directory}/kv","replay_endpoint":"ipc://{directory}/again"}}"#
        );
        let blocks = ("KV_BLOCKS", BLOCKS.to_string());
        let mut engine = Real::spawn("vllm", &[blocks], &["--kv-events-config", &events]);
        engine.until_healthy();
        let fleet = Fleet::start(&["--model", "tiny", "--engine", &engine.url()]);
        let shown = fleet.run(&["config", "show"]);
        let shown = String::from_utf8(shown.stdout).unwrap();
        // A token of this model has 1.4 bytes: 128 of them are as many tokens as 256 elsewhere.
        let changed = shown.replace("chunk_bytes = 256", "chunk_bytes = 128");
        assert_ne!(changed, shown);
        let document = fleet.data().join("chunks.toml");
        std::fs::write(&document, changed).unwrap();
        let applied = fleet.run(&["config", "apply", document.to_str().unwrap()]);
        assert!(applied.status.success());
        Self {
            fleet,
            engine,
            // 50 conversations of about 850 tokens: three times the cache.
            chats: Chats::new(5, 50),
            _sockets: sockets,
        }
    }

    fn seen(&self, name: &str) -> f64 {
        metric(&self.fleet.admin("w1"), &format!("forebay_agent_{name}"))
    }

    fn is_exact(&self) -> bool {
        let admin = self.fleet.admin("w1");
        let up = std::net::TcpStream::connect(admin.strip_prefix("http://").unwrap()).is_ok();
        up && self.seen("residency_exact") == 1.0
    }

    /// Waits until everything in the cache is known, and the worker is placed on.
    fn until_exact(&self, what: &str) {
        within(SOON, what, || self.is_exact().then_some(()));
        within(SOON, "served", || {
            let body =
                r#"{"model":"tiny","max_tokens":1,"messages":[{"role":"user","content":"a"}]}"#;
            let (status, _) = post(&format!("{}/v1/chat/completions", self.fleet.url), body);
            (status == 200).then_some(())
        });
    }

    fn turns(&mut self, count: usize) {
        (0..count).for_each(|_| self.chats.turn(&self.fleet.url));
    }

    /// Says how predictions held, which they did. Returns the answers that told.
    fn report(&self, when: &str) -> f64 {
        let [answers, over, predicted, reported] =
            ["answers", "over", "predicted_tokens", "reported_tokens"].map(|what| {
                ["settled", "promised"].map(|how| self.seen(&format!("kv_{how}_{what}")))
            });
        let all = |both: [f64; 2]| both.iter().sum::<f64>();
        eprintln!(
            "{when}: {} answers whose events were in, {} over by more than a block, predicted / reported {:.4}; \
             {} others, {} over; in all {:.4}; alignment error {:.2} tokens a chunk, {} evicted chunks known",
            answers[0],
            over[0],
            predicted[0] / reported[0],
            answers[1],
            over[1],
            all(predicted) / all(reported),
            self.seen("alignment_error_tokens") / self.seen("aligned_chunks"),
            self.seen("kv_absent_chunks"),
        );
        assert!(all(predicted) >= 0.95 * all(reported));
        assert!(over[0] <= 0.001 * answers[0]);
        let missed = self.seen("kv_gaps") + self.seen("kv_losses");
        assert_eq!(missed + self.seen("unaligned_prompts"), 0.0);
        all(answers)
    }

    /// What the engine did while the agent was away is told again.
    fn a_map_outlives_its_agent(&mut self) {
        // Longer than from one writing of the map to the next.
        std::thread::sleep(Duration::from_secs(6));
        let batches = self.seen("kv_batches");
        self.fleet.kill("w1");
        for prompt in 0..5 {
            let text = words(&mut StdRng::seed_from_u64(prompt), 300);
            let body = serde_json::json!({"model": "tiny", "max_tokens": 1, "prompt": text});
            let url = format!("{}/v1/completions", self.engine.url());
            assert_eq!(post(&url, &body.to_string()).0, 200);
        }
        self.fleet.start_again(&["w1"]);
        self.until_exact("exact again");
        assert!(self.seen("resident_chunks") > 100.0);
        assert!(
            self.seen("kv_batches") < batches / 2.0,
            "only what was missed"
        );
        self.turns(150);
        assert!(self.report("its second start") >= 100.0);
    }

    /// Nothing is said to be in the cache of what comes next.
    fn and_not_its_engine(&mut self) {
        self.engine.kill();
        within(SOON, "the engine is missed", || {
            (!self.is_exact()).then_some(())
        });
        let body = r#"{"model":"tiny","messages":[{"role":"user","content":"a"}]}"#;
        let (status, answer) = post(&format!("{}/v1/chat/completions", self.fleet.url), body);
        assert!(
            status >= 500 && answer.contains("\"type\":"),
            "{status} {answer}"
        );
        self.engine.spawn_again();
        self.engine.until_healthy();
        self.until_exact("exact with another engine");
        assert!(self.seen("resident_chunks") <= 1.0);
        self.turns(60);
        assert_eq!(
            self.seen("kv_settled_over"),
            0.0,
            "nothing of the dead engine is believed"
        );
    }
}
