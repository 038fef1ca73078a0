//! Baseline: the dispatch rule of Llumnix (Sun et al., OSDI 2024): the most freeness,
//! `(capacity − virtual usage) ÷ batch`.
//!
//! Virtual usage is what decodes attend to and what is queued, in tokens. Capacity is the worker's KV
//! cache, or [`ASSUMED_KV_TOKENS`] where that is not known. Migration, from which the paper gains most, is
//! an engine's and left out.

use super::{Candidate, Field, Policy, Request, Score, each};

/// The KV cache of the default profile, Llama-70B on four H100, in tokens.
const ASSUMED_KV_TOKENS: f64 = 459_000.0;

pub(super) struct Llumnix;

impl Policy for Llumnix {
    fn name(&self) -> &'static str {
        "llumnix"
    }

    fn scores(
        &self,
        _: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        each(candidates, scores, |one| {
            let known = one.kv_tokens > 0.0;
            let capacity = if known {
                one.kv_tokens
            } else {
                ASSUMED_KV_TOKENS
            };
            let usage = one.backlog.context_tokens + one.backlog.pending_tokens;
            Score::by(-(capacity - usage) / one.present().max(1.0), 0.0)
        });
    }
}
