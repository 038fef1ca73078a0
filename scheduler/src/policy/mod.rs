//! Placement rules behind one trait: what each sees, and how its scores are compared.
//!
//! A policy scores one eligible worker for one request; it holds no state, lock or task. Who is
//! eligible, what is booked and how ties are drawn is shared ([`crate::View::pick`]). The names are those
//! that a pool's configuration may give (`forebay_proto::config::POLICIES`).

mod bounded_hash;
mod forebay;
mod least_requests;
mod longest_prefix;
mod power_of_two;
mod random;
mod round_robin;

use std::time::Duration;

use forebay_proto::WorkerId;

use crate::index::Hit;
use crate::model::{Backlog, Profile, Residuals, Targets};
use crate::wait::Queueing;

/// What a policy knows of a request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Which model, or adapter, is asked for.
    pub model: &'a str,
    /// Workers that are not to be asked again.
    pub tried: &'a [WorkerId],
    /// Length of the prompt, as far as it is known.
    pub prompt_tokens: f64,
    /// What was promised.
    pub targets: Targets,
    /// What workers hold of it, by worker.
    pub hits: &'a [Hit],
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
            prompt_tokens: 0.0,
            targets: Targets::NONE,
            hits: &[],
            conversation: None,
            head: 0,
            turn: 0,
        }
    }
}

/// One eligible worker, as the view has it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Who.
    pub worker: WorkerId,
    /// Its place among the candidates, from 0.
    pub place: usize,
    /// Tokens of the prompt that it holds.
    pub cached_tokens: f64,
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

/// How well a worker suits a request. Least is best; fields compare from the top.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Score {
    /// What the policy minimises.
    pub first: f64,
    /// What it looks at then.
    pub second: f64,
}

/// A placement rule.
pub trait Policy: Send + Sync {
    /// Its name in configurations, metrics and receipts.
    fn name(&self) -> &'static str;

    /// How well this worker suits.
    fn score(&self, request: &Request<'_>, candidate: &Candidate, field: &Field) -> Score;

    /// Differences of `first` up to this are none, given the best candidate's score and age: the tie
    /// goes by the conversation.
    fn tolerance(&self, _best: Score, _age: Duration) -> f64 {
        0.0
    }

    /// Whether its choice follows from a predicted wait, which a worker may contradict.
    fn predicts(&self) -> bool {
        false
    }
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
pub const ALL: [&dyn Policy; 7] = [
    &forebay::Forebay,
    &round_robin::RoundRobin,
    &random::Random,
    &least_requests::LeastRequests,
    &power_of_two::PowerOfTwo,
    &longest_prefix::LongestPrefix,
    &bounded_hash::BoundedHash,
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
mod tests;
