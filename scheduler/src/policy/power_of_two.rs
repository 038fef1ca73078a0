//! Baseline: of two random workers the one with fewer requests (Mitzenmacher 2001).

use super::{Candidate, Field, Policy, Request, Score};

pub(super) struct PowerOfTwo;

impl Policy for PowerOfTwo {
    fn name(&self) -> &'static str {
        "power-of-two"
    }

    fn score(&self, _: &Request<'_>, candidate: &Candidate, field: &Field) -> Score {
        let candidates = field.candidates as u64;
        let one = field.draws[0] % candidates.max(1);
        // Another one, where there is one.
        let other = match candidates {
            0 | 1 => one,
            _ => (one + 1 + field.draws[1] % (candidates - 1)) % candidates,
        };
        let place = candidate.place as u64;
        let drawn = place == one || place == other;
        Score {
            first: if drawn { 0.0 } else { 1.0 },
            second: candidate.queueing.present.into(),
        }
    }
}
