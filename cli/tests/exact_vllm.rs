//! A real vLLM behind an agent that follows its cache's events: what is predicted is what it finds.
//!
//! Skipped with a message where vLLM is not installed (`$XDG_CACHE_HOME/forebay-engines`, as `ENGINES_DIR`).

// Helpers of a test fail as its assertions do, and measurements are printed beside them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    dead_code,
    unreachable_pub
)]

#[path = "fleet/harness.rs"]
mod harness;

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::process::{Pid, Signal, kill_process_group};

use harness::{Fleet, forebay, get, metric, post, within};

/// Blocks of 32 tokens; one is reserved.
const BLOCKS: u64 = 401;
/// vLLM imports for half a minute, or for three on a busy machine.
const START: Duration = Duration::from_secs(420);

fn installed() -> Option<PathBuf> {
    let cache = || {
        let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
        std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or(home)
    };
    let given = std::env::var_os("ENGINES_DIR").map(PathBuf::from);
    let directory = given.or_else(|| cache().map(|cache| cache.join("forebay-engines")))?;
    let there = ["vllm/bin/vllm", "tiny/tokenizer.json"].map(|part| directory.join(part).exists());
    there.iter().all(|there| *there).then_some(directory)
}

/// A process group that ends with its value.
struct Group(Child);

impl Group {
    fn start(command: &mut Command, log: &Path) -> Self {
        let log = File::options().create(true).append(true).open(log).unwrap();
        let command = command.process_group(0).stdin(Stdio::null());
        let command = command.stdout(log.try_clone().unwrap()).stderr(log);
        Self(command.spawn().unwrap())
    }

    fn kill(&mut self) {
        let group = i32::try_from(self.0.id()).unwrap();
        let _ = kill_process_group(Pid::from_raw(group).unwrap(), Signal::KILL);
        let _ = self.0.wait();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn vllm(engines: &Path, dir: &Path, port: u16) -> Group {
    let events = format!(
        r#"{{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"ipc://{0}/kv","replay_endpoint":"ipc://{0}/again"}}"#,
        dir.display()
    );
    let mut command = Command::new(engines.join("vllm/bin/vllm"));
    command.arg("serve").arg(engines.join("tiny"));
    command.args(["--served-model-name", "tiny", "--host", "127.0.0.1"]);
    command.args(["--port", &port.to_string(), "--dtype", "float32"]);
    command.args(["--enforce-eager", "--max-model-len", "2048"]);
    command.args(["--max-num-seqs", "16", "--block-size", "32"]);
    command.args(["--num-gpu-blocks-override", &BLOCKS.to_string()]);
    command.args(["--enable-prefix-caching", "--enable-prompt-tokens-details"]);
    command.args(["--kv-events-config", &events]);
    for (name, value) in [
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("OMP_NUM_THREADS", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("HF_HUB_OFFLINE", "1"),
        ("TRANSFORMERS_OFFLINE", "1"),
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    ] {
        command.env(name, value);
    }
    Group::start(&mut command, &dir.join("vllm.log"))
}

fn until_healthy(engine: &mut Group, dir: &Path, port: u16) {
    let began = Instant::now();
    loop {
        if let Some(status) = engine.0.try_wait().unwrap() {
            let log = std::fs::read_to_string(dir.join("vllm.log")).unwrap_or_default();
            panic!("vLLM ended with {status}:\n{log}");
        }
        let listens = std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
        if listens && get(&format!("http://127.0.0.1:{port}/health")).0 == 200 {
            eprintln!("vLLM answers after {:.0?}", began.elapsed());
            return;
        }
        assert!(began.elapsed() < START, "vLLM is not up");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// An agent beside that engine, as the one of the emulated engine is configured.
fn agent(fleet: &Fleet, engine: u16, quic: u16, admin: u16) -> Group {
    let data = fleet.data();
    let config = data.join("config/v1.toml");
    if !config.exists() {
        let issued = forebay()
            .args(["ca", "issue", "--role", "agent", "--name", "v1", "--dir"])
            .arg(data.join("ca"))
            .arg("--out")
            .arg(data.join("certs"))
            .output()
            .unwrap();
        assert!(issued.status.success());
        let other = std::fs::read_to_string(data.join("config/w1.toml")).unwrap();
        let kv_tokens = (BLOCKS - 1) * 32;
        let lines = other.lines().filter_map(|line| {
            let (key, _) = line.split_once(" = ")?;
            Some(match key {
                "engine" => format!("engine = \"http://127.0.0.1:{engine}\""),
                "engine-kind" => "engine-kind = \"vllm\"".into(),
                "kv-tokens" => format!("kv-tokens = {kv_tokens}"),
                "max-context" => "max-context = 2048".into(),
                "slots" => "slots = 8".into(),
                "listen" | "advertise" => format!("{key} = \"127.0.0.1:{quic}\""),
                "admin" => format!("admin = \"127.0.0.1:{admin}\""),
                "profile" | "profile-speed" => return None,
                _ => line.replace("w1", "v1"),
            })
        });
        std::fs::write(&config, lines.collect::<Vec<_>>().join("\n")).unwrap();
    }
    let mut command = forebay();
    command.arg("agent").arg("--config").arg(&config);
    Group::start(&mut command, &data.join("logs/v1.log"))
}

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

#[test]
fn a_real_vllm_has_what_its_events_say() {
    let Some(engines) = installed() else {
        eprintln!("SKIPPED: vLLM is not installed");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut engine = vllm(&engines, dir.path(), port);
    let fleet = Fleet::start(&["--workers", "1"]);
    let document = fleet.data().join("chunks.toml");
    let shown = fleet.run(&["config", "show"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    // A token of this model has 1.4 bytes: 128 of them are as many tokens as 256 elsewhere.
    let changed = shown.replace("chunk_bytes = 256", "chunk_bytes = 128");
    assert_ne!(changed, shown);
    std::fs::write(&document, changed).unwrap();
    let applied = fleet.run(&["config", "apply", document.to_str().unwrap()]);
    assert!(applied.status.success());
    until_healthy(&mut engine, dir.path(), port);
    let (quic, admin_port) = (free_port(), free_port());
    let mut beside = agent(&fleet, port, quic, admin_port);
    let admin = format!("http://127.0.0.1:{admin_port}");
    let seen = |name: &str| metric(&admin, &format!("forebay_agent_{name}"));
    let exact = |what: &str| {
        within(Duration::from_secs(30), what, || {
            let up = std::net::TcpStream::connect(("127.0.0.1", admin_port)).is_ok();
            (up && seen("residency_exact") == 1.0).then_some(())
        });
        // And placed on.
        within(Duration::from_secs(30), "served", || {
            let body =
                r#"{"model":"tiny","max_tokens":1,"messages":[{"role":"user","content":"a"}]}"#;
            let (status, _) = post(&format!("{}/v1/chat/completions", fleet.url), body);
            (status == 200).then_some(())
        });
    };
    exact("grade exact");
    // 50 conversations of about 850 tokens: three times the cache.
    let mut chats = Chats::new(5, 50);
    (0..350).for_each(|_| chats.turn(&fleet.url));
    let report = |when: &str| {
        let [answers, over, predicted, reported] =
            ["answers", "over", "predicted_tokens", "reported_tokens"]
                .map(|what| ["settled", "promised"].map(|how| seen(&format!("kv_{how}_{what}"))));
        eprintln!(
            "{when}: {} answers whose events were in, {} over by more than a block, predicted / reported {:.4}; \
             {} others, {} over; in all {:.4}; alignment error {:.2} tokens a chunk, {} evicted chunks known",
            answers[0],
            over[0],
            predicted[0] / reported[0],
            answers[1],
            over[1],
            predicted.iter().sum::<f64>() / reported.iter().sum::<f64>(),
            seen("alignment_error_tokens") / seen("aligned_chunks"),
            seen("kv_absent_chunks"),
        );
        assert!(predicted.iter().sum::<f64>() >= 0.95 * reported.iter().sum::<f64>());
        assert!(over[0] <= 0.001 * answers[0]);
        assert_eq!(
            seen("kv_gaps") + seen("kv_losses") + seen("unaligned_prompts"),
            0.0
        );
        answers.iter().sum::<f64>()
    };
    assert!(report("a first agent") >= 300.0);
    assert!(seen("kv_absent_chunks") > 100.0, "there were evictions");
    // The agent is killed; its map goes on, with what was missed told again.
    std::thread::sleep(Duration::from_secs(6));
    let batches = seen("kv_batches");
    beside.kill();
    let straight = format!("http://127.0.0.1:{port}/v1/completions");
    for prompt in 0..5 {
        let text = words(&mut StdRng::seed_from_u64(prompt), 300);
        let body = serde_json::json!({"model": "tiny", "max_tokens": 1, "prompt": text});
        assert_eq!(post(&straight, &body.to_string()).0, 200);
    }
    beside = agent(&fleet, port, quic, admin_port);
    exact("exact again");
    assert!(seen("resident_chunks") > 100.0);
    assert!(seen("kv_batches") < batches / 2.0, "only what was missed");
    (0..150).for_each(|_| chats.turn(&fleet.url));
    assert!(report("its second start") >= 100.0);
    // The engine is killed: nothing is said to be in the cache of what comes next.
    engine.kill();
    within(Duration::from_secs(10), "the engine is missed", || {
        (seen("residency_exact") == 0.0).then_some(())
    });
    let body = r#"{"model":"tiny","messages":[{"role":"user","content":"a"}]}"#;
    let (status, answer) = post(&format!("{}/v1/chat/completions", fleet.url), body);
    assert!(
        status >= 500 && answer.contains("\"error\""),
        "{status} {answer}"
    );
    engine = vllm(&engines, dir.path(), port);
    until_healthy(&mut engine, dir.path(), port);
    exact("exact with another engine");
    assert!(seen("resident_chunks") <= 1.0);
    (0..60).for_each(|_| chats.turn(&fleet.url));
    assert!(
        seen("kv_settled_over") == 0.0,
        "nothing of the dead engine is believed"
    );
    beside.kill();
}
