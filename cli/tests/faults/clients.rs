//! Those who write and read all the while: operators, who edit the configuration and say what they
//! want of workers, and agents, who declare what their workers are.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use forebay_control_client::{ClientError, ControlClient, Done, Facts};
use forebay_proto::config::{Config, Pool};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet::{
    ApplyConfig, Desired, RegisterWorker, SetDesired, command::Action,
};
use forebay_proto::{Incarnation, Level, Role};
use forebay_sim::linear::{Op, Outcome};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;

use crate::cell::Cell;
use crate::history::{Ended, History, call};

const WORKERS: u32 = 3;
const OPERATORS: u32 = 5;
/// Of one call, drawn: then its outcome is unknown for good. Some wait out an election, some do not.
const DEADLINE_MS: std::ops::Range<u64> = 200..2_500;
/// Between two calls of one client, at most.
const PAUSE_MS: u64 = 60;

pub struct Clients {
    history: Arc<History>,
    stop: Arc<AtomicBool>,
    /// Writes that were acknowledged, by client.
    written: Vec<Arc<AtomicU64>>,
    tasks: Vec<JoinHandle<()>>,
}

struct Asker {
    number: u32,
    client: ControlClient,
    history: Arc<History>,
    written: Arc<AtomicU64>,
    /// Commands so far: makes the reason of each unique.
    asked: u64,
    rng: StdRng,
}

impl Clients {
    /// Registers the workers, and has everybody begin.
    pub async fn start(cell: &Cell, rng: &mut StdRng) -> Self {
        let mut clients = Self {
            history: Arc::new(History::new()),
            stop: Arc::default(),
            written: vec![],
            tasks: vec![],
        };
        for worker in 0..WORKERS {
            let name = format!("w{worker}");
            let mut agent = clients.asker(cell, Role::Agent, &name, rng);
            let mut held = None;
            while held.is_none() {
                held = agent.register(&name, None).await;
            }
            let stop = clients.stop.clone();
            clients.tasks.push(tokio::spawn(async move {
                let mut held = held;
                while !stop.load(Ordering::Relaxed) {
                    held = agent.register(&name, held).await;
                    agent.pause().await;
                }
            }));
        }
        // What is wanted of a worker at first is known, so that reads have something to be equal to.
        let mut first = clients.asker(cell, Role::Operator(Level::Admin), "first", rng);
        for worker in 0..WORKERS {
            first
                .set_desired(&format!("w{worker}"), Desired::Ready)
                .await;
        }
        for number in 0..OPERATORS {
            let name = format!("o{number}");
            let mut operator = clients.asker(cell, Role::Operator(Level::Admin), &name, rng);
            let stop = clients.stop.clone();
            clients.tasks.push(tokio::spawn(async move {
                let mut config = None;
                while !stop.load(Ordering::Relaxed) {
                    operator.operate(&mut config).await;
                    operator.pause().await;
                }
            }));
        }
        clients
    }

    fn asker(&mut self, cell: &Cell, role: Role, name: &str, rng: &mut StdRng) -> Asker {
        let written = Arc::new(AtomicU64::new(0));
        self.written.push(written.clone());
        Asker {
            number: u32::try_from(self.written.len()).unwrap(),
            client: cell.client(role, name, cell.addresses()),
            history: self.history.clone(),
            written,
            asked: 0,
            rng: StdRng::seed_from_u64(rng.random()),
        }
    }

    /// Waits until each client had a write acknowledged that it began after this call.
    pub async fn all_write_again(&self, limit: Duration) {
        let count = || self.written.iter().map(|one| one.load(Ordering::Relaxed));
        let before: Vec<u64> = count().collect();
        let again = async {
            // The one after the write that may be under way; the client of the beginning is done.
            while !count()
                .zip(&before)
                .enumerate()
                .all(|(at, (after, before))| {
                    at == usize::try_from(WORKERS).unwrap() || after >= before + 2
                })
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let in_time = tokio::time::timeout(limit, again).await.is_ok();
        let after: Vec<u64> = count().collect();
        assert!(
            in_time,
            "not all write within {limit:?}: {before:?}, then {after:?}"
        );
    }

    /// Ends all clients, each after its call under way.
    pub async fn stop(self) -> Arc<History> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.history
    }
}

impl Asker {
    async fn pause(&mut self) {
        let pause = self.rng.random_range(1..=PAUSE_MS);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    fn deadline(&mut self) -> Duration {
        Duration::from_millis(self.rng.random_range(DEADLINE_MS))
    }

    async fn operate(&mut self, config: &mut Option<(u64, Option<u64>)>) {
        let worker = format!("w{}", self.rng.random_range(0..WORKERS));
        match self.rng.random_range(0..10) {
            0..3 => {
                let desired = [Desired::Ready, Desired::Cordoned, Desired::Draining];
                let desired = desired[self.rng.random_range(0..desired.len())];
                self.set_desired(&worker, desired).await;
            }
            3..6 if config.is_some() => {
                let (revision, expected) = config.take().unwrap_or_default();
                self.apply_config(revision, expected).await;
            }
            _ => *config = self.read(&worker).await,
        }
    }

    /// Reads, and remembers the configuration for the edit that follows.
    async fn read(&mut self, worker: &str) -> Option<(u64, Option<u64>)> {
        let deadline = self.deadline();
        let called = self.history.now();
        let Ok(facts) = self.client.read(deadline).await else {
            self.history.ended(Ended::Failed, []);
            return None;
        };
        let at = self.history.now();
        let (spec, desired) = (specified(&facts, worker), wanted(&facts, worker));
        let calls = [
            ("config".to_owned(), configured(&facts)),
            (format!("spec {worker}"), spec),
            (format!("desired {worker}"), desired),
        ];
        let calls = calls.map(|(key, value)| {
            let returned = Some((at, Outcome::Read(value)));
            call((self.number, &key, called), Op::Read, returned)
        });
        self.history.ended(Ended::Ok, calls);
        Some((facts.config_revision.0, configured(&facts)))
    }

    async fn apply_config(&mut self, revision: u64, expected: Option<u64>) {
        let new = self.history.fresh();
        let action = Action::ApplyConfig(ApplyConfig {
            config: configuration(new).to_wire(),
            expected_revision: revision,
        });
        let op = Op::CompareAndSet { expected, new };
        let _ = self.write("config", op, Outcome::Set, action).await;
    }

    async fn set_desired(&mut self, worker: &str, desired: Desired) {
        let action = Action::SetDesired(SetDesired {
            name: worker.to_owned(),
            desired: desired.into(),
            override_guard: true,
        });
        let op = Op::Write(i32::from(desired).try_into().unwrap());
        let key = format!("desired {worker}");
        let _ = self.write(&key, op, Outcome::Written, action).await;
    }

    /// Declares the worker anew; returns the incarnation to do so with next time.
    async fn register(&mut self, name: &str, held: Option<Incarnation>) -> Option<Incarnation> {
        let value = self.history.fresh();
        let action = Action::Register(RegisterWorker {
            name: name.to_owned(),
            spec: spec(value).to_wire(),
            held: held.map(Incarnation::to_wire),
            start: 0,
            takeover: true,
        });
        let key = format!("spec {name}");
        let done = self
            .write(&key, Op::Write(value), Outcome::Written, action)
            .await;
        match done {
            Ok(done) => done.worker.map(|worker| worker.incarnation),
            // A registration without an answer may have given another one.
            Err(ClientError::Refused(_)) => None,
            Err(_) => held,
        }
    }

    async fn write(
        &mut self,
        key: &str,
        op: Op,
        success: Outcome,
        action: Action,
    ) -> Result<Done, ClientError> {
        let deadline = self.deadline();
        self.asked += 1;
        let reason = format!("{}#{}", self.number, self.asked);
        let called = self.history.now();
        let done = self.client.propose(action, &reason, deadline).await;
        let at = self.history.now();
        let (ended, returned) = match &done {
            Ok(_) => (Ended::Ok, Some((at, success))),
            Err(ClientError::Refused(Refusal::RevisionConflict { .. })) => {
                (Ended::Ok, Some((at, Outcome::Conflict)))
            }
            Err(ClientError::Refused(_)) => (Ended::Failed, None),
            Err(ClientError::NoQuorum { .. } | ClientError::DeadlineExceeded { .. }) => {
                (Ended::Unknown, None)
            }
            Err(other) => panic!("client {}: {other}", self.number),
        };
        if done.is_ok() {
            self.written.fetch_add(1, Ordering::Relaxed);
        }
        let asked = call((self.number, key, called), op, returned);
        if matches!(ended, Ended::Ok) {
            self.history.acknowledged(reason);
        }
        // A refusal is certain: no such call was made of the register.
        let calls = (!matches!(ended, Ended::Failed)).then_some(asked);
        self.history.ended(ended, calls);
        done
    }
}

/// A configuration whose value is the limit of the one pool's queue.
fn configuration(value: u64) -> Config {
    let pool = Pool {
        queue_limit: value.try_into().unwrap(),
        ..Pool::named("default")
    };
    Config { pools: vec![pool] }
}

fn configured(facts: &Facts) -> Option<u64> {
    let limit = facts.config.pools[0].queue_limit;
    (facts.config_revision.0 != 0).then_some(limit.into())
}

/// A worker's declaration whose value is its revision.
fn spec(value: u64) -> WorkerSpec {
    WorkerSpec {
        pool: "default".into(),
        advertise: "127.0.0.1:7420".into(),
        engine: "emulated".into(),
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
    }
}

fn specified(facts: &Facts, worker: &str) -> Option<u64> {
    let worker = facts.workers.get(worker)?;
    worker.spec.revision.parse().ok()
}

fn wanted(facts: &Facts, worker: &str) -> Option<u64> {
    let worker = facts.workers.get(worker)?;
    u64::try_from(i32::from(worker.desired)).ok()
}
