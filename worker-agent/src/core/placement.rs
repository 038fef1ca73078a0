//! One placement's life, and how it ends.

use std::time::Duration;

use forebay_proto::Now;
use forebay_scheduler::Load;
use forebay_scheduler::heat::Ticket;
use forebay_scheduler::model::{Targets, attention_pairs};

use super::cache::{Held, Prompt};
use super::deaths::Named;
use super::kv::Promise;
use super::queue::{StartBy, Waiting};

/// One placement of this agent's life; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlacementId(pub(super) u64);

impl std::fmt::Display for PlacementId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// How a placement that was admitted ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The engine's answer was relayed to its end.
    Complete,
    /// The engine was never asked.
    NotStarted,
    /// The engine failed after it was asked.
    EngineFailed,
    /// The deadline passed.
    Timeout,
    /// The balancer gave it up.
    Cancelled,
    /// A drain's deadline passed.
    Drained,
}

impl End {
    /// Every end, for metrics and tests.
    pub const ALL: [Self; 6] = [
        Self::Complete,
        Self::NotStarted,
        Self::EngineFailed,
        Self::Timeout,
        Self::Cancelled,
        Self::Drained,
    ];

    /// Its name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::NotStarted => "not_started",
            Self::EngineFailed => "engine_failed",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
            Self::Drained => "drained",
        }
    }
}

/// Why a placement left the queue without having run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unstarted {
    /// Its deadline passed there.
    Deadline,
    /// The engine went down.
    EngineDown,
    /// The worker drains: the balancer places it elsewhere.
    Draining,
}

impl Unstarted {
    /// How the placement ended.
    #[must_use]
    pub const fn end(self) -> End {
        match self {
            Self::Deadline => End::Timeout,
            Self::EngineDown | Self::Draining => End::NotStarted,
        }
    }

    /// For an operator.
    #[must_use]
    pub const fn detail(self) -> &'static str {
        match self {
            Self::Deadline => "the deadline passed in the agent's queue",
            Self::EngineDown => "the engine went down while this waited in the agent's queue",
            Self::Draining => "the worker drains: what waited in its queue goes elsewhere",
        }
    }
}

/// What the engine counted of a request; absent is not zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: Option<u32>,
    /// Those of them that were in the cache.
    pub cached_tokens: Option<u32>,
    /// Tokens of the answer.
    pub completion_tokens: Option<u32>,
}

/// What a placement leaves behind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ending {
    /// Reports from this one on contain the release.
    pub report_seq: u64,
    /// The state after it.
    pub load: Load,
    /// Time in the agent's queue.
    pub queue: Duration,
    /// From there to the engine's first byte; zero when none came.
    pub first_byte: Duration,
    /// Time it held its slot.
    pub service: Duration,
    /// What the engine counted.
    pub usage: Usage,
    /// It was a copy of a request that runs elsewhere.
    pub shadow: bool,
}

/// What the rim has to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Effect {
    /// The engine is to have this one, which waited.
    Start(PlacementId),
    /// This one waited in vain and is over.
    Over(PlacementId, Unstarted, Ending),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Stage {
    Queued,
    Dispatched { since: Now },
    Streaming { since: Now, first_byte: Now },
}

#[derive(Clone, Debug)]
pub(super) struct Placement {
    /// The client's, for whoever waits for its end.
    pub(super) request_id: String,
    pub(super) stage: Stage,
    pub(super) arrived: Now,
    pub(super) deadline: Now,
    /// What it holds of the body budget.
    pub(super) body_bytes: u64,
    pub(super) prompt: Prompt,
    pub(super) held: Held,
    /// Tokens of the prompt that were predicted to be in the cache when it was taken.
    pub(super) cached_tokens: u32,
    /// What the engine's events foresaw of it when the engine was given it.
    pub(super) foreseen: Option<Promise>,
    /// Most tokens of the answer; 0: not known.
    pub(super) max_tokens: u32,
    /// Its first token is seen: the answer comes as events.
    pub(super) stream: bool,
    pub(super) targets: Targets,
    pub(super) start_by: StartBy,
    /// Cache that it will need: its prompt and its expected answer.
    pub(super) kv_tokens: f64,
    /// Time to first token that was predicted when it was taken, where there is a model.
    pub(super) predicted_ms: Option<f64>,
    pub(super) usage: Usage,
    /// What is told of it to the heat; none: it is nobody's request.
    pub(super) heat: Option<Ticket>,
    /// By what it is known if the engine dies of it.
    pub(super) named: Option<Named>,
}

impl Placement {
    /// Prompt tokens that have to be prefilled, and their attention pairs.
    pub(super) fn prefill(&self) -> (f64, f64) {
        let cached = f64::from(self.cached_tokens);
        let uncached = (f64::from(self.prompt.tokens) - cached).max(0.0);
        (uncached, attention_pairs(cached, uncached))
    }

    /// Whether something is held against it.
    pub(super) fn is_suspected(&self) -> bool {
        self.named.as_ref().is_some_and(|named| named.suspected)
    }

    /// Whether it is a copy of a request that runs elsewhere.
    pub(super) const fn is_shadow(&self) -> bool {
        self.heat.is_none()
    }

    /// As it stands in the queue.
    pub(super) fn waiting(&self, id: PlacementId) -> Waiting {
        let (tokens, pairs) = self.prefill();
        Waiting {
            id,
            start_by: self.start_by,
            deadline: self.deadline,
            tokens,
            pairs,
        }
    }

    /// Time in the queue, to the first byte, in the slot.
    pub(super) fn times(&self, now: Now) -> [Duration; 3] {
        match self.stage {
            Stage::Queued => [now.since(self.arrived), Duration::ZERO, Duration::ZERO],
            Stage::Dispatched { since } => {
                [since.since(self.arrived), Duration::ZERO, now.since(since)]
            }
            Stage::Streaming { since, first_byte } => [
                since.since(self.arrived),
                first_byte.since(since),
                now.since(since),
            ],
        }
    }
}
