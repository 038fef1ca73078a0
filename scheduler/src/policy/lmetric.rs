//! Baseline: LMetric (arXiv 2603.15202): the least product of what would have to be prefilled and the
//! batch. No constants.
//!
//! Prefill tokens queued there count too (without them the rule collapses under bursts), and the batch
//! includes the request, so that an idle worker does not make everything nothing.

use super::{Candidate, Field, Policy, Request, Score, each};

pub(super) struct Lmetric;

impl Policy for Lmetric {
    fn name(&self) -> &'static str {
        "lmetric"
    }

    fn scores(
        &self,
        request: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        each(candidates, scores, |one| {
            let uncached = request.prompt_tokens - one.cached_tokens;
            let prefill = one.backlog.pending_tokens + uncached;
            Score::by(prefill * (one.present() + 1.0), 0.0)
        });
    }
}
