//! Server processes of a benchmark: their CPU and their end.

use std::process::{Child, Command, Stdio};

/// Processes that end with this value.
pub struct Servers(Vec<Child>);

impl Servers {
    /// Starts them, silent.
    ///
    /// # Panics
    ///
    /// When one cannot be started.
    pub fn start(commands: impl IntoIterator<Item = Command>) -> Self {
        let mut servers = Self(vec![]);
        for mut command in commands {
            let silent = command.stdin(Stdio::null()).stdout(Stdio::null());
            servers.0.push(silent.spawn().expect("it can be started"));
        }
        servers
    }

    /// User and system time of all, since they began.
    #[must_use]
    pub fn cpu_seconds(&self) -> f64 {
        self.0.iter().map(|one| cpu_seconds(one.id())).sum()
    }

    /// Their process ids.
    pub fn pids(&self) -> impl Iterator<Item = u32> {
        self.0.iter().map(Child::id)
    }

    /// Whether one of them has ended by itself.
    pub fn any_ended(&mut self) -> bool {
        self.0
            .iter_mut()
            .any(|one| one.try_wait().is_ok_and(|ended| ended.is_some()))
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

/// User and system time of this process, since it began.
#[must_use]
pub fn own_cpu_seconds() -> f64 {
    cpu_seconds(std::process::id())
}

fn cpu_seconds(pid: u32) -> f64 {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return 0.0;
    };
    // The name before it may have spaces.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Ports that were free a moment ago, of TCP and UDP.
///
/// # Panics
///
/// When the system has none.
#[must_use]
pub fn free_ports<const N: usize>() -> [u16; N] {
    let listen = |()| std::net::TcpListener::bind("127.0.0.1:0").expect("there are ports");
    let listeners = [(); N].map(listen);
    listeners.map(|one| one.local_addr().expect("it has one").port())
}
