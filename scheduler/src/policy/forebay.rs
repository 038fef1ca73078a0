//! The rule of this project, without its veto: the least predicted time to first token, plus a little
//! for the delay that the prefill inflicts on those who are there already.
//!
//! `J = TTFT̂ + η·X`: `TTFT̂` by the worker's latency model behind its backlog, with what it holds of the
//! prompt; `X` the prefill time of the rest times the requests that are there, decoding or waiting.
//! That sum covers the published rules (min-TTFT of Mooncake with η = 0, LMetric's product as the pure
//! externality); a small η held the tail in simulations, 0.5 and more lost it.
//!
//! Near-ties, within what the view's age makes meaningless, go by the rendezvous hash of the
//! conversation, so that balancers which see different things still keep a conversation together.

use std::time::Duration;

use super::{Candidate, Field, Policy, Request, Score};
use crate::model::attention_pairs;

/// Weight of the delay inflicted on others.
const ETA: f64 = 0.05;
/// A view this old says nothing about differences below [`FLOOR_MS`] and [`SHARE`].
const STALE: Duration = Duration::from_millis(250);
const FLOOR_MS: f64 = 10.0;
const SHARE: f64 = 0.1;

pub(super) struct Forebay;

impl Policy for Forebay {
    fn name(&self) -> &'static str {
        "forebay"
    }

    fn score(&self, request: &Request<'_>, candidate: &Candidate, _: &Field) -> Score {
        let Candidate {
            cached_tokens,
            backlog,
            profile,
            queueing,
            ..
        } = candidate;
        let uncached = request.prompt_tokens - cached_tokens;
        let slot = queueing.wait().as_secs_f64() * 1e3;
        let ttft = slot + profile.ttft_ms(backlog, *cached_tokens, uncached);
        let own = profile.token_ms * uncached
            + profile.pair_ms * attention_pairs(*cached_tokens, uncached);
        Score {
            first: ttft + ETA * own * f64::from(queueing.present),
            // In tenths: less is no reason.
            second: (u64::from(queueing.present) * 10 / u64::from(queueing.slots.max(1))) as f64,
        }
    }

    fn tolerance(&self, best: Score, age: Duration) -> f64 {
        let stale = (age.as_secs_f64() / STALE.as_secs_f64()).min(1.0);
        (FLOOR_MS + SHARE * best.first) * stale
    }

    fn predicts(&self) -> bool {
        true
    }
}
