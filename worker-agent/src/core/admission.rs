//! Whether a placement is taken, and if not, why.

use std::time::Duration;

use forebay_proto::{Incarnation, Now};
use forebay_scheduler::{Acceptance, Load, Queueing, exceeds};

use super::cache::Prompt;
use super::placement::{Placement, PlacementId, Stage, Usage};
use super::state::Core;

/// A placement as a balancer offers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The client's request.
    pub request_id: String,
    /// Whom the balancer placed on.
    pub incarnation: Incarnation,
    /// The model asked for.
    pub model: String,
    /// Path on the engine.
    pub path: String,
    /// Size of the body, exactly.
    pub body_bytes: u64,
    /// What is left until the client's deadline.
    pub deadline: Duration,
    /// Wait before the start that the balancer expects; none: it does not predict.
    pub expected_wait: Option<Duration>,
    /// Enough others refused: an old view is no reason any more.
    pub must_queue: bool,
    /// What is known of its prompt.
    pub prompt: Prompt,
    /// Most tokens of the answer; 0: not known.
    pub max_tokens: u32,
    /// The answer comes as events.
    pub stream: bool,
    /// The isolation scope, for the engine's cache.
    pub cache_salt: Option<String>,
}

/// Why a placement was not taken. Nothing was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalReason {
    /// It was placed on another incarnation.
    Fenced,
    /// An operator cordoned the worker.
    Cordoned,
    /// The worker drains.
    Draining,
    /// Slots and queue are full.
    Full,
    /// It would wait much longer than the balancer expects.
    StaleView,
    /// The engine does not answer, or the agent has not joined yet.
    EngineDown,
    /// The engine does not serve this model.
    WrongModel,
    /// There is no time left.
    Deadline,
    /// Its body does not fit beside those that are held.
    BodyBudget,
    /// The header does not say what it must.
    Invalid,
}

impl RefusalReason {
    /// Every reason, for metrics and tests.
    pub const ALL: [Self; 10] = [
        Self::Fenced,
        Self::Cordoned,
        Self::Draining,
        Self::Full,
        Self::StaleView,
        Self::EngineDown,
        Self::WrongModel,
        Self::Deadline,
        Self::BodyBudget,
        Self::Invalid,
    ];

    /// Its name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fenced => "fenced",
            Self::Cordoned => "cordoned",
            Self::Draining => "draining",
            Self::Full => "full",
            Self::StaleView => "stale_view",
            Self::EngineDown => "engine_down",
            Self::WrongModel => "wrong_model",
            Self::Deadline => "deadline",
            Self::BodyBudget => "body_budget",
            Self::Invalid => "invalid",
        }
    }
}

/// A placement that was taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Admitted {
    /// Its id from here on.
    pub id: PlacementId,
    /// It has a slot; otherwise it waits for [`super::Effect::Start`].
    pub starts: bool,
    /// Reports from this one on contain it.
    pub report_seq: u64,
    /// The state with it.
    pub load: Load,
}

/// A placement that was not taken, with the fresh state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Refused {
    /// Why.
    pub reason: RefusalReason,
    /// The state, which also names the incarnation that serves.
    pub load: Load,
}

impl Core {
    /// Takes a placement or refuses it.
    ///
    /// # Errors
    ///
    /// Returns the reason and the state that it follows from.
    pub fn place(&mut self, now: Now, offer: &Offer) -> Result<Admitted, Refused> {
        self.now = self.now.max(now);
        if let Some(reason) = self.objection(offer) {
            return Err(self.refuse(reason));
        }
        let before = self.shown();
        self.newest += 1;
        let id = PlacementId(self.newest);
        let starts = self.running < self.settings.slots;
        let stage = if starts {
            self.running += 1;
            Stage::Dispatched { since: now }
        } else {
            self.queue.push_back(id);
            Stage::Queued
        };
        self.body_bytes += offer.body_bytes;
        let cached_tokens = self.cache.hit(&offer.prompt);
        let held = self.cache.taken(&offer.prompt);
        let unseen_prefill = (!offer.stream).then(|| self.prefill_time(offer, cached_tokens));
        let placement = Placement {
            stage,
            arrived: now,
            deadline: now + offer.deadline,
            body_bytes: offer.body_bytes,
            prompt: offer.prompt.clone(),
            held,
            cached_tokens,
            max_tokens: offer.max_tokens,
            unseen_prefill,
            usage: Usage::default(),
        };
        self.placements.insert(id, placement);
        self.note(before);
        Ok(Admitted {
            id,
            starts,
            report_seq: self.seq,
            load: self.load(),
        })
    }

    /// The refusal of a header that is no offer.
    #[must_use]
    pub fn refuse(&self, reason: RefusalReason) -> Refused {
        Refused {
            reason,
            load: self.load(),
        }
    }

    fn objection(&self, offer: &Offer) -> Option<RefusalReason> {
        use RefusalReason as R;
        if offer.incarnation != self.incarnation {
            return Some(R::Fenced);
        }
        match self.acceptance() {
            Acceptance::Open => {}
            Acceptance::Cordoned => return Some(R::Cordoned),
            Acceptance::Draining => return Some(R::Draining),
            Acceptance::EngineDown | Acceptance::Joining => return Some(R::EngineDown),
        }
        if !self.models.contains(&offer.model) {
            return Some(R::WrongModel);
        }
        if offer.deadline.is_zero() {
            return Some(R::Deadline);
        }
        let full =
            self.running >= self.settings.slots && self.queued() >= self.settings.queue_limit;
        if full {
            return Some(R::Full);
        }
        let stale = |expected| exceeds(self.wait(), expected);
        if !offer.must_queue && offer.expected_wait.is_some_and(stale) {
            return Some(R::StaleView);
        }
        let room = self.settings.body_budget_bytes - self.body_bytes;
        (offer.body_bytes > room).then_some(R::BodyBudget)
    }

    /// What one more would wait, by the rule that balancers predict with.
    fn wait(&self) -> Duration {
        Queueing {
            present: self.running + self.queued(),
            slots: self.settings.slots,
            service: self.service.value(),
        }
        .wait()
    }
}
