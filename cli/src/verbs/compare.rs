//! `forebay compare`: the same trace through a fresh fleet for each placement policy.
//!
//! Each fleet is a `forebay dev` of this very binary in a temporary directory: real processes, real
//! QUIC, emulated engines. Arrivals and engines are sped up alike, and times are told in the trace's.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use clap::Args;
use forebay_proto::config::POLICIES;
use forebay_scheduler::model::PROFILES;
use forebay_sim::replay::{self, ErrorCount, Percentiles, Report};
use forebay_sim::trace::{Options, Trace};
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::replay::{Lines, Shown, TraceArgs, ms};
use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, say, table};

/// Options of `forebay compare`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay compare\n  forebay compare agentic-coding --policies forebay,longest-prefix --limit 100\n  forebay compare trace.jsonl.gz --policies forebay,least-requests,round-robin --limit 1500 --output json\n\nEach policy gets a fleet of its own (`forebay dev` in a temporary directory) with cold caches, and the same requests at the same moments. Arrivals and engines are --speed times faster than recorded; times are multiplied by it again, so that they read as on the real servers. Run it from a release build on a quiet machine: when the send lag is 50 ms or more, the generator was late and the figures mean little.\n\nExits with 1 when a request had an error."
)]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    trace: TraceArgs,
    /// The policies, in the order of the table.
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "forebay,least-requests,round-robin",
        value_parser = POLICIES
    )]
    policies: Vec<String>,
    /// Workers of each fleet.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: u16,
    /// Balancers of each fleet; requests take turns.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    balancers: u16,
    /// How many times faster than recorded, arrivals and engines alike.
    #[arg(long, value_name = "X", default_value_t = 10.0, value_parser = super::replay::speed)]
    speed: f64,
    /// The server whose latency the engines have.
    #[arg(
        long,
        value_name = "NAME",
        default_value = PROFILES[0].0,
        value_parser = crate::roles::engine::profile_name
    )]
    profile: String,
    /// Tokens that the KV cache of one engine holds.
    #[arg(long, value_name = "TOKENS", default_value_t = 3_000_000, value_parser = crate::dev::kv_tokens)]
    engine_kv_tokens: u64,
    /// Write a file POLICY.jsonl for each policy, with a line for each request. Times are those of the
    /// clock, not of the trace.
    #[arg(long, value_name = "DIR")]
    per_request: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Compared {
    schema_version: u32,
    trace: String,
    speed: f64,
    workers: u16,
    balancers: u16,
    profile: String,
    engine_kv_tokens: u64,
    policies: BTreeMap<String, Measured>,
}

/// One policy. Times are the trace's, but for the lag.
#[derive(Serialize)]
struct Measured {
    requests: u64,
    errors: u64,
    errors_by: Vec<ErrorCount>,
    ttft_ms: Percentiles,
    tpot_ms: Percentiles,
    e2e_ms: Percentiles,
    cached_token_ratio: Option<f64>,
    /// Of requests a worker.
    max_over_mean: Option<f64>,
    workers: BTreeMap<String, u64>,
    send_lag_ms: replay::Lag,
}

/// Runs `forebay compare`.
pub(crate) fn run(args: &CompareArgs) -> Result<(), CliError> {
    let config = args.trace.config()?;
    if let Some(dir) = &args.per_request {
        std::fs::create_dir_all(dir).map_err(|error| CliError::File {
            path: dir.clone(),
            error,
        })?;
    }
    let mut policies: Vec<&String> = Vec::new();
    for policy in &args.policies {
        if !policies.contains(&policy) {
            policies.push(policy);
        }
    }
    let mut compared = Compared {
        schema_version: 1,
        trace: args.trace.name(),
        speed: args.speed,
        workers: args.workers,
        balancers: args.balancers,
        profile: args.profile.clone(),
        engine_kv_tokens: args.engine_kv_tokens,
        policies: BTreeMap::new(),
    };
    crate::roles::threads()?.block_on(async {
        let mut stop = std::pin::pin!(crate::roles::asked_to_stop()?);
        for (at, policy) in (1..).zip(&policies) {
            say(&format!(
                "{policy} ({at} of {}): starting a fleet",
                policies.len()
            ));
            let mut fleet = Fleet::spawn(args, policy)?;
            let measured = tokio::select! {
                measured = measure(args, policy, config.clone(), &mut fleet) => measured,
                () = &mut stop => Err(CliError::because(
                    Exit::Failed,
                    "stopped before all was compared",
                )),
            };
            fleet.stop().await;
            compared.policies.insert((*policy).clone(), measured?);
        }
        Ok::<(), CliError>(())
    })?;
    args.output.print(&compared, || page(&compared, &policies));
    warn_of_lag(&compared);
    let errors: u64 = compared.policies.values().map(|result| result.errors).sum();
    if errors > 0 {
        return Err(CliError::because(
            Exit::Failed,
            format!("{errors} requests had errors"),
        ));
    }
    Ok(())
}

async fn measure(
    args: &CompareArgs,
    policy: &str,
    config: replay::Config,
    fleet: &mut Fleet,
) -> Result<Measured, CliError> {
    fleet.up().await?;
    let targets = fleet.targets.clone();
    warm_up(&targets).await?;
    let config = replay::Config {
        targets,
        speed: args.speed,
        ..config
    };
    let path = args.per_request.as_ref();
    let path = path.map(|dir| dir.join(format!("{policy}.jsonl")));
    let mut lines = path.as_deref().map(Lines::create).transpose()?;
    let mut shown = Shown::new();
    let replayed = replay::run_each(
        config,
        |progress| shown.update(progress),
        |request| {
            if let Some(lines) = &mut lines {
                lines.write(&request);
            }
        },
    )
    .await;
    shown.clear();
    let report = replayed?;
    if let Some(lines) = lines {
        lines.finish()?;
    }
    Ok(Measured::of(report, args.speed))
}

/// A few short requests: connections stand, and the fleet's facts have arrived everywhere.
async fn warm_up(targets: &[String]) -> Result<(), CliError> {
    let line = "{\"timestamp\":0,\"input_length\":8,\"output_length\":1}\n";
    let trace = Trace::from_bytes(
        line.repeat(2 * targets.len()).as_bytes(),
        Options::default(),
    )?;
    let config = replay::Config {
        targets: targets.to_vec(),
        ..replay::Config::new(trace, String::new())
    };
    tokio::time::sleep(SETTLE).await;
    let report = replay::run(config, |_| {}).await?;
    match report.errors_by.first() {
        None => Ok(()),
        Some(error) => Err(CliError::because(
            Exit::Failed,
            format!("the fleet does not answer: {}", error.code),
        )),
    }
}

impl Measured {
    fn of(report: Report, speed: f64) -> Self {
        let scaled = |p: Percentiles| {
            let times = |ms: Option<f64>| ms.map(|ms| ms * speed);
            Percentiles {
                mean: times(p.mean),
                p50: times(p.p50),
                p90: times(p.p90),
                p99: times(p.p99),
            }
        };
        let most = report.workers.values().max().copied();
        let all: u64 = report.workers.values().sum();
        let mean = all as f64 / report.workers.len() as f64;
        Self {
            requests: report.requests,
            errors: report.errors,
            errors_by: report.errors_by,
            ttft_ms: scaled(report.ttft_ms),
            tpot_ms: scaled(report.tpot_ms),
            e2e_ms: scaled(report.e2e_ms),
            cached_token_ratio: report.cached_token_ratio,
            max_over_mean: most.map(|most| most as f64 / mean),
            workers: report.workers,
            send_lag_ms: report.send_lag_ms,
        }
    }
}

fn page(compared: &Compared, order: &[&String]) -> String {
    let rows = order.iter().filter_map(|policy| {
        let result = compared.policies.get(*policy)?;
        let percent = |ratio: f64| format!("{:.1} %", ratio * 100.0);
        Some([
            (*policy).clone(),
            result.requests.to_string(),
            result.errors.to_string(),
            ms(result.ttft_ms.p50),
            ms(result.ttft_ms.p90),
            ms(result.ttft_ms.p99),
            ms(result.tpot_ms.p50),
            ms(result.tpot_ms.p99),
            result.cached_token_ratio.map_or_else(String::new, percent),
            result
                .max_over_mean
                .map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            ms(result.send_lag_ms.p99),
        ])
    });
    let Compared {
        trace,
        speed,
        workers,
        balancers,
        profile,
        ..
    } = compared;
    let head = format!(
        "{trace} on {workers} workers ({profile}) and {balancers} balancers; milliseconds of the trace, run {speed} times as fast\n\n"
    );
    head + &table(
        [
            "POLICY",
            "REQUESTS",
            "ERRORS",
            "TTFT P50",
            "P90",
            "P99",
            "TPOT P50",
            "P99",
            "CACHED",
            "MAX/MEAN",
            "SEND LAG P99",
        ],
        rows,
    )
}

fn warn_of_lag(compared: &Compared) {
    for (policy, result) in &compared.policies {
        if let Some(lag) = result.send_lag_ms.p99.filter(|lag| *lag >= MOST_LAG_MS) {
            say(&format!(
                "warning: {policy}: the load generator was late (p99 {lag:.0} ms): the figures are not valid; use a release build, a quieter machine or a lower --speed"
            ));
        }
    }
}

/// A `forebay dev` of its own, which takes its processes with it; killed if it is dropped unstopped.
struct Fleet {
    child: Child,
    targets: Vec<String>,
    log: PathBuf,
    /// Removed with everything in it.
    dir: tempfile::TempDir,
}

impl Fleet {
    fn spawn(args: &CompareArgs, policy: &str) -> Result<Self, CliError> {
        let failed = |what: String| CliError::because(Exit::Failed, what);
        let dir = tempfile::tempdir()
            .map_err(|error| failed(format!("cannot make a temporary directory: {error}")))?;
        let log = dir.path().join("dev.log");
        let file = std::fs::File::create(&log).map_err(|error| CliError::File {
            path: log.clone(),
            error,
        })?;
        let program = std::env::current_exe()
            .map_err(|error| failed(format!("cannot find this program: {error}")))?;
        let listen = free_ports(args.balancers)?;
        let child = Command::new(program)
            .arg("dev")
            .args(["--policy", policy])
            .args(["--listen", &listen.to_string()])
            .args(["--workers", &args.workers.to_string()])
            .args(["--balancers", &args.balancers.to_string()])
            .args(["--profile", &args.profile])
            .args(["--engine-speed", &args.speed.to_string()])
            .args(["--engine-kv-tokens", &args.engine_kv_tokens.to_string()])
            // However late its first byte is, an answer names its worker.
            .args(["--hold-headers-ms", &HOLD_HEADERS_MS.to_string()])
            .arg("--data-dir")
            .arg(dir.path().join("fleet"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| failed(format!("cannot start the fleet: {error}")))?;
        let ports = (0..args.balancers).map(|n| listen.port() + n);
        Ok(Self {
            child,
            targets: ports
                .map(|port| format!("http://127.0.0.1:{port}"))
                .collect(),
            log,
            dir,
        })
    }

    /// Waits for the hints that `dev` prints once the fleet serves.
    async fn up(&mut self) -> Result<(), CliError> {
        let stdout = self.child.stdout.as_mut();
        let stdout = stdout.expect("it is piped, and taken by the stop only");
        let mut byte = [0];
        let (exit, what) = match timeout(UP_WITHIN, stdout.read(&mut byte)).await {
            Ok(Ok(1)) => return Ok(()),
            Ok(_) => (Exit::Failed, "the fleet ended before it served".to_owned()),
            Err(_) => {
                let seconds = UP_WITHIN.as_secs();
                let what = format!("the fleet did not serve within {seconds} s");
                (Exit::TimedOut, what)
            }
        };
        let said = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        let last = &lines[lines.len().saturating_sub(LINES_SHOWN)..];
        let problem = format!("{what}; it says:\n{}", last.join("\n"));
        Err(CliError::because(exit, problem))
    }

    async fn stop(mut self) {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok());
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            // Gone already is as good.
            let _ = kill_process(pid, Signal::TERM);
        }
        // Its pipe must not fill up meanwhile.
        let stdout = self.child.stdout.take();
        let reading = async {
            if let Some(mut stdout) = stdout {
                let _ = stdout.read_to_end(&mut Vec::new()).await;
            }
            self.child.wait().await
        };
        if timeout(DOWN_WITHIN, reading).await.is_err() {
            say("the fleet did not stop in time and is killed");
        }
        drop(self.dir);
    }
}

/// The first of so many consecutive free ports on loopback, below those that systems give out.
fn free_ports(count: u16) -> Result<SocketAddr, CliError> {
    for _ in 0..100 {
        let first = rand::random_range(10_000..32_000_u16);
        let at = |n| SocketAddr::from((Ipv4Addr::LOCALHOST, first + n));
        let taken: Result<Vec<_>, _> = (0..count).map(|n| TcpListener::bind(at(n))).collect();
        if taken.is_ok() {
            return Ok(at(0));
        }
    }
    let problem = format!("no {count} consecutive ports are free");
    Err(CliError::because(Exit::Failed, problem))
}

const HOLD_HEADERS_MS: u32 = 600_000;
const UP_WITHIN: Duration = Duration::from_secs(120);
const DOWN_WITHIN: Duration = Duration::from_secs(40);
const LINES_SHOWN: usize = 8;
const SETTLE: Duration = Duration::from_secs(1);
const MOST_LAG_MS: f64 = 50.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_consecutive_and_free() {
        let first = free_ports(3).unwrap();
        for n in 0..3 {
            assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, first.port() + n)).is_ok());
        }
    }
}
