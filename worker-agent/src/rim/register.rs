//! Staying registered: once at the start, again when the engine's models change, and the lease.

use std::time::Duration;

use forebay_control_client::{ClientError, ControlClient};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet::RegisterWorker;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::{ClusterId, Incarnation, Revision};

use super::disk::{DataDir, Record};
use crate::error::AgentError;

const PROPOSE_PATIENCE: Duration = Duration::from_secs(5);
const PROBE_PATIENCE: Duration = Duration::from_secs(1);
/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(1);
/// The first start under a new grant.
const FIRST_START: u32 = 1;

/// What the fleet agreed on.
pub(super) struct Registered {
    pub(super) cluster_id: ClusterId,
    pub(super) incarnation: Incarnation,
    pub(super) revision: Revision,
}

/// Who asks to be registered.
pub(super) struct Registrar<'a> {
    pub(super) client: &'a ControlClient,
    pub(super) name: &'a str,
    pub(super) takeover: bool,
    /// The cluster that the data directory is of, where it says so.
    pub(super) cluster: Option<ClusterId>,
}

impl Registrar<'_> {
    /// Registers, for as long as it takes.
    ///
    /// `held` is the start that is on disk; it must not have been asked for with another spec.
    pub(super) async fn register(
        &self,
        dir: &DataDir,
        held: Option<&Record>,
        spec: &WorkerSpec,
    ) -> Result<Registered, AgentError> {
        let mut waiting_for = String::new();
        loop {
            let problem = match self.attempt(dir, held, spec).await {
                Ok(registered) => return Ok(registered),
                Err(Attempt::Fatal(error)) => return Err(error),
                Err(Attempt::Wait(kind, problem)) => {
                    // Said once: the same problem comes back with every attempt.
                    if waiting_for != kind {
                        kind.clone_into(&mut waiting_for);
                        Some(problem)
                    } else {
                        None
                    }
                }
            };
            if let Some(problem) = problem {
                tracing::warn!(problem, "not registered yet, trying on");
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn attempt(
        &self,
        dir: &DataDir,
        held: Option<&Record>,
        spec: &WorkerSpec,
    ) -> Result<Registered, Attempt> {
        let cluster_id = self.cluster(dir).await?;
        let action = Action::Register(RegisterWorker {
            name: self.name.into(),
            spec: spec.to_wire(),
            held: held.map(|held| held.incarnation().to_wire()),
            start: held.map_or(FIRST_START, |held| held.incarnation().start),
            takeover: self.takeover,
        });
        match self
            .client
            .propose(action, "agent start", PROPOSE_PATIENCE)
            .await
        {
            Ok(done) => match done.worker {
                Some(worker) => Ok(Registered {
                    cluster_id,
                    incarnation: worker.incarnation,
                    revision: done.revision,
                }),
                None => Err(Attempt::wait(
                    "answer",
                    "the control plane's answer names no worker",
                )),
            },
            Err(error) => Err(self.read_error(held, error)),
        }
    }

    fn read_error(&self, held: Option<&Record>, error: ClientError) -> Attempt {
        let name = self.name.to_owned();
        match error {
            ClientError::Refused(refusal) => match refusal {
                Refusal::Superseded { asked, current } => Attempt::Fatal(AgentError::Superseded {
                    name,
                    own: asked,
                    current: Some(current),
                }),
                Refusal::UnknownWorker { .. } => Attempt::Fatal(AgentError::Removed { name }),
                // The lease of a process that is gone runs out.
                Refusal::StillLive { .. } => Attempt::wait("still-live", &refusal),
                // Operators may still make room for a worker that serves already.
                Refusal::UnknownPool { .. } | Refusal::Full { .. } if held.is_some() => {
                    Attempt::wait(refusal.name(), &refusal)
                }
                Refusal::StaleEvidence { .. }
                | Refusal::StaleSequence { .. }
                | Refusal::FeatureTooNew { .. } => Attempt::wait(refusal.name(), &refusal),
                Refusal::UnknownPool { .. }
                | Refusal::Full { .. }
                | Refusal::LeavesModelEmpty { .. }
                | Refusal::RevisionConflict { .. }
                | Refusal::Invalid { .. }
                | Refusal::MembersUnfit { .. }
                | Refusal::CapacityShort { .. }
                | Refusal::CapacityUnknown { .. }
                | Refusal::DrainActive { .. }
                | Refusal::UnknownDrain { .. }
                | Refusal::RebalanceActive { .. }
                | Refusal::UnknownRebalance { .. }
                | Refusal::PlanStale { .. }
                | Refusal::UnknownSuspect { .. }
                | Refusal::PoolInUse { .. } => {
                    Attempt::Fatal(AgentError::Refused { name, refusal })
                }
            },
            ClientError::Unauthorized { .. } | ClientError::BadRequest { .. } => {
                Attempt::Fatal(AgentError::Control { name, error })
            }
            ClientError::Superseded { current } => Attempt::Fatal(match held {
                Some(held) => AgentError::Superseded {
                    name,
                    own: held.incarnation(),
                    current,
                },
                None => AgentError::Control { name, error },
            }),
            other => Attempt::wait("control", &other),
        }
    }

    /// The one cluster that the nodes are of, which must be the one that this directory is of.
    async fn cluster(&self, dir: &DataDir) -> Result<ClusterId, Attempt> {
        let mut known: Option<(String, ClusterId)> = None;
        for (address, status) in self.client.probe_all(PROBE_PATIENCE).await {
            let Ok(status) = status else { continue };
            let Ok(found) = ClusterId::from_wire(&status.cluster_id) else {
                continue;
            };
            if let Some(held) = self.cluster
                && held != found
            {
                return Err(Attempt::Fatal(AgentError::OtherCluster {
                    directory: dir.path().into(),
                    held,
                    address,
                    found,
                }));
            }
            match &known {
                Some((first, a)) if *a != found => {
                    return Err(Attempt::Fatal(AgentError::MixedControl {
                        first: first.clone(),
                        a: *a,
                        second: address,
                        b: found,
                    }));
                }
                Some(_) => {}
                None => known = Some((address, found)),
            }
        }
        known.map(|(_, cluster)| cluster).ok_or_else(|| {
            let problem = "no initialised control node answers: start one, run `forebay init` once, or check --control";
            Attempt::wait("control", problem)
        })
    }
}

/// What a failed attempt means.
enum Attempt {
    Fatal(AgentError),
    /// The kind of problem, and what to say of it.
    Wait(String, String),
}

impl Attempt {
    fn wait(kind: &str, problem: &(impl std::fmt::Display + ?Sized)) -> Self {
        Self::Wait(kind.into(), problem.to_string())
    }
}
