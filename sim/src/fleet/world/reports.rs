//! What balancers hear of workers, and when.

use std::time::Duration;

use forebay_proto::Now;
use rand::Rng as _;

use super::super::Reports;
use super::super::balancer::News;
use super::World;
use super::agenda::Event;

impl World<'_> {
    /// Places those who wait, as far as there is room.
    pub(super) fn let_in(&mut self, balancer: usize) {
        for _ in 0..self.waiting[balancer].len() {
            let before = self.waiting[balancer].len();
            let Some(job) = self.waiting[balancer].pop_front() else {
                return;
            };
            self.place(job, &[]);
            if self.waiting[balancer].len() == before {
                self.waiting[balancer].rotate_right(1);
                return;
            }
        }
    }

    pub(super) fn report(&mut self, balancer: u16, worker: u32) {
        let at = usize::from(balancer);
        let pair = &mut self.pairs[worker as usize][at];
        if pair.due != Some(self.now) {
            // An earlier one took its place.
            return;
        }
        pair.due = None;
        if self.workers[worker as usize].alive {
            self.advance(worker);
            let from = &mut self.workers[worker as usize];
            let load = match self.setup.reports {
                Reports::Fresh => None,
                Reports::Every(_) => Some(from.core.load()),
                Reports::Deployed => {
                    let cadence = &mut self.pairs[worker as usize][at].cadence;
                    from.core.report(self.now, cadence)
                }
            };
            if let Some(load) = load {
                let news = self.balancers[at].news(from);
                let loss = self.setup.report_loss;
                let lost = loss > 0.0 && self.rng.random_bool(loss);
                if !lost || !matches!(news, News::Nothing) {
                    self.unseen[worker as usize][at] = 0;
                    self.send(Event::Report(balancer, Box::new((load, news))));
                }
            }
        }
        let again = match self.setup.reports {
            Reports::Fresh => return,
            Reports::Every(interval) => self.now + interval,
            Reports::Deployed => self.due(worker, at),
        };
        self.remind(worker, at, again);
    }

    /// When a balancer is due its next report of a worker.
    pub(super) fn due(&self, worker: u32, balancer: usize) -> Now {
        if !self.workers[worker as usize].alive {
            return self.now + Duration::from_millis(250);
        }
        let seq = self.workers[worker as usize].core.seq();
        let cadence = &self.pairs[worker as usize][balancer].cadence;
        cadence.due(seq).max(self.now)
    }

    pub(super) fn remind(&mut self, worker: u32, balancer: usize, at: Now) {
        let pair = &mut self.pairs[worker as usize][balancer];
        if pair.due.is_none_or(|due| at < due) {
            pair.due = Some(at);
            let balancer = u16::try_from(balancer).unwrap_or(u16::MAX);
            self.push(at, Event::ReportDue(balancer, worker));
        }
    }

    /// A worker's state changed: reports follow, where they do.
    pub(super) fn follow(&mut self, worker: u32) {
        if self.setup.reports == Reports::Deployed {
            for balancer in 0..self.balancers.len() {
                let due = self.due(worker, balancer);
                self.remind(worker, balancer, due);
            }
        }
    }
}
