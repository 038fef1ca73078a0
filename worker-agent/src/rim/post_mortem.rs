//! Whether the engine died when an answer broke off, and telling the control plane which requests were on it.

use std::time::Duration;

use forebay_control_client::ControlClient;
use forebay_proto::Incarnation;
use forebay_proto::wire::fleet::ClearRequests;
use forebay_proto::wire::fleet::command::Action;
use tokio::time::Instant;

use super::pool::CallError;
use super::work::{Shared, Ticket, Work};
use crate::core::EngineDeath;
use crate::wire;

/// Whoever placed the request waits for so long until it is known: a process that is gone refuses connections at
/// once, vLLM's in front of a dead engine says so at once, and soon refuses them too.
const PATIENCE: Duration = Duration::from_millis(300);
const LOOKS: Duration = Duration::from_millis(20);
/// For one page of an engine that may be gone.
const LOOK: Duration = Duration::from_millis(100);
/// Suspects that ran well are told so often.
const CLEARED_EVERY: Duration = Duration::from_secs(1);
/// One attempt to tell; it is repeated.
const TELL: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(1);
/// By then it is told, or nobody is interested any more.
const MOST_TRIES: u32 = 60;

impl Shared {
    /// An answer broke off: what is held against this request, should the engine have died; else 0.
    pub(super) async fn post_mortem(&self, ticket: &Ticket) -> u32 {
        let id = ticket.id();
        self.with(|core, now| core.broke_off(now, id));
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(share) = self.with(|core, _| core.share_of(id)) {
                return share;
            }
            let gone = match self.engine.get("/health", LOOK).await {
                Err(CallError::NotStarted(problem)) => Some(problem),
                // Its process is about to follow, or another one is loading already.
                Ok(page) if page.status == 503 => Some("/health answers 503".to_owned()),
                Ok(_) | Err(CallError::Failed(_)) => None,
            };
            if let Some(problem) = gone {
                self.engine_down(&problem);
                return self.with(|core, _| core.share_of(id)).unwrap_or(0);
            }
            if Instant::now() >= until {
                // Should it be found dead in a while, the control plane is told all the same.
                return 0;
            }
            tokio::time::sleep(LOOKS).await;
        }
    }
}

/// Tells the control plane of deaths and of suspects that ran well, for as long as it is polled.
pub(super) async fn tell(work: &Work, client: &ControlClient, own: Incarnation) {
    let mut cleared = tokio::time::interval(CLEARED_EVERY);
    cleared.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            death = work.death() => {
                accuse(client, own, death.clone()).await;
                work.told_of(&death);
            }
            _ = cleared.tick() => clear(work, client, own).await,
        }
    }
}

async fn accuse(client: &ControlClient, own: Incarnation, death: EngineDeath) {
    tracing::warn!(
        in_flight = death.in_flight,
        "the engine died and nobody knows why: what was on it is suspected"
    );
    let action = Action::AccuseRequests(wire::accusation(own, death));
    for _ in 0..MOST_TRIES {
        match client.propose(action.clone(), "engine death", TELL).await {
            Ok(_) => return,
            Err(forebay_control_client::ClientError::Refused(refusal)) => {
                // A cell that has an older version in it keeps no suspects.
                tracing::info!(%refusal, "the death is not kept");
                return;
            }
            Err(error) => {
                tracing::debug!(%error, "the control plane was not told of the death yet");
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn clear(work: &Work, client: &ControlClient, own: Incarnation) {
    let keys = work.cleared();
    if keys.is_empty() {
        return;
    }
    let action = Action::ClearRequests(ClearRequests {
        incarnation: Some(own.to_wire()),
        keys,
    });
    // They run again, or are forgotten.
    if let Err(error) = client.propose(action, "ran well", TELL).await {
        tracing::debug!(%error, "suspects that ran well were not told");
    }
}
