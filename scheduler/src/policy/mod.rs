//! Placement rules behind one trait: what each sees, and how its scores are compared.
//!
//! A policy scores all eligible workers for one request, because several published rules compare with
//! the fleet's mean, least or most; it holds no state, lock or task. Who is eligible, what is booked and
//! how ties are drawn is shared ([`crate::View::pick`]). The names are those that a pool's configuration
//! may give (`forebay_proto::config::POLICIES`).
//!
//! Baselines carry their authors' constants, as `docs` and code of autumn 2026 have them, and all see
//! the same: the view of this balancer, its bookings included, and the latency model's predictions. They
//! are the published rules of placement and not the published systems.

mod aibrix;
mod bounded_hash;
mod dynamo;
mod forebay;
mod least_requests;
mod llm_d;
mod llumnix;
mod lmetric;
mod longest_prefix;
mod mooncake;
mod power_of_two;
mod preble;
mod random;
mod round_robin;
mod sglang;

use std::time::Duration;

use forebay_proto::WorkerId;
use serde::{Deserialize, Serialize};

pub(crate) use self::forebay::cost;
use crate::homes::table::Homes;
use crate::index::Hit;
use crate::model::{Backlog, Profile, Residuals, Targets};
use crate::pick::{self, Draws};
use crate::terms::{Arrival, Outlook, Terms};
use crate::wait::Queueing;

/// What a policy knows of a request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Which model, or adapter, is asked for.
    pub model: &'a str,
    /// Workers that are not to be asked again.
    pub tried: &'a [WorkerId],
    /// Workers that run what may kill their engine: this one may too, and they are told apart.
    pub apart: &'a [WorkerId],
    /// The zone that it must stay in.
    pub zone: Option<&'a str>,
    /// The only ones that may be; empty: anyone.
    pub only: &'a [WorkerId],
    /// Length of the prompt, as far as it is known.
    pub prompt_tokens: f64,
    /// How much longer it may be, at the 0.95 quantile.
    pub longer_tokens: f64,
    /// What was promised.
    pub targets: Targets,
    /// What workers hold of it, by worker.
    pub hits: &'a [Hit],
    /// Its family, and who is to hold that.
    pub homes: Option<Homes<'a>>,
    /// Names its conversation: requests of one go together where nothing else decides.
    pub conversation: Option<u64>,
    /// Keyed hash of the prompt's beginning.
    pub head: u64,
    /// Counts the balancer's decisions for this model.
    pub turn: u64,
}

impl<'a> Request<'a> {
    /// A request of which nothing is known but its model.
    #[must_use]
    pub const fn of(model: &'a str) -> Self {
        Self {
            model,
            tried: &[],
            apart: &[],
            zone: None,
            only: &[],
            prompt_tokens: 0.0,
            longer_tokens: 0.0,
            targets: Targets::NONE,
            hits: &[],
            homes: None,
            conversation: None,
            head: 0,
            turn: 0,
        }
    }

    /// Whether this worker is out of the question.
    pub(crate) fn excludes(&self, worker: WorkerId) -> bool {
        let tried = !self.tried.is_empty() && self.tried.contains(&worker);
        let apart = !self.apart.is_empty() && self.apart.contains(&worker);
        tried || apart || (!self.only.is_empty() && !self.only.contains(&worker))
    }
}

/// One eligible worker, as the view has it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Who.
    pub worker: WorkerId,
    /// Its place among the candidates, from 0.
    pub place: usize,
    /// Tokens of the prompt that it holds.
    pub cached_tokens: f64,
    /// Tokens that it is counted to hold as a home of the prompt's family, so that the copy is made there; zero:
    /// it counts as what it is.
    #[serde(default)]
    pub counted_tokens: f64,
    /// What is before it, own bookings included.
    pub backlog: Backlog,
    /// How fast it is.
    pub profile: Profile,
    /// How well that predicts.
    pub residuals: Residuals,
    /// Its slots.
    pub queueing: Queueing,
    /// How old the report is that this follows from.
    pub age: Duration,
    /// How likely it is dead, 0 to 1: reports are late.
    pub suspicion: f64,
    /// Tokens that its KV cache has room for; zero: not known.
    pub kv_tokens: f64,
    /// Prefill time that this balancer booked on it lately, in milliseconds: as much as the last three
    /// minutes would weigh, and fading.
    pub recent_ms: f64,
    /// What the request would find there and do to it.
    pub terms: Terms,
}

impl Candidate {
    /// Predicts anew what a request of this length and with these targets would find here.
    pub fn predict(&mut self, request: &Request<'_>) {
        let Backlog {
            pending_tokens,
            pending_pairs,
            ..
        } = self.backlog;
        let outlook = Outlook::of(
            &self.profile,
            self.residuals,
            &self.queueing,
            &self.backlog,
            self.kv_tokens,
        );
        self.terms = outlook.terms(&Arrival {
            ttft_target_ms: request.targets.ttft_ms,
            pending_tokens,
            pending_pairs,
            prompt_tokens: request.prompt_tokens,
            longer_tokens: request.longer_tokens,
            cached_tokens: self.cached_tokens.max(self.counted_tokens),
            suspicion: self.suspicion,
        });
    }

    fn present(&self) -> f64 {
        self.queueing.present.into()
    }
}

/// All candidates together.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// How many there are.
    pub candidates: usize,
    /// Requests that they have, all together.
    pub in_flight: u64,
    /// Two random numbers, drawn once for the decision.
    pub draws: [u64; 2],
}

impl Field {
    pub(crate) const fn of(field: &pick::Field, draws: &Draws) -> Self {
        Self {
            candidates: field.candidates,
            in_flight: field.in_flight,
            draws: draws.policy,
        }
    }
}

/// How well a worker suits a request. Least is best; fields compare from the top.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
pub struct Score {
    /// What no cost makes up for: any worker of a lower tier is better. Zero is the best.
    pub tier: u32,
    /// What the policy minimises.
    pub first: f64,
    /// What it looks at then.
    pub second: f64,
}

impl Score {
    pub(crate) const WORST: Self = Self {
        tier: u32::MAX,
        first: f64::INFINITY,
        second: f64::INFINITY,
    };

    /// In the best tier, by these.
    const fn by(first: f64, second: f64) -> Self {
        Self {
            tier: 0,
            first,
            second,
        }
    }

    const fn in_tier(self, tier: u32) -> Self {
        Self { tier, ..self }
    }
}

/// A rule that sees nothing but what a placement would mean.
pub(crate) type Rule = fn(&Terms, &Targets) -> Score;

/// A placement rule.
pub trait Policy: Send + Sync {
    /// Its name in configurations, metrics and receipts.
    fn name(&self) -> &'static str;

    /// How well each candidate suits: one score for each, in their order, into an empty `scores`.
    fn scores(
        &self,
        request: &Request<'_>,
        candidates: &[Candidate],
        field: &Field,
        scores: &mut Vec<Score>,
    );

    /// Differences of `first` up to this are none, given the best candidate's score and age: the tie
    /// goes by the conversation.
    fn tolerance(&self, _best: Score, _age: Duration) -> f64 {
        0.0
    }

    /// Whether its choice follows from a predicted wait, which a worker may contradict.
    fn predicts(&self) -> bool {
        false
    }

    /// Whether a home that does not hold its family yet counts as if it did. Published rules know no homes.
    fn counts_homes(&self) -> bool {
        false
    }

    /// The same rule by terms alone, if its cost is never less than [`crate::narrow::Bound`] says:
    /// then most workers need not be scored.
    #[doc(hidden)]
    fn rule(&self) -> Option<Rule> {
        None
    }
}

/// Scores each candidate by itself.
fn each(candidates: &[Candidate], scores: &mut Vec<Score>, score: impl Fn(&Candidate) -> Score) {
    scores.extend(candidates.iter().map(score));
}

/// The least and the most requests that a candidate has.
fn least_and_most(candidates: &[Candidate]) -> (f64, f64) {
    let present = candidates.iter().map(Candidate::present);
    present.fold((f64::INFINITY, 0.0), |(least, most), n| {
        (n.min(least), n.max(most))
    })
}

/// The policy of this name.
#[must_use]
pub fn named(name: &str) -> Option<&'static dyn Policy> {
    let mut policies = ALL.into_iter();
    policies.find(|policy| policy.name() == name)
}

/// The policy of a pool that names none that this version knows.
#[must_use]
pub fn default() -> &'static dyn Policy {
    &forebay::Forebay
}

/// Every policy, the default first.
pub const ALL: [&dyn Policy; 15] = [
    &forebay::Forebay,
    &round_robin::RoundRobin,
    &random::Random,
    &least_requests::LeastRequests,
    &power_of_two::PowerOfTwo,
    &longest_prefix::LongestPrefix,
    &bounded_hash::BoundedHash,
    &sglang::Sglang,
    &dynamo::Dynamo,
    &llm_d::LlmD,
    &aibrix::Aibrix,
    &preble::Preble,
    &lmetric::Lmetric,
    &mooncake::Mooncake,
    &llumnix::Llumnix,
];

/// Rendezvous hash (Thaler and Ravishankar 1998): which worker a key prefers, alike everywhere.
#[must_use]
pub(crate) const fn rendezvous(key: u64, worker: WorkerId) -> u64 {
    mix(key ^ mix(worker.0 as u64 + 1))
}

/// splitmix64's finaliser.
const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod baseline_tests;
#[cfg(test)]
mod tests;
