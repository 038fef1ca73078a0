//! Families' homes as their heat asks for them, and the steps of rebalances.
//!
//! What is asked for is decided in `scheduler::homes`; here is when that is looked at, and when a rebalance
//! goes on, waits, or stops because promises are kept less often than its operator wants.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_consensus::fleet::HOMES_LEVEL;
use forebay_consensus::fleet::lease::Leases;
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Family, Millis, Now, WorkerId};
use forebay_scheduler::fingerprint::renderings;
use forebay_scheduler::homes::{Said, assign};

use crate::controller::Action;

/// Between two looks at the heat. It is a mean of about a minute.
const ASSIGN_EVERY: Duration = Duration::from_secs(10);

/// From the beginning of a reign to its first look: agents say their heat every five seconds.
const FIRST_LOOK: Duration = Duration::from_secs(6);

/// Between two looks at how many first tokens are in time: agents say it every five seconds.
const JUDGE_EVERY: Duration = Duration::from_secs(5);

/// All first tokens, in thousandths.
const ALL: u64 = 1_000;

/// What this loop remembers while it leads.
#[derive(Clone, Debug, Default)]
pub(crate) struct Homes {
    /// When the heat is looked at next.
    look: Option<Now>,
    /// When too few first tokens were in time, by rebalance. Bounded by those under way.
    late: BTreeMap<u64, Now>,
}

/// First tokens of a pool, and those in time.
#[derive(Clone, Copy, Default)]
struct Kept {
    first_tokens: u64,
    in_time: u64,
}

impl Homes {
    /// What to propose, given what was heard and what is agreed.
    pub(crate) fn step(
        &mut self,
        now: Now,
        leases: &Leases,
        facts: &wire::Facts,
        cell_time: Millis,
    ) -> Vec<Action> {
        if facts.feature_level < HOMES_LEVEL {
            return vec![];
        }
        let active = facts.rebalances.iter().filter(|one| one.ended_ms == 0);
        let active: Vec<&wire::Rebalance> = active.collect();
        self.late
            .retain(|id, _| active.iter().any(|one| one.id == *id));
        let mut actions: Vec<Action> = active
            .into_iter()
            .filter_map(|one| self.rebalance(now, leases, facts, one, cell_time))
            .collect();
        let look = self.look.get_or_insert(now + FIRST_LOOK);
        // Beside a step it would be made from older homes.
        if now >= *look && actions.is_empty() {
            *look = now + ASSIGN_EVERY;
            actions.extend(assigned(now, leases, facts));
        }
        actions
    }

    /// The next move of a rebalance when it is due, unless promises are broken.
    ///
    /// Where too few first tokens are in time nothing moves; when that is still so at the next look, the
    /// rebalance stops.
    fn rebalance(
        &mut self,
        now: Now,
        leases: &Leases,
        facts: &wire::Facts,
        one: &wire::Rebalance,
        cell_time: Millis,
    ) -> Option<Action> {
        let pause = Duration::from_millis(one.interval_ms.into());
        if let Some(at) = self.late.get(&one.id) {
            if now.since(*at) < pause.max(JUDGE_EVERY) {
                return None;
            }
        } else if one.moved_ms > 0 && cell_time.0 < one.moved_ms + u64::from(one.interval_ms) {
            return None;
        }
        let kept = kept(now, leases, facts, &one.pool);
        let is_late = kept.in_time * ALL < u64::from(one.stop_below) * kept.first_tokens;
        if !is_late {
            self.late.remove(&one.id);
            let (id, step) = (one.id, one.done);
            return Some(Action::StepRebalance(wire::StepRebalance { id, step }));
        }
        // At the first such look nothing is concluded.
        self.late.insert(one.id, now)?;
        let percent = |thousandths: u64| format!("{}.{} %", thousandths / 10, thousandths % 10);
        let share = kept.in_time * ALL / kept.first_tokens.max(1);
        let why = format!(
            "{} of the pool's first tokens are in time, fewer than {}",
            percent(share),
            percent(one.stop_below.into())
        );
        Some(Action::StopRebalance(wire::StopRebalance {
            id: one.id,
            why,
        }))
    }
}

/// Homes as the heat asks for them, where they differ from those that are agreed.
fn assigned(now: Now, leases: &Leases, facts: &wire::Facts) -> Option<Action> {
    let families = facts.families.iter().cloned();
    let held: BTreeMap<u64, Family> = families
        .filter_map(|family| Family::from_wire(family).ok())
        .map(|family| (family.chunk, family))
        .collect();
    let specs: Vec<(&wire::Worker, WorkerSpec)> = facts
        .workers
        .iter()
        .filter_map(|worker| Some((worker, WorkerSpec::from_wire(&worker.spec).ok()?)))
        .collect();
    let present = specs.iter().filter(|(worker, _)| !worker.departed);
    let renderings = renderings(present.map(|(worker, spec)| (WorkerId(worker.id), spec)));
    // What one that renders prompts otherwise holds, nobody can tell.
    let unlike = |worker| renderings.values().any(|one| one.is_unlike(worker));
    let said: Vec<Said> = specs
        .iter()
        .map(|(worker, spec)| Said {
            worker: WorkerId(worker.id),
            pool: spec.pool.clone(),
            ready: is_ready(worker) && !unlike(WorkerId(worker.id)),
            heat: leases.heat(now, &worker.name).map(|heat| (*heat).clone()),
        })
        .collect();
    let changes = assign(&held, &said);
    (!changes.is_empty()).then(|| {
        Action::AssignHomes(wire::AssignHomes {
            put: changes.put.iter().map(Family::to_wire).collect(),
            remove: changes.remove,
            as_of: facts.revision,
        })
    })
}

/// What became of the promises of a pool, as its agents said lately.
fn kept(now: Now, leases: &Leases, facts: &wire::Facts, pool: &str) -> Kept {
    let mut kept = Kept::default();
    for worker in &facts.workers {
        let heat = leases.heat(now, &worker.name);
        let of_pool = || WorkerSpec::from_wire(&worker.spec).is_ok_and(|spec| spec.pool == pool);
        if let Some(heat) = heat.filter(|_| of_pool()) {
            kept.first_tokens += u64::from(heat.first_tokens);
            kept.in_time += u64::from(heat.in_time);
        }
    }
    kept
}

/// Whether it takes requests, by all that is agreed.
fn is_ready(worker: &wire::Worker) -> bool {
    worker.desired() == wire::Desired::Ready
        && worker.observed() == wire::Observed::Ready
        && !worker.lost
        && !worker.departed
}
