//! Baseline: consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018) on the
//! prompt's beginning.
//!
//! With the constants of KubeAI's gateway: the model and the first 100 bytes, 256 places of each worker
//! on the ring, and at most 1.25 times the mean of requests. The ring is walked by the least distance
//! from the key to a worker's next place, which is the same order.

use super::{Candidate, Field, Policy, Request, Score, each, mix};

const PLACES: u64 = 256;
const MOST: f64 = 1.25;

pub(super) struct BoundedHash;

impl Policy for BoundedHash {
    fn name(&self) -> &'static str {
        "bounded-hash"
    }

    fn scores(
        &self,
        request: &Request<'_>,
        candidates: &[Candidate],
        field: &Field,
        scores: &mut Vec<Score>,
    ) {
        let model = request
            .model
            .bytes()
            .fold(0, |hash, byte| mix(hash ^ u64::from(byte)));
        let key = mix(request.head ^ model);
        let bound = MOST * (field.in_flight + 1) as f64 / field.candidates.max(1) as f64;
        each(candidates, scores, |candidate| {
            let worker = mix(u64::from(candidate.worker.0) + 1);
            let places = (0..PLACES).map(|place| mix(worker ^ place).wrapping_sub(key));
            let full = candidate.present() + 1.0 > bound.max(1.0);
            Score::by(places.min().unwrap_or(u64::MAX) as f64, 0.0).in_tier(u32::from(full))
        });
    }
}
