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
mod agent;
mod check;
mod clients;
mod disk;
mod fleet;
mod history;
mod host;
mod net;
mod nodes;
mod params;
mod party;
mod people;
mod plan;
mod watching;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

pub use forebay_consensus::bug::Bug;
use forebay_consensus::bug::put_back;
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
    /// A known bug, put back first.
    pub bug: Option<Bug>,
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
    /// Placements that agents took from balancers.
    pub placements: u64,
    /// Drains that came to their end.
    pub drains: u64,
    /// Homes that rebalances moved.
    pub moves: u64,
    /// Requests that were quarantined.
    pub quarantines: u64,
    /// Events.
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
        self.placements += other.placements;
        self.drains += other.drains;
        self.moves += other.moves;
        self.quarantines += other.quarantines;
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
///
/// # Panics
///
/// When a bug is asked for and this build has none (feature `bugs`).
pub fn run(request: Request) -> Result<Summary, Box<Failure>> {
    let plan = plan_of(request);
    run_plan(request, plan.clone()).map_err(|(violation, at_us)| {
        let faults = shrink(request, plan, violation.invariant);
        Box::new(Failure {
            seed: request.seed,
            violation,
            at_ms: at_us / 1_000,
            faults,
        })
    })
}

/// Whether this build can put known bugs back (feature `bugs` of the control plane's crate).
#[must_use]
pub fn has_bugs() -> bool {
    let can = put_back(Some(Bug::AckBeforeSync));
    let _ = put_back(None);
    can
}

/// What does not hold in a world, without looking for fewer faults that lead there.
///
/// # Panics
///
/// As [`run`].
#[must_use]
pub fn caught(request: Request) -> Option<Violation> {
    let plan = plan_of(request);
    run_plan(request, plan)
        .err()
        .map(|(violation, _)| violation)
}

fn run_plan(request: Request, plan: Vec<Fault>) -> Result<Summary, (Violation, u64)> {
    let _ = probe::take();
    assert!(
        put_back(request.bug),
        "this build has no known bugs: it lacks the feature `bugs`"
    );
    // raft-rs panics where it finds itself in a state that it takes for impossible.
    let ended = catch_unwind(AssertUnwindSafe(|| world(request, plan).run()));
    let ended = ended.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        let text = text.unwrap_or_else(|| "a panic".into());
        Err((Violation::new("runs", text), 0))
    });
    let _ = put_back(None);
    let ended = ended?;
    Ok(Summary {
        seeds: 1,
        simulated_hours: ended.lasted_us as f64 / 3.6e9,
        faults_injected: ended.injected,
        ops_ok: ended.counts.ok,
        ops_unknown: ended.counts.unknown,
        ops_failed: ended.counts.failed,
        lin_checked_ops: ended.checked,
        placements: ended.placements,
        drains: ended.drains,
        moves: ended.moves,
        quarantines: ended.quarantines,
        events: ended.events,
        terms: ended.terms as u64,
        trace_hash: ended.trace,
        probes_hit: probe::take()
            .iter()
            .map(|probe| format!("{probe:?}"))
            .collect(),
        probes_total: Probe::ALL.len(),
    })
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
            let ended = run_plan(request, fewer.clone());
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
