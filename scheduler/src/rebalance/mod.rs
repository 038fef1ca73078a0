//! What a rebalance would move, and what it would be good for.
//!
//! Agents record what they were asked for in the last minutes: fingerprints and lengths, no text. A plan
//! replays that record through the rule of placement and the latency model, once with the homes as they are
//! and once for each way to change them that looks promising, and keeps what makes the busiest worker less
//! busy. Pure: the leader runs it, and so can a test.
//!
//! Of a large pool it looks at the busiest workers and at the least busy, so that it takes seconds whatever the size.
//!
//! What the replay leaves out: caches are as large as the record shows them to be (a turn of a conversation
//! that stays finds what it found), engines take prefills in the order of their arrival, and reports are
//! never late.

mod engine;
mod replay;
mod search;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use forebay_proto::wire::control::Arrival;
use forebay_proto::{Family, Forecast, Millis, Move, WorkerForecast, WorkerId};

use crate::model::Profile;

pub use search::plan;

/// Requests of one replay; of longer records the newest count.
pub const MAX_ARRIVALS: usize = 50_000;

/// What one worker's agent recorded.
#[derive(Clone, Debug)]
pub struct Record {
    /// Who.
    pub worker: WorkerId,
    /// How fast it is.
    pub profile: Profile,
    /// One conversation in so many is in it; at least 1.
    pub one_in: u32,
    /// What it served, in any order.
    pub arrivals: Vec<Arrival>,
}

/// What a plan is made from.
#[derive(Clone, Debug)]
pub struct Situation<'a> {
    /// The table as it is, of one pool.
    pub families: &'a BTreeMap<u64, Family>,
    /// Who holds each family now.
    pub holders: &'a BTreeMap<u64, BTreeSet<WorkerId>>,
    /// Of each worker that is ready.
    pub records: &'a [Record],
    /// How far back the records go.
    pub window: Millis,
}

/// A plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// In the order in which they help most; empty: it is balanced already, or no move would help.
    pub moves: Vec<Move>,
    /// As it was recorded.
    pub measured: Forecast,
    /// As it is replayed with the homes as they are.
    pub before: Forecast,
    /// As it is replayed with the homes as they would be.
    pub after: Forecast,
}

/// How much busier the busiest worker is than the mean, as a share of that; 0: nobody has anything to do.
#[must_use]
pub fn imbalance(forecast: &Forecast) -> f64 {
    let loads = forecast.workers.iter().map(|worker| f64::from(worker.load));
    let (sum, most) = loads.fold((0.0, 0.0), |(sum, most): (f64, f64), load| {
        (sum + load, most.max(load))
    });
    let mean = sum / forecast.workers.len().max(1) as f64;
    if mean > 0.0 { most / mean - 1.0 } else { 0.0 }
}

/// One request of all records, and where it was in truth.
#[derive(Clone, Copy, Debug)]
struct Recorded {
    arrival: Arrival,
    worker: WorkerId,
    /// Stands for so many.
    weight: f64,
}

/// Adds up what became of requests.
#[derive(Clone, Debug, Default)]
struct Sum {
    work_ms: BTreeMap<WorkerId, (f64, f64)>,
    prompt_tokens: f64,
    cached_tokens: f64,
    promised: f64,
    in_time: f64,
    arrivals: f64,
}

impl Sum {
    fn of(workers: impl Iterator<Item = WorkerId>) -> Self {
        Self {
            work_ms: workers.map(|worker| (worker, (0.0, 0.0))).collect(),
            ..Self::default()
        }
    }

    fn add(&mut self, one: &Recorded, worker: WorkerId, cached: f64, work_ms: f64) {
        let (work, arrivals) = self.work_ms.entry(worker).or_default();
        *work += one.weight * work_ms;
        *arrivals += one.weight;
        self.prompt_tokens += one.weight * f64::from(one.arrival.prompt_tokens);
        self.cached_tokens += one.weight * cached;
        self.arrivals += one.weight;
    }

    fn promise(&mut self, one: &Recorded, kept: bool) {
        self.promised += one.weight;
        self.in_time += one.weight * f64::from(u8::from(kept));
    }

    fn forecast(&self, window: Millis) -> Forecast {
        let seconds = (window.0.max(1) as f64) / 1e3;
        let workers = self.work_ms.iter();
        Forecast {
            workers: workers
                .map(|(worker, (work_ms, arrivals))| WorkerForecast {
                    worker: *worker,
                    load: whole(work_ms / seconds),
                    arrivals: whole(*arrivals),
                })
                .collect(),
            hit_ratio: thousandths(self.cached_tokens, self.prompt_tokens),
            in_time: thousandths(self.in_time, self.promised),
            arrivals: whole(self.arrivals),
            window,
        }
    }
}

/// All of nothing is everything.
fn thousandths(part: f64, of: f64) -> u32 {
    if of > 0.0 {
        whole(part / of * 1e3)
    } else {
        1_000
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
fn whole(value: f64) -> u32 {
    value.round() as u32
}
