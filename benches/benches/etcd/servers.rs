//! Three server processes: their CPU, their syncs, and their end.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::task::JoinHandle;

/// Processes that end with this value.
pub(crate) struct Servers(Vec<Child>);

impl Servers {
    pub(crate) fn start(commands: impl IntoIterator<Item = Command>) -> Self {
        let mut servers = Self(vec![]);
        for mut command in commands {
            let silent = command.stdin(Stdio::null()).stdout(Stdio::null());
            servers.0.push(silent.spawn().unwrap());
        }
        servers
    }

    /// User and system time of all, since they began.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        self.0.iter().map(|one| cpu_seconds(one.id())).sum()
    }

    /// Counts the syncs of all of them for a while; the traced are slower meanwhile.
    pub(crate) fn trace_syncs(&self, span: Duration) -> JoinHandle<u64> {
        let pids = self
            .0
            .iter()
            .flat_map(|one| ["-p".into(), one.id().to_string()]);
        let mut strace = Command::new("timeout");
        strace
            .args(["--signal", "INT", &span.as_secs().to_string(), "strace"])
            .args(["-f", "-c", "-e", "trace=fsync,fdatasync,sync_file_range"])
            .args(pids);
        tokio::task::spawn_blocking(move || {
            // After what does not count of a measurement.
            std::thread::sleep(Duration::from_millis(500));
            let Ok(output) = strace.output() else {
                return 0;
            };
            let table = String::from_utf8_lossy(&output.stderr).into_owned();
            let calls = table.lines().filter_map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let (name, counted) = (words.last()?, words.get(3)?);
                name.contains("sync").then(|| counted.parse::<u64>().ok())?
            });
            calls.sum()
        })
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for server in &mut self.0 {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

pub(crate) fn own_cpu_seconds() -> f64 {
    cpu_seconds(std::process::id())
}

fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name before it may have spaces.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Ports that were free a moment ago, of TCP and UDP.
pub(crate) fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|one| one.local_addr().unwrap().port())
}
