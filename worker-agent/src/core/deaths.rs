//! Which requests an engine died under, and how much of that is held against each.
//!
//! A death is not one event. Answers break off one after the other, a process in front of a dead engine answers
//! errors for a while, and only then is nobody there. So whatever breaks first has everything noted that is on the
//! engine, as it is then; what ends well meanwhile is taken off again; and when the engine turns out to be dead, what
//! is left was on it. A death that is explained (the worker drains, the agent stops, or ended an engine that hung)
//! is held against nobody.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use forebay_proto::Now;
use forebay_scheduler::Acceptance;
use forebay_scheduler::blame::{OnEngine, shares};

use super::placement::{End, PlacementId, Stage};
use super::state::Core;

/// What broke longer ago has nothing to do with a death.
const LATELY: Duration = Duration::from_secs(10);
/// What broke so lately and is kept beside what is on the engine. One that fails at once fails thousands a second.
const MOST_VICTIMS: usize = 4_096;
/// Requests that are named of one death, those with the largest share: as many as one command has room for.
const MOST_ACCUSED: usize = 256;
/// Deaths and runs that are waiting to be told; more are forgotten, the oldest first.
const MOST_DEATHS: usize = 16;
const MOST_CLEARED: usize = 256;

/// A request by all of what an engine may die of. No text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Keyed hash of tenant, model, shape and whole prompt.
    pub key: u64,
    /// Epoch of the key that it was made with.
    pub key_epoch: u32,
    /// Whose it is.
    pub tenant: String,
    /// Which model it asks.
    pub model: String,
    /// Which parameters it has.
    pub shape: String,
    /// Something is held against it.
    pub suspected: bool,
}

/// A death of the engine that nobody can explain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineDeath {
    /// Requests that were on it.
    pub in_flight: u32,
    /// Those of them that have a name, with what is held against each in thousandths.
    pub accused: Vec<(Named, u32)>,
}

#[derive(Clone, Debug)]
struct Victim {
    noted: Now,
    named: Option<Named>,
    on_engine: OnEngine,
}

/// What was noted.
#[derive(Debug, Default)]
pub(super) struct Deaths {
    /// Of the present engine, noted in [`LATELY`]: at most [`MOST_VICTIMS`], and what was on it at once.
    victims: BTreeMap<PlacementId, Victim>,
    /// Of the last death.
    shares: BTreeMap<PlacementId, u32>,
    untold: VecDeque<EngineDeath>,
    /// Suspects that ran well.
    cleared: BTreeSet<u64>,
    /// Deaths so far, explained ones left out.
    count: u64,
}

impl Core {
    /// The engine broke off in this one: notes what is on it.
    pub fn broke_off(&mut self, now: Now, id: PlacementId) {
        if self.deaths.shares.contains_key(&id) {
            return;
        }
        let victims = &mut self.deaths.victims;
        victims.retain(|_, victim| now.since(victim.noted) < LATELY);
        if victims.len() > MOST_VICTIMS {
            // What is on it is to blame rather than what was.
            victims.clear();
        }
        for (id, placement) in &self.placements {
            let prefilling = match placement.stage {
                Stage::Queued => continue,
                Stage::Dispatched { .. } => true,
                Stage::Streaming { .. } => false,
            };
            let named = placement.named.clone();
            let victim = Victim {
                noted: now,
                on_engine: OnEngine {
                    prefilling,
                    suspected: named.as_ref().is_some_and(|named| named.suspected),
                },
                named,
            };
            victims.insert(*id, victim);
        }
    }

    /// The engine is gone. What was on it shares the blame, unless it is known why.
    pub fn engine_died(&mut self, now: Now) {
        let mut victims = std::mem::take(&mut self.deaths.victims);
        victims.retain(|_, victim| now.since(victim.noted) < LATELY);
        if victims.is_empty() || self.explains_death() {
            return;
        }
        let on_engine: Vec<OnEngine> = victims.values().map(|victim| victim.on_engine).collect();
        let shares = shares(&on_engine);
        self.deaths.shares = victims
            .keys()
            .copied()
            .zip(shares.iter().copied())
            .collect();
        self.deaths.count += 1;
        let named = victims.into_values().map(|victim| victim.named);
        let accused = named.zip(shares);
        let accused = accused.filter_map(|(named, share)| Some((named?, share)));
        let mut accused: Vec<_> = accused.collect();
        accused.sort_by_key(|(named, share)| (std::cmp::Reverse(*share), named.key));
        // Of one that was there twice the larger share counts.
        let mut seen = BTreeSet::new();
        accused.retain(|(named, _)| seen.insert(named.key));
        accused.truncate(MOST_ACCUSED);
        self.deaths.untold.push_back(EngineDeath {
            in_flight: u32::try_from(on_engine.len()).unwrap_or(u32::MAX),
            accused,
        });
        if self.deaths.untold.len() > MOST_DEATHS {
            self.deaths.untold.pop_front();
        }
    }

    /// What is held against this one of the last death; `None`: the engine did not die under it, as far as is known.
    #[must_use]
    pub fn share_of(&self, id: PlacementId) -> Option<u32> {
        self.deaths.shares.get(&id).copied()
    }

    /// The oldest death that nobody was told of yet.
    #[must_use]
    pub fn untold_death(&self) -> Option<&EngineDeath> {
        self.deaths.untold.front()
    }

    /// This death was told.
    pub fn told_of(&mut self, death: &EngineDeath) {
        self.deaths.untold.retain(|untold| untold != death);
    }

    /// Suspects that ran well, of which nobody was told yet.
    pub fn take_cleared(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.deaths.cleared)
            .into_iter()
            .collect()
    }

    /// Unexplained deaths so far.
    #[must_use]
    pub const fn engine_deaths(&self) -> u64 {
        self.deaths.count
    }

    /// A placement is over: what ended well is no victim of what follows.
    pub(super) fn over_for_deaths(&mut self, id: PlacementId, named: Option<&Named>, end: End) {
        match end {
            End::EngineFailed => {}
            End::Complete => {
                self.deaths.victims.remove(&id);
                if let Some(named) = named.filter(|named| named.suspected)
                    && self.deaths.cleared.len() < MOST_CLEARED
                {
                    self.deaths.cleared.insert(named.key);
                }
            }
            End::NotStarted | End::Timeout | End::Cancelled | End::Drained => {
                self.deaths.victims.remove(&id);
            }
        }
    }

    /// It drains, or stops, or an operator took it out of service: engines are ended then.
    fn explains_death(&self) -> bool {
        match self.acceptance() {
            Acceptance::Open | Acceptance::EngineDown => false,
            Acceptance::Cordoned | Acceptance::Draining | Acceptance::Joining => true,
        }
    }
}

#[cfg(test)]
#[path = "deaths_tests.rs"]
mod tests;
