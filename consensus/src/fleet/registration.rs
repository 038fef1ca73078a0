//! Registration: a name becomes a worker, and each start of its agent an incarnation.
//!
//! The grant is the log index of the registration that an agent with an empty disk was given; the
//! start is counted on that disk. So a copy of an old disk, a delayed message or a second process
//! can never be newer than what is registered.

use bytes::Bytes;
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::ids::check_name;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{FEATURE_LEVEL, Incarnation, Millis, Revision, WorkerId};
use wire::change::Change;
use wire::{Desired, Observed};

use super::proposal::fresh;
use super::workers::{Worker, incarnation};
use super::{Effect, Fleet, LIVE_WITHIN, MAX_WORKERS};
use crate::bug::{Bug, on};

/// A registration that is well-formed and fits the configuration.
struct Registration {
    name: String,
    spec: WorkerSpec,
    spec_bytes: Bytes,
    held: Option<Incarnation>,
    start: u32,
    takeover: bool,
}

impl Fleet {
    pub(super) fn register(
        &mut self,
        at: Revision,
        command: wire::RegisterWorker,
        evidence: Option<&wire::Evidence>,
    ) -> Result<Effect, Refusal> {
        let renewed_ms_ago = fresh(evidence)?.renewed_ms_ago;
        let asked = Registration::read(command)?;
        if !self.config.pools.contains(&asked.spec.pool) {
            return Err(Refusal::UnknownPool {
                pool: asked.spec.pool,
            });
        }
        match (self.workers.get(&asked.name), asked.held) {
            (None, None) => self.enlist(at, asked),
            // Its worker was removed, and with it every incarnation that this disk can hold.
            (None, Some(_)) => Err(Refusal::UnknownWorker { name: asked.name }),
            (Some(known), None) => {
                let next = known.regranted(at, &asked, renewed_ms_ago)?;
                self.start(at, next, asked)
            }
            (Some(known), Some(held)) => {
                let next = known.restarted(held, &asked)?;
                if known.is_already(next, &asked) {
                    return Ok(Effect {
                        worker: Some(known.to_wire()),
                        ..Effect::default()
                    });
                }
                self.start(at, next, asked)
            }
        }
    }

    /// A new name: the next id, and this entry's index as its grant.
    fn enlist(&mut self, at: Revision, asked: Registration) -> Result<Effect, Refusal> {
        let next_id = self.newest_worker.checked_add(1);
        let full = || Refusal::Full {
            what: "workers".into(),
            limit: MAX_WORKERS as u64,
        };
        let id = next_id
            .filter(|_| self.workers.len() < MAX_WORKERS)
            .ok_or_else(full)?;
        self.newest_worker = id;
        let worker = Worker {
            id: WorkerId(id),
            name: asked.name.clone(),
            incarnation: Incarnation {
                worker: WorkerId(id),
                grant: at.0,
                start: asked.start,
            },
            spec: asked.spec,
            spec_bytes: asked.spec_bytes,
            desired: Desired::Ready,
            observed: Observed::Joining,
            lost: false,
            departed: false,
            desired_revision: at,
            acknowledged_revision: Revision(0),
            revision: at,
            end_streams: false,
        };
        let wire = worker.to_wire();
        self.workers.insert(asked.name, worker);
        Ok(registered(wire))
    }

    /// A known name starts again: what operators want of it stays, what was seen of it is over.
    fn start(
        &mut self,
        at: Revision,
        next: Incarnation,
        asked: Registration,
    ) -> Result<Effect, Refusal> {
        let Some(worker) = self.workers.get_mut(&asked.name) else {
            return Err(Refusal::UnknownWorker { name: asked.name });
        };
        if worker.incarnation != next {
            worker.incarnation = next;
            worker.observed = Observed::Joining;
            worker.acknowledged_revision = Revision(0);
        }
        if self.knows < FEATURE_LEVEL && on(Bug::ReencodedByOldNode) {
            worker.spec_bytes = asked.spec.to_wire();
        } else {
            worker.spec_bytes = asked.spec_bytes;
        }
        worker.spec = asked.spec;
        worker.lost = false;
        worker.departed = false;
        worker.revision = at;
        Ok(registered(worker.to_wire()))
    }
}

fn registered(worker: wire::Worker) -> Effect {
    Effect {
        changes: vec![Change::WorkerPut(worker.clone())],
        worker: Some(worker),
        ..Effect::default()
    }
}

impl Worker {
    /// The incarnation of an agent that lost its disk: a new grant, unless somebody lives here.
    fn regranted(
        &self,
        at: Revision,
        asked: &Registration,
        renewed_ms_ago: Option<u64>,
    ) -> Result<Incarnation, Refusal> {
        let lives = renewed_ms_ago.filter(|ago| Millis(*ago) < LIVE_WITHIN && !self.departed);
        match lives {
            Some(renewed_ms_ago) if !asked.takeover => Err(Refusal::StillLive {
                name: asked.name.clone(),
                renewed_ms_ago,
            }),
            Some(_) | None => Ok(Incarnation {
                worker: self.id,
                grant: at.0,
                start: asked.start,
            }),
        }
    }

    /// The incarnation of an agent whose disk holds an earlier one: higher than the registered one,
    /// or the registered one itself, whose process may declare another spec (an engine that loaded
    /// an adapter) without dying for it.
    fn restarted(&self, held: Incarnation, asked: &Registration) -> Result<Incarnation, Refusal> {
        if held.worker != self.id {
            let problem = format!(
                "{held} is of another worker than {} ({}): use that worker's own data directory, or an empty one",
                self.name, self.id
            );
            return Err(Refusal::invalid("register.held", problem));
        }
        if held.grant > self.incarnation.grant {
            let problem = format!(
                "{held} was never granted here ({} is registered): the data directory belongs to another cluster or to a lost history; use an empty one",
                self.incarnation
            );
            return Err(Refusal::invalid("register.held", problem));
        }
        let next = Incarnation {
            start: asked.start,
            ..held
        };
        let again = next == self.incarnation && !self.departed;
        if next > self.incarnation || again || on(Bug::StaleIncarnation) {
            Ok(next)
        } else {
            Err(self.supersedes(next))
        }
    }

    fn is_already(&self, next: Incarnation, asked: &Registration) -> bool {
        self.incarnation == next && self.spec_bytes == asked.spec_bytes && !self.lost
    }
}

impl Registration {
    fn read(command: wire::RegisterWorker) -> Result<Self, Refusal> {
        check_name("worker", &command.name)
            .map_err(|error| Refusal::invalid("register.name", error.to_string()))?;
        let spec = WorkerSpec::from_wire(&command.spec)
            .map_err(|error| Refusal::invalid(error.path, error.problem))?;
        let held = match &command.held {
            None => None,
            held => Some(incarnation("register.held", held.as_ref())?),
        };
        Ok(Self {
            name: command.name,
            spec,
            // A copy: a slice would keep the whole log entry in memory.
            spec_bytes: Bytes::copy_from_slice(&command.spec),
            held,
            start: command.start,
            takeover: command.takeover,
        })
    }
}
