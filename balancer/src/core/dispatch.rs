//! Who goes where, and who waits: the fleet's view, the links that stand, one bounded queue a pool.
//!
//! Requests are served in the order of their arrival, per model, also those that come back after a
//! refusal. Whoever changes the view asks for [`Dispatch::matches`] and delivers them after the lock
//! is gone. Pure: links (`L`) and the way to wake a waiter (`W`) are its user's.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use forebay_proto::{Incarnation, Now, Revision, WorkerId};
use forebay_scheduler::asking::Asking;
use forebay_scheduler::homes::table::Homed;
use forebay_scheduler::index::Hit;
use forebay_scheduler::model::Targets;
use forebay_scheduler::policy::{self, Policy, Request};
use forebay_scheduler::{BookingId, Choice, Load, NoChoice, Receipt, Versions, View};
use rand::Rng;
use rand::rngs::StdRng;

use crate::fleet::Fleet;

/// Waiters of one pool that are looked at in vain for one change of the view, so that a long queue
/// does not make each report dear. Those behind look for themselves now and then.
const MAX_MISSES: u32 = 16;

/// Place of a request in the order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

/// A request that is booked on a worker.
pub(crate) struct Placed<L> {
    pub(crate) choice: Choice,
    pub(crate) booking: BookingId,
    pub(crate) link: L,
    pub(crate) worker: Arc<str>,
    /// Of which request.
    pub(crate) request_id: Arc<str>,
    /// Why there, if decisions are explained.
    pub(crate) receipt: Option<Box<Receipt>>,
}

/// A worker, and how many tokens of the prompt it has by its own word.
pub(crate) type Answer = (WorkerId, u32);

/// What a request asks for.
#[derive(Clone)]
pub(crate) struct Ask {
    pub(crate) ticket: Ticket,
    pub(crate) pool: Arc<str>,
    pub(crate) model: Arc<str>,
    /// Starts of workers that are not to be asked again.
    pub(crate) tried: Vec<Incarnation>,
    /// What workers that were asked said; where there are any, they are preferred.
    pub(crate) answers: Vec<Answer>,
    pub(crate) sought: Arc<Sought>,
}

/// What a request asks of a worker beyond its model.
pub(crate) struct Sought {
    pub(crate) request_id: Arc<str>,
    /// Where it must stay.
    pub(crate) zone: Option<Arc<str>>,
    pub(crate) policy: &'static dyn Policy,
    pub(crate) prompt_tokens: f64,
    /// How much longer it may be, at the 0.95 quantile.
    pub(crate) longer_tokens: f64,
    pub(crate) targets: Targets,
    /// By worker.
    pub(crate) hits: Vec<Hit>,
    /// Of the prefix index, as `hits` were found.
    pub(crate) index_version: u64,
    pub(crate) conversation: Option<u64>,
    pub(crate) head: u64,
    /// Its family, if that has homes.
    pub(crate) family: Option<Arc<Homed>>,
    /// Something is held against it: it is kept apart from others of whom that is so.
    pub(crate) suspected: bool,
}

impl Default for Sought {
    fn default() -> Self {
        Self {
            request_id: Arc::default(),
            zone: None,
            policy: policy::default(),
            prompt_tokens: 0.0,
            longer_tokens: 0.0,
            targets: Targets::NONE,
            hits: Vec::new(),
            index_version: 0,
            conversation: None,
            head: 0,
            family: None,
            suspected: false,
        }
    }
}

impl Ask {
    /// Whoever has room for this one has room for the other, who may not overtake it.
    fn competes_with(&self, other: &Self) -> bool {
        let zone = &self.sought.zone;
        self.model == other.model && (zone.is_none() || *zone == other.sought.zone)
    }

    /// What is asked, whoever has been tried.
    pub(crate) fn request(&self) -> Request<'_> {
        self.sought.request(&self.model, &[], 0)
    }
}

impl Sought {
    fn request<'a>(&'a self, model: &'a str, tried: &'a [WorkerId], turn: u64) -> Request<'a> {
        Request {
            tried,
            zone: self.zone.as_deref(),
            prompt_tokens: self.prompt_tokens,
            longer_tokens: self.longer_tokens,
            targets: self.targets,
            hits: &self.hits,
            homes: self.family.as_deref().map(Homed::as_asked),
            conversation: self.conversation,
            head: self.head,
            turn,
            ..Request::of(model)
        }
    }

    /// The hits with what workers themselves said; none: nobody said anything.
    fn corrected(&self, answers: &[Answer]) -> Option<Vec<Hit>> {
        if answers.is_empty() {
            return None;
        }
        let said = |hit: &&Hit| answers.iter().all(|(worker, _)| *worker != hit.worker);
        let mut hits: Vec<Hit> = self.hits.iter().filter(said).copied().collect();
        hits.extend(answers.iter().map(|(worker, tokens)| Hit {
            worker: *worker,
            chunks: 0,
            tokens: *tokens,
        }));
        hits.sort_unstable_by_key(|hit| hit.worker);
        Some(hits)
    }
}

struct Waiter<W> {
    ask: Ask,
    wake: W,
}

/// One link of all that ever stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkNumber(u64);

struct Connected<L> {
    number: LinkNumber,
    incarnation: Incarnation,
    name: Arc<str>,
    link: L,
}

pub(crate) struct Dispatch<L, W> {
    view: View,
    links: BTreeMap<WorkerId, Connected<L>>,
    queues: BTreeMap<Arc<str>, VecDeque<Waiter<W>>>,
    arrivals: u64,
    links_made: u64,
    /// Decisions by model, of those that the facts have.
    turns: BTreeMap<Arc<str>, u64>,
    facts_revision: Revision,
    /// Whether decisions are explained.
    explains: bool,
    pub(crate) asking: Asking,
    /// Bookings of requests that something is held against; as bounded as bookings are.
    suspects: BTreeMap<BookingId, WorkerId>,
    rng: StdRng,
}

impl<L: Clone, W> Dispatch<L, W> {
    pub(crate) fn new(rng: StdRng, explains: bool) -> Self {
        Self {
            view: View::default(),
            links: BTreeMap::new(),
            queues: BTreeMap::new(),
            arrivals: 0,
            links_made: 0,
            turns: BTreeMap::new(),
            facts_revision: Revision::default(),
            explains,
            asking: Asking::default(),
            suspects: BTreeMap::new(),
            rng,
        }
    }

    pub(crate) const fn view(&self) -> &View {
        &self.view
    }

    pub(crate) const fn rng(&mut self) -> &mut StdRng {
        &mut self.rng
    }

    /// Takes new facts over; returns links of starts that they declare dead, by a later one or
    /// because the worker was removed.
    pub(crate) fn facts(&mut self, fleet: &Fleet) -> Vec<L> {
        self.view.set_known(fleet.workers.iter().cloned());
        self.facts_revision = fleet.revision;
        let models = self.view.models();
        self.turns.retain(|model, _| models.contains_key(&**model));
        let newest: BTreeMap<_, _> = fleet
            .workers
            .iter()
            .map(|known| (known.incarnation.worker, known.incarnation))
            .collect();
        let dead = |(id, connected): (&WorkerId, &Connected<L>)| {
            let newest = newest.get(id);
            let lives = newest.is_some_and(|newest| connected.incarnation >= *newest);
            (!lives).then(|| connected.link.clone())
        };
        self.links.iter().filter_map(dead).collect()
    }

    /// A link stands. Returns its number if it may serve.
    pub(crate) fn connected(
        &mut self,
        now: Now,
        incarnation: Incarnation,
        name: &Arc<str>,
        link: L,
    ) -> Option<LinkNumber> {
        if !self.view.connected(now, incarnation) {
            return None;
        }
        self.links_made += 1;
        let number = LinkNumber(self.links_made);
        let connected = Connected {
            number,
            incarnation,
            name: name.clone(),
            link,
        };
        self.links.insert(incarnation.worker, connected);
        Some(number)
    }

    /// A link is gone; unless another took its place meanwhile, so is the worker.
    pub(crate) fn disconnected(&mut self, incarnation: Incarnation, number: LinkNumber) {
        if let Some(connected) = self.links.get(&incarnation.worker)
            && connected.number == number
        {
            self.links.remove(&incarnation.worker);
            self.view.disconnected(incarnation);
        }
    }

    /// The start of a worker that is connected, and its link.
    pub(crate) fn link_to(&self, worker: WorkerId) -> Option<(Incarnation, L)> {
        let connected = self.links.get(&worker)?;
        Some((connected.incarnation, connected.link.clone()))
    }

    pub(crate) fn report(&mut self, now: Now, load: Load) -> bool {
        self.view.report(now, load)
    }

    pub(crate) fn accepted(&mut self, booking: BookingId, report_seq: u64) {
        self.view.accepted(booking, report_seq);
    }

    pub(crate) fn released(&mut self, booking: BookingId, report_seq: Option<u64>) {
        self.suspects.remove(&booking);
        self.view.released(booking, report_seq);
    }

    /// Links of workers from which nothing was heard for too long.
    pub(crate) fn suspects(&self, now: Now) -> Vec<(Incarnation, L)> {
        self.view
            .suspects(now)
            .filter_map(|incarnation| {
                let connected = self.links.get(&incarnation.worker)?;
                (connected.incarnation == incarnation)
                    .then(|| (incarnation, connected.link.clone()))
            })
            .collect()
    }

    pub(crate) const fn arrive(&mut self) -> Ticket {
        self.arrivals += 1;
        Ticket(self.arrivals)
    }

    /// Books the request where it is best, unless someone who came earlier waits for the same model.
    pub(crate) fn place(&mut self, now: Now, ask: &Ask) -> Result<Placed<L>, NoChoice> {
        let ahead = self.queues.get(&ask.pool).is_some_and(|queue| {
            queue
                .iter()
                .take_while(|waiter| waiter.ask.ticket < ask.ticket)
                .any(|waiter| waiter.ask.competes_with(ask))
        });
        if ahead {
            // Waiting helps nobody where there is nobody to wait for.
            let tried = self.tried(ask);
            let capacity = self
                .view
                .has_capacity(&ask.sought.request(&ask.model, &tried, 0));
            return Err(if capacity {
                NoChoice::Busy
            } else {
                NoChoice::NoCapacity
            });
        }
        self.book(now, ask)
    }

    /// The workers that seem best, to be asked.
    pub(crate) fn best(&mut self, now: Now, ask: &Ask) -> Vec<(WorkerId, L)> {
        let tried = self.tried(ask);
        let sought = &*ask.sought;
        let request = sought.request(&ask.model, &tried, 0);
        let count = self.asking.width();
        let best = self
            .view
            .best(now, &request, sought.policy, count, &mut self.rng);
        let link = |worker: WorkerId| Some((worker, self.links.get(&worker)?.link.clone()));
        best.into_iter().filter_map(link).collect()
    }

    /// Lets the request wait, or says that `limit` others do.
    pub(crate) fn enqueue(&mut self, ask: Ask, wake: W, limit: u32) -> bool {
        let queue = self.queues.entry(ask.pool.clone()).or_default();
        if queue.len() >= limit as usize {
            if queue.is_empty() {
                self.queues.remove(&ask.pool);
            }
            return false;
        }
        let at = queue.partition_point(|waiter| waiter.ask.ticket < ask.ticket);
        queue.insert(at, Waiter { ask, wake });
        true
    }

    /// The request does not wait any more.
    pub(crate) fn leave(&mut self, pool: &Arc<str>, ticket: Ticket) {
        if let Some(queue) = self.queues.get_mut(pool) {
            if let Ok(at) = queue.binary_search_by_key(&ticket, |waiter| waiter.ask.ticket) {
                queue.remove(at);
            }
            if queue.is_empty() {
                self.queues.remove(pool);
            }
        }
    }

    pub(crate) fn waiting_in(&self, pool: &Arc<str>) -> usize {
        self.queues.get(pool).map_or(0, VecDeque::len)
    }

    pub(crate) fn waiting(&self) -> usize {
        self.queues.values().map(VecDeque::len).sum()
    }

    /// Books waiting requests, first come first served, as far as there is room now.
    #[must_use]
    pub(crate) fn matches(&mut self, now: Now) -> Vec<(W, Placed<L>)> {
        let mut matched = Vec::new();
        if self.queues.is_empty() {
            return matched;
        }
        for pool in self.queues.keys().cloned().collect::<Vec<_>>() {
            let mut without_room: Vec<Arc<str>> = Vec::new();
            let (mut at, mut misses) = (0, 0);
            while let Some(waiter) = self.queues.get(&pool).and_then(|queue| queue.get(at)) {
                if without_room.contains(&waiter.ask.model) {
                    at += 1;
                    continue;
                }
                let ask = waiter.ask.clone();
                match self.book(now, &ask) {
                    Ok(placed) => {
                        let queue = self.queues.get_mut(&pool).expect("it was just read");
                        let waiter = queue.remove(at).expect("it was just read");
                        matched.push((waiter.wake, placed));
                    }
                    Err(_) => {
                        // One that avoids some workers says nothing about the rest.
                        let avoids = !ask.tried.is_empty() || ask.sought.suspected;
                        if !avoids && ask.sought.zone.is_none() {
                            without_room.push(ask.model);
                        }
                        at += 1;
                        misses += 1;
                        if misses >= MAX_MISSES {
                            break;
                        }
                    }
                }
            }
        }
        self.queues.retain(|_, queue| !queue.is_empty());
        matched
    }

    fn book(&mut self, now: Now, ask: &Ask) -> Result<Placed<L>, NoChoice> {
        let turn = self.turn(&ask.model);
        let (choice, receipt) = self.decide(now, ask, turn, self.explains);
        let choice = choice?;
        self.turns.insert(ask.model.clone(), turn + 1);
        let worker = choice.incarnation.worker;
        let connected = self.links.get(&worker).ok_or(NoChoice::NoCapacity)?;
        let booking = self.view.book(worker, choice.work);
        if ask.sought.suspected {
            self.suspects.insert(booking, worker);
        }
        Ok(Placed {
            choice,
            booking,
            link: connected.link.clone(),
            worker: connected.name.clone(),
            request_id: ask.sought.request_id.clone(),
            receipt,
        })
    }

    /// Where the request would go if it came now and nobody waited, and why; nothing is booked.
    pub(crate) fn what_if(&mut self, now: Now, ask: &Ask) -> Receipt {
        let turn = self.turn(&ask.model);
        let (_, receipt) = self.decide(now, ask, turn, true);
        *receipt.expect("it was asked for")
    }

    fn turn(&mut self, model: &Arc<str>) -> u64 {
        match self.turns.get(model) {
            Some(turn) => *turn,
            // Balancers that start together do not all begin with the same worker.
            None => u64::from(self.rng.random::<u32>()),
        }
    }

    fn decide(
        &mut self,
        now: Now,
        ask: &Ask,
        turn: u64,
        explain: bool,
    ) -> (Result<Choice, NoChoice>, Option<Box<Receipt>>) {
        let tried = self.tried(ask);
        let sought = &*ask.sought;
        let answered: Vec<WorkerId> = ask.answers.iter().map(|(worker, _)| *worker).collect();
        let mut request = sought.request(&ask.model, &tried, turn);
        let apart = self.apart(ask, &request);
        request.apart = &apart;
        let hits = sought.corrected(&ask.answers);
        if let Some(hits) = &hits {
            request.hits = hits;
            request.only = &answered;
        }
        if self.view.is_closed(now, &request) {
            request.only = &[];
        }
        let (policy, rng) = (sought.policy, &mut self.rng);
        if !explain {
            return (self.view.pick(now, &request, policy, rng), None);
        }
        let versions = Versions {
            facts_revision: self.facts_revision,
            index_version: sought.index_version,
        };
        let (choice, receipt) = self.view.explain(now, &request, policy, rng, versions);
        (choice, Some(Box::new(receipt)))
    }

    /// Workers that run what may kill their engine, where this one may too and there are others: if one of them dies
    /// again, it is known of whom.
    fn apart(&self, ask: &Ask, request: &Request<'_>) -> Vec<WorkerId> {
        if !ask.sought.suspected || self.suspects.is_empty() {
            return Vec::new();
        }
        let mut apart: Vec<WorkerId> = self.suspects.values().copied().collect();
        apart.sort_unstable();
        apart.dedup();
        let alone = Request {
            apart: &apart,
            ..*request
        };
        if self.view.has_capacity(&alone) {
            apart
        } else {
            Vec::new()
        }
    }

    /// Workers that are not to be asked: a later start of one that failed has not been tried.
    fn tried(&self, ask: &Ask) -> Vec<WorkerId> {
        let same_start = |tried: &&Incarnation| {
            let connected = self.links.get(&tried.worker);
            connected.is_none_or(|connected| connected.incarnation <= **tried)
        };
        let tried = ask.tried.iter().filter(same_start);
        tried.map(|tried| tried.worker).collect()
    }
}

#[cfg(test)]
#[path = "dispatch_tests.rs"]
mod tests;
