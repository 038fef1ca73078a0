//! The side that balancers see: links in, placements, reports out.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use forebay_admin::prometheus_client::registry::Registry;
use forebay_link::{Code, Endpoint, Link};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::rpc::Rpc;
use forebay_proto::wire::control::Heat;
use forebay_proto::wire::fleet::{Desired, Observed};
use forebay_proto::{Incarnation, Now, Revision};
use forebay_scheduler::fingerprint::RenderProfile;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::aligner::{self, Aligner};
use super::engine::{Engine, EngineAddress};
use super::follow::{Following, KvEvents};
use super::found::EngineFacts;
use super::lifecycle::Lifecycle;
use super::map::{Keeper, MapFile};
use super::metrics::Metrics;
use super::placement::carry;
use super::reports::{Links, report};
use super::tasks::OwnedTask;
use super::{map, probe, reports};
use crate::adapter::Adapter;
use crate::core::{
    Admitted, Continuity, Core, Effect, End, Ending, EngineDeath, EngineState, GradeChange, Offer,
    PlacementId, Recorded, RefusalReason, Refused, Settings, Unstarted, Usage, Work as UnderWay,
};
use crate::wire;

/// Connections to the engine kept beyond those of its slots: for probes.
const SPARE_CONNECTIONS: usize = 2;

/// Balancers that are sent a snapshot of the cache at once; others wait for their turn.
const SNAPSHOTS: usize = 4;

/// For the last frames of what just ended to arrive.
const TELLING: Duration = Duration::from_secs(1);

/// How long others may keep the agent waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// A balancer with its header, and between two pieces of a body.
    pub peer: Duration,
    /// A balancer that takes nothing; then its placement is cancelled.
    pub slow_reader: Duration,
    /// Between two looks at an engine that answers.
    pub looks: Duration,
    /// The engine with a small page; so late three times in a row, it is down.
    pub look: Duration,
    /// An engine with requests, without any sign of work.
    pub stall: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            peer: Duration::from_secs(10),
            slow_reader: Duration::from_secs(30),
            looks: Duration::from_secs(1),
            look: Duration::from_secs(2),
            stall: Duration::from_secs(60),
        }
    }
}

/// What the work side is started with.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The incarnation to serve; it is counted on disk before.
    pub incarnation: Incarnation,
    /// Slots, queue and body budget.
    pub settings: Settings,
    /// Where the worker is; empty: nobody said.
    pub zone: String,
    /// The engine beside this agent.
    pub engine: EngineAddress,
    /// How long it waits for others.
    pub patience: Patience,
    /// How the engine is spoken to.
    pub manner: Manner,
    /// Where the cache's map is kept for the next start; nowhere when absent.
    pub map: Option<MapFile>,
    /// Whether the engine's events of its cache are followed, and how.
    pub kv_events: KvEvents,
}

/// How an engine is spoken to, and for whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manner {
    /// What kind it is; absent: found by asking it.
    pub kind: Option<String>,
    /// Whose requests it gets; absent: everybody's, or one tenant's where it keeps no caches apart.
    pub tenant: Option<String>,
    /// It is told what goes first, where it can be.
    pub priority: bool,
    /// Nobody said how much its cache holds: it is believed in that.
    pub asks_size: bool,
    /// Nobody said how many requests it runs at once: it is believed in that, if they are fewer.
    pub asks_slots: bool,
    /// How prompts are rendered, where an operator said so.
    pub render: Option<RenderProfile>,
}

/// What the agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The incarnation that is served.
    pub incarnation: Incarnation,
    /// Whether it takes placements, in the control plane's words.
    pub observed: Observed,
    /// Facts that are in force here.
    pub applied_revision: Revision,
    /// Placements that run or wait.
    pub in_flight: usize,
    /// Models that the engine serves; empty until it answered.
    pub models: Arc<[String]>,
    /// What else it said; absent until it answered.
    pub engine: Option<Arc<EngineFacts>>,
}

/// The work side, serving until this is dropped. It needs no control plane.
#[derive(Debug)]
pub struct Work {
    shared: Arc<Shared>,
    map: Option<Arc<Keeper>>,
    _tasks: Vec<OwnedTask>,
}

impl Work {
    /// Serves on this endpoint. Placements are refused until [`Work::apply`] was called and the
    /// engine answered.
    #[must_use]
    pub fn start(endpoint: &Endpoint, setup: Setup) -> Self {
        let metrics = Metrics::new(setup.settings.slots);
        Self::start_with(endpoint, setup, metrics, None)
    }

    pub(super) fn start_with(
        endpoint: &Endpoint,
        setup: Setup,
        metrics: Metrics,
        process: Option<Arc<Lifecycle>>,
    ) -> Self {
        let Setup {
            incarnation,
            settings,
            zone,
            engine,
            patience,
            manner,
            map,
            kv_events,
        } = setup;
        endpoint.update_hello(|hello| hello.incarnation = Some(incarnation.to_wire()));
        let slots = usize::try_from(settings.slots).unwrap_or(usize::MAX);
        let mut core = Core::new(settings, incarnation, rand::random()).in_zone(&zone);
        if let Some(kept) = map.as_ref().and_then(map::read) {
            core.recall(kept);
        }
        let (status, _) = watch::channel(status(&core, None));
        let (aligner, jobs) = Aligner::new();
        let shared = Arc::new(Shared {
            origin: Instant::now(),
            inner: Mutex::new(Inner {
                core,
                waiting: HashMap::new(),
                engine: None,
            }),
            patience,
            manner,
            doubted: AtomicBool::new(false),
            changed: Notify::new(),
            died: Notify::new(),
            status,
            engine: Engine::new(engine, slots.saturating_add(SPARE_CONNECTIONS), process),
            metrics,
            links: Links::default(),
            resident: watch::Sender::new(()),
            snapshots: Semaphore::new(SNAPSHOTS),
            carried: watch::Sender::new(0),
            ending: watch::Sender::new(false),
            counts: AtomicBool::new(false),
            heard: AtomicU64::new(0),
            stalls: watch::Sender::new(0),
            aligner,
            following: Following::new(kv_events),
        });
        let mut tasks = vec![
            OwnedTask::spawn(aligner::work(shared.clone(), jobs)),
            OwnedTask::spawn(accept(endpoint.clone(), shared.clone())),
            OwnedTask::spawn(report(shared.clone())),
            OwnedTask::spawn(probe::keep_probing(shared.clone())),
            OwnedTask::spawn(probe::watch_progress(shared.clone())),
        ];
        let map = map.map(|file| Arc::new(Keeper::new(file, shared.clone())));
        if let Some(keeper) = map.clone() {
            tasks.push(OwnedTask::spawn(async move { keeper.keep().await }));
        }
        Self {
            shared,
            map,
            _tasks: tasks,
        }
    }

    /// Facts were delivered: what an operator wants of this worker. In force on return.
    pub fn apply(&self, desired: Desired, revision: Revision) {
        self.shared
            .with(|core, now| core.facts(now, desired, revision));
        if desired != Desired::Draining {
            self.shared.ending.send_replace(false);
        }
    }

    /// A drain's deadline passed: ends what still runs, with an end that says so.
    pub fn end_streams(&self) {
        self.shared.ending.send_if_modified(|ending| {
            if !*ending {
                tracing::warn!("a drain's deadline passed: what still runs is ended");
            }
            !std::mem::replace(ending, true)
        });
    }

    /// What is under way.
    pub(super) fn under_way(&self) -> UnderWay {
        self.shared.with(|core, now| core.work(now))
    }

    /// What it is asked for.
    pub(super) fn heat(&self) -> Heat {
        self.shared.with(|core, now| core.heat(now))
    }

    /// What was recorded of it.
    pub(super) fn recorded(&self, window_ms: u64, most: usize) -> Recorded {
        self.shared
            .with(|core, now| core.recorded(now, window_ms, most))
    }

    /// The next death of the engine that is to be told.
    pub(super) async fn death(&self) -> EngineDeath {
        loop {
            if let Some(death) = self.shared.with(|core, _| core.untold_death().cloned()) {
                return death;
            }
            self.shared.died.notified().await;
        }
    }

    /// That death is not told again.
    pub(super) fn told_of(&self, death: &EngineDeath) {
        self.shared.with(|core, _| core.told_of(death));
    }

    /// Suspects that ran well since this was last asked.
    pub(super) fn cleared(&self) -> Vec<u64> {
        self.shared.with(|core, _| core.take_cleared())
    }

    /// Takes nothing new from now on and sends back what waits.
    pub fn stop(&self) {
        self.shared.with(Core::stop);
    }

    /// Keeps what is known of the engine's cache for the next start, if there is where.
    pub async fn keep_map(&self) {
        if let Some(keeper) = &self.map {
            keeper.write().await;
        }
    }

    /// Adds what a scrape sees of this work side.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.shared.metrics.register(registry);
    }

    /// What the agent says of itself, kept up to date.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// Waits until nothing is in flight.
    pub async fn idle(&self) {
        let mut status = self.status();
        // The sender lives as long as this.
        let _ = status.wait_for(|status| status.in_flight == 0).await;
    }

    /// Waits until balancers have received all that was said to them, a second at most.
    pub(super) async fn told(&self) {
        let mut carried = self.shared.carried.subscribe();
        // Those that do not listen are not waited for.
        let _ = tokio::time::timeout(TELLING, carried.wait_for(|carried| *carried == 0)).await;
    }
}

/// What every task of the work side shares.
pub(super) struct Shared {
    pub(super) origin: Instant,
    pub(super) inner: Mutex<Inner>,
    pub(super) patience: Patience,
    pub(super) manner: Manner,
    /// The engine answers and did no work: before it is believed in again it has to do some.
    pub(super) doubted: AtomicBool,
    /// A report may be due earlier than was thought.
    pub(super) changed: Notify,
    /// The engine died, and nobody was told of it yet.
    died: Notify,
    status: watch::Sender<Status>,
    pub(super) engine: Engine,
    pub(super) metrics: Metrics,
    pub(super) links: Links,
    /// Told when what is resident may have changed.
    resident: watch::Sender<()>,
    /// Who may be sent a snapshot: each is a copy of all that is resident.
    pub(super) snapshots: Semaphore,
    /// Streams that have not come to their end.
    carried: watch::Sender<usize>,
    /// What runs is to end: a drain's deadline passed.
    ending: watch::Sender<bool>,
    /// The engine counts its work.
    pub(super) counts: AtomicBool,
    /// When the engine last said something to anybody, in microseconds since the origin; 0: never.
    pub(super) heard: AtomicU64,
    /// How often it was found to hang: what ran on it then is over.
    pub(super) stalls: watch::Sender<u64>,
    pub(super) aligner: Aligner,
    /// The engine's events of its cache.
    pub(super) following: Following,
}

pub(super) struct Inner {
    pub(super) core: Core,
    /// Who is told when a slot is free; as bounded as the queue.
    waiting: HashMap<PlacementId, oneshot::Sender<Call>>,
    /// What the engine said of itself.
    pub(super) engine: Option<Arc<EngineFacts>>,
}

/// What a placement that waits is told.
#[derive(Debug)]
pub(super) enum Call {
    Start,
    Over(Unstarted, Ending),
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

impl Shared {
    /// Counts a stream until the guard is dropped.
    pub(super) fn carrying(self: &Arc<Self>) -> Carrying {
        self.carried.send_modify(|carried| *carried += 1);
        Carrying(self.clone())
    }

    /// Returns when what runs is to end.
    pub(super) async fn ending(&self) {
        let mut ending = self.ending.subscribe();
        // The sender lives as long as this.
        let _ = ending.wait_for(|ending| *ending).await;
    }

    pub(super) fn now(&self) -> Now {
        Now::at(self.origin.elapsed())
    }

    pub(super) fn instant(&self, now: Now) -> Instant {
        self.origin + now.since(Now::default())
    }

    /// What a scrape sees.
    pub(super) const fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Wakes when what is resident may have changed.
    pub(super) fn residency(&self) -> watch::Receiver<()> {
        self.resident.subscribe()
    }

    /// Has the core do something and carries out what follows.
    pub(super) fn with<T>(&self, act: impl FnOnce(&mut Core, Now) -> T) -> T {
        self.enter(|inner, now| act(&mut inner.core, now))
    }

    pub(super) fn enter<T>(&self, act: impl FnOnce(&mut Inner, Now) -> T) -> T {
        let mut inner = self.inner.lock();
        let before = inner.core.seq();
        let (life, _) = inner.core.residency_news();
        let result = act(&mut inner, self.now());
        while let Some(effect) = inner.core.poll_effect() {
            self.perform(&mut inner, effect);
        }
        let core = &inner.core;
        self.metrics.show(core);
        self.status.send_if_modified(|shown| {
            let fresh = status(core, inner.engine.as_ref());
            let changed = *shown != fresh;
            *shown = fresh;
            changed
        });
        let changed = core.seq() != before;
        let grade = inner.core.take_grade_change();
        let (now_life, news) = inner.core.residency_news();
        drop(inner);
        if changed {
            self.changed.notify_one();
        }
        // Also where nothing changed that a report shows: what is not believed any more is forgotten.
        if news || now_life != life {
            self.resident.send_replace(());
        }
        if let Some(grade) = grade {
            self.metrics.grade_changed(grade);
            announce(grade, self.adapter());
        }
        result
    }

    fn perform(&self, inner: &mut Inner, effect: Effect) {
        let (id, call) = match effect {
            Effect::Start(id) => (id, Call::Start),
            Effect::Over(id, why, ending) => {
                self.metrics.ended(why.end(), &ending);
                (id, Call::Over(why, ending))
            }
        };
        // A placement that is gone has ended, or ends by its ticket.
        if let Some(waiting) = inner.waiting.remove(&id) {
            let _ = waiting.send(call);
        }
    }

    /// A placement of this balancer was taken.
    pub(super) fn taken(&self, balancer: u64) {
        self.metrics.unseen(self.links.taken(balancer));
    }

    /// Takes an offer or refuses it; `None` is a header that is no offer.
    pub(super) fn place(
        self: &Arc<Self>,
        offer: Option<&Offer>,
    ) -> Result<(Admitted, Ticket), Refused> {
        let decided: Result<_, Refused> = self.enter(|inner, now| {
            let offer = offer.ok_or_else(|| inner.core.refuse(RefusalReason::Invalid))?;
            let admitted = inner.core.place(now, offer)?;
            let (sender, call) = oneshot::channel();
            if admitted.starts {
                // Nobody else is told of it: it has its slot.
                let _ = sender.send(Call::Start);
            } else {
                inner.waiting.insert(admitted.id, sender);
            }
            Ok((admitted, call))
        });
        match decided {
            Ok((admitted, call)) => {
                if offer.is_some_and(|offer| offer.shadow) {
                    self.metrics.shadow(true);
                } else {
                    self.metrics.accepted();
                }
                let ticket = Ticket {
                    shared: self.clone(),
                    id: admitted.id,
                    call,
                    over: false,
                };
                Ok((admitted, ticket))
            }
            Err(refused) => {
                if offer.is_some_and(|offer| offer.shadow) {
                    self.metrics.shadow(false);
                } else {
                    self.metrics.refused(refused.reason);
                }
                Err(refused)
            }
        }
    }

    /// The engine says that it is this process, or does not say.
    pub(super) fn engine_is(&self, process: Option<String>) {
        match self.with(|core, _| core.engine_is(process)) {
            Continuity::Same => {}
            Continuity::Continued(chunks) => {
                tracing::info!(chunks, "the engine ran on: its cache's map goes on");
            }
            Continuity::Restarted => {
                tracing::info!("the engine started anew: its cache's map begins empty");
            }
            Continuity::Unknown => tracing::info!(
                "the engine's /metrics has no process_start_time_seconds: it may have started anew, so its cache's map begins empty"
            ),
        }
    }

    /// The engine answers, with these models. One that has to do some work first is not up by that: it may have
    /// been found to hang since it was asked.
    pub(super) fn engine_up(&self, models: &[String]) {
        if self.is_doubted() {
            return;
        }
        if self.with(|core, _| {
            let was = core.engine();
            core.engine_up(models);
            was != EngineState::Up
        }) {
            tracing::info!(?models, "the engine answers");
        }
    }

    pub(super) fn engine_is_up(&self) -> bool {
        self.inner.lock().core.engine() == EngineState::Up
    }

    /// The engine does not answer.
    pub(super) fn engine_down(&self, problem: &str) {
        if self.with(|core, now| {
            let was = core.engine();
            core.engine_died(now);
            core.engine_down(now);
            was == EngineState::Up
        }) {
            tracing::warn!(problem, "the engine does not answer");
        }
        self.died.notify_one();
    }
}

fn announce(change: GradeChange, adapter: Adapter) {
    match change {
        GradeChange::Restored => tracing::info!(
            grade = "inferred",
            "predictions of the engine's cache hold again"
        ),
        GradeChange::Overpredicted => tracing::warn!(
            grade = "blind",
            "the engine's cache holds less than is predicted: look at its size (--kv-tokens), at whether prefix caching is on, and at who else uses the engine; prefixes are believed to be cached for a minute until it does better"
        ),
        GradeChange::Events => tracing::info!("the engine's events say what its cache holds"),
        GradeChange::EventsLost => tracing::warn!(
            grade = "inferred",
            "events of the engine's cache are missing, or those of one cache of several: what it holds is guessed until they say all of it again; a larger buffer_steps in vLLM's --kv-events-config lets it tell them again"
        ),
        GradeChange::EventsWrong => tracing::warn!(
            grade = "inferred",
            "the engine's cache holds less than its events say: look at who else uses or resets it; what it holds is guessed until the engine or the link to its events begins anew"
        ),
        GradeChange::Silent => tracing::warn!(
            grade = "blind",
            "the engine does not say how many prompt tokens were cached: {}; prefixes are believed to be cached for a minute until it does",
            adapter.to_count_cached()
        ),
    }
}

/// A stream that has not come to its end.
pub(super) struct Carrying(Arc<Shared>);

impl Drop for Carrying {
    fn drop(&mut self) {
        self.0.carried.send_modify(|carried| *carried -= 1);
    }
}

fn status(core: &Core, engine: Option<&Arc<EngineFacts>>) -> Status {
    Status {
        incarnation: core.incarnation(),
        observed: core.observed(),
        applied_revision: core.applied_revision(),
        in_flight: core.in_flight(),
        models: core.models().clone(),
        engine: engine.cloned(),
    }
}

/// A placement that is in flight: dropped, it is over, cancelled.
pub(super) struct Ticket {
    shared: Arc<Shared>,
    id: PlacementId,
    /// Told once, when it starts or is over.
    pub(super) call: oneshot::Receiver<Call>,
    over: bool,
}

impl Ticket {
    /// The id under which the engine knows the request: the client's, made unique, since clients
    /// may use one twice and engines take the second for the first.
    pub(super) fn engine_id(&self, offer: &Offer) -> String {
        format!(
            "{}-{}-{}",
            offer.request_id, offer.incarnation.start, self.id
        )
    }

    /// Its id in the core.
    pub(super) const fn id(&self) -> PlacementId {
        self.id
    }

    /// The engine's answer began.
    pub(super) fn first_byte(&self) {
        self.shared.with(|core, now| core.first_byte(now, self.id));
    }

    /// The engine counted.
    pub(super) fn usage(&self, usage: Usage) {
        self.shared.with(|core, _| core.usage(self.id, usage));
    }

    /// It is over, unless the core ended it in the same moment: then as the core said.
    pub(super) fn end(mut self, end: End) -> Option<(End, Ending)> {
        match self.finish(end) {
            Some(ending) => Some((end, ending)),
            None => match self.call.try_recv() {
                Ok(Call::Over(why, ending)) => Some((why.end(), ending)),
                Ok(Call::Start) | Err(_) => None,
            },
        }
    }

    fn finish(&mut self, end: End) -> Option<Ending> {
        if std::mem::replace(&mut self.over, true) {
            return None;
        }
        let ending = self.shared.enter(|inner, now| {
            inner.waiting.remove(&self.id);
            inner.core.end(now, self.id, end)
        })?;
        self.shared.metrics.ended(end, &ending);
        Some(ending)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.finish(End::Cancelled);
    }
}

async fn accept(endpoint: Endpoint, shared: Arc<Shared>) {
    let mut served = JoinSet::new();
    loop {
        tokio::select! {
            link = endpoint.accept() => match link {
                Some(link) if served.len() < reports::MAX_LINKS => {
                    served.spawn(serve(link, shared.clone()));
                }
                Some(link) => link.close(Code::Protocol, "too many balancers are connected"),
                None => return,
            },
            Some(_) = served.join_next() => {}
        }
    }
}

/// Carries what comes on one link; its placements end with it.
async fn serve(link: Link, shared: Arc<Shared>) {
    let role = link.peer().role;
    if !(Rpc::Place.allows(role) && Rpc::Follow.allows(role)) {
        return link.close(Code::Identity, "only balancers place requests");
    }
    tracing::info!(?link, "a balancer connected");
    let listed = shared.links.list(link.clone());
    link.send_datagram(&wire::load(&shared.with(|core, _| core.load())));
    // As bounded as the streams that QUIC lets a peer open.
    let mut placements = JoinSet::new();
    let closed = loop {
        tokio::select! {
            stream = link.accept() => match stream {
                Ok((sender, receiver)) => {
                    listed.used(shared.now());
                    placements.spawn(carry(shared.clone(), listed.key(), sender, receiver));
                }
                Err(closed) => break closed,
            },
            Some(_) = placements.join_next() => listed.answered(shared.now()),
            asked = link.read_datagram() => match asked {
                Ok(frame) => {
                    if answer(&shared, &link, &frame) {
                        listed.answered(shared.now());
                    }
                }
                Err(closed) => break closed,
            },
        }
    };
    tracing::info!(?link, %closed, "a balancer is gone");
}

/// Says what a request would meet; `false` for any other datagram, which is passed over.
fn answer(shared: &Shared, link: &Link, frame: &Frame) -> bool {
    if frame.kind != Kind::Question {
        return false;
    }
    let Some((id, question)) = wire::question(frame) else {
        return false;
    };
    let quote = shared.with(|core, now| core.quote(now, &question));
    // One that is lost is not waited for.
    let _ = link.send_datagram(&wire::quote(id, &quote));
    true
}
