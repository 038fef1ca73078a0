//! What the machine looked like after the newest batch, for everyone who is not the replica.

use std::collections::VecDeque;
use std::sync::Arc;

use forebay_proto::ClusterId;
use forebay_proto::wire::fleet as wire;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::watch;

use super::watchers::Frames;
use crate::bug::{Bug, on};
use crate::fleet::{Applied, Fleet};
use crate::probe::{Probe, hit};
use crate::replica;

/// Deltas kept for watchers that resume, unless told otherwise; who is further behind gets a snapshot.
pub const MAX_DELTAS: usize = 4_096;
/// And their bytes: a configuration is much larger than a worker. Frames of them come on top, one for
/// each of three audiences.
const MAX_DELTA_BYTES: usize = 16 << 20;
/// Audit entries kept in memory, the newest.
const MAX_AUDIT: usize = 1_000;

/// The newest facts, the deltas that led there, and the audit's tail.
pub struct Publisher {
    state: Mutex<State>,
    max_deltas: usize,
    /// Counts publications, to wake watchers.
    changed: watch::Sender<u64>,
    /// Entries that the audit ever had.
    audited: watch::Sender<u64>,
}

struct State {
    facts: Arc<wire::Facts>,
    deltas: VecDeque<Arc<Told>>,
    /// Their encoded size.
    delta_bytes: usize,
    /// Revision of the state before the oldest delta.
    floor: u64,
    audit: VecDeque<wire::AuditEntry>,
    audit_head: [u8; 32],
    audit_count: u64,
}

/// What a watcher gets next.
pub enum Next {
    /// It is too far behind, or new: everything.
    Snapshot(Arc<wire::Facts>),
    /// What happened since.
    Deltas(Vec<Arc<wire::Delta>>),
}

/// As [`Next`], with what was encoded before.
pub(crate) enum NextTold {
    Snapshot(Arc<wire::Facts>),
    Deltas(Vec<Arc<Told>>),
}

/// One delta, and the frames of it that were sent: a thousand watchers share one encoding.
pub(crate) struct Told {
    pub(crate) delta: Arc<wire::Delta>,
    pub(crate) frames: Frames,
}

impl Publisher {
    /// Nothing yet: what a node shows before its replica has started.
    #[must_use]
    pub fn new(cluster: ClusterId, max_deltas: usize) -> Self {
        let facts = wire::Facts {
            cluster_id: cluster.to_wire(),
            ..wire::Facts::default()
        };
        Self {
            state: Mutex::new(State {
                facts: Arc::new(facts),
                deltas: VecDeque::new(),
                delta_bytes: 0,
                floor: 0,
                audit: VecDeque::new(),
                audit_head: [0; 32],
                audit_count: 0,
            }),
            max_deltas,
            changed: watch::Sender::new(0),
            audited: watch::Sender::new(0),
        }
    }

    /// Called on the replica's thread after each batch.
    pub fn publish(&self, fleet: &Fleet, _applied: u64, outputs: &[replica::Applied<Applied>]) {
        let deltas: Vec<_> = outputs
            .iter()
            .filter_map(|applied| applied.output.delta.clone())
            .collect();
        if deltas.is_empty() && !outputs.is_empty() {
            // No fact changed, but time went on, and a refusal is an entry of the audit, too.
            let mut state = self.state.lock();
            Arc::make_mut(&mut state.facts).cell_time_ms = fleet.cell_time().0;
            self.audited.send_replace(state.take_audit(fleet));
            return;
        }
        let facts = Arc::new(fleet.facts());
        let mut state = self.state.lock();
        if deltas.is_empty() && facts.revision != state.facts.revision {
            // The start, or a snapshot from the leader: what lies between is not known.
            state.deltas.clear();
            state.delta_bytes = 0;
            state.floor = facts.revision;
        }
        state.facts = facts;
        for delta in deltas {
            state.keep(delta, self.max_deltas);
        }
        self.audited.send_replace(state.take_audit(fleet));
        drop(state);
        self.changed.send_modify(|count| *count += 1);
    }

    /// The newest facts.
    #[must_use]
    pub fn facts(&self) -> Arc<wire::Facts> {
        self.state.lock().facts.clone()
    }

    /// Wakes after each publication.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The audit's entries that are newer than number `last`, as far as they are kept, and the first one's number.
    pub(crate) fn audit_after(&self, last: u64) -> (u64, Vec<wire::AuditEntry>) {
        let state = self.state.lock();
        let oldest = state.audit_count + 1 - state.audit.len() as u64;
        let first = oldest.max(last + 1);
        let skip = usize::try_from(first - oldest).unwrap_or(usize::MAX);
        (first, state.audit.iter().skip(skip).cloned().collect())
    }

    /// Wakes when the audit has more entries, and tells how many it ever had.
    pub(crate) fn audited(&self) -> watch::Receiver<u64> {
        self.audited.subscribe()
    }

    /// What somebody who holds `revision` needs to be up to date.
    #[must_use]
    pub fn since(&self, revision: u64) -> Next {
        match self.told_since(revision) {
            NextTold::Snapshot(facts) => Next::Snapshot(facts),
            NextTold::Deltas(told) => {
                Next::Deltas(told.iter().map(|told| told.delta.clone()).collect())
            }
        }
    }

    pub(crate) fn told_since(&self, revision: u64) -> NextTold {
        let state = self.state.lock();
        let cut = revision < state.floor && !on(Bug::DeltasSkipped);
        if cut || (revision == 0 && state.facts.revision == 0) {
            if revision > 0 {
                hit(Probe::WatcherCut);
            }
            return NextTold::Snapshot(state.facts.clone());
        }
        let first = state
            .deltas
            .partition_point(|told| told.delta.revision <= revision);
        NextTold::Deltas(state.deltas.range(first..).cloned().collect())
    }

    /// The newest audit entries, oldest first, the head of the chain, and how many it ever had.
    #[must_use]
    pub fn audit(&self, limit: usize) -> (Vec<wire::AuditEntry>, [u8; 32], u64) {
        let state = self.state.lock();
        let skip = state.audit.len().saturating_sub(limit);
        (
            state.audit.iter().skip(skip).cloned().collect(),
            state.audit_head,
            state.audit_count,
        )
    }
}

impl State {
    /// Adds a delta; the oldest ones give way. One is always kept, however large it is.
    fn keep(&mut self, delta: wire::Delta, max_deltas: usize) {
        self.delta_bytes += delta.encoded_len();
        self.deltas.push_back(Arc::new(Told {
            delta: Arc::new(delta),
            frames: Frames::default(),
        }));
        while self.deltas.len() > 1
            && (self.deltas.len() > max_deltas || self.delta_bytes > MAX_DELTA_BYTES)
            && let Some(oldest) = self.deltas.pop_front()
        {
            self.delta_bytes -= oldest.delta.encoded_len();
            self.floor = oldest.delta.revision;
        }
    }

    /// Returns how many entries there ever were.
    fn take_audit(&mut self, fleet: &Fleet) -> u64 {
        let count = fleet.audit_count();
        if count == self.audit_count {
            return count;
        }
        let new = usize::try_from(count.saturating_sub(self.audit_count)).unwrap_or(MAX_AUDIT);
        let (entries, head) = fleet.audit_tail(new.min(MAX_AUDIT));
        self.audit.extend(entries);
        let excess = self.audit.len().saturating_sub(MAX_AUDIT);
        self.audit.drain(..excess);
        self.audit_head = head;
        self.audit_count = count;
        count
    }
}

#[cfg(test)]
mod tests;
