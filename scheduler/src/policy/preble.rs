//! Baseline: E2 of Preble (Srivatsa et al., ICLR 2025): exploit a cached prefix that is longer than the
//! rest of the prompt, else explore the least loaded worker.
//!
//! To exploit: among those with the longest match the least load. To explore: the least sum of load,
//! evictions and own prefill. Load is prefill time of the last three minutes (this balancer's bookings,
//! fading, where theirs is a sliding window of all) and what remains to decode: requests there, times a
//! median output of 45 tokens (the value of AIBrix's port), times the time from token to token. Evictions
//! are the latency model's. Rebalancing and replication, which keep history of their own, are left out.

use super::{Candidate, Field, Policy, Request, Score, each};

const MEDIAN_OUTPUT: f64 = 45.0;

pub(super) struct Preble;

impl Policy for Preble {
    fn name(&self) -> &'static str {
        "preble"
    }

    fn scores(
        &self,
        request: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        let load =
            |one: &Candidate| one.recent_ms + one.present() * MEDIAN_OUTPUT * one.terms.tpot_ms;
        let longest = candidates.iter().map(|one| one.cached_tokens);
        let longest = longest.fold(0.0, f64::max);
        if longest > request.prompt_tokens - longest {
            return each(candidates, scores, |one| {
                Score::by(load(one), 0.0).in_tier(u32::from(one.cached_tokens < longest))
            });
        }
        each(candidates, scores, |one| {
            Score::by(load(one) + one.terms.evicted_ms + one.terms.own_ms, 0.0)
        });
    }
}
