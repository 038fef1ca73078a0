//! Leases that ran out: the leader's evidence becomes `lost`, or an alarm when it is too much.
//!
//! One command says both, whole: who was silent for longer than a lease, and in which pools too many
//! were silent at once to believe it. The alarm is exactly the pools named, so a command that names
//! none clears it. In a pool with an alarm nobody becomes lost. Evidence about an incarnation that
//! is no longer registered says nothing and is passed over.

use std::collections::{BTreeMap, BTreeSet};

use forebay_proto::config::MAX_POOLS;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Millis, Revision, WorkerId};
use wire::change::Change;

use super::lease::AGENT_TTL;
use super::proposal::fresh;
use super::workers::{Worker, incarnation};
use super::{Effect, Fleet, MAX_WORKERS};

impl Fleet {
    pub(super) fn expire(
        &mut self,
        at: Revision,
        command: wire::ExpireLeases,
        evidence: Option<&wire::Evidence>,
    ) -> Result<Effect, Refusal> {
        fresh(evidence)?;
        check_bounds(&command)?;
        let mut silent = BTreeSet::new();
        for lease in &command.evidence {
            let incarnation = incarnation("expire.evidence", lease.incarnation.as_ref())?;
            if Millis(lease.silent_ms).duration() < AGENT_TTL {
                let problem = format!(
                    "{incarnation} was silent for {} ms only: its lease has not run out",
                    lease.silent_ms
                );
                return Err(Refusal::invalid("expire.evidence", problem));
            }
            silent.insert(incarnation);
        }
        let raised = command.correlated.into_iter();
        let raised = raised.filter(|pool| self.config.pools.contains(pool));
        let raised = raised.collect();

        let mut effect = Effect::unchanged();
        effect.changes.extend(self.raise(raised));
        let workers = self.workers.values_mut();
        let mut by_id: BTreeMap<WorkerId, &mut Worker> =
            workers.map(|worker| (worker.id, worker)).collect();
        for incarnation in silent {
            let Some(worker) = by_id.get_mut(&incarnation.worker) else {
                continue;
            };
            let believed = !self.correlated.contains(&worker.spec.pool);
            let lives = worker.incarnation == incarnation && !worker.departed && !worker.lost;
            if believed && lives {
                worker.lost = true;
                effect.changes.extend(worker.touched(at).changes);
            }
        }
        Ok(effect)
    }

    /// Replaces the alarm; says so if it differs.
    pub(super) fn raise(&mut self, pools: BTreeSet<String>) -> Option<Change> {
        if pools == self.correlated {
            return None;
        }
        self.correlated = pools;
        Some(Change::CorrelatedExpiry(wire::CorrelatedExpiry {
            pools: self.correlated.iter().cloned().collect(),
        }))
    }
}

fn check_bounds(command: &wire::ExpireLeases) -> Result<(), Refusal> {
    for (path, length, limit) in [
        ("expire.evidence", command.evidence.len(), MAX_WORKERS),
        ("expire.correlated", command.correlated.len(), MAX_POOLS),
    ] {
        if length > limit {
            let problem = format!("has {length} entries, at most {limit} are allowed");
            return Err(Refusal::invalid(path, problem));
        }
    }
    Ok(())
}
