//! How long an engine takes: one iteration of continuous batching, and what follows from it.
//!
//! Five coefficients a worker (DESIGN §5). The shape is that of published profiles: flat while the
//! weights' transfer dominates, then linear in tokens, plus the decodes' reads of their context and
//! the prefill's attention.

use forebay_proto::wire::work as wire;

use crate::lineup::Lineup;
use serde::{Deserialize, Serialize};

/// How fast one worker is, in milliseconds.
///
/// `iteration = max(floor, base + token·(prefill + decodes)) + context·C + pair·A`
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// The least time of an iteration: the weights have to be read.
    pub floor_ms: f64,
    /// What an iteration takes before its tokens.
    pub base_ms: f64,
    /// For each token, prefilled or decoded.
    pub token_ms: f64,
    /// For each token of context that a decode attends to.
    pub context_ms: f64,
    /// For each pair of a prefilled token and one that it attends to.
    pub pair_ms: f64,
    /// Most tokens of one iteration (the chunk budget of chunked prefill).
    pub chunk_tokens: u32,
}

/// Profiles by name, the default first.
///
/// * `llama-70b-h100-tp4`: Llama-2/3-70B on four H100: token and base from Vidur's profiles of the
///   linear layers and all-reduces, floor and context from splitwise-sim's decode measurements
///   (fitted, error 1.8 %), pairs from Preble's prefill equation (7.4e-7 ms).
/// * `llama-70b-h100-tp8`: the same sources for eight H100 (decode error 2.0 %, prefill 16 %).
/// * `llama-70b-a100-tp2`: Preble's prefill equation for two A100; its decode terms are scaled by
///   memory bandwidth and not measured.
/// * `llama-8b-a100`: Llama-3-8B on one A100: Vidur's linear layers; context and pairs derived from
///   the model's shape, not measured.
pub const PROFILES: [(&str, Profile); 4] = [
    (
        "llama-70b-h100-tp4",
        Profile {
            floor_ms: 22.0,
            base_ms: 8.0,
            token_ms: 0.068,
            context_ms: 9.4e-5,
            pair_ms: 7.4e-7,
            chunk_tokens: 1_024,
        },
    ),
    (
        "llama-70b-h100-tp8",
        Profile {
            floor_ms: 20.0,
            base_ms: 6.0,
            token_ms: 0.045,
            context_ms: 1.73e-4,
            pair_ms: 3.7e-7,
            chunk_tokens: 1_024,
        },
    ),
    (
        "llama-70b-a100-tp2",
        Profile {
            floor_ms: 45.0,
            base_ms: 28.9,
            token_ms: 0.182,
            context_ms: 1.6e-4,
            pair_ms: 2.55e-6,
            chunk_tokens: 1_024,
        },
    ),
    (
        "llama-8b-a100",
        Profile {
            floor_ms: 9.8,
            base_ms: 4.0,
            token_ms: 0.067,
            context_ms: 6.4e-5,
            pair_ms: 2.4e-6,
            chunk_tokens: 1_024,
        },
    ),
];

/// What a worker has before it: the requests that it took and has not finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Backlog {
    /// Uncached prompt tokens that are not prefilled.
    pub pending_tokens: f64,
    /// Their attention pairs.
    pub pending_pairs: f64,
    /// Requests past their first token.
    pub decodes: f64,
    /// Tokens of context that these attend to.
    pub context_tokens: f64,
    /// Those of the pending that the engine has not got yet, by urgency.
    pub lineup: Lineup,
}

/// What a request was promised, in milliseconds; infinite: nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Targets {
    /// Until its first token, from now.
    pub ttft_ms: f64,
    /// From token to token, in the mean.
    pub tpot_ms: f64,
}

impl Targets {
    /// Nothing was promised.
    pub const NONE: Self = Self {
        ttft_ms: f64::INFINITY,
        tpot_ms: f64::INFINITY,
    };
}

impl Default for Targets {
    fn default() -> Self {
        Self::NONE
    }
}

/// How far a worker's recent times were from what its model predicted: quantiles of actual ÷ predicted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Residuals {
    /// The median of times to first token; what ranks workers.
    pub ttft_p50: f64,
    /// Their 0.95 quantile; what may be promised.
    pub ttft_p95: f64,
}

impl Default for Residuals {
    /// Before anything was measured.
    fn default() -> Self {
        Self {
            ttft_p50: 1.0,
            ttft_p95: 1.3,
        }
    }
}

impl Residuals {
    /// Ratios beyond these are no measurement.
    const BOUNDS: std::ops::RangeInclusive<f64> = 0.01..=100.0;

    /// The quantiles as a report carries them; the default where they are none.
    #[must_use]
    pub fn from_wire(ttft_p50: Option<f32>, ttft_p95: Option<f32>) -> Self {
        let sane = |ratio: Option<f32>| ratio.map(f64::from).filter(|r| Self::BOUNDS.contains(r));
        match (sane(ttft_p50), sane(ttft_p95)) {
            (Some(ttft_p50), Some(ttft_p95)) if ttft_p50 <= ttft_p95 => Self { ttft_p50, ttft_p95 },
            _ => Self::default(),
        }
    }
}

/// Attention pairs of `new` tokens behind `before` others.
#[must_use]
pub fn attention_pairs(before: f64, new: f64) -> f64 {
    new * (before + new / 2.0)
}

impl Profile {
    /// The profile of this name; see [`PROFILES`].
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let mut profiles = PROFILES.iter();
        profiles.find(|(known, _)| *known == name).map(|(_, p)| *p)
    }

    /// The same worker with all times divided by `speed`, which must be greater than 0.
    #[must_use]
    pub fn at_speed(self, speed: f64) -> Self {
        Self {
            floor_ms: self.floor_ms / speed,
            base_ms: self.base_ms / speed,
            token_ms: self.token_ms / speed,
            context_ms: self.context_ms / speed,
            pair_ms: self.pair_ms / speed,
            chunk_tokens: self.chunk_tokens,
        }
    }

    /// One iteration: `prefill` prompt tokens with their attention `pairs`, beside `decodes` that
    /// attend to `context` tokens. Nothing takes no time.
    #[must_use]
    pub fn iteration_ms(&self, prefill: f64, decodes: f64, context: f64, pairs: f64) -> f64 {
        if prefill + decodes <= 0.0 {
            return 0.0;
        }
        let linear = self.base_ms + self.token_ms * (prefill + decodes);
        linear.max(self.floor_ms) + self.context_ms * context + self.pair_ms * pairs
    }

    /// Prompt tokens of one iteration beside so many decodes. These go first; a quarter is assumed to be
    /// left for prefills.
    #[must_use]
    pub fn chunk_beside(&self, decodes: f64) -> f64 {
        let budget = f64::from(self.chunk_tokens.max(1));
        (budget - decodes).max(budget / 4.0)
    }

    /// Time until `tokens` with these `pairs` are prefilled, in chunks beside the backlog's decodes.
    #[must_use]
    pub fn prefill_ms(&self, backlog: &Backlog, tokens: f64, pairs: f64) -> f64 {
        Pace::of(self, backlog.decodes, backlog.context_tokens).prefill_ms(tokens, pairs)
    }

    /// Time to the first token of a prompt of which `cached` tokens are in the cache and `uncached`
    /// are not, behind the backlog, first come, first served.
    #[must_use]
    pub fn ttft_ms(&self, backlog: &Backlog, cached: f64, uncached: f64) -> f64 {
        let pairs = backlog.pending_pairs + attention_pairs(cached, uncached);
        let pace = Pace::of(self, backlog.decodes, backlog.context_tokens);
        pace.ttft_ms(backlog.pending_tokens, uncached, pairs)
    }

    /// Time from token to token with one more request of `context` tokens decoding.
    #[must_use]
    pub fn tpot_ms(&self, backlog: &Backlog, context: f64) -> f64 {
        let context = backlog.context_tokens + context;
        self.iteration_ms(0.0, backlog.decodes + 1.0, context, 0.0)
    }

    /// Time of the worker that one request takes, whatever runs beside it: its prefill in full chunks, and what
    /// each token of its answer adds to an iteration. What the worker takes without any tokens is nobody's, so
    /// these add up to less than it is busy.
    #[must_use]
    pub fn work_ms(&self, cached: f64, uncached: f64, output: f64) -> f64 {
        let prefill = uncached * Pace::of(self, 0.0, 0.0).least_token_ms();
        let context = cached + uncached + output / 2.0;
        let decode = output * (self.token_ms + self.context_ms * context);
        prefill + self.pair_ms * attention_pairs(cached, uncached) + decode
    }

    /// Time until an iteration begins that a new prompt can be part of, in the mean: half of the one
    /// under way, where that has decodes only. What is pending of prefills contains its own.
    #[must_use]
    pub fn joining_ms(&self, backlog: &Backlog) -> f64 {
        Pace::of(self, backlog.decodes, backlog.context_tokens).joining_ms(backlog.pending_tokens)
    }

    /// The profile as a report carries it; `None` where it is no profile.
    #[must_use]
    pub fn from_wire(model: &wire::LatencyModel) -> Option<Self> {
        let profile = Self {
            floor_ms: model.floor_ms.into(),
            base_ms: model.base_ms.into(),
            token_ms: f64::from(model.token_us) * 1e-3,
            context_ms: f64::from(model.context_ns) * 1e-6,
            pair_ms: f64::from(model.pair_ps) * 1e-9,
            chunk_tokens: model.chunk_tokens,
        };
        let times = [
            profile.floor_ms,
            profile.base_ms,
            profile.token_ms,
            profile.context_ms,
            profile.pair_ms,
        ];
        let sane = times.iter().all(|ms| (0.0..=1e6).contains(ms)) && profile.token_ms > 0.0;
        (sane && profile.chunk_tokens > 0).then_some(profile)
    }

    /// The profile for a report.
    #[must_use]
    pub fn to_wire(&self) -> wire::LatencyModel {
        #[allow(clippy::cast_possible_truncation)] // seven digits are more than is known
        let short = |value: f64| value as f32;
        wire::LatencyModel {
            floor_ms: short(self.floor_ms),
            base_ms: short(self.base_ms),
            token_us: short(self.token_ms * 1e3),
            context_ns: short(self.context_ms * 1e6),
            pair_ps: short(self.pair_ms * 1e9),
            chunk_tokens: self.chunk_tokens,
        }
    }
}

impl Default for Profile {
    fn default() -> Self {
        PROFILES[0].1
    }
}

/// A prefill and those before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefills {
    pub(crate) pending_tokens: f64,
    pub(crate) pending_pairs: f64,
    pub(crate) uncached: f64,
    pub(crate) own_pairs: f64,
}

/// How a worker prefills beside its decodes: what of [`Profile::prefill_ms`] does not depend on the
/// prompt, because it is asked of every worker for every request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Pace {
    /// Prompt tokens of one iteration.
    pub(crate) chunk: f64,
    /// An iteration with so many.
    pub(crate) full_ms: f64,
    /// One without.
    decode_ms: f64,
    /// The least that an iteration takes, and what a shorter one takes before its prompt tokens.
    floor_ms: f64,
    base_ms: f64,
    pub(crate) token_ms: f64,
    pub(crate) pair_ms: f64,
}

impl Pace {
    pub(crate) fn of(profile: &Profile, decodes: f64, context: f64) -> Self {
        let chunk = profile.chunk_beside(decodes);
        let reads = profile.context_ms * context;
        Self {
            chunk,
            full_ms: profile.iteration_ms(chunk, decodes, context, 0.0),
            decode_ms: profile.iteration_ms(0.0, decodes, context, 0.0),
            floor_ms: profile.floor_ms + reads,
            base_ms: profile.base_ms + profile.token_ms * decodes + reads,
            token_ms: profile.token_ms,
            pair_ms: profile.pair_ms,
        }
    }

    /// Time until `tokens` with these `pairs` are prefilled.
    pub(crate) fn prefill_ms(&self, tokens: f64, pairs: f64) -> f64 {
        let full = (tokens / self.chunk).floor();
        let rest = tokens - full * self.chunk;
        let last = if rest > 0.0 {
            (self.base_ms + self.token_ms * rest).max(self.floor_ms)
        } else {
            0.0
        };
        full * self.full_ms + last + self.pair_ms * pairs
    }

    /// As [`Profile::joining_ms`].
    pub(crate) fn joining_ms(&self, pending_tokens: f64) -> f64 {
        let alone = (1.0 - pending_tokens / self.chunk).max(0.0);
        alone * self.decode_ms / 2.0
    }

    /// Time to first token behind what is pending.
    pub(crate) fn ttft_ms(&self, pending_tokens: f64, uncached: f64, pairs: f64) -> f64 {
        self.joining_ms(pending_tokens) + self.prefill_ms(pending_tokens + uncached, pairs)
    }

    /// Time to first token behind what is pending and more urgent.
    pub(crate) fn ttft_by_slack_ms(&self, lineup: &Lineup, prefills: &Prefills, slack: f64) -> f64 {
        let Prefills {
            pending_tokens,
            pending_pairs,
            uncached,
            own_pairs,
        } = *prefills;
        let last = self.ttft_ms(pending_tokens, uncached, pending_pairs + own_pairs);
        let behind = lineup.behind_ms(slack);
        if behind <= 0.0 {
            return last;
        }
        last - behind.min(self.prefill_ms(pending_tokens, pending_pairs))
    }

    /// The least that a prompt token adds. A chunk's time divided by its tokens falls with the tokens,
    /// so that [`Self::prefill_ms`] is never less than this for each of them.
    pub(crate) fn least_token_ms(&self) -> f64 {
        self.full_ms / self.chunk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(value: f64, expected: f64) {
        assert!(
            (value - expected).abs() < 1e-6 * expected.max(1.0),
            "{value} is not {expected}"
        );
    }

    #[test]
    fn an_iteration_is_flat_then_linear() {
        let profile = Profile::default();
        close(profile.iteration_ms(0.0, 0.0, 0.0, 0.0), 0.0);
        close(profile.iteration_ms(0.0, 1.0, 0.0, 0.0), 22.0);
        close(profile.iteration_ms(1_024.0, 0.0, 0.0, 0.0), 8.0 + 69.632);
        close(profile.iteration_ms(0.0, 10.0, 100_000.0, 0.0), 22.0 + 9.4);
    }

    #[test]
    fn a_first_token_waits_for_the_backlog_and_its_own_uncached_part() {
        let profile = Profile::default();
        let idle = Backlog::default();
        let chunk = profile.iteration_ms(1_024.0, 0.0, 0.0, 0.0);
        close(
            profile.ttft_ms(&idle, 0.0, 2_048.0),
            2.0 * chunk + 7.4e-7 * 2_048.0 * 1_024.0,
        );
        let busy = Backlog {
            pending_tokens: 1_024.0,
            ..idle
        };
        close(
            profile.ttft_ms(&busy, 0.0, 2_048.0) - profile.ttft_ms(&idle, 0.0, 2_048.0),
            chunk,
        );
        assert!(profile.ttft_ms(&idle, 2_000.0, 48.0) < profile.ttft_ms(&idle, 0.0, 2_048.0) / 5.0);
    }

    #[test]
    fn a_request_takes_its_uncached_prefill_and_its_answer() {
        let profile = Profile::default();
        let chunk = profile.iteration_ms(1_024.0, 0.0, 0.0, 0.0);
        let cold = profile.work_ms(0.0, 4_096.0, 0.0);
        close(cold, 4.0 * chunk + 7.4e-7 * 4_096.0 * 2_048.0);
        assert!(profile.work_ms(4_000.0, 96.0, 0.0) < cold / 20.0);
        let answer = profile.work_ms(4_096.0, 0.0, 100.0);
        close(answer, 100.0 * (0.068 + 9.4e-5 * 4_146.0));
    }

    #[test]
    fn a_faster_worker_takes_that_much_less() {
        let (slow, fast) = (Profile::default(), Profile::default().at_speed(10.0));
        let backlog = Backlog {
            decodes: 20.0,
            context_tokens: 1e5,
            ..Backlog::default()
        };
        close(
            fast.ttft_ms(&backlog, 100.0, 5_000.0) * 10.0,
            slow.ttft_ms(&backlog, 100.0, 5_000.0),
        );
        close(
            fast.tpot_ms(&backlog, 5_000.0) * 10.0,
            slow.tpot_ms(&backlog, 5_000.0),
        );
    }

    #[test]
    fn profiles_survive_the_wire_and_nonsense_does_not() {
        for (name, profile) in PROFILES {
            assert_eq!(Profile::named(name), Some(profile));
            let back = Profile::from_wire(&profile.to_wire()).unwrap();
            assert!((back.pair_ms / profile.pair_ms - 1.0).abs() < 1e-6);
        }
        let mut wire = Profile::default().to_wire();
        wire.token_us = f32::NAN;
        assert_eq!(Profile::from_wire(&wire), None);
        wire.token_us = 0.0;
        assert_eq!(Profile::from_wire(&wire), None);
    }
}
