//! Between raft-rs' messages and the ones that peers exchange, field by field.
//!
//! raft-rs is built on protobuf 2, whose parser can be driven into a stack overflow
//! (RUSTSEC-2024-0437); so it never parses what came from a network. This only converts: what a
//! message may contain is checked by [`Node::step`](super::Node::step).

use forebay_proto::wire::raft as wire;
use raft::eraftpb::{self, EntryType, Message, MessageType};

/// A number on the wire that stands for nothing known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("raft {what} {number} is unknown: the peer may run a newer version")]
pub struct UnknownKind {
    /// What has the kind: a message or an entry.
    pub what: &'static str,
    /// The number found.
    pub number: u32,
}

/// The message for a peer.
#[must_use]
pub fn to_wire(message: Message) -> wire::Message {
    let mut message = message;
    let snapshot = message
        .has_snapshot()
        .then(|| snapshot_to_wire(message.take_snapshot()));
    wire::Message {
        msg_type: message.get_msg_type() as u32,
        to: message.to,
        from: message.from,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        entries: message
            .take_entries()
            .into_iter()
            .map(entry_to_wire)
            .collect(),
        commit: message.commit,
        commit_term: message.commit_term,
        snapshot,
        request_snapshot: message.request_snapshot,
        reject: message.reject,
        reject_hint: message.reject_hint,
        context: message.context,
        deprecated_priority: message.deprecated_priority,
        priority: message.priority,
    }
}

/// The message of a peer.
///
/// # Errors
///
/// Returns [`UnknownKind`] for a kind of message or entry that this version does not know.
pub fn from_wire(message: wire::Message) -> Result<Message, UnknownKind> {
    let mut to = Message::default();
    to.set_msg_type(message_type(message.msg_type)?);
    to.to = message.to;
    to.from = message.from;
    to.term = message.term;
    to.log_term = message.log_term;
    to.index = message.index;
    let entries: Result<Vec<_>, _> = message.entries.into_iter().map(entry_from_wire).collect();
    to.set_entries(entries?.into());
    to.commit = message.commit;
    to.commit_term = message.commit_term;
    if let Some(snapshot) = message.snapshot {
        to.set_snapshot(snapshot_from_wire(snapshot));
    }
    to.request_snapshot = message.request_snapshot;
    to.reject = message.reject;
    to.reject_hint = message.reject_hint;
    to.context = message.context;
    to.deprecated_priority = message.deprecated_priority;
    to.priority = message.priority;
    Ok(to)
}

fn entry_to_wire(entry: eraftpb::Entry) -> wire::Entry {
    wire::Entry {
        entry_type: entry.get_entry_type() as u32,
        term: entry.term,
        index: entry.index,
        data: entry.data,
        context: entry.context,
    }
}

fn entry_from_wire(entry: wire::Entry) -> Result<eraftpb::Entry, UnknownKind> {
    let mut to = eraftpb::Entry::default();
    to.set_entry_type(entry_type(entry.entry_type)?);
    to.term = entry.term;
    to.index = entry.index;
    to.data = entry.data;
    to.context = entry.context;
    Ok(to)
}

fn snapshot_to_wire(snapshot: eraftpb::Snapshot) -> wire::Snapshot {
    let mut snapshot = snapshot;
    let mut meta = snapshot.take_metadata();
    let members = meta.take_conf_state();
    wire::Snapshot {
        conf_state: Some(wire::ConfState {
            voters: members.voters,
            learners: members.learners,
            voters_outgoing: members.voters_outgoing,
            learners_next: members.learners_next,
            auto_leave: members.auto_leave,
        }),
        index: meta.index,
        term: meta.term,
        data: snapshot.data,
    }
}

fn snapshot_from_wire(snapshot: wire::Snapshot) -> eraftpb::Snapshot {
    let mut to = eraftpb::Snapshot {
        data: snapshot.data,
        ..eraftpb::Snapshot::default()
    };
    let meta = to.mut_metadata();
    meta.index = snapshot.index;
    meta.term = snapshot.term;
    if let Some(members) = snapshot.conf_state {
        let state = meta.mut_conf_state();
        state.voters = members.voters;
        state.learners = members.learners;
        state.voters_outgoing = members.voters_outgoing;
        state.learners_next = members.learners_next;
        state.auto_leave = members.auto_leave;
    }
    to
}

fn entry_type(number: u32) -> Result<EntryType, UnknownKind> {
    match number {
        0 => Ok(EntryType::EntryNormal),
        1 => Ok(EntryType::EntryConfChange),
        2 => Ok(EntryType::EntryConfChangeV2),
        _ => Err(UnknownKind {
            what: "entry kind",
            number,
        }),
    }
}

fn message_type(number: u32) -> Result<MessageType, UnknownKind> {
    use MessageType as Kind;
    const KINDS: [MessageType; 19] = [
        Kind::MsgHup,
        Kind::MsgBeat,
        Kind::MsgPropose,
        Kind::MsgAppend,
        Kind::MsgAppendResponse,
        Kind::MsgRequestVote,
        Kind::MsgRequestVoteResponse,
        Kind::MsgSnapshot,
        Kind::MsgHeartbeat,
        Kind::MsgHeartbeatResponse,
        Kind::MsgUnreachable,
        Kind::MsgSnapStatus,
        Kind::MsgCheckQuorum,
        Kind::MsgTransferLeader,
        Kind::MsgTimeoutNow,
        Kind::MsgReadIndex,
        Kind::MsgReadIndexResp,
        Kind::MsgRequestPreVote,
        Kind::MsgRequestPreVoteResponse,
    ];
    let kind = usize::try_from(number)
        .ok()
        .and_then(|at| KINDS.get(at))
        .copied();
    kind.ok_or(UnknownKind {
        what: "message kind",
        number,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_survives_the_way_there_and_back() {
        for number in 0..19 {
            let message = wire::Message {
                msg_type: number,
                to: 1,
                from: 2,
                term: 3,
                log_term: 4,
                index: 5,
                entries: vec![wire::Entry {
                    entry_type: 2,
                    term: 6,
                    index: 7,
                    data: "d".into(),
                    context: "c".into(),
                }],
                commit: 8,
                commit_term: 9,
                snapshot: Some(wire::Snapshot {
                    conf_state: Some(wire::ConfState {
                        voters: vec![1, 2],
                        learners: vec![3],
                        voters_outgoing: vec![4],
                        learners_next: vec![5],
                        auto_leave: true,
                    }),
                    index: 10,
                    term: 11,
                    data: "s".into(),
                }),
                request_snapshot: 12,
                reject: true,
                reject_hint: 13,
                context: "x".into(),
                deprecated_priority: 14,
                priority: -15,
            };
            let through = from_wire(message.clone()).map(to_wire);
            assert_eq!(through, Ok(message));
        }
    }

    #[test]
    fn an_unknown_kind_is_named() {
        let message = wire::Message {
            msg_type: 19,
            ..wire::Message::default()
        };
        let refused = from_wire(message).map(|_| ()).unwrap_err();
        assert_eq!(
            refused,
            UnknownKind {
                what: "message kind",
                number: 19
            }
        );
        let entry = wire::Entry {
            entry_type: 3,
            ..wire::Entry::default()
        };
        let message = wire::Message {
            msg_type: 3,
            entries: vec![entry],
            ..wire::Message::default()
        };
        assert!(from_wire(message).is_err());
    }
}
