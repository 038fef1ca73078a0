//! `forebay sim faults --bug`: whether the simulation catches what is known to be wrong.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use forebay_sim::faults::{self, Bug, Request};
use serde::Serialize;

use super::FaultsArgs;
use crate::exit::{CliError, Exit};
use crate::output;

/// Seeds within which each must be caught.
const SEEDS: u64 = 50;

#[derive(Serialize)]
struct Report {
    schema_version: u32,
    /// Seeds that hold without a bug; others say nothing of one.
    seeds: u64,
    bugs: Vec<Caught>,
}

#[derive(Serialize)]
struct Caught {
    name: String,
    /// Seeds that caught it.
    caught: u64,
    first_seed: Option<u64>,
    /// By what: invariants, and how many seeds broke each first.
    broke: BTreeMap<&'static str, u64>,
}

pub(super) fn run(args: &FaultsArgs, name: &str) -> Result<(), CliError> {
    if !faults::has_bugs() {
        let message = "this build has no bugs to put back: cargo run --release -p forebay --features bugs -- sim faults --bug all";
        return Err(CliError::because(Exit::Usage, message));
    }
    let bugs = match Bug::named(name) {
        Some(bug) => vec![bug],
        None if name == "all" => Bug::ALL.to_vec(),
        None => {
            let known: Vec<_> = Bug::ALL.iter().map(|bug| bug.name()).collect();
            let message = format!("no bug {name}; known: all, {}", known.join(", "));
            return Err(CliError::because(Exit::Usage, message));
        }
    };
    // What a world does with a bug may be a panic, which is one way to be caught.
    std::panic::set_hook(Box::new(|_| {}));
    let seeds: Vec<u64> = (args.seed..)
        .take_while(|seed| *seed < args.seed + args.seeds.unwrap_or(SEEDS))
        .collect();
    let hold = broken_by(args, &[None], &seeds);
    let holds = |seed: &&u64| !hold.contains_key(&(0, **seed));
    let seeds: Vec<u64> = seeds.iter().filter(holds).copied().collect();
    let wanted: Vec<_> = bugs.iter().copied().map(Some).collect();
    let broken = broken_by(args, &wanted, &seeds);
    let bugs = bugs.iter().enumerate().map(|(position, bug)| {
        let mine = broken.range((position, 0)..=(position, u64::MAX));
        let mut broke = BTreeMap::new();
        for (_, invariant) in mine.clone() {
            *broke.entry(*invariant).or_default() += 1;
        }
        Caught {
            name: bug.name(),
            caught: mine.clone().count() as u64,
            first_seed: mine.clone().next().map(|((_, seed), _)| *seed),
            broke,
        }
    });
    let report = Report {
        schema_version: 1,
        seeds: seeds.len() as u64,
        bugs: bugs.collect(),
    };
    args.output.print(&report, || table(&report));
    let missed = report.bugs.iter().find(|bug| bug.caught == 0);
    missed.map_or(Ok(()), |bug| {
        let message = format!("{} was caught by none of {} seeds", bug.name, report.seeds);
        Err(CliError::because(Exit::Failed, message))
    })
}

/// What broke, by position of the bug and seed.
fn broken_by(
    args: &FaultsArgs,
    bugs: &[Option<Bug>],
    seeds: &[u64],
) -> BTreeMap<(usize, u64), &'static str> {
    let (next, broken) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let (position, seed) = (at / seeds.len().max(1), at % seeds.len().max(1));
                    let (Some(bug), Some(seed)) = (bugs.get(position), seeds.get(seed)) else {
                        return;
                    };
                    let world = Request {
                        bug: *bug,
                        ..args.world(*seed)
                    };
                    if let Some(violation) = faults::caught(world) {
                        let mut broken = broken.lock().expect("no thread panics with the lock");
                        broken.insert((position, *seed), violation.invariant);
                    }
                }
            });
        }
    });
    broken.into_inner().expect("no thread panics with the lock")
}

fn table(report: &Report) -> String {
    let rows = report.bugs.iter().map(|bug| {
        let broke: Vec<_> = bug
            .broke
            .iter()
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        [
            bug.name.clone(),
            format!("{}/{}", bug.caught, report.seeds),
            bug.first_seed.map_or("-".into(), |seed| seed.to_string()),
            broke.join(", "),
        ]
    });
    output::table(["BUG", "CAUGHT", "FIRST SEED", "BY"], rows)
}
