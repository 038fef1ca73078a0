//! Baseline: the prefix-cache rule of AIBrix's gateway (code and `ENV_VARS.md`), with its defaults.
//!
//! Where most and fewest requests are more than 8 apart, the fewest. Else the longest match among those
//! with no more requests than the mean and one standard deviation, fewer requests first; without such a
//! worker the fewest requests.

use super::{Candidate, Field, Policy, Request, Score, each, least_and_most};

const APART: f64 = 8.0;
const SIGMAS: f64 = 1.0;

pub(super) struct Aibrix;

impl Policy for Aibrix {
    fn name(&self) -> &'static str {
        "aibrix"
    }

    fn scores(
        &self,
        _: &Request<'_>,
        candidates: &[Candidate],
        _: &Field,
        scores: &mut Vec<Score>,
    ) {
        let (least, most) = least_and_most(candidates);
        if most - least > APART {
            return each(candidates, scores, |one| Score::by(one.present(), 0.0));
        }
        let workers = candidates.len().max(1) as f64;
        let mean = candidates.iter().map(Candidate::present).sum::<f64>() / workers;
        let squares = candidates.iter().map(|one| (one.present() - mean).powi(2));
        let bound = mean + SIGMAS * (squares.sum::<f64>() / workers).sqrt();
        each(candidates, scores, |one| {
            if one.present() <= bound {
                Score::by(-one.cached_tokens, one.present())
            } else {
                Score::by(one.present(), 0.0).in_tier(1)
            }
        });
    }
}
