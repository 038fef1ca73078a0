//! Rebalances: homes that move one at a time, as an operator's plan says, whoever leads.
//!
//! A rebalance is judged whole when it begins: each of its moves has to be possible after those before
//! it. From then on the leader's controller proposes one step after the other, each by its number, so that
//! two leaders cannot make the same move twice; when a move is due is judged here by cell time. A move
//! that is not possible any more, because a worker left meanwhile, stops the rebalance. What was moved
//! stays, however it ends.

use std::collections::{BTreeMap, BTreeSet};

use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{
    Family, Forecast, Millis, Move, Rebalance, RebalanceId, RebalancePhase, Revision, WorkerId,
};
use wire::change::Change;

use super::drains::MAX_TEXT;
use super::homes::MAX_HOMES;
use super::members::HOMES_LEVEL;
use super::proposal::Proposal;
use super::{Effect, Fleet, MAX_WORKERS, Worker};
use crate::bug::{Bug, on};

/// Moves of one rebalance.
pub const MAX_MOVES: usize = 64;

/// Shortest and longest time between two moves, in milliseconds.
pub const INTERVALS_MS: std::ops::RangeInclusive<u32> = 100..=3_600_000;

/// All first tokens, in thousandths.
const ALL: u32 = 1_000;

impl Fleet {
    pub(super) fn start_rebalance(
        &mut self,
        at: Revision,
        command: wire::StartRebalance,
        proposal: &Proposal,
    ) -> Result<Effect, Refusal> {
        self.needs(HOMES_LEVEL)?;
        let moves = checked(&command)?;
        let pool = command.pool;
        if !self.config.pools.contains(&pool) {
            return Err(Refusal::UnknownPool { pool });
        }
        let affected = u32::try_from(moves.len()).unwrap_or(u32::MAX);
        let active = self.rebalances.get(&pool).filter(|held| held.is_active());
        if let Some(active) = active.filter(|_| !on(Bug::RebalanceTakesOver)) {
            let rebalance = active.id;
            if active.moves != moves {
                return Err(Refusal::RebalanceActive { pool, rebalance });
            }
            return Ok(Effect {
                rebalance: Some(rebalance),
                ..Effect::default()
            });
        }
        let mut next = self.families.clone();
        for one in &moves {
            self.make(&mut next, &pool, *one)
                .map_err(|what| Refusal::PlanStale { what })?;
        }
        if command.dry_run {
            return Ok(Effect {
                affected,
                ..Effect::default()
            });
        }
        let rebalance = Rebalance {
            id: RebalanceId(at.0),
            phase: RebalancePhase::Moving,
            pool: pool.clone(),
            moves,
            done: 0,
            before: Forecast::from_wire(command.before.unwrap_or_default()),
            after: Forecast::from_wire(command.after.unwrap_or_default()),
            interval_ms: command.interval_ms,
            stop_below: command.stop_below,
            began: self.cell_time,
            moved: None,
            ended: None,
            actor: proposal.actor.identity.chars().take(MAX_TEXT).collect(),
            reason: proposal.reason.chars().take(MAX_TEXT).collect(),
            stopped: String::new(),
        };
        let effect = Effect {
            changes: vec![Change::RebalancePut(rebalance.to_wire())],
            rebalance: Some(rebalance.id),
            affected,
            ..Effect::default()
        };
        self.rebalances.insert(pool, rebalance);
        Ok(effect)
    }

    pub(super) fn step_rebalance(
        &mut self,
        at: Revision,
        command: &wire::StepRebalance,
    ) -> Result<Effect, Refusal> {
        self.needs(HOMES_LEVEL)?;
        let held = self.rebalance(command.id)?;
        let again = command.step != held.done;
        let next_move = held.moves.get(held.done as usize).copied();
        let Some(next_move) = next_move.filter(|_| held.is_active() && !again) else {
            return Ok(Effect::unchanged());
        };
        let due = held
            .moved
            .map(|moved| Millis(moved.0.saturating_add(held.interval_ms.into())));
        if due.is_some_and(|due| due > self.cell_time) {
            let problem = "has no move that is due by cell time";
            return Err(Refusal::invalid("step_rebalance.id", problem));
        }
        let mut rebalance = held.clone();
        let mut families = self.families.clone();
        let mut effect = Effect::default();
        match self.make(&mut families, &rebalance.pool, next_move) {
            Ok(()) => {
                effect.changes.extend(self.rehomed(at, families));
                rebalance.done += 1;
                rebalance.moved = Some(self.cell_time);
                if rebalance.done as usize == rebalance.moves.len() {
                    rebalance.phase = RebalancePhase::Done;
                    rebalance.ended = Some(self.cell_time);
                }
            }
            Err(why) => self.stop(&mut rebalance, &why),
        }
        Ok(self.put(rebalance, effect))
    }

    pub(super) fn stop_rebalance(
        &mut self,
        command: &wire::StopRebalance,
    ) -> Result<Effect, Refusal> {
        self.needs(HOMES_LEVEL)?;
        let held = self.rebalance(command.id)?;
        if !held.is_active() {
            return Ok(Effect::unchanged());
        }
        let mut rebalance = held.clone();
        self.stop(&mut rebalance, &command.why);
        Ok(self.put(rebalance, Effect::default()))
    }

    pub(super) fn cancel_rebalance(
        &mut self,
        command: &wire::CancelRebalance,
    ) -> Result<Effect, Refusal> {
        self.needs(HOMES_LEVEL)?;
        let held = self.rebalance(command.id)?;
        if command.dry_run || !held.is_active() {
            return Ok(Effect {
                rebalance: Some(held.id),
                ..Effect::default()
            });
        }
        let rebalance = Rebalance {
            phase: RebalancePhase::Cancelled,
            ended: Some(self.cell_time),
            ..held.clone()
        };
        Ok(self.put(rebalance, Effect::default()))
    }

    /// Families that rebalances under way have still to move: nothing else changes their homes.
    pub(super) fn moving(&self) -> BTreeSet<u64> {
        let active = self.rebalances.values().filter(|held| held.is_active());
        let left = active.flat_map(|held| held.moves.iter().skip(held.done as usize));
        left.map(|one| one.chunk).collect()
    }

    /// Forgets rebalances of pools that are not in the configuration any more.
    pub(super) fn forget_rebalances(&mut self) -> Vec<Change> {
        let pools = &self.config.pools;
        let gone = self.rebalances.keys().filter(|pool| !pools.contains(*pool));
        let gone: Vec<String> = gone.cloned().collect();
        for pool in &gone {
            self.rebalances.remove(pool);
        }
        gone.into_iter().map(Change::RebalanceForgotten).collect()
    }

    fn rebalance(&self, id: u64) -> Result<&Rebalance, Refusal> {
        let rebalance = RebalanceId(id);
        let mut all = self.rebalances.values();
        all.find(|held| held.id == rebalance)
            .ok_or(Refusal::UnknownRebalance { rebalance })
    }

    fn stop(&self, rebalance: &mut Rebalance, why: &str) {
        rebalance.phase = RebalancePhase::Stopped;
        rebalance.ended = Some(self.cell_time);
        rebalance.stopped = why.chars().take(MAX_TEXT).collect();
    }

    fn put(&mut self, rebalance: Rebalance, mut effect: Effect) -> Effect {
        let told = Change::RebalancePut(rebalance.to_wire());
        effect.changes.push(told);
        effect.rebalance = Some(rebalance.id);
        self.rebalances.insert(rebalance.pool.clone(), rebalance);
        effect
    }

    /// Makes a move among these families, or says why it is not possible.
    fn make(
        &self,
        families: &mut BTreeMap<u64, Family>,
        pool: &str,
        one: Move,
    ) -> Result<(), String> {
        let family = families.get(&one.chunk).filter(|held| held.pool == pool);
        let Some(mut family) = family.cloned() else {
            return Err(format!("family {:016x} has no homes any more", one.chunk));
        };
        let named = |id: WorkerId| {
            let worker = self.workers.values().find(|worker| worker.id == id);
            worker.map_or_else(|| id.to_string(), |worker| worker.name.clone())
        };
        if let Some(from) = one.from {
            let before = family.homes.len();
            family.homes.retain(|home| *home != from);
            if family.homes.len() == before {
                let (from, family) = (named(from), family.name());
                return Err(format!("worker {from} is no home of family {family}"));
            }
        }
        if let Some(to) = one.to {
            let takes =
                |worker: &&Worker| worker.id == to && worker.spec.pool == pool && worker.is_ready();
            if !self.workers.values().any(|worker| takes(&worker)) {
                let to = named(to);
                return Err(format!("worker {to} is not ready in pool {pool}"));
            }
            if family.homes.contains(&to) {
                let (to, family) = (named(to), family.name());
                return Err(format!("worker {to} is a home of family {family} already"));
            }
            family.homes.push(to);
            family.homes.sort_unstable();
        }
        if !(1..=MAX_HOMES).contains(&family.homes.len()) {
            let (name, homes) = (family.name(), family.homes.len());
            return Err(format!(
                "family {name} would have {homes} homes, and has 1 to {MAX_HOMES}"
            ));
        }
        family.pinned = true;
        families.insert(family.chunk, family);
        Ok(())
    }
}

/// The moves of a command whose form is right.
fn checked(command: &wire::StartRebalance) -> Result<Vec<Move>, Refusal> {
    let invalid = |field: &str, problem: String| {
        Err(Refusal::invalid(
            format!("start_rebalance.{field}"),
            problem,
        ))
    };
    if command.moves.is_empty() || command.moves.len() > MAX_MOVES {
        let problem = format!("has {} moves, not 1 to {MAX_MOVES}", command.moves.len());
        return invalid("moves", problem);
    }
    if !INTERVALS_MS.contains(&command.interval_ms) {
        let (least, most) = (INTERVALS_MS.start(), INTERVALS_MS.end());
        let problem = format!("is {} ms, not {least} to {most}", command.interval_ms);
        return invalid("interval_ms", problem);
    }
    if command.stop_below > ALL {
        let problem = format!("is {} thousandths, more than all", command.stop_below);
        return invalid("stop_below", problem);
    }
    for (field, forecast) in [("before", &command.before), ("after", &command.after)] {
        let workers = forecast.as_ref().map_or(0, |told| told.workers.len());
        if workers > MAX_WORKERS {
            let problem = format!("has {workers} workers, at most {MAX_WORKERS} fit");
            return invalid(field, problem);
        }
    }
    let moves = command.moves.iter().map(|one| Move::from_wire(*one));
    let moves: Result<Vec<Move>, _> = moves.collect();
    moves.or_else(|error| invalid("moves", error.to_string()))
}
