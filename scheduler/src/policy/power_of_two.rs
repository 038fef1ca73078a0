//! Baseline: of two random workers the one with fewer requests (Mitzenmacher 2001).

use super::{Candidate, Field, Policy, Request, Score, each};

pub(super) struct PowerOfTwo;

impl Policy for PowerOfTwo {
    fn name(&self) -> &'static str {
        "power-of-two"
    }

    fn scores(
        &self,
        _: &Request<'_>,
        candidates: &[Candidate],
        field: &Field,
        scores: &mut Vec<Score>,
    ) {
        let workers = candidates.len() as u64;
        let one = field.draws[0] % workers.max(1);
        // Another one, where there is one.
        let other = match workers {
            0 | 1 => one,
            _ => (one + 1 + field.draws[1] % (workers - 1)) % workers,
        };
        each(candidates, scores, |candidate| {
            let place = candidate.place as u64;
            let drawn = place == one || place == other;
            Score::by(0.0, candidate.present()).in_tier(u32::from(!drawn))
        });
    }
}
