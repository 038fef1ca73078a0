//! One world: control nodes, those who ask, those who watch, the faults, and the order of events.

use std::collections::BTreeMap;

use bytes::Bytes;
use forebay_consensus::fleet::Fleet;
use forebay_consensus::node::{MembersChange, Message, Restored, Snapshot, SnapshotReport};
use forebay_consensus::replica::StopReason;
use forebay_consensus::store::MemberRecord;
use forebay_control_client::core::watch::Watch;
use forebay_proto::fleet::Member;
use forebay_proto::wire::control;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{ClusterId, NodeId, StoreId};
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use wire::change::Change;
use wire::command::Action;

use super::check::{Checks, Durable, Held, Liveness, Rest, Violation};
use super::clients::{Asker, Next, Outside, Part};
use super::disk::SimDisk;
use super::history::{Counts, History};
use super::host::{self, Batch, Clock, Host, Incoming, Turned};
use super::net::{Network, Place};
use super::params::Params;
use super::party::{Answer, Ask, Party};
use super::plan::{Fault, LEADER, Target};

/// Every so often somebody looks at each watch.
const WATCH_EVERY_US: u64 = 50_000;
const CLUSTER: ClusterId = ClusterId([7; 16]);

pub(super) struct World {
    pub(super) params: Params,
    pub(super) plan: Vec<Fault>,
    pub(super) now_us: u64,
    pub(super) queue: BTreeMap<(u64, u64), Event>,
    numbered: u64,
    pub(super) rng: StdRng,
    /// For what looks on: it must not change what happens.
    looks: StdRng,
    pub(super) network: Network,
    pub(super) hosts: BTreeMap<NodeId, Host>,
    pub(super) askers: BTreeMap<Party, Asker>,
    watchers: Vec<Watcher>,
    pub(super) history: History,
    pub(super) checks: Checks,
    /// The members as agreed.
    members: Vec<wire::Member>,
    pub(super) feature_level: u32,
    pub(super) newest_member: NodeId,
    pub(super) injected: BTreeMap<&'static str, u64>,
    pub(super) healing: bool,
    trace: u64,
    events: u64,
}

pub(super) enum Event {
    Tick(NodeId, u32),
    Turn(NodeId, u32),
    /// A node's message arrives.
    Raft {
        to: NodeId,
        from: NodeId,
        message: Box<Message>,
    },
    /// What became of a message.
    Told(NodeId, Incoming),
    Asked {
        to: NodeId,
        party: Party,
        number: u64,
        ask: Ask,
    },
    Answered {
        party: Party,
        number: u64,
        answer: Answer,
    },
    Wake(Party, u64),
    Watch(u32),
    Dialled {
        watcher: u32,
        number: u64,
        to: NodeId,
        from: control::Watch,
    },
    Frame {
        watcher: u32,
        number: u64,
        frame: Box<control::WatchFrame>,
    },
    Fault(usize),
    Start(NodeId),
    /// A member that was added gets its disk and its process.
    Join(NodeId),
    /// A member that was removed ends.
    Retire(NodeId),
    Room(NodeId),
    Heal,
    End,
}

struct Watcher {
    watch: Watch,
    /// Counts its dials: frames of earlier ones are passed over.
    dials: u64,
    clock: Clock,
}

/// How a world ended.
pub(super) struct Ended {
    pub(super) trace: u64,
    pub(super) events: u64,
    pub(super) counts: Counts,
    pub(super) checked: u64,
    pub(super) lasted_us: u64,
    pub(super) terms: usize,
    pub(super) injected: BTreeMap<&'static str, u64>,
}

impl World {
    /// A world with its first group, before anything happens.
    pub(super) fn new(seed: u64, params: Params, plan: Vec<Fault>) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x00f0_7e5b);
        let mut world = Self {
            plan,
            now_us: 0,
            queue: BTreeMap::new(),
            numbered: 0,
            looks: StdRng::seed_from_u64(seed ^ 0x0010_0c5a),
            network: Network::default(),
            hosts: BTreeMap::new(),
            askers: BTreeMap::new(),
            watchers: Vec::new(),
            history: History::default(),
            checks: Checks::default(),
            members: Vec::new(),
            feature_level: if params.mixed { 1 } else { 2 },
            newest_member: NodeId(u64::from(params.nodes)),
            injected: BTreeMap::new(),
            healing: false,
            trace: 0,
            events: 0,
            rng: StdRng::seed_from_u64(rng.random()),
            params,
        };
        world.found();
        world.people();
        for position in 0..world.plan.len() {
            let at = world.plan[position].at_ms * 1_000;
            world.at(at, Event::Fault(position));
        }
        let heal = micros(world.params.faults_for);
        world.at(heal, Event::Heal);
        world.at(heal + micros(world.params.heals_for), Event::End);
        world
    }

    fn found(&mut self) {
        let nodes = self.params.nodes;
        let records: Vec<MemberRecord> = (1..=u64::from(nodes)).map(record).collect();
        let members: Vec<Member> = records.iter().map(member).collect();
        self.members = members.iter().map(Member::to_wire).collect();
        let fleet = Fleet::bootstrap(CLUSTER, members).with_feature_level(self.feature_level);
        let group = host::first_members(nodes);
        let snapshot = Snapshot::bootstrap(group, Bytes::from(fleet.snapshot()));
        for one in &records {
            let mut host = self.host(one.id);
            host.is_old = self.params.mixed && self.rng.random_bool(0.5);
            let file = host::cluster_file(CLUSTER, one.id, &one.name, records.clone());
            host::found(&self.params, &host.disk, file, &snapshot)
                .expect("an empty disk without faults takes a bootstrap");
            self.hosts.insert(one.id, host);
            self.at(0, Event::Start(one.id));
        }
    }

    fn people(&mut self) {
        let params = self.params.clone();
        for number in 0..params.agents {
            let key = format!("desired w{number}");
            // Registered or not, a worker is wanted to be ready.
            let call = self
                .history
                .call(9_999, &key, 0, super::history::Op::Write(1));
            self.history
                .returned(call, 0, super::history::Outcome::Written);
            self.person(Party::Agent(number), Asker::agent(number));
        }
        for number in 0..params.clients {
            self.person(Party::Client(number), Part::Client { config: None });
        }
        self.person(Party::Admin, Part::Admin);
        for number in 0..params.watchers {
            let rng = StdRng::seed_from_u64(self.rng.random());
            let clock = self.clock();
            self.watchers.push(Watcher {
                watch: Watch::new(None, rng),
                dials: 0,
                clock,
            });
            self.at(u64::from(number) * 1_000, Event::Watch(number));
        }
    }

    pub(super) fn person(&mut self, party: Party, part: Part) {
        let asker = Asker::new(party, part, &mut self.rng);
        self.askers.insert(party, asker);
        let at = self.now_us + self.rng.random_range(0..2_000_000);
        self.at(at, Event::Wake(party, 0));
    }

    fn clock(&mut self) -> Clock {
        let drift = self.params.drift_ppm;
        Clock {
            ahead: self.rng.random_range(0..1_000_000_000),
            drift_ppm: self.rng.random_range(-drift..=drift),
        }
    }

    fn host(&mut self, id: NodeId) -> Host {
        Host {
            id,
            name: format!("n{}", id.0),
            disk: SimDisk::new(store_id(id.0)),
            clock: self.clock(),
            process: None,
            starts: 0,
            inbox: Vec::new(),
            turn_is_due: false,
            paused_until: 0,
            full_until: 0,
            rotten: false,
            refused: None,
            is_old: false,
            removed: false,
            group: None,
            group_before: None,
            jumped_at: None,
        }
    }

    pub(super) fn at(&mut self, at_us: u64, event: Event) {
        self.numbered += 1;
        self.queue
            .insert((at_us.max(self.now_us), self.numbered), event);
    }

    /// Runs to the end.
    ///
    /// # Errors
    ///
    /// Returns the first invariant that did not hold.
    pub(super) fn run(mut self) -> Result<Ended, (Violation, u64)> {
        match self.events() {
            Err(violation) => Err((violation, self.now_us)),
            Ok(()) => {
                let (counts, now) = (self.history.counts(), self.now_us);
                let terms = self.checks.election.terms();
                let checked = self.history.check();
                let checked =
                    checked.map_err(|detail| (Violation::new("linearizable", detail), now))?;
                Ok(Ended {
                    trace: self.trace,
                    events: self.events,
                    counts,
                    checked,
                    lasted_us: now,
                    terms,
                    injected: self.injected,
                })
            }
        }
    }

    fn events(&mut self) -> Held {
        while let Some(((at, number), event)) = self.queue.pop_first() {
            self.now_us = at;
            self.events += 1;
            self.note(number, &event);
            if matches!(event, Event::End) {
                return self.end();
            }
            self.event(event)?;
        }
        Ok(())
    }

    /// The trace: what happened, in order, as one number.
    fn note(&mut self, number: u64, event: &Event) {
        let (kind, what) = match event {
            Event::Tick(node, _) => (1, node.0),
            Event::Turn(node, _) => (2, node.0),
            Event::Raft { to, message, .. } => (
                3,
                to.0 ^ message.index << 8 ^ message.term << 40 ^ (message.msg_type as u64) << 56,
            ),
            Event::Told(node, _) => (4, node.0),
            Event::Asked { to, number, .. } => (5, to.0 ^ number << 8),
            Event::Answered { number, answer, .. } => (6, number << 32 ^ answer_number(answer)),
            Event::Wake(..) => (7, 0),
            Event::Watch(watcher) => (8, u64::from(*watcher)),
            Event::Dialled { to, .. } => (9, to.0),
            Event::Frame { frame, .. } => (10, frame.encoded_len() as u64),
            Event::Fault(position) => (11, *position as u64),
            Event::Start(node) => (12, node.0),
            Event::Join(node) => (13, node.0),
            Event::Retire(node) => (14, node.0),
            Event::Room(node) => (15, node.0),
            Event::Heal => (16, 0),
            Event::End => (17, 0),
        };
        for word in [self.now_us, number, kind, what] {
            self.trace = (self.trace ^ word)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29);
        }
    }

    fn event(&mut self, event: Event) -> Held {
        match event {
            Event::Tick(node, start) => self.tick(node, start),
            Event::Turn(node, start) => self.turn(node, start),
            Event::Raft { to, from, message } => {
                self.arrived(to, from, message);
                Ok(())
            }
            Event::Told(node, input) => {
                self.enqueue(node, input);
                Ok(())
            }
            Event::Asked {
                to,
                party,
                number,
                ask,
            } => {
                self.enqueue(to, Incoming::Ask { party, number, ask });
                Ok(())
            }
            Event::Answered {
                party,
                number,
                answer,
            } => {
                self.answered(party, number, &answer);
                Ok(())
            }
            Event::Wake(party, number) => {
                self.wake(party, number);
                Ok(())
            }
            Event::Watch(watcher) => self.watch(watcher),
            Event::Dialled {
                watcher,
                number,
                to,
                from,
            } => {
                self.dialled(watcher, number, to, &from);
                Ok(())
            }
            Event::Frame {
                watcher,
                number,
                frame,
            } => self.frame(watcher, number, *frame),
            Event::Fault(position) => {
                if !self.healing {
                    let kind = self.plan[position].kind.clone();
                    self.fault(&kind);
                }
                Ok(())
            }
            Event::Start(node) => self.start(node),
            Event::Join(node) => self.join(node),
            Event::Retire(node) => {
                self.crash(node, false);
                Ok(())
            }
            Event::Room(node) => {
                if let Some(host) = self.hosts.get_mut(&node)
                    && self.now_us >= host.full_until
                {
                    host.disk.faults(|faults| faults.full = false);
                }
                Ok(())
            }
            Event::Heal => {
                self.heal();
                Ok(())
            }
            Event::End => Ok(()),
        }
    }

    // ---- nodes ------------------------------------------------------------

    fn start(&mut self, node: NodeId) -> Held {
        let seed = self.rng.random();
        let Some(host) = self.hosts.get_mut(&node) else {
            return Ok(());
        };
        if host.process.is_some() || host.refused.is_some() || host.removed {
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

    fn tick(&mut self, node: NodeId, start: u32) -> Held {
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

    fn turn(&mut self, node: NodeId, start: u32) -> Held {
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

    fn enqueue(&mut self, node: NodeId, input: Incoming) {
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

    fn arrived(&mut self, to: NodeId, from: NodeId, message: Box<Message>) {
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
        self.enqueue(to, Incoming::Raft { from, message });
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
            if let (Party::Agent(_) | Party::Zombie(_), Answer::Renewed { .. }) = (party, &answer) {
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
            Part::Client { .. } | Part::Admin => None,
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
        if let Some(host) = self.hosts.get_mut(&node) {
            let before = host.group.replace(group.clone());
            host.group_before = before.filter(|before| *before != group);
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

    fn join(&mut self, id: NodeId) -> Held {
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
        let Some(said) = said.filter(|_| self.looks.random_ratio(1, 6)) else {
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
                recovered(&self.params, &host.disk)
                    .is_ok_and(|restored| host::holds(&restored, *index, *term))
            })
        };
        super::check::Acknowledged::check((*index, *term), (members, before), holds)
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

    // ---- parties ----------------------------------------------------------

    fn wake(&mut self, party: Party, number: u64) {
        let Some(mut asker) = self.askers.remove(&party) else {
            return;
        };
        if !asker.wakes(number) {
            self.askers.insert(party, asker);
            return;
        }
        let (admin, transfer) = if party == Party::Admin {
            self.churn()
        } else {
            (None, None)
        };
        let nodes = self.nodes();
        let next = asker.next(&mut Outside {
            now_us: self.now_us,
            think_us: micros(self.params.think),
            nodes: &nodes,
            agents: self.params.agents,
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
            }
            Next::Wake(at) => self.at(at, Event::Wake(party, number)),
            Next::Send {
                to,
                number: attempt,
                ask,
                wake_us,
            } => {
                self.at(wake_us, Event::Wake(party, number));
                let places = (Place::Outside, Place::Node(to));
                let copies = self
                    .network
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

    fn answered(&mut self, party: Party, number: u64, answer: &Answer) {
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

    /// What the admin does next.
    fn churn(&mut self) -> (Option<(Action, Option<MembersChange>)>, Option<NodeId>) {
        let old = self.hosts.values().any(|host| host.is_old && !host.removed);
        if self.feature_level < 2 && !old && self.rng.random_bool(0.5) {
            let raise = wire::RaiseFeatureLevel { to: 2 };
            return (Some((Action::RaiseFeatureLevel(raise), None)), None);
        }
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

    // ---- watchers ---------------------------------------------------------

    fn watch(&mut self, number: u32) -> Held {
        use forebay_control_client::core::watch::Step;
        self.at(self.now_us + WATCH_EVERY_US, Event::Watch(number));
        let addresses: Vec<String> = self.nodes().iter().map(|id| id.0.to_string()).collect();
        let ages: Vec<(String, std::time::Duration)> = self
            .hosts
            .values()
            .filter_map(|host| {
                let heard = host.status()?.leader_heard_ms;
                let heard = std::time::Duration::from_millis(heard);
                Some((host.id.0.to_string(), heard))
            })
            .collect();
        let Some(watcher) = self.watchers.get_mut(number as usize) else {
            return Ok(());
        };
        let now = watcher.clock.at(self.now_us);
        match watcher.watch.next(now, &addresses) {
            Step::Dial { address, from } => {
                watcher.dials += 1;
                let dial = watcher.dials;
                let Ok(to) = address.parse().map(NodeId) else {
                    return Ok(());
                };
                let places = (Place::Outside, Place::Node(to));
                let arrives = self
                    .network
                    .send(&mut self.rng, &self.params, self.now_us, places);
                if let Some(at) = arrives.first() {
                    self.at(
                        *at,
                        Event::Dialled {
                            watcher: number,
                            number: dial,
                            to,
                            from,
                        },
                    );
                }
            }
            Step::Scout => {
                watcher.watch.scouted(now, &ages);
            }
            Step::Leave | Step::Wait(_) => {}
        }
        Ok(())
    }

    fn dialled(&mut self, watcher: u32, number: u64, to: NodeId, from: &control::Watch) {
        let Some(host) = self.hosts.get_mut(&to) else {
            return;
        };
        let now = host.clock.at(self.now_us);
        if let Some(process) = &mut host.process {
            process.watch(watcher, number, from, now);
            self.feed(to, self.now_us);
        }
    }

    /// Sends watchers what is new on this node.
    fn feed(&mut self, node: NodeId, leaves: u64) {
        let Some(host) = self.hosts.get_mut(&node) else {
            return;
        };
        if host.paused_until > self.now_us {
            return;
        }
        let now = host.clock.at(self.now_us);
        let Some(process) = &mut host.process else {
            return;
        };
        let watchers: Vec<u32> = process.streams.keys().copied().collect();
        let places = (Place::Node(node), Place::Outside);
        let mut events = Vec::new();
        for watcher in watchers {
            for frame in process.frames(watcher, now) {
                let arrives = self
                    .network
                    .send(&mut self.rng, &self.params, leaves, places);
                let Some(stream) = process.streams.get_mut(&watcher) else {
                    break;
                };
                let Some(at) = arrives.first() else {
                    // A stream has no holes: it ends.
                    process.streams.remove(&watcher);
                    break;
                };
                stream.arrives = (*at).max(stream.arrives + 1);
                events.push((
                    stream.arrives,
                    Event::Frame {
                        watcher,
                        number: stream.number,
                        frame: Box::new(frame),
                    },
                ));
            }
        }
        for (at, event) in events {
            self.at(at, event);
        }
    }

    fn frame(&mut self, number: u32, dial: u64, frame: control::WatchFrame) -> Held {
        let Some(watcher) = self.watchers.get_mut(number as usize) else {
            return Ok(());
        };
        if watcher.dials != dial {
            return Ok(());
        }
        let now = watcher.clock.at(self.now_us);
        match watcher.watch.handle(now, frame) {
            Ok(Some(facts)) => self.checks.watchers.holds(number, &facts),
            Ok(None) => Ok(()),
            Err(problem) => Err(Violation::new(
                "watchers-hold-what-was-agreed",
                format!("watcher {number}: {problem}"),
            )),
        }
    }

    // ---- the end ----------------------------------------------------------

    fn end(&mut self) -> Held {
        let nodes = self.hosts.values();
        let well = nodes.filter(|host| !host.removed && host.refused.is_none());
        let nodes = well
            .map(|host| super::check::NodeRest {
                id: host.id,
                state: host.process.as_ref().map(|process| {
                    let status = process.core.status();
                    let revision = process.publisher.facts().revision;
                    let joint = status.members.is_joint();
                    (status.leader, status.applied, revision, joint)
                }),
            })
            .collect();
        let since = micros(self.params.faults_for + self.params.heals_for / 2);
        let stuck = self
            .askers
            .iter()
            .filter(|(party, asker)| !matches!(party, Party::Admin) && asker.done_at < since)
            .map(|(party, _)| format!("{party:?}"))
            .collect();
        let watchers = 0..u32::try_from(self.watchers.len()).unwrap_or(0);
        Liveness::check(&Rest {
            nodes,
            stuck,
            watchers: watchers
                .map(|watcher| (watcher, self.checks.watchers.revision(watcher)))
                .collect(),
            feature_level: self.params.mixed.then_some(self.feature_level),
        })
    }
}

/// What a disk would give back after the worst loss of power.
fn recovered(params: &Params, disk: &SimDisk) -> Result<Restored, String> {
    host::recover(params, &disk.worst_case())
        .map(|(_, restored)| restored)
        .map_err(|error| error.to_string())
}

fn store_id(node: u64) -> [u8; 16] {
    let mut id = [9; 16];
    id[..8].copy_from_slice(&node.to_be_bytes());
    id
}

fn record(id: u64) -> MemberRecord {
    MemberRecord {
        id: NodeId(id),
        name: format!("n{id}"),
        address: format!("n{id}:7400"),
        store_id: StoreId(store_id(id)),
    }
}

fn member(record: &MemberRecord) -> Member {
    Member {
        id: record.id,
        name: record.name.clone(),
        address: record.address.clone(),
        store_id: record.store_id,
        learner: false,
    }
}

fn answer_number(answer: &Answer) -> u64 {
    match answer {
        Answer::Outcome { index, term, .. } => index << 8 ^ term,
        Answer::Facts(facts) => facts.revision ^ 1 << 62,
        Answer::NotLeader(leader) => leader.map_or(1, |leader| leader.0 << 4),
        Answer::Refused => 2,
        Answer::Unknown => 3,
        Answer::Renewed { revision, .. } => revision << 4 ^ 4,
        Answer::Superseded => 5,
        Answer::NotRegistered => 6,
        Answer::Begun => 7,
    }
}

pub(super) fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
