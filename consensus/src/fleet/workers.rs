//! Workers: what is agreed of each, and the commands that change it after registration.

use bytes::Bytes;
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::ids::check_name;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Incarnation, Revision, WorkerId};
use wire::change::Change;
use wire::{Desired, Observed};

use super::{Effect, Fleet};
use crate::probe::{Probe, hit};

/// One worker, as agreed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    /// Its id, given by the log and never reused.
    pub id: WorkerId,
    /// Its name.
    pub name: String,
    /// The start that may serve.
    pub incarnation: Incarnation,
    /// Its spec as this version reads it.
    pub spec: WorkerSpec,
    /// Its spec as it arrived, with what this version does not read.
    pub spec_bytes: Bytes,
    /// What operators want of it.
    pub desired: Desired,
    /// What its agent says of itself.
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

impl Worker {
    /// The worker for the wire.
    #[must_use]
    pub fn to_wire(&self) -> wire::Worker {
        wire::Worker {
            id: self.id.0,
            name: self.name.clone(),
            incarnation: Some(self.incarnation.to_wire()),
            spec: self.spec_bytes.clone(),
            desired: self.desired.into(),
            observed: self.observed.into(),
            lost: self.lost,
            desired_revision: self.desired_revision.0,
            acknowledged_revision: self.acknowledged_revision.0,
            revision: self.revision.0,
            departed: self.departed,
            end_streams: self.end_streams,
        }
    }

    /// Whether operators want it to serve and nothing says that it cannot.
    pub(super) fn serves(&self) -> bool {
        self.desired == Desired::Ready && !self.lost && !self.departed
    }
}

impl Fleet {
    pub(super) fn observe(
        &mut self,
        at: Revision,
        command: &wire::ObserveWorker,
    ) -> Result<Effect, Refusal> {
        let observed = match Observed::try_from(command.observed) {
            Ok(Observed::Unspecified) | Err(_) => {
                let problem = "is none that this version knows";
                return Err(Refusal::invalid("observe.observed", problem));
            }
            Ok(known) => known,
        };
        let worker = self.fenced("observe", command.incarnation.as_ref())?;
        let acknowledged = Revision(command.acknowledged_revision)
            .min(worker.desired_revision)
            .max(worker.acknowledged_revision);
        let same = worker.observed == observed && worker.acknowledged_revision == acknowledged;
        if same && !worker.lost {
            return Ok(Effect::unchanged());
        }
        worker.observed = observed;
        worker.acknowledged_revision = acknowledged;
        worker.lost = false;
        Ok(worker.touched(at))
    }

    pub(super) fn goodbye(
        &mut self,
        at: Revision,
        command: &wire::Goodbye,
    ) -> Result<Effect, Refusal> {
        let asked = incarnation("goodbye", command.incarnation.as_ref())?;
        let worker = self.by_id(asked.worker)?;
        if worker.incarnation != asked {
            return Err(worker.supersedes(asked));
        }
        if worker.departed {
            return Ok(Effect::unchanged());
        }
        worker.departed = true;
        worker.lost = false;
        Ok(worker.touched(at))
    }

    pub(super) fn set_desired(
        &mut self,
        at: Revision,
        command: &wire::SetDesired,
    ) -> Result<Effect, Refusal> {
        let desired = match Desired::try_from(command.desired) {
            Ok(Desired::Unspecified) | Err(_) => {
                let problem = "is none of ready, cordoned and draining";
                return Err(Refusal::invalid("set_desired.desired", problem));
            }
            Ok(known) => known,
        };
        let worker = self.named(&command.name)?;
        if worker.desired == desired {
            return Ok(Effect::unchanged());
        }
        if desired != Desired::Ready && !command.override_guard {
            self.check_models_stay_served(worker)?;
        }
        self.check_undrained(worker)?;
        let worker = self.named_mut(&command.name)?;
        Ok(worker.wanted(at, desired))
    }

    pub(super) fn remove(&mut self, command: &wire::RemoveWorker) -> Result<Effect, Refusal> {
        let worker = self.named(&command.name)?;
        if !command.override_guard {
            self.check_models_stay_served(worker)?;
        }
        self.workers.remove(&command.name);
        Ok(Effect::change(Change::WorkerRemoved(command.name.clone())))
    }

    /// Never an empty world: refuses to take away the last worker that a model has in its pool.
    ///
    /// While the worker itself serves, somebody else has to: one that is wanted ready, and neither
    /// lost nor departed. When it does not, another that is at least wanted ready is enough.
    fn check_models_stay_served(&self, leaving: &Worker) -> Result<(), Refusal> {
        if leaving.desired != Desired::Ready {
            return Ok(());
        }
        let pool = &leaving.spec.pool;
        for model in &leaving.spec.models {
            let stays_served = self.workers.values().any(|other| {
                let stands_in = other.serves() || !leaving.serves();
                other.id != leaving.id
                    && other.desired == Desired::Ready
                    && stands_in
                    && other.spec.pool == *pool
                    && other.spec.serves(model)
            });
            if !stays_served {
                hit(Probe::LeavesModelEmpty);
                return Err(Refusal::LeavesModelEmpty {
                    model: model.clone(),
                    pool: pool.clone(),
                });
            }
        }
        Ok(())
    }

    pub(super) fn named(&self, name: &str) -> Result<&Worker, Refusal> {
        self.workers.get(name).ok_or_else(|| unknown(name))
    }

    pub(super) fn named_mut(&mut self, name: &str) -> Result<&mut Worker, Refusal> {
        self.workers.get_mut(name).ok_or_else(|| unknown(name))
    }

    fn by_id(&mut self, id: WorkerId) -> Result<&mut Worker, Refusal> {
        self.workers
            .values_mut()
            .find(|worker| worker.id == id)
            .ok_or_else(|| unknown(&id.to_string()))
    }

    /// The worker of this incarnation, if it is the one that lives.
    pub(super) fn fenced(
        &mut self,
        path: &str,
        wire: Option<&forebay_proto::wire::Incarnation>,
    ) -> Result<&mut Worker, Refusal> {
        let asked = incarnation(path, wire)?;
        let worker = self.by_id(asked.worker)?;
        if worker.incarnation == asked && !worker.departed {
            Ok(worker)
        } else {
            Err(worker.supersedes(asked))
        }
    }
}

impl Worker {
    /// Operators want this of it from now on; its agent has to say so anew.
    pub(super) fn wanted(&mut self, at: Revision, desired: Desired) -> Effect {
        self.desired = desired;
        self.end_streams = false;
        self.desired_revision = at;
        self.touched(at)
    }

    /// Whether its agent has said that the desired state is in force there.
    pub(super) fn is_in_force(&self) -> bool {
        self.acknowledged_revision >= self.desired_revision
    }

    /// Notes when it changed; watchers get it whole.
    pub(super) fn touched(&mut self, at: Revision) -> Effect {
        self.revision = at;
        Effect::change(Change::WorkerPut(self.to_wire()))
    }

    pub(super) fn supersedes(&self, asked: Incarnation) -> Refusal {
        hit(Probe::Superseded);
        Refusal::Superseded {
            asked,
            current: self.incarnation,
        }
    }
}

pub(super) fn incarnation(
    path: &str,
    wire: Option<&forebay_proto::wire::Incarnation>,
) -> Result<Incarnation, Refusal> {
    Incarnation::from_wire(wire)
        .map_err(|error| Refusal::invalid(format!("{path}.incarnation"), error.to_string()))
}

/// A name is shown only if it is one; anything else is cut.
fn unknown(name: &str) -> Refusal {
    let shown = match check_name("worker", name) {
        Ok(()) => name.to_owned(),
        Err(_) => name.chars().take(64).collect(),
    };
    Refusal::UnknownWorker { name: shown }
}
