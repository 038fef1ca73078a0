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
            .args(["dev", "--listen", listen, "--data-dir"])
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
    let first = Dev::up(dir, &listen, &["--workers", "1"]);
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
    let mut again = Dev::up(dir, &listen, &["--workers", "1", "--restart"]);
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

/// The policy of each pool, as the control plane has it.
fn policies(dir: &Path) -> Vec<String> {
    let output = forebay()
        .args(["config", "show", "--output", "json", "--context"])
        .arg(dir.join("data/context.toml"))
        .output()
        .unwrap();
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    let pools = shown["document"]["pools"].as_array().unwrap().iter();
    pools
        .map(|pool| pool["policy"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_policy_is_a_fact_of_the_fleet_and_engines_are_as_told() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    let listen = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().to_string()
    };
    let stop = |mut dev: Dev| {
        dev.signal(Signal::TERM);
        assert!(dev.0.wait().unwrap().success());
    };
    let engines = [
        "--workers",
        "1",
        "--profile",
        "llama-8b-a100",
        "--engine-kv-tokens",
        "64000",
        "--engine-speed",
        "5",
    ];
    let with = |policy: &'static str| [&engines[..], &["--policy", policy]].concat();
    let first = Dev::up(dir, &listen, &with("round-robin"));
    assert_eq!(policies(dir), ["round-robin"]);
    for process in ["e1", "w1"] {
        let file = dir.join(format!("data/config/{process}.toml"));
        let config = std::fs::read_to_string(file).unwrap();
        for said in ["llama-8b-a100", "64000", "5.0"] {
            assert!(config.contains(said), "{config}");
        }
    }
    stop(first);

    // Without the flag it stays what it is; another one replaces it.
    let again = Dev::up(dir, &listen, &engines);
    assert_eq!(policies(dir), ["round-robin"]);
    stop(again);
    let other = Dev::up(dir, &listen, &with("longest-prefix"));
    assert_eq!(policies(dir), ["longest-prefix"]);
    stop(other);
}

#[test]
fn names_and_numbers_are_checked_before_anything_starts() {
    for (args, said) in [
        (["dev", "--policy", "best"], "least-requests"),
        (["dev", "--profile", "abacus"], "llama-70b-h100-tp4"),
        (["dev", "--engine-speed", "0"], "greater than 0"),
        (["dev", "--engine-kv-tokens", "3"], "at least 16"),
        (["compare", "--policies", "forebay,best"], "bounded-hash"),
        (["compare", "--profile", "abacus"], "llama-8b-a100"),
        (["compare", "--speed", "0"], "greater than 0"),
        (["compare", "no-such-trace", "--jitter"], "agentic-coding"),
        (["replay", "no-such-trace", "--jitter"], "azure-2023-conv"),
    ] {
        let output = forebay().args(args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }
}

#[test]
fn workers_are_registered_in_the_order_of_their_names_and_every_metric_is_documented() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    let listen = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().to_string()
    };
    let fleet = Dev::up(dir, &listen, &["--workers", "3"]);
    let workers = json(dir, "workers");
    let workers = workers["workers"].as_array().unwrap();
    assert_eq!(workers.len(), 3);
    for worker in workers {
        let name = worker["name"].as_str().unwrap();
        let incarnation = worker["incarnation"].as_str().unwrap();
        assert!(incarnation.starts_with(&format!("{name}.")), "{worker}");
    }
    let program = std::fs::read_to_string(dir.join("out")).unwrap();
    let program = program
        .lines()
        .find_map(|line| line.trim().strip_suffix(" status"));
    assert!(Path::new(program.unwrap()).exists(), "{program:?}");

    // Metrics with labels show themselves with their first number.
    let sent = forebay()
        .args(["replay", "--limit", "1", "--target"])
        .arg(format!("http://{listen}"))
        .output()
        .unwrap();
    assert!(sent.status.success());
    let mut page = String::from(METRICS_HEAD);
    for (name, role) in [("b1", "Balancer"), ("w1", "Agent"), ("c1", "Control node")] {
        page += &format!("\n## {role}\n\n| metric | type | labels | what |\n|---|---|---|---|\n");
        page += &metrics(&get(&admin(dir, name), "/metrics"));
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    if std::env::var_os("FOREBAY_WRITE_DOCS").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    assert!(
        std::fs::read_to_string(&file).unwrap_or_default() == page,
        "docs/metrics.md is not what the roles export; write it anew: \
         FOREBAY_WRITE_DOCS=1 cargo test -p forebay --test dev every_metric\n{page}"
    );
    drop(fleet);
}

const METRICS_HEAD: &str = "\
# Metrics

What each role exports on `/metrics` of its admin address (OpenMetrics). The samples of a counter end in
`_total`. Latencies are in milliseconds, counted since the process started: quantiles as gauges, and
`_sum` and `_count`, which only grow. A metric with labels shows itself with its first number. Written by `FOREBAY_WRITE_DOCS=1 cargo test -p forebay --test dev every_metric`; the
test fails when the page differs from a live fleet.
";

/// The address of a process's admin pages.
fn admin(dir: &Path, name: &str) -> String {
    let text = std::fs::read_to_string(dir.join("data/run.json")).unwrap();
    let run: Value = serde_json::from_str(&text).unwrap();
    let mut processes = run["processes"].as_array().unwrap().iter();
    let process = processes.find(|process| process["name"] == name).unwrap();
    process["addresses"]["admin"].as_str().unwrap().to_owned()
}

fn get(address: &str, path: &str) -> String {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A row for each metric of a scrape.
fn metrics(scrape: &str) -> String {
    let mut rows = std::collections::BTreeMap::new();
    for line in scrape.lines() {
        let Some((name, help)) = line
            .strip_prefix("# HELP ")
            .and_then(|line| line.split_once(' '))
        else {
            continue;
        };
        let kind = format!("# TYPE {name} ");
        let kind = scrape.lines().find_map(|line| line.strip_prefix(&kind));
        let sample = scrape.lines().filter_map(|line| line.strip_prefix(name));
        let labels: std::collections::BTreeSet<&str> = sample
            .filter_map(|line| {
                let (suffix, labels) = line.split_once('{')?;
                let labels = labels.split_once('}')?.0;
                (!suffix.contains(' ') && !labels.starts_with("le=")).then(|| {
                    labels
                        .split(',')
                        .filter_map(|label| Some(label.split_once('=')?.0))
                })
            })
            .flatten()
            .collect();
        let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
        let row = format!(
            "| `{name}` | {} | {} | {help} |\n",
            kind.unwrap(),
            labels.join(", ")
        );
        rows.insert(name.to_owned(), row);
    }
    rows.into_values().collect()
}
