//! Baseline: the conductor of Mooncake (Qin et al., FAST 2025): the least predicted time to first token,
//! queue and prefill of the part that is not held.
//!
//! The prediction is the worker's latency model, where theirs is a regression fitted offline. Transfers of
//! remote prefixes have no counterpart here, and rejecting early is the caller's.

use super::{Candidate, Field, Policy, Request, Score, each};

pub(super) struct Mooncake;

impl Policy for Mooncake {
    fn name(&self) -> &'static str {
        "mooncake"
    }

    fn scores(
        &self,
        _: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        each(candidates, scores, |one| Score::by(one.terms.ttft_ms, 0.0));
    }
}
