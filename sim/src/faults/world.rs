//! One world: control nodes, those who ask, those who watch, the faults, and the order of events.

use std::collections::BTreeMap;

use bytes::Bytes;
use forebay_consensus::fleet::Fleet;
use forebay_consensus::node::{Message, Snapshot};
use forebay_consensus::store::MemberRecord;
use forebay_control_client::core::watch::Watch;
use forebay_proto::fleet::Member;
use forebay_proto::wire::control;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{ClusterId, FEATURE_LEVEL, NodeId, Now, StoreId};
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::agent::Agent;
use super::check::{Checks, Held, Liveness, Rest, Violation};
use super::clients::{Asker, Part};
use super::disk::SimDisk;
use super::fleet::{Balancer, Data};
use super::history::{Counts, History};
use super::host::{self, Clock, Host, Incoming};
use super::net::Network;
use super::params::Params;
use super::party::{Answer, Ask, Party};
use super::plan::Fault;
use super::watching::Watcher;

/// Many times what a world takes.
const MAX_EVENTS: u64 = 5_000_000;
pub(super) const CLUSTER: ClusterId = ClusterId([7; 16]);

pub(super) struct World {
    pub(super) params: Params,
    pub(super) plan: Vec<Fault>,
    pub(super) now_us: u64,
    pub(super) queue: BTreeMap<(u64, u64), Box<Event>>,
    numbered: u64,
    pub(super) rng: StdRng,
    /// For what looks on: it must not change what happens.
    pub(super) looks: StdRng,
    /// Between balancers and agents: how they place must not change what befalls the control plane.
    pub(super) placing: StdRng,
    pub(super) network: Network,
    pub(super) hosts: BTreeMap<NodeId, Host>,
    pub(super) askers: BTreeMap<Party, Asker>,
    pub(super) watchers: BTreeMap<Party, Watcher>,
    pub(super) balancers: BTreeMap<u32, Balancer>,
    /// Watches that were ever begun.
    pub(super) dials: u64,
    pub(super) history: History,
    pub(super) checks: Checks,
    /// The members as agreed.
    pub(super) members: Vec<wire::Member>,
    pub(super) feature_level: u32,
    pub(super) newest_member: NodeId,
    pub(super) injected: BTreeMap<&'static str, u64>,
    /// The leader of the next joint membership is lost, and comes back after so many milliseconds.
    pub(super) joint_trap: Option<u64>,
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
    Watch(Party),
    Dialled {
        watcher: Party,
        number: u64,
        to: NodeId,
        from: control::Watch,
    },
    Frame {
        watcher: Party,
        number: u64,
        frame: Box<control::WatchFrame>,
    },
    /// Between balancers and agents.
    Data(Data),
    Fault(usize),
    Start(NodeId),
    /// The process ends, and starts again after so many milliseconds.
    Lose(NodeId, u64),
    /// A member that was added gets its disk and its process.
    Join(NodeId),
    /// A member that was removed ends.
    Retire(NodeId),
    Room(NodeId),
    Heal,
    End,
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
    pub(super) placements: u64,
    pub(super) drains: u64,
    pub(super) moves: u64,
    pub(super) quarantines: u64,
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
            placing: StdRng::seed_from_u64(seed ^ 0x91ac_1296),
            network: Network::default(),
            hosts: BTreeMap::new(),
            askers: BTreeMap::new(),
            watchers: BTreeMap::new(),
            balancers: BTreeMap::new(),
            dials: 0,
            history: History::default(),
            checks: Checks::default(),
            members: Vec::new(),
            feature_level: if params.mixed {
                rng.random_range(1..FEATURE_LEVEL)
            } else {
                FEATURE_LEVEL
            },
            newest_member: NodeId(u64::from(params.nodes)),
            injected: BTreeMap::new(),
            joint_trap: None,
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
            if self.params.mixed && self.rng.random_bool(0.5) {
                host.knows = self.feature_level;
            }
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
            let agent = Agent::new(format!("w{number}"));
            self.agent(Party::Agent(number), agent);
        }
        for number in 0..params.clients {
            self.person(Party::Client(number), Part::Client { config: None });
        }
        self.person(Party::Admin, Part::Admin);
        for number in 0..params.balancers {
            let party = Party::Balancer(number);
            let name = format!("b{number}");
            self.person(party, Part::Balancer { name, revision: 0 });
            self.watcher(party);
            let balancer = Balancer::new(self.rng.random());
            self.balancers.insert(number, balancer);
            self.at(2_000_000, Event::Data(Data::Arrives(number)));
        }
    }

    /// An agent's process, which follows the facts.
    pub(super) fn agent(&mut self, party: Party, agent: Agent) {
        let life = agent.life;
        self.person(party, Part::Agent(Box::new(agent)));
        self.watcher(party);
        self.at(self.now_us, Event::Data(Data::Agent { party, life }));
    }

    fn watcher(&mut self, party: Party) {
        let rng = StdRng::seed_from_u64(self.rng.random());
        let kept = self.askers.get_mut(&party).and_then(Asker::as_agent);
        let kept = kept.and_then(|agent| agent.kept.clone());
        let clock = self.clock();
        // Another of its name may have been there before.
        self.checks.watchers.forgot(party);
        self.watchers
            .insert(party, Watcher::new(Watch::new(kept, rng), clock));
        let soon = self.now_us + self.rng.random_range(0..10_000);
        self.at(soon, Event::Watch(party));
    }

    /// What the clock of one outside shows.
    pub(super) fn time_of(&self, party: Party) -> Now {
        let watcher = self.watchers.get(&party);
        watcher.map_or_else(Now::default, |watcher| watcher.clock.at(self.now_us))
    }

    pub(super) fn person(&mut self, party: Party, part: Part) {
        let asker = Asker::new(party, part, &mut self.rng);
        self.askers.insert(party, asker);
        let at = self.now_us + self.rng.random_range(0..2_000_000);
        self.at(at, Event::Wake(party, 0));
    }

    pub(super) fn clock(&mut self) -> Clock {
        let drift = self.params.drift_ppm;
        Clock {
            ahead: self.rng.random_range(0..1_000_000_000),
            drift_ppm: self.rng.random_range(-drift..=drift),
        }
    }

    pub(super) fn host(&mut self, id: NodeId) -> Host {
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
            knows: FEATURE_LEVEL,
            removed: false,
            group: None,
            group_before: None,
            jumped_at: None,
        }
    }

    pub(super) fn at(&mut self, at_us: u64, event: Event) {
        self.numbered += 1;
        self.queue
            .insert((at_us.max(self.now_us), self.numbered), Box::new(event));
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
                    placements: self.checks.force.taken,
                    drains: self.checks.drains.drained,
                    moves: self.checks.homes.moved,
                    quarantines: self.checks.suspects.quarantined,
                })
            }
        }
    }

    fn events(&mut self) -> Held {
        while let Some(((at, number), event)) = self.queue.pop_first() {
            self.now_us = at;
            self.events += 1;
            if self.events > MAX_EVENTS {
                return Err(Violation::new("runs", "events lead to events without end"));
            }
            self.note(number, &event);
            if matches!(*event, Event::End) {
                return self.end();
            }
            self.event(*event)?;
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
            Event::Wake(party, _) => (7, party_number(*party)),
            Event::Watch(watcher) => (8, party_number(*watcher)),
            Event::Data(data) => (18, data.number()),
            Event::Lose(node, _) => (19, node.0),
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
            Event::Watch(watcher) => {
                self.watch(watcher);
                Ok(())
            }
            Event::Data(data) => self.data(data),
            Event::Lose(node, back_ms) => {
                self.crash(node, false);
                self.at(self.now_us + back_ms * 1_000, Event::Start(node));
                Ok(())
            }
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
                self.retire(node);
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
        let leader = self.hosts.values().find(|host| host.leads());
        if let Some(process) = leader.and_then(|host| host.process.as_ref()) {
            let facts = process.publisher.facts();
            super::check::Drains::at_rest(&facts)?;
            super::check::Homes::at_rest(&facts)?;
        }
        let idle = self.idle_balancers();
        let members = self.members.iter();
        let whole = members.map(|member| self.hosts.get(&NodeId(member.id)));
        let whole = whole
            .into_iter()
            .flatten()
            .all(|host| host.process.is_some());
        Liveness::check(&Rest {
            nodes,
            stuck,
            watchers: self
                .watchers
                .keys()
                .filter(|party| self.askers.contains_key(party))
                .map(|party| (*party, self.checks.watchers.revision(*party)))
                .collect(),
            idle,
            feature_level: (self.params.mixed && whole).then_some(self.feature_level),
        })
    }
}

fn store_id(node: u64) -> [u8; 16] {
    let mut id = [9; 16];
    id[..8].copy_from_slice(&node.to_be_bytes());
    id
}

pub(super) fn record(id: u64) -> MemberRecord {
    MemberRecord {
        id: NodeId(id),
        name: format!("n{id}"),
        address: format!("n{id}:7400"),
        store_id: StoreId(store_id(id)),
    }
}

pub(super) fn member(record: &MemberRecord) -> Member {
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
        Answer::Renewed => 4,
        Answer::Superseded => 5,
        Answer::NotRegistered => 6,
        Answer::Begun => 7,
    }
}

fn party_number(party: Party) -> u64 {
    match party {
        Party::Client(number) => u64::from(number),
        Party::Agent(number) => 1 << 32 | u64::from(number),
        Party::Zombie(number) => 2 << 32 | u64::from(number),
        Party::Balancer(number) => 3 << 32 | u64::from(number),
        Party::Admin => 4 << 32,
    }
}

pub(super) fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
