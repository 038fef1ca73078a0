//! Clients, agents, balancers and the admin: what they ask next, and what they make of the answers.
//!
//! Each has one request under way, and asks as every process does: by a `Plan` of the control
//! plane's client, which asks a second node beside one that takes long. A command is repeated with the
//! same sequence number until it has an outcome or the plan gives up; then its outcome is unknown for
//! good.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_consensus::fleet::reign::{Asked, takes_capacity};
use forebay_consensus::node::MembersChange;
use forebay_control_client::core::error::NodeError;
use forebay_control_client::core::plan::{self, Plan};
use forebay_control_client::core::roster::Roster;
use forebay_proto::config::{Config, POLICIES, Pool};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::control;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{FEATURE_LEVEL, Identity, Incarnation, NodeId, Now, Revision, Role};
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use wire::command::Action;

use super::agent::Agent;
use super::history::{History, Op, Outcome};
use super::party::{Answer, Ask, Party};

/// The link to a node that has not answered for so long is dead.
const LINK_DIES_US: u64 = 1_000_000;
/// A request is given up after this.
const GIVE_UP: Duration = Duration::from_secs(6);
/// Agents and balancers renew as often, and wait no longer for one renewal.
const RENEW_EVERY: Duration = Duration::from_secs(1);

/// One who asks.
pub(super) struct Asker {
    pub(super) party: Party,
    /// Who it is on the wire: 16 bytes, drawn at its start.
    client: [u8; 16],
    sequence: u64,
    pub(super) role: Part,
    under_way: Option<UnderWay>,
    /// Number of the newest wake-up: earlier ones are passed over.
    wake: u64,
    /// Number of the newest attempt.
    attempt: u64,
    /// Who led when it was last answered.
    leader: Option<NodeId>,
    pub(super) silent_until: u64,
    /// When an operation last had an outcome.
    pub(super) done_at: u64,
}

/// What it is there for.
pub(super) enum Part {
    Client {
        /// The configuration that it last read.
        config: Option<(u64, u64)>,
    },
    Agent(Box<Agent>),
    Balancer {
        name: String,
        /// The newest revision that it works by.
        revision: u64,
    },
    Admin,
}

struct UnderWay {
    ask: Ask,
    /// Calls of the history that wait for the outcome.
    calls: Vec<usize>,
    kind: Doing,
    plan: Plan,
    /// By number: who was asked when, and whether its link still stands.
    asked: BTreeMap<u64, (NodeId, u64, bool)>,
}

/// A request that is to be made.
struct Request {
    ask: Ask,
    calls: Vec<usize>,
    kind: Doing,
}

#[derive(Clone, PartialEq)]
enum Doing {
    Read,
    Write,
    Register,
    Renew,
    Admin,
}

/// What to do now.
#[allow(clippy::large_enum_variant)] // few at a time, and moved at once
pub(super) enum Next {
    /// Send this to these nodes, each with its number, and wake the party at this time.
    Send {
        to: Vec<(NodeId, u64)>,
        ask: Ask,
        wake_us: u64,
    },
    Wake(u64),
    /// It is gone.
    End,
}

/// What parties know of the world: where nodes are, and the counters that make values unique.
pub(super) struct Outside<'a> {
    pub(super) now_us: u64,
    pub(super) think_us: u64,
    pub(super) nodes: &'a [NodeId],
    pub(super) agents: u32,
    /// The faults are over: workers are wanted ready, and engines stay up.
    pub(super) healing: bool,
    pub(super) rng: &'a mut StdRng,
    pub(super) history: &'a mut History,
    /// What the admin wants, if anything.
    pub(super) admin: Option<(Action, Option<MembersChange>)>,
    pub(super) transfer: Option<NodeId>,
}

impl Asker {
    pub(super) fn new(party: Party, role: Part, rng: &mut StdRng) -> Self {
        Self {
            party,
            client: rng.random(),
            sequence: 0,
            role,
            under_way: None,
            wake: 0,
            attempt: 0,
            leader: None,
            silent_until: 0,
            done_at: 0,
        }
    }

    /// What it is, if it is an agent.
    pub(super) fn as_agent(&mut self) -> Option<&mut Agent> {
        match &mut self.role {
            Part::Agent(agent) => Some(agent),
            Part::Client { .. } | Part::Balancer { .. } | Part::Admin => None,
        }
    }

    /// A balancer works by these facts from now on.
    pub(super) fn works_by(&mut self, newest: u64) {
        if let Part::Balancer { revision, .. } = &mut self.role {
            *revision = newest;
        }
    }

    /// Whether nothing of it is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.under_way.is_none()
    }

    /// Whether this wake-up is the newest one.
    pub(super) fn wakes(&self, number: u64) -> bool {
        self.wake == number
    }

    /// The number of the next wake-up, which takes the place of any before it.
    pub(super) fn wake_number(&mut self) -> u64 {
        self.wake += 1;
        self.wake
    }

    /// An agent's process starts again; `wiped`: on an empty disk.
    pub(super) fn restart(&mut self, wiped: bool, rng: &mut StdRng, history: &mut History) {
        if let Some(lost) = self.under_way.take() {
            history.unknown(&lost.calls);
        }
        self.client = rng.random();
        self.sequence = 0;
        if let Some(agent) = self.as_agent() {
            agent.restart(wiped);
        }
    }

    /// The party is awake: its time has come, or an answer was taken.
    pub(super) fn next(&mut self, world: &mut Outside<'_>) -> Next {
        if self.silent_until > world.now_us {
            return Next::Wake(self.silent_until);
        }
        if self.under_way.is_none() {
            let request = match &mut self.role {
                Part::Client { config } => {
                    let config = *config;
                    Some(self.client_operation(world, config))
                }
                Part::Agent(agent) if agent.superseded => return Next::End,
                Part::Agent(agent) => {
                    let what = agent.wants(clock(world.now_us), world.healing, world.rng);
                    Some(self.agent_operation(world, what))
                }
                Part::Balancer { name, revision } => {
                    let (name, revision) = (name.clone(), *revision);
                    Some(renewal(
                        Role::Balancer,
                        name,
                        None,
                        revision,
                        0,
                        (None, None),
                    ))
                }
                Part::Admin => self.admin_operation(world),
            };
            let Some(request) = request else {
                return Next::Wake(world.now_us + 500_000);
            };
            self.begin(world, request);
        }
        self.go_on(world)
    }

    fn begin(&mut self, world: &mut Outside<'_>, request: Request) {
        let now = clock(world.now_us);
        let mut roster = Roster::new(world.nodes.iter().map(|node| address(*node)));
        // Reads go to followers, too.
        let anywhere = request.kind == Doing::Read && world.rng.random_bool(0.7);
        if let Some(leader) = self.leader.filter(|_| !anywhere) {
            roster.led_by(&address(leader));
        }
        let patience = match request.kind {
            Doing::Renew => RENEW_EVERY,
            Doing::Read | Doing::Write | Doing::Register | Doing::Admin => GIVE_UP,
        };
        let rng = StdRng::seed_from_u64(world.rng.random());
        self.under_way = Some(UnderWay {
            ask: request.ask,
            calls: request.calls,
            kind: request.kind,
            plan: Plan::new(&roster, now, now + patience, rng),
            asked: BTreeMap::new(),
        });
    }

    /// Does what the plan says.
    fn go_on(&mut self, world: &mut Outside<'_>) -> Next {
        let Some(under_way) = &mut self.under_way else {
            return Next::Wake(world.now_us + world.think_us);
        };
        let now = clock(world.now_us);
        for (node, at, stands) in under_way.asked.values_mut() {
            if *stands && world.now_us - *at >= LINK_DIES_US {
                *stands = false;
                let problem = "its link died".into();
                let error = NodeError::Unreachable { problem };
                under_way.plan.failed(now, &address(*node), error);
            }
        }
        let mut to = Vec::new();
        loop {
            match under_way.plan.next(now) {
                plan::Next::Ask(asked) => {
                    let Ok(node) = asked.parse().map(NodeId) else {
                        continue;
                    };
                    self.attempt += 1;
                    let asked = (node, world.now_us, true);
                    under_way.asked.insert(self.attempt, asked);
                    to.push((node, self.attempt));
                }
                plan::Next::Wait(until) => {
                    let stand = under_way.asked.values().filter(|(_, _, stands)| *stands);
                    let dies = stand.map(|(_, at, _)| at + LINK_DIES_US).min();
                    let until = u64::try_from(until.since(Now::default()).as_micros());
                    let until = until.unwrap_or(u64::MAX).min(dies.unwrap_or(u64::MAX));
                    return Next::Send {
                        to,
                        ask: under_way.ask.clone(),
                        wake_us: until.max(world.now_us + 1),
                    };
                }
                plan::Next::GiveUp(_) => {
                    world.history.unknown(&under_way.calls);
                    self.under_way = None;
                    return Next::Wake(world.now_us + 1 + world.rng.random_range(0..200_000));
                }
            }
        }
    }

    fn command(&mut self, action: Action, registers: Option<String>) -> Asked {
        self.sequence += 1;
        let takes_capacity = takes_capacity(&action);
        let command = wire::Command {
            action: Some(action),
        };
        Asked {
            actor: wire::Actor {
                identity: format!("{:?}", self.party),
                address: String::new(),
            },
            client: Bytes::copy_from_slice(&self.client),
            sequence: self.sequence,
            command: command.encode_to_vec().into(),
            // Unique, so that the audit shows what was applied twice.
            reason: format!("{}#{}", hex(&self.client[..6]), self.sequence),
            registers,
            takes_capacity,
        }
    }

    fn client_operation(&mut self, world: &mut Outside<'_>, config: Option<(u64, u64)>) -> Request {
        let worker = format!("w{}", world.rng.random_range(0..world.agents));
        let begun = world.now_us;
        let who = self.number();
        let dice = world.rng.random_range(0..100);
        if dice < 45 || (dice < 75 && config.is_none()) {
            let mut calls = vec![
                world.history.call(who, "config", begun, Op::Read),
                world
                    .history
                    .call(who, &format!("spec {worker}"), begun, Op::Read),
            ];
            if worker != drained(world.agents) {
                let key = format!("desired {worker}");
                calls.push(world.history.call(who, &key, begun, Op::Read));
            }
            return Request {
                ask: Ask::Read,
                calls,
                kind: Doing::Read,
            };
        }
        let (action, call) = if let Some((revision, value)) = config.filter(|_| dice < 75) {
            let new = world.history.fresh();
            let action = Action::ApplyConfig(wire::ApplyConfig {
                config: configuration(new),
                expected_revision: revision,
            });
            let expected = (value != 0).then_some(value);
            let op = Op::CompareAndSet { expected, new };
            (action, world.history.call(who, "config", begun, op))
        } else {
            let value = if world.healing {
                1
            } else {
                world.rng.random_range(1..=3)
            };
            // What is wanted of that one is the admin's alone.
            let worker = if worker == drained(world.agents) {
                "w0".to_owned()
            } else {
                worker
            };
            let action = Action::SetDesired(wire::SetDesired {
                name: worker.clone(),
                desired: value,
                override_guard: world.rng.random_bool(0.8),
            });
            let op = Op::Write(u64::try_from(value).unwrap_or_default());
            let key = format!("desired {worker}");
            (action, world.history.call(who, &key, begun, op))
        };
        Request {
            ask: Ask::Propose {
                asked: self.command(action, None),
                change: None,
            },
            calls: vec![call],
            kind: Doing::Write,
        }
    }

    fn agent_operation(&mut self, world: &mut Outside<'_>, what: Wants) -> Request {
        let begun = world.now_us;
        let (name, held, start) = match what {
            Wants::Renew {
                name,
                incarnation,
                revision,
                observed,
                in_flight,
            } => {
                let work = control::Work {
                    in_flight,
                    ..control::Work::default()
                };
                if world.rng.random_bool(0.04) {
                    let accuse = accusation(world, incarnation);
                    return Request {
                        ask: Ask::Propose {
                            asked: self.command(accuse, None),
                            change: None,
                        },
                        calls: Vec::new(),
                        kind: Doing::Renew,
                    };
                }
                let heat = world.rng.random_bool(0.3).then(|| heat(world));
                let incarnation = Some(incarnation);
                return renewal(
                    Role::Agent,
                    name,
                    incarnation,
                    revision,
                    observed,
                    (Some(work), heat),
                );
            }
            Wants::Register { name, held, start } => (name, held, start),
        };
        // It declares itself, at its start or with another model.
        let value = world.history.fresh();
        let action = Action::Register(wire::RegisterWorker {
            name: name.clone(),
            spec: spec(value),
            held: held.map(Incarnation::to_wire),
            start,
            takeover: false,
        });
        let who = self.number();
        let key = format!("spec {name}");
        let call = world.history.call(who, &key, begun, Op::Write(value));
        Request {
            ask: Ask::Propose {
                asked: self.command(action, Some(name)),
                change: None,
            },
            calls: vec![call],
            kind: Doing::Register,
        }
    }

    fn admin_operation(&mut self, world: &mut Outside<'_>) -> Option<Request> {
        let ask = if let Some(to) = world.transfer.take() {
            Ask::Transfer { to }
        } else {
            let (action, change) = world.admin.take()?;
            Ask::Propose {
                asked: self.command(action, None),
                change,
            }
        };
        Some(Request {
            ask,
            calls: Vec::new(),
            kind: Doing::Admin,
        })
    }

    /// Takes an answer; returns when the party wakes.
    pub(super) fn answered(
        &mut self,
        number: u64,
        answer: &Answer,
        world: &mut Outside<'_>,
    ) -> Option<u64> {
        let now = world.now_us;
        let under_way = self.under_way.as_mut()?;
        let (node, _, stands) = under_way.asked.get_mut(&number)?;
        let node = *node;
        let error = match answer {
            Answer::NotLeader(leader) => Some(NodeError::NotLeader {
                leader: leader
                    .filter(|leader| world.nodes.contains(leader))
                    .map(address),
            }),
            Answer::Unknown => Some(NodeError::Unknown),
            _ => None,
        };
        if let Some(error) = error {
            if std::mem::take(stands) {
                under_way.plan.failed(clock(now), &address(node), error);
            }
            return Some(now);
        }
        let under_way = self.under_way.take()?;
        if under_way.kind != Doing::Read {
            self.leader = Some(node);
        }
        self.done_at = now;
        let mut pause = 1 + world.rng.random_range(0..=2 * world.think_us);
        match answer {
            Answer::Facts(facts) => self.read(facts, &under_way, world),
            Answer::Outcome { outcome, .. } => self.outcome(outcome, &under_way, world),
            Answer::Refused => world.history.never(&under_way.calls),
            Answer::Superseded => {
                if let Some(agent) = self.as_agent() {
                    agent.superseded = true;
                    agent.core = None;
                }
            }
            Answer::NotRegistered => {
                if let Some(agent) = self.as_agent() {
                    agent.registered = None;
                }
            }
            Answer::Renewed | Answer::Begun | Answer::NotLeader(_) | Answer::Unknown => {}
        }
        if matches!(under_way.kind, Doing::Renew | Doing::Register) {
            pause = u64::try_from(RENEW_EVERY.as_micros()).unwrap_or(u64::MAX);
        }
        Some(now + pause)
    }

    fn read(&mut self, facts: &Arc<wire::Facts>, under_way: &UnderWay, world: &mut Outside<'_>) {
        let value = configured(&facts.config);
        let mut results = vec![(value != 0).then_some(value)];
        // The two calls after the first are about one worker.
        let name = under_way
            .calls
            .get(1)
            .and_then(|call| world.history.key(*call).strip_prefix("spec "))
            .unwrap_or_default()
            .to_owned();
        let worker = facts.workers.iter().find(|worker| worker.name == name);
        results.push(worker.map(|worker| specified(&worker.spec)));
        // Of a worker that is not registered yet the default is wanted.
        let desired = worker.map_or(1, |worker| {
            u64::try_from(worker.desired).unwrap_or_default()
        });
        results.push(Some(desired));
        for (call, value) in under_way.calls.iter().zip(results) {
            world
                .history
                .returned(*call, world.now_us, Outcome::Read(value));
        }
        if let Part::Client { config } = &mut self.role {
            *config = Some((facts.config_revision, value));
        }
    }

    fn outcome(&mut self, outcome: &wire::Outcome, under_way: &UnderWay, world: &mut Outside<'_>) {
        use wire::outcome::Outcome as Wire;
        use wire::refusal::Reason;
        let call = under_way.calls.first().copied();
        match &outcome.outcome {
            Some(Wire::Done(done)) => {
                if let Some(call) = call {
                    let written = match world.history.is_compare(call) {
                        true => Outcome::Set,
                        false => Outcome::Written,
                    };
                    world.history.returned(call, world.now_us, written);
                }
                if let (Part::Agent(agent), Some(worker)) = (&mut self.role, &done.worker)
                    && let Ok(own) = Incarnation::from_wire(worker.incarnation.as_ref())
                {
                    agent.registered(own, Revision(done.revision));
                }
                if let Part::Client { config } = &mut self.role {
                    *config = None;
                }
            }
            Some(Wire::Refusal(refusal)) => {
                let conflict = matches!(refusal.reason, Some(Reason::RevisionConflict(_)));
                match call {
                    Some(call) if conflict => {
                        world
                            .history
                            .returned(call, world.now_us, Outcome::Conflict);
                    }
                    _ => world.history.never(&under_way.calls),
                }
                match (&mut self.role, &refusal.reason) {
                    (Part::Client { config }, _) => *config = None,
                    (Part::Agent(agent), Some(Reason::Superseded(_))) => agent.superseded = true,
                    _ => {}
                }
            }
            None => {}
        }
    }

    fn number(&self) -> u32 {
        match self.party {
            Party::Client(number) => number,
            Party::Agent(number) => 1_000 + number,
            Party::Zombie(number) => 2_000 + number,
            Party::Balancer(number) => 4_000 + number,
            Party::Admin => 3_000,
        }
    }
}

/// What an agent asks for next.
pub(super) enum Wants {
    Renew {
        name: String,
        incarnation: Incarnation,
        /// In force on it.
        revision: u64,
        observed: i32,
        in_flight: u32,
    },
    Register {
        name: String,
        held: Option<Incarnation>,
        start: u32,
    },
}

/// The worker that the admin drains; there are two at least.
pub(super) fn drained(agents: u32) -> String {
    format!("w{}", agents.saturating_sub(1))
}

/// Its engine died under a few of the same few requests.
fn accusation(world: &mut Outside<'_>, incarnation: Incarnation) -> Action {
    let accused = (1..=12).filter(|_| world.rng.random_bool(0.3));
    let accused: Vec<u64> = accused.collect();
    let accused = accused.into_iter().map(|key| wire::Accused {
        key,
        key_epoch: 1,
        tenant: "t".into(),
        model: "m".into(),
        shape: "chat, seed".into(),
        share: world.rng.random_range(1..=1_500),
    });
    Action::AccuseRequests(wire::AccuseRequests {
        incarnation: Some(incarnation.to_wire()),
        accused: accused.collect(),
        in_flight: 12,
    })
}

/// What an agent was asked for, now of the one families and now of others; and sometimes it is late, but
/// for when the world heals.
fn heat(world: &mut Outside<'_>) -> control::Heat {
    let families = (1..=4).map(|chunk| control::FamilyHeat {
        chunk,
        chunks: 4,
        tokens: 1_024,
        arrivals: world.rng.random_range(0..1_000),
        takes: world.rng.random_range(0..1_500),
        held: world.rng.random_bool(0.5),
        key_epoch: 1,
        pool: "default".into(),
        ..control::FamilyHeat::default()
    });
    let families = families.collect();
    let late = !world.healing && world.rng.random_bool(0.3);
    control::Heat {
        families,
        takes: world.rng.random_range(0..1_000),
        first_tokens: 10,
        in_time: if late { 0 } else { 10 },
        ..control::Heat::default()
    }
}

fn renewal(
    role: Role,
    name: String,
    incarnation: Option<Incarnation>,
    revision: u64,
    observed: i32,
    (work, heat): (Option<control::Work>, Option<control::Heat>),
) -> Request {
    Request {
        ask: Ask::Renew {
            who: Identity {
                trust_domain: "sim".into(),
                role,
                name,
            },
            renew: control::Renew {
                incarnation: incarnation.map(Incarnation::to_wire),
                applied_revision: revision,
                observed,
                feature_level: FEATURE_LEVEL,
                work,
                heat,
            },
        },
        calls: Vec::new(),
        kind: Doing::Renew,
    }
}

/// Those who ask have clocks of their own, which nobody compares with others'.
fn clock(world_us: u64) -> Now {
    Now::at(Duration::from_micros(world_us))
}

fn address(node: NodeId) -> String {
    node.0.to_string()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A configuration whose value is the limit of the one pool's queue.
fn configuration(value: u64) -> Bytes {
    let mut pool = Pool {
        queue_limit: u32::try_from(value).unwrap_or(u32::MAX),
        ..Pool::named("default")
    };
    if value.is_multiple_of(4) {
        // What no older version knows.
        pool.policy = POLICIES[POLICIES.len() - 1].into();
    }
    Config { pools: vec![pool] }.to_wire()
}

/// Zero for the built-in one.
fn configured(bytes: &Bytes) -> u64 {
    let built_in = Config::default();
    match Config::from_wire(bytes) {
        Ok(config) if config != built_in => config
            .pools
            .first()
            .map(|pool| u64::from(pool.queue_limit))
            .unwrap_or_default(),
        Ok(_) | Err(_) => 0,
    }
}

/// A worker's declaration whose value is its revision. It has a field that no version knows.
fn spec(value: u64) -> Bytes {
    let spec = WorkerSpec {
        pool: "default".into(),
        advertise: "h:1".into(),
        engine: "vllm".into(),
        models: vec!["m".into()],
        revision: value.to_string(),
        gpu_type: String::new(),
        gpu_count: 0,
        kv_tokens: 0,
        max_context_tokens: 0,
        adapters: vec![],
        zone: String::new(),
        labels: std::collections::BTreeMap::new(),
        slots: 4,
    };
    let mut bytes = spec.to_wire().to_vec();
    // Field 999, a number: what a later version might add.
    bytes.extend_from_slice(&[0xb8, 0x3e, 0x07]);
    bytes.into()
}

fn specified(bytes: &Bytes) -> u64 {
    WorkerSpec::from_wire(bytes)
        .ok()
        .and_then(|spec| spec.revision.parse().ok())
        .unwrap_or_default()
}
