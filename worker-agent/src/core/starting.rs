//! Whether the engine is given one more, and when.
//!
//! The engine's own queue is kept near empty, so that order, cancel and drain stay the agent's: the next
//! prefill is handed over about one iteration before the engine would run dry. And no more run at once
//! than hold the pace that was promised and fit into the cache. Without a model of the engine only its
//! slots count.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_proto::Now;
use forebay_scheduler::Acceptance;
use forebay_scheduler::model::{Profile, Targets};

use super::batch::Prefill;
use super::placement::{Effect, Placement, PlacementId, Stage};
use super::state::{Core, EngineState};

/// Tokens of an answer where none was counted and the client gives no bound.
const NOMINAL_ANSWER: f64 = 256.0;
/// A pace that the engine cannot keep even for one alone limits no more than this many times that one's:
/// there is nothing to hold, and one at a time would help nobody.
const BEYOND_REACH: f64 = 1.5;
/// Weight of a new request in what is learnt of prompts and answers.
const SHARE: f64 = 1.0 / 16.0;

/// How long what may kill the engine is prefilled alone: what does not say when its first token comes would stand in
/// everybody's way.
const APART: Duration = Duration::from_secs(2);

/// Who is on the engine, in sums.
#[derive(Debug, Default)]
pub(super) struct Residents {
    /// Cache that they will need.
    kv_tokens: f64,
    /// How often each pace was promised, in microseconds a token.
    paces: BTreeMap<u64, u32>,
}

impl Residents {
    pub(super) fn enter(&mut self, placement: &Placement) {
        self.kv_tokens += placement.kv_tokens;
        *self.paces.entry(pace(placement.targets)).or_default() += 1;
    }

    pub(super) fn leave(&mut self, placement: &Placement) {
        self.kv_tokens -= placement.kv_tokens;
        let pace = pace(placement.targets);
        if let Some(count) = self.paces.get_mut(&pace) {
            *count -= 1;
            if *count == 0 {
                self.paces.remove(&pace);
            }
        }
        if self.paces.is_empty() {
            self.kv_tokens = 0.0;
        }
    }

    /// The tightest pace that was promised to one of them, in milliseconds a token.
    fn tightest_ms(&self) -> f64 {
        let tightest = self.paces.keys().next();
        tightest.map_or(f64::INFINITY, |pace| match *pace {
            u64::MAX => f64::INFINITY,
            pace => pace as f64 / 1e3,
        })
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
const fn pace(targets: Targets) -> u64 {
    (targets.tpot_ms * 1e3) as u64
}

/// What is learnt of requests.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lengths {
    /// Tokens of an answer, in the mean.
    answer: Option<f64>,
    /// Prompt tokens that had to be computed, in the mean.
    uncached: Option<f64>,
}

impl Lengths {
    pub(super) fn answered(&mut self, tokens: u32) {
        follow(&mut self.answer, tokens.into());
    }

    /// Tokens that an answer of at most so many (0: not known) will have.
    pub(super) fn expected_answer(&self, max_tokens: u32) -> f64 {
        match (self.answer, max_tokens) {
            (None, 0) => NOMINAL_ANSWER,
            (Some(mean), 0) => mean,
            (None, most) => most.into(),
            (Some(mean), most) => mean.min(most.into()),
        }
    }
}

fn follow(mean: &mut Option<f64>, sample: f64) {
    let mean = mean.get_or_insert(sample);
    *mean += SHARE * (sample - *mean);
}

/// What stands in the way of the next start.
enum Obstacle {
    /// The engine has enough to prefill.
    Prefills,
    /// Only the end of one that runs helps.
    Residents,
    /// One that may kill the engine is prefilled alone, until then at the longest.
    Suspect(Now),
}

impl Core {
    /// Gives the engine what it is to have now.
    pub(super) fn fill(&mut self) {
        self.start_due = None;
        // Who waits then is being sent back.
        if self.engine() != EngineState::Up || self.acceptance() == Acceptance::Draining {
            return;
        }
        while self.running < self.settings.slots {
            let placements = &self.placements;
            let start_by = |id: PlacementId| placements[&id].start_by;
            let Some(id) = self.queue.next(self.now, start_by) else {
                return;
            };
            let obstacle = self.kept_apart(id).or_else(|| self.obstacle(id));
            match obstacle {
                None => self.start(id),
                Some(Obstacle::Suspect(until)) => {
                    self.start_due = Some(until);
                    return;
                }
                Some(Obstacle::Residents) => return,
                Some(Obstacle::Prefills) => {
                    self.start_due = self.when_dry();
                    return;
                }
            }
        }
    }

    /// When the engine has little enough to prefill; `None`: after a sign.
    fn when_dry(&self) -> Option<Now> {
        let profile = self.profile()?;
        self.batch.down_to(f64::from(profile.chunk_tokens), profile)
    }

    fn start(&mut self, id: PlacementId) {
        let placement = self.placements.get_mut(&id);
        let placement = placement.expect("who waits is in the table");
        self.queue.remove(&placement.waiting(id));
        placement.stage = Stage::Dispatched { since: self.now };
        placement.foreseen = self.cache.begun(&placement.prompt, &mut placement.held);
        let (tokens, pairs) = placement.prefill();
        let prefill = Prefill {
            id,
            prompt: placement.prompt.tokens.into(),
            tokens,
            pairs,
            unseen: !placement.stream,
            last: 0,
        };
        if !placement.is_shadow() {
            follow(&mut self.lengths.uncached, tokens);
        }
        self.residents.enter(placement);
        let profile = self.fit.as_ref().map(|fit| fit.profile());
        self.batch.give(prefill, profile);
        self.running += 1;
        self.effects.push_back(Effect::Start(id));
    }

    /// Whether this one has to wait for the others' first tokens, because something is held against it or against
    /// one of them: if the engine dies again, it is known of whom.
    fn kept_apart(&self, id: PlacementId) -> Option<Obstacle> {
        if self.suspects == 0 {
            return None;
        }
        let suspected = self.placements[&id].is_suspected();
        let since = self
            .placements
            .values()
            .filter_map(|other| match other.stage {
                Stage::Dispatched { since } if suspected || other.is_suspected() => Some(since),
                Stage::Dispatched { .. } | Stage::Queued | Stage::Streaming { .. } => None,
            });
        let until = since.max()? + APART;
        (self.now < until).then_some(Obstacle::Suspect(until))
    }

    fn obstacle(&self, id: PlacementId) -> Option<Obstacle> {
        let profile = self.profile()?;
        if self.running == 0 || self.settings.at_once {
            return None;
        }
        let placement = &self.placements[&id];
        let promised_ms = self.residents.tightest_ms().min(placement.targets.tpot_ms);
        let lone_ms = profile.iteration_ms(0.0, 1.0, placement.prompt.tokens.into(), 0.0);
        let pace_ms = if lone_ms > promised_ms {
            BEYOND_REACH * lone_ms
        } else {
            promised_ms
        };
        let kv_tokens = self.settings.kv_tokens as f64;
        let fits = kv_tokens == 0.0 || self.residents.kv_tokens + placement.kv_tokens <= kv_tokens;
        if !fits || self.pace_with(profile, placement) > pace_ms {
            return Some(Obstacle::Residents);
        }
        // A token more or less is the model's rounding.
        let enough = self.batch.backlog().pending_tokens > f64::from(profile.chunk_tokens) + 1.0;
        enough.then_some(Obstacle::Prefills)
    }

    /// Time from token to token with this one among the residents, in the mean over its answer.
    ///
    /// Chunks of prefill stand beside the decodes in a share of the iterations: no more than what is
    /// pending needs, and no more than so many residents bring with them in the long run.
    fn pace_with(&self, profile: &Profile, placement: &Placement) -> f64 {
        let engine = self.batch.backlog();
        let decodes = f64::from(self.running) + 1.0;
        let prompts = self.batch.prefilling_prompts() + f64::from(placement.prompt.tokens);
        let context = engine.context_tokens + prompts;
        let chunk = profile.chunk_beside(decodes);
        let answer = self.lengths.expected_answer(placement.max_tokens).max(1.0);
        let (own, _) = placement.prefill();
        let pending = engine.pending_tokens + self.queue.tokens.max(own);
        let brought = decodes * self.lengths.uncached.unwrap_or(own);
        let share = (pending.min(brought) / (chunk * answer)).min(1.0);
        let alone = profile.iteration_ms(0.0, decodes, context, 0.0);
        let beside = profile.iteration_ms(chunk, decodes, context, 0.0);
        alone + share * (beside - alone)
    }
}
