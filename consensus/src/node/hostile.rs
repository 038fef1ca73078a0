//! What peers may send: each refusal by name, and a storm of nonsense that must not panic.

use bytes::Bytes;
use forebay_proto::NodeId;
use proptest::prelude::*;
use raft::eraftpb::{self, EntryType, MessageType};

use super::log::entry;
use super::*;

/// Node 1 of 3 follows node 2 in term 3; its log ends at 5 and 4 is committed.
fn follower() -> Node {
    let members = Members::new([1, 2, 3].map(NodeId), []).unwrap();
    let restored = Restored {
        hard_state: HardState {
            term: 3,
            vote: 2,
            commit: 4,
        },
        snapshot: Snapshot::bootstrap(members, Bytes::new()),
        entries: vec![
            entry(2, 2, "b"),
            entry(3, 2, "c"),
            entry(4, 3, "d"),
            entry(5, 3, "e"),
        ],
    };
    let mut node = Node::new(
        Config {
            id: NodeId(1),
            seed: 1,
        },
        restored,
    )
    .unwrap();
    let heartbeat = message(MessageType::MsgHeartbeat, |m| m.commit = 4);
    node.step(NodeId(2), heartbeat).unwrap();
    settle(&mut node);
    node
}

fn message(kind: MessageType, change: impl FnOnce(&mut Message)) -> Message {
    let mut message = Message {
        to: 1,
        from: 2,
        term: 3,
        ..Message::default()
    };
    message.set_msg_type(kind);
    change(&mut message);
    message
}

fn append(index: u64, log_term: u64, entries: &[(u64, u64)]) -> Message {
    message(MessageType::MsgAppend, |m| {
        m.index = index;
        m.log_term = log_term;
        let entries = entries
            .iter()
            .map(|&(index, term)| entry(index, term, "x").to_raft());
        m.set_entries(entries.collect::<Vec<_>>().into());
    })
}

fn settle(node: &mut Node) -> Vec<Message> {
    let mut sent = Vec::new();
    while let Some(mut step) = node.ready() {
        sent.extend(step.take_send_now());
        let outcome = step.persist(|_| Ok::<_, ()>(())).unwrap();
        sent.extend(outcome.send);
        for entry in outcome.committed.iter().filter(|e| e.change.is_some()) {
            // What raft cannot carry out is passed over, on every node.
            let _ = node.change_members(entry);
        }
        node.applied();
    }
    sent
}

fn refusal(message: Message) -> String {
    let from = NodeId(if message.from == 9 { 9 } else { 2 });
    let mut node = follower();
    let before = node.status();
    match node.step(from, message) {
        Ok(()) => {
            settle(&mut node);
            "taken".into()
        }
        Err(rejected) => {
            assert_eq!(node.status(), before, "a refused message changes nothing");
            let text = format!("{rejected:?}");
            text.split([' ', '(', '{'])
                .next()
                .unwrap_or_default()
                .to_owned()
        }
    }
}

#[test]
fn each_kind_of_nonsense_is_refused_by_name() {
    use MessageType as Kind;
    let big = u64::MAX;
    let cases: Vec<(&str, &str, Message)> = vec![
        ("a plain append", "taken", append(5, 3, &[(6, 3)])),
        (
            "an append that fills a gap later",
            "taken",
            append(9, 3, &[(10, 3)]),
        ),
        (
            "another name",
            "ForgedSender",
            message(Kind::MsgHeartbeat, |m| m.from = 3),
        ),
        (
            "another address",
            "Misdirected",
            message(Kind::MsgHeartbeat, |m| m.to = 3),
        ),
        (
            "nobody we know",
            "Stranger",
            message(Kind::MsgHeartbeatResponse, |m| m.from = 9),
        ),
        (
            "a leader that was added while we were away",
            "taken",
            message(Kind::MsgHeartbeat, |m| (m.from, m.term) = (9, 4)),
        ),
        ("a local signal", "Kind", message(Kind::MsgHup, |_| ())),
        (
            "a forwarded proposal",
            "Kind",
            message(Kind::MsgPropose, |m| m.term = 0),
        ),
        (
            "a forwarded hand-over",
            "Kind",
            message(Kind::MsgTransferLeader, |_| ()),
        ),
        (
            "no term",
            "Range",
            message(Kind::MsgHeartbeat, |m| m.term = 0),
        ),
        (
            "a term without end",
            "Range",
            message(Kind::MsgHeartbeat, |m| m.term = big),
        ),
        (
            "a jump of terms",
            "Range",
            message(Kind::MsgRequestVote, |m| m.term = 1 << 40),
        ),
        (
            "a read with a term",
            "Range",
            message(Kind::MsgReadIndex, |_| ()),
        ),
        (
            "a read without a key",
            "Range",
            message(Kind::MsgReadIndex, |m| m.term = 0),
        ),
        (
            "an answer without a key",
            "Range",
            message(Kind::MsgReadIndexResp, |_| ()),
        ),
        ("an index without end", "Range", append(big, 3, &[])),
        (
            "a vote ahead of its term",
            "Range",
            message(Kind::MsgRequestVote, |m| m.log_term = 3),
        ),
        (
            "a hint past the refusal",
            "Range",
            message(Kind::MsgAppendResponse, |m| {
                m.reject = true;
                m.reject_hint = 7;
            }),
        ),
        (
            "a long context",
            "TooLarge",
            message(Kind::MsgHeartbeat, |m| m.context = vec![0; 65].into()),
        ),
        (
            "a priority",
            "Unexpected",
            message(Kind::MsgRequestVote, |m| m.priority = 1),
        ),
        (
            "a snapshot on demand",
            "Unexpected",
            message(Kind::MsgAppendResponse, |m| m.request_snapshot = 1),
        ),
        ("a vote with entries", "Unexpected", {
            let mut vote = append(5, 3, &[(6, 3)]);
            vote.set_msg_type(Kind::MsgHeartbeat);
            vote
        }),
        (
            "a heartbeat with a snapshot",
            "Unexpected",
            message(Kind::MsgHeartbeat, |m| {
                m.set_snapshot(eraftpb::Snapshot::default());
            }),
        ),
        ("a gap", "Order", append(5, 3, &[(7, 3)])),
        (
            "terms that go back",
            "Order",
            append(5, 3, &[(6, 3), (7, 2)]),
        ),
        ("entries of the future", "Order", append(5, 3, &[(6, 4)])),
        ("an unknown change of the members", "MembershipChange", {
            let mut append = append(5, 3, &[(6, 3)]);
            append.mut_entries()[0].set_entry_type(EntryType::EntryConfChangeV2);
            append
        }),
        ("a change of an older kind", "MembershipChange", {
            let mut append = append(5, 3, &[(6, 3)]);
            append.mut_entries()[0].set_entry_type(EntryType::EntryConfChange);
            append
        }),
        ("a change of the members", "taken", {
            let mut append = append(5, 3, &[(6, 3)]);
            let change = MembersChange {
                add: vec![NodeId(4)],
                ..MembersChange::default()
            };
            let entry = &mut append.mut_entries()[0];
            entry.set_entry_type(EntryType::EntryConfChangeV2);
            entry.data = change.encode().into();
            append
        }),
        ("a huge command", "TooLarge", {
            let mut append = append(5, 3, &[(6, 3)]);
            append.mut_entries()[0].data = vec![0; MAX_COMMAND_BYTES + 1].into();
            append
        }),
        (
            "a commit that we do not hold",
            "LostEntries",
            message(Kind::MsgHeartbeat, |m| m.commit = 6),
        ),
        (
            "another history",
            "ContradictsCommitted",
            append(4, 2, &[(5, 3)]),
        ),
        (
            "an older history above",
            "ContradictsCommitted",
            append(7, 2, &[]),
        ),
        (
            "a hand-over by a stranger",
            "NotYourLeadership",
            message(Kind::MsgTimeoutNow, |m| m.term = 4),
        ),
        (
            "a read here",
            "NotLeader",
            message(Kind::MsgReadIndex, |m| {
                m.term = 0;
                m.set_entries(
                    vec![eraftpb::Entry {
                        data: "k".into(),
                        ..Default::default()
                    }]
                    .into(),
                );
            }),
        ),
        (
            "a snapshot of nothing",
            "Range",
            message(Kind::MsgSnapshot, |_| ()),
        ),
        (
            "a snapshot without voters",
            "Members",
            snapshot_of(&[], 9, 3),
        ),
        (
            "a snapshot with a voter twice",
            "Members",
            snapshot_of(&[1, 2, 2], 9, 3),
        ),
        (
            "a snapshot without us",
            "Stranger",
            snapshot_of(&[2, 3], 9, 3),
        ),
        (
            "a snapshot of the future",
            "Range",
            snapshot_of(&[1, 2, 3], 9, 4),
        ),
        ("a snapshot", "taken", snapshot_of(&[1, 2, 3], 9, 3)),
    ];
    for (name, expected, message) in cases {
        assert_eq!(refusal(message), expected, "{name}");
    }
}

fn snapshot_of(voters: &[u64], index: u64, term: u64) -> Message {
    message(MessageType::MsgSnapshot, |m| {
        let meta = m.mut_snapshot().mut_metadata();
        meta.index = index;
        meta.term = term;
        meta.mut_conf_state().voters = voters.to_vec();
    })
}

#[test]
fn two_leaders_of_one_term_are_refused() {
    let mut node = follower();
    let other = message(MessageType::MsgHeartbeat, |m| m.from = 3);
    let (sender, leader) = (NodeId(3), NodeId(2));
    assert_eq!(
        node.step(sender, other),
        Err(Rejected::SecondLeader {
            sender,
            leader,
            term: 3
        })
    );
}

#[test]
fn proposals_are_taken_by_the_leader_alone_and_within_bounds() {
    let mut node = follower();
    let refused = node.propose(Bytes::from_static(b"x"));
    assert_eq!(
        refused,
        Err(ProposeRefused::NotLeader {
            leader: Some(NodeId(2))
        })
    );
    let mut node = leader();
    assert_eq!(node.propose(Bytes::new()), Err(ProposeRefused::Empty));
    let huge = Bytes::from(vec![0; MAX_COMMAND_BYTES + 1]);
    assert_eq!(
        node.propose(huge),
        Err(ProposeRefused::TooLarge(MAX_COMMAND_BYTES + 1))
    );
    let large = Bytes::from(vec![0; MAX_COMMAND_BYTES]);
    let refused = (0..64).find_map(|_| node.propose(large.clone()).err());
    assert_eq!(
        refused,
        Some(ProposeRefused::Overloaded),
        "uncommitted bytes are bounded"
    );
}

#[test]
fn a_step_that_is_not_persisted_stops_the_node() {
    let mut node = follower();
    node.step(NodeId(2), append(5, 3, &[(6, 3)])).unwrap();
    assert_eq!(
        node.ready().unwrap().persist(|_| Err("disk")).unwrap_err(),
        "disk"
    );
    assert!(node.ready().is_none());
    assert_eq!(
        node.step(NodeId(2), append(5, 3, &[])),
        Err(Rejected::Stopped)
    );
    assert_eq!(
        node.propose(Bytes::from_static(b"x")),
        Err(ProposeRefused::Stopped)
    );
}

#[test]
fn a_follower_acknowledges_only_after_the_write() {
    let mut node = follower();
    node.step(NodeId(2), append(5, 3, &[(6, 3)])).unwrap();
    let mut step = node.ready().unwrap();
    assert!(step.take_send_now().is_empty());
    assert!(step.write().must_sync && step.write().entries.len() == 1);
    let outcome = step.persist(|_| Ok::<_, ()>(())).unwrap();
    assert_eq!((outcome.send.len(), outcome.send[0].index), (1, 6));
}

/// Node 1 leads term 4 of its group of three.
fn leader() -> Node {
    let mut node = follower();
    for _ in 0..MAX_ELECTION_TICKS {
        node.tick();
        settle(&mut node);
    }
    for kind in [
        MessageType::MsgRequestPreVoteResponse,
        MessageType::MsgRequestVoteResponse,
    ] {
        let vote = message(kind, |m| m.term = 4);
        node.step(NodeId(2), vote).unwrap();
        settle(&mut node);
    }
    assert_eq!(node.role(), Role::Leader);
    node
}

#[derive(Clone, Debug)]
enum Op {
    Tick,
    Settle,
    Propose,
    Read,
    Report(u64, bool),
    Step(Box<Message>),
}

fn small() -> impl Strategy<Value = u64> {
    prop_oneof![12 => 0..9u64, 1 => Just(u64::MAX), 1 => Just(1 << 33)]
}

fn any_message() -> impl Strategy<Value = Message> {
    let numbers = (0..19i32, 2..4u64, small(), small(), small(), small());
    let more = (
        any::<bool>(),
        small(),
        0..4u64,
        any::<bool>(),
        any::<bool>(),
        small(),
    );
    (numbers, more).prop_map(|(numbers, more)| {
        let (kind, from, term, log_term, index, commit) = numbers;
        let (reject, hint, entries, ordered, own_key, commit_term) = more;
        let kind = wire::from_wire(forebay_proto::wire::raft::Message {
            msg_type: kind.unsigned_abs(),
            ..Default::default()
        });
        let mut message = kind.unwrap();
        (message.from, message.to, message.term) = (from, 1, term);
        (message.log_term, message.index, message.commit) = (log_term, index, commit);
        (message.reject, message.reject_hint, message.commit_term) = (reject, hint, commit_term);
        let read = matches!(
            message.get_msg_type(),
            MessageType::MsgReadIndex | MessageType::MsgReadIndexResp
        );
        if read {
            let data = Bytes::from(if own_key { vec![1; 24] } else { vec![2] });
            message.set_entries(
                vec![eraftpb::Entry {
                    data,
                    ..Default::default()
                }]
                .into(),
            );
        } else if message.get_msg_type() == MessageType::MsgAppend {
            let entries = (0..entries).map(|at| {
                let index = if ordered {
                    index.saturating_add(at + 1)
                } else {
                    hint
                };
                entry(index, if ordered { log_term.max(1) } else { commit }, "z").to_raft()
            });
            message.set_entries(entries.collect::<Vec<_>>().into());
        }
        if message.get_msg_type() == MessageType::MsgSnapshot {
            let meta = message.mut_snapshot().mut_metadata();
            (meta.index, meta.term) = (index, log_term);
            meta.mut_conf_state().voters = if ordered {
                vec![1, 2, 3]
            } else {
                vec![hint, 1]
            };
        }
        message
    })
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => Just(Op::Tick),
        3 => Just(Op::Settle),
        1 => Just(Op::Propose),
        1 => Just(Op::Read),
        1 => (2..4u64, any::<bool>()).prop_map(|(peer, done)| Op::Report(peer, done)),
        16 => any_message().prop_map(|message| Op::Step(Box::new(message))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_message_of_a_member_makes_it_panic(
        leads in any::<bool>(),
        ops in prop::collection::vec(any_op(), 1..60),
    ) {
        let mut node = if leads { leader() } else { follower() };
        for op in ops {
            match op {
                Op::Tick => node.tick(),
                Op::Settle => drop(settle(&mut node)),
                Op::Propose => drop(node.propose(Bytes::from_static(b"p"))),
                Op::Read => node.read_index(1),
                Op::Report(peer, true) => node.report_snapshot(NodeId(peer), SnapshotReport::Failed),
                Op::Report(peer, false) => node.report_unreachable(NodeId(peer)),
                Op::Step(message) => drop(node.step(NodeId(message.from), *message)),
            }
        }
        settle(&mut node);
    }
}
