//! What a peer's message must satisfy before raft-rs sees it.
//!
//! raft-rs trusts its input: a commit beyond the log, a gap between entries or a term of zero is an
//! assertion there. A member is authenticated, but may be buggy, or may have lost its disk; neither
//! may take this process down. A refused message is only lost, which Raft always survives.

use forebay_proto::NodeId;
use raft::eraftpb::{EntryType, Message, MessageType};
use raft::{ProgressState, RawNode, StateRole};

use super::core::MAX_COMMAND_BYTES;
use super::log::Log;
use super::members::{self, Members, MembersError};

/// The largest machine state that travels in a message: below the 64 MiB of a Raft frame.
pub const MAX_SNAPSHOT_BYTES: usize = 60 << 20;

/// Entries and bytes of one append: several times what [`super::Node`] sends.
const MAX_APPEND_ENTRIES: usize = 1 << 16;
const MAX_APPEND_BYTES: usize = 8 << 20;
/// What a change of as many members as there can be takes.
const MAX_CHANGE_BYTES: usize = 1 << 10;
/// Context of heartbeats, votes and reads: ours is 24 bytes.
const MAX_CONTEXT_BYTES: usize = 64;
/// Reads of one leader that wait for their round of heartbeats.
const MAX_PENDING_READS: usize = 4096;
/// Terms and indices stay below, so that adding to them never overflows.
const MAX_NUMBER: u64 = 1 << 62;
/// A group does not hold four billion elections while a member is away.
const MAX_TERM_JUMP: u64 = 1 << 32;

/// Why a message from a peer was not taken. It is dropped; Raft treats that as loss.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// `from` is not the peer that the connection belongs to.
    #[error("{peer} sent a message in the name of {claimed}")]
    ForgedSender {
        /// Who is connected.
        peer: NodeId,
        /// What the message says.
        claimed: NodeId,
    },
    /// `to` is somebody else.
    #[error("a message for {0} arrived here: check the addresses of the control nodes")]
    Misdirected(NodeId),
    /// Not a member of the group.
    #[error("{0} is not a member of this group")]
    Stranger(NodeId),
    /// A kind that members do not send each other: local signals, forwarded proposals.
    #[error("messages of kind {0:?} are not taken from peers")]
    Kind(MessageType),
    /// A term, index or count out of every range.
    #[error("{field} = {value} is out of range")]
    Range {
        /// Which field.
        field: &'static str,
        /// What it was.
        value: u64,
    },
    /// A field is set that this kind of message does not have.
    #[error("{kind:?} carries a {field}, which it never has")]
    Unexpected {
        /// The kind of the message.
        kind: MessageType,
        /// The field that must be empty.
        field: &'static str,
    },
    /// Entries that do not follow each other, or go back in term.
    #[error("the entries of an append do not follow each other at index {index}")]
    Order {
        /// Where it breaks.
        index: u64,
    },
    /// A change of the members that no node of ours writes.
    #[error("entry {index} changes the members in a way that this version does not know")]
    MembershipChange {
        /// Index of the entry.
        index: u64,
    },
    /// Larger than anything members send.
    #[error("{field} of {bytes} bytes, at most {max}")]
    TooLarge {
        /// What is too large.
        field: &'static str,
        /// Its size.
        bytes: usize,
        /// The bound.
        max: usize,
    },
    /// The leader believes that this node holds entries that it does not: its disk lost them.
    #[error(
        "the leader says that {commit} is committed here but the log ends at {last}: this node lost \
         entries it had acknowledged; remove it and let it join as a new node"
    )]
    LostEntries {
        /// What the leader knows to be here.
        commit: u64,
        /// Where the log ends.
        last: u64,
    },
    /// The leader's log contradicts what is committed here.
    #[error("an append at index {index}, term {term} contradicts the committed log")]
    ContradictsCommitted {
        /// Index the append stands on.
        index: u64,
        /// Its term as the sender has it.
        term: u64,
    },
    /// A follower reports less than it had acknowledged, or more than this leader has.
    #[error("{peer} reports index {index}, but it has acknowledged {matched} of {last}")]
    ImpossibleProgress {
        /// The follower.
        peer: NodeId,
        /// What it reports.
        index: u64,
        /// What it had acknowledged.
        matched: u64,
        /// Where this leader's log ends.
        last: u64,
    },
    /// Two nodes lead the same term.
    #[error("{sender} leads term {term}, which {leader} leads")]
    SecondLeader {
        /// Who sent the message.
        sender: NodeId,
        /// Who is known to lead.
        leader: NodeId,
        /// The term.
        term: u64,
    },
    /// Only the leader may hand over, in its own term.
    #[error("{0} does not lead this term and cannot hand it over")]
    NotYourLeadership(NodeId),
    /// A vote came while the log is not on disk: no election of this node can be open.
    #[error("a vote arrived that was not asked for")]
    UnaskedVote,
    /// A read was sent to a node that does not lead; the sender asks again.
    #[error("not the leader: ask again")]
    NotLeader,
    /// As many reads as are allowed wait already; the sender asks again.
    #[error("too many reads are waiting: ask again")]
    TooManyReads,
    /// The members in a snapshot are no group.
    #[error("a snapshot with impossible members: {0}")]
    Members(#[from] MembersError),
    /// raft-rs itself refused it.
    #[error("refused by raft: {0}")]
    Raft(String),
    /// An earlier write failed; this node takes nothing more.
    #[error("the node stopped after a failed write; restart the process")]
    Stopped,
}

/// Checks one message of `peer` against its own shape and against what this node knows.
pub(crate) fn check(raw: &RawNode<Log>, peer: NodeId, message: &Message) -> Result<(), Rejected> {
    check_address(raw, peer, message)?;
    check_shape(message)?;
    check_state(raw, message)
}

fn check_address(raw: &RawNode<Log>, peer: NodeId, message: &Message) -> Result<(), Rejected> {
    if message.from != peer.0 {
        return Err(Rejected::ForgedSender {
            peer,
            claimed: NodeId(message.from),
        });
    }
    if message.to != raw.raft.id {
        return Err(Rejected::Misdirected(NodeId(message.to)));
    }
    // Who was added, and leads already, is unknown to a follower that is behind, and to a node that
    // joins everyone is. What it sends is taken as raft takes it: by its term. Answers are of use from
    // members only.
    let unasked = matches!(
        message.get_msg_type(),
        MessageType::MsgAppend
            | MessageType::MsgHeartbeat
            | MessageType::MsgSnapshot
            | MessageType::MsgRequestVote
            | MessageType::MsgRequestPreVote
            | MessageType::MsgTimeoutNow
            | MessageType::MsgReadIndexResp
    );
    let known = raw.raft.prs().get(message.from).is_some();
    if message.from == raw.raft.id || !known && !unasked {
        return Err(Rejected::Stranger(peer));
    }
    Ok(())
}

/// What holds for a message by itself.
fn check_shape(message: &Message) -> Result<(), Rejected> {
    use MessageType as Kind;
    let kind = message.get_msg_type();
    match kind {
        Kind::MsgAppend
        | Kind::MsgAppendResponse
        | Kind::MsgRequestVote
        | Kind::MsgRequestVoteResponse
        | Kind::MsgSnapshot
        | Kind::MsgHeartbeat
        | Kind::MsgHeartbeatResponse
        | Kind::MsgTimeoutNow
        | Kind::MsgReadIndex
        | Kind::MsgReadIndexResp
        | Kind::MsgRequestPreVote
        | Kind::MsgRequestPreVoteResponse => {}
        Kind::MsgHup
        | Kind::MsgBeat
        | Kind::MsgPropose
        | Kind::MsgUnreachable
        | Kind::MsgSnapStatus
        | Kind::MsgCheckQuorum
        | Kind::MsgTransferLeader => return Err(Rejected::Kind(kind)),
    }
    for (field, value) in [
        ("term", message.term),
        ("log_term", message.log_term),
        ("index", message.index),
        ("commit", message.commit),
        ("commit_term", message.commit_term),
        ("reject_hint", message.reject_hint),
    ] {
        if value >= MAX_NUMBER {
            return Err(Rejected::Range { field, value });
        }
    }
    // Terms start at 1; a read that is passed to the leader is the one message without.
    if (message.term == 0) != (kind == Kind::MsgReadIndex) {
        return Err(Rejected::Range {
            field: "term",
            value: message.term,
        });
    }
    let vote_request = matches!(kind, Kind::MsgRequestVote | Kind::MsgRequestPreVote);
    let newest_log_term = if vote_request {
        message.term - 1
    } else {
        message.term
    };
    if message.log_term > newest_log_term {
        return Err(Rejected::Range {
            field: "log_term",
            value: message.log_term,
        });
    }
    if message.context.len() > MAX_CONTEXT_BYTES {
        let (bytes, max) = (message.context.len(), MAX_CONTEXT_BYTES);
        return Err(Rejected::TooLarge {
            field: "context",
            bytes,
            max,
        });
    }
    for (field, set) in [
        (
            "priority",
            message.priority != 0 || message.deprecated_priority != 0,
        ),
        ("snapshot request", message.request_snapshot != 0),
        (
            "snapshot",
            message.has_snapshot() && kind != Kind::MsgSnapshot,
        ),
        (
            "list of entries",
            !message.entries.is_empty()
                && !matches!(
                    kind,
                    Kind::MsgAppend | Kind::MsgReadIndex | Kind::MsgReadIndexResp
                ),
        ),
    ] {
        if set {
            return Err(Rejected::Unexpected { kind, field });
        }
    }
    match kind {
        Kind::MsgAppend => check_entries(message),
        Kind::MsgSnapshot => check_snapshot(message),
        Kind::MsgReadIndex | Kind::MsgReadIndexResp => check_read(message),
        Kind::MsgAppendResponse if message.reject && message.reject_hint > message.index => {
            Err(Rejected::Range {
                field: "reject_hint",
                value: message.reject_hint,
            })
        }
        _ => Ok(()),
    }
}

fn check_entries(message: &Message) -> Result<(), Rejected> {
    if message.entries.len() > MAX_APPEND_ENTRIES {
        return Err(Rejected::Range {
            field: "entries",
            value: message.entries.len() as u64,
        });
    }
    let (mut index, mut term, mut bytes) = (message.index, message.log_term, 0);
    for entry in &message.entries {
        index += 1;
        if entry.index != index || entry.term < term.max(1) || entry.term > message.term {
            return Err(Rejected::Order { index });
        }
        term = entry.term;
        let command = match entry.get_entry_type() {
            EntryType::EntryNormal => &entry.data,
            EntryType::EntryConfChangeV2
                if entry.data.len() <= MAX_CHANGE_BYTES
                    && members::conf_change(&entry.data).is_some() =>
            {
                &entry.context
            }
            EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => {
                return Err(Rejected::MembershipChange { index });
            }
        };
        let has_context =
            entry.get_entry_type() == EntryType::EntryNormal && !entry.context.is_empty();
        if has_context || entry.sync_log {
            return Err(Rejected::Unexpected {
                kind: message.get_msg_type(),
                field: "entry context",
            });
        }
        if command.len() > MAX_COMMAND_BYTES {
            let (bytes, max) = (command.len(), MAX_COMMAND_BYTES);
            return Err(Rejected::TooLarge {
                field: "command",
                bytes,
                max,
            });
        }
        bytes += command.len();
    }
    if bytes > MAX_APPEND_BYTES {
        return Err(Rejected::TooLarge {
            field: "append",
            bytes,
            max: MAX_APPEND_BYTES,
        });
    }
    Ok(())
}

fn check_snapshot(message: &Message) -> Result<(), Rejected> {
    let snapshot = message.get_snapshot();
    let meta = snapshot.get_metadata();
    if meta.index == 0 || meta.index >= MAX_NUMBER {
        return Err(Rejected::Range {
            field: "snapshot index",
            value: meta.index,
        });
    }
    if meta.term == 0 || meta.term > message.term {
        return Err(Rejected::Range {
            field: "snapshot term",
            value: meta.term,
        });
    }
    if snapshot.data.len() > MAX_SNAPSHOT_BYTES {
        let (bytes, max) = (snapshot.data.len(), MAX_SNAPSHOT_BYTES);
        return Err(Rejected::TooLarge {
            field: "snapshot",
            bytes,
            max,
        });
    }
    let members = Members::from_raft(meta.get_conf_state())?;
    if members.contains(NodeId(message.to)) {
        Ok(())
    } else {
        Err(Rejected::Stranger(NodeId(message.to)))
    }
}

fn check_read(message: &Message) -> Result<(), Rejected> {
    let [request] = &*message.entries else {
        return Err(Rejected::Range {
            field: "entries",
            value: message.entries.len() as u64,
        });
    };
    let bytes = request.data.len() + request.context.len();
    if bytes > MAX_CONTEXT_BYTES {
        return Err(Rejected::TooLarge {
            field: "read",
            bytes,
            max: MAX_CONTEXT_BYTES,
        });
    }
    if request.index != 0 || request.term != 0 || request.get_entry_type() != EntryType::EntryNormal
    {
        return Err(Rejected::Unexpected {
            kind: message.get_msg_type(),
            field: "log entry",
        });
    }
    Ok(())
}

/// What holds between a message and this node's log, term and followers.
fn check_state(raw: &RawNode<Log>, message: &Message) -> Result<(), Rejected> {
    use MessageType as Kind;
    let raft = &raw.raft;
    let log = &raft.raft_log;
    let sender = NodeId(message.from);
    let last = log.last_index();
    if message.term > raft.term.saturating_add(MAX_TERM_JUMP) {
        return Err(Rejected::Range {
            field: "term",
            value: message.term,
        });
    }
    let same_term = message.term == raft.term;
    match message.get_msg_type() {
        Kind::MsgAppend | Kind::MsgHeartbeat | Kind::MsgSnapshot => {
            if same_term && raft.leader_id != 0 && raft.leader_id != message.from {
                let leader = NodeId(raft.leader_id);
                return Err(Rejected::SecondLeader {
                    sender,
                    leader,
                    term: message.term,
                });
            }
            if message.get_msg_type() == Kind::MsgHeartbeat && message.commit > last {
                return Err(Rejected::LostEntries {
                    commit: message.commit,
                    last,
                });
            }
            let at_committed = log.term(log.committed).unwrap_or(0);
            if message.get_msg_type() == Kind::MsgAppend
                && message.term >= raft.term
                && (message.index > log.committed && message.log_term < at_committed
                    || message.index == log.committed && message.log_term != at_committed)
            {
                let (index, term) = (message.index, message.log_term);
                return Err(Rejected::ContradictsCommitted { index, term });
            }
        }
        Kind::MsgAppendResponse if same_term && raft.state == StateRole::Leader => {
            let progress = raft.prs().get(message.from);
            let matched = progress.map_or(0, |progress| progress.matched);
            let probing = progress.is_some_and(|progress| progress.state == ProgressState::Probe);
            let impossible = if message.reject {
                probing && message.reject_hint < matched
            } else {
                message.index > last
            };
            if impossible {
                let index = if message.reject {
                    message.reject_hint
                } else {
                    message.index
                };
                return Err(Rejected::ImpossibleProgress {
                    peer: sender,
                    index,
                    matched,
                    last,
                });
            }
        }
        Kind::MsgTimeoutNow if !same_term || raft.leader_id != message.from => {
            return Err(Rejected::NotYourLeadership(sender));
        }
        // A candidate has its whole log on disk before it asks anyone.
        Kind::MsgRequestVoteResponse | Kind::MsgRequestPreVoteResponse
            if !log.unstable_entries().is_empty() || log.unstable_snapshot().is_some() =>
        {
            return Err(Rejected::UnaskedVote);
        }
        Kind::MsgReadIndex if raft.state != StateRole::Leader => return Err(Rejected::NotLeader),
        Kind::MsgReadIndex if raft.pending_read_count() >= MAX_PENDING_READS => {
            return Err(Rejected::TooManyReads);
        }
        _ => {}
    }
    Ok(())
}
