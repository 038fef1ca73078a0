//! What the agent is asked for, told to the leader: some with a renewal every few seconds, and what was recorded
//! when it makes a plan.

use std::sync::Arc;
use std::time::Duration;

use forebay_control_client::{ControlClient, RenewState, RenewStatus, Wanted};
use forebay_proto::wire::control::Arrivals;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::work::Work;
use crate::wire;

/// Between two that are told.
const EVERY: Duration = Duration::from_secs(5);
/// A plan does not wait for longer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);
/// Requests in one answer: so many fit what a control node reads of an agent.
const MOST_ARRIVALS: u32 = 1_200;

/// Has the newest told with the renewals, while they go on.
pub(super) async fn tell(work: &Work, pool: &str, said: &watch::Sender<RenewState>) {
    let mut every = tokio::time::interval(EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let mut heat = work.heat();
        for family in &mut heat.families {
            pool.clone_into(&mut family.pool);
        }
        // It goes along with the next renewal.
        said.send_if_modified(|state| {
            state.heat = Some(Arc::new(heat));
            false
        });
    }
}

/// Sends what was recorded whenever a leader wants it, once for each number.
pub(super) async fn answer(
    work: &Work,
    client: &ControlClient,
    mut status: watch::Receiver<RenewStatus>,
) {
    let mut answered = 0;
    loop {
        let wanted = status
            .wait_for(|status| {
                status
                    .wanted
                    .is_some_and(|wanted| wanted.number != answered)
            })
            .await
            .map(|status| status.wanted);
        let Ok(Some(wanted)) = wanted else {
            return;
        };
        answered = wanted.number;
        let told = client
            .tell_arrivals(arrivals(work, wanted), ANSWER_PATIENCE)
            .await;
        if let Err(error) = told {
            tracing::warn!(%error, "a plan is made without what this worker recorded");
        }
    }
}

fn arrivals(work: &Work, wanted: Wanted) -> Arrivals {
    let most = wanted.most.min(MOST_ARRIVALS);
    let recorded = work.recorded(wanted.window_ms, most as usize);
    wire::arrivals(wanted.number, recorded)
}
