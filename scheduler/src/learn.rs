//! A worker's latency model, learnt from what its engine did.
//!
//! Engines expose no iterations. Who gives an engine its work knows which tokens it computed between
//! two signs of it; such a [`Spell`] says how long they took together. The five coefficients are fitted
//! to spells as ratios to the profile that the worker was started with, by recursive least squares with
//! forgetting. The prior says that the ratios mostly move together: an engine that is twice as slow is
//! so in everything until the data say otherwise, and what they do not identify stays where it was.
//!
//! How well the model predicts is learnt beside it, as quantiles of actual ÷ predicted time to first
//! token, each by small steps (Robbins and Monro 1951): whatever the distribution does, the share below
//! the quantile comes out right in the long run.

use crate::model::{Profile, Residuals};

/// Ratios to the profile stay within these.
const SLOWEST: f64 = 10.0;
const FASTEST: f64 = 0.1;
/// How far the ratios may be from 1, as standard deviations: all together, and each by itself.
const TOGETHER: f64 = 1.0;
const APART: f64 = 0.3;
/// Share of the prior's doubt that comes back with every spell: old ones are forgotten.
const FORGET: f64 = 1e-5;
/// What a spell's time is off by, relative to the prediction.
const NOISE: f64 = 0.1;
/// The same, where it is not known which iterations had how much of the prefill.
const MIXED_NOISE: f64 = 0.3;
/// A time that is more than this off, relative to the prediction, counts as if it were so: a machine
/// that stood still says nothing of the engine.
const OUTLIER: f64 = 1.0;
/// Step of the quantiles, in their logarithm: the first, and what it comes down to.
const FIRST_STEP: f64 = 0.5;
const LAST_STEP: f64 = 0.02;
/// Predictions below this are as good as any other below it.
const LEAST_MS: f64 = 1.0;

/// A stretch of time, and what the engine computed in it, summed over its iterations.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spell {
    /// How long it took.
    pub took_ms: f64,
    /// Iterations that had too few tokens to take more than the floor.
    pub floors: f64,
    /// The others, and the tokens that these prefilled or decoded.
    pub linears: f64,
    /// See `linears`.
    pub tokens: f64,
    /// Tokens of context that decodes attended to, in all of them.
    pub context_tokens: f64,
    /// Attention pairs of what was prefilled.
    pub pairs: f64,
    /// Share of the iterations of which it is not quite known what they computed; 0 to 1.
    pub mixed: f64,
}

/// Floor, base, token, context, pair.
type Terms = [f64; 5];
const TERMS: usize = 5;

/// The model of one worker, fitted to what its engine did.
#[derive(Clone, Debug)]
pub struct Fit {
    given: Profile,
    learnt: Profile,
    ratios: Terms,
    doubt: [Terms; TERMS],
    median: Quantile,
    tail: Quantile,
    judged: u64,
    within: u64,
}

/// How often the promise held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calibration {
    /// First tokens whose time had been predicted.
    pub judged: u64,
    /// Those that came within predicted × p95, as it stood before they came. To be 95 %.
    pub within: u64,
}

impl Fit {
    /// Knows no more than the profile.
    #[must_use]
    pub fn new(given: Profile) -> Self {
        let Residuals { ttft_p50, ttft_p95 } = Residuals::default();
        Self {
            given,
            learnt: given,
            ratios: [1.0; TERMS],
            doubt: prior(1.0),
            median: Quantile::new(0.5, ttft_p50),
            tail: Quantile::new(0.95, ttft_p95),
            judged: 0,
            within: 0,
        }
    }

    /// The model, as far as it is learnt.
    #[must_use]
    pub const fn profile(&self) -> &Profile {
        &self.learnt
    }

    /// How well it predicts.
    #[must_use]
    pub fn residuals(&self) -> Residuals {
        let ttft_p50 = self.median.value();
        Residuals {
            ttft_p50,
            ttft_p95: self.tail.value().max(ttft_p50),
        }
    }

    /// How often the promise held so far.
    #[must_use]
    pub const fn calibration(&self) -> Calibration {
        Calibration {
            judged: self.judged,
            within: self.within,
        }
    }

    /// A first token came, `actual_ms` after the request, for which `predicted_ms` had been predicted.
    pub fn first_token(&mut self, predicted_ms: f64, actual_ms: f64) {
        if !(actual_ms.is_finite() && predicted_ms.is_finite()) {
            return;
        }
        let ratio = actual_ms.max(LEAST_MS) / predicted_ms.max(LEAST_MS);
        self.judged += 1;
        self.within += u64::from(ratio <= self.residuals().ttft_p95);
        self.median.observe(ratio);
        self.tail.observe(ratio);
    }

    /// The engine may be another one from here on: what is known is doubted as it was in the beginning.
    pub fn restarted(&mut self) {
        self.doubt = prior(1.0);
    }

    /// Learns from a spell. One that says nothing, or nonsense, changes nothing.
    pub fn observe(&mut self, spell: &Spell) {
        let times = [
            spell.floors * self.learnt.floor_ms,
            spell.linears * self.learnt.base_ms,
            spell.tokens * self.learnt.token_ms,
            spell.context_tokens * self.learnt.context_ms,
            spell.pairs * self.learnt.pair_ms,
        ];
        let predicted: f64 = times.iter().sum();
        let sane = predicted.is_finite() && predicted > 0.0 && spell.took_ms > 0.0;
        if !(sane && spell.took_ms.is_finite()) {
            return;
        }
        // Relative to the prediction, so that long spells do not drown short ones.
        let x: Terms = std::array::from_fn(|at| times[at] / self.ratios[at] / predicted);
        let off = (spell.took_ms / predicted - 1.0).clamp(-OUTLIER, OUTLIER);
        let noise = NOISE + (MIXED_NOISE - NOISE) * spell.mixed.clamp(0.0, 1.0);
        self.update(&x, off, noise * noise);
    }

    fn update(&mut self, x: &Terms, off: f64, noise: f64) {
        let prior = prior(FORGET);
        for (row, fresh) in self.doubt.iter_mut().zip(prior) {
            for (cell, fresh) in row.iter_mut().zip(fresh) {
                *cell = *cell * (1.0 - FORGET) + fresh;
            }
        }
        let along: Terms = std::array::from_fn(|at| dot(&self.doubt[at], x));
        let spread = dot(&along, x) + noise;
        for at in 0..TERMS {
            let ratio = self.ratios[at] + along[at] / spread * off;
            self.ratios[at] = ratio.clamp(FASTEST, SLOWEST);
            for other in 0..TERMS {
                self.doubt[at][other] -= along[at] * along[other] / spread;
            }
        }
        let [floor, base, token, context, pair] = self.ratios;
        self.learnt = Profile {
            floor_ms: self.given.floor_ms * floor,
            base_ms: self.given.base_ms * base,
            token_ms: self.given.token_ms * token,
            context_ms: self.given.context_ms * context,
            pair_ms: self.given.pair_ms * pair,
            chunk_tokens: self.given.chunk_tokens,
        };
    }
}

/// The doubt before any data, times `share`.
fn prior(share: f64) -> [Terms; TERMS] {
    std::array::from_fn(|row| {
        std::array::from_fn(|column| {
            let apart = if row == column { APART * APART } else { 0.0 };
            share * (TOGETHER * TOGETHER + apart)
        })
    })
}

fn dot(one: &Terms, other: &Terms) -> f64 {
    one.iter().zip(other).map(|(a, b)| a * b).sum()
}

/// A running quantile of ratios, followed in their logarithm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quantile {
    share: f64,
    log: f64,
    seen: u32,
}

impl Quantile {
    pub(crate) fn new(share: f64, value: f64) -> Self {
        Self {
            share,
            log: value.ln(),
            seen: 0,
        }
    }

    pub(crate) fn value(&self) -> f64 {
        self.log.exp()
    }

    pub(crate) fn observe(&mut self, ratio: f64) {
        self.seen = self.seen.saturating_add(1);
        let step = (FIRST_STEP / f64::from(self.seen).sqrt()).max(LAST_STEP);
        let above = ratio.ln() > self.log;
        self.log += step * (self.share - f64::from(u8::from(!above)));
        self.log = self.log.clamp(-SLOWEST.ln(), SLOWEST.ln());
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// A spell of this engine, as one sees it who knows how many tokens were computed.
    fn spell(real: &Profile, rng: &mut StdRng) -> Spell {
        let decodes = f64::from(rng.random_range(0..40));
        let context = decodes * rng.random_range(500.0..20_000.0);
        let prefilling = rng.random_bool(0.5);
        let (count, tokens, pairs) = if prefilling {
            let tokens = 1_024.0;
            (4.0, tokens, tokens * rng.random_range(500.0..50_000.0))
        } else {
            (100.0, decodes.max(1.0), 0.0)
        };
        let ms = count * real.iteration_ms(tokens, 0.0, context, pairs);
        Spell {
            took_ms: ms * rng.random_range(0.9..1.1),
            floors: if prefilling { 0.0 } else { count },
            linears: if prefilling { count } else { 0.0 },
            tokens: if prefilling { count * tokens } else { 0.0 },
            context_tokens: count * context,
            pairs: count * pairs,
            mixed: 0.0,
        }
    }

    fn check(change: impl Fn(Profile) -> Profile) {
        let told = Profile::default();
        let real = change(told);
        let (mut fit, mut rng) = (Fit::new(told), StdRng::seed_from_u64(3));
        (0..2_000).for_each(|_| fit.observe(&spell(&real, &mut rng)));
        let (learnt, chunk) = (fit.profile(), 1_024.0);
        for (tokens, context, pairs) in [(1.0, 0.0, 0.0), (20.0, 2e5, 0.0), (chunk, 5e4, 2e7)] {
            let time = |of: &Profile| of.iteration_ms(tokens, 0.0, context, pairs);
            let ratio = time(learnt) / time(&real);
            assert!((0.93..1.07).contains(&ratio), "{ratio} {learnt:?} {real:?}");
        }
    }

    #[test]
    fn an_engine_is_known_by_what_it_took() {
        check(|told| told);
        check(|told| told.at_speed(0.5));
        check(|told| told.at_speed(3.0));
        check(|told| Profile {
            context_ms: told.context_ms * 4.0,
            ..told
        });
        check(|told| Profile {
            token_ms: told.token_ms * 2.0,
            pair_ms: told.pair_ms * 3.0,
            ..told
        });
    }

    #[test]
    fn what_no_spell_shows_goes_with_what_they_show() {
        let told = Profile::default();
        let mut fit = Fit::new(told);
        let decodes = Spell {
            took_ms: 4_400.0,
            floors: 100.0,
            ..Spell::default()
        };
        (0..100).for_each(|_| fit.observe(&decodes));
        let learnt = *fit.profile();
        assert!((learnt.floor_ms / told.floor_ms - 2.0).abs() < 0.05);
        assert!((learnt.token_ms / told.token_ms - 2.0).abs() < 0.2);
    }

    #[test]
    fn nonsense_changes_nothing_and_nothing_leaves_its_bounds() {
        let told = Profile::default();
        let mut fit = Fit::new(told);
        for (took_ms, floors) in [(0.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, f64::NAN)] {
            let spell = Spell {
                took_ms,
                floors,
                ..Spell::default()
            };
            fit.observe(&spell);
        }
        fit.first_token(f64::NAN, 1.0);
        assert_eq!(*fit.profile(), told);
        assert_eq!(fit.calibration(), Calibration::default());
        let mut rng = StdRng::seed_from_u64(4);
        for _ in 0..5_000 {
            let mut wild = spell(&told, &mut rng);
            wild.took_ms *= 10.0_f64.powf(rng.random_range(-3.0..3.0));
            fit.observe(&wild);
            fit.first_token(1.0, 10.0_f64.powf(rng.random_range(-3.0..3.0)));
        }
        let wire = fit.profile().to_wire();
        assert!(Profile::from_wire(&wire).is_some(), "{wire:?}");
        for (learnt, told) in [
            (fit.profile().floor_ms, told.floor_ms),
            (fit.profile().token_ms, told.token_ms),
            (fit.profile().pair_ms, told.pair_ms),
        ] {
            let ratio = learnt / told;
            assert!((FASTEST * 0.999..=SLOWEST * 1.001).contains(&ratio));
        }
        let Residuals { ttft_p50, ttft_p95 } = fit.residuals();
        assert!(0.01 <= ttft_p50 && ttft_p50 <= ttft_p95 && ttft_p95 <= 100.0);
    }

    #[test]
    fn ninety_five_of_a_hundred_promises_are_kept_whatever_comes() {
        let mut rng = StdRng::seed_from_u64(5);
        let mut fit = Fit::new(Profile::default());
        for n in 0..6_000 {
            // The distribution changes twice.
            let (median, wide) = [(1.0, 0.1), (2.0, 0.8), (0.5, 0.3)][n / 2_000];
            let ratio: f64 = median * (wide * rng.random_range(-1.0..1.0_f64)).exp();
            fit.first_token(100.0, 100.0 * ratio);
        }
        let Calibration { judged, within } = fit.calibration();
        let share = within as f64 / judged as f64;
        assert!((0.935..=0.965).contains(&share), "{share}");
        let Residuals { ttft_p50, .. } = fit.residuals();
        assert!((0.4..0.6).contains(&ttft_p50), "{ttft_p50}");
    }
}
