//! Commands as lines of text, so that tests read as transcripts.
//!
//! ```text
//! register w1 pool=default models=m held=1.4.0 start=1 renewed=500 age=0 takeover spec=variant
//! observe 1.4.1 ready ack=9
//! goodbye 1.4.1
//! set w1 cordoned override
//! remove w1 override
//! config default,other expected=0
//! expire 1.4.1:12000 correlated=default
//! rotate 0 key=0123456789abcdef
//! cordon w1,w2 loads=1:3,2:0 ignore dry
//! uncordon w1
//! drain w1,w2 deadline=100 cancel loads=1:3
//! call-off d7 uncordon
//! deadline d7
//! homes f=1,2:90 e=3 gone=d as_of=9 pool=default
//! rebalance f:1>2 e:0>3 every=100 below=900 pool=default dry
//! step r7 0
//! stop r7
//! call-rebalance-off r7 dry
//! ```

use std::collections::BTreeMap;

use bytes::Bytes;
use forebay_proto::config::{Config, Pool};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::Incarnation;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{ClientId, ClusterId, FEATURE_LEVEL};
use prost::Message;
use wire::command::Action;

use super::{Applied, Fleet};

/// A fleet and the log that leads to it.
pub(super) struct World {
    pub(super) fleet: Fleet,
    pub(super) log: Vec<Bytes>,
    pub(super) deltas: Vec<wire::Delta>,
}

impl World {
    pub(super) fn new() -> Self {
        Self {
            fleet: Fleet::bootstrap(ClusterId([1; 16]), vec![]).with_feature_level(FEATURE_LEVEL),
            log: vec![],
            deltas: vec![],
        }
    }

    /// Index that the next entry gets.
    pub(super) fn next(&self) -> u64 {
        self.log.len() as u64 + 1
    }

    pub(super) fn apply(&mut self, entry: impl Into<Bytes>) -> Applied {
        let (index, entry) = (self.next(), entry.into());
        let applied = self.fleet.apply(index, &entry);
        self.log.push(entry);
        self.deltas.extend(applied.delta.clone());
        applied
    }

    pub(super) fn run(&mut self, line: &str) -> String {
        let entry = entry(line, 7, self.next());
        shown(&self.apply(entry))
    }
}

/// Runs each line and compares what came of it with what stands behind `->`.
pub(super) fn check(transcript: &str) -> World {
    let mut world = World::new();
    for line in transcript.lines().map(str::trim) {
        let Some((command, expected)) = line.split_once("->") else {
            assert!(line.is_empty(), "no -> in {line:?}");
            continue;
        };
        let (command, expected) = (command.trim(), expected.trim());
        let index = world.next();
        assert_eq!(world.run(command), expected, "entry {index}: {command}");
    }
    world
}

pub(super) fn shown(applied: &Applied) -> String {
    match applied.outcome.outcome.clone().unwrap() {
        wire::outcome::Outcome::Done(done) => {
            assert_eq!(done.unchanged, applied.delta.is_none());
            let what = if done.unchanged { "unchanged" } else { "done" };
            let worker = done.worker.and_then(|worker| worker.incarnation);
            let worker = worker.map(|i| format!(" {}.{}.{}", i.worker, i.grant, i.start));
            let drain = (done.drain > 0).then(|| format!(" d{}", done.drain));
            let rebalance = (done.rebalance > 0).then(|| format!(" r{}", done.rebalance));
            let affected = (done.affected > 0).then(|| format!(" +{}", done.affected));
            [Some(what.into()), worker, drain, rebalance, affected]
                .into_iter()
                .flatten()
                .collect()
        }
        wire::outcome::Outcome::Refusal(refusal) => {
            assert_eq!(applied.delta, None);
            match Refusal::from_wire(refusal).unwrap() {
                Refusal::Invalid { path, .. } => format!("invalid {path}"),
                other => other.name().into(),
            }
        }
    }
}

/// An entry of this client and sequence number.
pub(super) fn entry(line: &str, client: u8, sequence: u64) -> Bytes {
    let words: Vec<&str> = line.split_whitespace().collect();
    let given: BTreeMap<&str, &str> = words.iter().filter_map(|w| w.split_once('=')).collect();
    let number = |key: &str| given.get(key).map(|n| n.parse::<u64>().unwrap());
    let flag = |flag: &str| words.contains(&flag);
    let action = match words[0] {
        "register" => Action::Register(wire::RegisterWorker {
            name: words[1].into(),
            spec: spec(&given),
            held: given.get("held").map(|held| incarnation(held)),
            start: number("start").unwrap_or(0) as u32,
            takeover: flag("takeover"),
        }),
        "observe" => Action::Observe(wire::ObserveWorker {
            incarnation: Some(incarnation(words[1])),
            observed: match words[2] {
                "joining" => 1,
                "ready" => 2,
                "cordoned" => 3,
                "draining" => 4,
                "drained" => 5,
                other => other.parse().unwrap(),
            },
            acknowledged_revision: number("ack").unwrap_or(0),
        }),
        "goodbye" => Action::Goodbye(wire::Goodbye {
            incarnation: Some(incarnation(words[1])),
        }),
        "set" => Action::SetDesired(wire::SetDesired {
            name: words[1].into(),
            desired: match words[2] {
                "ready" => 1,
                "cordoned" => 2,
                "draining" => 3,
                other => other.parse().unwrap(),
            },
            override_guard: flag("override"),
        }),
        "remove" => Action::Remove(wire::RemoveWorker {
            name: words[1].into(),
            override_guard: flag("override"),
        }),
        "config" => Action::ApplyConfig(wire::ApplyConfig {
            config: config(words[1]),
            expected_revision: number("expected").unwrap_or(0),
        }),
        "expire" => Action::Expire(wire::ExpireLeases {
            evidence: words[1..]
                .iter()
                .filter_map(|word| word.split_once(':'))
                .map(|(who, silent)| wire::LeaseEvidence {
                    incarnation: Some(incarnation(who)),
                    silent_ms: silent.parse().unwrap(),
                })
                .collect(),
            correlated: given
                .get("correlated")
                .map(|pools| pools.split(',').map(Into::into).collect())
                .unwrap_or_default(),
        }),
        "rotate" => Action::RotateKey(wire::RotateKey {
            expected_epoch: words[1].parse().unwrap(),
            key: given["key"].as_bytes().to_vec().into(),
        }),
        "cordon" | "uncordon" => Action::SetDesiredOf(wire::SetDesiredOf {
            names: list(words[1]),
            desired: if words[0] == "cordon" {
                wire::Desired::Cordoned.into()
            } else {
                wire::Desired::Ready.into()
            },
            ignore_capacity_guard: flag("ignore"),
            dry_run: flag("dry"),
        }),
        "drain" => Action::StartDrain(wire::StartDrain {
            names: list(words[1]),
            deadline_ms: number("deadline").unwrap_or(0),
            on_deadline: if flag("cancel") { 2 } else { 1 },
            ignore_capacity_guard: flag("ignore"),
            dry_run: flag("dry"),
        }),
        "call-off" => Action::CancelDrain(wire::CancelDrain {
            id: words[1][1..].parse().unwrap(),
            uncordon: flag("uncordon"),
            dry_run: flag("dry"),
        }),
        "deadline" => Action::PassDrainDeadline(wire::PassDrainDeadline {
            id: words[1][1..].parse().unwrap(),
        }),
        "homes" => Action::AssignHomes(wire::AssignHomes {
            put: words[1..]
                .iter()
                .filter_map(|word| family(word, &given))
                .collect(),
            remove: given.get("gone").map_or(vec![], |gone| {
                gone.split(',').map(|chunk| hex(chunk).unwrap()).collect()
            }),
            as_of: number("as_of").unwrap_or(u64::MAX),
        }),
        "rebalance" => Action::StartRebalance(wire::StartRebalance {
            pool: (*given.get("pool").unwrap_or(&"default")).into(),
            moves: words[1..].iter().filter_map(|word| moved(word)).collect(),
            before: None,
            after: None,
            interval_ms: number("every").unwrap_or(100) as u32,
            stop_below: number("below").unwrap_or(0) as u32,
            dry_run: flag("dry"),
        }),
        "step" => Action::StepRebalance(wire::StepRebalance {
            id: words[1][1..].parse().unwrap(),
            step: words[2].parse().unwrap(),
        }),
        "stop" => Action::StopRebalance(wire::StopRebalance {
            id: words[1][1..].parse().unwrap(),
            why: "too late".into(),
        }),
        "call-rebalance-off" => Action::CancelRebalance(wire::CancelRebalance {
            id: words[1][1..].parse().unwrap(),
            dry_run: flag("dry"),
        }),
        "accuse" => Action::AccuseRequests(wire::AccuseRequests {
            incarnation: Some(incarnation(words[1])),
            accused: words[2..].iter().filter_map(|word| accused(word)).collect(),
            in_flight: 9,
        }),
        "clear" => Action::ClearRequests(wire::ClearRequests {
            incarnation: Some(incarnation(words[1])),
            keys: words[2..].iter().map(|key| hex(key).unwrap()).collect(),
        }),
        "lift" => Action::LiftQuarantine(wire::LiftQuarantine {
            keys: words[1..].iter().filter_map(|key| hex(key)).collect(),
            dry_run: flag("dry"),
        }),
        "forget" => Action::ForgetSuspects(wire::ForgetSuspects {}),
        other => panic!("no command {other}"),
    };
    let command = wire::Command {
        action: Some(action),
    };
    let evidence = (!flag("unproven")).then(|| wire::Evidence {
        age_ms: number("age").unwrap_or(0) as u32,
        renewed_ms_ago: number("renewed"),
        loads: loads(given.get("loads").copied()),
    });
    proposal(command.encode_to_vec().into(), client, sequence, evidence)
}

fn hex(chunk: &str) -> Option<u64> {
    u64::from_str_radix(chunk, 16).ok()
}

/// `f=1,2:90`: the family of chunk 15 with these homes, whose requests take 90.
fn family(word: &str, given: &BTreeMap<&str, &str>) -> Option<wire::Family> {
    let (chunk, homes) = word.split_once('=')?;
    let chunk = hex(chunk)?;
    let (homes, takes) = homes.split_once(':').unwrap_or((homes, "10"));
    Some(wire::Family {
        pool: (*given.get("pool").unwrap_or(&"default")).into(),
        chunk,
        key_epoch: 1,
        chunks: 4,
        tokens: 400,
        homes: homes.split(',').map(|home| home.parse().unwrap()).collect(),
        saves: 10,
        takes: takes.parse().unwrap(),
        pinned: false,
    })
}

/// `f:500`: half of a death is held against request 15.
fn accused(word: &str) -> Option<wire::Accused> {
    let (key, share) = word.split_once(':')?;
    Some(wire::Accused {
        key: hex(key)?,
        key_epoch: 1,
        tenant: "t".into(),
        model: "m".into(),
        shape: "chat, seed".into(),
        share: share.parse().unwrap(),
    })
}

/// `f:1>2`: the family of chunk 15 from worker 1 to worker 2; 0 is none.
fn moved(word: &str) -> Option<wire::Move> {
    let (chunk, ends) = word.split_once(':')?;
    let (from, to) = ends.split_once('>')?;
    Some(wire::Move {
        chunk: hex(chunk)?,
        from: from.parse().unwrap(),
        to: to.parse().unwrap(),
    })
}

fn list(words: &str) -> Vec<String> {
    let words = words.split(',').filter(|word| !word.is_empty());
    words.map(Into::into).collect()
}

/// `1:3,2:0`: three in flight on worker 1, none on worker 2, the others unheard. Without: all idle.
fn loads(given: Option<&str>) -> Vec<wire::WorkerLoad> {
    let load = |worker, in_flight| wire::WorkerLoad {
        worker,
        in_flight,
        age_ms: 0,
    };
    match given {
        None => (1..=9).map(|worker| load(worker, 0)).collect(),
        Some(given) => given
            .split(',')
            .filter_map(|one| one.split_once(':'))
            .map(|(worker, n)| load(worker.parse().unwrap(), n.parse().unwrap()))
            .collect(),
    }
}

pub(super) fn proposal(
    command: Bytes,
    client: u8,
    sequence: u64,
    evidence: Option<wire::Evidence>,
) -> Bytes {
    wire::Proposal {
        at_ms: sequence * 10,
        actor: Some(wire::Actor {
            identity: "operator/admin/alice".into(),
            address: "10.0.0.1:5".into(),
        }),
        client: ClientId([client; 16]).to_wire(),
        sequence,
        command,
        reason: "a reason".into(),
        evidence,
    }
    .encode_to_vec()
    .into()
}

pub(super) fn config(pools: &str) -> Bytes {
    let pools = pools.split(',').map(Pool::named).collect();
    Config { pools }.to_wire()
}

fn spec(given: &BTreeMap<&str, &str>) -> Bytes {
    let list = |key: &str, default: &str| {
        let list = *given.get(key).unwrap_or(&default);
        list.split(',')
            .filter(|m| !m.is_empty())
            .map(Into::into)
            .collect()
    };
    WorkerSpec {
        pool: (*given.get("pool").unwrap_or(&"default")).into(),
        advertise: (*given.get("advertise").unwrap_or(&"h:1")).into(),
        engine: "vllm".into(),
        models: list("models", "m"),
        revision: (*given.get("spec").unwrap_or(&"")).into(),
        gpu_type: String::new(),
        gpu_count: 0,
        kv_tokens: 0,
        max_context_tokens: 0,
        adapters: vec![],
        zone: String::new(),
        labels: BTreeMap::new(),
        slots: 4,
    }
    .to_wire()
}

fn incarnation(text: &str) -> Incarnation {
    let parts: Vec<u64> = text.split('.').map(|part| part.parse().unwrap()).collect();
    Incarnation {
        worker: parts[0] as u32,
        grant: parts[1],
        start: parts[2] as u32,
    }
}
