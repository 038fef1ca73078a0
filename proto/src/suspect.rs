//! Requests that may have killed the engines they ran on, and when that is enough to refuse them.
//!
//! Whoever counts them counts alike: the state machine, balancers that do not wait for it, and those who show it.
//! Suspicion is in thousandths and by worker, the largest of each: so a death that is told twice counts once, one
//! bad worker makes nobody guilty, and what two know of a request can be put together.

use crate::ids::{IdError, WorkerId};
use crate::units::Millis;
use crate::wire::fleet as wire;

/// Suspicion from which a request is refused.
pub const QUARANTINE_AT: u32 = 1_500;
/// Workers that it has to be of.
pub const QUARANTINE_WORKERS: usize = 2;
/// What each time takes off that it ran and nothing died.
pub const CLEARED_BY_A_RUN: u32 = 500;
/// The most that one death counts.
pub const MOST_OF_A_DEATH: u32 = 1_500;
/// How long the newest death is held against a request, and for how long it is refused.
pub const HELD_FOR: Millis = Millis(3_600_000);
/// Workers remembered of one request: those with the largest suspicion.
pub const MAX_DEATHS: usize = 8;
/// Of a tenant's or a model's name, and of a shape.
pub const MAX_SUSPECT_TEXT: usize = 256;

/// A request, by all of what an engine may die of, that was on engines when they died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspect {
    /// Keyed hash of tenant, model, the shape of the parameters and the whole prompt.
    pub key: u64,
    /// Epoch of the fingerprint key that it was made with.
    pub key_epoch: u32,
    /// Whose it is.
    pub tenant: String,
    /// Which model it asked.
    pub model: String,
    /// Which parameters it had, and of what class; no values.
    pub shape: String,
    /// Workers whose engine died under it, ascending.
    pub deaths: Vec<EngineDeath>,
    /// What was taken off since, because it ran and nothing died.
    pub cleared: u32,
    /// Since when it is refused, by cell time.
    pub quarantined_at: Option<Millis>,
}

/// The death of a worker's engine, as far as it is held against one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineDeath {
    /// Whose engine.
    pub worker: WorkerId,
    /// How much, in thousandths.
    pub share: u32,
    /// The newest one there, by cell time.
    pub at: Millis,
}

impl Suspect {
    /// How much it is suspected, in thousandths.
    #[must_use]
    pub fn suspicion(&self) -> u32 {
        let shares = self.deaths.iter().map(|death| death.share);
        shares
            .fold(0_u32, u32::saturating_add)
            .saturating_sub(self.cleared)
    }

    /// Whether it is refused.
    #[must_use]
    pub const fn is_quarantined(&self) -> bool {
        self.quarantined_at.is_some()
    }

    /// When it is forgotten, by cell time.
    #[must_use]
    pub fn until(&self) -> Millis {
        let newest = self.deaths.iter().map(|death| death.at).max();
        let since = self.quarantined_at.or(newest).unwrap_or_default();
        Millis(since.0.saturating_add(HELD_FOR.0))
    }

    /// Holds a death against it, and says whether that changed anything.
    pub fn accuse(&mut self, death: EngineDeath) -> bool {
        let before = self.clone();
        let share = death.share.min(MOST_OF_A_DEATH);
        match self
            .deaths
            .binary_search_by_key(&death.worker, |known| known.worker)
        {
            Ok(at) => {
                let known = &mut self.deaths[at];
                known.share = known.share.max(share);
                known.at = known.at.max(death.at);
            }
            Err(at) => {
                self.deaths.insert(at, EngineDeath { share, ..death });
                if self.deaths.len() > MAX_DEATHS {
                    let least = self.deaths.iter().enumerate();
                    let least = least.min_by_key(|(_, known)| (known.share, known.at));
                    let least = least.map(|(at, _)| at);
                    self.deaths.remove(least.unwrap_or(0));
                }
            }
        }
        if self.suspicion() >= QUARANTINE_AT && self.deaths.len() >= QUARANTINE_WORKERS {
            self.quarantined_at.get_or_insert(death.at);
        }
        *self != before
    }

    /// It ran and nothing died. Who is refused stays so; `true`: nothing is held against it any more.
    pub fn clear(&mut self) -> bool {
        if self.is_quarantined() {
            return false;
        }
        self.cleared = self.cleared.saturating_add(CLEARED_BY_A_RUN);
        self.suspicion() == 0
    }

    /// As it stands on the wire.
    ///
    /// # Errors
    ///
    /// Returns [`IdError`] when it has no key, or nobody's death is held against it.
    pub fn from_wire(wire: wire::Suspect) -> Result<Self, IdError> {
        if wire.key == 0 || wire.deaths.is_empty() || wire.deaths.len() > MAX_DEATHS {
            return Err(IdError::Missing { kind: "suspect" });
        }
        let deaths = wire.deaths.into_iter().map(|death| EngineDeath {
            worker: WorkerId(death.worker),
            share: death.share,
            at: Millis(death.at_ms),
        });
        let mut deaths: Vec<EngineDeath> = deaths.collect();
        deaths.sort_unstable_by_key(|death| death.worker);
        Ok(Self {
            key: wire.key,
            key_epoch: wire.key_epoch,
            tenant: wire.tenant,
            model: wire.model,
            shape: wire.shape,
            deaths,
            cleared: wire.cleared,
            quarantined_at: wire.quarantined_ms.map(Millis),
        })
    }

    /// For the wire.
    #[must_use]
    pub fn to_wire(&self) -> wire::Suspect {
        let deaths = self.deaths.iter().map(|death| wire::EngineDeath {
            worker: death.worker.0,
            share: death.share,
            at_ms: death.at.0,
        });
        wire::Suspect {
            key: self.key,
            key_epoch: self.key_epoch,
            tenant: self.tenant.clone(),
            model: self.model.clone(),
            shape: self.shape.clone(),
            deaths: deaths.collect(),
            cleared: self.cleared,
            quarantined_ms: self.quarantined_at.map(|at| at.0),
        }
    }

    /// Its name as operators see and write it: the key in hexadecimal digits.
    #[must_use]
    pub fn name(&self) -> String {
        suspect_name(self.key)
    }
}

/// The name of the request with this key.
#[must_use]
pub fn suspect_name(key: u64) -> String {
    format!("{key:016x}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn suspect() -> Suspect {
        Suspect {
            key: 7,
            key_epoch: 1,
            tenant: "t".into(),
            model: "m".into(),
            shape: "chat, seed".into(),
            deaths: vec![],
            cleared: 0,
            quarantined_at: None,
        }
    }

    /// Lives through `w1:1000 ok w2:500`: deaths with their shares, and runs without.
    fn lived(story: &str) -> Suspect {
        let mut one = suspect();
        for (turn, step) in story.split_whitespace().enumerate() {
            match step.split_once(':') {
                None => {
                    one.clear();
                }
                Some((worker, share)) => {
                    one.accuse(EngineDeath {
                        worker: worker[1..].parse().map(WorkerId).unwrap(),
                        share: share.parse().unwrap(),
                        at: Millis(turn as u64),
                    });
                }
            }
        }
        one
    }

    fn check(story: &str, suspicion: u32, quarantined: bool) {
        let one = lived(story);
        let found = (one.suspicion(), one.is_quarantined());
        assert_eq!(found, (suspicion, quarantined), "{story}");
    }

    #[test]
    fn one_and_a_half_from_two_workers_is_enough() {
        check("w1:1000", 1_000, false);
        check("w1:1000 w2:1000", 2_000, true);
        check("w1:250 w2:1500", 1_750, true);
        check("w1:250 w2:250", 500, false);
        check("w1:666 w2:666", 1_332, false);
    }

    #[test]
    fn one_bad_worker_makes_nobody_guilty_and_a_death_told_twice_counts_once() {
        check("w1:1000 w1:1000 w1:1500", 1_500, false);
        check("w1:500 w1:500 w2:500", 1_000, false);
        check("w1:900000 w1:1", MOST_OF_A_DEATH, false);
    }

    #[test]
    fn runs_without_a_death_clear_it_until_it_is_quarantined() {
        check("w1:250 ok", 0, false);
        check("w1:1000 ok w2:1000", 1_500, true);
        check("w1:250 ok ok ok w2:1000 w3:400", 150, false);
        check("w1:1000 w2:1000 ok ok ok ok", 2_000, true);
    }

    #[test]
    fn it_is_held_for_an_hour_after_the_newest_death_or_from_the_quarantine_on() {
        assert_eq!(lived("w1:10 w2:10").until(), Millis(1 + HELD_FOR.0));
        let more = lived("w1:1000 w2:1000 w3:1000 w4:1000");
        assert_eq!(more.quarantined_at, Some(Millis(1)));
        assert_eq!(more.until(), Millis(1 + HELD_FOR.0));
    }

    proptest! {
        #[test]
        fn the_order_of_deaths_does_not_matter_and_the_wire_keeps_everything(
            deaths in proptest::collection::vec((1_u32..8, 1_u32..2_000), 1..20)
        ) {
            let accused = |deaths: &mut dyn Iterator<Item = &(u32, u32)>| {
                let mut one = suspect();
                for (worker, share) in deaths {
                    let worker = WorkerId(*worker);
                    one.accuse(EngineDeath { worker, share: *share, at: Millis(5) });
                }
                one
            };
            let one = accused(&mut deaths.iter());
            prop_assert_eq!(&one, &accused(&mut deaths.iter().rev()));
            prop_assert_eq!(&one, &accused(&mut deaths.iter().chain(&deaths)));
            prop_assert_eq!(Suspect::from_wire(one.to_wire()).unwrap(), one);
        }

        #[test]
        fn what_is_remembered_is_bounded(workers in proptest::collection::vec(1_u32..1_000, 1..100)) {
            let mut one = suspect();
            for worker in workers {
                one.accuse(EngineDeath { worker: WorkerId(worker), share: 1, at: Millis(1) });
            }
            prop_assert!(one.deaths.len() <= MAX_DEATHS);
            prop_assert!(one.deaths.is_sorted_by_key(|death| death.worker));
        }
    }
}
