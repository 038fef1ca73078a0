//! Members that come, go and hand over, over real links and disks.

use super::*;

/// Catching up on two cores that others use, too.
const SETTLED: Duration = Duration::from_secs(15);

impl Cell {
    /// So many members, and nodes that wait beside them.
    fn with_spares(members: usize, spares: usize) -> Self {
        let mut cell = Self::new(members + spares);
        let all = cell.members();
        for response in cell.bootstrap(1, &all[..members]) {
            assert!(
                matches!(response, Response::Bootstrapped(_)),
                "{response:?}"
            );
        }
        cell
    }

    fn change(&mut self, sequence: u64, change: wire::ChangeMembers) -> Response {
        let leader = self.leader();
        let command = wire::Command {
            action: Some(Action::ChangeMembers(change)),
        };
        let propose = control::Propose {
            client: vec![6; 16].into(),
            sequence,
            command: command.encode_to_vec().into(),
            reason: "a test".into(),
            deadline_ms: 5_000,
        };
        self.ask(leader, Request::Propose(propose))
    }

    /// Commits the node as a learner under this id.
    fn add(&mut self, sequence: u64, node: usize, id: u64) {
        let added = wire::Member {
            id,
            name: format!("c{}", node + 1),
            address: self.addresses[node].clone(),
            store_id: self.status(node).store_id,
            learner: false,
        };
        let added = self.change(
            sequence,
            wire::ChangeMembers {
                add: vec![added],
                ..wire::ChangeMembers::default()
            },
        );
        assert!(revision(&added) > 0);
    }

    fn join(&mut self, node: usize, cluster: u8, id: u64) -> Response {
        let leader = self.leader();
        let members = self.status(leader).members;
        let join = control::Join {
            cluster_id: vec![cluster; 16].into(),
            node_id: id,
            members,
        };
        self.ask(node, Request::Join(join))
    }

    fn promote(&mut self, sequence: u64, id: u64) -> Response {
        self.change(
            sequence,
            wire::ChangeMembers {
                promote: vec![id],
                ..wire::ChangeMembers::default()
            },
        )
    }

    fn remove(&mut self, sequence: u64, id: u64) -> Response {
        self.change(
            sequence,
            wire::ChangeMembers {
                remove: vec![id],
                ..wire::ChangeMembers::default()
            },
        )
    }

    fn wait_until_level(&mut self, node: usize) {
        let leader = self.leader();
        let commit = self.status(leader).commit;
        self.within(SETTLED, |cell| {
            (cell.status(node).applied >= commit).then_some(())
        });
    }

    /// Waits until every member that runs has answered the leader: one that has just been elected
    /// removes nobody before that.
    fn wait_until_heard(&mut self) {
        let leader = self.leader();
        let commit = self.status(leader).commit;
        self.within(SETTLED, |cell| {
            let peers = cell.status(leader).peers;
            let mut running = peers.iter().filter(|peer| {
                let node = usize::try_from(peer.node_id - 1).unwrap();
                cell.nodes[node].is_some()
            });
            running.all(|peer| peer.matched >= commit).then_some(())
        });
    }

    /// Ends a node without waiting for anything of it.
    fn lose(&mut self, node: usize) {
        self.stop(node);
        wipe(&self.disk(node));
    }
}

fn unfit(response: &Response) -> String {
    match response {
        Response::Outcome(wire::Outcome {
            outcome: Some(wire::outcome::Outcome::Refusal(refusal)),
        }) => match &refusal.reason {
            Some(wire::refusal::Reason::MembersUnfit(unfit)) => unfit.problem.clone(),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dead_member_is_replaced_by_a_new_node_that_votes_and_restarts_as_a_member() {
    let mut cell = Cell::with_spares(3, 1);
    let leader = cell.leader();
    let written = revision(&cell.apply_config(leader, 1, TWO_POOLS, 0));
    let (dead, other) = ((leader + 1) % 3, (leader + 2) % 3);
    cell.lose(dead);

    cell.wait_until_heard();
    assert!(revision(&cell.remove(1, dead as u64 + 1)) > written);
    cell.add(2, 3, 4);
    let early = unfit(&cell.promote(3, 4));
    assert!(early.contains("behind"), "it has nothing yet: {early}");
    let joined = cell.join(3, 1, 4);
    assert!(matches!(joined, Response::Bootstrapped(_)), "{joined:?}");
    let again = cell.join(3, 1, 4);
    assert!(
        matches!(again, Response::Bootstrapped(_)),
        "a repetition succeeds"
    );
    cell.wait_until_level(3);
    assert_eq!(cell.status(3).role, "learner");
    assert_eq!(cell.facts(3).config_revision, written);
    let peers = cell.status(leader).peers;
    let new = peers.iter().find(|peer| peer.node_id == 4).unwrap();
    assert!(new.matched > 0 && new.heard_ms.is_some(), "{new:?}");
    assert!(revision(&cell.promote(4, 4)) > written);

    // Two of the three members are the leader and the new one: it votes and acknowledges.
    cell.stop(other);
    let leader = cell.leader();
    let rewritten = cell.apply_config(leader, 2, "[[pools]]\nname = \"default\"\n", written);
    let rewritten = revision(&rewritten);

    // It knows the others by its own disk, and they know it.
    cell.stop(3);
    cell.start(3);
    cell.within(SETTLED, |cell| {
        let status = cell.status(3);
        let ids: Vec<u64> = status.members.iter().map(|member| member.id).collect();
        (status.leader > 0 && !ids.contains(&(dead as u64 + 1)) && ids.contains(&4)).then_some(())
    });
    cell.leader();
    assert_eq!(cell.facts(3).config_revision, rewritten);
    cell.start(other);
    cell.wait_until_level(other);
}

#[test]
fn a_node_that_was_away_while_its_whole_group_was_replaced_is_told_by_those_it_does_not_know() {
    let mut cell = Cell::with_spares(3, 2);
    let leader = cell.leader();
    let (away, leaves) = ((leader + 1) % 3, (leader + 2) % 3);
    cell.stop(away);
    for (sequence, node) in [(1, 3), (3, 4)] {
        cell.add(sequence, node, node as u64 + 1);
        cell.join(node, 1, node as u64 + 1);
        cell.wait_until_level(node);
        revision(&cell.promote(sequence + 1, node as u64 + 1));
    }
    cell.wait_until_heard();
    revision(&cell.remove(5, leaves as u64 + 1));
    cell.stop(leaves);
    let to = control::Transfer {
        to: 4,
        reason: "a test".into(),
        deadline_ms: 2_000,
    };
    let handed = cell.ask(leader, Request::Transfer(to.clone()));
    assert!(matches!(handed, Response::Transferred(_)), "{handed:?}");
    assert_eq!(cell.leader(), 3);
    let again = cell.ask(3, Request::Transfer(to));
    assert!(
        matches!(again, Response::Transferred(t) if t.unchanged),
        "a repetition succeeds"
    );
    cell.wait_until_heard();
    revision(&cell.remove(6, leader as u64 + 1));
    cell.stop(leader);
    let written = revision(&cell.apply_config(3, 1, TWO_POOLS, 0));

    // Nodes 4 and 5 are strangers to it, and all that is left beside it.
    cell.start(away);
    cell.wait_until_level(away);
    assert_eq!(cell.facts(away).config_revision, written);
    assert_eq!(cell.status(away).members.len(), 3);
}

#[test]
fn a_member_that_was_removed_says_so_and_comes_back_as_a_new_node() {
    let mut cell = Cell::initialised(3);
    let leader = cell.leader();
    let leads = unfit(&cell.remove(1, leader as u64 + 1));
    assert!(leads.contains("forebay raft transfer"), "{leads}");
    let gone = (leader + 1) % 3;
    cell.wait_until_heard();
    revision(&cell.remove(2, gone as u64 + 1));
    let problem = cell.within(SETTLED, |cell| {
        let problem = cell.status(gone).problem;
        (!problem.is_empty()).then_some(problem)
    });
    assert!(problem.contains("was removed"), "{problem}");
    // It forgets that only with its disk, also over a start.
    cell.stop(gone);
    cell.start(gone);
    cell.within(SETTLED, |cell| {
        cell.status(gone)
            .problem
            .contains("was removed")
            .then_some(())
    });
    cell.lose(gone);
    cell.start(gone);
    cell.add(3, gone, 4);
    cell.join(gone, 1, 4);
    cell.wait_until_level(gone);
    revision(&cell.promote(4, 4));
    assert_eq!(cell.status(gone).problem, "");
}

#[test]
fn the_leadership_is_not_handed_to_who_does_not_answer_or_has_no_vote() {
    let mut cell = Cell::initialised(3);
    let leader = cell.leader();
    let written = revision(&cell.apply_config(leader, 1, TWO_POOLS, 0));
    let gone = (leader + 1) % 3;
    cell.stop(gone);
    let mut transfer = |to: u64| {
        let to = control::Transfer {
            to,
            reason: "a test".into(),
            deadline_ms: 5_000,
        };
        unfit(&cell.ask(leader, Request::Transfer(to)))
    };
    let problem = transfer(gone as u64 + 1);
    assert!(problem.contains("did not take over"), "{problem}");
    let problem = transfer(9);
    assert!(problem.contains("9 is not a member"), "{problem}");
    let second = "[[pools]]\nname = \"default\"\n";
    let rewritten = cell.apply_config(leader, 2, second, written);
    assert!(revision(&rewritten) > written, "the leader goes on");
}

#[test]
fn a_join_that_is_not_for_this_disk_or_cluster_is_refused() {
    let mut cell = Cell::with_spares(1, 1);
    let failure = |response: Response| match response {
        Response::Failure(failure) => failure.failure.unwrap(),
        other => panic!("{other:?}"),
    };
    let stranger = failure(cell.join(1, 1, 2));
    assert!(
        matches!(stranger, Failure::BadRequest(_)),
        "not added: {stranger:?}"
    );
    cell.add(1, 1, 2);
    cell.stop(1);
    wipe(&cell.disk(1));
    cell.start(1);
    let wiped = failure(cell.join(1, 1, 2));
    assert!(
        matches!(wiped, Failure::BadRequest(_)),
        "another disk: {wiped:?}"
    );
    revision(&cell.remove(2, 2));
    cell.add(3, 1, 3);
    cell.join(1, 1, 3);
    cell.wait_until_level(1);
    let other = failure(cell.join(1, 2, 3));
    assert!(matches!(other, Failure::AlreadyInitialised(_)), "{other:?}");
}

#[test]
fn a_snapshot_has_all_that_was_agreed_but_no_keys_and_a_timed_entry_changes_nothing() {
    let mut cell = Cell::initialised(1);
    let leader = cell.leader();
    let written = revision(&cell.apply_config(leader, 1, TWO_POOLS, 0));
    let mut taken = || match cell.ask(
        leader,
        Request::Snapshot(control::Snapshot { deadline_ms: 3_000 }),
    ) {
        Response::Snapshot(file) => crate::backup::read(file.file).unwrap(),
        other => panic!("{other:?}"),
    };
    let before = taken();
    let facts = before.fleet.facts();
    assert_eq!(facts.config_revision, written);
    assert!(facts.keys.unwrap_or_default().keys.is_empty());
    for _ in 0..3 {
        let measure = control::Measure {
            bytes: 256,
            deadline_ms: 2_000,
        };
        let measured = cell.ask(leader, Request::Measure(measure));
        assert!(matches!(measured, Response::Measured(m) if m.commit_us > 0));
    }
    let mut taken = || match cell.ask(
        leader,
        Request::Snapshot(control::Snapshot { deadline_ms: 3_000 }),
    ) {
        Response::Snapshot(file) => crate::backup::read(file.file).unwrap(),
        other => panic!("{other:?}"),
    };
    let after = taken();
    assert_eq!(after.index, before.index + 3);
    assert_eq!(after.fleet.state_hash(), before.fleet.state_hash());
}
