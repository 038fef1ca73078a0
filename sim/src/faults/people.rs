//! What those who ask do: they wake, get answers; the admin drains, moves homes, changes the members.

use forebay_consensus::node::MembersChange;
use forebay_proto::NodeId;
use forebay_proto::wire::fleet as wire;
use rand::Rng as _;
use wire::command::Action;

use super::clients::{Next, Outside, drained};
use super::net::Place;
use super::party::{Answer, Party};
use super::plan::{LEADER, Target};
use super::world::{Event, World, member, micros, record};

impl World {
    pub(super) fn wake(&mut self, party: Party, number: u64) {
        let Some(mut asker) = self.askers.remove(&party) else {
            return;
        };
        if !asker.wakes(number) {
            self.askers.insert(party, asker);
            return;
        }
        let (admin, transfer) = if party == Party::Admin {
            self.operates()
        } else {
            (None, None)
        };
        let nodes = self.nodes();
        let next = asker.next(&mut Outside {
            now_us: self.now_us,
            think_us: micros(self.params.think),
            nodes: &nodes,
            agents: self.params.agents,
            healing: self.healing,
            rng: &mut self.rng,
            history: &mut self.history,
            admin,
            transfer,
        });
        let number = asker.wake_number();
        self.askers.insert(party, asker);
        match next {
            Next::End => {
                self.askers.remove(&party);
                self.watchers.remove(&party);
            }
            Next::Wake(at) => self.at(at, Event::Wake(party, number)),
            Next::Send { to, ask, wake_us } => {
                self.at(wake_us, Event::Wake(party, number));
                for (to, attempt) in to {
                    let places = (Place::Outside, Place::Node(to));
                    let copies =
                        self.network
                            .send(&mut self.rng, &self.params, self.now_us, places);
                    for at in copies {
                        let ask = ask.clone();
                        self.at(
                            at,
                            Event::Asked {
                                to,
                                party,
                                number: attempt,
                                ask,
                            },
                        );
                    }
                }
            }
        }
    }

    pub(super) fn answered(&mut self, party: Party, number: u64, answer: &Answer) {
        let Some(mut asker) = self.askers.remove(&party) else {
            return;
        };
        let nodes = self.nodes();
        let woken = asker.answered(
            number,
            answer,
            &mut Outside {
                now_us: self.now_us,
                think_us: micros(self.params.think),
                nodes: &nodes,
                agents: self.params.agents,
                healing: self.healing,
                rng: &mut self.rng,
                history: &mut self.history,
                admin: None,
                transfer: None,
            },
        );
        if let Some(at) = woken {
            let number = asker.wake_number();
            self.at(at, Event::Wake(party, number));
        }
        self.askers.insert(party, asker);
    }

    /// Nodes that parties know: all that were ever there and are not gone.
    pub(super) fn nodes(&self) -> Vec<NodeId> {
        let hosts = self.hosts.iter();
        let hosts = hosts.filter(|(_, host)| !host.removed);
        hosts.map(|(id, _)| *id).collect()
    }

    /// The node of this number, or the one that leads.
    pub(super) fn target(&self, target: Target) -> Option<NodeId> {
        let nodes = self.nodes();
        if target == LEADER
            && let Some(leader) = nodes.iter().find(|id| self.hosts[id].leads())
        {
            return Some(*leader);
        }
        nodes
            .get(usize::from(target.0) % nodes.len().max(1))
            .copied()
    }

    /// What the admin does next: a drain of the worker that is kept for it, a rebalance, or other members.
    fn operates(&mut self) -> (Option<(Action, Option<MembersChange>)>, Option<NodeId>) {
        let dice = self.rng.random_range(0..10);
        match dice {
            0..3 => (self.drains().map(|action| (action, None)), None),
            3..6 => (self.rebalances().map(|action| (action, None)), None),
            _ => self.churn(),
        }
    }

    /// The next step of a drain, always by the guard.
    fn drains(&mut self) -> Option<Action> {
        let worker = drained(self.params.agents);
        let dice = self.rng.random_range(0..100);
        let deadline_ms = self.rng.random_range(1..4_000);
        let Some(id) = self.checks.drains.active(&worker) else {
            if dice < 40 || self.healing {
                return Some(Action::SetDesiredOf(wire::SetDesiredOf {
                    names: vec![worker],
                    desired: wire::Desired::Ready.into(),
                    ..wire::SetDesiredOf::default()
                }));
            }
            return Some(Action::StartDrain(wire::StartDrain {
                names: vec![worker],
                deadline_ms: if dice < 60 { 0 } else { deadline_ms },
                on_deadline: if dice % 2 == 0 { 1 } else { 2 },
                ignore_capacity_guard: false,
                dry_run: dice > 95,
            }));
        };
        (dice < 15 && !self.healing).then_some(Action::CancelDrain(wire::CancelDrain {
            id,
            uncordon: dice < 8,
            dry_run: dice == 0,
        }))
    }

    /// A rebalance begins, also where one goes on, or is called off.
    fn rebalances(&mut self) -> Option<Action> {
        let dice = self.rng.random_range(0..100);
        let picks = [(); 3].map(|()| self.rng.random_range(0..1_000));
        let interval_ms = self.rng.random_range(100..1_500);
        let active = self.checks.homes.active();
        if let Some(id) = active.filter(|_| dice < 20) {
            let dry_run = dice == 0;
            return Some(Action::CancelRebalance(wire::CancelRebalance {
                id,
                dry_run,
            }));
        }
        let mut moves: Vec<wire::Move> = picks
            .into_iter()
            .filter_map(|pick| self.checks.homes.possible(pick))
            .collect();
        // A later one of the same family may not be possible after the one before.
        if dice < 80 {
            let mut seen = std::collections::BTreeSet::new();
            moves.retain(|one| seen.insert(one.chunk));
        }
        (!moves.is_empty()).then(|| {
            Action::StartRebalance(wire::StartRebalance {
                pool: "default".into(),
                moves,
                interval_ms,
                stop_below: if dice % 4 > 0 { 0 } else { 800 },
                dry_run: dice > 95,
                ..wire::StartRebalance::default()
            })
        })
    }

    /// What the admin does next with the members.
    fn churn(&mut self) -> (Option<(Action, Option<MembersChange>)>, Option<NodeId>) {
        if !self.params.churn || self.rng.random_bool(0.5) {
            return (None, None);
        }
        let (voters, learners): (Vec<u64>, Vec<u64>) = {
            let ids = |learner: bool| {
                let members = self.members.iter();
                let members = members.filter(move |member| member.learner == learner);
                members.map(|member| member.id).collect()
            };
            (ids(false), ids(true))
        };
        if self.rng.random_bool(0.2) {
            let to = voters[self.rng.random_range(0..voters.len())];
            return (None, Some(NodeId(to)));
        }
        let fewest = self.params.nodes as usize;
        let mut change = wire::ChangeMembers::default();
        if self.rng.random_bool(0.1) {
            // What Raft would carry out and the machine refuses: an id from before.
            change.add.push(member(&record(900)).to_wire());
            let group = MembersChange {
                add: vec![NodeId(900)],
                ..MembersChange::default()
            };
            return (Some((Action::ChangeMembers(change), Some(group))), None);
        }
        let dead: Vec<u64> = voters
            .iter()
            .copied()
            .filter(|id| {
                let host = self.hosts.get(&NodeId(*id));
                host.is_none_or(|host| host.refused.is_some())
            })
            .collect();
        match (learners.first(), dead.first()) {
            (None, _) if voters.len() < fewest + 2 => {
                let id = self.newest_member.0 + 1;
                change.add.push(member(&record(id)).to_wire());
            }
            (Some(learner), Some(dead)) => {
                change.promote.push(*learner);
                change.remove.push(*dead);
            }
            (Some(learner), None) if self.rng.random_bool(0.7) => {
                change.promote.push(*learner);
                // One goes as another comes: a joint membership.
                if self.rng.random_bool(0.6) {
                    change
                        .remove
                        .push(voters[self.rng.random_range(0..voters.len())]);
                }
            }
            _ if voters.len() > fewest => {
                change
                    .remove
                    .push(voters[self.rng.random_range(0..voters.len())]);
            }
            _ => return (None, None),
        }
        let ids = |ids: &[u64]| ids.iter().copied().map(NodeId).collect();
        let group = MembersChange {
            add: change.add.iter().map(|member| NodeId(member.id)).collect(),
            promote: ids(&change.promote),
            remove: ids(&change.remove),
        };
        (Some((Action::ChangeMembers(change), Some(group))), None)
    }
}
