//! What all tasks of a balancer share, and the guards that give back what a request took.
#![allow(clippy::disallowed_methods)] // the rim: this is where the clock is read

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use dashmap::DashMap;
use forebay_link::Link;
use forebay_proto::{FingerprintKey, Millis, Now, Revision, WorkerId};
use forebay_scheduler::fingerprint::{RENDER_PROFILE, Rendering};
use forebay_scheduler::homes::table::Table;
use forebay_scheduler::index::{IndexWriter, PrefixIndex};
use forebay_scheduler::{BookingId, Choice};
use parking_lot::{Mutex, MutexGuard, RwLock};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::oneshot;

use crate::Settings;
use crate::asking::Questions;
use crate::core::auth::Keys;
use crate::core::dispatch::{Dispatch, Placed};
use crate::core::lengths::Lengths;
use crate::core::receipts::{self, Kept, Receipts};
use crate::core::retry::Budget;
use crate::core::shadows::Shadows;
use crate::core::suspects::Suspects;
use crate::fleet::Fleet;
use crate::metrics::{Metrics, Outcome};
use crate::residency::Caches;
use crate::tls::Tls;

/// Requests at once.
const MAX_REQUESTS: usize = 65_536;
/// Bodies held at once, in bytes, and answers that are held back.
const BODY_BUDGET_BYTES: u64 = 512 << 20;
const SHARDS: usize = 256;

type Wake = oneshot::Sender<Placement>;
pub(crate) type Dispatcher = Dispatch<Link, Wake>;

pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) keys: RwLock<Keys>,
    /// On the client port, if there is to be any.
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) metrics: Metrics,
    pub(crate) budgets: Mutex<BTreeMap<Arc<str>, Budget>>,
    pub(crate) draining: AtomicBool,
    pub(crate) tried: Mutex<BTreeSet<String>>,
    dispatch: Mutex<Dispatcher>,
    /// Never locked together with the view.
    receipts: Mutex<Receipts>,
    /// Who holds which chunk; read without a lock.
    pub(crate) index: PrefixIndex,
    /// Changes the index; never locked together with the view.
    pub(crate) index_writer: Mutex<IndexWriter>,
    pub(crate) caches: Caches,
    pub(crate) lengths: Mutex<Lengths>,
    pub(crate) questions: Questions,
    /// Homes that were warmed, or are.
    pub(crate) shadows: Mutex<Shadows>,
    /// Requests that engines died under; locked alone.
    pub(crate) suspects: RwLock<Suspects>,
    facts: RwLock<Option<Arc<Facts>>>,
    requests: DashMap<u64, Arc<About>>,
    next_request: AtomicU64,
    body_bytes: AtomicU64,
    started: Instant,
}

/// The facts in use, and since when there are any.
pub(crate) struct Facts {
    pub(crate) fleet: Fleet,
    pub(crate) since: Instant,
    /// Since when the newest fingerprint key is known beside an older one.
    rotated: Option<Instant>,
    pools: BTreeMap<Arc<str>, Arc<str>>,
    /// By model.
    renderings: BTreeMap<Arc<str>, Rendering>,
    homes: Table,
}

impl Facts {
    /// The pool that serves a model: the first by name.
    pub(crate) fn pool_of(&self, model: &str) -> Option<(Arc<str>, Arc<str>)> {
        let (model, pool) = self.pools.get_key_value(model)?;
        Some((model.clone(), pool.clone()))
    }

    /// How the model's prompts are rendered.
    pub(crate) fn rendering_of(&self, model: &str) -> Option<&Rendering> {
        self.renderings.get(model)
    }

    /// Whether this worker renders the model's prompts otherwise than its pool.
    pub(crate) fn is_unlike(&self, model: &str, worker: WorkerId) -> bool {
        let rendering = self.rendering_of(model);
        rendering.is_some_and(|rendering| rendering.is_unlike(worker))
    }

    /// Families of prompts, and who is to hold them.
    pub(crate) const fn homes(&self) -> &Table {
        &self.homes
    }

    /// The fingerprint key before the newest, and for how long it has been that.
    pub(crate) fn older_key(&self) -> Option<(&FingerprintKey, Duration)> {
        let [.., older, _] = &self.fleet.keys[..] else {
            return None;
        };
        Some((older, self.rotated?.elapsed()))
    }

    pub(crate) fn models(&self) -> impl Iterator<Item = &str> {
        self.pools.keys().map(|model| &**model)
    }
}

impl Shared {
    pub(crate) fn new(settings: Settings, keys: Keys, tls: Option<Tls>) -> Arc<Self> {
        let receipts = Receipts::new(settings.receipts, receipts::MOST_BYTES);
        let dispatch = Dispatch::new(StdRng::from_os_rng(), settings.receipts > 0);
        let index_writer = IndexWriter::default();
        Arc::new(Self {
            settings,
            keys: RwLock::new(keys),
            tls: tls.map(Arc::new),
            metrics: Metrics::default(),
            budgets: Mutex::default(),
            draining: AtomicBool::new(false),
            tried: Mutex::default(),
            dispatch: Mutex::new(dispatch),
            receipts: Mutex::new(receipts),
            index: index_writer.index().clone(),
            index_writer: Mutex::new(index_writer),
            caches: Caches::default(),
            lengths: Mutex::default(),
            questions: Questions::default(),
            shadows: Mutex::default(),
            suspects: RwLock::default(),
            facts: RwLock::new(None),
            requests: DashMap::with_shard_amount(SHARDS),
            next_request: AtomicU64::new(0),
            body_bytes: AtomicU64::new(0),
            started: Instant::now(),
        })
    }

    pub(crate) fn now(&self) -> Now {
        Now::at(self.started.elapsed())
    }

    pub(crate) fn facts(&self) -> Option<Arc<Facts>> {
        self.facts.read().clone()
    }

    /// Says how prompts are rendered, where that is new and not the same everywhere.
    fn tell_of_renderings(&self, facts: &Facts) {
        let before = self.facts();
        for (model, rendering) in &facts.renderings {
            let before = before.as_ref().and_then(|facts| facts.rendering_of(model));
            if before == Some(rendering) {
                continue;
            }
            let all = facts.fleet.workers.iter();
            let unlike = all.filter(|known| rendering.is_unlike(known.incarnation.worker));
            let unlike: Vec<&str> = unlike.map(|known| known.name.as_str()).collect();
            match rendering.profile.map(|profile| profile.id()) {
                None => tracing::warn!(
                    %model,
                    "most of its workers have a {RENDER_PROFILE} that this version does not know: prompts are placed by load only"
                ),
                Some(profile) if !unlike.is_empty() => tracing::warn!(
                    %model,
                    profile,
                    ?unlike,
                    "some workers render prompts otherwise than their pool: they count as holding nothing"
                ),
                Some(_) => {}
            }
        }
    }

    /// Takes facts over; returns links of starts that they declare dead.
    pub(crate) fn set_facts(self: &Arc<Self>, fleet: &Fleet) -> Vec<Link> {
        let mut pools = BTreeMap::<Arc<str>, Arc<str>>::new();
        for worker in &fleet.workers {
            let pool: Arc<str> = worker.spec.pool.as_str().into();
            for model in worker.names() {
                let first = pools.entry(model.into()).or_insert(pool.clone());
                *first = pool.clone().min(first.clone());
            }
        }
        let before = self.facts();
        let newest = |fleet: &Fleet| fleet.keys.last().map(|key| key.epoch);
        // Two keys in the first facts: nobody says when the newest came, so it came now.
        let rotated = match &before {
            Some(facts) if newest(&facts.fleet) == newest(fleet) => facts.rotated,
            _ => (fleet.keys.len() > 1).then(Instant::now),
        };
        let since = before.map_or_else(Instant::now, |facts| facts.since);
        let renderings = fleet.renderings(&pools);
        let facts = Facts {
            fleet: fleet.clone(),
            since,
            rotated,
            pools,
            renderings,
            homes: Table::new(&fleet.families),
        };
        self.shadows.lock().facts(&facts.homes);
        self.lengths
            .lock()
            .follow(|model| facts.pools.contains_key(model));
        let families = i64::try_from(facts.homes.len()).unwrap_or(i64::MAX);
        self.metrics.families.set(families);
        self.tell_of_renderings(&facts);
        *self.facts.write() = Some(Arc::new(facts));
        let Revision(revision) = fleet.revision;
        let gauge = i64::try_from(revision).unwrap_or(i64::MAX);
        self.metrics.facts_revision.set(gauge);
        self.agree_on_suspects(fleet);
        let named = |pool: &str| fleet.config.pool(pool).is_some();
        self.budgets.lock().retain(|pool, _| named(pool));
        self.change(|dispatch, _| dispatch.facts(fleet))
    }

    /// Takes over which requests engines died under.
    fn agree_on_suspects(&self, fleet: &Fleet) {
        let (fresh, all) = {
            let mut suspects = self.suspects.write();
            let fresh = suspects.agree(self.now(), fleet.cell_time, &fleet.suspects);
            (fresh, suspects.quarantined())
        };
        let all = i64::try_from(all).unwrap_or(i64::MAX);
        self.metrics.quarantine_active.set(all);
        for suspect in fresh {
            tracing::warn!(
                suspect = suspect.name(),
                tenant = suspect.tenant,
                model = suspect.model,
                shape = suspect.shape,
                engines = suspect.deaths.len(),
                "engines died of this request: it is refused from here on"
            );
        }
    }

    /// Names of the workers in the facts.
    pub(crate) fn names(&self) -> BTreeMap<WorkerId, String> {
        let facts = self.facts();
        let known = facts.iter().flat_map(|facts| &facts.fleet.workers);
        let named = known.map(|known| (known.incarnation.worker, known.name.clone()));
        named.collect()
    }

    /// Receipts of placements, newest last.
    pub(crate) fn find(&self, wanted: &receipts::Wanted, of: Option<WorkerId>) -> Vec<Arc<Kept>> {
        wanted.find(
            |look| look(&self.receipts.lock()),
            |incarnation| Some(incarnation.worker) == of,
        )
    }

    /// Looks at the view without changing what a waiter might wait for.
    pub(crate) fn dispatch(&self) -> MutexGuard<'_, Dispatcher> {
        self.dispatch.lock()
    }

    /// Changes the view, then sends those on their way who waited for it.
    pub(crate) fn change<T>(self: &Arc<Self>, change: impl FnOnce(&mut Dispatcher, Now) -> T) -> T {
        let now = self.now();
        let (done, matched) = {
            let mut dispatch = self.dispatch.lock();
            let done = change(&mut dispatch, now);
            (done, dispatch.matches(now))
        };
        for (wake, placed) in matched {
            // Who left meanwhile gives the booking back by dropping it.
            drop(wake.send(Placement::new(self, placed)));
        }
        done
    }

    /// Takes part of the memory for bodies.
    pub(crate) fn hold_body(self: &Arc<Self>) -> BodyBudget {
        BodyBudget {
            shared: self.clone(),
            bytes: 0,
        }
    }

    /// Registers a request, or says that there are too many.
    pub(crate) fn track(self: &Arc<Self>, id: &str, tenant: &Arc<str>) -> Option<Tracked> {
        // The map would have to lock each of its shards to count.
        let inflight = usize::try_from(self.metrics.inflight.get()).unwrap_or(0);
        if inflight >= MAX_REQUESTS {
            return None;
        }
        let number = self.next_request.fetch_add(1, Ordering::Relaxed);
        let about = Arc::new(About {
            id: id.to_owned(),
            tenant: tenant.clone(),
            since: Instant::now(),
            phase: AtomicU8::new(Phase::Queued as u8),
            attempts: AtomicU32::new(0),
            place: Mutex::default(),
        });
        self.requests.insert(number, about.clone());
        self.metrics.inflight.inc();
        Some(Tracked {
            shared: self.clone(),
            number,
            about,
            outcome: None,
        })
    }

    pub(crate) fn requests(&self) -> Vec<serde_json::Value> {
        let shown = self.requests.iter().take(1_000);
        shown.map(|request| request.show()).collect()
    }

    pub(crate) fn inflight(&self) -> usize {
        self.requests.len()
    }
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    Queued = 0,
    Prefill = 1,
    Decode = 2,
}

/// What an operator may see of a request: never its text.
pub(crate) struct About {
    id: String,
    tenant: Arc<str>,
    since: Instant,
    phase: AtomicU8,
    attempts: AtomicU32,
    place: Mutex<Place>,
}

/// Which model was asked for, and which worker has it.
#[derive(Clone, Default)]
struct Place {
    model: Option<Arc<str>>,
    worker: Option<Arc<str>>,
}

impl About {
    fn show(&self) -> serde_json::Value {
        let phase = match self.phase.load(Ordering::Relaxed) {
            0 => "queued",
            1 => "prefill",
            _ => "decode",
        };
        let Place { model, worker } = self.place.lock().clone();
        serde_json::json!({
            "id": self.id,
            "tenant": &*self.tenant,
            "phase": phase,
            "model": model.as_deref(),
            "worker": worker.as_deref(),
            "attempts": self.attempts.load(Ordering::Relaxed),
            "age_ms": u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX),
        })
    }
}

/// One request being served; dropped without an outcome, its client left.
pub(crate) struct Tracked {
    shared: Arc<Shared>,
    number: u64,
    about: Arc<About>,
    outcome: Option<Outcome>,
}

impl Tracked {
    pub(crate) fn phase(&self, phase: Phase) {
        self.about.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(crate) fn asks_for(&self, model: &Arc<str>) {
        self.about.place.lock().model = Some(model.clone());
    }

    pub(crate) fn placed_on(&self, worker: &Arc<str>, attempt: u32) {
        self.about.place.lock().worker = Some(worker.clone());
        self.about.attempts.store(attempt, Ordering::Relaxed);
    }

    pub(crate) fn age(&self) -> Duration {
        self.about.since.elapsed()
    }

    pub(crate) const fn ended(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let outcome =
            self.outcome
                .unwrap_or_else(|| match self.about.phase.load(Ordering::Relaxed) {
                    0 => Outcome::CancelledQueued,
                    1 => Outcome::CancelledPrefill,
                    _ => Outcome::CancelledDecode,
                });
        self.shared.requests.remove(&self.number);
        self.shared.metrics.inflight.dec();
        self.shared.metrics.request(outcome, self.age());
    }
}

/// A request's booking on a worker, given back when dropped.
pub(crate) struct Placement {
    shared: Arc<Shared>,
    pub(crate) choice: Choice,
    pub(crate) link: Link,
    pub(crate) worker: Arc<str>,
    /// Why there, if decisions are kept.
    pub(crate) kept: Option<Arc<Kept>>,
    booking: BookingId,
    over_by: Option<u64>,
}

impl Placement {
    pub(crate) fn new(shared: &Arc<Shared>, placed: Placed<Link>) -> Self {
        shared.metrics.bookings.inc();
        if placed.choice.work.makes_copy {
            shared.metrics.copies.inc();
        }
        let packed = placed
            .receipt
            .map(|receipt| (receipt.outcome, receipt.packed()));
        let kept = packed.and_then(|packed| {
            let mut receipts = shared.receipts.lock();
            receipts.keep(&placed.request_id, wall_clock(), packed)
        });
        Self {
            shared: shared.clone(),
            kept,
            choice: placed.choice,
            link: placed.link,
            worker: placed.worker,
            booking: placed.booking,
            over_by: None,
        }
    }

    /// The agent took it.
    pub(crate) fn accepted(&self, report_seq: u64) {
        self.shared
            .dispatch
            .lock()
            .accepted(self.booking, report_seq);
    }

    /// Reports from this one on do not contain it.
    pub(crate) const fn over_by(&mut self, report_seq: u64) {
        self.over_by = Some(report_seq);
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        let (booking, seq) = (self.booking, self.over_by);
        self.shared.metrics.bookings.dec();
        self.shared
            .change(|dispatch, _| dispatch.released(booking, seq));
    }
}

/// Milliseconds since 1970: when a decision was made, for people.
pub(crate) fn wall_clock() -> Millis {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    Millis::from_duration(since.unwrap_or_default())
}

/// A part of the memory for bodies, given back when dropped.
pub(crate) struct BodyBudget {
    shared: Arc<Shared>,
    bytes: u64,
}

impl BodyBudget {
    /// Takes more. False: there is none left.
    pub(crate) fn take(&mut self, bytes: u64) -> bool {
        self.take_within(BODY_BUDGET_BYTES, bytes)
    }

    /// Takes more for what can do without: no more than half is for that. False: others need it.
    pub(crate) fn take_spare(&mut self, bytes: u64) -> bool {
        self.take_within(BODY_BUDGET_BYTES / 2, bytes)
    }

    fn take_within(&mut self, most: u64, bytes: u64) -> bool {
        let before = self.shared.body_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > most {
            self.shared.body_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return false;
        }
        self.bytes += bytes;
        self.shared
            .metrics
            .body_bytes
            .inc_by(i64::try_from(bytes).unwrap_or(i64::MAX));
        true
    }
}

impl Drop for BodyBudget {
    fn drop(&mut self) {
        self.shared
            .body_bytes
            .fetch_sub(self.bytes, Ordering::Relaxed);
        self.shared
            .metrics
            .body_bytes
            .dec_by(i64::try_from(self.bytes).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_do_without_memory_leaves_half_of_it_to_requests() {
        let settings = Settings::on(([127, 0, 0, 1], 0).into());
        let shared = Shared::new(settings, Keys::anyone("t"), None);
        let half = BODY_BUDGET_BYTES / 2;
        let (mut answer, mut request) = (shared.hold_body(), shared.hold_body());
        assert!(answer.take_spare(half));
        assert!(!answer.take_spare(1), "half is taken");
        assert!(request.take(half));
        assert!(!request.take(1), "all is taken");
        drop(answer);
        assert!(
            !shared.hold_body().take_spare(1),
            "requests have their half"
        );
        drop(request);
        assert!(shared.hold_body().take_spare(half));
        assert_eq!(shared.metrics.body_bytes.get(), 0);
    }
}
