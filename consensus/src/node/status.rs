//! What a node tells about itself.

use forebay_proto::NodeId;

/// How a snapshot that was sent to a peer fared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotReport {
    /// The peer has it all.
    Delivered,
    /// It did not arrive whole.
    Failed,
}

/// What a member is at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Follows a leader, or waits for one.
    #[default]
    Follower,
    /// Asks whether an election could be won.
    PreCandidate,
    /// Stands for election.
    Candidate,
    /// Leads its term.
    Leader,
}

/// What a node knows of itself and its group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// What this node is.
    pub role: Role,
    /// The newest term it has seen.
    pub term: u64,
    /// Who leads, itself included, as far as known.
    pub leader: Option<NodeId>,
    /// The newest index known to be committed.
    pub commit: u64,
    /// The newest index given out for applying.
    pub applied: u64,
    /// Where the log ends.
    pub last_index: u64,
    /// Ticks since the leader was heard; zero on the leader itself.
    pub leader_heard_ticks: u32,
    /// On the leader: what each other member has acknowledged, ascending by id.
    pub peers: Vec<(NodeId, u64)>,
}
