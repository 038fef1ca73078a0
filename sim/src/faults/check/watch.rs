//! What a watcher holds is what was agreed at that revision, never older than what it held, and never
//! an empty world in place of a real one (I10, I11).

use std::collections::BTreeMap;

use forebay_control_client::Facts;
use forebay_proto::wire::fleet as wire;
use prost::Message as _;

use super::super::party::Party;
use super::{Held, Violation};

const NAME: &str = "watchers-hold-what-was-agreed";

#[derive(Default)]
pub(crate) struct Watchers {
    /// By revision.
    agreed: BTreeMap<u64, u32>,
    held: BTreeMap<Party, (u64, usize)>,
    checked: u64,
}

fn digest(mut facts: wire::Facts) -> u32 {
    // Time goes on without a new revision.
    facts.cell_time_ms = 0;
    facts.workers.sort_by(|a, b| a.name.cmp(&b.name));
    crc32c::crc32c(&facts.encode_to_vec())
}

impl Watchers {
    /// The facts after a batch, on any node.
    pub(crate) fn agreed(&mut self, facts: &wire::Facts) {
        self.agreed
            .entry(facts.revision)
            .or_insert_with(|| digest(facts.clone()));
    }

    /// A watcher holds these facts from now on.
    pub(crate) fn holds(&mut self, watcher: Party, facts: &Facts) -> Held {
        let revision = facts.revision.0;
        let workers = facts.workers.len();
        let (before, had) = self
            .held
            .insert(watcher, (revision, workers))
            .unwrap_or_default();
        let broken = |detail: String| Err(Violation::new(NAME, detail));
        if revision < before {
            return broken(format!("{watcher:?} went from {before} to {revision}"));
        }
        if workers == 0 && had > 0 {
            return broken(format!("{watcher:?} lost all workers at {revision}"));
        }
        self.checked += 1;
        match self.agreed.get(&revision) {
            // Between two batches' ends: the node's own deltas led there.
            None => Ok(()),
            Some(agreed) if *agreed == digest(facts.to_wire()) => Ok(()),
            Some(_) => broken(format!(
                "{watcher:?} holds something else at {revision} than was agreed"
            )),
        }
    }

    /// It begins again with nothing.
    pub(crate) fn forgot(&mut self, watcher: Party) {
        self.held.remove(&watcher);
    }

    /// What a watcher holds.
    pub(crate) fn revision(&self, watcher: Party) -> u64 {
        self.held.get(&watcher).map_or(0, |(revision, _)| *revision)
    }
}
