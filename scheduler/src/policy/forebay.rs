//! The rule of this project: keep what was promised, then take the least predicted time to first token
//! plus a little for what the placement does to others.
//!
//! Feasible are workers where the 0.95 quantile of the time to first token and the time from token to
//! token stay within the request's targets and the KV cache suffices; where there is one, no other is
//! chosen. Among them, or among all where there is none, the least `J = TTFT̂₀.₅ + η·X + E + χ`
//! ([`Terms`]): `X` the prefill of what the worker does not hold times the requests that are there,
//! `E` the expected prefill of what is evicted for it, `χ` what a worker costs that may be dead. That
//! sum covers published rules (Mooncake's with η = 0, LMetric's product as the pure externality); a
//! small η held the tail in simulations, 0.5 and more lost it.
//!
//! Near-ties, within what the view's age makes meaningless, go by the rendezvous hash of the
//! conversation, so that balancers which see different things still keep a conversation together.

use std::time::Duration;

use super::{Candidate, Field, Policy, Request, Rule, Score, each};
use crate::model::Targets;
use crate::terms::Terms;

/// Weight of the delay inflicted on others.
pub(crate) const ETA: f64 = 0.05;
/// A view this old says nothing about differences below [`FLOOR_MS`] and [`SHARE`].
const STALE: Duration = Duration::from_millis(250);
const FLOOR_MS: f64 = 10.0;
const SHARE: f64 = 0.1;

pub(super) struct Forebay;

impl Policy for Forebay {
    fn name(&self) -> &'static str {
        "forebay"
    }

    fn scores(
        &self,
        request: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        each(candidates, scores, |one| rule(&one.terms, &request.targets));
    }

    fn tolerance(&self, best: Score, age: Duration) -> f64 {
        let stale = (age.as_secs_f64() / STALE.as_secs_f64()).min(1.0);
        (FLOOR_MS + SHARE * best.first) * stale
    }

    fn predicts(&self) -> bool {
        true
    }

    fn rule(&self) -> Option<Rule> {
        Some(rule)
    }
}

fn rule(terms: &Terms, targets: &Targets) -> Score {
    let others = ETA * terms.imposed_ms + terms.evicted_ms;
    Score {
        tier: u32::from(!terms.feasible(targets)),
        first: terms.ttft_p50_ms + others + terms.risk_ms,
        // In tenths: less is no reason.
        second: (terms.occupancy * 10.0).floor(),
    }
}
