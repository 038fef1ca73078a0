//! What is agreed on and what is kept: entries, hard state and snapshots.

use bytes::Bytes;
use raft::eraftpb;

use super::members::{Members, MembersError};

/// One entry of the log. An empty command is a new leader's no-op.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// Position in the log, from 1.
    pub index: u64,
    /// Term of the leader that appended it.
    pub term: u64,
    /// The command, opaque here.
    pub data: Bytes,
    /// Present in an entry that changes the members: the change as raft-rs writes it, empty where
    /// the group leaves a joint membership.
    pub change: Option<Bytes>,
}

impl Entry {
    /// An entry with a command.
    #[must_use]
    pub const fn command(index: u64, term: u64, data: Bytes) -> Self {
        Self {
            index,
            term,
            data,
            change: None,
        }
    }

    /// Whether a new leader appended this to commit what it found; there is nothing to apply.
    #[must_use]
    pub fn is_noop(&self) -> bool {
        self.data.is_empty() && self.change.is_none()
    }

    pub(crate) fn from_raft(entry: &eraftpb::Entry) -> Self {
        let (data, change) = match entry.get_entry_type() {
            eraftpb::EntryType::EntryNormal => (entry.data.clone(), None),
            eraftpb::EntryType::EntryConfChange | eraftpb::EntryType::EntryConfChangeV2 => {
                (entry.context.clone(), Some(entry.data.clone()))
            }
        };
        Self {
            index: entry.index,
            term: entry.term,
            data,
            change,
        }
    }

    pub(crate) fn to_raft(&self) -> eraftpb::Entry {
        let mut entry = eraftpb::Entry {
            index: self.index,
            term: self.term,
            ..eraftpb::Entry::default()
        };
        match &self.change {
            None => entry.data = self.data.clone(),
            Some(change) => {
                entry.set_entry_type(eraftpb::EntryType::EntryConfChangeV2);
                entry.data = change.clone();
                entry.context = self.data.clone();
            }
        }
        entry
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Entry({}@{}, {} bytes)",
            self.index,
            self.term,
            self.data.len()
        )
    }
}

/// What a member must never forget: its term, its vote in it, and how far it knows the log agreed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    /// The newest term seen.
    pub term: u64,
    /// Who got this member's vote in that term; zero for nobody.
    pub vote: u64,
    /// The newest index known to be committed.
    pub commit: u64,
}

impl HardState {
    pub(crate) fn from_raft(state: &eraftpb::HardState) -> Self {
        Self {
            term: state.term,
            vote: state.vote,
            commit: state.commit,
        }
    }

    pub(crate) fn to_raft(self) -> eraftpb::HardState {
        eraftpb::HardState {
            term: self.term,
            vote: self.vote,
            commit: self.commit,
            ..eraftpb::HardState::default()
        }
    }
}

/// The machine's state at one index, and the members at that point.
#[derive(Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The last index that the state includes.
    pub index: u64,
    /// The term of that index.
    pub term: u64,
    /// The members as of that index.
    pub members: Members,
    /// The machine's own bytes.
    pub data: Bytes,
}

impl Snapshot {
    /// What a node begins with that joins a cluster: nothing, until the leader sends it a snapshot.
    #[must_use]
    pub const fn of_a_joiner() -> Self {
        Self {
            index: 0,
            term: 0,
            members: Members::unknown(),
            data: Bytes::new(),
        }
    }

    /// What every node of a new cluster starts from: index 1, term 1, the same state everywhere.
    ///
    /// Index 1 rather than 0, so that a node added later, which has nothing, is told apart from one
    /// that was there, and always starts from a snapshot.
    #[must_use]
    pub fn bootstrap(members: Members, data: Bytes) -> Self {
        Self {
            index: 1,
            term: 1,
            members,
            data,
        }
    }

    pub(crate) fn to_raft(&self) -> eraftpb::Snapshot {
        let mut snapshot = eraftpb::Snapshot {
            data: self.data.clone(),
            ..eraftpb::Snapshot::default()
        };
        let meta = snapshot.mut_metadata();
        meta.index = self.index;
        meta.term = self.term;
        meta.set_conf_state(self.members.to_raft());
        snapshot
    }

    pub(crate) fn from_raft(snapshot: &eraftpb::Snapshot) -> Result<Self, MembersError> {
        let meta = snapshot.get_metadata();
        Ok(Self {
            index: meta.index,
            term: meta.term,
            members: Members::from_raft(meta.get_conf_state())?,
            data: snapshot.data.clone(),
        })
    }
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot")
            .field("index", &self.index)
            .field("term", &self.term)
            .field("members", &self.members)
            .field("bytes", &self.data.len())
            .finish()
    }
}

/// What the disk remembered. The machine is restored from the snapshot; what follows is applied
/// again as it commits, so that the applied index can never be ahead of the committed one.
#[derive(Clone, Debug)]
pub struct Restored {
    /// The last hard state written.
    pub hard_state: HardState,
    /// The newest whole snapshot.
    pub snapshot: Snapshot,
    /// The log, contiguous; it may begin before the snapshot's index and must reach it or be empty.
    pub entries: Vec<Entry>,
}

/// Why what the disk remembered cannot be a member's memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoredError {
    /// Two neighbours do not follow each other.
    #[error("the log goes from index {before} to {after}: entries are missing")]
    Gap {
        /// The last index in order.
        before: u64,
        /// What followed it.
        after: u64,
    },
    /// The log begins after the snapshot ends, or ends before it.
    #[error("the log holds {first}..={last} and does not meet the snapshot at {snapshot}")]
    Apart {
        /// First index of the log.
        first: u64,
        /// Last index of the log.
        last: u64,
        /// Index of the snapshot.
        snapshot: u64,
    },
    /// The log has another term at the snapshot's index.
    #[error("at {index} the log has term {log} and the snapshot term {snapshot}")]
    Term {
        /// The index both have.
        index: u64,
        /// Term in the log.
        log: u64,
        /// Term in the snapshot.
        snapshot: u64,
    },
    /// The hard state knows more to be committed than there is.
    #[error(
        "index {commit} is committed but the log ends at {last}: acknowledged entries are lost"
    )]
    CommitBeyondLog {
        /// What was committed.
        commit: u64,
        /// Where the log ends.
        last: u64,
    },
}
