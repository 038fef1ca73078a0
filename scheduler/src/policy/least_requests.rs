//! Baseline: the worker with the fewest requests, equals at random (join the shortest queue, Winston
//! 1977; `least_conn` and `least_request` of proxies).

use super::{Candidate, Field, Policy, Request, Score};

pub(super) struct LeastRequests;

impl Policy for LeastRequests {
    fn name(&self) -> &'static str {
        "least-requests"
    }

    fn score(&self, _: &Request<'_>, candidate: &Candidate, _: &Field) -> Score {
        Score {
            first: candidate.queueing.present.into(),
            second: 0.0,
        }
    }
}
