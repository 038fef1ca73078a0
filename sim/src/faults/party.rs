//! What parties outside ask of a control node, and what they get.

use std::sync::Arc;

use forebay_consensus::fleet::reign::Asked;
use forebay_consensus::node::MembersChange;
use forebay_proto::wire::control;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Identity, NodeId};

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Party {
    Client(u32),
    Agent(u32),
    /// An older start of an agent, back from a copy of its disk.
    Zombie(u32),
    Balancer(u32),
    Admin,
}

/// A request to one node.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    Propose {
        asked: Asked,
        change: Option<MembersChange>,
    },
    Read,
    Transfer {
        to: NodeId,
    },
    Renew {
        who: Identity,
        renew: control::Renew,
    },
}

/// What a node answers.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    /// A command was applied, or refused by the machine.
    Outcome {
        index: u64,
        term: u64,
        outcome: wire::Outcome,
    },
    /// A linearizable read.
    Facts(Arc<wire::Facts>),
    /// Nothing was proposed.
    NotLeader(Option<NodeId>),
    /// Nothing was proposed: the members cannot be changed so.
    Refused,
    /// It may still take effect.
    Unknown,
    Renewed,
    Superseded,
    NotRegistered,
    /// A hand-over was begun.
    Begun,
}
