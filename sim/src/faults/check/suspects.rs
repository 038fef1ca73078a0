//! Who is quarantined was on engines of two workers when they died, with enough held against it; nothing that is held
//! against a request is lost before its time, on any node; and there are no more of them than fit.

use std::collections::BTreeMap;

use forebay_consensus::fleet::MAX_SUSPECTS;
use forebay_proto::Millis;
use forebay_proto::suspect::{QUARANTINE_AT, QUARANTINE_WORKERS, Suspect};
use forebay_proto::wire::fleet as wire;
use wire::change::Change;

use super::{Held, Violation};

const NAME: &str = "suspects-are-kept";

#[derive(Default)]
pub(crate) struct Suspects {
    /// As of which revision, by key.
    known: BTreeMap<u64, (u64, Suspect)>,
    /// How often one was quarantined.
    pub(crate) quarantined: u64,
}

fn broken(detail: String) -> Held {
    Err(Violation::new(NAME, detail))
}

impl Suspects {
    /// A delta that was agreed on, in order.
    pub(crate) fn delta(&mut self, delta: &wire::Delta) -> Held {
        for change in &delta.changes {
            let Some(Change::Suspects(changes)) = &change.change else {
                continue;
            };
            for key in &changes.removed {
                let was = self.known.remove(key).map(|(_, was)| was);
                // Nobody lifts anything here, and what ran well is told of none.
                let early = was.filter(|was| Millis(delta.cell_time_ms) < was.until());
                if let Some(early) = early {
                    return broken(format!("{early:?} is forgotten at r{}", delta.revision));
                }
            }
            for put in &changes.put {
                self.put(delta.revision, put)?;
            }
        }
        if self.known.len() > MAX_SUSPECTS {
            return broken(format!("{} suspects", self.known.len()));
        }
        Ok(())
    }

    fn put(&mut self, revision: u64, put: &wire::Suspect) -> Held {
        let Ok(now) = Suspect::from_wire(put.clone()) else {
            return broken(format!("{put:?} is none"));
        };
        let was = self.known.get(&now.key).map(|(_, was)| was);
        let kept = was.is_none_or(|was| {
            let held = |death: &forebay_proto::suspect::EngineDeath| {
                let mut deaths = now.deaths.iter();
                deaths.any(|one| one.worker == death.worker && one.share >= death.share)
            };
            was.deaths.iter().all(held) && now.is_quarantined() >= was.is_quarantined()
        });
        let enough = now.suspicion() >= QUARANTINE_AT && now.deaths.len() >= QUARANTINE_WORKERS;
        if !kept || enough != now.is_quarantined() {
            return broken(format!("{was:?} became {now:?} at r{revision}"));
        }
        let before = was.is_some_and(Suspect::is_quarantined);
        self.quarantined += u64::from(now.is_quarantined() && !before);
        self.known.insert(now.key, (revision, now));
        Ok(())
    }

    /// What a node holds after a batch.
    pub(crate) fn held(&self, facts: &wire::Facts) -> Held {
        for (revision, known) in self.known.values() {
            let held = facts.suspects.iter().any(|held| held.key == known.key);
            if facts.revision >= *revision && !held {
                return broken(format!(
                    "{known:?} is not in the facts at r{}",
                    facts.revision
                ));
            }
        }
        Ok(())
    }
}
