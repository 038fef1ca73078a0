//! What operators were told is in force is in force: a worker whose agent acknowledged a cordon or a
//! drain takes no placement until it is wanted again (I12), whoever sends it, restarts included.

use std::collections::{BTreeMap, BTreeSet};

use forebay_proto::Incarnation;
use forebay_proto::wire::fleet as wire;
use wire::change::Change;

use super::{Held, Violation};

#[derive(Default)]
pub(crate) struct InForce {
    /// By name: whose acknowledgement is agreed, while the worker is not wanted.
    unwanted: BTreeMap<String, Incarnation>,
    /// Starts that two processes are, one of them from a copy of a disk: what the copy acknowledges, a
    /// later start that has not registered yet cannot know.
    copied: BTreeSet<Incarnation>,
    /// Placements that were taken.
    pub(crate) taken: u64,
}

impl InForce {
    /// A delta that was agreed on, in order.
    pub(crate) fn delta(&mut self, delta: &wire::Delta) {
        for change in &delta.changes {
            let Some(Change::WorkerPut(worker)) = &change.change else {
                continue;
            };
            let acknowledged = worker.acknowledged_revision >= worker.desired_revision;
            if worker.desired == i32::from(wire::Desired::Ready) {
                self.unwanted.remove(&worker.name);
            } else if let Ok(own) = Incarnation::from_wire(worker.incarnation.as_ref())
                && acknowledged
            {
                self.unwanted.entry(worker.name.clone()).or_insert(own);
            }
        }
    }

    /// A process begins as this start, from a copy of a disk.
    pub(crate) fn copied(&mut self, start: Incarnation) {
        self.copied.insert(start);
    }

    /// This start of a worker took a placement.
    pub(crate) fn took(&mut self, name: &str, own: Incarnation) -> Held {
        self.taken += 1;
        match self.unwanted.get(name) {
            // A start before the one that acknowledged is fenced by its own death alone.
            Some(by) if own == *by || (own > *by && !self.copied.contains(by)) => {
                let detail = format!(
                    "{own} of {name} took a placement; that it must not was acknowledged by {by}"
                );
                Err(Violation::new("acknowledged-is-in-force", detail))
            }
            Some(_) | None => Ok(()),
        }
    }
}
