//! The control plane in virtual time, with faults: everything in one thread, from one seed.
//!
//! A world has control nodes (the real replica, leader's reign, publisher and controller on a disk that
//! forgets what was not synced), clients, agents, an admin who changes the members, and watchers. For
//! a while faults happen, and every event is followed by checks of what must never be; then the world
//! heals, and must come to rest. At the end the clients' history must be linearizable.
//!
//! Modelled on FoundationDB's simulation and TigerBeetle's VOPR: a seed fixes everything, so that a
//! failure happens again bit for bit, with fewer faults where fewer suffice.

mod acts;
mod check;
mod clients;
mod disk;
mod history;
mod host;
mod net;
mod params;
mod party;
mod plan;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use forebay_consensus::probe::{self, Probe};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde::Serialize;

pub use check::Violation;
pub use plan::{Fault, Kind, Target};

use params::Params;
use world::World;

/// A world to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What fixes everything.
    pub seed: u64,
    /// Control nodes at the start, 3 or 5; `None`: as the seed draws.
    pub nodes: Option<u32>,
}

/// What one or more worlds came to.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// Worlds.
    pub seeds: u64,
    /// Time that passed in them.
    pub simulated_hours: f64,
    /// Faults that happened, by kind.
    pub faults_injected: BTreeMap<&'static str, u64>,
    /// Operations with an outcome.
    pub ops_ok: u64,
    /// Operations that may have happened or not.
    pub ops_unknown: u64,
    /// Operations that were refused.
    pub ops_failed: u64,
    /// Operations in histories found linearizable.
    pub lin_checked_ops: u64,
    /// Events, and terms with a leader.
    pub events: u64,
    /// Terms in which a leader was elected.
    pub terms: u64,
    /// All that happened, in order, as one number.
    pub trace_hash: u64,
    /// Rare branches that were taken, by name.
    pub probes_hit: BTreeSet<String>,
    /// Rare branches that are known.
    pub probes_total: usize,
}

/// A world in which something did not hold.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// Its seed.
    pub seed: u64,
    /// What did not hold.
    pub violation: Violation,
    /// When, in milliseconds of the world.
    pub at_ms: u64,
    /// The fewest of its faults that were found to lead there.
    pub faults: Vec<Fault>,
}

impl Summary {
    /// Adds another world's.
    pub fn add(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.simulated_hours += other.simulated_hours;
        for (kind, count) in other.faults_injected {
            *self.faults_injected.entry(kind).or_default() += count;
        }
        self.ops_ok += other.ops_ok;
        self.ops_unknown += other.ops_unknown;
        self.ops_failed += other.ops_failed;
        self.lin_checked_ops += other.lin_checked_ops;
        self.events += other.events;
        self.terms += other.terms;
        self.trace_hash = self.trace_hash.rotate_left(7) ^ other.trace_hash;
        self.probes_hit.extend(other.probes_hit);
        self.probes_total = other.probes_total;
    }
}

/// Runs one world.
///
/// # Errors
///
/// Returns the first thing that did not hold, with the faults that lead there.
pub fn run(request: Request) -> Result<Summary, Box<Failure>> {
    let plan = plan_of(request);
    let _ = probe::take();
    match world(request, plan.clone()).run() {
        Ok(ended) => Ok(Summary {
            seeds: 1,
            simulated_hours: ended.lasted_us as f64 / 3.6e9,
            faults_injected: ended.injected,
            ops_ok: ended.counts.ok,
            ops_unknown: ended.counts.unknown,
            ops_failed: ended.counts.failed,
            lin_checked_ops: ended.checked,
            events: ended.events,
            terms: ended.terms as u64,
            trace_hash: ended.trace,
            probes_hit: probe::take()
                .iter()
                .map(|probe| format!("{probe:?}"))
                .collect(),
            probes_total: Probe::ALL.len(),
        }),
        Err((violation, at_us)) => {
            let faults = shrink(request, plan, violation.invariant);
            Err(Box::new(Failure {
                seed: request.seed,
                violation,
                at_ms: at_us / 1_000,
                faults,
            }))
        }
    }
}

fn rng_of(request: Request) -> StdRng {
    StdRng::seed_from_u64(request.seed)
}

fn plan_of(request: Request) -> Vec<Fault> {
    let mut rng = rng_of(request);
    let params = Params::draw(&mut rng, request.nodes);
    plan::draw(&mut rng, &params)
}

fn world(request: Request, plan: Vec<Fault>) -> World {
    let params = Params::draw(&mut rng_of(request), request.nodes);
    World::new(request.seed, params, plan)
}

/// Leaves faults out, ever smaller parts of the plan, as long as the same invariant still fails (Zeller
/// and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002).
fn shrink(request: Request, mut plan: Vec<Fault>, invariant: &str) -> Vec<Fault> {
    let mut tries = 0;
    let mut part = plan.len().div_ceil(2);
    while part > 0 && tries < MAX_SHRINKS {
        let mut start = 0;
        while start < plan.len() && tries < MAX_SHRINKS {
            tries += 1;
            let mut fewer = plan.clone();
            fewer.drain(start..(start + part).min(plan.len()));
            let ended = world(request, fewer.clone()).run();
            if ended.is_err_and(|(violation, _)| violation.invariant == invariant) {
                plan = fewer;
            } else {
                start += part;
            }
        }
        part /= 2;
    }
    plan
}

/// Worlds that are run to leave faults out.
const MAX_SHRINKS: u32 = 60;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_happens_again_bit_for_bit() {
        for seed in [1, 2] {
            let request = Request { seed, nodes: None };
            let (first, second) = (run(request).unwrap(), run(request).unwrap());
            assert_eq!(first.trace_hash, second.trace_hash);
            assert_eq!(first.events, second.events);
        }
    }

    #[test]
    fn worlds_with_faults_hold() {
        let mut all = Summary::default();
        let mut failures = Vec::new();
        for seed in 100..120 {
            match run(Request { seed, nodes: None }) {
                Ok(summary) => all.add(summary),
                Err(failure) => failures.push(format!("{failure:?}")),
            }
        }
        eprintln!("{}", serde_json::to_string(&all).unwrap());
        assert!(failures.is_empty(), "{}", failures.join("\n\n"));
        assert!(all.ops_ok > all.ops_unknown + all.ops_failed);
    }
}
