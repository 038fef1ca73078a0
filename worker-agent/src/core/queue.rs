//! Who waits, and who of them is next: least slack first.
//!
//! Slack is what is left until the first token is due, less the time that its prefill takes. It shrinks
//! alike for all who wait, so each is ordered once, by the moment at which its prefill has to start.
//! What was promised no first token stands as if it were due [`NOMINAL_TARGET`] after its arrival: first
//! come, first served, behind those that were promised one soon.
//!
//! Who has not started by then is late, whatever is done. In front it would only make those behind it
//! late too, at the back it would starve: it gets one second target, [`second_chance_ms`] after the first,
//! and competes with that again. Past that it is the most urgent there is, by age: nothing waits for
//! longer than the second target and those that are as late.

use std::collections::{BTreeMap, BTreeSet};

use forebay_proto::Now;
use forebay_scheduler::{Lineup, NOMINAL_TARGET, second_chance_ms};

use super::placement::PlacementId;

/// Who is told apart in a report; those behind count as the least urgent.
const MOST_TOLD: usize = 512;

/// Later than any time that is told to anybody.
const LAST: i64 = i64::MAX / 2;

/// Until when a prefill has to start. In microseconds: it may lie before the clock's zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct StartBy {
    micros: i64,
    /// After that.
    second: Option<i64>,
    prefill_ms: f64,
}

impl StartBy {
    /// Of a request that arrives with this target, in milliseconds, and takes so long to prefill.
    pub(super) fn new(arrived: Now, ttft_ms: f64, prefill_ms: f64) -> Self {
        if ttft_ms.is_infinite() {
            return Self {
                micros: micros(arrived + NOMINAL_TARGET),
                second: None,
                prefill_ms,
            };
        }
        let after = |target_ms: f64| micros(arrived).saturating_add(whole(target_ms - prefill_ms));
        let second_ms = second_chance_ms(ttft_ms, prefill_ms);
        Self {
            micros: after(ttft_ms),
            second: Some(after(ttft_ms + second_ms)),
            prefill_ms,
        }
    }
}

impl StartBy {
    /// Of what gives way to everything.
    pub(super) const fn last(prefill_ms: f64) -> Self {
        Self {
            micros: LAST,
            second: None,
            prefill_ms,
        }
    }
}

fn micros(at: Now) -> i64 {
    i64::try_from(at.since(Now::default()).as_micros()).unwrap_or(i64::MAX)
}

#[allow(clippy::cast_possible_truncation)] // it saturates
fn whole(ms: f64) -> i64 {
    (ms * 1e3) as i64
}

/// One that waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) id: PlacementId,
    pub(super) start_by: StartBy,
    /// The client's.
    pub(super) deadline: Now,
    /// What its prefill adds to the backlog.
    pub(super) tokens: f64,
    pub(super) pairs: f64,
}

/// What is known of one without its placement.
#[derive(Clone, Copy, Debug)]
struct Place {
    prefill_ms: f64,
    /// Where it goes when it is late; none: it was there, or never will be.
    second: Option<i64>,
}

/// Who waits. Bounded by who may be admitted.
#[derive(Debug, Default)]
pub(super) struct Queue {
    by_urgency: BTreeMap<(i64, PlacementId), Place>,
    by_deadline: BTreeSet<(Now, PlacementId)>,
    /// Of their prefills.
    pub(super) tokens: f64,
    pub(super) pairs: f64,
    prefill_ms: f64,
    /// How many took their second place so far.
    pub(super) late: u64,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.by_urgency.len()
    }

    pub(super) fn push(&mut self, one: &Waiting) {
        let StartBy {
            micros,
            second,
            prefill_ms,
        } = one.start_by;
        let place = Place { prefill_ms, second };
        self.by_urgency.insert((micros, one.id), place);
        self.by_deadline.insert((one.deadline, one.id));
        self.tokens += one.tokens;
        self.pairs += one.pairs;
        self.prefill_ms += prefill_ms;
    }

    /// It waits no more.
    pub(super) fn remove(&mut self, one: &Waiting) {
        let StartBy { micros, second, .. } = one.start_by;
        let first = self.by_urgency.remove(&(micros, one.id));
        let held = first.or_else(|| self.by_urgency.remove(&(second?, one.id)));
        assert!(held.is_some(), "who leaves the queue was in it");
        self.by_deadline.remove(&(one.deadline, one.id));
        self.tokens -= one.tokens;
        self.pairs -= one.pairs;
        self.prefill_ms -= one.start_by.prefill_ms;
        if self.by_urgency.is_empty() {
            (self.tokens, self.pairs, self.prefill_ms) = (0.0, 0.0, 0.0);
        }
    }

    /// Who is next. Those in front that are late by now take their second place; `start_by` tells it.
    pub(super) fn next(
        &mut self,
        now: Now,
        start_by: impl Fn(PlacementId) -> StartBy,
    ) -> Option<PlacementId> {
        loop {
            let (&(place, id), held) = self.by_urgency.first_key_value()?;
            let prefill_ms = held.prefill_ms;
            let StartBy {
                micros: first,
                second,
                ..
            } = start_by(id);
            match second {
                Some(second) if place == first && place < micros(now) && second > first => {
                    self.by_urgency.remove(&(place, id));
                    let place = Place {
                        prefill_ms,
                        second: None,
                    };
                    self.by_urgency.insert((second, id), place);
                    self.late += 1;
                }
                _ => return Some(id),
            }
        }
    }

    /// What is before a new one, by its urgency.
    pub(super) fn lineup(&self, now: Now) -> Lineup {
        let (mut lineup, now) = (Lineup::default(), micros(now));
        let mut rest_ms = self.prefill_ms;
        for ((start_by, _), place) in self.by_urgency.iter().take(MOST_TOLD) {
            let start_by = match place.second {
                Some(second) if *start_by < now => second,
                _ => *start_by,
            };
            lineup.add((start_by - now) as f64 / 1e3, place.prefill_ms);
            rest_ms -= place.prefill_ms;
        }
        if self.by_urgency.len() > MOST_TOLD {
            lineup.add(f64::INFINITY, rest_ms.max(0.0));
        }
        lineup
    }

    /// The client's deadline that passes next, and whose it is.
    pub(super) fn first_deadline(&self) -> Option<(Now, PlacementId)> {
        self.by_deadline.first().copied()
    }

    /// Who waits for the longest before it would start.
    pub(super) fn last(&self) -> Option<PlacementId> {
        let last = self.by_urgency.last_key_value();
        last.map(|((_, id), _)| *id)
    }
}
