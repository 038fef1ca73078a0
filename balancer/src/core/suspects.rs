//! What this balancer knows of requests that engines died under: what the cell agreed on, and what it saw itself.
//!
//! A request that kills engines is retried at once, and would kill the next before anybody could agree on anything.
//! So what an agent says of a death is held against its own request here and now; the facts follow, and both are put
//! together worker by worker. What was seen here is forgotten with the fact of the same request, so that an operator
//! who lifts a quarantine lifts this too, and after a while where there never was one.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_proto::suspect::{EngineDeath, HELD_FOR, Suspect};
use forebay_proto::{Millis, Now, WorkerId};

/// Requests that this balancer saw engines die under, and that the facts may not have.
const MOST_SEEN: usize = 1_024;

/// How long what was seen counts where no fact follows.
const SEEN_FOR: Duration = Duration::from_secs(600);

/// What is held against a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Something is.
    pub(crate) suspected: bool,
    /// It is refused.
    pub(crate) quarantined: bool,
}

/// All that is known.
#[derive(Debug, Default)]
pub(crate) struct Suspects {
    agreed: BTreeMap<u64, Suspect>,
    /// The cell's time when that was heard, and when that was.
    cell_time: Millis,
    heard: Now,
    seen: BTreeMap<u64, (Suspect, Now)>,
}

impl Suspects {
    /// Takes the facts over; returns names of requests that are quarantined now and were not before.
    pub(crate) fn agree(
        &mut self,
        now: Now,
        cell_time: Millis,
        suspects: &[Suspect],
    ) -> Vec<Suspect> {
        let next: BTreeMap<u64, Suspect> = suspects
            .iter()
            .map(|suspect| (suspect.key, suspect.clone()))
            .collect();
        for key in self.agreed.keys().filter(|key| !next.contains_key(key)) {
            self.seen.remove(key);
        }
        let was = |key: &u64| self.agreed.get(key).is_some_and(Suspect::is_quarantined);
        let fresh = next.values().filter(|suspect| suspect.is_quarantined());
        let fresh = fresh
            .filter(|suspect| !was(&suspect.key))
            .cloned()
            .collect();
        self.agreed = next;
        self.cell_time = cell_time;
        self.heard = now;
        fresh
    }

    /// An engine died under this request; `named` is how it is known.
    pub(crate) fn saw(&mut self, now: Now, named: &Suspect, worker: WorkerId, share: u32) {
        self.seen
            .retain(|_, (_, newest)| now.since(*newest) < SEEN_FOR);
        if self.seen.len() >= MOST_SEEN && !self.seen.contains_key(&named.key) {
            let oldest = self.seen.iter().min_by_key(|(_, (_, newest))| *newest);
            if let Some(key) = oldest.map(|(key, _)| *key) {
                self.seen.remove(&key);
            }
        }
        let (suspect, newest) = self
            .seen
            .entry(named.key)
            .or_insert_with(|| (named.clone(), now));
        *newest = now;
        suspect.accuse(EngineDeath {
            worker,
            share,
            at: Millis::from_duration(now.since(Now::default())),
        });
    }

    /// It ran and nothing died.
    pub(crate) fn ran_well(&mut self, key: u64) {
        if self
            .seen
            .get_mut(&key)
            .is_some_and(|(seen, _)| seen.clear())
        {
            self.seen.remove(&key);
        }
    }

    /// What is held against the request with this key.
    pub(crate) fn verdict(&self, now: Now, key: u64) -> Verdict {
        let gone = now.since(self.heard).as_millis();
        let cell_time = Millis(
            self.cell_time
                .0
                .saturating_add(u64::try_from(gone).unwrap_or(u64::MAX)),
        );
        let agreed = self
            .agreed
            .get(&key)
            .filter(|agreed| cell_time < agreed.until());
        let seen = self.seen.get(&key).map(|(seen, newest)| (seen, *newest));
        let seen = seen.filter(|(_, newest)| now.since(*newest) < SEEN_FOR);
        let both = match (agreed, seen) {
            (None, None) => return Verdict::default(),
            (Some(one), None) => one.clone(),
            (None, Some((one, _))) => one.clone(),
            (Some(agreed), Some((seen, _))) => {
                let mut both = agreed.clone();
                for death in &seen.deaths {
                    both.accuse(*death);
                }
                both
            }
        };
        Verdict {
            suspected: both.suspicion() > 0,
            quarantined: both.is_quarantined(),
        }
    }

    /// Whether nothing is held against anybody.
    pub(crate) fn is_empty(&self) -> bool {
        self.agreed.is_empty() && self.seen.is_empty()
    }

    /// Whether a fact is about a fingerprint key of this epoch.
    pub(crate) fn knows_epoch(&self, epoch: u32) -> bool {
        let mut agreed = self.agreed.values();
        agreed.any(|suspect| suspect.key_epoch == epoch)
            || self.seen.values().any(|(seen, _)| seen.key_epoch == epoch)
    }

    /// Requests that the cell refuses.
    pub(crate) fn quarantined(&self) -> usize {
        let agreed = self.agreed.values();
        agreed.filter(|suspect| suspect.is_quarantined()).count()
    }
}

// Longer than what is agreed would be no use.
const _: () = assert!(SEEN_FOR.as_millis() as u64 <= HELD_FOR.0);

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Now {
        Now::at(Duration::from_secs(seconds))
    }

    fn named(key: u64) -> Suspect {
        Suspect {
            key,
            key_epoch: 3,
            tenant: "t".into(),
            model: "m".into(),
            shape: "seed".into(),
            deaths: vec![],
            cleared: 0,
            quarantined_at: None,
        }
    }

    /// As agreed after deaths of these workers with these shares.
    fn agreed(key: u64, deaths: &[(u32, u32)]) -> Suspect {
        let mut one = named(key);
        for (worker, share) in deaths {
            one.accuse(EngineDeath {
                worker: WorkerId(*worker),
                share: *share,
                at: Millis(1_000),
            });
        }
        one
    }

    fn check(suspects: &Suspects, seconds: u64, key: u64, expected: &str) {
        let Verdict {
            suspected,
            quarantined,
        } = suspects.verdict(at(seconds), key);
        let found = match (suspected, quarantined) {
            (_, true) => "refused",
            (true, false) => "suspected",
            (false, false) => "free",
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn its_own_two_deaths_are_enough_without_any_fact() {
        let mut suspects = Suspects::default();
        check(&suspects, 1, 7, "free");
        suspects.saw(at(1), &named(7), WorkerId(1), 250);
        check(&suspects, 1, 7, "suspected");
        check(&suspects, 1, 8, "free");
        suspects.saw(at(2), &named(7), WorkerId(2), 1_500);
        check(&suspects, 2, 7, "refused");
        assert_eq!(suspects.quarantined(), 0, "the cell has not agreed on it");
    }

    #[test]
    fn what_is_agreed_and_what_was_seen_are_put_together_once_each() {
        let mut suspects = Suspects::default();
        suspects.saw(at(1), &named(7), WorkerId(1), 1_000);
        suspects.agree(at(1), Millis(1_000), &[agreed(7, &[(1, 1_000)])]);
        check(&suspects, 1, 7, "suspected");
        suspects.agree(at(2), Millis(2_000), &[agreed(7, &[(2, 600)])]);
        check(&suspects, 2, 7, "refused");
    }

    #[test]
    fn a_lift_is_believed_at_once() {
        let mut suspects = Suspects::default();
        suspects.saw(at(1), &named(7), WorkerId(1), 1_000);
        suspects.saw(at(1), &named(7), WorkerId(2), 1_000);
        let fresh = suspects.agree(at(2), Millis(1), &[agreed(7, &[(1, 1_000), (2, 1_000)])]);
        assert_eq!(fresh.len(), 1);
        let again = suspects.agree(at(2), Millis(1), &[agreed(7, &[(1, 1_000), (2, 1_000)])]);
        assert_eq!(again, []);
        check(&suspects, 3, 7, "refused");
        assert_eq!(suspects.quarantined(), 1);
        suspects.agree(at(3), Millis(2), &[]);
        check(&suspects, 3, 7, "free");
        assert!(suspects.is_empty());
    }

    #[test]
    fn what_is_agreed_ends_by_the_cells_time_and_what_was_seen_after_a_while() {
        let mut suspects = Suspects::default();
        let told = agreed(7, &[(1, 1_000), (2, 1_000)]);
        suspects.agree(at(0), Millis(1_000), &[told]);
        check(&suspects, 3_599, 7, "refused");
        check(&suspects, 3_600, 7, "free");
        suspects.saw(at(5_000), &named(8), WorkerId(1), 500);
        check(&suspects, 5_599, 8, "suspected");
        check(&suspects, 5_600, 8, "free");
    }

    #[test]
    fn runs_without_a_death_clear_what_was_seen() {
        let mut suspects = Suspects::default();
        suspects.saw(at(1), &named(7), WorkerId(1), 400);
        suspects.ran_well(7);
        check(&suspects, 1, 7, "free");
    }

    #[test]
    fn what_was_seen_is_bounded_and_the_oldest_gives_way() {
        let mut suspects = Suspects::default();
        for key in 1..=MOST_SEEN as u64 + 5 {
            suspects.saw(
                Now::at(Duration::from_millis(key)),
                &named(key),
                WorkerId(1),
                1,
            );
        }
        assert_eq!(suspects.seen.len(), MOST_SEEN);
        assert!(!suspects.seen.contains_key(&5) && suspects.seen.contains_key(&6));
        assert!(suspects.knows_epoch(3) && !suspects.knows_epoch(2));
    }
}
