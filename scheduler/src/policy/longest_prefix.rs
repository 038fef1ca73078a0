//! Baseline: the worker that holds most of the prompt, then the one with the fewest requests, equals at
//! random (the longest-prefix-match of SGLang's scheduler, Zheng et al. 2024, taken from the batch to
//! the fleet).

use super::{Candidate, Field, Policy, Request, Score};

pub(super) struct LongestPrefix;

impl Policy for LongestPrefix {
    fn name(&self) -> &'static str {
        "longest-prefix"
    }

    fn score(&self, _: &Request<'_>, candidate: &Candidate, _: &Field) -> Score {
        Score {
            first: -candidate.cached_tokens,
            second: candidate.queueing.present.into(),
        }
    }
}
