//! Expiry, the first fingerprint key, the feature level, deadlines of drains, old suspicions, and homes. Who was silent for longer than a lease becomes lost, unless too many are at once.
//!
//! Many leases of a pool that run out together say more about the network, or about this leader,
//! than about the workers. When more than a fifth of a pool, and at least two, would be lost within
//! ten seconds, none of them is: an alarm is raised for the pool, and cleared when no more than a
//! fifth is silent. That a lost worker was heard again is noted where its renewal is taken.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use forebay_consensus::fleet::lease::{AGENT_TTL, Leases};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::suspect::Suspect;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Incarnation, Millis, Now};

use crate::homes::Homes;

/// Losses this far apart count as at once.
const AT_ONCE: Duration = Duration::from_secs(10);

/// A pool loses no more than one in this many at once.
const ONE_IN: usize = 5;

/// A single silent worker is always believed.
const FEWEST: usize = 2;

/// What to propose.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Declare leases expired, and in which pools that is not believed.
    Expire(wire::ExpireLeases),
    /// Draw the first fingerprint key.
    FirstKey,
    /// Let commands use features up to this level: everyone understands them.
    RaiseFeatureLevel(u32),
    /// A drain's deadline passed, by cell time.
    PassDrainDeadline(u64),
    /// Give families the homes that their heat asks for.
    AssignHomes(wire::AssignHomes),
    /// Make the next move of a rebalance.
    StepRebalance(wire::StepRebalance),
    /// Stop a rebalance: promises are kept less often than its operator wants.
    StopRebalance(wire::StopRebalance),
    /// Forget suspicions that are old, by cell time.
    ForgetSuspects,
}

/// The leader's loop, without the loop.
#[derive(Clone, Debug, Default)]
pub struct Controller {
    /// Losses that were proposed lately; forgotten after [`AT_ONCE`]. Bounded by the fleet.
    proposed: BTreeMap<Incarnation, Now>,
    homes: Homes,
}

/// A worker as this loop sees it.
struct Seen {
    incarnation: Incarnation,
    pool: String,
    lost: bool,
}

impl Controller {
    /// What to propose, given what was heard and what is agreed. Nothing unless this node leads.
    ///
    /// `members_level` is the least feature level that a member understands, 0 while that is not known;
    /// `cell_time` is what a proposal would be stamped with.
    pub fn step(
        &mut self,
        now: Now,
        is_leader: bool,
        leases: &Leases,
        facts: &wire::Facts,
        members_level: u32,
        cell_time: Millis,
    ) -> Vec<Action> {
        if !is_leader {
            *self = Self::default();
            return vec![];
        }
        self.proposed.retain(|_, at| now.since(*at) < AT_ONCE);
        let workers: Vec<Seen> = facts.workers.iter().filter_map(seen).collect();
        let expiry = self.expire(now, leases, &workers, &facts.correlated_expiry);
        let keyless = facts.keys.as_ref().is_none_or(|ring| ring.keys.is_empty());
        let first_key = keyless.then_some(Action::FirstKey);
        let everyone = leases.feature_level(now).unwrap_or(members_level);
        let everyone = everyone.min(members_level);
        let raise = (everyone > facts.feature_level).then_some(Action::RaiseFeatureLevel(everyone));
        let deadlines = facts.drains.iter().filter(|drain| {
            drain.ended_ms == 0 && !drain.overdue && (1..=cell_time.0).contains(&drain.deadline_ms)
        });
        let deadlines = deadlines.map(|drain| Action::PassDrainDeadline(drain.id));
        let own = expiry.into_iter().chain(first_key).chain(raise);
        let homes = self.homes.step(now, leases, facts, cell_time);
        let old = |suspect: &wire::Suspect| {
            let suspect = Suspect::from_wire(suspect.clone());
            suspect.is_ok_and(|suspect| suspect.until() <= cell_time)
        };
        let forget = facts.suspects.iter().any(old);
        let forget = forget.then_some(Action::ForgetSuspects);
        own.chain(deadlines).chain(homes).chain(forget).collect()
    }

    fn expire(
        &mut self,
        now: Now,
        leases: &Leases,
        workers: &[Seen],
        raised: &[String],
    ) -> Option<Action> {
        let silent: BTreeMap<Incarnation, Duration> = leases
            .expired(now, AGENT_TTL)
            .into_iter()
            .map(|expired| (expired.incarnation, expired.silent))
            .collect();
        let mut pools: BTreeMap<&str, Vec<&Seen>> = BTreeMap::new();
        for worker in workers {
            pools.entry(&worker.pool).or_default().push(worker);
        }
        let (mut evidence, mut correlated) = (vec![], BTreeSet::new());
        for (pool, workers) in pools {
            let losing = |worker: &&&Seen| !worker.lost && silent.contains_key(&worker.incarnation);
            let just_lost =
                |worker: &&&Seen| worker.lost && self.proposed.contains_key(&worker.incarnation);
            let lost = workers.iter().filter(just_lost).count();
            let at_once = workers.iter().filter(losing).count() + lost;
            let living = workers.iter().filter(|worker| !worker.lost).count() + lost;
            if at_once == lost {
                continue;
            }
            if at_once >= FEWEST && at_once * ONE_IN > living {
                correlated.insert(pool.to_owned());
                continue;
            }
            evidence.extend(workers.iter().filter(losing).map(|w| w.incarnation));
        }
        if evidence.is_empty() && correlated.iter().eq(raised) {
            return None;
        }
        self.proposed
            .extend(evidence.iter().map(|incarnation| (*incarnation, now)));
        Some(Action::Expire(wire::ExpireLeases {
            evidence: evidence
                .into_iter()
                .map(|incarnation| wire::LeaseEvidence {
                    incarnation: Some(incarnation.to_wire()),
                    silent_ms: Millis::from_duration(silent[&incarnation]).0,
                })
                .collect(),
            correlated: correlated.into_iter().collect(),
        }))
    }
}

/// `None` for one that said goodbye, or that this version cannot read.
fn seen(worker: &wire::Worker) -> Option<Seen> {
    if worker.departed {
        return None;
    }
    Some(Seen {
        incarnation: Incarnation::from_wire(worker.incarnation.as_ref()).ok()?,
        pool: WorkerSpec::from_wire(&worker.spec).ok()?.pool,
        lost: worker.lost,
    })
}

#[cfg(test)]
mod tests;
