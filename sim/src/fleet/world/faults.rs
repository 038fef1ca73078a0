//! What goes wrong, and its end.

use forebay_proto::Revision;
use forebay_proto::wire::fleet::Desired;

use super::super::fault::{Fault, What};
use super::agenda::Event;
use super::{NOTICED, World};

impl World<'_> {
    pub(super) fn fault(&mut self, number: usize) {
        let Fault { worker, what, .. } = self.setup.faults[number];
        let now = self.now;
        match what {
            What::Crash => {
                for job in self.workers[worker as usize].crash() {
                    if let Some(booking) = self.places[job as usize].booking {
                        self.push(now + NOTICED, Event::Lost(job, booking));
                    }
                }
                let incarnation = self.workers[worker as usize].incarnation();
                for balancer in &mut self.balancers {
                    balancer.disconnected(incarnation);
                }
            }
            What::Drain => {
                let core = &mut self.workers[worker as usize].core;
                core.facts(now, Desired::Draining, Revision(2 * number as u64 + 2));
                self.advance(worker);
            }
            What::Slow(speed) => self.workers[worker as usize].set_speed(speed),
        }
        if let Some(lasts) = self.setup.faults[number].lasts {
            self.push(now + lasts, Event::Mended(number));
        }
    }

    pub(super) fn mend(&mut self, number: usize) {
        let Fault { worker, what, .. } = self.setup.faults[number];
        let now = self.now;
        match what {
            What::Crash => {
                self.workers[worker as usize].restart(now);
                for balancer in 0..self.balancers.len() {
                    self.balancers[balancer].connected(now, &self.workers[worker as usize]);
                    self.let_in(balancer);
                }
            }
            What::Drain => {
                let core = &mut self.workers[worker as usize].core;
                core.facts(now, Desired::Ready, Revision(2 * number as u64 + 3));
                self.advance(worker);
            }
            What::Slow(_) => self.workers[worker as usize].set_speed(1.0),
        }
    }
}
