//! What a placement would mean, in predicted time: the terms that policies weigh and receipts print.

use serde::{Deserialize, Serialize};

use crate::lineup::{Lineup, slack_ms};
use crate::model::{Backlog, Pace, Prefills, Profile, Residuals, Targets, attention_pairs};
use crate::wait::Queueing;

/// Output assumed of a request, because nothing is known of it in advance.
const NOMINAL_OUTPUT: f64 = 256.0;
/// A KV cache used to this share has little left that only rests there: what an admission evicts
/// from then on was used lately.
const NEARLY_FULL: f64 = 0.9;
/// Share of evicted tokens that are asked for again (hit ratio of an unbounded cache on the Mooncake
/// conversation trace, rounded).
const REUSE: f64 = 1.0 / 3.0;

/// What one request would find on one worker and do to it. Times in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// Wait for a slot.
    pub wait_ms: f64,
    /// Time to first token by the model, the wait included.
    pub ttft_ms: f64,
    /// Its median by the worker's residuals: what ranks.
    pub ttft_p50_ms: f64,
    /// Its 0.95 quantile: what may be promised.
    pub ttft_p95_ms: f64,
    /// From token to token, for the request and for those that decode beside it.
    pub tpot_ms: f64,
    /// Prefill of what the worker does not hold: what it costs.
    pub own_ms: f64,
    /// The delay that this inflicts on those who are there (X).
    pub imposed_ms: f64,
    /// Expected prefill, some day, of what admitting it evicts (E).
    pub evicted_ms: f64,
    /// Expected cost of a worker that may be dead (χ).
    pub risk_ms: f64,
    /// Requests there for each slot.
    pub occupancy: f64,
    /// Share of the KV cache in use once the request has its answer; zero: unknown.
    pub kv_used: f64,
}

impl Terms {
    /// Whether promises would be kept, by the 0.95 quantile, and the KV cache suffices.
    #[must_use]
    pub fn feasible(&self, targets: &Targets) -> bool {
        self.ttft_p95_ms <= targets.ttft_ms
            && self.tpot_ms <= targets.tpot_ms
            && self.kv_used <= 1.0
    }
}

/// What of [`Terms`] depends on the worker and neither on the request nor on time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outlook {
    pub(crate) pace: Pace,
    pub(crate) wait_ms: f64,
    pub(crate) residents: f64,
    occupancy: f64,
    pub(crate) residuals: Residuals,
    context_tokens: f64,
    kv_tokens: f64,
    pub(crate) lineup: Lineup,
    /// From token to token with one request more, without its context: alone, and beside a prefill.
    pub(crate) decode_ms: f64,
    mixed_ms: f64,
    pub(crate) context_ms: f64,
    /// Iterations of a nominal answer that each token to prefill is in.
    mixed_per_token: f64,
}

/// What a request brings, and what is before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) pending_tokens: f64,
    pub(crate) pending_pairs: f64,
    pub(crate) prompt_tokens: f64,
    /// How much longer it may be, at the 0.95 quantile.
    pub(crate) longer_tokens: f64,
    pub(crate) cached_tokens: f64,
    /// How likely the worker is dead, 0 to 1.
    pub(crate) suspicion: f64,
    /// What was promised.
    pub(crate) ttft_target_ms: f64,
}

impl Outlook {
    pub(crate) fn of(
        profile: &Profile,
        residuals: Residuals,
        queueing: &Queueing,
        backlog: &Backlog,
        kv_tokens: f64,
    ) -> Self {
        let Backlog {
            decodes,
            context_tokens,
            lineup,
            ..
        } = *backlog;
        let pace = Pace::of(profile, decodes, context_tokens);
        let after = |prefill| profile.iteration_ms(prefill, decodes + 1.0, context_tokens, 0.0);
        Self {
            pace,
            wait_ms: queueing.wait().as_secs_f64() * 1e3,
            residents: queueing.present.into(),
            occupancy: f64::from(queueing.present) / f64::from(queueing.slots.max(1)),
            residuals,
            context_tokens,
            kv_tokens,
            lineup,
            decode_ms: after(0.0),
            mixed_ms: after(pace.chunk),
            context_ms: profile.context_ms,
            mixed_per_token: 1.0 / (pace.chunk * NOMINAL_OUTPUT),
        }
    }

    pub(crate) fn terms(&self, arrival: &Arrival) -> Terms {
        let Arrival {
            pending_tokens,
            pending_pairs,
            prompt_tokens,
            longer_tokens,
            cached_tokens,
            suspicion,
            ttft_target_ms,
        } = *arrival;
        let uncached = prompt_tokens - cached_tokens;
        let own_pairs = attention_pairs(cached_tokens, uncached);
        let (pace, to_prefill) = (&self.pace, pending_tokens + uncached);
        let own = pace.token_ms * uncached + pace.pair_ms * own_pairs;
        let prefills = Prefills {
            pending_tokens,
            pending_pairs,
            uncached,
            own_pairs,
        };
        let slack = slack_ms(ttft_target_ms, own);
        let ttft = self.wait_ms + pace.ttft_by_slack_ms(&self.lineup, &prefills, slack);
        // Iterations of a nominal answer that carry a prefill too (mixed batches are longer).
        let mixed = (to_prefill * self.mixed_per_token).min(1.0);
        let tpot = self.decode_ms + mixed * (self.mixed_ms - self.decode_ms);
        let (kv_used, evicted) = self.eviction(pending_tokens, prompt_tokens, uncached);
        Terms {
            wait_ms: self.wait_ms,
            ttft_ms: ttft,
            ttft_p50_ms: ttft * self.residuals.ttft_p50,
            ttft_p95_ms: self.ttft_p95_ms(ttft, longer_tokens, prompt_tokens),
            tpot_ms: tpot + self.context_ms * prompt_tokens,
            own_ms: own,
            imposed_ms: own * self.residents,
            evicted_ms: evicted,
            // It would have to be done again elsewhere.
            risk_ms: if suspicion > 0.0 {
                suspicion * (own + ttft)
            } else {
                0.0
            },
            occupancy: self.occupancy,
            kv_used,
        }
    }

    /// The 0.95 quantile of a time to first token: what the worker's own times scatter, and the prefill of
    /// what the prompt may be longer than predicted, which have nothing to do with each other.
    #[inline]
    fn ttft_p95_ms(&self, ttft: f64, longer: f64, prompt: f64) -> f64 {
        let Residuals { ttft_p50, ttft_p95 } = self.residuals;
        if longer <= 0.0 {
            return ttft * ttft_p95;
        }
        let prefill = longer * (self.pace.token_ms + self.pace.pair_ms * prompt);
        let (scatter, more) = (ttft * (ttft_p95 - ttft_p50), prefill * ttft_p50);
        // Not below the quantile without it, whatever rounding does.
        (ttft * ttft_p50 + (scatter * scatter + more * more).sqrt()).max(ttft * ttft_p95)
    }

    /// Share of the KV cache in use at the peak, and the expected prefill of what has to go for it.
    /// Residents end as others grow, so the peak is today's use and what the request adds.
    fn eviction(&self, pending: f64, prompt: f64, uncached: f64) -> (f64, f64) {
        if self.kv_tokens <= 0.0 {
            return (0.0, 0.0);
        }
        let used = (self.context_tokens + pending + prompt + NOMINAL_OUTPUT) / self.kv_tokens;
        let crowded = ((used - NEARLY_FULL) / (1.0 - NEARLY_FULL)).clamp(0.0, 1.0);
        (used, crowded * REUSE * uncached * self.pace.token_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker with 100,000 tokens of context in a cache of `kv` gets a cold prompt of `prompt`.
    fn kv(kv: f64, prompt: f64) -> Terms {
        let (profile, queueing) = (Profile::default(), Queueing::default());
        let residuals = Residuals::default();
        let outlook = Outlook::of(&profile, residuals, &queueing, &backlog(), kv);
        outlook.terms(&arrival(0.0, prompt))
    }

    fn backlog() -> Backlog {
        Backlog {
            decodes: 20.0,
            context_tokens: 1e5,
            ..Backlog::default()
        }
    }

    fn arrival(pending_tokens: f64, prompt_tokens: f64) -> Arrival {
        Arrival {
            pending_tokens,
            pending_pairs: 0.0,
            prompt_tokens,
            longer_tokens: 0.0,
            cached_tokens: 0.0,
            suspicion: 0.0,
            ttft_target_ms: f64::INFINITY,
        }
    }

    #[test]
    fn evictions_cost_where_a_known_cache_is_nearly_full() {
        assert_eq!(kv(0.0, 4_000.0).evicted_ms, 0.0);
        assert_eq!(kv(1e6, 4_000.0).evicted_ms, 0.0);
        let (some, all) = (kv(1.1e5, 4_000.0), kv(1e5, 4_000.0));
        assert!(some.evicted_ms > 0.0 && some.evicted_ms < all.evicted_ms);
        assert!(all.evicted_ms < all.own_ms / 2.0);
    }

    #[test]
    fn what_does_not_fit_the_cache_is_not_feasible() {
        assert!(kv(0.0, 4_000.0).feasible(&Targets::NONE));
        assert!(kv(1.1e5, 4_000.0).feasible(&Targets::NONE));
        assert!(!kv(1e5, 4_000.0).feasible(&Targets::NONE));
    }

    #[test]
    fn a_prompt_that_may_be_longer_may_be_later() {
        let (profile, queueing) = (Profile::default(), Queueing::default());
        let outlook = Outlook::of(&profile, Residuals::default(), &queueing, &backlog(), 0.0);
        let terms = |longer_tokens| {
            outlook.terms(&Arrival {
                longer_tokens,
                ..arrival(0.0, 4_000.0)
            })
        };
        let (known, some, much) = (terms(0.0), terms(400.0), terms(4_000.0));
        assert_eq!(known.ttft_p50_ms, much.ttft_p50_ms);
        assert!(known.ttft_p95_ms < some.ttft_p95_ms && some.ttft_p95_ms < much.ttft_p95_ms);
        // A tenth more is little beside what times scatter anyway.
        assert!(some.ttft_p95_ms < known.ttft_p95_ms * 1.05);
    }

    #[test]
    fn prefills_to_come_make_tokens_slower() {
        let (profile, queueing) = (Profile::default(), Queueing::default());
        let outlook = Outlook::of(&profile, Residuals::default(), &queueing, &backlog(), 0.0);
        let tpot = |pending| outlook.terms(&arrival(pending, 1_000.0)).tpot_ms;
        assert!(tpot(1e5) > tpot(0.0) + 10.0);
        assert_eq!(tpot(1e9), tpot(2e9));
    }

    #[test]
    fn who_may_be_dead_costs_a_second_attempt() {
        let (profile, queueing) = (Profile::default(), Queueing::default());
        let outlook = Outlook::of(
            &profile,
            Residuals::default(),
            &queueing,
            &Backlog::default(),
            0.0,
        );
        let risk = |suspicion| {
            let arrival = Arrival {
                suspicion,
                ..arrival(0.0, 4_000.0)
            };
            outlook.terms(&arrival).risk_ms
        };
        assert_eq!(risk(0.0), 0.0);
        assert!(risk(1.0) > risk(0.5) && risk(0.5) > 0.0);
    }
}
