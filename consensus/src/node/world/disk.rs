//! A disk in memory, with what a crash takes from it.

use bytes::Bytes;

use super::super::{HardState, Members, Restored, Snapshot, Write};

/// How a disk betrays the node; the checks must notice.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum DiskFault {
    Honest,
    /// Votes are never written.
    ForgetsVotes,
    /// The last write of entries is gone after a crash, though it was synced.
    LosesTheLastWrite,
}

/// What a disk holds for certain, and what it may forget at a crash.
#[derive(Clone)]
pub(super) struct Disk {
    pub(super) durable: Restored,
    lazy: Option<HardState>,
    /// First index of the last entries written.
    last_write: Option<u64>,
}

impl Disk {
    pub(super) fn new(members: &Members) -> Self {
        let snapshot = Snapshot::bootstrap(members.clone(), Bytes::from_static(b"1"));
        let hard_state = HardState {
            term: 1,
            vote: 0,
            commit: 1,
        };
        Self {
            durable: Restored {
                hard_state,
                snapshot,
                entries: Vec::new(),
            },
            lazy: None,
            last_write: None,
        }
    }

    /// Writes the first `parts` of what is to be written: snapshot, each entry, hard state.
    pub(super) fn write(&mut self, write: &Write, parts: usize, fault: DiskFault) {
        self.last_write = write
            .entries
            .first()
            .map(|first| first.index)
            .or(self.last_write);
        let mut left = parts;
        let mut take = || {
            let some = left > 0;
            left = left.saturating_sub(1);
            some
        };
        if let Some(state) = self.lazy.take() {
            self.durable.hard_state = state;
        }
        if let Some(snapshot) = &write.snapshot
            && take()
        {
            self.durable.snapshot = snapshot.clone();
            self.durable.entries.clear();
        }
        for entry in &write.entries {
            if take() {
                self.durable.entries.retain(|held| held.index < entry.index);
                self.durable.entries.push(entry.clone());
            }
        }
        if let Some(mut state) = write.hard_state
            && take()
        {
            if fault == DiskFault::ForgetsVotes {
                state.vote = 0;
            }
            if write.must_sync {
                self.durable.hard_state = state;
            } else {
                self.lazy = Some(state);
            }
        }
    }

    /// Forgets what was not synced, and what the fault takes besides.
    pub(super) fn crash(&mut self, fault: DiskFault) {
        self.lazy = None;
        let Some(first) = self
            .last_write
            .filter(|_| fault == DiskFault::LosesTheLastWrite)
        else {
            return;
        };
        let Restored {
            hard_state,
            snapshot,
            entries,
        } = &mut self.durable;
        entries.retain(|entry| entry.index < first.max(snapshot.index + 1));
        let last = entries.last().map_or(snapshot.index, |entry| entry.index);
        hard_state.commit = hard_state.commit.min(last);
    }
}
