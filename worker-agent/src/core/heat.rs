//! What becomes of a request, for the heat of its families: the time that it took, by the model, once it has
//! taken it.

use std::time::Duration;

use forebay_proto::wire::control;
use forebay_proto::{Incarnation, Millis, Now};
use forebay_scheduler::heat::Finished;
use forebay_scheduler::model::Profile;

use super::placement::{End, Placement, PlacementId, Stage};
use super::state::Core;

/// What an agent recorded, and what its worker is like.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// Whose.
    pub incarnation: Incarnation,
    /// Oldest first.
    pub arrivals: Vec<control::Arrival>,
    /// One conversation in so many is among them.
    pub one_in: u32,
    /// How far back they go.
    pub window: Duration,
    /// How fast the worker is; nominal, where nobody said.
    pub profile: Profile,
    /// Tokens that its cache has room for; 0: not told.
    pub kv_tokens: u64,
}

impl Core {
    /// What it is asked for, for the leader. Looks at everything that is known: not for the path of requests.
    #[must_use]
    pub fn heat(&self, now: Now) -> control::Heat {
        self.heat.told(now, |chunk| self.cache.tokens_to(chunk))
    }

    /// Requests of the last so many milliseconds, at most `most`.
    #[must_use]
    pub fn recorded(&self, now: Now, window_ms: u64, most: usize) -> Recorded {
        let (arrivals, one_in) = self.heat.arrivals(now, window_ms, most);
        Recorded {
            incarnation: self.incarnation,
            arrivals,
            one_in,
            window: self.heat.since(now).min(Millis(window_ms).duration()),
            profile: self.profile().copied().unwrap_or_default(),
            kv_tokens: self.settings.kv_tokens,
        }
    }

    /// Families of prompts that are known.
    #[must_use]
    pub const fn families(&self) -> usize {
        self.heat.families()
    }

    /// Requests that were recorded.
    #[must_use]
    pub const fn recordings(&self) -> u64 {
        self.heat.recorded()
    }

    /// Time of the worker that requests took so far, by the model (a nominal one where none was given), in
    /// milliseconds.
    #[must_use]
    pub const fn took_ms(&self) -> f64 {
        self.heat.took_ms()
    }

    /// Its first byte came: it has taken its prefill.
    pub(super) fn began(&mut self, id: PlacementId) {
        let profile = self.profile().copied().unwrap_or_default();
        let Some(placement) = self.placements.get_mut(&id) else {
            return;
        };
        let Stage::Streaming { first_byte, .. } = placement.stage else {
            return;
        };
        let (uncached, _) = placement.prefill();
        let cached = f64::from(placement.cached_tokens);
        let Some(ticket) = &mut placement.heat else {
            return;
        };
        if ticket.took_ms() > 0.0 {
            return;
        }
        let took_ms = profile.work_ms(cached, uncached, 0.0);
        self.heat.took(self.now, ticket, took_ms);
        // Of an answer that comes whole nobody saw the first token.
        if placement.stream && placement.targets.ttft_ms.is_finite() {
            let took = first_byte.since(placement.arrived).as_secs_f64() * 1e3;
            self.heat
                .first_token(self.now, took <= placement.targets.ttft_ms);
        }
    }

    /// It is over, however.
    pub(super) fn over_for_heat(&mut self, id: PlacementId, placement: &mut Placement, end: End) {
        self.shadows
            .over(id, matches!(placement.stage, Stage::Queued));
        let profile = self.profile().copied().unwrap_or_default();
        let made = self.output(placement, end);
        let Some(ticket) = &mut placement.heat else {
            return;
        };
        match placement.stage {
            Stage::Streaming { .. } => {}
            // Another worker has it, or nobody.
            Stage::Queued => return self.heat.unserved(self.now, ticket),
            Stage::Dispatched { .. } if end == End::NotStarted => {
                return self.heat.unserved(self.now, ticket);
            }
            Stage::Dispatched { .. } => return,
        }
        let usage = placement.usage;
        let prompt_tokens = usage.prompt_tokens.unwrap_or(placement.prompt.tokens);
        let cached_tokens = usage.cached_tokens.unwrap_or(placement.cached_tokens);
        let finished = Finished {
            prompt_tokens,
            cached_tokens: cached_tokens.min(prompt_tokens),
            output_tokens: made,
        };
        let cached = f64::from(finished.cached_tokens);
        let all_ms = profile.work_ms(cached, f64::from(prompt_tokens) - cached, made.into());
        let more_ms = all_ms - ticket.took_ms();
        self.heat.took(self.now, ticket, more_ms);
        self.heat.finished(self.now, ticket, &finished);
    }

    /// Tokens of its answer: counted, or about as many as there was time for.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
    fn output(&self, placement: &Placement, end: End) -> u32 {
        placement.usage.completion_tokens.unwrap_or_else(|| {
            let expected = placement.expected_answer();
            match end {
                End::Complete => expected as u32,
                _ => (expected - placement.tokens_left(self.now, self.token_ms())) as u32,
            }
        })
    }
}
