//! Baseline: the worker that holds most of the prompt, then the one with the fewest requests, equals at
//! random (the longest-prefix-match of SGLang's scheduler, Zheng et al. 2024, taken from the batch to
//! the fleet).

use super::{Candidate, Field, Policy, Request, Score, each};

pub(super) struct LongestPrefix;

impl Policy for LongestPrefix {
    fn name(&self) -> &'static str {
        "longest-prefix"
    }

    fn scores(
        &self,
        _: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        each(candidates, scores, |one| {
            Score::by(-one.cached_tokens, one.present())
        });
    }
}
