//! A fleet in virtual time: real traces, the real decision and queue code, engines that are models.
//!
//! Balancers are the scheduler's view, index and policies; workers are the agent's core before
//! [`crate::model::Engine`]. Only what lies between them is made up here: messages that take 0.15 ms and
//! now and then 5 ms more, reports that are as old as the setup says, and faults. One run offers a whole
//! trace at one rate; equal arguments give equal outcomes to the bit.
//!
//! - [`run`]: one run.
//! - [`fluid`]: what no placement can exceed.
//! - [`search`]: the highest rate at which enough requests keep their targets.
//! - [`study()`]: several policies on the same requests, seed by seed.
//! - [`pictures()`]: the further runs that pictures of a study show.

mod arrivals;
mod balancer;
mod fault;
mod fluid;
mod homes;
mod measure;
mod pictures;
mod search;
mod study;
mod threads;
mod worker;
mod world;

use std::time::Duration;

use forebay_scheduler::model::Profile;
use forebay_scheduler::policy::Policy;

pub use arrivals::{Spread, Workload};
pub use fault::{Fault, FaultError, What};
pub use fluid::{Fluid, fluid};
pub use measure::{Outcome, Served, quantile};
pub use pictures::{
    BALANCERS, Common, Grid, Grids, Pictures, Point, STALENESS_MS, Who, pictures, runs_of_pictures,
};
pub use search::{Found, search};
pub use study::{Contender, Estimate, Figures, Rates, Result, SHARES, runs_of, study};
pub use world::{run, run_in_detail};

/// The model that every request asks for.
const MODEL: &str = "model";

/// What a request is promised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slo {
    /// Until the first token, whatever the prompt.
    pub ttft_ms: f64,
    /// And for each token of the prompt.
    pub ttft_ms_per_token: f64,
    /// From token to token, in the mean of an answer.
    pub tpot_ms: f64,
}

impl Slo {
    fn ttft_ms(&self, prompt_tokens: u32) -> f64 {
        self.ttft_ms + self.ttft_ms_per_token * f64::from(prompt_tokens)
    }
}

impl Default for Slo {
    fn default() -> Self {
        Self {
            ttft_ms: 1_000.0,
            ttft_ms_per_token: 0.25,
            tpot_ms: 150.0,
        }
    }
}

/// Who orders what waits at a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The engine, first come, first served: what published rules assume.
    Fcfs,
    /// The agent: least slack first, and no more on the engine than keeps the order its own.
    Slack,
}

/// How balancers learn how workers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reports {
    /// Every decision sees the workers as they are.
    Fresh,
    /// Reports come so often, whatever happens.
    Every(Duration),
    /// As agents send them: soon after a change to those who used the worker lately, and else now and then.
    Deployed,
}

impl Reports {
    /// So often; zero: always fresh.
    #[must_use]
    pub const fn every(interval: Duration) -> Self {
        if interval.is_zero() {
            Self::Fresh
        } else {
            Self::Every(interval)
        }
    }
}

/// What stands between a placement and an old view, where the policy predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Nothing: a worker takes what it is given.
    Nothing,
    /// The agent refuses what would come much later than the balancer expects.
    Veto,
    /// And after a refusal the balancer asks the best few before it places again.
    Ask,
    /// The balancer asks the best few before each placement, and nobody refuses.
    AskFirst,
    /// And a worker that is asked keeps a place for 10 ms.
    Reserve,
}

/// A fleet and how it is run.
#[derive(Clone)]
pub struct Setup {
    /// The placement rule.
    pub policy: &'static dyn Policy,
    /// Who orders what waits at a worker.
    pub order: Order,
    /// Workers, at least one.
    pub workers: u32,
    /// Balancers, at least one.
    pub balancers: u16,
    /// How balancers learn how workers are.
    pub reports: Reports,
    /// What stands between a placement and an old view.
    pub check: Check,
    /// Share of the reports that are lost.
    pub report_loss: f64,
    /// How fast an engine is.
    pub profile: Profile,
    /// Engines are faster or slower than that by up to this share.
    pub speed_spread: f64,
    /// Tokens that a worker's cache holds.
    pub kv_tokens: u64,
    /// Requests that run on an engine at once.
    pub max_seqs: u32,
    /// What is promised.
    pub slo: Slo,
    /// What becomes of rounded timestamps.
    pub spread: Spread,
    /// Whether a leader gives hot families homes, by what agents say, and balancers count them.
    pub homes: bool,
    /// What goes wrong.
    pub faults: Vec<Fault>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            policy: forebay_scheduler::policy::default(),
            order: Order::Slack,
            workers: 8,
            balancers: 1,
            reports: Reports::Fresh,
            check: Check::Ask,
            report_loss: 0.0,
            profile: Profile::default(),
            speed_spread: 0.0,
            kv_tokens: 6_000 * 512,
            max_seqs: 256,
            slo: Slo::default(),
            spread: Spread::Jitter,
            homes: false,
            faults: Vec::new(),
        }
    }
}
