//! Baseline: each worker in turn, whatever it has to do (the default of nginx, Envoy and Kubernetes'
//! IPVS). Turns are counted for each model, from a random one on: balancers that start together
//! would all begin with the same worker.

use super::{Candidate, Field, Policy, Request, Score, each};

pub(super) struct RoundRobin;

impl Policy for RoundRobin {
    fn name(&self) -> &'static str {
        "round-robin"
    }

    fn scores(
        &self,
        request: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        let workers = candidates.len().max(1) as u64;
        let next = request.turn % workers;
        each(candidates, scores, |one| {
            let ahead = (one.place as u64 + workers - next) % workers;
            Score::by(ahead as f64, 0.0)
        });
    }
}
