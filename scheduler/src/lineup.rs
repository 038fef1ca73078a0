//! What waits at a worker, by when it has to start: its agent takes least slack first, so what a new
//! request finds before it depends on how much of it is more urgent.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The target of what was promised nothing.
pub const NOMINAL_TARGET: Duration = Duration::from_secs(10);
/// How much later than its first the second target of what is late may be, at most.
const SECOND_CHANCE: Duration = Duration::from_secs(10);
/// And in times what it was promised, or its prefill if that takes longer: who was promised little
/// does not wait as long as who was promised much.
const SECOND_TIMES: f64 = 2.5;

/// From now, in milliseconds.
const EDGES_MS: [f32; 8] = [
    0.0, 250.0, 500.0, 1_000.0, 2_000.0, 4_000.0, 8_000.0, 16_000.0,
];
/// Nothing is assumed to be less urgent.
const LAST_MS: f32 = 32_000.0;
/// More is no time that anything takes.
const MOST_MS: f32 = 1e9;

/// Prefill time of what waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lineup {
    /// Of what has to start up to each of [`EDGES_MS`].
    up_to_ms: [f32; EDGES_MS.len()],
    /// Of everything.
    all_ms: f32,
}

impl Lineup {
    /// All that it holds, to be written.
    pub(crate) fn parts(&self) -> [f32; EDGES_MS.len() + 1] {
        let mut parts = [self.all_ms; EDGES_MS.len() + 1];
        parts[..EDGES_MS.len()].copy_from_slice(&self.up_to_ms);
        parts
    }

    /// As it was written.
    pub(crate) fn of_parts(parts: [f32; EDGES_MS.len() + 1]) -> Self {
        let mut up_to_ms = [0.0; EDGES_MS.len()];
        up_to_ms.copy_from_slice(&parts[..EDGES_MS.len()]);
        Self {
            up_to_ms,
            all_ms: parts[EDGES_MS.len()],
        }
    }

    /// Adds one that has to start in so many milliseconds, and takes so many.
    pub fn add(&mut self, start_in_ms: f64, prefill_ms: f64) {
        #[allow(clippy::cast_possible_truncation)] // seven digits are enough
        let (start_in_ms, prefill_ms) = (start_in_ms as f32, prefill_ms as f32);
        for (edge, up_to) in EDGES_MS.iter().zip(&mut self.up_to_ms) {
            if start_in_ms <= *edge {
                *up_to += prefill_ms;
            }
        }
        self.all_ms += prefill_ms;
    }

    /// Prefill time of what waits and is less urgent than one with this slack.
    #[must_use]
    pub(crate) fn behind_ms(&self, slack_ms: f64) -> f64 {
        if self.all_ms <= 0.0 {
            return 0.0;
        }
        #[allow(clippy::cast_possible_truncation)] // seven digits are enough
        let slack = (slack_ms as f32).clamp(0.0, LAST_MS);
        let next = EDGES_MS.iter().position(|edge| *edge > slack);
        let next = next.unwrap_or(EDGES_MS.len());
        let (from, before) = (EDGES_MS[next - 1], self.up_to_ms[next - 1]);
        let to = EDGES_MS.get(next).copied().unwrap_or(LAST_MS);
        let after = self.up_to_ms.get(next).copied().unwrap_or(self.all_ms);
        let ahead = before + (after - before) * (slack - from) / (to - from);
        f64::from((self.all_ms - ahead).max(0.0))
    }

    /// As a report carries it; empty where nothing waits.
    #[must_use]
    pub(crate) fn to_wire(self) -> Vec<f32> {
        if self.all_ms <= 0.0 {
            return Vec::new();
        }
        let edges = self.up_to_ms.iter().copied();
        edges.chain(std::iter::once(self.all_ms)).collect()
    }

    /// Nothing where it says nothing usable.
    #[must_use]
    pub(crate) fn from_wire(told: &[f32]) -> Self {
        let Some((all_ms, up_to)) = told.split_last() else {
            return Self::default();
        };
        let sane = |ms: &f32| (0.0..=MOST_MS).contains(ms);
        match up_to.try_into() {
            Ok(up_to_ms) if told.iter().all(sane) && told.is_sorted() => Self {
                up_to_ms,
                all_ms: *all_ms,
            },
            _ => Self::default(),
        }
    }
}

/// How much time is left before the prefill of a request has to start, as its agent would order it: what
/// is late gets its second chance.
#[must_use]
pub(crate) fn slack_ms(ttft_target_ms: f64, prefill_ms: f64) -> f64 {
    if ttft_target_ms.is_infinite() {
        return NOMINAL_TARGET.as_secs_f64() * 1e3;
    }
    let slack = ttft_target_ms - prefill_ms;
    if slack < 0.0 {
        slack + second_chance_ms(ttft_target_ms, prefill_ms)
    } else {
        slack
    }
}

/// How long after its first target the second one is, of what takes so long to prefill.
#[must_use]
pub fn second_chance_ms(ttft_target_ms: f64, prefill_ms: f64) -> f64 {
    let most = SECOND_CHANCE.as_secs_f64() * 1e3;
    (SECOND_TIMES * ttft_target_ms.max(prefill_ms)).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lineup(waiting: &[(f64, f64)]) -> Lineup {
        let mut lineup = Lineup::default();
        for (start_in_ms, prefill_ms) in waiting {
            lineup.add(*start_in_ms, *prefill_ms);
        }
        lineup
    }

    #[test]
    fn the_urgent_pass_those_who_have_time() {
        let lineup = lineup(&[(-100.0, 50.0), (900.0, 300.0), (12_000.0, 4_000.0)]);
        assert_eq!(lineup.behind_ms(0.0), 4_300.0);
        assert_eq!(lineup.behind_ms(1_000.0), 4_000.0);
        assert_eq!(lineup.behind_ms(16_000.0), 0.0);
        assert_eq!(lineup.behind_ms(12_000.0), 2_000.0, "in proportion between");
        assert_eq!(lineup.behind_ms(f64::INFINITY), 0.0);
        assert_eq!(Lineup::default().behind_ms(0.0), 0.0);
    }

    #[test]
    fn who_is_late_gets_a_second_chance_and_who_was_promised_nothing_a_nominal_one() {
        assert_eq!(slack_ms(1_500.0, 500.0), 1_000.0);
        assert_eq!(slack_ms(500.0, 600.0), 1_400.0);
        assert_eq!(slack_ms(500.0, 1_500.0), 2_750.0);
        assert_eq!(slack_ms(5_000.0, 6_000.0), 9_000.0);
        assert_eq!(slack_ms(f64::INFINITY, 500.0), 10_000.0);
    }

    proptest! {
        #[test]
        fn it_survives_the_wire_and_more_slack_finds_less_behind_it(
            waiting in proptest::collection::vec((-1e4..4e4, 0.0..1e4), 0..20),
            slacks in proptest::collection::vec(-1e4_f64..5e4, 2),
        ) {
            let lineup = lineup(&waiting);
            prop_assert_eq!(Lineup::from_wire(&lineup.to_wire()), lineup);
            let (least, most) = (slacks[0].min(slacks[1]), slacks[0].max(slacks[1]));
            let (more, less) = (lineup.behind_ms(least), lineup.behind_ms(most));
            prop_assert!(more + 1e-2 >= less && less >= 0.0);
        }

        #[test]
        fn nonsense_is_nothing(told in proptest::collection::vec(any::<f32>(), 0..12)) {
            let _ = Lineup::from_wire(&told).behind_ms(1.0);
        }
    }
}
