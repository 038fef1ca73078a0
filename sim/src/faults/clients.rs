//! Clients, agents and the admin: what they ask next, and what they make of the answers.
//!
//! Each sends one request at a time. A command is repeated with the same sequence number until it has
//! an outcome or the client gives up; then its outcome is unknown for good.

use std::sync::Arc;

use bytes::Bytes;
use forebay_consensus::fleet::reign::Asked;
use forebay_consensus::node::MembersChange;
use forebay_proto::config::{Config, Pool};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::control;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Identity, Incarnation, NodeId, Role};
use prost::Message as _;
use rand::Rng as _;
use rand::rngs::StdRng;
use wire::command::Action;

use super::history::{History, Op, Outcome};
use super::party::{Answer, Ask, Party};

/// A request without an answer is sent again, elsewhere, after this.
pub(super) const ATTEMPT_US: u64 = 1_000_000;
/// And given up after this.
const GIVE_UP_US: u64 = 6_000_000;
/// A node that does not lead is asked again after this.
const PAUSE_US: u64 = 50_000;
/// An agent renews as often.
const RENEW_US: u64 = 1_000_000;

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
    /// Number of the newest attempt: older answers are passed over.
    attempt: u64,
    /// Who leads, as far as known.
    leader: Option<NodeId>,
    turn: usize,
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
    Agent(Agent),
    Admin,
}

/// An agent and what its disk holds.
#[derive(Clone)]
pub(super) struct Agent {
    pub(super) name: String,
    pub(super) held: Option<Incarnation>,
    pub(super) start: u32,
    registered: bool,
    revision: u64,
    /// Gone for good: a newer start was there.
    pub(super) superseded: bool,
}

struct UnderWay {
    ask: Ask,
    begun: u64,
    /// Calls of the history that wait for the outcome.
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
    /// Send this to this node, and wake the party at this time.
    Send {
        to: NodeId,
        number: u64,
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
            turn: rng.random_range(0..16),
            silent_until: 0,
            done_at: 0,
        }
    }

    pub(super) fn agent(index: u32) -> Part {
        Part::Agent(Agent {
            name: format!("w{index}"),
            held: None,
            start: 1,
            registered: false,
            revision: 0,
            superseded: false,
        })
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
        if let Part::Agent(agent) = &mut self.role {
            if wiped {
                agent.held = None;
                agent.start = 0;
            }
            agent.start += 1;
            agent.registered = false;
            agent.superseded = false;
        }
    }

    /// The party is awake: its time has come, or an answer was taken.
    pub(super) fn next(&mut self, world: &mut Outside<'_>) -> Next {
        if self.silent_until > world.now_us {
            return Next::Wake(self.silent_until);
        }
        if let Some(under_way) = &self.under_way {
            if world.now_us - under_way.begun >= GIVE_UP_US {
                let lost = self.under_way.take();
                world
                    .history
                    .unknown(&lost.map(|lost| lost.calls).unwrap_or_default());
            } else {
                return self.send(world);
            }
        }
        let begun = match &self.role {
            Part::Client { config } => {
                let config = *config;
                Some(self.client_operation(world, config))
            }
            Part::Agent(agent) if agent.superseded => return Next::End,
            Part::Agent(agent) => {
                let agent = agent.clone();
                Some(self.agent_operation(world, &agent))
            }
            Part::Admin => self.admin_operation(world),
        };
        let Some(begun) = begun else {
            return Next::Wake(world.now_us + 500_000);
        };
        self.under_way = Some(begun);
        self.send(world)
    }

    fn send(&mut self, world: &mut Outside<'_>) -> Next {
        let Some(under_way) = &self.under_way else {
            return Next::Wake(world.now_us + world.think_us);
        };
        let reads = under_way.kind == Doing::Read;
        let known = self.leader.filter(|_| !reads);
        let to = known.filter(|leader| world.nodes.contains(leader));
        let to = to.unwrap_or_else(|| {
            self.turn += 1;
            world.nodes[self.turn % world.nodes.len()]
        });
        self.leader = None;
        self.attempt += 1;
        Next::Send {
            to,
            number: self.attempt,
            ask: under_way.ask.clone(),
            wake_us: world.now_us + ATTEMPT_US,
        }
    }

    fn command(&mut self, action: Action, registers: Option<String>) -> Asked {
        self.sequence += 1;
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
        }
    }

    fn client_operation(
        &mut self,
        world: &mut Outside<'_>,
        config: Option<(u64, u64)>,
    ) -> UnderWay {
        let worker = format!("w{}", world.rng.random_range(0..world.agents));
        let begun = world.now_us;
        let who = self.number();
        let dice = world.rng.random_range(0..100);
        if dice < 45 || (dice < 75 && config.is_none()) {
            let calls = vec![
                world.history.call(who, "config", begun, Op::Read),
                world
                    .history
                    .call(who, &format!("spec {worker}"), begun, Op::Read),
                world
                    .history
                    .call(who, &format!("desired {worker}"), begun, Op::Read),
            ];
            return UnderWay {
                ask: Ask::Read,
                begun,
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
            let value = world.rng.random_range(1..=3);
            let action = Action::SetDesired(wire::SetDesired {
                name: worker.clone(),
                desired: value,
                override_guard: world.rng.random_bool(0.8),
            });
            let op = Op::Write(u64::try_from(value).unwrap_or_default());
            let key = format!("desired {worker}");
            (action, world.history.call(who, &key, begun, op))
        };
        UnderWay {
            ask: Ask::Propose {
                asked: self.command(action, None),
                change: None,
            },
            begun,
            calls: vec![call],
            kind: Doing::Write,
        }
    }

    fn agent_operation(&mut self, world: &mut Outside<'_>, agent: &Agent) -> UnderWay {
        let begun = world.now_us;
        let again = world.rng.random_bool(0.1);
        if agent.registered && !again {
            let observed = if world.rng.random_bool(0.9) {
                wire::Observed::Ready
            } else {
                wire::Observed::EngineDown
            };
            return UnderWay {
                ask: Ask::Renew {
                    who: Identity {
                        trust_domain: "sim".into(),
                        role: Role::Agent,
                        name: agent.name.clone(),
                    },
                    renew: control::Renew {
                        incarnation: agent.held.map(Incarnation::to_wire),
                        applied_revision: agent.revision,
                        observed: observed.into(),
                        feature_level: 2,
                    },
                },
                begun,
                calls: Vec::new(),
                kind: Doing::Renew,
            };
        }
        // It declares itself, at its start or with another model.
        let value = world.history.fresh();
        let action = Action::Register(wire::RegisterWorker {
            name: agent.name.clone(),
            spec: spec(value),
            held: agent.held.map(Incarnation::to_wire),
            start: agent.start,
            takeover: false,
        });
        let who = self.number();
        let key = format!("spec {}", agent.name);
        let call = world.history.call(who, &key, begun, Op::Write(value));
        UnderWay {
            ask: Ask::Propose {
                asked: self.command(action, Some(agent.name.clone())),
                change: None,
            },
            begun,
            calls: vec![call],
            kind: Doing::Register,
        }
    }

    fn admin_operation(&mut self, world: &mut Outside<'_>) -> Option<UnderWay> {
        let begun = world.now_us;
        let ask = if let Some(to) = world.transfer.take() {
            Ask::Transfer { to }
        } else {
            let (action, change) = world.admin.take()?;
            Ask::Propose {
                asked: self.command(action, None),
                change,
            }
        };
        Some(UnderWay {
            ask,
            begun,
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
        if number != self.attempt || self.under_way.is_none() {
            return None;
        }
        let now = world.now_us;
        match answer {
            Answer::NotLeader(leader) => {
                self.leader = *leader;
                let known = leader.is_some_and(|leader| world.nodes.contains(&leader));
                return Some(now + if known { 1_000 } else { PAUSE_US });
            }
            Answer::Unknown => return Some(now + PAUSE_US),
            _ => {}
        }
        let under_way = self.under_way.take()?;
        self.done_at = now;
        let mut pause = 1 + world.rng.random_range(0..=2 * world.think_us);
        match answer {
            Answer::Facts(facts) => self.read(facts, &under_way, world),
            Answer::Outcome { outcome, .. } => self.outcome(outcome, &under_way, world),
            Answer::Refused => world.history.never(&under_way.calls),
            Answer::Renewed { revision } => {
                if let Part::Agent(agent) = &mut self.role {
                    agent.revision = *revision;
                }
            }
            Answer::Superseded => {
                if let Part::Agent(agent) = &mut self.role {
                    agent.superseded = true;
                }
            }
            Answer::NotRegistered => {
                if let Part::Agent(agent) = &mut self.role {
                    agent.registered = false;
                }
            }
            Answer::Begun | Answer::NotLeader(_) | Answer::Unknown => {}
        }
        if matches!(self.role, Part::Agent(_))
            && matches!(under_way.kind, Doing::Renew | Doing::Register)
        {
            pause = RENEW_US;
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
                if let (Part::Agent(agent), Some(worker)) = (&mut self.role, &done.worker) {
                    agent.held = Incarnation::from_wire(worker.incarnation.as_ref()).ok();
                    agent.registered = true;
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
            Party::Admin => 3_000,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A configuration whose value is the limit of the one pool's queue.
fn configuration(value: u64) -> Bytes {
    let pool = Pool {
        queue_limit: u32::try_from(value).unwrap_or(u32::MAX),
        ..Pool::named("default")
    };
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
