//! Whether a placement is taken, and if not, why.

use std::time::Duration;

use forebay_proto::{Incarnation, Now};
use forebay_scheduler::heat::Arrived;
use forebay_scheduler::model::{Backlog, Targets, attention_pairs};
use forebay_scheduler::{Acceptance, Load, Queueing, exceeds, first_token};

use super::cache::Prompt;
use super::deaths::Named;
use super::placement::{Effect, Placement, PlacementId, Stage, Usage};
use super::queue::StartBy;
use super::state::Core;

/// A placement as a balancer offers it.
#[derive(Clone, Debug, PartialEq)]
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
    /// What was promised, from now.
    pub targets: Targets,
    /// Time to first token that the balancer expects; none: it does not predict.
    pub expected_ttft: Option<Duration>,
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
    /// The zone that it must stay in.
    pub zone: Option<String>,
    /// Epoch of the key that its prompt's fingerprints were made with.
    pub key_epoch: u32,
    /// A copy of a request that runs elsewhere, for the cache's sake.
    pub shadow: bool,
    /// Whose it is; empty: the balancer does not say.
    pub tenant: String,
    /// By what it is known if an engine dies of it; none: its balancer does not say.
    pub named: Option<Named>,
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
    /// Its first token would come much later than the balancer expects.
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
    /// It must stay in another zone.
    WrongZone,
    /// The engine's cache is another tenant's.
    WrongTenant,
}

impl RefusalReason {
    /// Every reason, for metrics and tests.
    pub const ALL: [Self; 12] = [
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
        Self::WrongZone,
        Self::WrongTenant,
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
            Self::WrongZone => "wrong_zone",
            Self::WrongTenant => "wrong_tenant",
        }
    }
}

/// A question before a placement: what would such a request meet?
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Question {
    /// Chunks of its prompt, the last and some before it, in their order.
    pub chunks: Vec<u64>,
    /// Its length in tokens.
    pub prompt_tokens: u32,
}

/// The answer, which binds nobody.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quote {
    /// Tokens of its prompt that are believed to be in the cache.
    pub cached_tokens: u32,
    /// The state as it is.
    pub load: Load,
}

/// A placement that was taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Admitted {
    /// Its id from here on.
    pub id: PlacementId,
    /// The engine is to have it now; otherwise it waits for [`super::Effect::Start`].
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
        self.pass(now);
        if let Some(reason) = self.objection(offer) {
            return Err(self.refuse(reason));
        }
        let forecast = self.forecast(offer);
        if let Some(reason) = self.disappointment(offer, &forecast) {
            return Err(self.refuse(reason));
        }
        if offer.shadow {
            let cached = f64::from(forecast.cached_tokens);
            let uncached = f64::from(offer.prompt.tokens) - cached;
            let profile = self.profile().copied().unwrap_or_default();
            if !self
                .shadows
                .admit(now, profile.work_ms(cached, uncached, 0.0))
            {
                return Err(self.refuse(RefusalReason::Full));
            }
        }
        let before = self.shown();
        self.newest += 1;
        let id = PlacementId(self.newest);
        let held = self.cache.taken(&offer.prompt);
        let answer = self.lengths.expected_answer(offer.max_tokens);
        let predicted =
            offer.stream && self.fit.is_some() && offer.prompt.tokens > 0 && !offer.shadow;
        let start_by = if offer.shadow {
            self.shadows.present = Some(id);
            StartBy::last(forecast.prefill_ms)
        } else {
            StartBy::new(now, offer.targets.ttft_ms, forecast.prefill_ms)
        };
        let heat = (!offer.shadow).then(|| {
            let arrived = Arrived {
                chunks: &offer.prompt.chunks,
                key_epoch: offer.key_epoch,
                spread: offer.prompt.spread(offer.prompt.tokens),
                cached_tokens: forecast.cached_tokens,
                output_tokens: whole(answer),
                ttft_target_ms: offer.targets.ttft_ms,
            };
            self.heat.arrived(now, &arrived)
        });
        let placement = Placement {
            request_id: offer.request_id.clone(),
            stage: Stage::Queued,
            arrived: now,
            deadline: now + offer.deadline,
            body_bytes: offer.body_bytes,
            prompt: offer.prompt.clone(),
            held,
            cached_tokens: forecast.cached_tokens,
            foreseen: None,
            stream: offer.stream,
            max_tokens: offer.max_tokens,
            targets: offer.targets,
            start_by,
            heat,
            kv_tokens: f64::from(offer.prompt.tokens) + answer,
            predicted_ms: predicted.then_some(forecast.ttft.as_secs_f64() * 1e3),
            usage: Usage::default(),
            named: offer.named.clone(),
        };
        self.suspects += u32::from(placement.is_suspected());
        self.tenants.took(&offer.tenant);
        self.body_bytes += offer.body_bytes;
        self.queue.push(&placement.waiting(id));
        self.placements.insert(id, placement);
        self.fill();
        let starts = self.starts(id);
        self.note(before);
        Ok(Admitted {
            id,
            starts,
            report_seq: self.seq,
            load: self.load(),
        })
    }

    /// Says what a request would meet, without taking it.
    pub fn quote(&mut self, now: Now, question: &Question) -> Quote {
        self.pass(now);
        let most = question.prompt_tokens.saturating_sub(1);
        Quote {
            cached_tokens: self.cache.deepest(&question.chunks).min(most),
            load: self.load(),
        }
    }

    /// Whether it was given to the engine; the effect is taken back.
    fn starts(&mut self, id: PlacementId) -> bool {
        let effects = self.effects.len();
        self.effects.retain(|effect| *effect != Effect::Start(id));
        self.effects.len() < effects
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
        if offer.zone.as_ref().is_some_and(|zone| *zone != self.zone) {
            return Some(R::WrongZone);
        }
        if !self.tenants.admits(&offer.tenant) {
            return Some(R::WrongTenant);
        }
        if offer.deadline.is_zero() {
            return Some(R::Deadline);
        }
        let present = u64::from(self.running) + u64::from(self.queued());
        let room = u64::from(self.settings.slots) + u64::from(self.settings.queue_limit);
        (present >= room).then_some(R::Full)
    }

    /// What the balancer could not know.
    fn disappointment(&self, offer: &Offer, forecast: &Forecast) -> Option<RefusalReason> {
        let stale = |expected| exceeds(forecast.ttft, expected);
        if !offer.must_queue && offer.expected_ttft.is_some_and(stale) {
            return Some(RefusalReason::StaleView);
        }
        let room = self.settings.body_budget_bytes - self.body_bytes;
        (offer.body_bytes > room).then_some(RefusalReason::BodyBudget)
    }

    /// What one more would meet, by the rule that balancers predict with.
    fn forecast(&self, offer: &Offer) -> Forecast {
        let cached_tokens = self.cache.hit(&offer.prompt);
        let cached = f64::from(cached_tokens);
        let uncached = (f64::from(offer.prompt.tokens) - cached).max(0.0);
        let queueing = Queueing {
            present: self.running + self.queued(),
            slots: self.settings.slots,
            service: self.service.value(),
        };
        let mut backlog = self.backlog();
        let profile = self.profile();
        if profile.is_none() {
            // Requests are all that is known.
            backlog.decodes = queueing.present.into();
        }
        let engine = Backlog {
            pending_tokens: 0.0,
            pending_pairs: 0.0,
            ..backlog
        };
        let pairs = attention_pairs(cached, uncached);
        let prefill_ms = profile.map_or(0.0, |p| p.prefill_ms(&engine, uncached, pairs));
        let profile = profile.copied().unwrap_or_default();
        Forecast {
            cached_tokens,
            prefill_ms,
            ttft: first_token(
                &queueing,
                &profile,
                &backlog,
                (cached, uncached),
                offer.targets.ttft_ms,
            ),
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
const fn whole(tokens: f64) -> u32 {
    tokens as u32
}

/// What is expected of one more.
struct Forecast {
    /// Tokens of its prompt that are believed to be in the cache.
    cached_tokens: u32,
    /// Prefill of the rest, once the engine has it; zero: not known.
    prefill_ms: f64,
    /// Until its first token, behind all that is here.
    ttft: Duration,
}
