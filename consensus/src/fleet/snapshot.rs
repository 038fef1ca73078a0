//! The whole state as bytes: for Raft snapshots, for restarts, and for comparing replicas.
//!
//! `magic (8) | version u16 | CRC-32C u32 | body`, numbers big-endian. The body is a message of its
//! own with every map in key order, so equal states give equal bytes.

use std::collections::BTreeMap;

use bytes::Bytes;
use forebay_proto::config::MAX_POOLS;
use forebay_proto::fleet::{Member, WorkerSpec};
use forebay_proto::ids::{ClientId, Incarnation};
use forebay_proto::suspect::Suspect;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{
    ClusterId, Drain, DrainId, FEATURE_LEVEL, Family, Millis, Rebalance, Revision, WorkerId,
};
use prost::Message;
use sha2::{Digest, Sha256};

use super::audit::{Broken, Chain};
use super::config::Agreed;
use super::keys::MAX_KEYS;
use super::sessions::{MAX_SESSIONS, Session, Sessions};
use super::{
    Fleet, MAX_DRAINS, MAX_FAMILIES, MAX_HOMES, MAX_MOVES, MAX_SUSPECTS, MAX_WORKERS, Worker,
};
use crate::bug::{Bug, on};

const MAGIC: &[u8; 8] = b"FBYFLEET";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = MAGIC.len() + 2 + 4;

/// Why bytes are not a state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Not a snapshot of a fleet at all.
    #[error("not a snapshot of a fleet")]
    NotASnapshot,
    /// Written by a newer version.
    #[error(
        "the snapshot has format {found}, this version reads up to {VERSION}: update this node"
    )]
    Version {
        /// Format found.
        found: u16,
    },
    /// Uses features that this version does not know.
    #[error(
        "the snapshot uses feature level {found}, this version knows up to {FEATURE_LEVEL}: update this node"
    )]
    FeatureLevel {
        /// Level found.
        found: u32,
    },
    /// The bytes were damaged.
    #[error("the snapshot is damaged: its checksum does not hold")]
    Checksum,
    /// The checksum holds but the content does not.
    #[error("the snapshot does not hold a state: {what}")]
    Malformed {
        /// What is wrong.
        what: String,
    },
    /// Its audit does not verify.
    #[error("the snapshot's audit does not verify: {0}")]
    Audit(#[from] Broken),
}

#[derive(Clone, PartialEq, Message)]
struct Body {
    #[prost(message, optional, tag = "1")]
    facts: Option<wire::Facts>,
    #[prost(uint32, tag = "2")]
    feature_level: u32,
    #[prost(uint32, tag = "3")]
    newest_worker: u32,
    #[prost(message, repeated, tag = "4")]
    sessions: Vec<StoredSession>,
    #[prost(bytes = "bytes", tag = "5")]
    audit_head: Bytes,
    #[prost(uint64, tag = "6")]
    audit_count: u64,
    #[prost(message, repeated, tag = "7")]
    audit_tail: Vec<wire::AuditEntry>,
    #[prost(uint64, tag = "8")]
    newest_member: u64,
    #[prost(uint64, tag = "9")]
    homes_revision: u64,
}

#[derive(Clone, PartialEq, Message)]
struct StoredSession {
    #[prost(bytes = "bytes", tag = "1")]
    client: Bytes,
    #[prost(uint64, tag = "2")]
    sequence: u64,
    #[prost(uint64, tag = "3")]
    used: u64,
    #[prost(message, optional, tag = "4")]
    outcome: Option<wire::Outcome>,
}

impl Fleet {
    /// The whole state as bytes. Equal states give equal bytes.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        let body = self.kept().encode_to_vec();
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_be_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(&body).to_be_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// The state that [`Fleet::snapshot`] wrote.
    ///
    /// # Errors
    ///
    /// Returns what is wrong with the bytes. Arbitrary bytes never panic.
    pub fn restore(bytes: &[u8]) -> Result<Self, RestoreError> {
        let rest = bytes
            .strip_prefix(MAGIC)
            .ok_or(RestoreError::NotASnapshot)?;
        let (version, rest) = rest.split_first_chunk().ok_or(RestoreError::NotASnapshot)?;
        let found = u16::from_be_bytes(*version);
        if found != VERSION {
            return Err(RestoreError::Version { found });
        }
        let (checksum, body) = rest.split_first_chunk().ok_or(RestoreError::NotASnapshot)?;
        if crc32c::crc32c(body) != u32::from_be_bytes(*checksum) {
            return Err(RestoreError::Checksum);
        }
        let body = Body::decode(Bytes::copy_from_slice(body))
            .map_err(|_| malformed("it does not decode"))?;
        Self::from_body(body)
    }

    /// A digest of the whole state: replicas that applied the same log have the same one.
    #[must_use]
    pub fn state_hash(&self) -> [u8; 32] {
        Sha256::digest(self.body().encode_to_vec()).into()
    }

    /// What [`Fleet::snapshot`] keeps.
    fn kept(&self) -> Body {
        let mut body = self.body();
        if on(Bug::SnapshotWithoutSessions) {
            body.sessions.clear();
        }
        if on(Bug::SnapshotLosesDesired) {
            for worker in body.facts.iter_mut().flat_map(|facts| &mut facts.workers) {
                worker.desired = wire::Desired::Ready.into();
            }
        }
        if on(Bug::SnapshotLosesDrains)
            && let Some(facts) = &mut body.facts
        {
            facts.drains.clear();
        }
        if on(Bug::SnapshotLosesRebalances)
            && let Some(facts) = &mut body.facts
        {
            facts.rebalances.clear();
        }
        if on(Bug::SnapshotLosesSuspects)
            && let Some(facts) = &mut body.facts
        {
            facts.suspects.clear();
        }
        body
    }

    fn body(&self) -> Body {
        let sessions = self.sessions.iter().map(|(client, session)| StoredSession {
            client: client.to_wire(),
            sequence: session.sequence,
            used: session.used,
            outcome: Some(session.outcome.clone()),
        });
        Body {
            facts: Some(self.facts()),
            feature_level: self.feature_level,
            newest_worker: self.newest_worker,
            sessions: sessions.collect(),
            audit_head: self.audit.head().to_vec().into(),
            audit_count: self.audit.count(),
            audit_tail: self.audit.tail(usize::MAX),
            newest_member: self.newest_member,
            homes_revision: self.homes_revision.0,
        }
    }

    fn from_body(body: Body) -> Result<Self, RestoreError> {
        if body.feature_level > FEATURE_LEVEL {
            return Err(RestoreError::FeatureLevel {
                found: body.feature_level,
            });
        }
        let facts = body.facts.ok_or_else(|| malformed("it has no facts"))?;
        if facts.workers.len() > MAX_WORKERS || body.sessions.len() > MAX_SESSIONS {
            return Err(malformed("it has more workers or sessions than fit"));
        }
        let head = body.audit_head[..]
            .try_into()
            .map_err(|_| malformed("the audit's head is no hash"))?;
        let workers = facts.workers.into_iter().map(worker);
        let members = facts.members.iter().map(Member::from_wire);
        let members = members.collect::<Result<Vec<_>, _>>().map_err(malformed)?;
        if members
            .iter()
            .any(|member| member.id.0 > body.newest_member && body.newest_member > 0)
        {
            return Err(malformed("a member's id is newer than the newest"));
        }
        let sessions = body.sessions.into_iter().map(session);
        let fleet = Self {
            cluster_id: ClusterId::from_wire(&facts.cluster_id).map_err(malformed)?,
            cell_time: Millis(facts.cell_time_ms),
            revision: Revision(facts.revision),
            feature_level: body.feature_level,
            newest_worker: body.newest_worker,
            workers: workers.collect::<Result<_, _>>()?,
            // Written by a version that changed no members: the newest one is among them.
            newest_member: body.newest_member.max(super::newest(&members)),
            changing: false,
            knows: FEATURE_LEVEL,
            members,
            config: Agreed::stored(
                facts.config,
                Revision(facts.config_revision),
                body.feature_level,
            )
            .map_err(malformed)?,
            correlated: facts.correlated_expiry.into_iter().collect(),
            keys: keys(facts.keys.unwrap_or_default())?,
            drains: drains(facts.drains)?,
            families: families(facts.families)?,
            homes_revision: Revision(body.homes_revision),
            rebalances: rebalances(facts.rebalances)?,
            suspects: suspects(facts.suspects)?,
            sessions: Sessions::restore(sessions.collect::<Result<Vec<_>, _>>()?),
            audit: Chain::restore(head, body.audit_count, body.audit_tail)?,
        };
        Ok(fleet)
    }
}

fn worker(wire: wire::Worker) -> Result<(String, Worker), RestoreError> {
    let (desired, observed) = (
        wire::Desired::try_from(wire.desired).map_err(malformed)?,
        wire::Observed::try_from(wire.observed).map_err(malformed)?,
    );
    let worker = Worker {
        id: WorkerId(wire.id),
        name: wire.name.clone(),
        incarnation: Incarnation::from_wire(wire.incarnation.as_ref()).map_err(malformed)?,
        spec: WorkerSpec::from_wire(&wire.spec).map_err(malformed)?,
        spec_bytes: wire.spec,
        desired,
        observed,
        lost: wire.lost,
        departed: wire.departed,
        desired_revision: Revision(wire.desired_revision),
        acknowledged_revision: Revision(wire.acknowledged_revision),
        revision: Revision(wire.revision),
        end_streams: wire.end_streams,
    };
    Ok((wire.name, worker))
}

fn keys(ring: wire::KeyRing) -> Result<Vec<wire::FingerprintKey>, RestoreError> {
    let sound = ring.keys.len() <= MAX_KEYS && ring.keys.iter().all(|key| key.key.len() == 16);
    sound
        .then_some(ring.keys)
        .ok_or_else(|| malformed("its fingerprint keys are none"))
}

fn drains(stored: Vec<wire::Drain>) -> Result<BTreeMap<DrainId, Drain>, RestoreError> {
    if stored.len() > MAX_DRAINS {
        return Err(malformed("it has more drains than fit"));
    }
    let drains = stored.into_iter().map(|drain| {
        let drain = Drain::from_wire(drain).map_err(malformed)?;
        Ok((drain.id, drain))
    });
    drains.collect()
}

fn families(stored: Vec<wire::Family>) -> Result<BTreeMap<u64, Family>, RestoreError> {
    let families = stored.into_iter().map(|family| {
        let family = Family::from_wire(family).map_err(malformed)?;
        if !(1..=MAX_HOMES).contains(&family.homes.len()) {
            return Err(malformed("a family has no home, or more than fit"));
        }
        Ok((family.chunk, family))
    });
    let families: BTreeMap<_, _> = families.collect::<Result<_, _>>()?;
    if families.len() > MAX_FAMILIES {
        return Err(malformed("it has more families than fit"));
    }
    Ok(families)
}

fn rebalances(stored: Vec<wire::Rebalance>) -> Result<BTreeMap<String, Rebalance>, RestoreError> {
    if stored.len() > MAX_POOLS {
        return Err(malformed("it has more rebalances than fit"));
    }
    let rebalances = stored.into_iter().map(|rebalance| {
        let rebalance = Rebalance::from_wire(rebalance).map_err(malformed)?;
        let moves = rebalance.moves.len();
        if moves > MAX_MOVES || rebalance.done as usize > moves {
            return Err(malformed("a rebalance has more moves than fit"));
        }
        Ok((rebalance.pool.clone(), rebalance))
    });
    rebalances.collect()
}

fn suspects(stored: Vec<wire::Suspect>) -> Result<BTreeMap<u64, Suspect>, RestoreError> {
    if stored.len() > MAX_SUSPECTS {
        return Err(malformed("it has more suspects than fit"));
    }
    let suspects = stored.into_iter().map(|suspect| {
        let suspect = Suspect::from_wire(suspect).map_err(malformed)?;
        Ok((suspect.key, suspect))
    });
    suspects.collect()
}

fn session(stored: StoredSession) -> Result<(ClientId, Session), RestoreError> {
    let client = ClientId::from_wire(&stored.client).map_err(malformed)?;
    let outcome = stored
        .outcome
        .ok_or_else(|| malformed("a session has no outcome"))?;
    let session = Session {
        sequence: stored.sequence,
        used: stored.used,
        outcome,
    };
    Ok((client, session))
}

fn malformed(what: impl std::fmt::Display) -> RestoreError {
    RestoreError::Malformed {
        what: format!("{what}"),
    }
}
