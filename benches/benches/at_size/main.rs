//! What do reports of load and changes of caches cost, where there are a thousand workers?
//!
//! A thousand agents (the work side of each, on a socket of its own, with a cache that is known), in one
//! process; four balancers that serve as they do, without a control plane, each in a process of its own;
//! one emulated engine behind all agents; and a driver that stands for the other balancers of the cell:
//! what it places changes the caches of all. QUIC with mutual TLS on loopback, release builds.
//!
//! Printed: the time until a balancer knows all caches, memory, and CPU time of each side: with nothing to
//! tell but that all is as it was (reports), and with placements of the driver (deltas). A process's CPU time
//! is the system's count; what the same placements cost the agents without any balancer is taken off. Then
//! what a cell of 1,000 workers, 64 balancers and 20,000 requests a second would make of it: the number of
//! messages from the agents' own cadence (`cadence.rs`), the cost of each as measured.
//!
//! ```text
//! cargo bench -p forebay-benches --bench at_size -- --help
//! ```

// Its result; and a run that cannot go on says so.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

mod cadence;
mod children;
mod parts;

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::Parser;
use forebay_link::Authority;
use forebay_proto::Role;

use crate::children::{Part, number, page};

/// A thousand agents before a few balancers: what reports and deltas cost.
#[derive(Parser)]
struct Args {
    /// Agents.
    #[arg(long, default_value_t = 1_000)]
    agents: u32,
    /// Balancers.
    #[arg(long, default_value_t = 4)]
    balancers: usize,
    /// Chunks in the cache of each agent at the start.
    #[arg(long, default_value_t = 10_000)]
    chunks: u32,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 15)]
    seconds: u64,
    /// Placements a second, each on the next agent.
    #[arg(long, default_value_t = 400)]
    rate: u64,
    /// Chunks of each prompt, in two measurements.
    #[arg(long, value_delimiter = ',', default_value = "4,40")]
    prompt_chunks: Vec<u64>,
    /// Given to the processes of the cell.
    #[arg(long, hide = true)]
    part: Option<String>,
    #[arg(long, hide = true)]
    dir: Option<PathBuf>,
    #[arg(long, hide = true)]
    engine: Option<String>,
    #[arg(long, hide = true, default_value_t = 0)]
    number: usize,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    match &args.part {
        Some(part) => parts::run(part, &args),
        None => measure(&args),
    }
}

const MB: f64 = 1e6;
/// For all balancers to know all caches.
const PATIENCE: Duration = Duration::from_secs(120);

/// CPU seconds of both sides and messages that came to balancers.
#[derive(Clone, Copy, Default)]
struct Count {
    at: f64,
    agents: f64,
    balancers: f64,
    reports: f64,
    deltas: f64,
}

impl Count {
    fn since(self, before: Self) -> Self {
        Self {
            at: self.at - before.at,
            agents: self.agents - before.agents,
            balancers: self.balancers - before.balancers,
            reports: self.reports - before.reports,
            deltas: self.deltas - before.deltas,
        }
    }
}

/// The processes of the cell.
struct Cell {
    began: Instant,
    _engine: Part,
    agents: Part,
    driver: Part,
    /// With their admin addresses.
    balancers: Vec<(Part, String)>,
}

impl Cell {
    fn count(&self) -> Count {
        let pages = self
            .balancers
            .iter()
            .map(|(_, admin)| page(admin, "/metrics").1);
        let pages: Vec<String> = pages.collect();
        let sum = |name: &str| pages.iter().map(|page| number(page, name)).sum::<f64>();
        Count {
            at: self.began.elapsed().as_secs_f64(),
            agents: self.agents.cpu(),
            balancers: self.balancers.iter().map(|(part, _)| part.cpu()).sum(),
            reports: sum("reports_total"),
            deltas: sum("residency_deltas_total"),
        }
    }

    /// What happens while nobody places anything.
    fn still(&self, seconds: u64) -> Count {
        let before = self.count();
        sleep(Duration::from_secs(seconds));
        self.count().since(before)
    }

    /// What happens while the driver places; and how much it placed.
    fn driven(&mut self, args: &Args, chunks: u64) -> (Count, f64) {
        let before = self.count();
        self.driver
            .tell(&format!("{} {} {chunks}", args.rate, args.seconds));
        let said = self.driver.says();
        let (placed, failed) = said.split_once(' ').unwrap();
        println!("  placed {placed} prompts of {chunks} chunks, {failed} failed");
        (self.count().since(before), placed.parse().unwrap())
    }
}

fn measure(args: &Args) {
    let dir = tempfile::tempdir().unwrap();
    issue(dir.path(), args);
    let directory = dir.path().to_str().unwrap();
    let (count, chunks) = (args.agents.to_string(), args.chunks.to_string());
    let began = Instant::now();
    let mut engine = Part::start("engine", &["--dir", directory]);
    let url = engine.says();
    let options = ["--dir", directory, "--agents", &count, "--chunks", &chunks];
    let mut agents = Part::start("agents", &[&options[..], &["--engine", &url]].concat());
    agents.says();
    let mut driver = Part::start("driver", &options);
    driver.says();
    println!(
        "{} agents with {} chunks each serve after {:.1} s; {:.2} MB and {:.2} ms of CPU each",
        args.agents,
        args.chunks,
        began.elapsed().as_secs_f64(),
        agents.memory() / MB / f64::from(args.agents),
        agents.cpu() * 1e3 / f64::from(args.agents),
    );
    let mut cell = Cell {
        began,
        _engine: engine,
        agents,
        driver,
        balancers: Vec::new(),
    };
    let alone = cell.still(args.seconds);
    println!(
        "agents without balancers: {:.2} % of a core",
        100.0 * alone.agents / alone.at
    );
    let placing: Vec<f64> = args
        .prompt_chunks
        .iter()
        .map(|chunks| {
            let (driven, placed) = cell.driven(args, *chunks);
            let of_one = (driven.agents - alone.agents / alone.at * driven.at) / placed;
            println!("  a placement: {:.0} us of an agent", of_one * 1e6);
            of_one
        })
        .collect();
    start_balancers(&mut cell, args, &options);
    let links = f64::from(args.agents) * args.balancers as f64;
    // What was sent while links began is behind.
    sleep(Duration::from_secs(3));
    let still = cell.still(args.seconds);
    let report_there = still.balancers / still.reports;
    let report_here = (still.agents - alone.agents / alone.at * still.at) / still.reports;
    println!(
        "reports only: {:.0} a second and balancer ({:.2} a link); {:.1} us of a balancer each, {:.1} us of an agent; \
         a balancer {:.1} % of a core",
        still.reports / still.at / args.balancers as f64,
        still.reports / still.at / links,
        report_there * 1e6,
        report_here * 1e6,
        100.0 * still.balancers / still.at / args.balancers as f64,
    );
    let mut costs = Vec::new();
    for (chunks, placing) in args.prompt_chunks.iter().zip(placing) {
        let (driven, placed) = cell.driven(args, *chunks);
        let there = (driven.balancers - driven.reports * report_there) / driven.deltas;
        let here =
            driven.agents - alone.agents / alone.at * driven.at - driven.reports * report_here;
        let here = (here - placed * placing) / driven.deltas;
        println!(
            "  {:.0} deltas a second and balancer, {:.1} chunks each; {:.1} us of a balancer each, {:.1} us of an agent",
            driven.deltas / driven.at / args.balancers as f64,
            placed * *chunks as f64 * args.balancers as f64 / driven.deltas,
            there * 1e6,
            here * 1e6,
        );
        costs.push((there, here));
    }
    extrapolate((report_there, report_here), costs[0]);
}

fn issue(dir: &Path, args: &Args) {
    let authority = Authority::create("bench", 1).unwrap();
    authority.save(dir).unwrap();
    let issue = |role, name: String| {
        authority.issue(role, &name, 30).unwrap().save(dir).unwrap();
    };
    (1..=args.agents).for_each(|number| issue(Role::Agent, format!("w{number}")));
    (0..=args.balancers).for_each(|number| issue(Role::Balancer, format!("b{number}")));
}

/// All at once, as after an update that went wrong.
fn start_balancers(cell: &mut Cell, args: &Args, options: &[&str]) {
    let (memory, cpu, began) = (cell.agents.memory(), cell.agents.cpu(), Instant::now());
    for number in 1..=args.balancers {
        let number = number.to_string();
        let mut part = Part::start("balancer", &[options, &["--number", &number]].concat());
        let admin = part.says();
        cell.balancers.push((part, admin));
    }
    let (mut ready, mut known) = (vec![None; args.balancers], vec![None; args.balancers]);
    while known.contains(&None) {
        assert!(began.elapsed() < PATIENCE, "not after {PATIENCE:?}");
        sleep(Duration::from_millis(100));
        for (at, (_, admin)) in cell.balancers.iter().enumerate() {
            let (_, metrics) = page(admin, "/metrics");
            let after = began.elapsed().as_secs_f64();
            let all = number(&metrics, "links") == f64::from(args.agents);
            if all && number(&metrics, "residency_pending") == 0.0 {
                known[at].get_or_insert(after);
            }
            if page(admin, "/readyz").0 == 200 {
                ready[at].get_or_insert(after);
            }
        }
    }
    let (_, metrics) = page(&cell.balancers[0].1, "/metrics");
    let chunks = number(&metrics, "residency_chunks");
    let links = f64::from(args.agents) * args.balancers as f64;
    let of = |values: &[Option<f64>]| {
        let values = values.iter().flatten();
        values.fold(0.0_f64, |most, value| most.max(*value))
    };
    let all = |of: fn(&Part) -> f64| cell.balancers.iter().map(|(part, _)| of(part)).sum::<f64>();
    println!(
        "{} balancers start at once: the last is ready after {:.1} s and knows all {:.1} M chunks after {:.1} s; \
         CPU {:.1} s each, and {:.1} s of all agents",
        args.balancers,
        of(&ready),
        chunks / MB,
        of(&known),
        all(Part::cpu) / args.balancers as f64,
        cell.agents.cpu() - cpu,
    );
    println!(
        "memory: a balancer {:.0} MB ({:.1} kB a link, {:.0} bytes a chunk); an agent {:.0} kB more a link",
        all(Part::memory) / MB / args.balancers as f64,
        all(Part::memory) / links / 1e3,
        all(Part::memory) / args.balancers as f64 / chunks.max(1.0),
        (cell.agents.memory() - memory) / links / 1e3,
    );
}

/// 1,000 workers, 64 balancers, 20,000 requests a second.
fn extrapolate(report: (f64, f64), delta: (f64, f64)) {
    const WORKERS: f64 = 1_000.0;
    for (rate, what) in [
        (20.0, "20,000 requests/s"),
        (5.0, "5,000 requests/s"),
        (1.0, "1,000 requests/s"),
    ] {
        let told = cadence::run(cadence::Load {
            balancers: 64,
            rate,
            to_first_token: Duration::from_millis(200),
            to_end: Duration::from_secs(3),
        });
        let cpu =
            |(report, delta): (f64, f64)| 100.0 * (told.reports * report + told.deltas * delta);
        println!(
            "{what} over 1,000 workers and 64 balancers: a balancer hears {:.0} reports and {:.0} deltas a second: \
             {:.1} % of a core; an agent sends {:.0} and {:.0}: {:.1} %; unseen {:.2} a placement",
            told.reports * WORKERS,
            told.deltas * WORKERS,
            cpu((report.0, delta.0)) * WORKERS,
            told.reports * 64.0,
            told.deltas * 64.0,
            cpu((report.1, delta.1)) * 64.0,
            told.unseen,
        );
    }
}
