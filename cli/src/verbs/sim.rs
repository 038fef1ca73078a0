//! `forebay sim`: the simulators.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use forebay_sim::faults::{self, Failure, Request, Summary};
use serde::Serialize;

use crate::exit::{CliError, Exit};
use crate::output::{self, OutputArgs};

mod bugs;
mod fleet;

/// Options of `forebay sim`.
#[derive(Debug, Args)]
pub(crate) struct SimArgs {
    #[command(subcommand)]
    verb: SimVerb,
}

#[derive(Debug, Subcommand)]
enum SimVerb {
    /// Run the control plane in virtual time under faults, and check that it keeps its promises.
    #[command(
        after_help = "Examples:\n  forebay sim faults --seeds 100\n  forebay sim faults --minutes 3 --output json\n  forebay sim faults --seed 104            # the same world again, bit for bit"
    )]
    Faults(FaultsArgs),
    /// Place a real trace's requests on a fleet in virtual time, by several rules, and compare.
    #[command(
        after_help = "Examples:\n  forebay sim fleet\n  forebay sim fleet --search --policies forebay,mooncake,least-requests --seeds 5\n  forebay sim fleet --trace trace.jsonl.gz --workers 32 --rate 2x --output json\n  forebay sim fleet --rate 1.5x --fail crash:3@120+60 --fail slow:1@0*0.5\n\n\"AT 90 %\" is the highest rate at which 90 % of all offered requests keep both targets, over the fluid bound: what the fleet could serve if it had one cache and work were water."
    )]
    Fleet(Box<fleet::FleetArgs>),
}

#[derive(Debug, Args)]
struct FaultsArgs {
    /// The first seed.
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    /// How many seeds, one after the other. Default: one, or any number with --minutes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// Begin no world after so many minutes.
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u64).range(1..=1440))]
    minutes: Option<u64>,
    /// Control nodes at the start of each world. Default: as the seed draws.
    #[arg(long, value_name = "N", value_parser = ["3", "5"])]
    nodes: Option<String>,
    /// Put a known bug back first, and count the seeds that catch it (50 unless told otherwise): one
    /// of those that a wrong name lists, or all. Only in builds with the feature "bugs".
    #[arg(long, value_name = "NAME", conflicts_with = "minutes")]
    bug: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Report {
    schema_version: u32,
    #[serde(flatten)]
    summary: Summary,
    /// Simulated time over the time that it took.
    speedup: f64,
    violations: usize,
    failures: Vec<Failure>,
}

type Ended = BTreeMap<u64, Result<Summary, Box<Failure>>>;

/// Runs the verb.
pub(crate) fn run(args: &SimArgs) -> Result<(), CliError> {
    match &args.verb {
        SimVerb::Faults(args) => run_faults(args),
        SimVerb::Fleet(args) => fleet::run(args),
    }
}

fn run_faults(args: &FaultsArgs) -> Result<(), CliError> {
    if let Some(bug) = &args.bug {
        return bugs::run(args, bug);
    }
    let began = Instant::now();
    let ended = worlds(args, began);
    let mut summary = Summary::default();
    let mut failures = Vec::new();
    for world in ended.into_values() {
        match world {
            Ok(world) => summary.add(world),
            Err(failure) => failures.push(*failure),
        }
    }
    let report = Report {
        schema_version: 1,
        speedup: summary.simulated_hours * 3_600.0 / began.elapsed().as_secs_f64(),
        violations: failures.len(),
        summary,
        failures,
    };
    args.output.print(&report, || table(&report));
    match report.failures.first() {
        None => Ok(()),
        Some(failure) => {
            let again = format!("forebay sim faults --seed {}", failure.seed);
            let message = format!("{} worlds broke a promise; {again}", report.violations);
            Err(CliError::because(Exit::Failed, message))
        }
    }
}

impl FaultsArgs {
    fn world(&self, seed: u64) -> Request {
        Request {
            seed,
            nodes: self.nodes.as_ref().and_then(|nodes| nodes.parse().ok()),
            bug: None,
        }
    }
}

/// Runs worlds on all cores; each has its seed alone.
fn worlds(args: &FaultsArgs, began: Instant) -> Ended {
    let next = AtomicU64::new(args.seed);
    let count = args.seeds.or(args.minutes.is_none().then_some(1));
    let end = count.map_or(u64::MAX, |count| args.seed.saturating_add(count));
    let stop = args
        .minutes
        .map(|minutes| Duration::from_secs(60 * minutes));
    let (ended, said) = (Mutex::new(Ended::new()), Mutex::new(began));
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while stop.is_none_or(|stop| began.elapsed() < stop) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        break;
                    }
                    let world = faults::run(args.world(seed));
                    if let Err(failure) = &world {
                        output::say(&format!("seed {seed}: {}", failure.violation));
                    }
                    let mut ended = ended.lock().expect("no thread panics with the lock");
                    ended.insert(seed, world);
                    progress(&said, &ended, count);
                }
            });
        }
    });
    ended.into_inner().expect("no thread panics with the lock")
}

fn progress(said: &Mutex<Instant>, ended: &Ended, count: Option<u64>) {
    let mut said = said.lock().expect("no thread panics with the lock");
    if said.elapsed() >= Duration::from_secs(5) {
        *said = Instant::now();
        let of = count.map_or(String::new(), |count| format!("/{count}"));
        output::say(&format!("{}{of} worlds", ended.len()));
    }
}

fn table(report: &Report) -> String {
    let summary = &report.summary;
    let row = |name: &str, value: String| [name.to_owned(), value];
    let faults: u64 = summary.faults_injected.values().sum();
    let mut text = output::table(
        ["", ""],
        [
            row("worlds that held", summary.seeds.to_string()),
            row("broken promises", report.violations.to_string()),
            row("simulated hours", format!("{:.2}", summary.simulated_hours)),
            row("times real time", format!("{:.0}", report.speedup)),
            row("faults", faults.to_string()),
            row("placements", summary.placements.to_string()),
            row("drains", summary.drains.to_string()),
            row("moves", summary.moves.to_string()),
            row("quarantines", summary.quarantines.to_string()),
            row(
                "operations ok/unknown/refused",
                format!(
                    "{}/{}/{}",
                    summary.ops_ok, summary.ops_unknown, summary.ops_failed
                ),
            ),
            row("found linearizable", summary.lin_checked_ops.to_string()),
            row(
                "rare branches",
                format!("{}/{}", summary.probes_hit.len(), summary.probes_total),
            ),
            row("trace", format!("{:016x}", summary.trace_hash)),
        ],
    );
    for failure in &report.failures {
        let faults = serde_json::to_string(&failure.faults).unwrap_or_default();
        text.push_str(&format!(
            "\nseed {} at {} ms: {}\n  with these faults: {faults}\n",
            failure.seed, failure.at_ms, failure.violation
        ));
    }
    text
}
