//! The state of one worker and what changes it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use forebay_proto::wire::fleet::{Desired, Observed};
use forebay_proto::{Incarnation, Now, Revision};
use forebay_scheduler::heat::Heat;
use forebay_scheduler::learn::{Calibration, Fit};
use forebay_scheduler::model::{Backlog, Profile, Residuals};
use forebay_scheduler::residency::{Grade, Publisher};
use forebay_scheduler::{Acceptance, Load};

use super::batch::Batch;
use super::cache::{Cache, Continuity, GradeChange};
use super::cadence::{BUSY, Cadence, IDLE};
use super::deaths::Deaths;
use super::kv::Exact;
use super::map::Map;
use super::mean::Mean;
use super::placement::{Effect, End, Ending, Placement, PlacementId, Stage, Unstarted, Usage};
use super::queue::Queue;
use super::shadows::Shadows;
use super::starting::{Lengths, Residents};
use super::tenants::Tenants;

/// What does not change while the agent runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Requests that run on the engine at once.
    pub slots: u32,
    /// Requests that may wait beyond them; more are refused.
    pub queue_limit: u32,
    /// Bytes of bodies that are held at once; more are refused before they are read.
    pub body_budget_bytes: u64,
    /// Tokens that the engine's cache holds; 0: not told, and no limit.
    pub kv_tokens: u64,
    /// How fast the engine is about, where that is known; the rest is learnt. Without, nothing is
    /// predicted, and only slots limit what runs.
    pub profile: Option<Profile>,
    /// Whoever has a slot starts at once, and the engine orders them: neither pace nor cache limits how
    /// many run, and what a new request waits for is in the engine.
    pub at_once: bool,
}

/// What is known of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineState {
    /// It has not answered yet.
    Unknown,
    /// It answers.
    Up,
    /// It answered once and does not any more.
    Down,
}

/// What an operator wants, as of a revision.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    desired: Desired,
    revision: Revision,
}

/// The agent's state. Placements in flight never exceed slots and queue.
#[derive(Debug)]
pub struct Core {
    pub(super) settings: Settings,
    /// Slots as they were set up, whatever an engine ran since.
    most_slots: u32,
    pub(super) incarnation: Incarnation,
    pub(super) models: Arc<[String]>,
    /// Where it is; empty: nobody said.
    pub(super) zone: String,
    /// Whose requests are taken.
    pub(super) tenants: Tenants,
    engine: EngineState,
    wanted: Option<Wanted>,
    stopping: bool,
    pub(super) seq: u64,
    pub(super) newest: u64,
    pub(super) placements: BTreeMap<PlacementId, Placement>,
    pub(super) queue: Queue,
    pub(super) running: u32,
    pub(super) body_bytes: u64,
    pub(super) service: Mean,
    pub(super) lengths: Lengths,
    /// The engine, as far as it can be told.
    pub(super) batch: Batch,
    /// Who is on it.
    pub(super) residents: Residents,
    pub(super) fit: Option<Fit>,
    /// When the engine can have the next one without anything happening before.
    pub(super) start_due: Option<Now>,
    /// At most one for each placement.
    pub(super) effects: VecDeque<Effect>,
    pub(super) cache: Cache,
    /// The newest moment that was heard of.
    pub(super) now: Now,
    first_bytes: u64,
    /// What it is asked for, by families of prompts.
    pub(super) heat: Heat,
    pub(super) shadows: Shadows,
    pub(super) deaths: Deaths,
    /// Placements that something is held against.
    pub(super) suspects: u32,
}

/// What a change of makes a new report.
pub(super) type Shown = (Acceptance, u32, usize, u64);

impl Core {
    /// A worker that knows neither its engine nor its facts: it refuses everything.
    #[must_use]
    ///
    /// `cache` names this life of the engine's cache; it is to be new for each start.
    pub fn new(settings: Settings, incarnation: Incarnation, cache: u64) -> Self {
        Self {
            most_slots: settings.slots,
            settings,
            incarnation,
            models: Arc::default(),
            zone: String::new(),
            tenants: Tenants::default(),
            engine: EngineState::Unknown,
            wanted: None,
            stopping: false,
            seq: 1,
            newest: 0,
            placements: BTreeMap::new(),
            queue: Queue::default(),
            running: 0,
            body_bytes: 0,
            service: Mean::default(),
            lengths: Lengths::default(),
            batch: Batch::default(),
            residents: Residents::default(),
            fit: settings.profile.map(Fit::new),
            start_due: None,
            effects: VecDeque::new(),
            cache: Cache::new(incarnation, cache, settings.kv_tokens),
            now: Now::default(),
            first_bytes: 0,
            heat: Heat::default(),
            shadows: Shadows::default(),
            deaths: Deaths::default(),
            suspects: 0,
        }
    }

    /// Whether new placements are taken.
    #[must_use]
    pub fn acceptance(&self) -> Acceptance {
        if self.stopping {
            return Acceptance::Draining;
        }
        match self.wanted.map(|wanted| wanted.desired) {
            None => Acceptance::Joining,
            Some(Desired::Draining) => Acceptance::Draining,
            Some(Desired::Cordoned | Desired::Unspecified) => Acceptance::Cordoned,
            Some(Desired::Ready) => match self.engine {
                EngineState::Unknown => Acceptance::Joining,
                EngineState::Down => Acceptance::EngineDown,
                EngineState::Up => Acceptance::Open,
            },
        }
    }

    /// What the agent says of itself to the control plane.
    #[must_use]
    pub fn observed(&self) -> Observed {
        match self.acceptance() {
            Acceptance::Open => Observed::Ready,
            Acceptance::Cordoned => Observed::Cordoned,
            Acceptance::Draining if self.placements.is_empty() => Observed::Drained,
            Acceptance::Draining => Observed::Draining,
            Acceptance::EngineDown => Observed::EngineDown,
            Acceptance::Joining => Observed::Joining,
        }
    }

    /// The incarnation that is served.
    #[must_use]
    pub const fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// What is known of the engine.
    #[must_use]
    pub const fn engine(&self) -> EngineState {
        self.engine
    }

    /// Models that the engine serves; empty until it answered.
    #[must_use]
    pub const fn models(&self) -> &Arc<[String]> {
        &self.models
    }

    /// Revision of the facts that are in force here; zero before the first.
    #[must_use]
    pub fn applied_revision(&self) -> Revision {
        self.wanted
            .map(|wanted| wanted.revision)
            .unwrap_or_default()
    }

    /// Placements that run or wait.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.placements.len()
    }

    /// Placements that hold a slot.
    #[must_use]
    pub const fn running(&self) -> u32 {
        self.running
    }

    /// Placements whose answers come in pieces, and of which some have come.
    #[must_use]
    pub fn telling(&self) -> u32 {
        let told = |placement: &&Placement| {
            placement.stream && matches!(placement.stage, Stage::Streaming { .. })
        };
        let telling = self.placements.values().filter(told).count();
        u32::try_from(telling).unwrap_or(u32::MAX)
    }

    /// Placements that wait.
    #[must_use]
    pub fn queued(&self) -> u32 {
        u32::try_from(self.queue.len()).expect("the queue is bounded by a u32")
    }

    /// Placements that waited for so long that their first-token target was missed.
    #[must_use]
    pub const fn late(&self) -> u64 {
        self.queue.late
    }

    /// Bytes held of the body budget.
    #[must_use]
    pub const fn body_bytes(&self) -> u64 {
        self.body_bytes
    }

    /// The state as it is reported.
    #[must_use]
    pub fn load(&self) -> Load {
        Load {
            incarnation: self.incarnation,
            seq: self.seq,
            acceptance: self.acceptance(),
            running: self.running,
            queued: self.queued(),
            slots: self.settings.slots,
            queue_limit: self.settings.queue_limit,
            service: self.service.value(),
            facts_revision: self.applied_revision(),
            interval: if self.in_flight() > 0 { BUSY } else { IDLE },
            backlog: self.backlog(),
            model: self.profile().copied(),
            residuals: self.residuals(),
        }
    }

    /// What the engine and those who wait have before them.
    pub(super) fn backlog(&self) -> Backlog {
        let mut backlog = self.batch.backlog();
        backlog.pending_tokens += self.queue.tokens;
        backlog.pending_pairs += self.queue.pairs;
        backlog.lineup = self.queue.lineup(self.now);
        backlog
    }

    /// How fast the engine is, as far as it is learnt; `None`: no profile was given.
    #[must_use]
    pub fn profile(&self) -> Option<&Profile> {
        self.fit.as_ref().map(Fit::profile)
    }

    /// How well that predicts.
    #[must_use]
    pub fn residuals(&self) -> Residuals {
        let fit = self.fit.as_ref();
        fit.map_or_else(Residuals::default, Fit::residuals)
    }

    /// How often what was promised by that held.
    #[must_use]
    pub fn calibration(&self) -> Calibration {
        let fit = self.fit.as_ref();
        fit.map_or_else(Calibration::default, Fit::calibration)
    }

    /// The state for one balancer, if it is due a report.
    pub fn report(&mut self, now: Now, to: &mut Cadence) -> Option<Load> {
        self.pass(now);
        (to.due(self.seq) <= now).then(|| Load {
            interval: to.told(now, self.seq, self.in_flight()),
            ..self.load()
        })
    }

    /// When to call [`Core::expire`] again at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Now> {
        let deadline = self.queue.first_deadline().map(|(deadline, _)| deadline);
        deadline.into_iter().chain(self.start_due).min()
    }

    /// What the rim has to do next.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Facts were delivered: what an operator wants of this worker. They are in force on return.
    ///
    /// A desired state that this version does not know changes nothing, and is not acknowledged.
    pub fn facts(&mut self, now: Now, desired: Desired, revision: Revision) {
        if desired == Desired::Unspecified {
            return;
        }
        let before = self.shown();
        self.wanted = Some(Wanted { desired, revision });
        self.leave_if_draining(now);
        self.note(before);
    }

    /// What was kept of the cache by an earlier start of this agent.
    pub fn recall(&mut self, map: Map) {
        self.cache.recall(map);
    }

    /// What a later start should know of the cache; `None`: nothing is known of which engine it is.
    #[must_use]
    pub fn map(&self) -> Option<Map> {
        self.cache.map()
    }

    /// Changes with what [`Core::map`] shows.
    #[must_use]
    pub fn map_version(&self) -> (u64, u64) {
        self.cache.version()
    }

    /// From here on the engine's events of its cache are followed; before [`Core::engine_is`]. `can_ask`: it
    /// tells again what it said. `key` is drawn, and hashes its tokens.
    pub fn follow_events(&mut self, key: [u8; 16], can_ask: bool) {
        self.cache.follow_events(key, can_ask);
    }

    /// Does something with what is known of the cache by events; `None` where they are not followed.
    pub fn events<T>(&mut self, act: impl FnOnce(&mut Exact) -> T) -> Option<T> {
        self.cache.events(act)
    }

    /// What is known of the cache by events, where they are followed.
    #[must_use]
    pub const fn exact(&self) -> Option<&Exact> {
        self.cache.exact()
    }

    /// The engine says that it is this process, or does not say; before [`Core::engine_up`].
    pub fn engine_is(&mut self, process: Option<String>) -> Continuity {
        let before = self.shown();
        let continuity = self.cache.engine_is(process);
        if continuity == Continuity::Restarted
            && let Some(fit) = &mut self.fit
        {
            fit.restarted();
        }
        self.note(before);
        continuity
    }

    /// Where this worker is, as it declares itself.
    #[must_use]
    pub fn in_zone(mut self, zone: &str) -> Self {
        zone.clone_into(&mut self.zone);
        self
    }

    /// What kind of engine it is: whose requests it is to get, and what is believed of predictions of its cache
    /// before its first answer. Said again, it changes nothing.
    pub fn engine_kind(&mut self, tenants: Tenants, first: Grade) {
        if std::mem::discriminant(&self.tenants) != std::mem::discriminant(&tenants) {
            self.tenants = tenants;
        }
        self.cache.expect(first);
    }

    /// Tokens that the engine's cache holds, where nobody had said: to be told before [`Core::engine_is`].
    pub fn engine_holds(&mut self, kv_tokens: u64) {
        self.settings.kv_tokens = kv_tokens;
        self.cache.holds(kv_tokens);
    }

    /// The engine that is there now runs no more than so many at once: what is beyond would wait in it, where it has no order.
    pub fn engine_runs(&mut self, slots: u32) {
        let before = self.shown();
        self.settings.slots = self.most_slots.min(slots.max(1));
        self.note(before);
    }

    /// Requests that may run at once.
    #[must_use]
    pub const fn slots(&self) -> u32 {
        self.settings.slots
    }

    /// The engine answers, with these models.
    pub fn engine_up(&mut self, models: &[String]) {
        let before = self.shown();
        self.engine = EngineState::Up;
        if *self.models != *models {
            self.models = models.into();
        }
        self.note(before);
    }

    /// The engine does not answer: what waits for it is sent back at once.
    pub fn engine_down(&mut self, now: Now) {
        if self.engine != EngineState::Up {
            return;
        }
        let before = self.shown();
        self.engine = EngineState::Down;
        self.cache.lost();
        if let Some(fit) = &mut self.fit {
            fit.restarted();
        }
        self.note(before);
        self.send_back(now, Unstarted::EngineDown);
    }

    /// The process is to stop: nothing new is taken, what waits is sent back, what runs goes on.
    pub fn stop(&mut self, now: Now) {
        let before = self.shown();
        self.stopping = true;
        self.note(before);
        self.leave_if_draining(now);
    }

    /// The engine's answer began: its body is with the engine.
    pub fn first_byte(&mut self, now: Now, id: PlacementId) {
        let before = self.shown();
        self.pass(now);
        if let Some(placement) = self.placements.get_mut(&id) {
            if let Stage::Dispatched { since } = placement.stage {
                let first_byte = now;
                placement.stage = Stage::Streaming { since, first_byte };
                self.cache.prefilled(&placement.prompt, placement.held);
                self.first_bytes += 1;
                let profile = self.fit.as_ref().map(Fit::profile);
                let spell = self.batch.first_token(id, profile);
                if let (Some(fit), Some(spell)) = (&mut self.fit, spell) {
                    fit.observe(&spell);
                }
                if let (Some(fit), Some(predicted)) = (&mut self.fit, placement.predicted_ms) {
                    let actual = now.since(placement.arrived);
                    fit.first_token(predicted, actual.as_secs_f64() * 1e3);
                }
            }
            self.body_bytes -= std::mem::take(&mut placement.body_bytes);
        }
        self.began(id);
        self.fill();
        self.note(before);
    }

    /// The engine counted.
    pub fn usage(&mut self, id: PlacementId, usage: Usage) {
        if let Some(placement) = self.placements.get_mut(&id) {
            placement.usage = usage;
        }
    }

    /// What is told of the cache, and to whom.
    pub fn publisher(&mut self) -> &mut Publisher {
        self.cache.publisher()
    }

    /// Which life of the engine's cache is published, and whether there is something to tell of it.
    #[must_use]
    pub fn residency_news(&self) -> (u64, bool) {
        self.cache.news()
    }

    /// A change of the grade that nobody was told of yet.
    pub fn take_grade_change(&mut self) -> Option<GradeChange> {
        self.cache.take_grade_change()
    }

    /// How the agent knows what is resident.
    #[must_use]
    pub fn grade(&self) -> Grade {
        self.cache.grade()
    }

    /// Chunks that are believed to be resident.
    #[must_use]
    pub fn resident_chunks(&self) -> usize {
        self.cache.resident_chunks()
    }

    /// Cached tokens predicted, and reported by the engine, over the answers that did.
    #[must_use]
    pub fn cached_tokens(&self) -> (u64, u64) {
        self.cache.totals()
    }

    /// Counts up with every change that a report may show.
    #[must_use]
    pub const fn seq(&self) -> u64 {
        self.seq
    }

    /// A placement is over; `None` when it was before.
    pub fn end(&mut self, now: Now, id: PlacementId, end: End) -> Option<Ending> {
        let before = self.shown();
        let mut placement = self.placements.remove(&id)?;
        self.pass(now);
        self.over_for_heat(id, &mut placement, end);
        self.over_for_deaths(id, placement.named.as_ref(), end);
        self.suspects -= u32::from(placement.is_suspected());
        self.body_bytes -= placement.body_bytes;
        match placement.stage {
            Stage::Streaming { .. } => {
                let Placement { prompt, usage, .. } = &placement;
                self.cache
                    .finished(self.now, prompt, placement.held, *usage);
            }
            Stage::Queued | Stage::Dispatched { .. } => {
                self.cache.abandoned(&placement.prompt, placement.held);
            }
        }
        let answered = matches!(placement.stage, Stage::Streaming { .. });
        if end == End::Complete && answered {
            let Placement { prompt, usage, .. } = &placement;
            self.cache
                .observe(prompt, placement.held, placement.foreseen, *usage);
        }
        let [queue, first_byte, service] = placement.times(now);
        match placement.stage {
            Stage::Queued => self.queue.remove(&placement.waiting(id)),
            Stage::Dispatched { .. } | Stage::Streaming { .. } => {
                self.running -= 1;
                self.residents.leave(&placement);
                let counted = placement.usage.completion_tokens;
                let counted = counted.filter(|_| end == End::Complete);
                if let Some(tokens) = counted
                    && !placement.is_shadow()
                {
                    self.lengths.answered(tokens);
                }
                let spell = self.batch.end(id, counted);
                if let (Some(fit), Some(spell)) = (&mut self.fit, spell) {
                    fit.observe(&spell);
                }
                match end {
                    // A copy says nothing of how long requests take.
                    _ if placement.is_shadow() => {}
                    End::Complete | End::Timeout | End::Cancelled | End::Drained => {
                        self.service.add(service);
                    }
                    // Failing fast must not look like working fast.
                    End::NotStarted | End::EngineFailed => {}
                }
            }
        }
        // A start that it was told and did not get to see.
        self.effects.retain(|effect| *effect != Effect::Start(id));
        self.fill();
        self.note(before);
        Some(Ending {
            report_seq: self.seq,
            load: self.load(),
            queue,
            first_byte,
            service,
            usage: placement.usage,
            shadow: placement.is_shadow(),
        })
    }

    /// Sends back what waited until its deadline, and gives the engine what it is to have by now.
    pub fn expire(&mut self, now: Now) {
        self.pass(now);
        self.cache.pass(now);
        while let Some((deadline, id)) = self.queue.first_deadline()
            && deadline <= now
        {
            self.over(now, id, Unstarted::Deadline);
        }
        let before = self.shown();
        self.fill();
        self.note(before);
    }

    /// Time passes; the engine computes.
    pub(super) fn pass(&mut self, now: Now) {
        self.now = self.now.max(now);
        let profile = self.fit.as_ref().map(Fit::profile);
        self.batch.advance(self.now, profile);
    }

    pub(super) fn shown(&self) -> Shown {
        let (running, waiting) = (self.running, self.queue.len());
        (self.acceptance(), running, waiting, self.first_bytes)
    }

    pub(super) fn note(&mut self, before: Shown) {
        if before != self.shown() {
            self.seq += 1;
        }
    }

    fn leave_if_draining(&mut self, now: Now) {
        if self.acceptance() == Acceptance::Draining {
            self.send_back(now, Unstarted::Draining);
        }
    }

    fn send_back(&mut self, now: Now, why: Unstarted) {
        while let Some(id) = self.queue.last() {
            self.over(now, id, why);
        }
    }

    fn over(&mut self, now: Now, id: PlacementId, why: Unstarted) {
        if let Some(ending) = self.end(now, id, why.end()) {
            self.effects.push_back(Effect::Over(id, why, ending));
        }
    }
}
