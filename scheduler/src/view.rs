//! What one balancer believes of its workers: facts, reports, reachability, and its own bookings.
//!
//! A booking counts from the moment it is made. Once a report with the sequence number that the
//! agent gave with its acceptance is held, the report contains it and it is not added again;
//! a release is taken off likewise until a report contains that (DESIGN §5, rule 4).
//!
//! What a pick asks of every worker is kept beside them, contiguous and ready ([`Standing`],
//! [`Bound`]): it changes with a worker, some hundred times less often than it is read.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_proto::{Incarnation, Now, WorkerId};

use crate::load::Load;
use crate::narrow::Bound;
use crate::pick::{Scratch, Work};
use crate::policy::Request;
use crate::standing::{Moment, Standing};
use crate::worker::{Booking, BookingId, Known, Worker};

/// What a booking copied to a worker, the worker has told by then; else it is not there.
const COPY_KNOWN: Duration = Duration::from_secs(10);

/// Workers that serve a model, or those of them in one zone.
#[derive(Clone, Debug, Default)]
struct Group {
    /// In the view, by id.
    places: Vec<usize>,
    /// The longest context that one of them takes, in tokens.
    longest: f64,
    /// Empty in a zone's own.
    zones: BTreeMap<String, Group>,
}

impl Group {
    fn add(&mut self, place: usize, longest: f64) {
        if self.places.last() != Some(&place) {
            self.places.push(place);
            self.longest = self.longest.max(longest);
        }
    }
}

/// All workers, as seen from one balancer. Bounded by the workers in the facts and the requests
/// that the balancer has in flight.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// By id.
    workers: Vec<Worker>,
    /// Of each worker, in the same place.
    pub(crate) standings: Vec<Standing>,
    pub(crate) bounds: Vec<Bound>,
    /// Those that serve a model or adapter.
    serving: BTreeMap<String, Group>,
    next_booking: u64,
    /// The latest moment that it was told.
    now: Now,
    pub(crate) scratch: Scratch,
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
                Some(mut worker) => {
                    worker.known = known;
                    worker
                }
                None => Worker::new(known),
            };
            present.insert(id, worker);
        }
        self.workers = present.into_values().collect();
        self.standings = self.workers.iter().map(Standing::of).collect();
        self.bounds = self.standings.iter().map(Bound::of).collect();
        self.serving.clear();
        for (at, worker) in self.workers.iter().enumerate() {
            for name in worker.known.names() {
                let longest = self.standings[at].longest;
                let serving = self.serving.entry(name.to_owned()).or_default();
                serving.add(at, longest);
                let zone = &worker.known.spec.zone;
                if !zone.is_empty() {
                    let zone = serving.zones.entry(zone.clone()).or_default();
                    zone.add(at, longest);
                }
            }
        }
    }

    /// A link to this start of a worker stands. What was known of an earlier start is void.
    ///
    /// Returns whether it may serve: it is not older than what is known.
    pub fn connected(&mut self, now: Now, incarnation: Incarnation) -> bool {
        self.tell(now);
        self.change(incarnation.worker, |worker| {
            let later = |connected: Incarnation| connected > incarnation;
            if incarnation < worker.known.incarnation || worker.connected.is_some_and(later) {
                return false;
            }
            if worker.connected != Some(incarnation) {
                worker.forget();
            }
            worker.connected = Some(incarnation);
            worker.heard = now;
            true
        })
    }

    /// The link to this start is gone. Bookings on it are released by their own guards.
    pub fn disconnected(&mut self, incarnation: Incarnation) {
        self.change(incarnation.worker, |worker| {
            let is_it = worker.connected == Some(incarnation);
            if is_it {
                worker.connected = None;
                worker.load = None;
                worker.settle();
            }
            is_it
        });
    }

    /// Takes a report over unless it is older than the one held. Returns whether it did.
    pub fn report(&mut self, now: Now, load: Load) -> bool {
        self.tell(now);
        let mut newer = false;
        self.change(load.incarnation.worker, |worker| {
            if worker.connected != Some(load.incarnation) {
                return false;
            }
            worker.heard = now;
            // The same requests, further on, are news too.
            newer = worker.load.is_none_or(|held| held.seq <= load.seq);
            if newer {
                worker.load = Some(load);
                worker.reported = now;
                worker.settle();
            }
            true
        });
        newer
    }

    /// Workers from which nothing was heard for so long that a probe is due.
    pub fn suspects(&self, now: Now) -> impl Iterator<Item = Incarnation> {
        let at = Moment::of(now);
        let both = self.workers.iter().zip(&self.standings);
        let suspects = both.filter(move |(_, standing)| standing.suspect(at));
        suspects.filter_map(|(worker, _)| worker.connected)
    }

    /// Books one request on the connected start of a worker, before it is dispatched.
    pub fn book(&mut self, worker: WorkerId, work: Work) -> BookingId {
        self.next_booking += 1;
        let (number, now) = (self.next_booking, self.now);
        self.change(worker, |worker| {
            worker.recent.add(now, worker.load.as_ref(), &work);
            let booking = Booking {
                work,
                ..Booking::default()
            };
            worker.change(number, |_| Some(booking));
            true
        });
        BookingId { worker, number }
    }

    /// The agent took it; reports from `report_seq` on contain it.
    pub fn accepted(&mut self, id: BookingId, report_seq: u64) {
        let accepted = |booking: Booking| Booking {
            accepted: Some(report_seq),
            ..booking
        };
        self.change(id.worker, |worker| {
            worker.change(id.number, |held| held.map(accepted));
            true
        });
    }

    /// It is over. With the trailer's `report_seq` it is taken off until a report says so; without
    /// (refused, or the link is gone) it vanishes at once.
    pub fn released(&mut self, id: BookingId, report_seq: Option<u64>) {
        let released = |booking: Booking| {
            let seq = report_seq.filter(|_| booking.accepted.is_some())?;
            Some(Booking {
                released: Some(seq),
                ..booking
            })
        };
        let known_by = self.now + COPY_KNOWN;
        self.change(id.worker, |worker| {
            if worker.copies(id.number) {
                worker.copied = known_by;
            }
            worker.change(id.number, |held| held.and_then(released));
            true
        });
    }

    /// Bookings that are not released, of one worker or of all.
    #[must_use]
    pub fn open_bookings(&self, worker: Option<WorkerId>) -> usize {
        self.workers
            .iter()
            .filter(|held| worker.is_none_or(|wanted| wanted == held.id()))
            .map(|worker| worker.beyond.open)
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

    /// Places of those that serve what is asked for, where it may be served, by id.
    pub(crate) fn serving(&self, request: &Request<'_>) -> &[usize] {
        self.group(request).map_or(&[], |group| &group.places)
    }

    /// The context that a worker must take to be asked: none, if nobody takes the prompt. Its engine has a
    /// word for that.
    pub(crate) fn context_tokens(&self, request: &Request<'_>) -> f64 {
        let longest = self.group(request).map_or(0.0, |group| group.longest);
        if request.prompt_tokens > longest {
            0.0
        } else {
            request.prompt_tokens
        }
    }

    fn group(&self, request: &Request<'_>) -> Option<&Group> {
        let group = self.serving.get(request.model)?;
        request
            .zone
            .map_or(Some(group), |zone| group.zones.get(zone))
    }

    /// Time does not go back: returns the latest moment that was told.
    pub(crate) fn tell(&mut self, now: Now) -> Now {
        self.now = self.now.max(now);
        self.now
    }

    /// Changes a worker that the facts have, if `change` says that it did.
    fn change(&mut self, id: WorkerId, change: impl FnOnce(&mut Worker) -> bool) -> bool {
        let Ok(at) = self.workers.binary_search_by_key(&id, Worker::id) else {
            return false;
        };
        let worker = &mut self.workers[at];
        let changed = change(worker);
        if changed {
            self.standings[at] = Standing::of(worker);
            self.bounds[at] = Bound::of(&self.standings[at]);
        }
        changed
    }
}
