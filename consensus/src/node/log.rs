//! The log in memory, as raft-rs reads it: what is on disk since the last snapshot, and that snapshot.
//!
//! Bounded by compaction: the replica takes a snapshot when the log since the last one is long, and
//! keeps a tail of entries for followers that are a little behind.

use raft::eraftpb;
use raft::{Error, GetEntriesContext, RaftState, Storage, StorageError};
use std::collections::VecDeque;

use super::types::{Entry, HardState, Restored, RestoredError, Snapshot};
use crate::bug::{Bug, on};
use crate::probe::{Probe, hit};

pub(crate) struct Log {
    hard_state: HardState,
    snapshot: Snapshot,
    /// Index and term of the entry before the first one kept.
    before: (u64, u64),
    entries: VecDeque<Entry>,
    /// Of the entries after the snapshot.
    bytes: u64,
}

/// The tail before the snapshot that is kept for slow followers is cut to this.
const MAX_TAIL_BYTES: u64 = 16 << 20;

impl Log {
    pub(crate) fn new(restored: Restored) -> Result<Self, RestoredError> {
        let Restored {
            mut hard_state,
            snapshot,
            entries,
        } = restored;
        let at = (snapshot.index, snapshot.term);
        if let Some(pair) = entries
            .windows(2)
            .find(|pair| pair[0].index.checked_add(1) != Some(pair[1].index))
        {
            return Err(RestoredError::Gap {
                before: pair[0].index,
                after: pair[1].index,
            });
        }
        let mut entries = VecDeque::from(entries);
        let mut before = at;
        if let (Some(first), Some(last)) = (entries.front(), entries.back()) {
            let (first, last) = (first.index, last.index);
            if first > at.0 + 1 || last < at.0 {
                return Err(RestoredError::Apart {
                    first,
                    last,
                    snapshot: at.0,
                });
            }
            if first <= at.0 {
                let same = &entries[(at.0 - first) as usize];
                if same.term != at.1 {
                    return Err(RestoredError::Term {
                        index: at.0,
                        log: same.term,
                        snapshot: at.1,
                    });
                }
                // The oldest entry gives its place to the term that must be known before the first.
                before = entries
                    .pop_front()
                    .map_or(at, |entry| (entry.index, entry.term));
            }
        }
        let last = entries.back().map_or(before.0, |entry| entry.index);
        if hard_state.commit > last {
            return Err(RestoredError::CommitBeyondLog {
                commit: hard_state.commit,
                last,
            });
        }
        hard_state.commit = hard_state.commit.max(at.0);
        if on(Bug::WholeLogTakenForCommitted) {
            hard_state.commit = last;
        }
        if hard_state.term < at.1 {
            hard_state = HardState {
                term: at.1,
                vote: 0,
                ..hard_state
            };
        }
        let bytes = entries
            .iter()
            .filter(|entry| entry.index > at.0)
            .map(cost)
            .sum();
        Ok(Self {
            hard_state,
            snapshot,
            before,
            entries,
            bytes,
        })
    }

    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Entries after the snapshot's index, and their bytes.
    pub(crate) fn since_snapshot(&self) -> (u64, u64) {
        (self.last().saturating_sub(self.snapshot.index), self.bytes)
    }

    #[cfg(test)]
    pub(crate) fn hard_state(&self) -> HardState {
        self.hard_state
    }

    pub(crate) fn set_hard_state(&mut self, state: HardState) {
        self.hard_state = state;
    }

    /// Appends what was persisted; a lower index than the end replaces what stands there.
    pub(crate) fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        debug_assert!(first.index > self.before.0 && first.index <= self.last() + 1);
        while self
            .entries
            .back()
            .is_some_and(|last| last.index >= first.index)
        {
            hit(Probe::EntriesReplaced);
            if let Some(entry) = self.entries.pop_back() {
                self.bytes -= cost(&entry);
            }
        }
        for entry in entries {
            self.bytes += cost(entry);
            self.entries.push_back(entry.clone());
        }
    }

    /// Replaces everything by a snapshot from the leader.
    pub(crate) fn install(&mut self, snapshot: Snapshot) {
        self.before = (snapshot.index, snapshot.term);
        self.entries.clear();
        self.bytes = 0;
        self.hard_state.commit = self.hard_state.commit.max(snapshot.index);
        self.snapshot = snapshot;
    }

    /// Takes our own newer snapshot, and forgets entries up to `keep` before it.
    pub(crate) fn compact(&mut self, snapshot: Snapshot, keep: u64) {
        let (at, to) = (snapshot.index, snapshot.index.saturating_sub(keep));
        self.snapshot = snapshot;
        let before = self.entries.iter().take_while(|entry| entry.index <= at);
        let mut tail: u64 = before.map(cost).sum();
        let after = self
            .entries
            .iter()
            .rev()
            .take_while(|entry| entry.index > at);
        self.bytes = after.map(cost).sum();
        while let Some(first) = self
            .entries
            .front()
            .filter(|first| first.index <= to || first.index <= at && tail > MAX_TAIL_BYTES)
        {
            tail -= cost(first);
            self.before = (first.index, first.term);
            self.entries.pop_front();
        }
    }

    pub(crate) fn last(&self) -> u64 {
        self.entries
            .back()
            .map_or(self.before.0, |entry| entry.index)
    }

    pub(crate) fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.before.0 {
            return Some(self.before.1);
        }
        let offset = index.checked_sub(self.before.0 + 1)?;
        self.entries
            .get(usize::try_from(offset).ok()?)
            .map(|entry| entry.term)
    }
}

/// What an entry costs in memory and on disk, roughly.
fn cost(entry: &Entry) -> u64 {
    let change = entry.change.as_ref().map_or(0, bytes::Bytes::len);
    (entry.data.len() + change) as u64 + 48
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(
            self.hard_state.to_raft(),
            self.snapshot.members.to_raft(),
        ))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<eraftpb::Entry>> {
        if low <= self.before.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(Error::Store(StorageError::Unavailable));
        }
        let max = max_size.into().unwrap_or(u64::MAX);
        let mut size = 0u64;
        let from = (low - self.before.0 - 1) as usize;
        let count = high.saturating_sub(low) as usize;
        Ok(self
            .entries
            .iter()
            .skip(from)
            .take(count)
            .enumerate()
            .take_while(|(position, entry)| {
                size = size.saturating_add(cost(entry));
                *position == 0 || size <= max
            })
            .map(|(_, entry)| entry.to_raft())
            .collect())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.before.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        self.term_at(index)
            .ok_or(Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.before.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<eraftpb::Snapshot> {
        // One from before `to` was added tells it that it is no member: the replica makes a new one.
        let strange = !self.snapshot.members.contains(forebay_proto::NodeId(to));
        if self.snapshot.index < request_index || strange {
            return Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        Ok(self.snapshot.to_raft())
    }
}

/// Lets tests build commands without naming `Bytes`.
#[cfg(test)]
pub(crate) fn entry(index: u64, term: u64, data: &str) -> Entry {
    Entry::command(index, term, bytes::Bytes::copy_from_slice(data.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Members;
    use forebay_proto::NodeId;

    fn log(
        entries: &[(u64, u64)],
        snapshot: (u64, u64),
        commit: u64,
    ) -> Result<Log, RestoredError> {
        Log::new(Restored {
            hard_state: HardState {
                term: 1,
                vote: 2,
                commit,
            },
            snapshot: Snapshot {
                index: snapshot.0,
                term: snapshot.1,
                members: Members::new([NodeId(1)], []).unwrap(),
                data: bytes::Bytes::new(),
            },
            entries: entries
                .iter()
                .map(|&(index, term)| entry(index, term, "x"))
                .collect(),
        })
    }

    #[test]
    fn a_memory_that_lost_entries_is_refused() {
        let gap = log(&[(2, 1), (4, 1)], (1, 1), 1).err();
        assert_eq!(
            gap,
            Some(RestoredError::Gap {
                before: 2,
                after: 4
            })
        );
        let apart = log(&[(9, 1)], (3, 1), 3).err();
        assert_eq!(
            apart,
            Some(RestoredError::Apart {
                first: 9,
                last: 9,
                snapshot: 3
            })
        );
        let term = log(&[(2, 1), (3, 1)], (3, 2), 3).err();
        assert_eq!(
            term,
            Some(RestoredError::Term {
                index: 3,
                log: 1,
                snapshot: 2
            })
        );
        let lost = log(&[(2, 1)], (1, 1), 5).err();
        assert_eq!(
            lost,
            Some(RestoredError::CommitBeyondLog { commit: 5, last: 2 })
        );
    }

    #[test]
    fn commit_covers_the_snapshot_and_a_newer_snapshot_term_forgets_an_older_vote() {
        let log = log(&[], (7, 3), 2).unwrap();
        assert_eq!(
            log.hard_state(),
            HardState {
                term: 3,
                vote: 0,
                commit: 7
            }
        );
        assert_eq!(
            (log.first_index().unwrap(), log.last(), log.term_at(7)),
            (8, 7, Some(3))
        );
    }

    #[test]
    fn a_tail_before_the_snapshot_is_kept_and_its_edge_still_answers_its_term() {
        let mut log = log(&[(2, 1), (3, 1), (4, 2), (5, 2)], (4, 2), 4).unwrap();
        assert_eq!((log.first_index().unwrap(), log.last()), (3, 5));
        assert_eq!(log.term(2).unwrap(), 1);
        let newer = Snapshot {
            index: 5,
            ..log.snapshot().clone()
        };
        log.compact(newer, 1);
        assert_eq!((log.first_index().unwrap(), log.term(4).unwrap()), (5, 2));
        assert!(log.term(3).is_err());
    }

    #[test]
    fn entries_honour_the_size_but_give_at_least_one() {
        let log = log(&[(2, 1), (3, 1), (4, 1)], (1, 1), 1).unwrap();
        let read = |max| {
            log.entries(2, 5, max, GetEntriesContext::empty(false))
                .unwrap()
                .len()
        };
        assert_eq!((read(Some(0)), read(Some(98)), read(None)), (1, 2, 3));
    }
}
