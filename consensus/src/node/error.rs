//! Why a node does not start, or does not take a proposal.

use forebay_proto::NodeId;

use super::core::MAX_COMMAND_BYTES;
use super::members::{ChangeRefused, Members};
use super::types::RestoredError;

/// Why a node cannot start from what its disk remembered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// The log and the snapshot do not fit each other.
    #[error("{0}; do not start this node again with this disk: remove it and join a new one")]
    Restored(#[from] RestoredError),
    /// The group of the snapshot does not have this node.
    #[error("{id} is not among the members {members:?} of its own snapshot")]
    NotAMember {
        /// This node.
        id: NodeId,
        /// The members.
        members: Members,
    },
    /// raft-rs refused the configuration.
    #[error("raft refused to start: {0}")]
    Raft(String),
}

/// Why a proposal was not taken. Nothing of it is in the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeRefused {
    /// Another node leads, or nobody is known to.
    #[error("not the leader")]
    NotLeader {
        /// Who leads, as far as known.
        leader: Option<NodeId>,
    },
    /// Too much is uncommitted, or the leadership is being handed over: try again shortly.
    #[error("too much is waiting to be committed: try again")]
    Overloaded,
    /// An empty command cannot be told from a leader's no-op.
    #[error("the command is empty")]
    Empty,
    /// Larger than [`MAX_COMMAND_BYTES`].
    #[error("the command has {0} bytes, at most {max}", max = MAX_COMMAND_BYTES)]
    TooLarge(usize),
    /// The members cannot be changed so.
    #[error(transparent)]
    Change(#[from] ChangeRefused),
    /// An earlier write failed.
    #[error("the node stopped after a failed write; restart the process")]
    Stopped,
}
