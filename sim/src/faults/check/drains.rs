//! A drain under way is never lost, neither with a leader nor in a snapshot; it goes one way, holds its
//! workers, and never takes the last one that is wanted; and it ends when its workers say so.

use std::collections::BTreeMap;

use forebay_proto::wire::fleet as wire;
use wire::change::Change;
use wire::{Desired, DrainPhase, Observed};

use super::{Held, Violation};

const NAME: &str = "drains-go-on";

/// The leader's controller has so long for a deadline, in cell time.
const DEADLINE_NOTICED_MS: u64 = 5_000;

#[derive(Default)]
pub(crate) struct Drains {
    /// As of which revision, by id.
    known: BTreeMap<u64, (u64, wire::Drain)>,
    /// By name.
    workers: BTreeMap<String, wire::Worker>,
    /// Drains that came to their end.
    pub(crate) drained: u64,
}

/// Whether nothing runs there, by its agent's own word of this drain.
fn is_drained(worker: &wire::Worker) -> bool {
    let acknowledged = worker.acknowledged_revision >= worker.desired_revision;
    worker.departed || (acknowledged && worker.observed() == Observed::Drained)
}

fn broken(detail: String) -> Held {
    Err(Violation::new(NAME, detail))
}

impl Drains {
    /// A delta that was agreed on, in order.
    pub(crate) fn delta(&mut self, delta: &wire::Delta) -> Held {
        let (mut began, served) = (false, self.serves());
        for change in &delta.changes {
            match &change.change {
                Some(Change::WorkerPut(worker)) => {
                    self.workers.insert(worker.name.clone(), worker.clone());
                }
                Some(Change::WorkerRemoved(name)) => {
                    self.workers.remove(name);
                }
                Some(Change::DrainPut(drain)) => {
                    began |= !self.known.contains_key(&drain.id);
                    self.put(delta.revision, drain)?;
                }
                Some(Change::DrainForgotten(id)) => match self.known.remove(id) {
                    Some((_, drain)) if drain.ended_ms > 0 => {}
                    other => return broken(format!("d{id} was forgotten as {other:?}")),
                },
                _ => {}
            }
        }
        if began && served && !self.serves() {
            return broken(format!("r{} took the last worker", delta.revision));
        }
        for (_, drain) in self.known.values().filter(|(_, d)| d.ended_ms == 0) {
            for one in &drain.workers {
                if let Some(worker) = self.worker(one)
                    && worker.desired() != Desired::Draining
                {
                    return broken(format!("{worker:?} during d{}", drain.id));
                }
            }
        }
        Ok(())
    }

    /// Whether a worker is wanted.
    fn serves(&self) -> bool {
        let mut workers = self.workers.values();
        workers.any(|worker| worker.desired() == Desired::Ready)
    }

    /// The worker that a drain means, if it is there.
    fn worker(&self, one: &wire::DrainedWorker) -> Option<&wire::Worker> {
        let worker = self.workers.get(&one.name)?;
        (worker.id == one.id).then_some(worker)
    }

    fn put(&mut self, revision: u64, drain: &wire::Drain) -> Held {
        if let Some((_, before)) = self.known.get(&drain.id) {
            let forward = before.ended_ms == 0
                && before.phase <= drain.phase
                && before.began_ms == drain.began_ms
                && (!before.overdue || drain.overdue);
            if !forward {
                return broken(format!("{before:?} became {drain:?}"));
            }
        }
        let before = self.known.get(&drain.id);
        for (position, one) in drain.workers.iter().enumerate() {
            let was = before.is_some_and(|(_, before)| before.workers[position].drained_ms > 0);
            if one.drained_ms > 0
                && !was
                && let Some(worker) = self.worker(one)
                && !is_drained(worker)
            {
                return broken(format!("{worker:?} counts as drained by d{}", drain.id));
            }
        }
        if drain.phase() == DrainPhase::Drained {
            self.drained += 1;
        }
        self.known.insert(drain.id, (revision, drain.clone()));
        Ok(())
    }

    /// What a node holds after a batch.
    pub(crate) fn held(&self, facts: &wire::Facts) -> Held {
        for (revision, drain) in self.known.values() {
            let lost =
                facts.revision >= *revision && facts.drains.iter().all(|held| held.id != drain.id);
            // A later entry of the same batch may have forgotten one that ended.
            if lost && drain.ended_ms == 0 {
                return broken(format!(
                    "d{} is not in the facts at r{}",
                    drain.id, facts.revision
                ));
            }
        }
        Ok(())
    }

    /// Of these workers one is under way.
    pub(crate) fn active(&self, worker: &str) -> Option<u64> {
        let active = self.known.values().filter(|(_, d)| d.ended_ms == 0);
        let mut of_worker = active.filter(|(_, d)| d.workers.iter().any(|w| w.name == worker));
        of_worker.next().map(|(_, drain)| drain.id)
    }

    /// What the leader holds in the end.
    pub(crate) fn at_rest(facts: &wire::Facts) -> Held {
        for drain in facts.drains.iter().filter(|drain| drain.ended_ms == 0) {
            let over = |one: &wire::DrainedWorker| {
                let worker = facts.workers.iter().find(|worker| worker.id == one.id);
                worker.is_none_or(is_drained)
            };
            if drain.workers.iter().all(over) {
                return broken(format!("d{} goes on with nothing to wait for", drain.id));
            }
            let late = facts.cell_time_ms.saturating_sub(DEADLINE_NOTICED_MS);
            if !drain.overdue && drain.deadline_ms > 0 && drain.deadline_ms < late {
                return broken(format!("nobody noticed the deadline of d{}", drain.id));
            }
        }
        Ok(())
    }
}
