//! The control plane's own members as their operator changes them: real processes, real disks, the verbs
//! of docs/operators.md.

// Helpers of a test fail as its assertions do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// An election, a snapshot and a disk on two cores that others use, too.
const PATIENCE: Duration = Duration::from_secs(30);

/// A cell of its own: an authority, and control nodes by name.
struct Cell {
    dir: tempfile::TempDir,
    nodes: BTreeMap<String, (String, Option<Child>)>,
}

fn forebay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FOREBAY_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Below the ports that systems give out: a node that is down must find its own free when it returns.
fn free_address() -> String {
    let mut addresses =
        std::iter::repeat_with(|| format!("127.0.0.1:{}", rand::random_range(10_000..32_000_u16)));
    let is_free = |address: &String| UdpSocket::bind(address).is_ok();
    addresses.find(is_free).unwrap()
}

fn within<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

impl Cell {
    fn new(nodes: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        let made = forebay()
            .args(["ca", "init", "--cell", "test", "--dir", text(&ca)])
            .output();
        assert!(made.unwrap().status.success());
        let mut cell = Self {
            dir,
            nodes: BTreeMap::new(),
        };
        cell.issue("operator/admin", "alice");
        cell.issue("operator/viewer", "victor");
        for name in nodes {
            cell.issue("control", name);
            cell.nodes.insert((*name).into(), (free_address(), None));
        }
        cell
    }

    fn issue(&self, role: &str, name: &str) {
        let (ca, certs) = (self.dir.path().join("ca"), self.dir.path().join("certs"));
        let issued = forebay()
            .args(["ca", "issue", "--role", role, "--name", name])
            .args(["--dir", text(&ca), "--out", text(&certs)])
            .output();
        assert!(issued.unwrap().status.success());
    }

    fn identity(&self, name: &str) -> [String; 6] {
        let certs = self.dir.path().join("certs");
        let path = |file: String| certs.join(file).display().to_string();
        let ca = self.dir.path().join("ca/ca.pem").display().to_string();
        [
            "--ca".into(),
            ca,
            "--cert".into(),
            path(format!("{name}.pem")),
            "--key".into(),
            path(format!("{name}-key.pem")),
        ]
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("disk-{name}"))
    }

    fn address(&self, name: &str) -> String {
        self.nodes[name].0.clone()
    }

    fn start(&mut self, name: &str) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join(format!("{name}.log")))
            .unwrap();
        let child = forebay()
            .args(["control", "--admin", "127.0.0.1:0", "--listen"])
            .arg(self.address(name))
            .arg("--data-dir")
            .arg(self.disk(name))
            .args(self.identity(name))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.nodes.get_mut(name).unwrap().1 = Some(child);
    }

    /// kill -9.
    fn kill(&mut self, name: &str) {
        let mut child = self.nodes.get_mut(name).unwrap().1.take().unwrap();
        kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
        child.wait().unwrap();
    }

    fn run_as(&self, who: &str, asked: &[&str], args: &[&str]) -> Output {
        let control: Vec<String> = asked.iter().map(|name| self.address(name)).collect();
        forebay()
            .args(args)
            .args(["--control", &control.join(","), "--timeout", "30"])
            .args(self.identity(who))
            .output()
            .unwrap()
    }

    /// Runs a verb as the admin and checks its exit code.
    fn exits(&self, asked: &[&str], args: &[&str], code: i32) -> String {
        let output = self.run_as("alice", asked, args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        stderr
    }

    fn json(&self, asked: &[&str], args: &[&str]) -> Value {
        let args = [args, &["--output", "json"]].concat();
        let output = self.run_as("alice", asked, &args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {stderr}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The leader's name, and each member as `raft members` shows it.
    fn members(&self, asked: &[&str]) -> (String, Vec<Value>) {
        let shown = self.json(asked, &["raft", "members"]);
        assert_eq!(shown["schema_version"], 1);
        let members = shown["members"].as_array().unwrap().clone();
        let leader = members.iter().find(|one| one["leader"] == true).unwrap();
        (leader["name"].as_str().unwrap().to_owned(), members)
    }

    /// Replaces the document; returns its revision.
    fn write(&self, asked: &[&str], queue_limit: u32) -> u64 {
        let file = self.dir.path().join("fleet.toml");
        let document = format!("[[pools]]\nname = \"default\"\nqueue_limit = {queue_limit}\n");
        std::fs::write(&file, document).unwrap();
        let applied = self.json(asked, &["config", "apply", text(&file)]);
        applied["revision"].as_u64().unwrap()
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        for (name, (_, child)) in &mut self.nodes {
            if let Some(child) = child {
                let _ = child.kill();
                let _ = child.wait();
            }
            if std::thread::panicking() {
                let log = self.dir.path().join(format!("{name}.log"));
                let log = std::fs::read_to_string(log).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(25)..].join("\n");
                eprintln!("---- {name}\n{tail}");
            }
        }
    }
}

#[test]
fn a_lost_disk_is_replaced_the_leader_moves_and_a_backup_becomes_a_cluster_of_its_own() {
    let all = ["c1", "c2", "c3"];
    let mut cell = Cell::new(&["c1", "c2", "c3", "r1"]);
    for name in all {
        cell.start(name);
    }
    within("three nodes answer", || {
        let nodes = cell.run_as("alice", &all, &["members", "--output", "json"]);
        let nodes: Value = serde_json::from_slice(&nodes.stdout).ok()?;
        let nodes = nodes["members"].as_array()?;
        nodes
            .iter()
            .all(|node| node["reachable"] == true)
            .then_some(())
    });
    let founded = cell.json(&all, &["init"]);
    let first = cell.write(&all, 11);
    let (leader, members) = cell.members(&all);
    assert_eq!(members.len(), 3);
    let followers: Vec<&str> = all.into_iter().filter(|name| *name != leader).collect();
    let (lost, other) = (followers[0], followers[1]);

    // A disk is gone. The node is started on an empty one; it is refused, and so is adding it.
    cell.kill(lost);
    std::fs::remove_dir_all(cell.disk(lost)).unwrap();
    cell.start(lost);
    let address = cell.address(lost);
    let told = within("the empty node answers", || {
        let added = cell.run_as("alice", &all, &["raft", "add", &address]);
        let told = String::from_utf8_lossy(&added.stderr).into_owned();
        (added.status.code() != Some(7)).then_some((added.status.code(), told))
    });
    assert_eq!(told.0, Some(4), "{}", told.1);
    assert!(told.1.contains("lost its disk"), "{}", told.1);
    assert!(told.1.contains(&format!("forebay raft remove {lost}")));

    // Who may not, and what cannot be.
    let viewer = cell.run_as("victor", &all, &["raft", "remove", lost]);
    assert_eq!(viewer.status.code(), Some(6));
    cell.exits(&all, &["raft", "remove", "c9"], 5);
    let refused = cell.exits(&all, &["raft", "remove", &leader], 4);
    assert!(refused.contains("forebay raft transfer"), "{refused}");
    // With one of three gone, the other two are all that answers.
    let known = cell.exits(&all, &["raft", "add", &cell.address(other)], 0);
    assert!(!known.contains("promote"), "a voter already: {known}");

    let removed = cell.json(&all, &["raft", "remove", lost, "--reason", "its disk"]);
    assert_eq!(removed["members"].as_array().unwrap().len(), 2);
    let added = cell.json(&all, &["raft", "add", &address, "--reason", "a new disk"]);
    assert_eq!((&added["node"], &added["name"]), (&4.into(), &lost.into()));
    let again = cell.json(&all, &["raft", "add", &address]);
    assert_eq!(again["unchanged"], true);
    let promoted = cell.json(&all, &["raft", "promote", "n4"]);
    assert_eq!(promoted["unchanged"], false);
    let new = promoted["members"]
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["id"] == 4)
        .unwrap()
        .clone();
    assert_eq!(
        (&new["role"], new["behind"].as_u64() < Some(50)),
        (&"voter".into(), true)
    );

    // Its vote counts: with another one gone, nothing could be agreed on without it.
    cell.kill(other);
    let second = cell.write(&all, 12);
    assert!(second > first);
    cell.start(other);

    // It leads, and dies like any other.
    cell.json(&all, &["raft", "transfer", lost]);
    assert_eq!(cell.members(&all).0, lost);
    let repeated = cell.json(&all, &["raft", "transfer", lost]);
    assert_eq!(repeated["unchanged"], true);
    let before = cell.json(&all, &["config", "show"]);
    let perf = [
        "raft",
        "check-perf",
        "--rate",
        "20",
        "--seconds",
        "2",
        "--p99-ms",
        "5000",
    ];
    let report = cell.json(&all, &perf);
    assert_eq!(
        (&report["pass"], &report["failed"]),
        (&true.into(), &0.into())
    );

    // A backup, looked into.
    let file = cell.dir.path().join("cell.snap");
    let saved = cell.json(&all, &["raft", "snapshot", "save", text(&file)]);
    assert_eq!(saved["cluster_id"], founded["cluster_id"]);
    cell.exits(&all, &["raft", "snapshot", "save", text(&file)], 8);
    let offline = |args: &[&str], code: i32| -> Value {
        let output = forebay()
            .args(args)
            .args(["--output", "json"])
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    };
    let inspected = offline(&["raft", "snapshot", "inspect", text(&file)], 0);
    assert_eq!(inspected, saved, "the file has what was taken");
    assert_eq!(inspected["checksums"], "ok");
    assert_eq!(inspected["members"].as_array().unwrap().len(), 3);
    assert_eq!(inspected["config_revision"], second);
    let damaged = cell.dir.path().join("damaged.snap");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    offline(&["raft", "snapshot", "inspect", text(&damaged)], 1);
    // What was timed left nothing: the audit ends where the last change ended.
    cell.json(&all, &perf);
    let file_after = cell.dir.path().join("after.snap");
    let after = cell.json(&all, &["raft", "snapshot", "save", text(&file_after)]);
    assert_eq!(after["state_hash"], saved["state_hash"]);
    assert!(after["index"].as_u64() > saved["index"].as_u64());

    // The whole cell is lost; one node begins anew from the backup.
    cell.kill(lost);
    let third = cell.write(&all, 13);
    assert!(third > second, "the others went on");
    for name in all.into_iter().filter(|name| *name != lost) {
        cell.kill(name);
    }
    let (disk, r1) = (cell.disk("r1"), cell.address("r1"));
    let restore = [
        "raft",
        "snapshot",
        "restore",
        text(&file),
        "--data-dir",
        text(&disk),
        "--name",
        "r1",
        "--address",
        &r1,
    ];
    let restored = offline(&restore, 0);
    assert_ne!(restored["cluster_id"], founded["cluster_id"]);
    assert_eq!(restored["from_cluster_id"], founded["cluster_id"]);
    offline(&restore, 8);
    cell.start("r1");
    let shown = within("the new cluster serves", || {
        let shown = cell.run_as("alice", &["r1"], &["config", "show", "--output", "json"]);
        serde_json::from_slice::<Value>(&shown.stdout).ok()
    });
    assert_eq!(shown, before, "as it was when it was saved");
    let (leader, members) = cell.members(&["r1"]);
    assert_eq!((leader.as_str(), members.len()), ("r1", 1));
    assert!(cell.write(&["r1"], 14) > second);
}
