//! Baseline: each worker in turn, whatever it has to do (the default of nginx, Envoy and Kubernetes'
//! IPVS). Turns are counted for each model, from a random one on: balancers that start together
//! would all begin with the same worker.

use super::{Candidate, Field, Policy, Request, Score};

pub(super) struct RoundRobin;

impl Policy for RoundRobin {
    fn name(&self) -> &'static str {
        "round-robin"
    }

    fn score(&self, request: &Request<'_>, candidate: &Candidate, field: &Field) -> Score {
        let candidates = field.candidates.max(1) as u64;
        let next = request.turn % candidates;
        let ahead = (candidate.place as u64 + candidates - next) % candidates;
        Score {
            first: ahead as f64,
            second: 0.0,
        }
    }
}
