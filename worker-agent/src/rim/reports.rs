//! Reports to every balancer that is connected: to each when it is due one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forebay_link::{Code, Link};
use forebay_proto::Now;
use parking_lot::Mutex;

use super::work::Shared;
use crate::core::{Cadence, Core};
use crate::wire;

/// Balancers that may be connected at once; four times what a cell has.
pub(super) const MAX_LINKS: usize = 256;

/// Of them, links of one balancer: of more its oldest is closed. One that was killed and started again leaves a
/// link behind until that is silent for long enough, and one that does so over and over takes no other's place.
pub(super) const MAX_LINKS_OF_ONE: usize = 16;

/// Without anybody to report to, time passes in the core this often.
const LOOK: Duration = Duration::from_millis(250);

/// Who is reported to. At most [`MAX_LINKS`], by whoever accepts them.
#[derive(Clone, Default)]
pub(super) struct Links(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    newest: u64,
    links: BTreeMap<u64, To>,
}

/// One balancer.
struct To {
    link: Link,
    cadence: Cadence,
    /// Others' placements that were taken since it was told anything.
    unseen: u64,
}

/// Takes its link off the list when dropped.
pub(super) struct Listed {
    links: Links,
    key: u64,
}

impl Links {
    pub(super) fn list(&self, link: Link) -> Listed {
        let mut table = self.0.lock();
        let of_this = |(_, to): &(&u64, &To)| to.link.peer() == link.peer();
        if table.links.iter().filter(of_this).count() >= MAX_LINKS_OF_ONE
            && let Some((_, oldest)) = table.links.iter().find(of_this)
        {
            tracing::warn!(
                ?link,
                "too many links of one balancer: its oldest is closed"
            );
            let reason = "too many links of this identity: the oldest";
            oldest.link.close(Code::Normal, reason);
        }
        table.newest += 1;
        let key = table.newest;
        let to = To {
            link,
            cadence: Cadence::default(),
            unseen: 0,
        };
        table.links.insert(key, to);
        Listed {
            links: self.clone(),
            key,
        }
    }

    /// A placement of this balancer was taken; returns how many of others it had not heard of. Now it has,
    /// and the others have not heard of this one.
    pub(super) fn taken(&self, key: u64) -> u64 {
        let mut table = self.0.lock();
        for to in table.links.values_mut() {
            to.unseen += 1;
        }
        let own = table.links.get_mut(&key);
        own.map_or(0, |to| std::mem::take(&mut to.unseen) - 1)
    }

    /// Sends what is due; returns when the next is, with the state as it is.
    fn send(&self, core: &mut Core, now: Now) -> Option<Now> {
        let mut table = self.0.lock();
        for to in table.links.values_mut() {
            if let Some(load) = core.report(now, &mut to.cadence) {
                to.unseen = 0;
                // One that is lost is made good by the next.
                let _ = to.link.send_datagram(&wire::load(&load));
            }
        }
        let seq = core.seq();
        let dues = table.links.values().map(|to| to.cadence.due(seq));
        dues.min()
    }
}

impl Listed {
    /// The balancer uses this worker.
    pub(super) fn used(&self, now: Now) {
        if let Some(to) = self.links.0.lock().links.get_mut(&self.key) {
            to.cadence.used(now);
        }
    }

    /// The balancer used this worker and was told its state with the answer: a quote, a refusal, the end of
    /// a placement.
    pub(super) fn answered(&self, now: Now) {
        if let Some(to) = self.links.0.lock().links.get_mut(&self.key) {
            to.cadence.used(now);
            to.unseen = 0;
        }
    }

    pub(super) const fn key(&self) -> u64 {
        self.key
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.links.0.lock().links.remove(&self.key);
    }
}

/// Sends reports when they are due and lets the core's deadlines pass.
pub(super) async fn report(shared: Arc<Shared>) {
    loop {
        let next = shared.with(|core, now| {
            core.expire(now);
            let report = shared.links.send(core, now);
            let dues = report.into_iter().chain(core.next_deadline());
            dues.fold(now + LOOK, Now::min)
        });
        tokio::select! {
            () = tokio::time::sleep_until(shared.instant(next)) => {}
            () = shared.changed.notified() => {}
        }
    }
}
