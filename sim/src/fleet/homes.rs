//! The leader's part in a run: homes for hot families, by what the agents say of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forebay_proto::{Family, Now};
use forebay_scheduler::homes::table::Table;
use forebay_scheduler::homes::{Said, assign};

use super::worker::Worker;

/// Between two looks of the leader.
pub(super) const EVERY: Duration = Duration::from_secs(10);

/// The families that are agreed on.
#[derive(Default)]
pub(super) struct Homes {
    families: BTreeMap<u64, Family>,
}

impl Homes {
    /// Gives and takes homes by what the workers say now. Returns the table for balancers.
    pub(super) fn assign(&mut self, now: Now, workers: &[Worker]) -> Arc<Table> {
        let said: Vec<Said> = workers
            .iter()
            .filter(|worker| worker.alive)
            .map(|worker| Said {
                worker: worker.incarnation().worker,
                pool: "default".into(),
                ready: worker.core.acceptance() == forebay_scheduler::Acceptance::Open,
                heat: Some(worker.core.heat(now)),
            })
            .collect();
        let changes = assign(&self.families, &said);
        for chunk in changes.remove {
            self.families.remove(&chunk);
        }
        for family in changes.put {
            self.families.insert(family.chunk, family);
        }
        Arc::new(Table::new(self.families.values()))
    }

    pub(super) fn len(&self) -> usize {
        self.families.len()
    }
}
