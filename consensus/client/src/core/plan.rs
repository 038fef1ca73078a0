//! One call as a plan: which node to ask next, when to hedge, when to give up.
//!
//! The leader of last time is asked first. A node that takes longer than [`HEDGE_AFTER`] no longer
//! holds up the others: they are asked beside it, each at its own pace. That is safe for writes,
//! because a command carries its client and sequence number and is applied once. So after the death
//! of a leader the call is back within its election and one pace.

use std::time::Duration;

use forebay_link::Backoff;
use forebay_proto::Now;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use super::error::{ClientError, NodeError, Tried};
use super::roster::{MAX_NODES, Roster};

/// A second node is asked when the first has not answered for this long.
pub const HEDGE_AFTER: Duration = Duration::from_millis(150);

/// Between two questions to a node that answers but cannot help, while an election may be going on.
const PACE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(80));

/// Between two questions to a node that cannot be reached or has stopped.
const UNREACHABLE_PACE: (Duration, Duration) =
    (Duration::from_millis(50), Duration::from_millis(500));

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask this node; its answer goes to [`Plan::failed`], or ends the plan.
    Ask(String),
    /// Wait for an answer, at most until then.
    Wait(Now),
    /// No more can be done.
    GiveUp(ClientError),
}

/// One call under way.
#[derive(Debug)]
pub struct Plan {
    /// In order of preference.
    nodes: Vec<Node>,
    deadline: Now,
    rng: StdRng,
}

#[derive(Debug)]
struct Node {
    address: String,
    /// When it was asked, while its answer is awaited.
    asked: Option<Now>,
    not_before: Now,
    pace: Backoff,
    unreachable_pace: Backoff,
    said: NodeError,
}

impl Node {
    fn new(address: String, now: Now) -> Self {
        Self {
            address,
            asked: None,
            not_before: now,
            pace: Backoff::new(PACE.0, PACE.1),
            unreachable_pace: Backoff::new(UNREACHABLE_PACE.0, UNREACHABLE_PACE.1),
            said: NodeError::NotAsked,
        }
    }

    fn is_down(&self) -> bool {
        matches!(
            self.said,
            NodeError::Unreachable { .. }
                | NodeError::Stopped { .. }
                | NodeError::WrongCluster { .. }
        )
    }
}

impl Plan {
    /// A call that has to end by `deadline`.
    #[must_use]
    pub fn new(roster: &Roster, now: Now, deadline: Now, mut rng: StdRng) -> Self {
        let mut addresses = roster.addresses();
        addresses.shuffle(&mut rng);
        addresses.sort_by_key(|address| roster.leader() != Some(address));
        let nodes = addresses.into_iter();
        Self {
            nodes: nodes.map(|address| Node::new(address, now)).collect(),
            deadline,
            rng,
        }
    }

    /// What to do next. A node that it says to ask counts as asked.
    pub fn next(&mut self, now: Now) -> Next {
        if now >= self.deadline || self.nodes.is_empty() || self.all_uninitialised() {
            return Next::GiveUp(self.give_up());
        }
        let held_up = |node: &Node| node.asked.is_some_and(|at| now < at + HEDGE_AFTER);
        if !self.nodes.iter().any(held_up) {
            let free = |node: &&mut Node| node.asked.is_none() && node.not_before <= now;
            if let Some(node) = self.nodes.iter_mut().find(free) {
                node.asked = Some(now);
                return Next::Ask(node.address.clone());
            }
        }
        let wake_ups = self.nodes.iter().map(|node| match node.asked {
            Some(asked) => asked + HEDGE_AFTER,
            None => node.not_before,
        });
        let wake_up = wake_ups.filter(|at| *at > now).min();
        Next::Wait(wake_up.map_or(self.deadline, |at| at.min(self.deadline)))
    }

    /// A node could not help. Where it names the leader, that one is asked at once.
    pub fn failed(&mut self, now: Now, address: &str, error: NodeError) {
        let leader = match &error {
            NodeError::NotLeader { leader } => leader.clone(),
            _ => None,
        };
        let (nodes, rng) = (&mut self.nodes, &mut self.rng);
        if let Some(node) = nodes.iter_mut().find(|node| node.address == address) {
            node.asked = None;
            node.said = error;
            let pace = if node.is_down() {
                &mut node.unreachable_pace
            } else {
                &mut node.pace
            };
            node.not_before = now + pace.next(rng);
        }
        if let Some(leader) = leader.filter(|leader| leader != address) {
            self.follow(now, leader);
        }
    }

    /// Puts the node first; asks it at once unless it was just found to be down.
    fn follow(&mut self, now: Now, leader: String) {
        let position = self.nodes.iter().position(|node| node.address == leader);
        match position {
            Some(position) => {
                let mut node = self.nodes.remove(position);
                if !node.is_down() {
                    node.not_before = now;
                }
                self.nodes.insert(0, node);
            }
            None if self.nodes.len() < MAX_NODES => self.nodes.insert(0, Node::new(leader, now)),
            None => {}
        }
    }

    fn all_uninitialised(&self) -> bool {
        let mut nodes = self.nodes.iter();
        nodes.all(|node| matches!(node.said, NodeError::Uninitialised { .. }))
    }

    fn give_up(&self) -> ClientError {
        let tried = self.nodes.iter().map(|node| {
            let said = match node.asked {
                Some(_) if !node.is_down() => NodeError::Silent,
                Some(_) | None => node.said.clone(),
            };
            (node.address.clone(), said)
        });
        let tried = Tried(tried.collect());
        if !self.nodes.is_empty() && self.all_uninitialised() {
            let problem = tried.to_string();
            return ClientError::Uninitialised { problem };
        }
        let somebody_may_act =
            |error: &NodeError| matches!(error, NodeError::Unknown | NodeError::Overloaded { .. });
        if tried.0.iter().any(|(_, error)| somebody_may_act(error)) {
            ClientError::DeadlineExceeded { tried }
        } else {
            ClientError::NoQuorum { tried }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn at(ms: u64) -> Now {
        Now::at(Duration::from_millis(ms))
    }

    fn plan(leader: &str) -> Plan {
        let mut roster = Roster::new(["a", "b", "c"].map(Into::into));
        roster.led_by(leader);
        Plan::new(&roster, at(0), at(2_000), StdRng::seed_from_u64(7))
    }

    fn not_leader(leader: &str) -> NodeError {
        NodeError::NotLeader {
            leader: (!leader.is_empty()).then(|| leader.into()),
        }
    }

    fn unreachable() -> NodeError {
        NodeError::Unreachable {
            problem: "down".into(),
        }
    }

    fn ask(address: &str) -> Next {
        Next::Ask(address.into())
    }

    /// Runs the plan against nodes that answer by a function of time; returns when it succeeded.
    fn run(plan: &mut Plan, node: impl Fn(&str, u64) -> (u64, Option<NodeError>)) -> Option<u64> {
        let mut answers: Vec<(u64, String, Option<NodeError>)> = vec![];
        let mut now = 0;
        loop {
            if let Some(i) = answers.iter().position(|(when, ..)| *when <= now) {
                let (_, address, error) = answers.swap_remove(i);
                let Some(error) = error else { return Some(now) };
                plan.failed(at(now), &address, error);
            }
            match plan.next(at(now)) {
                Next::Ask(address) => {
                    let (after, error) = node(&address, now);
                    answers.push((now + after, address, error));
                }
                Next::Wait(_) => now += 1,
                Next::GiveUp(_) => return None,
            }
        }
    }

    #[test]
    fn the_leader_of_last_time_is_asked_first_and_alone() {
        let mut plan = plan("b");
        assert_eq!(plan.next(at(0)), ask("b"));
        assert_eq!(plan.next(at(0)), Next::Wait(at(150)));
    }

    #[test]
    fn a_second_node_is_asked_when_the_first_is_silent_for_150_ms() {
        let mut plan = plan("b");
        plan.next(at(0));
        assert_eq!(plan.next(at(149)), Next::Wait(at(150)));
        let Next::Ask(second) = plan.next(at(150)) else {
            panic!("no hedge")
        };
        assert_ne!(second, "b");
        assert_eq!(plan.next(at(150)), Next::Wait(at(300)));
    }

    #[test]
    fn the_leader_that_a_node_names_is_asked_at_once_known_before_or_not() {
        for leader in ["a", "new"] {
            let mut plan = plan("b");
            plan.next(at(0));
            plan.failed(at(10), "b", not_leader(leader));
            assert_eq!(plan.next(at(10)), ask(leader));
        }
    }

    #[test]
    fn a_named_leader_that_was_just_found_down_is_not_asked_in_a_circle() {
        let mut plan = plan("b");
        plan.next(at(0));
        plan.failed(at(1), "b", unreachable());
        let Next::Ask(other) = plan.next(at(1)) else {
            panic!("nobody asked")
        };
        plan.failed(at(2), &other, not_leader("b"));
        assert_ne!(plan.next(at(2)), ask("b"));
    }

    #[test]
    fn after_a_leaders_death_a_call_is_back_within_its_election_and_100_ms() {
        for elected in [600, 777, 1_000, 1_333] {
            let nodes = |address: &str, now: u64| match address {
                "a" => (100_000, None),
                _ if now < elected => (1, Some(not_leader("a"))),
                "b" => (1, None),
                _ => (1, Some(not_leader("b"))),
            };
            let done = run(&mut plan("a"), nodes).unwrap();
            assert!(
                (elected..=elected + 100).contains(&done),
                "{elected}: {done}"
            );
        }
    }

    #[test]
    fn without_a_quorum_the_error_has_what_each_node_said() {
        let mut plan = plan("a");
        let nodes = |address: &str, _| match address {
            "a" => (1, Some(unreachable())),
            "b" => (1, Some(not_leader(""))),
            _ => (100_000, None),
        };
        assert_eq!(run(&mut plan, nodes), None);
        let Next::GiveUp(ClientError::NoQuorum { tried }) = plan.next(at(2_000)) else {
            panic!("not given up")
        };
        let mut said: Vec<String> = tried.0.iter().map(|(at, e)| format!("{at} {e}")).collect();
        said.sort();
        assert_eq!(
            said,
            [
                "a down",
                "b is not the leader and knows none",
                "c does not answer"
            ]
        );
    }

    #[test]
    fn an_unknown_outcome_is_asked_for_again_until_the_deadline() {
        let mut plan = plan("a");
        assert_eq!(run(&mut plan, |_, _| (1, Some(NodeError::Unknown))), None);
        let given_up = plan.next(at(2_000));
        assert!(matches!(
            given_up,
            Next::GiveUp(ClientError::DeadlineExceeded { .. })
        ));
    }

    #[test]
    fn nodes_that_are_all_uninitialised_end_the_call_early() {
        let mut plan = plan("a");
        let answer = NodeError::Uninitialised {
            problem: String::new(),
        };
        assert_eq!(run(&mut plan, |_, _| (1, Some(answer.clone()))), None);
        let given_up = plan.next(at(10));
        assert!(matches!(
            given_up,
            Next::GiveUp(ClientError::Uninitialised { .. })
        ));
    }

    #[test]
    fn a_node_that_cannot_help_is_not_asked_without_pause() {
        let asked = std::cell::Cell::new(0);
        let nodes = |_: &str, _| {
            asked.set(asked.get() + 1);
            (1, Some(not_leader("")))
        };
        assert_eq!(run(&mut plan("a"), nodes), None);
        assert!((60..=300).contains(&asked.get()), "{}", asked.get());
    }
}
