//! What a run was like, for those who sent its requests.

use std::time::Duration;

use forebay_proto::Now;

use super::Setup;
use super::arrivals::Workload;
use crate::model::Counts;

/// One job's times, as its client sees them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Life {
    pub(super) arrived: Now,
    pub(super) first: Option<Now>,
    pub(super) done: Option<Now>,
}

/// What went to and fro between balancers and workers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Told {
    pub(super) refusals: u64,
    pub(super) questions: u64,
    pub(super) unseen: f64,
    pub(super) families: usize,
    pub(super) copies: u64,
}

/// What a run was like.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Requests offered.
    pub offered: usize,
    /// Those that were answered within both targets.
    pub met: usize,
    /// Those that were not answered to their end.
    pub failed: usize,
    /// Times to first token of all that had one, in milliseconds, in order.
    pub ttft_ms: Vec<f32>,
    /// Mean times from token to token of all answers of more than one token, in milliseconds, in order.
    pub tpot_ms: Vec<f32>,
    /// Share of the prompts' tokens that were in a cache.
    pub hit_ratio: f64,
    /// The busiest engine's time over the mean.
    pub max_over_mean: f64,
    /// Share of the time that engines worked.
    pub busy: f64,
    /// Placements that an agent refused.
    pub refusals: u64,
    /// Questions that balancers sent.
    pub questions: u64,
    /// Requests that a worker had taken, when one was placed there, and its balancer had not heard of.
    pub unseen: f64,
    /// Prompt tokens that were computed again after a pre-emption.
    pub recomputed_tokens: u64,
    /// Families with homes at the end, and placements that made a home's copy.
    pub families: usize,
    /// See `families`.
    pub copies: u64,
    /// From the first arrival to the last answer.
    pub lasted: Duration,
}

/// One request of a run, as its client saw it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Served {
    /// When it came, from the start of the run.
    pub arrived: Duration,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// The worker that had it last, from 0.
    pub worker: u32,
    /// Its time to first token, in milliseconds; none: it had none.
    pub ttft_ms: Option<f64>,
    /// Whether its first token came in time.
    pub in_time: bool,
}

impl Outcome {
    pub(super) fn new(
        setup: &Setup,
        load: &Workload,
        lives: &[Life],
        counts: &[Counts],
        told: Told,
    ) -> Self {
        let mut outcome = Self {
            offered: lives.len(),
            refusals: told.refusals,
            questions: told.questions,
            unseen: told.unseen,
            families: told.families,
            copies: told.copies,
            ..Self::default()
        };
        let ms = |from: Now, to: Now| to.since(from).as_secs_f64() * 1e3;
        let mut end = Now::default();
        for (life, job) in lives.iter().zip(&load.jobs) {
            let (Some(first), Some(done)) = (life.first, life.done) else {
                outcome.failed += 1;
                continue;
            };
            end = end.max(done);
            let ttft = ms(life.arrived, first);
            let between = f64::from(job.output_tokens.saturating_sub(1));
            let tpot = if between > 0.0 {
                ms(first, done) / between
            } else {
                0.0
            };
            #[allow(clippy::cast_possible_truncation)] // seven digits are enough
            outcome.ttft_ms.push(ttft as f32);
            if between > 0.0 {
                #[allow(clippy::cast_possible_truncation)] // as above
                outcome.tpot_ms.push(tpot as f32);
            }
            let in_time = ttft <= setup.slo.ttft_ms(job.prompt_tokens) && tpot <= setup.slo.tpot_ms;
            outcome.met += usize::from(in_time);
        }
        outcome.ttft_ms.sort_by(f32::total_cmp);
        outcome.tpot_ms.sort_by(f32::total_cmp);
        let sum = |of: fn(&Counts) -> u64| counts.iter().map(of).sum::<u64>();
        outcome.hit_ratio =
            sum(|one| one.cached_tokens) as f64 / sum(|one| one.prompt_tokens).max(1) as f64;
        outcome.recomputed_tokens = sum(|one| one.recomputed_tokens);
        outcome.lasted = end.since(Now::default());
        let busy: Vec<f64> = counts.iter().map(|one| one.busy_ms).collect();
        let mean = busy.iter().sum::<f64>() / busy.len().max(1) as f64;
        let most = busy.iter().copied().fold(0.0, f64::max);
        outcome.max_over_mean = if mean > 0.0 { most / mean } else { 1.0 };
        outcome.busy = mean / (outcome.lasted.as_secs_f64() * 1e3).max(1.0);
        outcome
    }

    /// Share of all offered requests that were answered within both targets.
    #[must_use]
    pub fn attainment(&self) -> f64 {
        self.met as f64 / self.offered.max(1) as f64
    }
}

/// The value below which a share of the sorted values lies; 0 where there is none.
#[must_use]
pub fn quantile(sorted: &[f32], share: f64) -> f64 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // an index
    let at = (share * sorted.len() as f64).ceil() as usize;
    sorted
        .get(at.saturating_sub(1).min(sorted.len().saturating_sub(1)))
        .copied()
        .map_or(0.0, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_value_that_occurred() {
        let values = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(quantile(&values, 0.5), 2.0);
        assert_eq!(quantile(&values, 0.99), 4.0);
        assert_eq!(quantile(&values, 0.0), 1.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }
}
