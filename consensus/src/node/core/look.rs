//! What a node says of itself.

use forebay_proto::NodeId;
use raft::StateRole;

use super::Node;
use crate::node::members::Members;
use crate::node::status::{Role, Status};
use crate::node::types::HardState;

impl Node {
    /// Entries after the last snapshot, and their bytes: when to make a new one.
    #[must_use]
    pub fn log_size(&self) -> (u64, u64) {
        self.raw.store().since_snapshot()
    }

    /// Whether the last snapshot has other members than the group now.
    #[must_use]
    pub fn members_changed(&self) -> bool {
        self.raw.store().snapshot().members != self.members
    }

    /// The members of the last snapshot.
    pub(crate) fn snapshot_members(&self) -> &Members {
        &self.raw.store().snapshot().members
    }

    /// The index of the last snapshot.
    #[must_use]
    pub fn snapshot_index(&self) -> u64 {
        self.raw.store().snapshot().index
    }

    /// This member.
    #[must_use]
    pub fn id(&self) -> NodeId {
        NodeId(self.raw.raft.id)
    }

    /// The group.
    #[must_use]
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Who leads, itself included, as far as known.
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        Some(NodeId(self.raw.raft.leader_id)).filter(|leader| leader.0 != 0)
    }

    /// What this node is.
    #[must_use]
    pub fn role(&self) -> Role {
        match self.raw.raft.state {
            StateRole::Follower => Role::Follower,
            StateRole::PreCandidate => Role::PreCandidate,
            StateRole::Candidate => Role::Candidate,
            StateRole::Leader => Role::Leader,
        }
    }

    /// The newest term seen.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.raw.raft.term
    }

    /// The hard state at this moment, written or not.
    #[must_use]
    pub fn hard_state(&self) -> HardState {
        HardState::from_raft(&self.raw.raft.hard_state())
    }

    /// The term of an entry that is held, for snapshots of it.
    #[must_use]
    pub fn term_at(&self, index: u64) -> Option<u64> {
        self.raw.store().term_at(index)
    }

    /// What this node knows of itself and its group.
    #[must_use]
    pub fn status(&self) -> Status {
        let raft = &self.raw.raft;
        let role = self.role();
        let mut peers = Vec::new();
        if role == Role::Leader {
            let others = raft.prs().iter().filter(|(id, _)| **id != raft.id);
            peers.extend(others.map(|(id, progress)| (NodeId(*id), progress.matched)));
            peers.sort_unstable();
        }
        Status {
            role,
            term: raft.term,
            leader: self.leader(),
            commit: raft.raft_log.committed,
            applied: raft.raft_log.applied(),
            last_index: raft.raft_log.last_index(),
            leader_heard_ticks: if role == Role::Leader {
                0
            } else {
                self.leader_heard_ticks
            },
            peers,
        }
    }
}
