//! What does a write that is agreed on cost, beside etcd?
//!
//! Three control nodes and three etcd members on loopback, release builds, mutual TLS between members
//! and to clients, disks on one file system. Each client has a connection of its own to the leader and
//! waits for each acknowledgement before it writes again: a value of 256 bytes under a key of its own
//! (a `Put`; an agent that declares its worker). The two are measured in alternation, and stand still
//! otherwise. Printed for each number of clients: acknowledged writes a second, latency, CPU of the
//! servers a write, and the ratios Forebay ÷ etcd, as the median over the rounds. At last both are
//! traced for a moment, so that it is seen how often they sync their disks.
//!
//! etcd is spoken to by gRPC on hyper's HTTP/2, one unary call a write, with nothing between; the
//! client of Forebay is its own, which follows the leader and hedges.
//!
//! ```text
//! cargo build --release -p forebay
//! cargo bench -p forebay-benches --bench etcd -- --help
//! ```

// Its result; and a run that cannot go on says so.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::panic)]

mod etcd;
mod forebay;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use hdrhistogram::Histogram;

use forebay_benches::servers::{Servers, own_cpu_seconds};
use tokio::task::JoinHandle;

const NAMES: [&str; 2] = ["forebay", "etcd"];
/// Of what a write stores.
const VALUE_BYTES: usize = 256;

/// Agreed writes of Forebay and of etcd in alternation, with what they cost.
#[derive(Parser)]
struct Args {
    /// Clients at once.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64")]
    clients: Vec<usize>,
    /// How often each of the two is measured with each number of clients.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of one measurement; half a second before it does not count.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Seconds of the trace of syncs; 0 leaves it out.
    #[arg(long, default_value_t = 4)]
    trace: u64,
    /// Where the disks are, so that a sync is one. Default: beside this program.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// What runs the control nodes. Default: `forebay` in the folder above this program's.
    #[arg(long)]
    forebay: Option<PathBuf>,
    /// Connections that the clients of etcd share; default: one for each, as Forebay's have.
    #[arg(long)]
    etcd_connections: Option<usize>,
    /// etcd.
    #[arg(long, default_value = "etcd")]
    etcd: PathBuf,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One who writes and waits.
enum Writer {
    Forebay(Box<forebay::Agent>),
    Etcd(etcd::Client),
}

impl Writer {
    async fn write(&mut self) {
        match self {
            Self::Forebay(agent) => agent.write().await,
            Self::Etcd(client) => client.write().await,
        }
    }
}

/// What was seen of one of the two in a while.
#[derive(Clone, Copy)]
struct Measured {
    writes: u64,
    seconds: f64,
    p50_us: u64,
    p99_us: u64,
    cpu_seconds: f64,
    client_cpu_seconds: f64,
}

impl Measured {
    fn rate(&self) -> f64 {
        self.writes as f64 / self.seconds
    }

    fn cpu_us(&self) -> f64 {
        self.cpu_seconds / self.writes as f64 * 1e6
    }

    fn client_cpu_us(&self) -> f64 {
        self.client_cpu_seconds / self.writes as f64 * 1e6
    }
}

fn main() {
    let args = Args::parse();
    let beside = std::env::current_exe().unwrap();
    let beside = beside.parent().unwrap().to_owned();
    let program = args.forebay.clone();
    let program = program.unwrap_or_else(|| beside.join("../forebay"));
    if !program.exists() {
        return println!(
            "skipped: no {}; cargo build --release -p forebay",
            program.display()
        );
    }
    let version = std::process::Command::new(&args.etcd)
        .arg("--version")
        .output();
    let Ok(version) = version else {
        return println!("skipped: there is no etcd here; Debian has it as etcd-server");
    };
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    println!("{}", version.lines().next().unwrap_or_default());

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let dir = args.dir.clone().unwrap_or(beside);
    let dir = tempfile::tempdir_in(dir).unwrap();
    runtime.block_on(compare(&args, &program, dir.path()));
}

async fn compare(args: &Args, program: &std::path::Path, dir: &std::path::Path) {
    let most = args.clients.iter().copied().max().unwrap_or(1);
    let connections = args.etcd_connections.unwrap_or(most);
    let (nodes, agents) = forebay::start(program, dir, most).await;
    let (members, clients) = etcd::start(&args.etcd, dir, (most, connections)).await;
    let agents = agents
        .into_iter()
        .map(|agent| Writer::Forebay(agent.into()));
    let mut sides = [
        (nodes, agents.collect::<Vec<_>>()),
        (members, clients.into_iter().map(Writer::Etcd).collect()),
    ];
    println!("clients  who      writes/s   p50 ms   p99 ms  servers' CPU us/write  client's");
    for count in &args.clients {
        let mut rounds = vec![];
        for round in 0..args.rounds {
            let mut both = [None, None];
            // Who is first takes turns, too.
            for side in [round % 2, 1 - round % 2] {
                let (servers, writers) = &mut sides[side];
                both[side] = Some(measure(servers, writers, *count, args.seconds).await);
            }
            rounds.push(both.map(Option::unwrap));
        }
        report(*count, &rounds);
    }
    if args.trace == 0 {
        return;
    }
    for count in &args.clients {
        for ((servers, writers), name) in sides.iter_mut().zip(NAMES) {
            let trace = trace_syncs(servers, Duration::from_secs(args.trace));
            let seen = measure(servers, writers, *count, args.trace).await;
            // Begun and ended at almost the same moments: both as counts a second.
            let syncs = trace.await.unwrap() as f64 / args.trace as f64;
            println!(
                "{count:>7}  {name:<7} traced: {syncs:.0} syncs/s of 3 disks, {:.0} writes/s: {:.2} a write",
                seen.rate(),
                syncs / seen.rate()
            );
        }
    }
}

/// Has so many clients write for a while.
async fn measure(
    servers: &Servers,
    writers: &mut Vec<Writer>,
    count: usize,
    seconds: u64,
) -> Measured {
    let begins = Instant::now() + Duration::from_millis(500);
    let ends = begins + Duration::from_secs(seconds);
    let idle = writers.split_off(count);
    let tasks = writers.drain(..).map(|mut writer| {
        tokio::spawn(async move {
            let mut latencies = Histogram::<u64>::new(3).unwrap();
            loop {
                let called = Instant::now();
                if called >= ends {
                    return (writer, latencies);
                }
                writer.write().await;
                let done = Instant::now();
                if done >= begins && done < ends {
                    let us = (done - called).as_micros().try_into().unwrap();
                    latencies.record(us).unwrap();
                }
            }
        })
    });
    let tasks: Vec<_> = tasks.collect();
    tokio::time::sleep_until(begins.into()).await;
    let before = (servers.cpu_seconds(), own_cpu_seconds());
    tokio::time::sleep_until(ends.into()).await;
    let after = (servers.cpu_seconds(), own_cpu_seconds());
    let mut latencies = Histogram::<u64>::new(3).unwrap();
    for task in tasks {
        let (writer, own) = task.await.unwrap();
        writers.push(writer);
        latencies.add(own).unwrap();
    }
    writers.extend(idle);
    Measured {
        writes: latencies.len(),
        seconds: seconds as f64,
        p50_us: latencies.value_at_quantile(0.5),
        p99_us: latencies.value_at_quantile(0.99),
        cpu_seconds: after.0 - before.0,
        client_cpu_seconds: after.1 - before.1,
    }
}

/// Counts the syncs of all of them for a while; the traced are slower meanwhile.
fn trace_syncs(servers: &Servers, span: Duration) -> JoinHandle<u64> {
    let pids = servers.pids();
    let pids: Vec<String> = pids
        .flat_map(|pid| ["-p".into(), pid.to_string()])
        .collect();
    let mut strace = std::process::Command::new("timeout");
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

fn report(clients: usize, rounds: &[[Measured; 2]]) {
    for (side, name) in NAMES.iter().enumerate() {
        let middle = |of: &dyn Fn(&Measured) -> f64| median(rounds.iter().map(|r| of(&r[side])));
        println!(
            "{clients:>7}  {name:<7} {:>9.0} {:>8.2} {:>8.2} {:>22.0} {:>9.0}",
            middle(&Measured::rate),
            middle(&|one| one.p50_us as f64 / 1e3),
            middle(&|one| one.p99_us as f64 / 1e3),
            middle(&Measured::cpu_us),
            middle(&Measured::client_cpu_us),
        );
    }
    let ratio = |of: &dyn Fn(&Measured) -> f64| {
        let ratios: Vec<f64> = rounds.iter().map(|[a, b]| of(a) / of(b)).collect();
        let least = ratios.iter().copied().fold(f64::MAX, f64::min);
        let most = ratios.iter().copied().fold(0.0, f64::max);
        format!("{:.2} ({least:.2} to {most:.2})", median(ratios))
    };
    println!(
        "         ratio    writes/s {}; p50 {}; p99 {}; CPU a write {}",
        ratio(&Measured::rate),
        ratio(&|one| one.p50_us as f64),
        ratio(&|one| one.p99_us as f64),
        ratio(&Measured::cpu_us),
    );
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
