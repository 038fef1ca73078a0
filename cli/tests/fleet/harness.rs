//! `forebay dev` in a directory of its own, and hands to kill and restart what it runs.

use std::collections::BTreeMap;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

/// One fleet at a time: they share two cores, and their timings are part of what is claimed.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A request every few milliseconds, so that failures have victims.
pub const FAST_ENGINE: [&str; 2] = ["--engine-speed", "10"];

/// One process of the fleet, from `run.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Process {
    pub role: String,
    pub name: String,
    pub pid: i32,
    pub running: bool,
    pub addresses: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Run {
    processes: Vec<Process>,
}

/// A running fleet; ends with its value.
pub struct Fleet {
    pub dir: tempfile::TempDir,
    pub url: String,
    supervisor: Child,
    _alone: Option<MutexGuard<'static, ()>>,
}

/// Waits until no other fleet runs, and keeps others from starting.
pub fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub fn forebay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.env_remove("FOREBAY_CONTEXT").stdin(Stdio::null());
    command
}

/// The first of `n` consecutive free ports, below those that systems give out: a process that is down
/// must find its own free when it returns.
fn free_ports(n: u16) -> u16 {
    let mut firsts = std::iter::repeat_with(|| rand::random_range(10_000..32_000_u16));
    let free = |port| {
        TcpListener::bind(("127.0.0.1", port)).is_ok()
            && UdpSocket::bind(("127.0.0.1", port)).is_ok()
    };
    firsts.find(|first| (*first..first + n).all(free)).unwrap()
}

/// Looks again until there is something, or fails.
pub fn within<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Fleet {
    /// Starts `forebay dev` with these arguments and waits until it serves.
    pub fn start(args: &[&str]) -> Self {
        Self::start_holding(Some(alone()), args)
    }

    /// Starts one more beside a fleet that holds the machine, to compare the two.
    pub fn start_beside(_other: &Self, args: &[&str]) -> Self {
        Self::start_holding(None, args)
    }

    fn start_holding(alone: Option<MutexGuard<'static, ()>>, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listen = format!("127.0.0.1:{}", free_ports(4));
        let supervisor = Self::spawn(dir.path(), &listen, args);
        let mut fleet = Self {
            dir,
            url: format!("http://{listen}"),
            supervisor,
            _alone: alone,
        };
        fleet.wait_until_ready();
        fleet
    }

    fn spawn(dir: &Path, listen: &str, args: &[&str]) -> Child {
        let log = std::fs::File::create(dir.join("dev.log")).unwrap();
        forebay()
            .args(["dev", "--listen", listen, "--data-dir"])
            .arg(dir.join("data"))
            .args(args)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn wait_until_ready(&mut self) {
        let began = Instant::now();
        loop {
            if let Some(status) = self.supervisor.try_wait().unwrap() {
                panic!("dev ended with {status}:\n{}", self.dev_log());
            }
            if self.dev_log().contains("FOREBAY_CONTEXT=") {
                return;
            }
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "not ready:\n{}",
                self.dev_log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn dev_log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("dev.log")).unwrap_or_default()
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn processes(&self) -> Vec<Process> {
        let text = std::fs::read_to_string(self.data().join("run.json")).unwrap();
        serde_json::from_str::<Run>(&text).unwrap().processes
    }

    pub fn process(&self, name: &str) -> Process {
        let found = self
            .processes()
            .into_iter()
            .find(|process| process.name == name);
        found.unwrap_or_else(|| panic!("no process {name}"))
    }

    pub fn of_role(&self, role: &str) -> Vec<Process> {
        self.processes()
            .into_iter()
            .filter(|process| process.role == role)
            .collect()
    }

    /// Base URL of a process's admin side.
    pub fn admin(&self, name: &str) -> String {
        format!("http://{}", self.process(name).addresses["admin"])
    }

    /// kill -9, and waits until it is gone.
    pub fn kill(&self, name: &str) {
        let pid = Pid::from_raw(self.process(name).pid).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        within(Duration::from_secs(5), "gone after kill -9", || {
            (!self.process(name).running).then_some(())
        });
    }

    /// Has the supervisor start these again, and waits for their new pids.
    pub fn start_again(&self, names: &[&str]) {
        let before: Vec<Process> = names.iter().map(|name| self.process(name)).collect();
        let data = self.data();
        let output = forebay()
            .args(["dev", "start"])
            .args(names)
            .arg("--data-dir")
            .arg(data)
            .output();
        let output = output.unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        within(Duration::from_secs(10), "started again", || {
            before
                .iter()
                .all(|old| self.process(&old.name).pid != old.pid)
                .then_some(())
        });
    }

    /// Runs a verb in this fleet's context.
    pub fn run(&self, args: &[&str]) -> Output {
        let context = self.data().join("context.toml");
        forebay()
            .current_dir(self.dir.path())
            .args(args)
            .env("FOREBAY_CONTEXT", context)
            .output()
            .unwrap()
    }

    /// Runs a verb with `--output json`.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let output = self.run(&[args, &["--output", "json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            let stderr = String::from_utf8_lossy(&output.stderr);
            panic!(
                "{args:?}: {error}; exit {:?}, stderr: {stderr}",
                output.status.code()
            )
        })
    }

    /// Waits until `n` control nodes take part, one leads, and all have applied what it has.
    pub fn wait_for_control(&self, n: usize) -> String {
        within(Duration::from_secs(20), "control plane whole", || {
            let members = self.json(&["members"]);
            let members = members["members"].as_array()?.clone();
            let reachable: Vec<_> = members
                .iter()
                .filter(|member| member["reachable"] == true)
                .collect();
            let leader = reachable.iter().find(|member| member["leader"] == true)?;
            let applied = leader["applied"].as_u64()?;
            let level = reachable
                .iter()
                .filter(|member| member["applied"].as_u64() >= Some(applied));
            (level.count() == n).then(|| leader["name"].as_str().unwrap().to_owned())
        })
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if let Some(keep) = std::env::var_os("FOREBAY_TEST_KEEP_LOGS") {
            let keep = PathBuf::from(keep);
            let _ = std::fs::create_dir_all(&keep);
            for entry in std::fs::read_dir(self.data().join("logs"))
                .into_iter()
                .flatten()
                .flatten()
            {
                let _ = std::fs::copy(entry.path(), keep.join(entry.file_name()));
            }
        }
        if std::thread::panicking() {
            eprintln!("---- dev.log\n{}", self.dev_log());
            for entry in std::fs::read_dir(self.data().join("logs"))
                .into_iter()
                .flatten()
                .flatten()
            {
                let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                let tail = lines[lines.len().saturating_sub(30)..].join("\n");
                eprintln!("---- {}\n{tail}", entry.path().display());
            }
        }
        let supervisor = i32::try_from(self.supervisor.id()).unwrap();
        let _ = kill_process(Pid::from_raw(supervisor).unwrap(), Signal::TERM);
        let began = Instant::now();
        while self
            .supervisor
            .try_wait()
            .is_ok_and(|status| status.is_none())
        {
            if began.elapsed() > Duration::from_secs(15) {
                let _ = self.supervisor.kill();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// GET over plain HTTP/1.1: status and body.
pub fn get(url: &str) -> (u16, String) {
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let request = format!("GET /{path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    send(host, request.as_bytes())
}

/// POST of a JSON body.
pub fn post(url: &str, body: &str) -> (u16, String) {
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    let length = body.len();
    let request = format!(
        "POST /{path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer any\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    );
    send(host, request.as_bytes())
}

/// Sends raw bytes and reads to the end: status and what follows the head.
pub fn send(host: &str, request: &[u8]) -> (u16, String) {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(host).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    // The answer may come before all is sent, and the connection be closed.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or(0);
    let body = answer
        .split_once("\r\n\r\n")
        .map_or("", |(_, body)| body)
        .to_owned();
    (status, body)
}

/// A value from a metrics page, summed over its labels.
pub fn metric(admin: &str, name: &str) -> f64 {
    let (status, page) = get(&format!("{admin}/metrics"));
    assert_eq!(status, 200);
    let lines = page.lines().filter(|line| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with([' ', '{']))
    });
    lines
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}
