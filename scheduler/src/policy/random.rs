//! Baseline: any worker, all alike (the yardstick of Mitzenmacher 2001).

use super::{Candidate, Field, Policy, Request, Score, each};

pub(super) struct Random;

impl Policy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    /// All are equal, and equals are drawn at random.
    fn scores(
        &self,
        _: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        each(candidates, scores, |_| Score::default());
    }
}
