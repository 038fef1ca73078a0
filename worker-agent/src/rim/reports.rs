//! Reports to every balancer that is connected.

use std::collections::BTreeMap;
use std::sync::Arc;

use forebay_link::Link;
use forebay_scheduler::Load;
use parking_lot::Mutex;

use super::work::Shared;
use crate::wire;

/// Balancers that may be connected at once; four times what a cell has.
pub(super) const MAX_LINKS: usize = 256;

/// Who is reported to. At most [`MAX_LINKS`], by whoever accepts them.
#[derive(Clone, Default)]
pub(super) struct Links(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    newest: u64,
    links: BTreeMap<u64, Link>,
}

/// Takes its link off the list when dropped.
pub(super) struct Listed {
    links: Links,
    key: u64,
}

impl Links {
    pub(super) fn list(&self, link: Link) -> Listed {
        let mut table = self.0.lock();
        table.newest += 1;
        let key = table.newest;
        table.links.insert(key, link);
        Listed {
            links: self.clone(),
            key,
        }
    }

    fn send(&self, load: &Load) {
        let frame = wire::load(load);
        for link in self.0.lock().links.values() {
            // One that is lost is made good by the next.
            let _ = link.send_datagram(&frame);
        }
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
        let due = shared.with(|core, now| {
            core.expire(now);
            core.take_report(now)
        });
        if let Some(load) = due {
            shared.links.send(&load);
        }
        let next = shared.instant(shared.with(|core, _| core.next_deadline()));
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            () = shared.changed.notified() => {}
        }
    }
}
