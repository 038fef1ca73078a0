//! Why the fleet refuses a command: data for programs, and one sentence that says what to do.

use crate::drain::DrainId;
use crate::home::RebalanceId;
use crate::ids::{Incarnation, WorkerId};
use crate::suspect::suspect_name;
use crate::wire::fleet as wire;
use wire::refusal::Reason;

/// Why a command was refused. The facts are unchanged; the refusal is audited like a success.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A newer start of this worker is registered, or this one said goodbye.
    #[error(
        "{asked} is superseded: {current} is registered. A newer process of this worker runs, or this one said goodbye; stop this one, or start it again to count a new start"
    )]
    Superseded {
        /// Who asked.
        asked: Incarnation,
        /// Who is registered.
        current: Incarnation,
    },
    /// A live process holds this name, and the caller cannot show that it is the same disk.
    #[error(
        "a process named {name} is alive (it renewed {renewed_ms_ago} ms ago): stop it, choose another name, or start with --takeover if that process is known to be gone"
    )]
    StillLive {
        /// The worker's name.
        name: String,
        /// When the other process was last heard.
        renewed_ms_ago: u64,
    },
    /// No worker of this name or id is registered.
    #[error(
        "no worker {name} is registered: look at `forebay workers`. An agent whose worker was removed joins anew from an empty data directory"
    )]
    UnknownWorker {
        /// Its name, or its id as text.
        name: String,
    },
    /// The configuration has no such pool.
    #[error(
        "there is no pool {pool}: add it with `forebay config apply`, or give the agent one of `forebay config show`"
    )]
    UnknownPool {
        /// The pool asked for.
        pool: String,
    },
    /// Nobody would be left to serve a model.
    #[error(
        "model {model} would be left without a ready worker in pool {pool}: add or make ready another worker first, or override the guard"
    )]
    LeavesModelEmpty {
        /// The model.
        model: String,
        /// The pool.
        pool: String,
    },
    /// The document was changed since it was read.
    #[error(
        "the configuration is at r{current}, this edit began at r{expected}: read it again and repeat the edit"
    )]
    RevisionConflict {
        /// Revision the edit began from.
        expected: u64,
        /// Revision that holds.
        current: u64,
    },
    /// The command is not well-formed.
    #[error("{path}: {problem}")]
    Invalid {
        /// Where.
        path: String,
        /// What, and what to do.
        problem: String,
    },
    /// What the leader knew when it proposed this is too old to act on.
    #[error("the evidence is {age_ms} ms old, at most {limit_ms} ms are believed: try again")]
    StaleEvidence {
        /// Its age.
        age_ms: u64,
        /// The limit.
        limit_ms: u64,
    },
    /// A pool with workers cannot go.
    #[error(
        "pool {pool} has {workers} workers: remove them or restart them in another pool before it is taken out of the configuration"
    )]
    PoolInUse {
        /// The pool.
        pool: String,
        /// Workers registered in it.
        workers: u32,
    },
    /// A bound is reached.
    #[error("there are already {limit} {what}: remove some that are gone")]
    Full {
        /// Of what.
        what: String,
        /// The bound.
        limit: u64,
    },
    /// Not everyone in the cell knows what the command uses.
    #[error(
        "this needs feature level {needed}, the cell is at {level}: update every control node, balancer and agent; the level rises by itself then"
    )]
    FeatureTooNew {
        /// The level that the command needs.
        needed: u32,
        /// The level of the cell.
        level: u32,
    },
    /// The same client has had a later command applied.
    #[error(
        "command {asked} of this client comes after its command {newest} was applied: a client sends one command at a time and never reuses its id"
    )]
    StaleSequence {
        /// The sequence number asked with.
        asked: u64,
        /// The newest applied.
        newest: u64,
    },
    /// Too few ready workers would be left for what runs.
    #[error(
        "model {model} of pool {pool} would be left with {workers_left} ready workers of {slots_left} slots, and needs {slots_needed} ({in_flight} requests are in flight): add or uncordon workers, take fewer at once, wait until load is lower, or go ahead with --ignore-capacity-guard"
    )]
    CapacityShort {
        /// The model.
        model: String,
        /// The pool.
        pool: String,
        /// Ready workers that would be left.
        workers_left: u32,
        /// Requests that they run at once.
        slots_left: u64,
        /// Slots that have to be left.
        slots_needed: u64,
        /// Requests that run or wait on the model's workers.
        in_flight: u64,
    },
    /// How busy a worker is was not heard lately.
    #[error(
        "how busy worker {worker} of pool {pool} is has not been heard for 10 s, so nobody can say whether the others suffice: look at its agent, try again, or go ahead with --ignore-capacity-guard"
    )]
    CapacityUnknown {
        /// The worker's name.
        worker: String,
        /// Its pool.
        pool: String,
    },
    /// A drain holds the worker.
    #[error(
        "worker {worker} is being drained by {drain}: `forebay drain watch {drain}` follows it, `forebay drain cancel {drain}` calls it off"
    )]
    DrainActive {
        /// The worker's name.
        worker: String,
        /// The drain.
        drain: DrainId,
    },
    /// There is no such drain, or not any more.
    #[error("there is no drain {drain}: see `forebay drain status`; the newest 32 are kept")]
    UnknownDrain {
        /// The drain asked for.
        drain: DrainId,
    },
    /// A rebalance of the pool goes on.
    #[error(
        "rebalance {rebalance} moves homes of pool {pool}: `forebay rebalance status` shows it, `forebay rebalance cancel {rebalance}` calls it off"
    )]
    RebalanceActive {
        /// The pool.
        pool: String,
        /// What goes on.
        rebalance: RebalanceId,
    },
    /// There is no such rebalance, or not any more.
    #[error(
        "there is no rebalance {rebalance}: see `forebay rebalance status`; the newest of each pool is kept"
    )]
    UnknownRebalance {
        /// The rebalance asked for.
        rebalance: RebalanceId,
    },
    /// What a plan was made from is not so any more.
    #[error("{what}: plan again with `forebay rebalance plan`")]
    PlanStale {
        /// What changed since.
        what: String,
    },
    /// Nothing is held against a request of this key.
    #[error(
        "no request {} is suspected of anything, or not any more: look at `forebay quarantine list --all`",
        suspect_name(*key)
    )]
    UnknownSuspect {
        /// The key.
        key: u64,
    },
    /// The control plane cannot have these members, or not yet. Nothing was proposed.
    #[error("{problem}")]
    MembersUnfit {
        /// Why, and what to do.
        problem: String,
    },
}

impl Refusal {
    /// A malformed command: where and what.
    #[must_use]
    pub fn invalid(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid {
            path: path.into(),
            problem: problem.into(),
        }
    }

    /// Its name in the audit and in JSON.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Superseded { .. } => "superseded",
            Self::StillLive { .. } => "still-live",
            Self::UnknownWorker { .. } => "unknown-worker",
            Self::UnknownPool { .. } => "unknown-pool",
            Self::LeavesModelEmpty { .. } => "leaves-model-empty",
            Self::RevisionConflict { .. } => "revision-conflict",
            Self::Invalid { .. } => "invalid",
            Self::StaleEvidence { .. } => "stale-evidence",
            Self::PoolInUse { .. } => "pool-in-use",
            Self::Full { .. } => "full",
            Self::StaleSequence { .. } => "stale-sequence",
            Self::FeatureTooNew { .. } => "feature-too-new",
            Self::MembersUnfit { .. } => "members-unfit",
            Self::CapacityShort { .. } => "capacity-short",
            Self::CapacityUnknown { .. } => "capacity-unknown",
            Self::DrainActive { .. } => "drain-active",
            Self::UnknownDrain { .. } => "unknown-drain",
            Self::RebalanceActive { .. } => "rebalance-active",
            Self::UnknownRebalance { .. } => "unknown-rebalance",
            Self::PlanStale { .. } => "plan-stale",
            Self::UnknownSuspect { .. } => "unknown-suspect",
        }
    }

    /// The refusal as it stands on the wire; `None` for one that this version does not know.
    #[must_use]
    pub fn from_wire(wire: wire::Refusal) -> Option<Self> {
        Some(match wire.reason? {
            Reason::Superseded(r) => Self::Superseded {
                asked: incarnation(r.asked.as_ref()),
                current: incarnation(r.current.as_ref()),
            },
            Reason::StillLive(r) => Self::StillLive {
                name: r.name,
                renewed_ms_ago: r.renewed_ms_ago,
            },
            Reason::UnknownWorker(r) => Self::UnknownWorker { name: r.name },
            Reason::UnknownPool(r) => Self::UnknownPool { pool: r.pool },
            Reason::LeavesModelEmpty(r) => Self::LeavesModelEmpty {
                model: r.model,
                pool: r.pool,
            },
            Reason::RevisionConflict(r) => Self::RevisionConflict {
                expected: r.expected,
                current: r.current,
            },
            Reason::Invalid(r) => Self::Invalid {
                path: r.path,
                problem: r.problem,
            },
            Reason::StaleEvidence(r) => Self::StaleEvidence {
                age_ms: r.age_ms,
                limit_ms: r.limit_ms,
            },
            Reason::PoolInUse(r) => Self::PoolInUse {
                pool: r.pool,
                workers: r.workers,
            },
            Reason::Full(r) => Self::Full {
                what: r.what,
                limit: r.limit,
            },
            Reason::StaleSequence(r) => Self::StaleSequence {
                asked: r.asked,
                newest: r.newest,
            },
            Reason::FeatureTooNew(r) => Self::FeatureTooNew {
                needed: r.needed,
                level: r.level,
            },
            Reason::MembersUnfit(r) => Self::MembersUnfit { problem: r.problem },
            Reason::CapacityShort(r) => Self::CapacityShort {
                model: r.model,
                pool: r.pool,
                workers_left: r.workers_left,
                slots_left: r.slots_left,
                slots_needed: r.slots_needed,
                in_flight: r.in_flight,
            },
            Reason::CapacityUnknown(r) => Self::CapacityUnknown {
                worker: r.worker,
                pool: r.pool,
            },
            Reason::DrainActive(r) => Self::DrainActive {
                worker: r.worker,
                drain: DrainId(r.drain),
            },
            Reason::UnknownDrain(r) => Self::UnknownDrain {
                drain: DrainId(r.drain),
            },
            Reason::RebalanceActive(r) => Self::RebalanceActive {
                pool: r.pool,
                rebalance: RebalanceId(r.rebalance),
            },
            Reason::UnknownRebalance(r) => Self::UnknownRebalance {
                rebalance: RebalanceId(r.rebalance),
            },
            Reason::PlanStale(r) => Self::PlanStale { what: r.what },
            Reason::UnknownSuspect(r) => Self::UnknownSuspect { key: r.key },
        })
    }

    /// The refusal for the wire.
    #[must_use]
    pub fn to_wire(&self) -> wire::Refusal {
        let reason = match self.clone() {
            Self::Superseded { asked, current } => Reason::Superseded(wire::Superseded {
                asked: Some(asked.to_wire()),
                current: Some(current.to_wire()),
            }),
            Self::StillLive {
                name,
                renewed_ms_ago,
            } => Reason::StillLive(wire::StillLive {
                name,
                renewed_ms_ago,
            }),
            Self::UnknownWorker { name } => Reason::UnknownWorker(wire::UnknownWorker { name }),
            Self::UnknownPool { pool } => Reason::UnknownPool(wire::UnknownPool { pool }),
            Self::LeavesModelEmpty { model, pool } => {
                Reason::LeavesModelEmpty(wire::LeavesModelEmpty { model, pool })
            }
            Self::RevisionConflict { expected, current } => {
                Reason::RevisionConflict(wire::RevisionConflict { expected, current })
            }
            Self::Invalid { path, problem } => Reason::Invalid(wire::Invalid { path, problem }),
            Self::StaleEvidence { age_ms, limit_ms } => {
                Reason::StaleEvidence(wire::StaleEvidence { age_ms, limit_ms })
            }
            Self::PoolInUse { pool, workers } => {
                Reason::PoolInUse(wire::PoolInUse { pool, workers })
            }
            Self::Full { what, limit } => Reason::Full(wire::Full { what, limit }),
            Self::StaleSequence { asked, newest } => {
                Reason::StaleSequence(wire::StaleSequence { asked, newest })
            }
            Self::FeatureTooNew { needed, level } => {
                Reason::FeatureTooNew(wire::FeatureTooNew { needed, level })
            }
            Self::MembersUnfit { problem } => Reason::MembersUnfit(wire::MembersUnfit { problem }),
            Self::CapacityShort {
                model,
                pool,
                workers_left,
                slots_left,
                slots_needed,
                in_flight,
            } => Reason::CapacityShort(wire::CapacityShort {
                model,
                pool,
                workers_left,
                slots_left,
                slots_needed,
                in_flight,
            }),
            Self::CapacityUnknown { worker, pool } => {
                Reason::CapacityUnknown(wire::CapacityUnknown { worker, pool })
            }
            Self::DrainActive { worker, drain } => Reason::DrainActive(wire::DrainActive {
                worker,
                drain: drain.0,
            }),
            Self::UnknownDrain { drain } => {
                Reason::UnknownDrain(wire::UnknownDrain { drain: drain.0 })
            }
            Self::RebalanceActive { pool, rebalance } => {
                Reason::RebalanceActive(wire::RebalanceActive {
                    pool,
                    rebalance: rebalance.0,
                })
            }
            Self::UnknownRebalance { rebalance } => {
                Reason::UnknownRebalance(wire::UnknownRebalance {
                    rebalance: rebalance.0,
                })
            }
            Self::PlanStale { what } => Reason::PlanStale(wire::PlanStale { what }),
            Self::UnknownSuspect { key } => Reason::UnknownSuspect(wire::UnknownSuspect { key }),
        };
        wire::Refusal {
            reason: Some(reason),
        }
    }
}

/// What a refusal shows of an incarnation: a missing one reads as `w0.0.0`.
fn incarnation(wire: Option<&crate::wire::Incarnation>) -> Incarnation {
    Incarnation::from_wire(wire).unwrap_or(Incarnation {
        worker: WorkerId(0),
        grant: 0,
        start: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_reads_back_as_it_was_written() {
        let asked = Incarnation {
            worker: WorkerId(1),
            grant: 2,
            start: 3,
        };
        let text = || "x".to_owned();
        let all = [
            Refusal::Superseded {
                asked,
                current: asked,
            },
            Refusal::StillLive {
                name: text(),
                renewed_ms_ago: 7,
            },
            Refusal::UnknownWorker { name: text() },
            Refusal::UnknownPool { pool: text() },
            Refusal::LeavesModelEmpty {
                model: text(),
                pool: text(),
            },
            Refusal::RevisionConflict {
                expected: 1,
                current: 2,
            },
            Refusal::invalid("a", "b"),
            Refusal::StaleEvidence {
                age_ms: 11,
                limit_ms: 10,
            },
            Refusal::PoolInUse {
                pool: text(),
                workers: 2,
            },
            Refusal::Full {
                what: text(),
                limit: 4,
            },
            Refusal::FeatureTooNew {
                needed: 2,
                level: 1,
            },
            Refusal::StaleSequence {
                asked: 1,
                newest: 2,
            },
            Refusal::MembersUnfit { problem: text() },
            Refusal::CapacityShort {
                model: text(),
                pool: text(),
                workers_left: 1,
                slots_left: 2,
                slots_needed: 3,
                in_flight: 4,
            },
            Refusal::CapacityUnknown {
                worker: text(),
                pool: text(),
            },
            Refusal::DrainActive {
                worker: text(),
                drain: DrainId(5),
            },
            Refusal::UnknownDrain { drain: DrainId(6) },
            Refusal::RebalanceActive {
                pool: text(),
                rebalance: RebalanceId(7),
            },
            Refusal::UnknownRebalance {
                rebalance: RebalanceId(8),
            },
            Refusal::PlanStale { what: text() },
            Refusal::UnknownSuspect { key: 7 },
        ];
        for refusal in all {
            assert_eq!(Refusal::from_wire(refusal.to_wire()), Some(refusal));
        }
        assert_eq!(Refusal::from_wire(wire::Refusal::default()), None);
    }
}
