//! What is under way, for whoever waits until nothing is: how much, how old, for how long still.

use std::time::Duration;

use forebay_proto::Now;

use super::placement::{Placement, Stage};
use super::state::Core;

/// Requests that are named.
const NAMED: usize = 5;

/// What is under way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Placements that run or wait.
    pub in_flight: u32,
    /// Those of them that wait.
    pub queued: u32,
    /// Since the oldest of them came.
    pub oldest: Duration,
    /// Tokens of their answers that are expected still: an estimate, since nobody knows where an answer
    /// ends.
    pub tokens_left: u64,
    /// Until the last of them is through, by the same estimate; zero: not known.
    pub eta: Duration,
    /// Ids of the oldest requests, at most five.
    pub oldest_ids: Vec<String>,
}

impl Core {
    /// What is under way as of now. Looks at each placement: not for the path of requests.
    #[must_use]
    pub fn work(&mut self, now: Now) -> Work {
        self.pass(now);
        let mut by_age: Vec<&Placement> = self.placements.values().collect();
        by_age.sort_by_key(|placement| placement.arrived);
        let token_ms = self.token_ms();
        let (mut tokens_left, mut longest, mut eta) = (0.0, 0.0_f64, Duration::ZERO);
        for placement in &by_age {
            let left = placement.tokens_left(self.now, token_ms);
            tokens_left += left;
            longest = longest.max(left);
            if token_ms.is_none() {
                let [_, _, service] = placement.times(self.now);
                eta = eta.max(self.service.value().saturating_sub(service));
            }
        }
        if let Some(token_ms) = token_ms {
            eta = Duration::try_from_secs_f64(longest * token_ms / 1e3).unwrap_or(Duration::MAX);
        }
        let oldest = by_age.first();
        Work {
            in_flight: u32::try_from(by_age.len()).unwrap_or(u32::MAX),
            queued: self.queued(),
            oldest: oldest.map_or(Duration::ZERO, |oldest| self.now.since(oldest.arrived)),
            tokens_left: whole(tokens_left),
            eta,
            oldest_ids: by_age
                .iter()
                .take(NAMED)
                .map(|placement| placement.request_id.clone())
                .collect(),
        }
    }

    /// From token to token as the engine is now, where there is a model of it.
    pub(super) fn token_ms(&self) -> Option<f64> {
        let engine = self.batch.backlog();
        let decodes = engine.decodes.max(1.0);
        self.profile()
            .map(|profile| profile.iteration_ms(0.0, decodes, engine.context_tokens, 0.0))
    }
}

impl Placement {
    /// Tokens that the answer was expected to have when it was taken.
    pub(super) fn expected_answer(&self) -> f64 {
        self.kv_tokens - f64::from(self.prompt.tokens)
    }

    /// Tokens of the answer that are expected still; one at least, while it has not ended.
    pub(super) fn tokens_left(&self, now: Now, token_ms: Option<f64>) -> f64 {
        let expected = self.expected_answer();
        let made = match (self.stage, token_ms) {
            (Stage::Streaming { first_byte, .. }, Some(ms)) if ms > 0.0 => {
                now.since(first_byte).as_secs_f64() * 1e3 / ms
            }
            _ => 0.0,
        };
        (expected - made).max(1.0)
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
const fn whole(tokens: f64) -> u64 {
    tokens as u64
}
