//! Keeping a lease: once a second, and at once when there is something new to say.

use std::sync::Arc;
use std::time::Duration;

use forebay_link::Backoff;
use forebay_proto::wire::control as wire;
use forebay_proto::wire::fleet::Observed;
use forebay_proto::{Incarnation, Revision};
use rand::Rng;
use tokio::sync::watch;
use tokio::time::Instant;

use super::client::ControlClient;
use super::watch::AbortOnDrop;
use crate::core::error::ClientError;

/// Between two renewals, less up to a tenth.
const EVERY: Duration = Duration::from_secs(1);

/// A renewal that takes longer has missed its turn.
const PATIENCE: Duration = Duration::from_secs(1);

/// Changes that come closer together are told together.
const COALESCE: Duration = Duration::from_millis(20);

/// What a renewal says.
#[derive(Clone, Debug, PartialEq)]
pub struct RenewState {
    /// Agents: the registered incarnation. Balancers: none.
    pub incarnation: Option<Incarnation>,
    /// The newest revision that the process works by.
    pub applied_revision: Revision,
    /// Agents: what they say of themselves. Balancers: unspecified.
    pub observed: Observed,
    /// Agents: what they have under way. Balancers: nothing.
    pub work: Option<wire::Work>,
    /// Agents: what they are asked for, as of some moment. Each is told once.
    pub heat: Option<Arc<wire::Heat>>,
}

/// What the leader wants to have of what an agent recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Names the plan that it is for; to be answered once.
    pub number: u64,
    /// As far back.
    pub window_ms: u64,
    /// At most so many.
    pub most: u32,
}

/// How renewing goes.
#[derive(Clone, Debug, Default)]
pub struct RenewStatus {
    /// When a leader last took a renewal.
    pub renewed: Option<Instant>,
    /// Newest revision of the facts that the leader told.
    pub revision: Revision,
    /// What the leader wants besides, if it does.
    pub wanted: Option<Wanted>,
    /// Why the newest attempt failed; `None` when it did not. After
    /// [`ClientError::Superseded`] there are no more attempts: the process has to stop.
    pub problem: Option<ClientError>,
}

/// Renewing goes on until this is dropped.
#[derive(Debug)]
pub struct Renewing {
    /// How it goes.
    pub status: watch::Receiver<RenewStatus>,
    _task: AbortOnDrop,
}

impl ControlClient {
    /// Renews the caller's lease from now on, with what `state` holds.
    ///
    /// Ends by itself when a newer process took this one's place.
    #[must_use]
    pub fn spawn_renew(&self, state: watch::Receiver<RenewState>) -> Renewing {
        let (sender, status) = watch::channel(RenewStatus::default());
        let task = tokio::spawn(renew(self.clone(), state, sender));
        Renewing {
            status,
            _task: AbortOnDrop(task),
        }
    }
}

async fn renew(
    client: ControlClient,
    mut state: watch::Receiver<RenewState>,
    status: watch::Sender<RenewStatus>,
) {
    let mut rng = client.child_rng();
    let mut told: Option<Arc<wire::Heat>> = None;
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_millis(500));
    loop {
        let said = state.borrow_and_update().clone();
        let is_told =
            |heat: &Arc<wire::Heat>| told.as_ref().is_some_and(|told| Arc::ptr_eq(told, heat));
        let heat = said.heat.filter(|heat| !is_told(heat));
        let renew = wire::Renew {
            incarnation: said.incarnation.map(Incarnation::to_wire),
            applied_revision: said.applied_revision.0,
            observed: said.observed.into(),
            feature_level: forebay_proto::FEATURE_LEVEL,
            work: said.work,
            heat: heat.as_deref().cloned(),
        };
        let pause = match client.renew(renew, PATIENCE).await {
            Ok(renewed) => {
                backoff.reset();
                told = heat.or(told);
                status.send_replace(RenewStatus {
                    renewed: Some(Instant::now()),
                    revision: Revision(renewed.revision),
                    wanted: wanted(&renewed),
                    problem: None,
                });
                EVERY.mul_f64(rng.random_range(0.9..=1.0))
            }
            Err(problem) => {
                let over = matches!(problem, ClientError::Superseded { .. });
                status.send_modify(|status| status.problem = Some(problem));
                if over {
                    return;
                }
                backoff.next(&mut rng)
            }
        };
        tokio::time::sleep(COALESCE.min(pause)).await;
        let rest = tokio::time::sleep(pause.saturating_sub(COALESCE));
        tokio::select! {
            () = rest => {}
            changed = state.changed() => if changed.is_err() {
                return;
            },
        }
    }
}

fn wanted(renewed: &wire::Renewed) -> Option<Wanted> {
    (renewed.wants_arrivals != 0).then_some(Wanted {
        number: renewed.wants_arrivals,
        window_ms: renewed.window_ms,
        most: renewed.most,
    })
}
