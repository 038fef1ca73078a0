//! The supervisor: what it starts lives and dies with it, and a data directory is one fleet.

#![allow(clippy::unwrap_used)] // helpers of a test fail as its assertions do

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn forebay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.env_remove("FOREBAY_CONTEXT").stdin(Stdio::null());
    command
}

fn within<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A supervisor; killed if the test forgets it.
struct Dev(Child);

impl Dev {
    /// Starts and waits until it says how to use the fleet.
    fn up(dir: &Path, listen: &str, more: &[&str]) -> Self {
        let out = dir.join("out");
        let mut child = forebay()
            .args(["dev", "--workers", "1", "--listen", listen, "--data-dir"])
            .arg(dir.join("data"))
            .args(more)
            .stdout(std::fs::File::create(&out).unwrap())
            .stderr(std::fs::File::create(dir.join("err")).unwrap())
            .spawn()
            .unwrap();
        within("the fleet is up", || {
            let ended = child.try_wait().unwrap();
            let said = std::fs::read_to_string(dir.join("err")).unwrap();
            assert!(ended.is_none(), "{said}");
            let text = std::fs::read_to_string(&out).unwrap();
            text.contains("FOREBAY_CONTEXT=").then_some(())
        });
        Self(child)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(dir: &Path) -> Vec<(String, i32)> {
    let text = std::fs::read_to_string(dir.join("data/run.json")).unwrap();
    let run: Value = serde_json::from_str(&text).unwrap();
    let processes = run["processes"].as_array().unwrap().iter();
    processes
        .map(|process| {
            let pid = i32::try_from(process["pid"].as_i64().unwrap()).unwrap();
            (process["name"].as_str().unwrap().to_owned(), pid)
        })
        .collect()
}

fn pid(dir: &Path, name: &str) -> i32 {
    run(dir).into_iter().find(|(one, _)| one == name).unwrap().1
}

fn is_gone(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.map_or(true, |stat| stat.contains(") Z "))
}

fn json(dir: &Path, verb: &str) -> Value {
    let output = forebay()
        .args([verb, "--output", "json", "--context"])
        .arg(dir.join("data/context.toml"))
        .output()
        .unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

#[test]
fn a_fleet_dies_with_its_supervisor_and_resumes_from_its_directory() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    let listen = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().to_string()
    };
    let first = Dev::up(dir, &listen, &[]);
    let names: Vec<String> = run(dir).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["c1", "e1", "w1", "b1"]);
    let cluster = json(dir, "status")["cluster_id"].clone();
    assert!(cluster.is_string());

    let second = forebay()
        .args(["dev", "--listen", &listen, "--data-dir"])
        .arg(dir.join("data"))
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(8));
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use"));

    // What died stays dead until it is asked for.
    let engine = pid(dir, "e1");
    kill_process(Pid::from_raw(engine).unwrap(), Signal::KILL).unwrap();
    within("its end is told", || {
        let said = std::fs::read_to_string(dir.join("err")).unwrap();
        said.contains("engine e1").then_some(())
    });
    first.signal(Signal::HUP);
    within("it is started again", || {
        (pid(dir, "e1") != engine).then_some(())
    });

    // kill -9 of the supervisor takes all with it.
    let orphans = run(dir);
    first.signal(Signal::KILL);
    within("nobody is left", || {
        orphans.iter().all(|(_, pid)| is_gone(*pid)).then_some(())
    });
    drop(first);

    let size = forebay()
        .args(["dev", "--control", "3", "--listen", &listen, "--data-dir"])
        .arg(dir.join("data"))
        .output()
        .unwrap();
    assert_eq!(size.status.code(), Some(8));

    // The same directory is the same cluster and the same worker.
    let mut again = Dev::up(dir, &listen, &["--restart"]);
    assert_eq!(json(dir, "status")["cluster_id"], cluster);
    let workers = json(dir, "workers");
    assert_eq!(workers["workers"].as_array().unwrap().len(), 1, "{workers}");
    assert_eq!(workers["workers"][0]["start"]["start"], 2, "{workers}");
    let agent = pid(dir, "w1");
    kill_process(Pid::from_raw(agent).unwrap(), Signal::KILL).unwrap();
    within("it comes back by itself", || {
        (pid(dir, "w1") != agent).then_some(())
    });

    let all = run(dir);
    again.signal(Signal::TERM);
    assert!(again.0.wait().unwrap().success());
    assert!(all.iter().all(|(_, pid)| is_gone(*pid)));
    assert!(!dir.join("data/run.json").exists());
}
