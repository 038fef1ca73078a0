//! What is agreed on and what is kept: entries, hard state, members and snapshots.

use bytes::Bytes;
use forebay_proto::NodeId;
use raft::eraftpb;
use serde::{Deserialize, Serialize};

/// One entry of the log. An empty one is a new leader's no-op and carries no command.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// Position in the log, from 1.
    pub index: u64,
    /// Term of the leader that appended it.
    pub term: u64,
    /// The command, opaque here.
    pub data: Bytes,
}

impl Entry {
    /// Whether a new leader appended this to commit what it found; there is nothing to apply.
    #[must_use]
    pub fn is_noop(&self) -> bool {
        self.data.is_empty()
    }

    pub(crate) fn from_raft(entry: &eraftpb::Entry) -> Self {
        Self {
            index: entry.index,
            term: entry.term,
            data: entry.data.clone(),
        }
    }

    pub(crate) fn to_raft(&self) -> eraftpb::Entry {
        eraftpb::Entry {
            index: self.index,
            term: self.term,
            data: self.data.clone(),
            ..eraftpb::Entry::default()
        }
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

/// Who belongs to the group. Sorted, without duplicates; no id is zero; a learner does not vote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawMembers")]
pub struct Members {
    voters: Vec<NodeId>,
    learners: Vec<NodeId>,
}

#[derive(Deserialize)]
struct RawMembers {
    voters: Vec<NodeId>,
    learners: Vec<NodeId>,
}

impl TryFrom<RawMembers> for Members {
    type Error = MembersError;

    fn try_from(raw: RawMembers) -> Result<Self, MembersError> {
        Self::new(raw.voters, raw.learners)
    }
}

/// Why a list of members cannot be a group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MembersError {
    /// Nobody votes.
    #[error("the group has no voter")]
    NoVoter,
    /// Zero is nobody's id.
    #[error("node id 0 cannot be a member")]
    Zero,
    /// One id stands twice.
    #[error("node {0} is named twice")]
    Twice(NodeId),
    /// More members than [`Members::MAX`].
    #[error("{0} members, at most {max} are supported", max = Members::MAX)]
    TooMany(usize),
    /// A membership change is under way, which this version does not take part in.
    #[error("the group is between two memberships, which this version cannot join")]
    Joint,
}

impl Members {
    /// The most members of a group, learners included.
    pub const MAX: usize = 32;

    /// Checks and sorts.
    ///
    /// # Errors
    ///
    /// Returns [`MembersError`] when this cannot be a group.
    pub fn new(
        voters: impl IntoIterator<Item = NodeId>,
        learners: impl IntoIterator<Item = NodeId>,
    ) -> Result<Self, MembersError> {
        let mut voters: Vec<_> = voters.into_iter().take(Self::MAX + 1).collect();
        let mut learners: Vec<_> = learners.into_iter().take(Self::MAX + 1).collect();
        voters.sort_unstable();
        learners.sort_unstable();
        let mut all: Vec<_> = voters.iter().chain(&learners).copied().collect();
        all.sort_unstable();
        if voters.is_empty() {
            return Err(MembersError::NoVoter);
        }
        if all.len() > Self::MAX {
            return Err(MembersError::TooMany(all.len()));
        }
        if all.contains(&NodeId(0)) {
            return Err(MembersError::Zero);
        }
        if let Some(pair) = all.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(MembersError::Twice(pair[0]));
        }
        Ok(Self { voters, learners })
    }

    /// Those whose votes count, ascending.
    #[must_use]
    pub fn voters(&self) -> &[NodeId] {
        &self.voters
    }

    /// Those that only follow, ascending.
    #[must_use]
    pub fn learners(&self) -> &[NodeId] {
        &self.learners
    }

    /// Whether this node belongs to the group.
    #[must_use]
    pub fn contains(&self, node: NodeId) -> bool {
        self.voters.contains(&node) || self.learners.contains(&node)
    }

    pub(crate) fn from_raft(state: &eraftpb::ConfState) -> Result<Self, MembersError> {
        if !state.voters_outgoing.is_empty() || !state.learners_next.is_empty() || state.auto_leave
        {
            return Err(MembersError::Joint);
        }
        let ids = |ids: &[u64]| ids.iter().copied().map(NodeId).collect::<Vec<_>>();
        Self::new(ids(&state.voters), ids(&state.learners))
    }

    pub(crate) fn to_raft(&self) -> eraftpb::ConfState {
        let ids = |ids: &[NodeId]| ids.iter().map(|id| id.0).collect::<Vec<_>>();
        eraftpb::ConfState::from((ids(&self.voters), ids(&self.learners)))
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
