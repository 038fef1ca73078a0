//! Whom to ask, and what, where a refusal showed that the view is too old.
//!
//! A placement goes where the view says, at once; the agent refuses what would come much later than was
//! expected. Only then a few workers are asked, and the best that answers in time is taken: asking first
//! costs every request a round trip and hardly a refusal less (`docs/decisions/placing-at-once.md`).

use std::time::Duration;

use crate::index::Hit;

/// Who has not answered by then is not waited for.
pub const PATIENCE: Duration = Duration::from_millis(2);

/// Chunks of one question: they fit a datagram.
pub const MAX_CHUNKS: usize = 96;

/// Workers that are asked, and where many placements are refused.
const FEW: usize = 4;
const MANY: usize = 8;
/// So many are, from this share on.
const OFTEN: f64 = 0.3;
/// Weight of the latest placement.
const WEIGHT: f64 = 1.0 / 64.0;

/// How many are asked: more, where views are often wrong.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asking {
    refused: f64,
}

impl Asking {
    /// A placement was taken, or refused because the view was too old.
    pub fn placed(&mut self, refused: bool) {
        self.refused += WEIGHT * (f64::from(u8::from(refused)) - self.refused);
    }

    /// How many are asked next.
    #[must_use]
    pub fn width(&self) -> usize {
        if self.refused >= OFTEN { MANY } else { FEW }
    }

    /// Share of the latest placements that were refused because the view was too old.
    #[must_use]
    pub const fn refused(&self) -> f64 {
        self.refused
    }
}

/// The chunks of a prompt that a question names, in their order: the last, those up to which someone is
/// believed to hold it, and others evenly between.
#[must_use]
pub fn sample(chunks: &[u64], hits: &[Hit]) -> Vec<u64> {
    if chunks.len() <= MAX_CHUNKS {
        return chunks.to_vec();
    }
    let ends = hits.iter().map(|hit| hit.chunks as usize);
    let ends = ends.filter(|end| (1..=chunks.len()).contains(end));
    let mut places: Vec<usize> = ends.map(|end| end - 1).collect();
    places.sort_unstable();
    places.dedup();
    // The deepest are worth the most.
    places.drain(..places.len().saturating_sub(MAX_CHUNKS / 2));
    let rest = MAX_CHUNKS - places.len();
    places.extend((1..=rest).map(|part| part * chunks.len() / rest - 1));
    places.sort_unstable();
    places.dedup();
    places.into_iter().map(|place| chunks[place]).collect()
}

#[cfg(test)]
mod tests {
    use forebay_proto::WorkerId;

    use super::*;

    #[test]
    fn more_are_asked_where_views_are_often_wrong() {
        let mut asking = Asking::default();
        assert_eq!(asking.width(), FEW);
        (0..64).for_each(|_| asking.placed(true));
        assert_eq!(asking.width(), MANY);
        (0..256).for_each(|_| asking.placed(false));
        assert_eq!(asking.width(), FEW);
    }

    #[test]
    fn a_question_has_the_last_chunk_and_where_someones_part_ends() {
        let chunks: Vec<u64> = (0..1_000).collect();
        let hit = |end| Hit {
            worker: WorkerId(end),
            chunks: end,
            tokens: end,
        };
        let sampled = sample(&chunks, &[hit(500), hit(17), hit(17)]);
        assert!(sampled.len() <= MAX_CHUNKS && sampled.is_sorted());
        for place in [16, 499, 999] {
            assert!(sampled.contains(&place), "{place}");
        }
        let widest = sampled.windows(2).map(|two| two[1] - two[0]).max();
        assert!(widest <= Some(12), "{widest:?}");
        let many: Vec<Hit> = (1..=900).map(hit).collect();
        let sampled = sample(&chunks, &many);
        assert!(sampled.len() <= MAX_CHUNKS && sampled.contains(&899));
        assert_eq!(sample(&chunks[..96], &[]).len(), 96);
    }
}
