//! The facts as their consumers hold them: decoded once, kept up to date by deltas.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use forebay_proto::config::{Config, ConfigError};
use forebay_proto::fleet::{Member, SpecError, WorkerSpec};
use forebay_proto::ids::IdError;
use forebay_proto::suspect::Suspect;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{
    ClusterId, Drain, DrainId, Family, FingerprintKey, Incarnation, Millis, Rebalance, RebalanceId,
    Revision, WorkerId,
};
use wire::change::Change;
use wire::{Desired, Observed};

/// Everything that a consumer knows of the fleet, as of one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Which cluster says so.
    pub cluster_id: ClusterId,
    /// As of when.
    pub revision: Revision,
    /// The newest time that the cell agreed on.
    pub cell_time: Millis,
    /// Workers by name.
    pub workers: BTreeMap<String, Arc<WorkerFact>>,
    /// Nodes of the control plane.
    pub members: Vec<Member>,
    /// The configuration.
    pub config: Arc<Config>,
    /// The configuration as it is stored.
    pub config_bytes: Bytes,
    /// When the configuration was applied; zero for the built-in one.
    pub config_revision: Revision,
    /// Pools in which too many leases ran out at once to believe it.
    pub correlated_expiry: BTreeSet<String>,
    /// Fingerprint keys, the newest last; empty for all but balancers.
    pub keys: Vec<FingerprintKey>,
    /// Epoch of the newest of them, as a read says it to those who get none; 0: not told.
    pub key_epoch: u32,
    /// Newest feature that commands may use.
    pub feature_level: u32,
    /// Drains that go on, and the newest that ended; empty for balancers and agents.
    pub drains: BTreeMap<DrainId, Drain>,
    /// The hottest families and their homes, by the chunk that names each; empty for agents.
    pub families: BTreeMap<u64, Family>,
    /// The rebalance that goes on or ended last, of each pool; empty for balancers and agents.
    pub rebalances: BTreeMap<RebalanceId, Rebalance>,
    /// Requests that engines died under, by key; empty for agents.
    pub suspects: BTreeMap<u64, Suspect>,
}

/// One worker, as agreed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerFact {
    /// Its id.
    pub id: WorkerId,
    /// Its name.
    pub name: String,
    /// The start that may serve.
    pub incarnation: Incarnation,
    /// What it is.
    pub spec: WorkerSpec,
    /// What it is, as it is stored.
    pub spec_bytes: Bytes,
    /// What operators want of it; unspecified for what this version does not know.
    pub desired: Desired,
    /// What its agent says of itself; unspecified for what this version does not know.
    pub observed: Observed,
    /// Its lease ran out and it has not been heard since.
    pub lost: bool,
    /// Its agent said goodbye: the incarnation is dead.
    pub departed: bool,
    /// When `desired` last changed.
    pub desired_revision: Revision,
    /// The newest `desired_revision` that its agent has applied.
    pub acknowledged_revision: Revision,
    /// When anything of it last changed.
    pub revision: Revision,
    /// A drain's deadline passed: what still runs is to be ended.
    pub end_streams: bool,
}

/// Why facts cannot be used. Their consumer keeps those it has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FactsError {
    /// An id or a name does not have its form.
    #[error(transparent)]
    Id(#[from] IdError),
    /// A worker's spec cannot be used.
    #[error("worker {name}: {error}")]
    Spec {
        /// Whose.
        name: String,
        /// What is wrong.
        error: SpecError,
    },
    /// The configuration cannot be used.
    #[error("configuration: {0}")]
    Config(#[from] ConfigError),
    /// A fingerprint key is none.
    #[error("a fingerprint key has no 16 bytes or no epoch")]
    Key,
    /// A change of a kind that this version does not know.
    #[error("a change of a kind that this version does not know: update this process")]
    UnknownChange,
}

impl WorkerFact {
    /// Whether its desired state is in force: its agent has applied it.
    #[must_use]
    pub fn is_in_force(&self) -> bool {
        self.acknowledged_revision >= self.desired_revision
    }

    /// Reads a worker as it stands on the wire.
    ///
    /// # Errors
    ///
    /// Returns what cannot be used of it.
    pub fn from_wire(wire: wire::Worker) -> Result<Self, FactsError> {
        let incarnation = Incarnation::from_wire(wire.incarnation.as_ref())?;
        let spec = WorkerSpec::from_wire(&wire.spec).map_err(|error| FactsError::Spec {
            name: wire.name.clone(),
            error,
        })?;
        let (desired, observed) = (wire.desired(), wire.observed());
        Ok(Self {
            id: WorkerId(wire.id),
            name: wire.name,
            incarnation,
            spec,
            // A copy: a slice would keep the whole frame in memory.
            spec_bytes: Bytes::copy_from_slice(&wire.spec),
            desired,
            observed,
            lost: wire.lost,
            departed: wire.departed,
            desired_revision: Revision(wire.desired_revision),
            acknowledged_revision: Revision(wire.acknowledged_revision),
            revision: Revision(wire.revision),
            end_streams: wire.end_streams,
        })
    }

    fn to_wire(&self) -> wire::Worker {
        wire::Worker {
            id: self.id.0,
            name: self.name.clone(),
            incarnation: Some(self.incarnation.to_wire()),
            spec: self.spec_bytes.clone(),
            desired: self.desired.into(),
            observed: self.observed.into(),
            lost: self.lost,
            departed: self.departed,
            desired_revision: self.desired_revision.0,
            acknowledged_revision: self.acknowledged_revision.0,
            revision: self.revision.0,
            end_streams: self.end_streams,
        }
    }
}

fn keys(ring: &wire::KeyRing) -> Result<Vec<FingerprintKey>, FactsError> {
    let keys = ring.keys.iter().map(FingerprintKey::from_wire);
    keys.collect::<Option<_>>().ok_or(FactsError::Key)
}

impl Facts {
    /// Reads a snapshot.
    ///
    /// # Errors
    ///
    /// Returns what cannot be used of it.
    pub fn from_wire(wire: wire::Facts) -> Result<Self, FactsError> {
        let mut workers = BTreeMap::new();
        for worker in wire.workers {
            let worker = WorkerFact::from_wire(worker)?;
            workers.insert(worker.name.clone(), Arc::new(worker));
        }
        let members = wire.members.iter().map(Member::from_wire);
        let drains = wire.drains.into_iter().map(|drain| {
            let drain = Drain::from_wire(drain)?;
            Ok((drain.id, drain))
        });
        let families = wire.families.into_iter().map(|family| {
            let family = Family::from_wire(family)?;
            Ok((family.chunk, family))
        });
        let rebalances = wire.rebalances.into_iter().map(|rebalance| {
            let rebalance = Rebalance::from_wire(rebalance)?;
            Ok((rebalance.id, rebalance))
        });
        let suspects = wire.suspects.into_iter().map(|suspect| {
            let suspect = Suspect::from_wire(suspect)?;
            Ok((suspect.key, suspect))
        });
        Ok(Self {
            cluster_id: ClusterId::from_wire(&wire.cluster_id)?,
            revision: Revision(wire.revision),
            cell_time: Millis(wire.cell_time_ms),
            workers,
            members: members.collect::<Result<_, _>>()?,
            config: Arc::new(Config::from_wire(&wire.config)?),
            config_bytes: Bytes::copy_from_slice(&wire.config),
            config_revision: Revision(wire.config_revision),
            correlated_expiry: wire.correlated_expiry.into_iter().collect(),
            keys: keys(&wire.keys.unwrap_or_default())?,
            key_epoch: wire.key_epoch,
            feature_level: wire.feature_level,
            drains: drains.collect::<Result<_, IdError>>()?,
            families: families.collect::<Result<_, IdError>>()?,
            rebalances: rebalances.collect::<Result<_, IdError>>()?,
            suspects: suspects.collect::<Result<_, IdError>>()?,
        })
    }

    /// The facts for the wire and the disk.
    #[must_use]
    pub fn to_wire(&self) -> wire::Facts {
        wire::Facts {
            cluster_id: self.cluster_id.to_wire(),
            revision: self.revision.0,
            cell_time_ms: self.cell_time.0,
            workers: self.workers.values().map(|w| w.to_wire()).collect(),
            members: self.members.iter().map(Member::to_wire).collect(),
            config: self.config_bytes.clone(),
            config_revision: self.config_revision.0,
            correlated_expiry: self.correlated_expiry.iter().cloned().collect(),
            keys: Some(wire::KeyRing {
                keys: self.keys.iter().map(FingerprintKey::to_wire).collect(),
            }),
            feature_level: self.feature_level,
            key_epoch: self.key_epoch,
            drains: self.drains.values().map(Drain::to_wire).collect(),
            families: self.families.values().map(Family::to_wire).collect(),
            rebalances: self.rebalances.values().map(Rebalance::to_wire).collect(),
            suspects: self.suspects.values().map(Suspect::to_wire).collect(),
        }
    }

    /// The facts after a delta; those before it stay as they are.
    ///
    /// # Errors
    ///
    /// Returns what cannot be used of it.
    pub fn after(&self, delta: wire::Delta) -> Result<Self, FactsError> {
        let mut next = self.clone();
        for change in delta.changes {
            match change.change.ok_or(FactsError::UnknownChange)? {
                Change::WorkerPut(worker) => {
                    let worker = WorkerFact::from_wire(worker)?;
                    next.workers.insert(worker.name.clone(), Arc::new(worker));
                }
                Change::WorkerRemoved(name) => {
                    next.workers.remove(&name);
                }
                Change::Config(change) => {
                    next.config = Arc::new(Config::from_wire(&change.config)?);
                    next.config_bytes = Bytes::copy_from_slice(&change.config);
                    next.config_revision = Revision(change.config_revision);
                }
                Change::CorrelatedExpiry(alarm) => {
                    next.correlated_expiry = alarm.pools.into_iter().collect();
                }
                Change::Keys(ring) => next.keys = keys(&ring)?,
                Change::Members(list) => {
                    let members = list.members.iter().map(Member::from_wire);
                    next.members = members.collect::<Result<_, _>>()?;
                }
                Change::FeatureLevel(level) => next.feature_level = level,
                Change::DrainPut(drain) => {
                    let drain = Drain::from_wire(drain)?;
                    next.drains.insert(drain.id, drain);
                }
                Change::DrainForgotten(id) => {
                    next.drains.remove(&DrainId(id));
                }
                Change::Families(changes) => {
                    for chunk in changes.removed {
                        next.families.remove(&chunk);
                    }
                    for family in changes.put {
                        let family = Family::from_wire(family)?;
                        next.families.insert(family.chunk, family);
                    }
                }
                Change::Suspects(changes) => {
                    for key in changes.removed {
                        next.suspects.remove(&key);
                    }
                    for suspect in changes.put {
                        let suspect = Suspect::from_wire(suspect)?;
                        next.suspects.insert(suspect.key, suspect);
                    }
                }
                Change::RebalancePut(rebalance) => {
                    let rebalance = Rebalance::from_wire(rebalance)?;
                    // One a pool is kept.
                    next.rebalances
                        .retain(|_, held| held.pool != rebalance.pool);
                    next.rebalances.insert(rebalance.id, rebalance);
                }
                Change::RebalanceForgotten(pool) => {
                    next.rebalances.retain(|_, held| held.pool != pool);
                }
            }
        }
        next.revision = Revision(delta.revision);
        next.cell_time = next.cell_time.max(Millis(delta.cell_time_ms));
        Ok(next)
    }

    /// The worker of this id.
    #[must_use]
    pub fn worker(&self, id: WorkerId) -> Option<&Arc<WorkerFact>> {
        self.workers.values().find(|worker| worker.id == id)
    }
}
