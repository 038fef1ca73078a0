//! Several policies on the same requests, seed by seed, and what can be said of the differences.

use forebay_scheduler::policy::Policy;
use serde::Serialize;

use super::threads::each;
use super::{Found, Order, Setup, Workload, quantile, run, search};

/// Shares of requests within both targets that a search looks for.
pub const SHARES: [f64; 2] = [0.9, 0.99];

/// One policy with one order of what waits.
#[derive(Clone, Copy)]
pub struct Contender {
    /// The placement rule.
    pub policy: &'static dyn Policy,
    /// Who orders what waits at a worker.
    pub order: Order,
}

impl Contender {
    /// A policy as its authors run it: published rules before engines that serve first come, first
    /// served; ours before our queue.
    #[must_use]
    pub fn as_published(policy: &'static dyn Policy) -> Self {
        let ours = policy.name() == forebay_scheduler::policy::default().name();
        let order = if ours { Order::Slack } else { Order::Fcfs };
        Self { policy, order }
    }
}

/// At which rates the contenders run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rates {
    /// At so many requests a second.
    Fixed(f64),
    /// At the highest that keeps each of [`SHARES`], up to `most`, bisected in so many steps.
    Search {
        /// Requests a second that are not exceeded.
        most: f64,
        /// Halvings.
        steps: u32,
    },
}

/// A mean over seeds, and how far it may be off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Half of the 95 % confidence interval (Student's t); none from one seed.
    pub ci95: Option<f64>,
}

/// What a contender's runs were like at one load: means over the seeds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// Requests a second that were offered.
    pub rate: f64,
    /// Share of all offered requests within both targets.
    pub attainment: f64,
    /// Share of the prompts' tokens that were in a cache.
    pub hit_ratio: f64,
    /// Median time to first token.
    pub ttft_p50_ms: f64,
    /// Its 0.99 quantile.
    pub ttft_p99_ms: f64,
    /// The 0.99 quantile of answers' mean times from token to token.
    pub tpot_p99_ms: f64,
    /// The busiest engine's time over the mean.
    pub max_over_mean: f64,
    /// Share of the time that engines worked.
    pub busy: f64,
    /// Placements that agents refused, for each request.
    pub refusals: f64,
    /// Questions that balancers sent, for each request.
    pub questions: f64,
    /// Requests that a worker had taken, when one was placed there, and its balancer had not heard of.
    pub unseen_arrivals: f64,
    /// Requests that were not answered to their end.
    pub failed: f64,
}

/// One contender's result.
#[derive(Clone, Debug, Serialize)]
pub struct Result {
    /// Requests a second with 90 % of all within both targets; absent where the rate was given.
    pub goodput90: Option<f64>,
    /// The same for 99 %.
    pub goodput99: Option<f64>,
    /// Over the fluid bound.
    pub of_bound90: Option<Estimate>,
    /// The same for 99 %.
    pub of_bound99: Option<Estimate>,
    /// The first contender's goodput over this one's, seed by seed.
    pub first_over_this90: Option<Estimate>,
    /// The same for 99 %.
    pub first_over_this99: Option<Estimate>,
    /// At the rate of `goodput90`, or at the given one.
    #[serde(flatten)]
    pub figures: Figures,
    /// At the rate of `goodput99`.
    pub at99: Option<Figures>,
    /// Goodputs by seed, in the order of the seeds.
    pub by_seed: Vec<[f64; 2]>,
}

type Runs = Vec<Found>;

/// Runs every contender on every seed, on `threads` threads. `ran` is told after each run.
#[must_use]
pub fn study(
    load: &Workload,
    base: &Setup,
    contenders: &[Contender],
    rates: Rates,
    seeds: &[u64],
    threads: usize,
    ran: &(dyn Fn() + Sync),
) -> Vec<Result> {
    let runs = each(contenders.len() * seeds.len(), threads, |task| {
        let contender = contenders[task / seeds.len()];
        let setup = Setup {
            policy: contender.policy,
            order: contender.order,
            ..base.clone()
        };
        one(load, &setup, rates, seeds[task % seeds.len()], ran)
    });
    let by_contender: Vec<&[Runs]> = runs.chunks(seeds.len().max(1)).collect();
    let bound = super::fluid(load, base).bound;
    by_contender
        .iter()
        .map(|runs| result(runs, by_contender[0], bound, rates))
        .collect()
}

fn one(load: &Workload, setup: &Setup, rates: Rates, seed: u64, ran: &dyn Fn()) -> Runs {
    match rates {
        Rates::Fixed(rate) => {
            let outcome = Some(run(load, setup, rate, seed));
            ran();
            vec![Found { rate, outcome }]
        }
        Rates::Search { most, steps } => search(load, setup, seed, most, steps, &SHARES, ran),
    }
}

fn result(runs: &[Runs], first: &[Runs], bound: f64, rates: Rates) -> Result {
    let at = |place: usize| figures(runs.iter().filter_map(|run| run.get(place)));
    let searched = matches!(rates, Rates::Search { .. });
    let rate = |run: &Runs, place: usize| run.get(place).map_or(0.0, |found| found.rate);
    let over = |place: usize| {
        let shares = runs.iter().map(|run| rate(run, place) / bound);
        searched.then(|| estimate(&shares.collect::<Vec<_>>()))
    };
    let against = |place: usize| {
        let pairs = first.iter().zip(runs);
        let ratios = pairs.map(|(first, this)| rate(first, place) / rate(this, place));
        let ratios: Vec<f64> = ratios.filter(|ratio| ratio.is_finite()).collect();
        (searched && ratios.len() == runs.len()).then(|| estimate(&ratios))
    };
    let goodput = |place: usize| over(place).map(|share| share.mean * bound);
    Result {
        goodput90: goodput(0),
        goodput99: goodput(1),
        of_bound90: over(0),
        of_bound99: over(1),
        first_over_this90: against(0),
        first_over_this99: against(1),
        figures: at(0),
        at99: searched.then(|| at(1)),
        by_seed: runs
            .iter()
            .map(|run| [rate(run, 0), rate(run, 1)])
            .collect(),
    }
}

pub(super) fn figures<'a>(found: impl Iterator<Item = &'a Found>) -> Figures {
    let (mut sum, mut count) = (Figures::default(), 0.0);
    for found in found {
        let Some(outcome) = &found.outcome else {
            continue;
        };
        count += 1.0;
        sum.rate += found.rate;
        sum.attainment += outcome.attainment();
        sum.hit_ratio += outcome.hit_ratio;
        sum.ttft_p50_ms += quantile(&outcome.ttft_ms, 0.5);
        sum.ttft_p99_ms += quantile(&outcome.ttft_ms, 0.99);
        sum.tpot_p99_ms += quantile(&outcome.tpot_ms, 0.99);
        sum.max_over_mean += outcome.max_over_mean;
        sum.busy += outcome.busy;
        sum.refusals += outcome.refusals as f64 / outcome.offered.max(1) as f64;
        sum.questions += outcome.questions as f64 / outcome.offered.max(1) as f64;
        sum.unseen_arrivals += outcome.unseen;
        sum.failed += outcome.failed as f64;
    }
    let all = [
        &mut sum.rate,
        &mut sum.attainment,
        &mut sum.hit_ratio,
        &mut sum.ttft_p50_ms,
        &mut sum.ttft_p99_ms,
        &mut sum.tpot_p99_ms,
        &mut sum.max_over_mean,
        &mut sum.busy,
        &mut sum.refusals,
        &mut sum.questions,
        &mut sum.unseen_arrivals,
        &mut sum.failed,
    ];
    for one in all {
        *one /= f64::max(count, 1.0);
    }
    sum
}

fn estimate(values: &[f64]) -> Estimate {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count.max(1.0);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let ci95 = STUDENT.get(values.len().wrapping_sub(2)).or(STUDENT.last());
    let ci95 = ci95.filter(|_| values.len() > 1);
    Estimate {
        mean,
        ci95: ci95.map(|t| t * (squares / (count - 1.0) / count).sqrt()),
    }
}

/// Two-sided 0.95 quantiles of Student's t from one degree of freedom on.
const STUDENT: [f64; 15] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131,
];

/// How many runs a study makes at most, for progress.
#[must_use]
pub fn runs_of(contenders: usize, seeds: usize, rates: Rates) -> usize {
    let each = match rates {
        Rates::Fixed(_) => 1,
        Rates::Search { steps, .. } => steps as usize * SHARES.len(),
    };
    contenders * seeds * each
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_follows_from_the_spread_of_the_seeds() {
        let estimate = estimate(&[1.0, 2.0, 3.0]);
        assert_eq!(estimate.mean, 2.0);
        let half = 4.303 * (1.0_f64 / 3.0).sqrt();
        assert!((estimate.ci95.unwrap() - half).abs() < 1e-9);
        assert_eq!(super::estimate(&[5.0]).ci95, None);
    }
}
