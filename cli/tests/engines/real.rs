//! A real engine as a process group of its own, which ends with its value.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::client::Asked;
use super::harness::{Fleet, get, within};

/// vLLM imports for half a minute, or for three on a busy machine.
const START: Duration = Duration::from_secs(420);

/// An engine.
pub struct Real {
    kind: &'static str,
    flags: Vec<String>,
    env: Vec<(&'static str, String)>,
    pub port: u16,
    process: Child,
    log: PathBuf,
    _dir: tempfile::TempDir,
}

fn script() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.ci/engines")
}

/// Whether this engine is installed; says so where it is not.
pub fn have(kind: &str) -> bool {
    let there = Command::new(script()).args(["have", kind]).status();
    let there = there.is_ok_and(|status| status.success());
    if !there {
        eprintln!("SKIPPED: {kind} is not installed (.ci/engines install {kind})");
    }
    there
}

impl Real {
    /// Starts an engine, and does not wait until it answers.
    pub fn spawn(kind: &'static str, env: &[(&'static str, String)], flags: &[&str]) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("engine.log");
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let process = run(kind, env, &flags, port, &log);
        Self {
            kind,
            flags,
            env: env.to_vec(),
            port,
            process,
            log,
            _dir: dir,
        }
    }

    /// Starts a vLLM with so many blocks of 32 tokens, one of which is reserved, that publishes its cache's
    /// events; its sockets are in this directory.
    pub fn spawn_telling(blocks: u64, sockets: &Path, flags: &[&str]) -> Self {
        let directory = sockets.display();
        let events = format!(
            r#"{{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"ipc://{directory}/kv","replay_endpoint":"ipc://{directory}/again"}}"#
        );
        let flags = [flags, &["--kv-events-config", &events]].concat();
        Self::spawn("vllm", &[("KV_BLOCKS", blocks.to_string())], &flags)
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Waits until it answers.
    pub fn until_healthy(&mut self) {
        let began = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                panic!("{} ended with {status}:\n{}", self.kind, self.log());
            }
            if self.is_healthy() {
                eprintln!("{} answers after {:.1?}", self.kind, began.elapsed());
                return;
            }
            assert!(
                began.elapsed() < START,
                "{} is not up:\n{}",
                self.kind,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Whether it answers, and well.
    pub fn is_healthy(&self) -> bool {
        let listens = std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok();
        listens && get(&format!("{}/health", self.url())).0 == 200
    }

    /// Its parts get this signal, all of them.
    pub fn signal(&self, signal: Signal) {
        let group = i32::try_from(self.process.id()).unwrap();
        kill_process_group(Pid::from_raw(group).unwrap(), signal).unwrap();
    }

    /// Asks it to end; what runs on it may.
    pub fn terminate(&self) {
        let pid = i32::try_from(self.process.id()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    }

    /// Waits until it is gone.
    pub fn until_gone(&mut self, limit: Duration) {
        within(limit, "the engine is gone", || {
            self.process.try_wait().unwrap()
        });
    }

    /// kill -9 for all of it, and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.until_gone(Duration::from_secs(20));
    }

    /// Starts it again, at the same port; does not wait until it answers.
    pub fn spawn_again(&mut self) {
        // What an engine that died by itself left behind.
        let group = Pid::from_raw(i32::try_from(self.process.id()).unwrap());
        let _ = kill_process_group(group.unwrap(), Signal::KILL);
        self.process = run(self.kind, &self.env, &self.flags, self.port, &self.log);
    }

    /// Requests that it says it runs.
    pub fn running(&self) -> Option<u64> {
        let (status, page) = get(&format!("{}/metrics", self.url()));
        let lines = page.lines().filter(|_| status == 200);
        let named = [
            "vllm:num_requests_running{",
            "llamacpp:requests_processing ",
        ];
        let mut lines = lines.filter(|line| named.iter().any(|name| line.starts_with(name)));
        let value: f64 = lines.next()?.rsplit(' ').next()?.parse().ok()?;
        Some(value as u64)
    }

    /// From a client's leaving to where none of these runs anything, by their own count, and at most a look
    /// at each longer.
    pub fn left(engines: &[Self], asked: Asked) -> Duration {
        let left = Instant::now();
        drop(asked);
        while engines.iter().any(|engine| engine.running() != Some(0)) {
            assert!(left.elapsed() < START, "it runs on");
        }
        left.elapsed()
    }

    fn log(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

/// A fleet before these engines, with two balancers, and where those take requests.
pub fn before(engines: &[&Real], model: &str, args: &[&str]) -> (Fleet, [String; 2]) {
    let urls: Vec<String> = engines.iter().map(|engine| engine.url()).collect();
    let engines = urls.iter().flat_map(|url| ["--engine", url]);
    let all = ["--balancers", "2", "--model", model];
    let all: Vec<&str> = all.into_iter().chain(engines).collect();
    let fleet = Fleet::start(&[&all[..], args].concat());
    let urls = ["b1", "b2"].map(|name| format!("http://{}", fleet.process(name).addresses["http"]));
    (fleet, urls)
}

/// Has the fleet cut prompts finer: a token of the tests' model has 1.4 bytes, so that 128 of them are as
/// many tokens as 256 elsewhere.
pub fn cut_finer(fleet: &Fleet) {
    let shown = fleet.run(&["config", "show"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    let changed = shown.replace("chunk_bytes = 256", "chunk_bytes = 128");
    assert_ne!(changed, shown);
    let document = fleet.data().join("chunks.toml");
    std::fs::write(&document, changed).unwrap();
    let applied = fleet.run(&["config", "apply", document.to_str().unwrap()]);
    assert!(applied.status.success());
}

impl Drop for Real {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- {}\n{}", self.kind, self.log());
        }
        let group = Pid::from_raw(i32::try_from(self.process.id()).unwrap());
        let _ = kill_process_group(group.unwrap(), Signal::KILL);
        let _ = self.process.wait();
    }
}

fn run(
    kind: &str,
    env: &[(&'static str, String)],
    flags: &[String],
    port: u16,
    log: &std::path::Path,
) -> Child {
    use std::os::unix::process::CommandExt;
    let log = File::options().create(true).append(true).open(log).unwrap();
    Command::new(script())
        .args(["run", kind, &port.to_string()])
        .args(flags)
        .envs(env.iter().map(|(name, value)| (*name, value)))
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}
