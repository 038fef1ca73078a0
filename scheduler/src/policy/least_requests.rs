//! Baseline: the worker with the fewest requests, equals at random (join the shortest queue, Winston
//! 1977; `least_conn` and `least_request` of proxies).

use super::{Candidate, Field, Policy, Request, Score, each};

pub(super) struct LeastRequests;

impl Policy for LeastRequests {
    fn name(&self) -> &'static str {
        "least-requests"
    }

    fn scores(
        &self,
        _: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        each(candidates, scores, |one| Score::by(one.present(), 0.0));
    }
}
