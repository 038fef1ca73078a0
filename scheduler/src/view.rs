//! What one balancer believes of its workers: facts, reports, reachability, and its own bookings.
//!
//! A booking counts from the moment it is made. Once a report with the sequence number that the
//! agent gave with its acceptance is held, the report contains it and it is not added again;
//! a release is taken off likewise until a report contains that (DESIGN §5, rule 4).

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Incarnation, Now, WorkerId};

use crate::load::{Acceptance, Load};
use crate::model::{Backlog, Profile};
use crate::pick::Work;
use crate::wait::Queueing;

/// Reports missed before a worker is suspect.
const SUSPECT_AFTER_INTERVALS: u32 = 3;
/// The least silence that makes one suspect.
const SUSPECT_AFTER: Duration = Duration::from_millis(150);

/// What the facts say of one worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its name.
    pub name: String,
    /// Its newest start that the log knows; the agent may already be a later one.
    pub incarnation: Incarnation,
    /// What it serves, and where.
    pub spec: WorkerSpec,
    /// What the operator wants of it.
    pub desired: Desired,
    /// Its agent said goodbye: only a later start may serve.
    pub departed: bool,
}

impl Known {
    /// Every name that requests may ask it for: its models, and its adapters.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let names = self.spec.models.iter().chain(&self.spec.adapters);
        names.map(String::as_str)
    }

    /// Whether it serves what a request asks for.
    #[must_use]
    pub fn serves(&self, model: &str) -> bool {
        self.names().any(|served| served == model)
    }
}

/// One booking, until both its end and the report that contains its end are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BookingId {
    pub(crate) worker: WorkerId,
    number: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Booking {
    work: Work,
    /// Reports from this one on contain it.
    accepted: Option<u64>,
    /// Reports from this one on do not contain it any more.
    released: Option<u64>,
}

impl Booking {
    /// What it adds to a report with this sequence number.
    fn beyond(self, seq: u64) -> i64 {
        let present = i64::from(self.released.is_none());
        let entered = self.accepted.is_some_and(|accepted| accepted <= seq);
        let left = self.released.is_some_and(|released| released <= seq);
        present - i64::from(entered && !left)
    }
}

/// One worker, as seen from here.
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    pub(crate) known: Known,
    /// The start that is connected, which may be later than the one in the facts.
    pub(crate) connected: Option<Incarnation>,
    heard: Now,
    /// When the report that is held came.
    reported: Now,
    pub(crate) load: Option<Load>,
    /// Tokens of the reported backlog that are prefilled in a millisecond.
    drain_per_ms: f64,
    bookings: BTreeMap<u64, Booking>,
    /// What the bookings add to the report that is held; kept by [`Worker::settle`], because every
    /// pick asks every worker.
    beyond: i64,
    /// The same in tokens.
    beyond_work: Work,
    /// Requests that are over and that the report still has.
    beyond_over: u32,
}

impl Worker {
    fn new(known: Known) -> Self {
        Self {
            known,
            connected: None,
            heard: Now::default(),
            reported: Now::default(),
            load: None,
            drain_per_ms: 0.0,
            bookings: BTreeMap::new(),
            beyond: 0,
            beyond_work: Work::default(),
            beyond_over: 0,
        }
    }

    /// Who it is.
    pub(crate) const fn id(&self) -> WorkerId {
        self.known.incarnation.worker
    }

    /// The start that a placement would go to.
    #[inline]
    pub(crate) fn incarnation(&self) -> Option<Incarnation> {
        let fenced_by = self.known.incarnation;
        self.connected.filter(|connected| {
            *connected > fenced_by || (*connected == fenced_by && !self.known.departed)
        })
    }

    /// Whether facts and its own last word let it take placements.
    #[inline]
    pub(crate) fn open(&self) -> bool {
        self.known.desired == Desired::Ready
            && self
                .load
                .as_ref()
                .is_none_or(|load| load.acceptance == Acceptance::Open)
    }

    /// Whether nothing was heard for so long that it may be dead.
    #[inline]
    pub(crate) fn suspect(&self, now: Now) -> bool {
        let silence = now.since(self.heard);
        if silence <= SUSPECT_AFTER {
            return false;
        }
        let interval = self
            .load
            .as_ref()
            .map_or(SUSPECT_AFTER, |load| load.interval);
        silence > interval * SUSPECT_AFTER_INTERVALS
    }

    /// What a new request would find: the last report and what is known beyond it.
    #[inline]
    pub(crate) fn queueing(&self) -> Queueing {
        let (reported, slots, service) = match &self.load {
            Some(load) => (
                i64::from(load.running) + i64::from(load.queued),
                load.slots,
                load.service,
            ),
            None => (0, self.known.spec.slots, Duration::ZERO),
        };
        Queueing {
            present: u32::try_from((reported + self.beyond).max(0)).unwrap_or(u32::MAX),
            slots,
            service,
        }
    }

    /// How old the report is; a worker that has sent none is as old as can be.
    #[inline]
    pub(crate) fn age(&self, now: Now) -> Duration {
        match self.load {
            Some(_) => now.since(self.reported),
            None => Duration::MAX,
        }
    }

    /// What a new request would find before it, in tokens: the report, less what was prefilled since,
    /// and the bookings that it does not contain.
    #[inline]
    pub(crate) fn backlog(&self, now: Now) -> Backlog {
        let present = f64::from(self.queueing().present);
        let Some(load) = &self.load else {
            return Backlog {
                decodes: present,
                ..Backlog::default()
            };
        };
        let mut backlog = load.backlog;
        match load.model {
            Some(_) => {
                if backlog.pending_tokens > 0.0 {
                    let since_ms = now.since(self.reported).as_secs_f64() * 1e3;
                    let drained = since_ms * self.drain_per_ms;
                    let left = (backlog.pending_tokens - drained).max(0.0);
                    backlog.pending_pairs *= left / backlog.pending_tokens;
                    backlog.pending_tokens = left;
                }
                backlog.decodes = (backlog.decodes - f64::from(self.beyond_over)).max(0.0);
            }
            // It says nothing of its tokens: requests are all that is known.
            None => backlog.decodes = present,
        }
        let Work {
            uncached_tokens,
            pairs,
            context_tokens,
        } = self.beyond_work;
        backlog.pending_tokens = (backlog.pending_tokens + uncached_tokens).max(0.0);
        backlog.pending_pairs = (backlog.pending_pairs + pairs).max(0.0);
        backlog.context_tokens = (backlog.context_tokens + context_tokens).max(0.0);
        backlog
    }

    /// Whether slots and queue are taken, as far as is known.
    #[inline]
    pub(crate) fn full(&self) -> bool {
        let queue_limit = self.load.as_ref().map_or(0, |load| load.queue_limit);
        let queueing = self.queueing();
        queueing.present >= queueing.slots.saturating_add(queue_limit)
    }

    /// Bookings that are not released.
    pub(crate) fn own_bookings(&self) -> usize {
        let bookings = self.bookings.values();
        bookings.filter(|held| held.released.is_none()).count()
    }

    /// After any change of bookings or report: forgets what is over and counts the rest.
    fn settle(&mut self) {
        let seq = self.load.map_or(0, |load| load.seq);
        self.bookings
            .retain(|_, booking| booking.released.is_none_or(|released| released > seq));
        self.beyond = self
            .bookings
            .values()
            .map(|booking| booking.beyond(seq))
            .sum();
        let (mut work, mut over) = (Work::default(), 0);
        for booking in self.bookings.values() {
            match booking.beyond(seq) {
                1 => {
                    work.uncached_tokens += booking.work.uncached_tokens;
                    work.pairs += booking.work.pairs;
                }
                // It is over, and the report still has its decode.
                -1 => {
                    work.context_tokens -= booking.work.context_tokens;
                    over += 1;
                }
                _ => {}
            }
        }
        self.beyond_work = work;
        self.beyond_over = over;
    }
}

/// All workers, as seen from one balancer. Bounded by the workers in the facts and the requests
/// that the balancer has in flight.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// By id.
    workers: Vec<Worker>,
    /// Places in `workers` of those that serve a model or adapter.
    serving: BTreeMap<String, Vec<usize>>,
    next_booking: u64,
}

impl View {
    /// Takes new facts over. Workers that are gone from them are forgotten, bookings included.
    pub fn set_known(&mut self, known: impl IntoIterator<Item = Known>) {
        let held = std::mem::take(&mut self.workers).into_iter();
        let mut held: BTreeMap<_, _> = held.map(|worker| (worker.id(), worker)).collect();
        let mut present = BTreeMap::new();
        for known in known {
            let id = known.incarnation.worker;
            let worker = match present.remove(&id).or_else(|| held.remove(&id)) {
                Some(worker) => Worker { known, ..worker },
                None => Worker::new(known),
            };
            present.insert(id, worker);
        }
        self.workers = present.into_values().collect();
        self.serving.clear();
        for (at, worker) in self.workers.iter().enumerate() {
            for name in worker.known.names() {
                let serving = self.serving.entry(name.to_owned()).or_default();
                if serving.last() != Some(&at) {
                    serving.push(at);
                }
            }
        }
    }

    /// A link to this start of a worker stands. What was known of an earlier start is void.
    ///
    /// Returns whether it may serve: it is not older than what is known.
    pub fn connected(&mut self, now: Now, incarnation: Incarnation) -> bool {
        let Some(worker) = self.worker(incarnation.worker) else {
            return false;
        };
        if incarnation < worker.known.incarnation
            || worker
                .connected
                .is_some_and(|connected| connected > incarnation)
        {
            return false;
        }
        if worker.connected != Some(incarnation) {
            worker.load = None;
            worker.bookings.clear();
            worker.settle();
        }
        worker.connected = Some(incarnation);
        worker.heard = now;
        true
    }

    /// The link to this start is gone. Bookings on it are released by their own guards.
    pub fn disconnected(&mut self, incarnation: Incarnation) {
        if let Some(worker) = self.worker(incarnation.worker)
            && worker.connected == Some(incarnation)
        {
            worker.connected = None;
            worker.load = None;
            worker.settle();
        }
    }

    /// Takes a report over if it is newer than the one held. Returns whether it is.
    pub fn report(&mut self, now: Now, load: Load) -> bool {
        let Some(worker) = self.worker(load.incarnation.worker) else {
            return false;
        };
        if worker.connected != Some(load.incarnation) {
            return false;
        }
        worker.heard = now;
        if worker.load.is_some_and(|held| held.seq > load.seq) {
            return false;
        }
        worker.load = Some(load);
        let Backlog {
            decodes,
            context_tokens,
            ..
        } = load.backlog;
        let rate = |model: Profile| model.drain_per_ms(decodes, context_tokens);
        worker.drain_per_ms = load.model.map_or(0.0, rate);
        worker.reported = now;
        worker.settle();
        true
    }

    /// Workers from which nothing was heard for so long that a probe is due.
    pub fn suspects(&self, now: Now) -> impl Iterator<Item = Incarnation> {
        let suspects = self
            .workers
            .iter()
            .filter(move |worker| worker.suspect(now));
        suspects.filter_map(|worker| worker.connected)
    }

    /// Books one request on the connected start of a worker, before it is dispatched.
    pub fn book(&mut self, worker: WorkerId, work: Work) -> BookingId {
        self.next_booking += 1;
        let number = self.next_booking;
        if let Some(worker) = self.worker(worker) {
            let booking = Booking {
                work,
                ..Booking::default()
            };
            worker.bookings.insert(number, booking);
            worker.settle();
        }
        BookingId { worker, number }
    }

    /// The agent took it; reports from `report_seq` on contain it.
    pub fn accepted(&mut self, id: BookingId, report_seq: u64) {
        let Some(worker) = self.worker(id.worker) else {
            return;
        };
        if let Some(booking) = worker.bookings.get_mut(&id.number) {
            booking.accepted = Some(report_seq);
        }
        worker.settle();
    }

    /// It is over. With the trailer's `report_seq` it is taken off until a report says so; without
    /// (refused, or the link is gone) it vanishes at once.
    pub fn released(&mut self, id: BookingId, report_seq: Option<u64>) {
        let Some(worker) = self.worker(id.worker) else {
            return;
        };
        match (worker.bookings.get_mut(&id.number), report_seq) {
            (Some(booking), Some(seq)) if booking.accepted.is_some() => {
                booking.released = Some(seq);
            }
            _ => {
                worker.bookings.remove(&id.number);
            }
        }
        worker.settle();
    }

    /// Bookings that are not released, of one worker or of all.
    #[must_use]
    pub fn open_bookings(&self, worker: Option<WorkerId>) -> usize {
        self.workers
            .iter()
            .filter(|held| worker.is_none_or(|wanted| wanted == held.id()))
            .map(Worker::own_bookings)
            .sum()
    }

    /// Every model and adapter that a worker in the facts serves, with the first pool by name that has it.
    #[must_use]
    pub fn models(&self) -> BTreeMap<&str, &str> {
        let mut models = BTreeMap::<&str, &str>::new();
        for worker in &self.workers {
            let pool = worker.known.spec.pool.as_str();
            for model in worker.known.names() {
                let first = models.entry(model).or_insert(pool);
                *first = pool.min(*first);
            }
        }
        models
    }

    /// What the facts say of each worker, and its start that is connected.
    pub fn iter(&self) -> impl Iterator<Item = (&Known, Option<Incarnation>, Option<&Load>)> {
        self.workers
            .iter()
            .map(|worker| (&worker.known, worker.connected, worker.load.as_ref()))
    }

    /// Those that serve a model or adapter, by id.
    pub(crate) fn serving(&self, model: &str) -> impl Iterator<Item = &Worker> {
        let places = self.serving.get(model).into_iter().flatten();
        places.map(|at| &self.workers[*at])
    }

    fn worker(&mut self, id: WorkerId) -> Option<&mut Worker> {
        let at = self.workers.binary_search_by_key(&id, Worker::id).ok()?;
        self.workers.get_mut(at)
    }
}
