//! Baseline: any worker, all alike (the yardstick of Mitzenmacher 2001).

use super::{Candidate, Field, Policy, Request, Score};

pub(super) struct Random;

impl Policy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    /// All are equal, and equals are drawn at random.
    fn score(&self, _: &Request<'_>, _: &Candidate, _: &Field) -> Score {
        Score::default()
    }
}
