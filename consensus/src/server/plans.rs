//! Planning a rebalance: what agents recorded is collected in the leader's memory, and a planner makes of
//! it what it can.
//!
//! One plan is made at a time. Agents of its pool are asked with the answers to their renewals, once for
//! each plan, and hand over what they recorded on a stream of its own. What is kept is bounded: so many
//! arrivals a plan, shared evenly among the workers that are asked, and only while the plan is made.
//! Whoever plans is handed in ([`Planner`]), because this crate decides nothing about placements.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forebay_proto::config::Config;
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::control::{self, failure::Failure};
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Incarnation, Millis, WorkerId};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::lifecycle::{Running, Shared};
use super::rpc::{bad, deadline, not_leader, overloaded};
use crate::fleet::MAX_MOVES;

/// How long agents have to hand over what they recorded: they renew once a second.
const COLLECT_FOR: Duration = Duration::from_secs(3);

/// Arrivals that one plan is made from.
const MOST_ARRIVALS: usize = 200_000;
/// Of them from one worker, at most and at least: more would be larger than what is read of an agent.
const MOST_OF_ONE: usize = 1_200;
const LEAST_OF_ONE: usize = 50;

/// How far back a plan looks, at least and at most: agents record ten minutes.
const WINDOW: std::ops::RangeInclusive<u64> = 10_000..=600_000;

/// Makes plans. It blocks for as long as it takes, on a thread of its own.
pub trait Planner: Send + Sync + 'static {
    /// What should move, and what comes of it, in `moves`, `before`, `after` and `measured`.
    fn plan(&self, question: Question) -> control::Planned;
}

/// What a plan is made from.
#[derive(Clone, Debug)]
pub struct Question {
    /// The pool.
    pub pool: String,
    /// How far back it looks.
    pub window: Millis,
    /// Most moves that are wanted.
    pub most_moves: u32,
    /// Families of the pool.
    pub families: Vec<wire::Family>,
    /// Workers of the pool that could take homes, by id.
    pub workers: Vec<Candidate>,
}

/// A worker of the pool that is ready.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its id.
    pub worker: WorkerId,
    /// Its name.
    pub name: String,
    /// What it said of its load lately.
    pub heat: Option<Arc<control::Heat>>,
    /// What it recorded; `None` of one that did not answer in time.
    pub record: Option<control::Arrivals>,
}

/// The plan that is made, if one is.
#[derive(Default)]
pub(crate) struct Plans {
    making: Mutex<Option<Making>>,
    /// The number of the newest plan.
    newest: AtomicU64,
    /// Wakes whoever waits for the last answer.
    complete: Notify,
}

struct Making {
    wanted: u64,
    window: Millis,
    most: u32,
    /// Who has not answered.
    missing: BTreeSet<Incarnation>,
    records: BTreeMap<WorkerId, control::Arrivals>,
    /// Agents are not asked any more.
    closed: bool,
}

/// The one plan that is made; another one may be when this is dropped.
struct Turn(Arc<Plans>);

impl Drop for Turn {
    fn drop(&mut self) {
        *self.0.making.lock() = None;
    }
}

impl Plans {
    /// What to ask this agent for with the answer to its renewal.
    pub(crate) fn wants(&self, incarnation: Incarnation, renewed: &mut control::Renewed) {
        let making = self.making.lock();
        let Some(making) = &*making else { return };
        if !making.closed && making.missing.contains(&incarnation) {
            renewed.wants_arrivals = making.wanted;
            renewed.window_ms = making.window.0;
            renewed.most = making.most;
        }
    }

    /// Takes what an agent recorded; what nobody asked for is passed over.
    pub(crate) fn take(&self, incarnation: Incarnation, mut told: control::Arrivals) {
        let mut held = self.making.lock();
        let Some(making) = &mut *held else { return };
        let asked = !making.closed && told.wanted == making.wanted;
        if !asked || !making.missing.remove(&incarnation) {
            return;
        }
        told.arrivals.truncate(making.most as usize);
        told.arrivals.shrink_to_fit();
        making.records.insert(incarnation.worker, told);
        if making.missing.is_empty() {
            self.complete.notify_one();
        }
    }

    /// Whether nobody is waited for.
    fn is_complete(&self) -> bool {
        let making = self.making.lock();
        making
            .as_ref()
            .is_none_or(|making| making.missing.is_empty())
    }

    /// Takes the turn to plan; `None` while another plan is made.
    fn begin(
        self: &Arc<Self>,
        now: Millis,
        window: Millis,
        ask: BTreeSet<Incarnation>,
    ) -> Option<Turn> {
        let mut making = self.making.lock();
        if making.is_some() {
            return None;
        }
        // Agents answer each number once, also those of leaders before: cell time never goes back.
        let wanted = now.0.max(self.newest.load(Ordering::Relaxed) + 1);
        self.newest.store(wanted, Ordering::Relaxed);
        let share = MOST_ARRIVALS / ask.len().max(1);
        *making = Some(Making {
            wanted,
            window,
            most: u32::try_from(share.clamp(LEAST_OF_ONE, MOST_OF_ONE)).unwrap_or(u32::MAX),
            missing: ask,
            records: BTreeMap::new(),
            closed: false,
        });
        Some(Turn(self.clone()))
    }

    /// Waits until everyone answered, or until then, and returns what was handed over.
    async fn collected(&self, until: Instant) -> BTreeMap<WorkerId, control::Arrivals> {
        let complete = async {
            while !self.is_complete() {
                self.complete.notified().await;
            }
        };
        // Who did not answer in time is silent: the plan is made without it.
        let _ = tokio::time::timeout_at(until, complete).await;
        let mut making = self.making.lock();
        making.as_mut().map_or_else(BTreeMap::new, |making| {
            making.closed = true;
            std::mem::take(&mut making.records)
        })
    }
}

/// Answers a request for a plan.
pub(crate) async fn plan(
    shared: &Shared,
    running: &Arc<Running>,
    asked: control::Plan,
) -> Result<control::Planned, Failure> {
    let until = deadline(asked.deadline_ms);
    if !running.leader.leads(until).await {
        let leader = running.replica.status().borrow().leader;
        return Err(not_leader(running, leader));
    }
    let planner = shared.planner.get().cloned();
    let planner = planner.ok_or_else(|| bad("this node has no planner: ask another one"))?;
    let facts = running.published.facts();
    let config = Config::from_wire(&facts.config).map_err(|error| bad(error.to_string()))?;
    if config.pool(&asked.pool).is_none() {
        return Err(bad(format!("there is no pool {}", asked.pool)));
    }
    let window = Millis(asked.window_ms.clamp(*WINDOW.start(), *WINDOW.end()));
    let ready = ready(&facts, &asked.pool);
    let ask = ready.iter().map(|(incarnation, _)| *incarnation).collect();
    let now = running.leader.cell_time();
    let turn = running.plans.begin(now, window, ask);
    let turn = turn.ok_or_else(|| overloaded("plans that are made"))?;
    let patience = (Instant::now() + COLLECT_FOR).min(until);
    let mut records = running.plans.collected(patience).await;
    let candidates = running.leader.with_leases(|leases, now| {
        let candidate = |(incarnation, name): (Incarnation, String)| Candidate {
            worker: incarnation.worker,
            heat: leases.heat(now, &name),
            record: records.remove(&incarnation.worker),
            name,
        };
        ready.into_iter().map(candidate).collect::<Vec<_>>()
    });
    // Homes may have moved while agents were asked.
    let facts = running.published.facts();
    let families = facts.families.iter();
    let families = families.filter(|family| family.pool == asked.pool);
    let question = Question {
        window,
        most_moves: asked.most_moves.clamp(1, MAX_MOVES as u32),
        families: families.cloned().collect(),
        workers: candidates,
        pool: asked.pool,
    };
    let silent = question.workers.iter().filter(|one| one.record.is_none());
    let silent: Vec<String> = silent.map(|one| one.name.clone()).collect();
    let known = question.families.clone();
    // The turn ends with the planner, not with the patience of who asked.
    let made = tokio::task::spawn_blocking(move || {
        let planned = planner.plan(question);
        drop(turn);
        planned
    });
    let mut planned = match tokio::time::timeout_at(until, made).await {
        Ok(Ok(planned)) => planned,
        Ok(Err(_)) => return Err(bad("the planner failed: see the log of this node")),
        Err(_) => return Err(overloaded("the planner of this node")),
    };
    let about: BTreeSet<u64> = planned.moves.iter().map(|one| one.chunk).collect();
    planned.families = known
        .into_iter()
        .filter(|family| about.contains(&family.chunk))
        .collect();
    planned.silent = silent;
    planned.revision = facts.revision;
    Ok(planned)
}

/// The pool's workers that take requests, by all that is agreed.
fn ready(facts: &wire::Facts, pool: &str) -> Vec<(Incarnation, String)> {
    let workers = facts.workers.iter().filter(|worker| {
        worker.desired() == wire::Desired::Ready
            && worker.observed() == wire::Observed::Ready
            && !worker.lost
            && !worker.departed
    });
    let ready = workers.filter_map(|worker| {
        let spec = WorkerSpec::from_wire(&worker.spec).ok()?;
        let incarnation = Incarnation::from_wire(worker.incarnation.as_ref()).ok()?;
        (spec.pool == pool).then(|| (incarnation, worker.name.clone()))
    });
    let mut ready: Vec<_> = ready.collect();
    ready.sort_unstable();
    ready
}
