//! Cordons of several workers, and drains: replicated jobs that go on whoever leads.
//!
//! A drain's phase follows from its workers' own words, so it is settled by the very entries that carry
//! these words ([`Fleet::settled`]): no leader has to be there to move it on, and none can move it
//! twice. Only time does not come by itself: that a deadline passed is proposed by the leader's
//! controller, and judged here by cell time.

use std::collections::BTreeSet;

use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Drain, DrainId, DrainPhase, DrainedWorker, Millis, OnDeadline, Revision};
use wire::change::Change;
use wire::{Desired, Observed};

use super::members::DRAINS_LEVEL;
use super::proposal::Proposal;
use super::{Effect, Fleet, Worker};
use crate::bug::{Bug, on};

/// Drains that are kept. When one more begins, the one that ended first is forgotten.
pub const MAX_DRAINS: usize = 32;

/// Workers of one command.
pub const MAX_NAMES: usize = 1_000;

/// Texts of a drain or rebalance are cut to this many characters.
pub(super) const MAX_TEXT: usize = 200;

impl Fleet {
    pub(super) fn set_desired_of(
        &mut self,
        at: Revision,
        command: &wire::SetDesiredOf,
        evidence: Option<&wire::Evidence>,
    ) -> Result<Effect, Refusal> {
        self.needs(DRAINS_LEVEL)?;
        let desired = command.desired();
        match desired {
            Desired::Ready | Desired::Cordoned => {}
            Desired::Unspecified | Desired::Draining => {
                let problem = "is neither ready nor cordoned";
                return Err(Refusal::invalid("set_desired_of.desired", problem));
            }
        }
        let mut changing = self.chosen("set_desired_of", &command.names)?;
        // Who is drained takes nothing either.
        changing.retain(|worker| match desired {
            Desired::Ready => worker.desired != Desired::Ready,
            _ => worker.desired == Desired::Ready,
        });
        for worker in &changing {
            self.check_undrained(worker)?;
        }
        if desired == Desired::Cordoned && !command.ignore_capacity_guard {
            let leaving = changing.iter().map(|worker| worker.id).collect();
            self.check_capacity(&leaving, evidence)?;
        }
        let names: Vec<String> = changing.iter().map(|worker| worker.name.clone()).collect();
        let affected = count(&names);
        let mut effect = Effect::default();
        if !command.dry_run {
            effect = self.want(at, &names, desired)?;
        }
        Ok(Effect { affected, ..effect })
    }

    pub(super) fn start_drain(
        &mut self,
        at: Revision,
        command: &wire::StartDrain,
        proposal: &Proposal,
    ) -> Result<Effect, Refusal> {
        self.needs(DRAINS_LEVEL)?;
        let on_deadline = OnDeadline::from_wire(command.on_deadline()).ok_or_else(|| {
            Refusal::invalid("start_drain.on_deadline", "is neither wait nor cancel")
        })?;
        let workers = self.chosen("start_drain", &command.names)?;
        if let Some(same) = self.active_of(&workers)? {
            return Ok(Effect {
                drain: Some(same),
                ..Effect::default()
            });
        }
        if !command.ignore_capacity_guard {
            let leaving = workers.iter().map(|worker| worker.id).collect();
            self.check_capacity(&leaving, proposal.evidence.as_ref())?;
        }
        let forgotten = self.room_for_a_drain()?;
        let names: Vec<String> = workers.iter().map(|worker| worker.name.clone()).collect();
        let affected = count(&names);
        if command.dry_run {
            return Ok(Effect {
                affected,
                ..Effect::default()
            });
        }
        let drain = Drain {
            id: DrainId(at.0),
            phase: DrainPhase::Committed,
            on_deadline,
            began: self.cell_time,
            deadline: (command.deadline_ms > 0)
                .then(|| Millis(self.cell_time.0.saturating_add(command.deadline_ms))),
            in_force: None,
            ended: None,
            overdue: false,
            actor: proposal.actor.identity.chars().take(MAX_TEXT).collect(),
            reason: proposal.reason.chars().take(MAX_TEXT).collect(),
            workers: workers
                .iter()
                .map(|worker| DrainedWorker {
                    name: worker.name.clone(),
                    id: worker.id,
                    in_force: None,
                    drained: None,
                })
                .collect(),
        };
        let mut effect = self.want(at, &names, Desired::Draining)?;
        if let Some(forgotten) = forgotten {
            self.drains.remove(&forgotten);
            effect.changes.push(Change::DrainForgotten(forgotten.0));
        }
        effect.changes.push(Change::DrainPut(drain.to_wire()));
        effect.drain = Some(drain.id);
        effect.affected = affected;
        self.drains.insert(drain.id, drain);
        Ok(effect)
    }

    pub(super) fn cancel_drain(
        &mut self,
        at: Revision,
        command: &wire::CancelDrain,
    ) -> Result<Effect, Refusal> {
        self.needs(DRAINS_LEVEL)?;
        let drain = self.drain(command.id)?;
        let id = drain.id;
        let held: Vec<String> = if drain.is_active() {
            self.held_by(drain)
                .map(|worker| worker.name.clone())
                .collect()
        } else {
            Vec::new()
        };
        let (drain, affected) = (Some(id), count(&held));
        if command.dry_run || !self.drains[&id].is_active() {
            return Ok(Effect {
                drain,
                affected,
                ..Effect::default()
            });
        }
        let desired = if command.uncordon {
            Desired::Ready
        } else {
            Desired::Cordoned
        };
        let mut effect = self.want(at, &held, desired)?;
        let ended = self.cell_time;
        let job = self.drains.get_mut(&id).expect("it was found above");
        job.phase = DrainPhase::Cancelled;
        job.ended = Some(ended);
        effect.changes.push(Change::DrainPut(job.to_wire()));
        Ok(Effect {
            drain,
            affected,
            ..effect
        })
    }

    pub(super) fn pass_drain_deadline(
        &mut self,
        at: Revision,
        command: &wire::PassDrainDeadline,
    ) -> Result<Effect, Refusal> {
        self.needs(DRAINS_LEVEL)?;
        let drain = self.drain(command.id)?;
        let id = drain.id;
        if drain.deadline.is_none_or(|at| at > self.cell_time) {
            let problem = "has no deadline that passed by cell time";
            return Err(Refusal::invalid("pass_drain_deadline.id", problem));
        }
        if drain.overdue || !drain.is_active() {
            return Ok(Effect::unchanged());
        }
        let mut effect = Effect::default();
        if drain.on_deadline == OnDeadline::Cancel {
            let held: Vec<String> = self
                .held_by(drain)
                .filter(|worker| !worker.is_drained())
                .map(|worker| worker.name.clone())
                .collect();
            for name in &held {
                let worker = self.named_mut(name)?;
                worker.end_streams = true;
                worker.desired_revision = at;
                effect.changes.extend(worker.touched(at).changes);
            }
        }
        let drain = self.drains.get_mut(&id).expect("it was found above");
        drain.overdue = true;
        effect.changes.push(Change::DrainPut(drain.to_wire()));
        Ok(effect)
    }

    /// The effect, and what follows from it: homes leave who takes nothing, and drains under way move on.
    pub(super) fn settled(&mut self, at: Revision, mut effect: Effect) -> Effect {
        let about_workers = effect
            .changes
            .iter()
            .any(|change| matches!(change, Change::WorkerPut(_) | Change::WorkerRemoved(_)));
        if !about_workers {
            return effect;
        }
        effect.changes.extend(self.vacate(at));
        let (workers, now) = (&self.workers, self.cell_time);
        for drain in self.drains.values_mut().filter(|drain| drain.is_active()) {
            let before = drain.clone();
            for one in &mut drain.workers {
                let worker = workers.get(&one.name).filter(|w| w.id == one.id);
                // Who was removed, or said goodbye, runs nothing.
                let gone = worker.is_none_or(|worker| worker.departed);
                if gone || worker.is_some_and(Worker::is_in_force) {
                    one.in_force.get_or_insert(now);
                }
                if gone || worker.is_some_and(Worker::is_drained) {
                    one.drained.get_or_insert(now);
                }
            }
            if drain.workers.iter().all(|worker| worker.in_force.is_some()) {
                drain.in_force.get_or_insert(now);
                drain.phase = DrainPhase::InForce;
            }
            if drain.workers.iter().all(|worker| worker.drained.is_some()) {
                drain.ended = Some(now);
                drain.phase = DrainPhase::Drained;
            }
            if *drain != before {
                // One entry may begin a drain and settle it: the later word counts.
                effect.changes.push(Change::DrainPut(drain.to_wire()));
            }
        }
        debug_assert!(self.drains.len() <= MAX_DRAINS, "at {at}");
        effect
    }

    /// Refuses what a drain under way decides.
    pub(super) fn check_undrained(&self, worker: &Worker) -> Result<(), Refusal> {
        match self.draining(worker) {
            Some(drain) => Err(Refusal::DrainActive {
                worker: worker.name.clone(),
                drain,
            }),
            None => Ok(()),
        }
    }

    /// The drain under way that holds it.
    fn draining(&self, worker: &Worker) -> Option<DrainId> {
        let mut active = self.drains.values().filter(|drain| drain.is_active());
        let holds = |drain: &&Drain| drain.workers.iter().any(|one| one.id == worker.id);
        active.find(holds).map(|drain| drain.id)
    }

    /// The drain under way of exactly these workers, if there is one.
    fn active_of(&self, workers: &[&Worker]) -> Result<Option<DrainId>, Refusal> {
        let ids = |drain: &Drain| -> BTreeSet<_> { drain.workers.iter().map(|w| w.id).collect() };
        let asked: BTreeSet<_> = workers.iter().map(|worker| worker.id).collect();
        let mut active = self.drains.values().filter(|drain| drain.is_active());
        if let Some(same) = active.find(|drain| ids(drain) == asked) {
            return Ok(Some(same.id));
        }
        for worker in workers {
            self.check_undrained(worker)?;
        }
        Ok(None)
    }

    /// The drain that gives way to one more, if one has to.
    fn room_for_a_drain(&self) -> Result<Option<DrainId>, Refusal> {
        if self.drains.len() < MAX_DRAINS {
            return Ok(None);
        }
        let ended = self.drains.values().filter(|drain| !drain.is_active());
        let first = ended.min_by_key(|drain| (drain.ended, drain.id));
        first.map(|drain| Some(drain.id)).ok_or(Refusal::Full {
            what: "drains under way".into(),
            limit: MAX_DRAINS as u64,
        })
    }

    fn drain(&self, id: u64) -> Result<&Drain, Refusal> {
        let drain = DrainId(id);
        self.drains
            .get(&drain)
            .ok_or(Refusal::UnknownDrain { drain })
    }

    /// Its workers that are there and still wanted draining.
    fn held_by(&self, drain: &Drain) -> impl Iterator<Item = &Worker> {
        drain.workers.iter().filter_map(|one| {
            let worker = self.workers.get(&one.name)?;
            (worker.id == one.id && worker.desired == Desired::Draining).then_some(worker)
        })
    }

    /// The workers of these names, each once, in order of their names.
    fn chosen(&self, path: &str, names: &[String]) -> Result<Vec<&Worker>, Refusal> {
        let path = format!("{path}.names");
        if names.is_empty() {
            return Err(Refusal::invalid(path, "is empty: name at least one worker"));
        }
        if names.len() > MAX_NAMES {
            let problem = format!("has {} names, at most {MAX_NAMES} fit", names.len());
            return Err(Refusal::invalid(path, problem));
        }
        let names: BTreeSet<&String> = names.iter().collect();
        names.into_iter().map(|name| self.named(name)).collect()
    }

    /// Wants this of all of them.
    fn want(
        &mut self,
        at: Revision,
        names: &[String],
        desired: Desired,
    ) -> Result<Effect, Refusal> {
        let mut effect = Effect::default();
        for name in names {
            let worker = self.named_mut(name)?;
            effect.changes.extend(worker.wanted(at, desired).changes);
        }
        Ok(effect)
    }
}

impl Worker {
    /// Whether its agent has said, knowing that it drains, that nothing runs.
    fn is_drained(&self) -> bool {
        self.desired == Desired::Draining
            && (self.is_in_force() || on(Bug::DrainedByAnOldWord))
            && self.observed == Observed::Drained
    }
}

fn count(names: &[String]) -> u32 {
    u32::try_from(names.len()).unwrap_or(u32::MAX)
}
