//! What pictures of a study show and its figures do not: more runs, and nothing but their numbers.
//!
//! - How goodput follows load, from a tenth of the fluid bound to well above it.
//! - All contenders at one load, so that what they do with the same requests can be laid side by side.
//! - What old reports and many balancers cost: the first contender and the best of the others.

use std::time::Duration;

use serde::Serialize;

use super::study::figures;
use super::threads::each;
use super::{
    Contender, Figures, Found, Order, Outcome, Reports, Result, SHARES, Setup, Workload, fluid,
    quantile, run, search,
};

/// Balancers of the grid.
pub const BALANCERS: [u16; 4] = [1, 2, 8, 32];
/// Milliseconds between reports of the grid.
pub const STALENESS_MS: [u64; 5] = [0, 20, 50, 250, 1_000];

/// Offered loads of a curve: from a tenth of the fluid bound in steps of a twentieth up to 1.3 of it.
const LOADS: usize = 25;
/// Halvings of the search for the grid's load.
const STEPS: u32 = 8;
/// The grid's load, over the highest at which 90 % keep both targets where every report is fresh.
const GRID_LOAD: f64 = 0.95;
/// Where nothing is kept at any load, the pictures are taken at this share of the bound.
const LEAST_LOAD: f64 = 0.1;
/// Quantiles of a distribution: each half percent.
const QUANTILES: usize = 200;

/// Numbers for pictures; each is a mean over the seeds unless it says otherwise.
#[derive(Clone, Debug, Serialize)]
pub struct Pictures {
    /// The seeds that were run.
    pub seeds: Vec<u64>,
    /// Who ran, in the order of all that follows.
    pub contenders: Vec<Who>,
    /// How goodput follows load.
    pub curves: Vec<Vec<Point>>,
    /// All at one load.
    pub common: Common,
    /// What old reports and many balancers cost.
    pub grids: Grids,
}

/// A contender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Who {
    /// The placement rule.
    pub policy: &'static str,
    /// Whether what waits at a worker is ordered by the agent; else by the engine.
    pub our_queue: bool,
}

/// One load.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Requests a second that were offered.
    pub rate: f64,
    /// Share of them within both targets.
    pub attainment: f64,
    /// Requests a second within both targets.
    pub goodput: f64,
}

/// All contenders at the load at which the first keeps 90 %, or at the given one.
#[derive(Clone, Debug, Serialize)]
pub struct Common {
    /// Requests a second that were offered.
    pub rate: f64,
    /// What the first token is promised to a prompt shorter than all but 10 %, 50 % and 90 %, in
    /// milliseconds.
    pub target_ms: [f64; 3],
    /// What each was like.
    pub figures: Vec<Figures>,
    /// Milliseconds to the first token, and the share of all offered requests that had it by then.
    pub ttft: Vec<Vec<(f64, f64)>>,
}

/// Shares of requests within both targets at one load, by balancers and staleness.
#[derive(Clone, Debug, Serialize)]
pub struct Grids {
    /// Requests a second: 0.95 of the highest at which the first contender keeps 90 % with one balancer
    /// and fresh reports.
    pub rate: f64,
    /// The rows.
    pub balancers: [u16; BALANCERS.len()],
    /// The columns.
    pub staleness_ms: [u64; STALENESS_MS.len()],
    /// The first contender's, and that of the best of the others.
    pub of: Vec<Grid>,
}

/// One contender's.
#[derive(Clone, Debug, Serialize)]
pub struct Grid {
    /// Its place among the contenders.
    pub contender: usize,
    /// By balancers, then staleness.
    pub attainment: [[f64; STALENESS_MS.len()]; BALANCERS.len()],
}

/// Runs what pictures of a study's results need, on `threads` threads. `ran` is told after each run.
///
/// # Panics
///
/// Panics without a contender.
#[must_use]
pub fn pictures(
    load: &Workload,
    base: &Setup,
    (contenders, results): (&[Contender], &[Result]),
    seeds: &[u64],
    threads: usize,
    ran: &(dyn Fn() + Sync),
) -> Pictures {
    let bench = Bench {
        load,
        base,
        seeds,
        threads,
        ran,
    };
    let bound = fluid(load, base).bound;
    let first = results.first().expect("somebody contends");
    let common = first.goodput90.unwrap_or(first.figures.rate);
    Pictures {
        seeds: seeds.to_vec(),
        contenders: contenders.iter().map(Who::of).collect(),
        curves: bench.curves(contenders, bound),
        common: bench.common(contenders, common.max(LEAST_LOAD * bound)),
        grids: bench.grids(contenders, results, bound),
    }
}

/// How many runs [`pictures`] makes at most, for progress.
#[must_use]
pub fn runs_of_pictures(contenders: usize, seeds: usize) -> usize {
    let grid = STEPS as usize + contenders.min(2) * BALANCERS.len() * STALENESS_MS.len();
    seeds * (contenders * (LOADS + 1) + grid)
}

impl Who {
    fn of(contender: &Contender) -> Self {
        Self {
            policy: contender.policy.name(),
            our_queue: contender.order == Order::Slack,
        }
    }
}

struct Bench<'a> {
    load: &'a Workload,
    base: &'a Setup,
    seeds: &'a [u64],
    threads: usize,
    ran: &'a (dyn Fn() + Sync),
}

impl Bench<'_> {
    /// For each setup and rate what `see` makes of each seed's run.
    fn each<T: Send>(
        &self,
        runs: &[(Setup, f64)],
        see: impl Fn(f64, Outcome) -> T + Sync,
    ) -> Vec<Vec<T>> {
        let seeds = self.seeds.len().max(1);
        let seen = each(runs.len() * self.seeds.len(), self.threads, |task| {
            let ((setup, rate), seed) = (&runs[task / seeds], self.seeds[task % seeds]);
            let seen = see(*rate, run(self.load, setup, *rate, seed));
            (self.ran)();
            seen
        });
        let mut seen = seen.into_iter();
        runs.iter()
            .map(|_| seen.by_ref().take(seeds).collect())
            .collect()
    }

    fn attainments(&self, runs: &[(Setup, f64)]) -> Vec<f64> {
        let seen = self.each(runs, |_, outcome| outcome.attainment());
        seen.iter().map(|one| mean(one)).collect()
    }

    fn with(&self, contender: &Contender) -> Setup {
        Setup {
            policy: contender.policy,
            order: contender.order,
            ..self.base.clone()
        }
    }

    fn curves(&self, contenders: &[Contender], bound: f64) -> Vec<Vec<Point>> {
        let rates = (0..LOADS).map(|step| bound * (2 + step) as f64 / 20.0);
        let rates: Vec<f64> = rates.collect();
        let at = |contender| rates.iter().map(move |rate| (self.with(contender), *rate));
        let attainments = self.attainments(&contenders.iter().flat_map(at).collect::<Vec<_>>());
        let point = |(rate, attainment): (&f64, &f64)| Point {
            rate: *rate,
            attainment: *attainment,
            goodput: rate * attainment,
        };
        let curves = attainments.chunks(LOADS);
        curves
            .map(|curve| rates.iter().zip(curve).map(point).collect())
            .collect()
    }

    fn common(&self, contenders: &[Contender], rate: f64) -> Common {
        let runs: Vec<_> = contenders
            .iter()
            .map(|one| (self.with(one), rate))
            .collect();
        let found = self.each(&runs, |rate, outcome| Found {
            rate,
            outcome: Some(outcome),
        });
        Common {
            rate,
            target_ms: self.targets_ms(),
            figures: found.iter().map(|found| figures(found.iter())).collect(),
            ttft: found.iter().map(|found| distribution(found)).collect(),
        }
    }

    fn targets_ms(&self) -> [f64; 3] {
        let mut prompts: Vec<u32> = self.load.jobs.iter().map(|job| job.prompt_tokens).collect();
        prompts.sort_unstable();
        [10, 50, 90].map(|percent| {
            let prompt = prompts.get(prompts.len() * percent / 100);
            self.base.slo.ttft_ms(prompt.copied().unwrap_or(0))
        })
    }

    fn grids(&self, contenders: &[Contender], results: &[Result], bound: f64) -> Grids {
        let rate = (GRID_LOAD * self.fresh(&contenders[0], bound)).max(LEAST_LOAD * bound);
        let of: Vec<usize> = [Some(0), rival(results)].into_iter().flatten().collect();
        let cell = |contender: usize, balancers: u16, staleness: u64| Setup {
            balancers,
            reports: Reports::every(Duration::from_millis(staleness)),
            ..self.with(&contenders[contender])
        };
        let mut runs = Vec::new();
        for contender in &of {
            for balancers in BALANCERS {
                runs.extend(STALENESS_MS.map(|ms| (cell(*contender, balancers, ms), rate)));
            }
        }
        let mut attainments = self.attainments(&runs).into_iter();
        let mut next = || attainments.next().expect("every cell ran");
        let grid = |contender: usize| Grid {
            contender,
            attainment: BALANCERS.map(|_| STALENESS_MS.map(|_| next())),
        };
        Grids {
            rate,
            balancers: BALANCERS,
            staleness_ms: STALENESS_MS,
            of: of.into_iter().map(grid).collect(),
        }
    }

    /// The highest rate at which 90 % keep both targets, with one balancer and fresh reports.
    fn fresh(&self, contender: &Contender, bound: f64) -> f64 {
        let setup = Setup {
            balancers: 1,
            reports: Reports::Fresh,
            ..self.with(contender)
        };
        let rates = each(self.seeds.len(), self.threads, |seed| {
            let (seed, share) = (self.seeds[seed], &SHARES[..1]);
            search(self.load, &setup, seed, bound, STEPS, share, self.ran)[0].rate
        });
        mean(&rates)
    }
}

/// The best of all but the first.
fn rival(results: &[Result]) -> Option<usize> {
    let good = |result: &Result| (result.goodput90.unwrap_or(0.0), result.figures.attainment);
    let order = |one: &(f64, f64), other: &(f64, f64)| {
        one.0.total_cmp(&other.0).then(one.1.total_cmp(&other.1))
    };
    let others = results.iter().enumerate().skip(1);
    // Of equals the one that was named first.
    others
        .rev()
        .max_by(|(_, one), (_, other)| order(&good(one), &good(other)))
        .map(|(place, _)| place)
}

fn distribution(found: &[Found]) -> Vec<(f64, f64)> {
    let outcomes = || found.iter().filter_map(|found| found.outcome.as_ref());
    let mut all: Vec<f32> = outcomes().flat_map(|one| one.ttft_ms.clone()).collect();
    all.sort_by(f32::total_cmp);
    let offered: usize = outcomes().map(|one| one.offered).sum();
    let had = all.len() as f64 / offered.max(1) as f64;
    let at = |number: usize| number as f64 / QUANTILES as f64;
    (0..=QUANTILES)
        .map(|number| (quantile(&all, at(number)), at(number) * had))
        .collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use forebay_scheduler::policy;

    use super::*;
    use crate::fleet::{Rates, study};
    use crate::trace::Trace;

    fn drawn(threads: usize) -> (Pictures, usize) {
        let load = Workload::new(&Trace::sample(Some(8)).unwrap());
        let base = Setup {
            workers: 2,
            ..Setup::default()
        };
        let contenders = ["forebay", "least-requests"]
            .map(|name| Contender::as_published(policy::named(name).unwrap()));
        let rates = Rates::Fixed(load.rate());
        let results = study(&load, &base, &contenders, rates, &[1, 2], threads, &|| ());
        let runs = AtomicUsize::new(0);
        let ran = || {
            runs.fetch_add(1, Ordering::Relaxed);
        };
        let studied = (&contenders[..], &results[..]);
        let pictures = pictures(&load, &base, studied, &[1, 2], threads, &ran);
        (pictures, runs.into_inner())
    }

    #[test]
    fn pictures_are_alike_on_any_number_of_threads_and_take_the_runs_they_said() {
        let ((one, runs), (three, _)) = (drawn(1), drawn(3));
        let text = |pictures: &Pictures| serde_json::to_string(pictures).unwrap();
        assert_eq!(text(&one), text(&three));
        assert_eq!(runs, runs_of_pictures(2, 2));
        assert_eq!(
            one.grids.of.len(),
            2,
            "the second is the best of the others"
        );
        for curve in &one.curves {
            assert_eq!(curve.len(), LOADS);
            assert!(curve.is_sorted_by(|less, more| less.rate < more.rate));
            assert!(curve[0].attainment > 0.9, "{:?}", curve[0]);
        }
        for ttft in &one.common.ttft {
            assert!(ttft.is_sorted_by(|less, more| less.0 <= more.0 && less.1 < more.1));
        }
        assert!(one.common.target_ms.is_sorted());
    }
}
