//! Baseline: the default selector of NVIDIA Dynamo's KV router (documentation and `dynamo-kv-router`
//! 1.6): blocks to prefill, with an overlap credit of 1, plus active decode blocks; the least is taken
//! (temperature 0), equals at random.
//!
//! Blocks have 16 tokens. What is to be prefilled and what decodes attend to are the view's.

use super::{Candidate, Field, Policy, Request, Score, each};

const OVERLAP_WEIGHT: f64 = 1.0;
const BLOCK: f64 = 16.0;

pub(super) struct Dynamo;

impl Policy for Dynamo {
    fn name(&self) -> &'static str {
        "dynamo"
    }

    fn scores(
        &self,
        request: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        each(candidates, scores, |one| {
            let overlap = OVERLAP_WEIGHT * (one.cached_tokens / BLOCK).floor();
            let prefill = (one.backlog.pending_tokens + request.prompt_tokens) / BLOCK;
            let decode = one.backlog.context_tokens / BLOCK;
            Score::by((prefill - overlap).max(0.0) + decode, 0.0)
        });
    }
}
