//! The capacity guard: whether the others can carry the load when some workers take no more.
//!
//! Judged in `apply`, one command whole, so that two operators cannot race each other past it. How busy
//! workers are comes as the leader's evidence: what their agents said with their last renewals.

use std::collections::{BTreeMap, BTreeSet};

use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Millis, WorkerId};
use wire::{Desired, Observed};

use super::proposal::fresh;
use super::{EVIDENCE_LIMIT, Fleet, Worker};
use crate::bug::{Bug, on};
use crate::probe::{Probe, hit};

/// Slots that are left have to be this many fifths of the requests in flight.
const HEADROOM_FIFTHS: u64 = 6;

impl Fleet {
    /// Refuses to take these workers away from a model that needs them, pool by pool.
    ///
    /// At least one worker that is wanted stays with every model; and where one that serves leaves, the
    /// slots of those that still do have to be a fifth more than the requests in flight.
    pub(super) fn check_capacity(
        &self,
        leaving: &BTreeSet<WorkerId>,
        evidence: Option<&wire::Evidence>,
    ) -> Result<(), Refusal> {
        if on(Bug::CapacityGuardOff) {
            return Ok(());
        }
        let mut loads = None;
        let leaves = |worker: &Worker| leaving.contains(&worker.id);
        let taken = self.workers.values();
        let taken = taken.filter(|worker| leaves(worker) && worker.desired == Desired::Ready);
        let models: BTreeSet<(&str, &str)> = taken
            .flat_map(|worker| {
                let models = worker.spec.models.iter();
                models.map(|model| (worker.spec.pool.as_str(), model.as_str()))
            })
            .collect();
        for (pool, model) in models {
            let of_model: Vec<&Worker> = self
                .workers
                .values()
                .filter(|worker| worker.spec.pool == pool && worker.spec.serves(model))
                .collect();
            let wanted_stay = of_model
                .iter()
                .any(|worker| worker.desired == Desired::Ready && !leaves(worker));
            let ready = of_model.iter().filter(|worker| worker.is_ready());
            let (gone, left): (Vec<&Worker>, Vec<&Worker>) =
                ready.partition(|worker| leaves(worker));
            if wanted_stay && gone.is_empty() {
                continue;
            }
            let loads = match &loads {
                Some(loads) => loads,
                None => loads.insert(busy(evidence)?),
            };
            if wanted_stay
                && let Some(unheard) = gone
                    .iter()
                    .chain(&left)
                    .find(|worker| !loads.contains_key(&worker.id))
            {
                return Err(Refusal::CapacityUnknown {
                    worker: unheard.name.clone(),
                    pool: pool.into(),
                });
            }
            let in_flight: u64 = of_model
                .iter()
                .filter(|worker| !worker.departed)
                .filter_map(|worker| loads.get(&worker.id))
                .sum();
            let slots_left = left.iter().map(|worker| u64::from(worker.spec.slots)).sum();
            let slots_needed = (in_flight * HEADROOM_FIFTHS).div_ceil(5).max(1);
            if wanted_stay && slots_left >= slots_needed {
                continue;
            }
            hit(if wanted_stay {
                Probe::CapacityShort
            } else {
                Probe::LeavesModelEmpty
            });
            return Err(Refusal::CapacityShort {
                model: model.into(),
                pool: pool.into(),
                workers_left: u32::try_from(left.len()).unwrap_or(u32::MAX),
                slots_left,
                slots_needed,
                in_flight,
            });
        }
        Ok(())
    }
}

impl Worker {
    /// Whether it takes requests, by all that is agreed.
    pub(super) fn is_ready(&self) -> bool {
        self.serves() && self.observed == Observed::Ready
    }
}

/// Requests in flight, of the workers that were heard lately.
fn busy(evidence: Option<&wire::Evidence>) -> Result<BTreeMap<WorkerId, u64>, Refusal> {
    let evidence = fresh(evidence)?;
    let heard = evidence.loads.iter().filter(|load| {
        Millis(u64::from(load.age_ms) + u64::from(evidence.age_ms)) <= EVIDENCE_LIMIT
    });
    Ok(heard
        .map(|load| (WorkerId(load.worker), load.in_flight.into()))
        .collect())
}
