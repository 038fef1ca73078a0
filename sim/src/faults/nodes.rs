//! What happens at control nodes: they start, take turns, stop, join and leave; the checks look on.

use forebay_consensus::node::{Message, Restored, Role, Snapshot, SnapshotReport};
use forebay_consensus::replica::StopReason;
use forebay_proto::NodeId;
use forebay_proto::wire::fleet as wire;
use rand::Rng as _;
use wire::change::Change;

use super::check::{Acknowledged, Durable, Held, Violation};
use super::clients::Part;
use super::disk::SimDisk;
use super::host::{self, Batch, Incoming, Turned};
use super::net::Place;
use super::params::Params;
use super::party::{Answer, Party};
use super::world::{CLUSTER, Event, World, micros, record};

impl World {
    pub(super) fn start(&mut self, node: NodeId) -> Held {
        let seed = self.rng.random();
        let needed = self.is_needed(node);
        let Some(host) = self.hosts.get_mut(&node) else {
            return Ok(());
        };
        if host.process.is_some() || host.refused.is_some() || (host.removed && !needed) {
            return Ok(());
        }
        let failing = host.disk.fails_to_sync();
        match host.start(&self.params, seed, self.now_us) {
            Ok(memory) => {
                if !host.rotten {
                    self.checks.durable.started(node, &memory)?;
                }
                self.checks.agreement.started(node);
                self.began(node)
            }
            Err(problem) => {
                if host.disk.process_died() {
                    // The power went while it started.
                    host.disk.power_lost(&mut self.rng);
                    let back = self.now_us + 500_000;
                    self.at(back, Event::Start(node));
                    return Ok(());
                }
                if failing && !host.disk.fails_to_sync() {
                    // The disk failed while it started.
                    host.disk.killed();
                    self.at(self.now_us + 500_000, Event::Start(node));
                    return Ok(());
                }
                if host.rotten {
                    // It refuses: a dead node from now on.
                    host.refused = Some(problem);
                    return Ok(());
                }
                let detail = format!("{node} cannot start on a disk that lost nothing: {problem}");
                Err(Violation::new("recovers", detail))
            }
        }
    }

    /// A process has been made: it begins.
    fn began(&mut self, node: NodeId) -> Held {
        let Some(host) = self.hosts.get_mut(&node) else {
            return Ok(());
        };
        let start = host.starts;
        let now = host.clock.at(self.now_us);
        let tick = host.next_tick_us(self.now_us);
        host.paused_until = 0;
        let begun = host.process.as_mut().map(|process| process.core.begin(now));
        self.at(tick, Event::Tick(node, start));
        if let Some(Err(reason)) = begun {
            return self.stopped(node, &reason);
        }
        self.after(node, Turned::default())
    }

    pub(super) fn tick(&mut self, node: NodeId, start: u32) -> Held {
        let Some(host) = self.hosts.get_mut(&node) else {
            return Ok(());
        };
        if host.starts != start || host.process.is_none() {
            return Ok(());
        }
        if host.paused_until > self.now_us {
            let at = host.paused_until;
            self.at(at, Event::Tick(node, start));
            return Ok(());
        }
        self.turn_now(node)?;
        if let Some(host) = self.hosts.get(&node)
            && host.process.is_some()
        {
            let at = host.next_tick_us(self.now_us).max(self.now_us + 1);
            let start = host.starts;
            self.at(at, Event::Tick(node, start));
        }
        Ok(())
    }

    pub(super) fn turn(&mut self, node: NodeId, start: u32) -> Held {
        let Some(host) = self.hosts.get_mut(&node) else {
            return Ok(());
        };
        if host.starts != start || host.process.is_none() {
            return Ok(());
        }
        if host.paused_until > self.now_us {
            let at = host.paused_until;
            self.at(at, Event::Turn(node, start));
            return Ok(());
        }
        host.turn_is_due = false;
        self.turn_now(node)
    }

    fn turn_now(&mut self, node: NodeId) -> Held {
        let Some(host) = self.hosts.get_mut(&node) else {
            return Ok(());
        };
        let turned = host.turn(self.now_us);
        match turned {
            Ok(turned) => self.after(node, turned),
            Err(reason) => self.stopped(node, &reason),
        }
    }

    /// The process ended by itself: only a disk that fails may do that.
    fn stopped(&mut self, node: NodeId, reason: &StopReason) -> Held {
        self.look(node)?;
        let Some(host) = self.hosts.get_mut(&node) else {
            return Ok(());
        };
        match reason {
            StopReason::Store(_) => {
                let died = host.disk.process_died();
                self.crash(node, died);
                let back = self.now_us + self.rng.random_range(200_000..3_000_000);
                self.at(back, Event::Start(node));
                Ok(())
            }
            other => Err(Violation::new("runs", format!("{node} stopped: {other}"))),
        }
    }

    pub(super) fn crash(&mut self, node: NodeId, power: bool) {
        let Some(host) = self.hosts.get_mut(&node) else {
            return;
        };
        host.process = None;
        host.inbox.clear();
        host.paused_until = 0;
        if power {
            host.disk.power_lost(&mut self.rng);
        } else {
            host.disk.killed();
        }
    }

    pub(super) fn enqueue(&mut self, node: NodeId, input: Incoming) {
        let most = micros(self.params.most_turn);
        let Some(host) = self.hosts.get_mut(&node) else {
            return;
        };
        if host.enqueue(input) && !host.turn_is_due {
            host.turn_is_due = true;
            let (start, wait) = (host.starts, self.rng.random_range(1..=most));
            self.at(self.now_us + wait, Event::Turn(node, start));
        }
    }

    pub(super) fn arrived(&mut self, to: NodeId, from: NodeId, message: Box<Message>) {
        let snapshot = message.has_snapshot();
        let runs = self
            .hosts
            .get(&to)
            .is_some_and(|host| host.process.is_some());
        if snapshot {
            let report = if runs {
                SnapshotReport::Delivered
            } else {
                SnapshotReport::Failed
            };
            self.at(
                self.now_us + 1_000,
                Event::Told(from, Incoming::Snapshot(to, report)),
            );
        }
        let level = self.hosts.get(&from).map_or(0, |host| host.knows);
        let raft = Incoming::Raft {
            from,
            level,
            message,
        };
        self.enqueue(to, raft);
    }

    /// What a turn led to leaves the node, and the checks look at it.
    fn after(&mut self, node: NodeId, turned: Turned) -> Held {
        let messages = self.look(node)?;
        let Some(host) = self.hosts.get_mut(&node) else {
            return Ok(());
        };
        let Some(process) = &host.process else {
            return Ok(());
        };
        let stalled = std::mem::take(&mut process.seen.lock().stalled);
        let status = process.core.status();
        self.checks.election.status(node, &status)?;
        if let Some(term) = turned.began {
            let before = self.checks.agreement.newest_before(term);
            self.checks.leases.began(node, self.now_us);
            self.checks
                .reign
                .check(node, term, status.applied, before)?;
        }
        let jumped = host.jumped_at;
        for (incarnation, _) in &turned.expired {
            self.checks
                .leases
                .expired(node, *incarnation, self.now_us, jumped)?;
        }
        if stalled {
            // The thread waits in its write until there is room; all this comes after it.
            host.paused_until = host.full_until.max(self.now_us + 1);
        }
        let leaves = host.paused_until.max(self.now_us);
        let (full, start) = (host.full_until > self.now_us, host.starts);
        if full && stalled {
            self.at(leaves, Event::Turn(node, start));
        }
        self.promised(node, &messages)?;
        for (to, message) in messages {
            self.send(node, to, &message, leaves);
        }
        for (party, number, answer) in turned.answers {
            self.acknowledged(node, &answer)?;
            if let (Party::Agent(_) | Party::Zombie(_), Answer::Renewed) = (party, &answer) {
                self.renewed(node, party);
            }
            let places = (Place::Node(node), Place::Outside);
            for at in self
                .network
                .send(&mut self.rng, &self.params, leaves, places)
            {
                let answer = answer.clone();
                self.at(
                    at,
                    Event::Answered {
                        party,
                        number,
                        answer,
                    },
                );
            }
        }
        self.feed(node, leaves);
        Ok(())
    }

    fn renewed(&mut self, node: NodeId, party: Party) {
        let held = self.askers.get(&party).and_then(|asker| match &asker.role {
            Part::Agent(agent) => agent.held,
            Part::Client { .. } | Part::Balancer { .. } | Part::Admin => None,
        });
        if let Some(incarnation) = held {
            self.checks.leases.renewed(node, incarnation, self.now_us);
        }
    }

    /// What the machine showed, and the messages that left it.
    fn look(&mut self, node: NodeId) -> Result<Vec<(NodeId, Message)>, Violation> {
        let Some(process) = self.hosts.get(&node).and_then(|host| host.process.as_ref()) else {
            return Ok(Vec::new());
        };
        let (messages, batches) = {
            let mut seen = process.seen.lock();
            (
                std::mem::take(&mut seen.messages),
                std::mem::take(&mut seen.batches),
            )
        };
        let group = process.core.node().members().clone();
        let leads = process.core.node().role() == Role::Leader;
        if let Some(host) = self.hosts.get_mut(&node) {
            let before = host.group.replace(group.clone());
            host.group_before = before.filter(|before| *before != group);
        }
        if group.is_joint()
            && leads
            && let Some(back_ms) = self.joint_trap.take()
        {
            self.at(self.now_us, Event::Lose(node, back_ms));
        }
        let last = batches.len();
        for (position, batch) in batches.into_iter().enumerate() {
            if batch.applied == 0 {
                continue;
            }
            let news = self.checks.agreement.batch(node, &batch)?;
            self.checks.time.batch(&batch, self.now_us)?;
            self.checks.audit.batch(&batch)?;
            self.checks.watchers.agreed(&batch.facts);
            for entry in &batch.audit {
                self.checks.once.audited(entry)?;
            }
            if position + 1 == last {
                self.checks.group.check(node, &group, &batch.facts)?;
            }
            for position in news.outputs {
                self.agreed(&batch, position)?;
            }
            self.checks.drains.held(&batch.facts)?;
            self.checks.homes.held(&batch.facts)?;
            self.checks.suspects.held(&batch.facts)?;
            self.newest_member = self.newest_member.max(batch.newest_member);
        }
        Ok(messages)
    }

    /// An entry was applied for the first time anywhere.
    fn agreed(&mut self, batch: &Batch, position: usize) -> Held {
        let Some(delta) = &batch.outputs[position].2.delta else {
            return Ok(());
        };
        self.checks.incarnations.delta(delta)?;
        self.checks.force.delta(delta);
        self.checks.drains.delta(delta)?;
        self.checks.homes.delta(delta)?;
        self.checks.suspects.delta(delta)?;
        for change in &delta.changes {
            match &change.change {
                Some(Change::Members(list)) => self.members_are(&list.members),
                Some(Change::FeatureLevel(level)) => self.feature_level = *level,
                _ => {}
            }
        }
        Ok(())
    }

    fn members_are(&mut self, members: &[wire::Member]) {
        self.members = members.to_vec();
        for member in members {
            let id = NodeId(member.id);
            if !self.hosts.contains_key(&id) {
                let wait = self.rng.random_range(1_000..1_000_000);
                self.at(self.now_us + wait, Event::Join(id));
            }
        }
        let gone: Vec<NodeId> = self
            .hosts
            .iter()
            .filter(|(id, host)| !host.removed && members.iter().all(|member| member.id != id.0))
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            if let Some(host) = self.hosts.get_mut(&id) {
                host.removed = true;
            }
            let wait = self.rng.random_range(1_000..5_000_000);
            self.at(self.now_us + wait, Event::Retire(id));
        }
    }

    /// A member that was removed ends, once its vote counts no more: not before the joint membership by
    /// which it went is left.
    pub(super) fn retire(&mut self, node: NodeId) {
        if self.is_needed(node) {
            self.at(self.now_us + 500_000, Event::Retire(node));
        } else {
            self.crash(node, false);
        }
    }

    fn is_needed(&self, node: NodeId) -> bool {
        self.hosts.values().any(|host| {
            let group = host.group.as_ref();
            !host.removed && group.is_some_and(|group| group.outgoing().contains(&node))
        })
    }

    pub(super) fn join(&mut self, id: NodeId) -> Held {
        if self.hosts.contains_key(&id) || self.members.iter().all(|member| member.id != id.0) {
            return Ok(());
        }
        let host = self.host(id);
        let records = self
            .members
            .iter()
            .map(|member| record(member.id))
            .collect();
        let file = host::cluster_file(CLUSTER, id, &host.name, records);
        host::found(&self.params, &host.disk, file, &Snapshot::of_a_joiner())
            .map_err(|error| Violation::new("recovers", error.to_string()))?;
        self.hosts.insert(id, host);
        self.start(id)
    }

    fn promised(&mut self, node: NodeId, messages: &[(NodeId, Message)]) -> Held {
        let Some(host) = self.hosts.get(&node) else {
            return Ok(());
        };
        let Some(process) = &host.process else {
            return Ok(());
        };
        let log = process.core.node();
        let said = self
            .checks
            .durable
            .said(node, messages, |index| log.term_at(index));
        let Some(said) = said.filter(|_| self.looks.random_ratio(1, 12)) else {
            return Ok(());
        };
        let restored = recovered(&self.params, &host.disk).map_err(|problem| {
            let detail = format!("{node} promised and could not start again: {problem}");
            Violation::new("durable-before-said", detail)
        });
        if host.rotten {
            return Ok(());
        }
        Durable::check(node, said, &restored?)
    }

    fn acknowledged(&mut self, node: NodeId, answer: &Answer) -> Held {
        let Answer::Outcome { index, term, .. } = answer else {
            return Ok(());
        };
        if !self.checks.acknowledged.is_due() {
            return Ok(());
        }
        let Some(host) = self.hosts.get(&node) else {
            return Ok(());
        };
        let Some(members) = &host.group else {
            return Ok(());
        };
        let before = host.group_before.as_ref();
        let holds = |id: NodeId| {
            self.hosts.get(&id).is_some_and(|host| {
                // A disk that rotted since held it, if its node said so.
                if host.rotten && self.checks.durable.said_to_hold(id, *index) {
                    return true;
                }
                recovered(&self.params, &host.disk)
                    .is_ok_and(|restored| host::holds(&restored, *index, *term))
            })
        };
        Acknowledged::check((*index, *term), (members, before), holds)
    }

    fn send(&mut self, from: NodeId, to: NodeId, message: &Message, leaves: u64) {
        let places = (Place::Node(from), Place::Node(to));
        let copies = self
            .network
            .send(&mut self.rng, &self.params, leaves, places);
        if copies.is_empty() {
            if message.has_snapshot() {
                let told = Incoming::Snapshot(to, SnapshotReport::Failed);
                self.at(leaves + 500_000, Event::Told(from, told));
            } else if self.rng.random_bool(0.3) {
                self.at(
                    leaves + 20_000,
                    Event::Told(from, Incoming::Unreachable(to)),
                );
            }
        }
        for at in copies {
            let message = Box::new(message.clone());
            self.at(at, Event::Raft { to, from, message });
        }
    }
}

/// What a disk would give back after the worst loss of power.
fn recovered(params: &Params, disk: &SimDisk) -> Result<Restored, String> {
    host::recover(params, &disk.worst_case())
        .map(|(_, restored)| restored)
        .map_err(|error| error.to_string())
}
