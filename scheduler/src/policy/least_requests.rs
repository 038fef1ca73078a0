//! Baseline: the worker with the fewest requests (join the shortest queue), equals at random.

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
