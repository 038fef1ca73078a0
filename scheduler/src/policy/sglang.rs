//! Baseline: the cache-aware rule of SGLang's router (flags and code of `sglang-router`, Zheng et al.
//! 2024 for the idea), with its defaults.
//!
//! Where the fleet is out of balance (most and fewest requests more than 32 apart and in a ratio of more
//! than 1.0001), the fewest requests. Else the longest match, if it covers more than half of the prompt,
//! and without one the smallest tree. Its tree is what the router itself inserted; here matches are of
//! the shared index, and the size of a worker's tree is taken to be the prefill time that this balancer
//! booked on it lately: each booked token that was not held is one that the tree grew by.

use super::{Candidate, Field, Policy, Request, Score, each, least_and_most};

const APART: f64 = 32.0;
const RATIO: f64 = 1.0001;
const MATCH: f64 = 0.5;

pub(super) struct Sglang;

impl Policy for Sglang {
    fn name(&self) -> &'static str {
        "sglang"
    }

    fn scores(
        &self,
        request: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        let (least, most) = least_and_most(candidates);
        if most - least > APART && most > RATIO * least {
            return each(candidates, scores, |one| Score::by(one.present(), 0.0));
        }
        let longest = candidates.iter().map(|one| one.cached_tokens);
        let longest = longest.fold(0.0, f64::max);
        if longest > MATCH * request.prompt_tokens {
            return each(candidates, scores, |one| Score::by(-one.cached_tokens, 0.0));
        }
        each(candidates, scores, |one| {
            Score::by(one.recent_ms, one.present())
        });
    }
}
