//! One worker as seen from one balancer: facts, its last report, and what is booked beyond it.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Incarnation, Now, WorkerId};

use crate::load::{Acceptance, Load};
use crate::pick::Work;
use crate::standing::Recent;
use crate::wait::Queueing;

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
    pub(crate) number: u64,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Booking {
    pub(crate) work: Work,
    /// Reports from this one on contain it.
    pub(crate) accepted: Option<u64>,
    /// Reports from this one on do not contain it any more.
    pub(crate) released: Option<u64>,
}

/// What bookings add to a report.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Beyond {
    /// Requests that it does not have, less those that it still has.
    pub(crate) requests: i64,
    /// The same in tokens.
    pub(crate) work: Work,
    /// Requests that are over and that the report still has.
    pub(crate) over: f64,
    /// Bookings that are not released.
    pub(crate) open: usize,
    /// Those of them that make a copy.
    pub(crate) copies: usize,
}

impl Booking {
    /// Adds what it is beyond the report with this sequence number, `times` over: -1 takes it off.
    fn add(self, seq: u64, times: i64, sum: &mut Beyond) {
        let present = i64::from(self.released.is_none());
        let entered = self.accepted.is_some_and(|accepted| accepted <= seq);
        let left = self.released.is_some_and(|released| released <= seq);
        let beyond = present - i64::from(entered && !left);
        let sign = times as f64;
        sum.requests += times * beyond;
        match beyond {
            1 => {
                sum.work.uncached_tokens += sign * self.work.uncached_tokens;
                sum.work.pairs += sign * self.work.pairs;
            }
            // It is over, and the report still has its decode.
            -1 => {
                sum.work.context_tokens -= sign * self.work.context_tokens;
                sum.over += sign;
            }
            _ => {}
        }
        if present == 1 {
            sum.open = sum.open.saturating_add_signed(times as isize);
            let copies = times as isize * isize::from(self.work.makes_copy);
            sum.copies = sum.copies.saturating_add_signed(copies);
        }
    }

    const fn is_over(&self, seq: u64) -> bool {
        matches!(self.released, Some(released) if released <= seq)
    }
}

/// One worker, as seen from here.
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    pub(crate) known: Known,
    /// The start that is connected, which may be later than the one in the facts.
    pub(crate) connected: Option<Incarnation>,
    pub(crate) heard: Now,
    /// When the report that is held came.
    pub(crate) reported: Now,
    pub(crate) load: Option<Load>,
    /// Requests that are under way from here, and at most [`MAX_RELEASED`] that are over and wait for a report.
    bookings: BTreeMap<u64, Booking>,
    pub(crate) beyond: Beyond,
    /// What was booked on it lately.
    pub(crate) recent: Recent,
    /// When what was copied to it last is known to be there, or that it is not.
    pub(crate) copied: Now,
}

impl Worker {
    pub(crate) fn new(known: Known) -> Self {
        Self {
            known,
            connected: None,
            heard: Now::default(),
            reported: Now::default(),
            load: None,
            bookings: BTreeMap::new(),
            beyond: Beyond::default(),
            recent: Recent::default(),
            copied: Now::default(),
        }
    }

    /// Who it is.
    pub(crate) const fn id(&self) -> WorkerId {
        self.known.incarnation.worker
    }

    /// The start that a placement would go to.
    pub(crate) fn incarnation(&self) -> Option<Incarnation> {
        let fenced_by = self.known.incarnation;
        self.connected.filter(|connected| {
            *connected > fenced_by || (*connected == fenced_by && !self.known.departed)
        })
    }

    /// Whether facts and its own last word let it take placements.
    pub(crate) fn open(&self) -> bool {
        let accepts = |load: &Load| load.acceptance == Acceptance::Open;
        self.known.desired == Desired::Ready && self.load.as_ref().is_none_or(accepts)
    }

    /// What a new request would find: the last report and what is known beyond it.
    pub(crate) fn queueing(&self) -> Queueing {
        let (reported, slots, service) = match &self.load {
            Some(load) => (
                i64::from(load.running) + i64::from(load.queued),
                load.slots,
                load.service,
            ),
            None => (0, self.known.spec.slots, Duration::ZERO),
        };
        let present = (reported + self.beyond.requests).max(0);
        Queueing {
            present: u32::try_from(present).unwrap_or(u32::MAX),
            slots,
            service,
        }
    }

    /// Whether slots and queue are taken, as far as is known.
    pub(crate) fn full(&self) -> bool {
        let queue_limit = self.load.as_ref().map_or(0, |load| load.queue_limit);
        let queueing = self.queueing();
        queueing.present >= queueing.slots.saturating_add(queue_limit)
    }

    /// Whether this booking makes a copy, and is not over.
    pub(crate) fn copies(&self, number: u64) -> bool {
        let booking = self.bookings.get(&number);
        booking.is_some_and(|booking| booking.work.makes_copy && booking.released.is_none())
    }

    /// Makes, changes or removes one booking, and counts the difference.
    pub(crate) fn change(
        &mut self,
        number: u64,
        change: impl FnOnce(Option<Booking>) -> Option<Booking>,
    ) {
        let seq = self.seq();
        let before = self.bookings.get(&number).copied();
        if let Some(before) = before {
            before.add(seq, -1, &mut self.beyond);
        }
        match change(before).filter(|after| !after.is_over(seq)) {
            Some(after) => {
                after.add(seq, 1, &mut self.beyond);
                self.bookings.insert(number, after);
                self.forget_released();
            }
            None => {
                self.bookings.remove(&number);
            }
        }
        if self.bookings.is_empty() {
            // What rounding left over.
            self.beyond = Beyond::default();
        }
    }

    /// At the bound the report goes on counting the oldest of those that are over, until it does not have it.
    fn forget_released(&mut self) {
        if self.bookings.len() - self.beyond.open <= MAX_RELEASED {
            return;
        }
        let mut released = self.bookings.iter().filter(|(_, it)| it.released.is_some());
        if let Some((number, booking)) = released.next().map(|(number, it)| (*number, *it)) {
            booking.add(self.seq(), -1, &mut self.beyond);
            self.bookings.remove(&number);
        }
    }

    /// After a change of the report: forgets what is over and counts the rest anew.
    pub(crate) fn settle(&mut self) {
        let seq = self.seq();
        self.bookings.retain(|_, booking| !booking.is_over(seq));
        self.beyond = Beyond::default();
        for booking in self.bookings.values() {
            booking.add(seq, 1, &mut self.beyond);
        }
    }

    /// Nothing of an earlier start counts any more.
    pub(crate) fn forget(&mut self) {
        self.load = None;
        self.bookings.clear();
        self.copied = Now::default();
        self.settle();
    }

    fn seq(&self) -> u64 {
        self.load.as_ref().map_or(0, |load| load.seq)
    }
}

/// Far more than end between two reports. An agent that names one which never comes ends up here.
const MAX_RELEASED: usize = 4_096;

#[cfg(test)]
mod tests {
    use super::*;

    fn worker() -> Worker {
        let spec = WorkerSpec {
            pool: "default".into(),
            advertise: "127.0.0.1:7420".into(),
            models: vec!["m".into()],
            slots: 4,
            ..WorkerSpec::default()
        };
        Worker::new(Known {
            name: "w1".into(),
            incarnation: Incarnation {
                worker: WorkerId(1),
                grant: 1,
                start: 1,
            },
            spec,
            desired: Desired::Ready,
            departed: false,
        })
    }

    #[test]
    fn an_agent_that_names_a_report_which_never_comes_fills_nothing() {
        let mut worker = worker();
        let running = Booking {
            accepted: Some(0),
            ..Booking::default()
        };
        worker.change(0, |_| Some(running));
        for number in 1..=3 * MAX_RELEASED as u64 {
            worker.change(number, |_| Some(running));
            let released = |held: Booking| Booking {
                released: Some(u64::MAX),
                ..held
            };
            worker.change(number, |held| held.map(released));
        }
        assert_eq!(worker.bookings.len(), MAX_RELEASED + 1);
        // What is under way stays, and the sums are those of what is left.
        assert_eq!(worker.beyond.open, 1);
        let sums = (worker.beyond.requests, worker.beyond.over);
        worker.settle();
        assert_eq!((worker.beyond.requests, worker.beyond.over), sums);
        worker.change(0, |_| None);
        assert_eq!(worker.bookings.len(), MAX_RELEASED);
    }
}
