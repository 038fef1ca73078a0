//! An agent that runs its engine: it is started again when it ends or hangs, outlives an agent that dies, and
//! ends with one that is stopped.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::harness::{FAST_ENGINE, Fleet, forebay, get, within};

const SOON: Duration = Duration::from_secs(30);

/// An agent of the fleet that the supervisor of `dev` knows nothing of.
struct Supervising {
    dir: PathBuf,
    engine: String,
    process: Child,
}

impl Supervising {
    fn start(fleet: &Fleet, dir: &Path, engine: &str) -> Self {
        let data = fleet.data();
        let control = &fleet.process("c1").addresses["quic"];
        let mut log = std::fs::OpenOptions::new();
        let log = log.create(true).append(true).open(dir.join("agent.log"));
        let log = log.unwrap();
        let command = format!(
            "{} engine --listen {engine} --model supervised --speed 10",
            env!("CARGO_BIN_EXE_forebay")
        );
        let process = forebay()
            .args(["agent", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .args([
                "--control",
                control,
                "--engine",
                &format!("http://{engine}"),
            ])
            .args(["--engine-command", &command, "--engine-stall-ms", "2000"])
            .arg("--data-dir")
            .arg(dir.join("w9"))
            .arg("--ca")
            .arg(data.join("ca/ca.pem"))
            .arg("--cert")
            .arg(dir.join("w9.pem"))
            .arg("--key")
            .arg(dir.join("w9-key.pem"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self {
            dir: dir.to_owned(),
            engine: engine.to_owned(),
            process,
        }
    }

    /// The engine that is on record.
    fn engine_pid(&self) -> Option<i32> {
        let record = std::fs::read(self.dir.join("w9/engine.json")).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&record).ok()?;
        record["pid"].as_i64()?.try_into().ok()
    }

    /// Waits until an engine other than that one answers.
    fn other_engine(&self, than: Option<i32>) -> i32 {
        within(SOON, "an engine that answers", || {
            let pid = self.engine_pid().filter(|pid| Some(*pid) != than)?;
            let listening = std::net::TcpStream::connect(&self.engine).is_ok();
            (listening && get(&format!("http://{}/health", self.engine)).0 == 200).then_some(pid)
        })
    }
}

impl Drop for Supervising {
    fn drop(&mut self) {
        if let Some(pid) = self.engine_pid().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default();
            eprintln!("---- agent.log\n{log}");
        }
    }
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, state)| !state.starts_with('Z'))
}

#[test]
fn an_engine_is_started_and_started_again_and_ends_with_its_agent() {
    let fleet = Fleet::start(&[&["--workers", "1"], &FAST_ENGINE[..]].concat());
    let dir = tempfile::tempdir().unwrap();
    let issued = forebay()
        .args(["ca", "issue", "--role", "agent", "--name", "w9", "--dir"])
        .arg(fleet.data().join("ca"))
        .arg("--out")
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(
        issued.status.success(),
        "{}",
        String::from_utf8_lossy(&issued.stderr)
    );
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let engine = port.to_string();
    let mut agent = Supervising::start(&fleet, dir.path(), &engine);
    let ready = || {
        within(SOON, "w9 is ready", || {
            let workers = fleet.json(&["workers"]);
            let workers = workers["workers"].as_array()?.clone();
            let w9 = workers.into_iter().find(|worker| worker["name"] == "w9")?;
            (w9["observed"] == "ready").then_some(())
        });
    };
    let first = agent.other_engine(None);
    ready();

    // It ends: another one is started.
    signal(first, Signal::KILL);
    let second = agent.other_engine(Some(first));
    ready();

    // The agent dies: the engine runs on, and the next start goes on with it.
    agent.process.kill().unwrap();
    agent.process.wait().unwrap();
    assert!(runs(second), "an engine outlives its agent");
    agent = {
        let next = Supervising::start(&fleet, dir.path(), &engine);
        std::mem::forget(agent);
        next
    };
    within(SOON, "it found the engine again", || {
        let log = std::fs::read_to_string(dir.path().join("agent.log")).unwrap();
        let (_, of_the_next) = log.split_once("the engine runs on from before")?;
        of_the_next.contains("the engine answers").then_some(())
    });
    assert_eq!(agent.engine_pid(), Some(second));
    ready();

    // It hangs: it is killed, and another one is started.
    signal(second, Signal::STOP);
    let third = agent.other_engine(Some(second));
    assert!(!runs(second));
    ready();

    // The agent is stopped: the engine ends with it.
    let pid = i32::try_from(agent.process.id()).unwrap();
    signal(pid, Signal::TERM);
    let ended = within(SOON, "the agent ended", || {
        agent.process.try_wait().unwrap()
    });
    assert!(ended.success(), "{ended}");
    assert!(!runs(third), "an engine ends with its agent");
    assert_eq!(agent.engine_pid(), None);
}
