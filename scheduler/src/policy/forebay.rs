//! The rule of this project: keep what was promised, then take the least predicted time to first token
//! plus a little for what the placement does to others.
//!
//! Feasible are workers where the 0.95 quantile of the time to first token and the time from token to
//! token stay within the request's targets and the KV cache suffices; where there is one, no other is
//! chosen. Among them the least `J = TTFT̂₀.₅ + c·P + η·X + E + χ` ([`Terms`]): `P` the prefill of what
//! the worker does not hold, which the whole fleet has to make good for; `X` that times the requests
//! that are there; `E` the expected prefill of what is evicted for it, `χ` what a worker costs that may
//! be dead. With `c` = η = 0 that is Mooncake's rule, the pure externality is LMetric's product; a small
//! η held the tail in simulations, 0.5 and more lost it.
//!
//! Where nothing is feasible the request will be late, and what is left is to do the least harm: the wait
//! counts half.
//!
//! Near-ties, within what the view's age makes meaningless, go by the rendezvous hash of the
//! conversation, so that balancers which see different things still keep a conversation together.

use std::time::Duration;

use super::{Candidate, Field, Policy, Request, Rule, Score, each};
use crate::model::Targets;
use crate::terms::Terms;

/// Weight of the delay inflicted on others.
const ETA: f64 = 0.05;
/// Weight of a request's own prefill, beyond its part in the time to first token.
const COST: f64 = 1.0;
/// Weight of the wait of a request that will be late wherever it goes.
const LATE_WAIT: f64 = 0.5;
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

    fn counts_homes(&self) -> bool {
        true
    }

    fn rule(&self) -> Option<Rule> {
        Some(rule)
    }
}

fn rule(terms: &Terms, targets: &Targets) -> Score {
    let late = !terms.feasible(targets);
    let cost = cost(late, terms.ttft_p50_ms, terms.own_ms, terms.imposed_ms);
    Score {
        tier: u32::from(late),
        first: cost + terms.evicted_ms + terms.risk_ms,
        // In tenths: less is no reason.
        second: (terms.occupancy * 10.0).floor(),
    }
}

/// `J` before evictions and suspicion. Grows with each of the three times, the own prefill being part of
/// the time to first token.
pub(crate) fn cost(late: bool, ttft_p50_ms: f64, own_ms: f64, imposed_ms: f64) -> f64 {
    let ttft_ms = if late {
        own_ms + LATE_WAIT * (ttft_p50_ms - own_ms)
    } else {
        ttft_p50_ms
    };
    ttft_ms + COST * own_ms + ETA * imposed_ms
}
