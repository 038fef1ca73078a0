//! The fleet: what a cell agrees on, as a pure replicated state machine.
//!
//! [`Fleet::apply`] takes one committed log entry and changes the state alike on every replica: no
//! floats, no clock, no hash order. What a guard needs beyond the state travels in the entry as
//! evidence. What is stored for others (specs, the configuration) stays the bytes that arrived, so
//! a replica that is older than a proposer loses nothing of it.
//!
//! Deliberately not here: Raft, disks, leases (see [`lease`]: they are the leader's memory) and who
//! may propose what (the server checks the RPC table before an entry is made).

pub mod archive;
pub mod audit;
mod capacity;
mod config;
mod drains;
mod expiry;
mod homes;
mod keys;
pub mod lease;
mod machine;
mod members;
mod proposal;
mod rebalances;
mod registration;
pub mod reign;
mod sessions;
mod snapshot;
mod suspects;
mod workers;

#[cfg(test)]
mod drain_tests;
#[cfg(test)]
mod home_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod suspect_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use forebay_proto::fleet::Member;
use forebay_proto::refusal::Refusal;
use forebay_proto::suspect::Suspect;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{
    ClusterId, Drain, DrainId, FEATURE_LEVEL, Family, Millis, Rebalance, RebalanceId, Revision,
};
use wire::change::Change;
use wire::command::Action;

pub use drains::{MAX_DRAINS, MAX_NAMES};
pub use homes::{MAX_FAMILIES, MAX_HOMES};
pub use members::{DRAINS_LEVEL, HOMES_LEVEL, MEMBERS_LEVEL, QUARANTINE_LEVEL, level_of, too_new};
pub use rebalances::{INTERVALS_MS, MAX_MOVES};
pub use snapshot::RestoreError;
pub use suspects::{MAX_ACCUSED, MAX_SUSPECTS};
pub use workers::Worker;

use crate::bug::{Bug, on};
use crate::probe::{Probe, hit};
use audit::Chain;
use config::Agreed;
use proposal::Proposal;
use sessions::{Seen, Sessions};

/// Workers of one cell.
pub const MAX_WORKERS: usize = 4_096;

/// Evidence older than this is not acted on.
pub const EVIDENCE_LIMIT: Millis = Millis(10_000);

/// A process that renewed more recently than this is alive: its name cannot be taken silently.
pub const LIVE_WITHIN: Millis = Millis(10_000);

/// The feature level of a cell whose founder did not say another one: versions that did not ask for it
/// began with this one.
pub const FOUNDING_LEVEL: u32 = 2;

/// The agreed state of one cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fleet {
    cluster_id: ClusterId,
    /// The newest time that any leader stamped; deadlines are measured in it.
    cell_time: Millis,
    /// Log index of the last change.
    revision: Revision,
    feature_level: u32,
    /// Id of the newest worker ever registered: the next one gets the next.
    newest_worker: u32,
    workers: BTreeMap<String, Worker>,
    members: Vec<Member>,
    /// The newest id that any member ever had.
    newest_member: u64,
    /// The entry that is applied carries Raft's change of its members, too.
    changing: bool,
    /// Newest feature that this build understands.
    knows: u32,
    config: Agreed,
    /// Pools whose leases ran out in too great a number to believe it.
    correlated: BTreeSet<String>,
    /// Fingerprint keys, the newest last; at most [`MAX_KEYS`].
    keys: Vec<wire::FingerprintKey>,
    /// Drains that go on, and the newest that ended; at most [`MAX_DRAINS`].
    drains: BTreeMap<DrainId, Drain>,
    /// The hottest families, by the chunk that names each; at most [`MAX_FAMILIES`].
    families: BTreeMap<u64, Family>,
    /// When a home last changed.
    homes_revision: Revision,
    /// The rebalance that goes on or ended last, by pool; at most one a pool of the configuration.
    rebalances: BTreeMap<String, Rebalance>,
    /// Requests that engines died under, by key; at most [`MAX_SUSPECTS`].
    suspects: BTreeMap<u64, Suspect>,
    sessions: Sessions,
    audit: Chain,
}

/// What became of one log entry.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// For the proposer.
    pub outcome: wire::Outcome,
    /// For watchers; `None` when no fact changed. Its revision is the entry's index.
    pub delta: Option<wire::Delta>,
}

/// What an accepted command did: nothing in `changes` means that it was so already.
#[derive(Debug, Default)]
struct Effect {
    changes: Vec<Change>,
    /// The worker, for a registration.
    worker: Option<wire::Worker>,
    /// Workers that it changed, or would have changed if it were no dry run.
    affected: u32,
    /// The drain that began or goes on.
    drain: Option<DrainId>,
    /// The rebalance that began or goes on.
    rebalance: Option<RebalanceId>,
}

impl Effect {
    fn unchanged() -> Self {
        Self::default()
    }

    fn change(change: Change) -> Self {
        Self {
            changes: vec![change],
            ..Self::default()
        }
    }
}

impl Fleet {
    /// The state of a cluster that has agreed on nothing but its first members.
    #[must_use]
    pub fn bootstrap(cluster_id: ClusterId, members: Vec<Member>) -> Self {
        Self {
            cluster_id,
            cell_time: Millis(0),
            revision: Revision(0),
            feature_level: FOUNDING_LEVEL,
            newest_worker: 0,
            workers: BTreeMap::new(),
            newest_member: newest(&members),
            changing: false,
            knows: FEATURE_LEVEL,
            members,
            config: Agreed::built_in(),
            correlated: BTreeSet::new(),
            keys: Vec::new(),
            drains: BTreeMap::new(),
            families: BTreeMap::new(),
            homes_revision: Revision(0),
            rebalances: BTreeMap::new(),
            suspects: BTreeMap::new(),
            sessions: Sessions::default(),
            audit: Chain::default(),
        }
    }

    /// The same at another feature level.
    #[must_use]
    pub fn with_feature_level(mut self, level: u32) -> Self {
        self.feature_level = level;
        self
    }

    /// The same as a build would hold it that understands no newer features than this.
    #[must_use]
    pub fn as_build_of(mut self, level: u32) -> Self {
        self.knows = level;
        self
    }

    /// Applies one committed entry, an encoded `Proposal`, alike on every replica.
    ///
    /// An entry that does not decode is refused as invalid; a repetition of a client's newest
    /// command gets the original outcome and changes nothing. Sequence 0 is the leader's own: its
    /// commands may be applied twice without harm, so they take no session.
    pub fn apply(&mut self, index: u64, entry: &Bytes) -> Applied {
        let mut proposal = match Proposal::decode(entry) {
            Ok(proposal) => proposal,
            Err(refusal) => return Applied::refused(&refusal),
        };
        // Time never goes back, whatever a leader stamped; the audit says the same time.
        self.cell_time = if on(Bug::CellTimeRestarts) {
            proposal.at
        } else {
            self.cell_time.max(proposal.at)
        };
        proposal.at = self.cell_time;
        if proposal.sequence == 0 {
            return self.apply_once(Revision(index), &proposal);
        }
        match self
            .sessions
            .find(proposal.client, proposal.sequence, index)
        {
            Seen::Before(outcome) => {
                hit(Probe::Repeated);
                Applied {
                    outcome,
                    delta: None,
                }
            }
            Seen::Past { newest } => {
                hit(Probe::StaleSequence);
                Applied::refused(&Refusal::StaleSequence {
                    asked: proposal.sequence,
                    newest,
                })
            }
            Seen::Never => self.apply_once(Revision(index), &proposal),
        }
    }

    fn apply_once(&mut self, at: Revision, proposal: &Proposal) -> Applied {
        let action = proposal::action(&proposal.command);
        let subject = audit::Subject::of(action.as_ref().ok());
        let result = action.and_then(|action| self.execute(at, action, proposal));
        let result = result.map(|effect| self.settled(at, effect));
        if let Some(subject) = subject {
            let result = match &result {
                Ok(effect) if effect.changes.is_empty() => "unchanged",
                Ok(_) => "done",
                Err(refusal) => refusal.name(),
            };
            self.audit.append(at, proposal, &subject, result);
        }
        let applied = match result {
            Ok(effect) => self.done(at, effect),
            Err(refusal) => Applied::refused(&refusal),
        };
        let (client, sequence) = (proposal.client, proposal.sequence);
        if sequence > 0 {
            let outcome = applied.outcome.clone();
            self.sessions.record(client, sequence, at.0, outcome);
        }
        applied
    }

    fn execute(
        &mut self,
        at: Revision,
        action: Action,
        proposal: &Proposal,
    ) -> Result<Effect, Refusal> {
        if members::level_of(&action) > self.knows {
            // As that build decodes it: a command of no kind.
            return Err(proposal::unknown_kind());
        }
        let evidence = proposal.evidence.as_ref();
        match action {
            Action::Register(command) => self.register(at, command, evidence),
            Action::Observe(command) => self.observe(at, &command),
            Action::Goodbye(command) => self.goodbye(at, &command),
            Action::SetDesired(command) => self.set_desired(at, &command),
            Action::Remove(command) => self.remove(&command),
            Action::ApplyConfig(command) => self.apply_config(at, &command),
            Action::Expire(command) => self.expire(at, command, evidence),
            Action::RotateKey(command) => self.rotate_key(&command),
            Action::ChangeMembers(command) => self.change_members(&command),
            Action::RaiseFeatureLevel(command) => self.raise_feature_level(&command),
            Action::SetDesiredOf(command) => self.set_desired_of(at, &command, evidence),
            Action::StartDrain(command) => self.start_drain(at, &command, proposal),
            Action::CancelDrain(command) => self.cancel_drain(at, &command),
            Action::PassDrainDeadline(command) => self.pass_drain_deadline(at, &command),
            Action::AssignHomes(command) => self.assign_homes(at, command),
            Action::StartRebalance(command) => self.start_rebalance(at, command, proposal),
            Action::StepRebalance(command) => self.step_rebalance(at, &command),
            Action::StopRebalance(command) => self.stop_rebalance(&command),
            Action::CancelRebalance(command) => self.cancel_rebalance(&command),
            Action::AccuseRequests(command) => self.accuse_requests(command),
            Action::ClearRequests(command) => self.clear_requests(&command),
            Action::LiftQuarantine(command) => self.lift_quarantine(&command),
            Action::ForgetSuspects(_) => self.forget_suspects(),
        }
    }

    fn done(&mut self, at: Revision, effect: Effect) -> Applied {
        let unchanged = effect.changes.is_empty();
        if !unchanged {
            self.revision = at;
        }
        let done = wire::Done {
            revision: self.revision.0,
            worker: effect.worker,
            unchanged,
            affected: effect.affected,
            drain: effect.drain.map_or(0, |drain| drain.0),
            rebalance: effect.rebalance.map_or(0, |rebalance| rebalance.0),
        };
        let delta = (!unchanged).then(|| wire::Delta {
            revision: at.0,
            cell_time_ms: self.cell_time.0,
            changes: effect
                .changes
                .into_iter()
                .map(|change| wire::Change {
                    change: Some(change),
                })
                .collect(),
        });
        Applied {
            outcome: wire::Outcome {
                outcome: Some(wire::outcome::Outcome::Done(done)),
            },
            delta,
        }
    }

    /// Everything that a consumer of facts holds.
    #[must_use]
    pub fn facts(&self) -> wire::Facts {
        wire::Facts {
            cluster_id: self.cluster_id.to_wire(),
            revision: self.revision.0,
            cell_time_ms: self.cell_time.0,
            workers: self.workers.values().map(Worker::to_wire).collect(),
            members: self.members.iter().map(Member::to_wire).collect(),
            config: self.config.bytes.clone(),
            config_revision: self.config.revision.0,
            correlated_expiry: self.correlated.iter().cloned().collect(),
            keys: Some(wire::KeyRing {
                keys: self.keys.clone(),
            }),
            feature_level: self.feature_level,
            drains: self.drains.values().map(Drain::to_wire).collect(),
            // Answers to reads say it; the state has the keys.
            key_epoch: 0,
            families: self.families.values().map(Family::to_wire).collect(),
            rebalances: self.rebalances.values().map(Rebalance::to_wire).collect(),
            suspects: self.suspects.values().map(Suspect::to_wire).collect(),
        }
    }

    /// The newest `limit` entries of the audit, oldest first, and the head of the chain.
    #[must_use]
    pub fn audit_tail(&self, limit: usize) -> (Vec<wire::AuditEntry>, [u8; 32]) {
        (self.audit.tail(limit), self.audit.head())
    }

    /// Entries ever made in the audit.
    #[must_use]
    pub const fn audit_count(&self) -> u64 {
        self.audit.count()
    }

    /// Which cluster this is.
    #[must_use]
    pub const fn cluster_id(&self) -> ClusterId {
        self.cluster_id
    }

    /// Log index of the last change of a fact.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.revision
    }

    /// The newest time that any leader stamped. A new leader continues from it.
    #[must_use]
    pub const fn cell_time(&self) -> Millis {
        self.cell_time
    }

    /// Newest feature that commands may use.
    #[must_use]
    pub const fn feature_level(&self) -> u32 {
        self.feature_level
    }

    /// Nodes of the control plane.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The worker of this name.
    #[must_use]
    pub fn worker(&self, name: &str) -> Option<&Worker> {
        self.workers.get(name)
    }

    /// Drains that go on, and the newest that ended, oldest first.
    pub fn drains(&self) -> impl Iterator<Item = &Drain> {
        self.drains.values()
    }

    /// The hottest families and their homes, by chunk.
    pub fn families(&self) -> impl Iterator<Item = &Family> {
        self.families.values()
    }

    /// The rebalance that goes on or ended last of each pool, by pool.
    pub fn rebalances(&self) -> impl Iterator<Item = &Rebalance> {
        self.rebalances.values()
    }

    /// Requests that engines died under, by key.
    pub fn suspects(&self) -> impl Iterator<Item = &Suspect> {
        self.suspects.values()
    }

    /// All workers, by name.
    pub fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.workers.values()
    }
}

fn newest(members: &[Member]) -> u64 {
    members.iter().map(|member| member.id.0).max().unwrap_or(0)
}

impl Applied {
    fn refused(refusal: &Refusal) -> Self {
        Self {
            outcome: wire::Outcome {
                outcome: Some(wire::outcome::Outcome::Refusal(refusal.to_wire())),
            },
            delta: None,
        }
    }
}
