//! What operators ask of the group itself: other members, another leader, its whole state, its speed.

use std::time::Duration;

use bytes::Bytes;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::control::{self, failure::Failure, response::Response};
use forebay_proto::wire::fleet::{self as wire, command::Action};
use forebay_proto::{Identity, NodeId};
use tokio::time::Instant;

use super::lifecycle::Running;
use super::rpc::{bad, deadline, not_leader, overloaded};
use crate::backup;
use crate::fleet::reign::Asked;
use crate::node::{ChangeRefused, MembersChange, Role};
use crate::replica::{ProposeError, ReadError, TransferError};

/// A change that waits for the one before it is tried again after this.
const CHANGE_PAUSE: Duration = Duration::from_millis(50);
/// A hand-over takes one election; raft gives it up by itself after that.
const TRANSFER_PATIENCE: Duration = Duration::from_millis(1_500);
/// The largest entry that is timed.
const MAX_MEASURED_BYTES: u32 = 64 << 10;

/// What Raft has to change besides.
pub(crate) fn change(action: &Action) -> Option<MembersChange> {
    let Action::ChangeMembers(change) = action else {
        return None;
    };
    let ids = |ids: &[u64]| ids.iter().copied().map(NodeId).collect();
    Some(MembersChange {
        add: change.add.iter().map(|member| NodeId(member.id)).collect(),
        promote: ids(&change.promote),
        remove: ids(&change.remove),
    })
}

/// Proposes a change of the members; one that is under way is waited for.
pub(crate) async fn propose(
    running: &Running,
    asked: Asked,
    change: MembersChange,
    deadline: Instant,
) -> Result<wire::Outcome, ProposeError> {
    loop {
        let (asked, change) = (asked.clone(), Some(change.clone()));
        let proposed = running.leader.propose_for(asked, change, deadline).await;
        let under_way = matches!(proposed, Err(ProposeError::Change(ChangeRefused::UnderWay)));
        if !under_way || Instant::now() + CHANGE_PAUSE >= deadline {
            return proposed;
        }
        tokio::time::sleep(CHANGE_PAUSE).await;
    }
}

/// A refusal by the leader, before anything was proposed.
pub(crate) fn unfit(problem: String) -> wire::Outcome {
    let refusal = Refusal::MembersUnfit { problem };
    wire::Outcome {
        outcome: Some(wire::outcome::Outcome::Refusal(refusal.to_wire())),
    }
}

/// Hands the leadership over and waits until it is there. A repetition succeeds.
pub(crate) async fn transfer(
    running: &Running,
    caller: &Identity,
    request: &control::Transfer,
) -> Result<Response, Failure> {
    let to = NodeId(request.to);
    let until = deadline(request.deadline_ms).min(Instant::now() + TRANSFER_PATIENCE);
    let mut status = running.replica.status();
    let (role, leader) = {
        let status = status.borrow_and_update();
        (status.role, status.leader)
    };
    if role != Role::Leader {
        return Err(not_leader(running, leader));
    }
    let done = |unchanged| Ok(Response::Transferred(control::Transferred { unchanged }));
    if to == running.cluster.node_id {
        return done(true);
    }
    let (who, reason) = (caller.short(), &request.reason);
    tracing::info!(who, %to, reason, "handing the leadership over");
    match running.replica.transfer(to).await {
        Ok(()) => {}
        Err(TransferError::Refused(problem)) => return Ok(Response::Outcome(unfit(problem))),
        Err(TransferError::Overloaded) => return Err(overloaded("requests to raft")),
        Err(TransferError::Stopped) => {
            let reason = "stopping".into();
            return Err(Failure::Stopped(control::Stopped { reason }));
        }
    }
    let leads = status.wait_for(|status| status.leader == Some(to));
    if let Ok(Ok(_)) = tokio::time::timeout_at(until, leads).await {
        return done(false);
    }
    let leader = running.replica.status().borrow().leader;
    if leader == Some(running.cluster.node_id) {
        let problem = format!(
            "node {to} did not take over in time: it does not answer, or is far behind; look at \
             `forebay raft members`"
        );
        return Ok(Response::Outcome(unfit(problem)));
    }
    // Another may have been elected: whoever it is says what holds.
    Err(not_leader(running, leader))
}

/// The whole state as a file, at least as new as anything that was agreed on before.
pub(crate) async fn snapshot(
    running: &Running,
    request: control::Snapshot,
) -> Result<control::SnapshotFile, Failure> {
    let until = deadline(request.deadline_ms);
    let began = Instant::now();
    let failed = |error| match error {
        ReadError::Timeout => Failure::NoQuorum(control::NoQuorum {
            waited_ms: forebay_proto::Millis::from_duration(began.elapsed()).0,
        }),
        ReadError::Overloaded => overloaded("reads"),
        ReadError::Stopped => Failure::Stopped(control::Stopped {
            reason: "stopping".into(),
        }),
    };
    running.replica.read_index(until).await.map_err(failed)?;
    let state = running.replica.snapshot(until).await.map_err(failed)?;
    // As large as a state can be: not on a thread that serves others.
    let file = tokio::task::spawn_blocking(move || backup::write(&state)).await;
    match file {
        Ok(Ok(file)) => Ok(control::SnapshotFile { file: file.into() }),
        Ok(Err(error)) => Err(bad(error.to_string())),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// Times one entry that no state machine of any version takes for a command, so that it changes nothing.
pub(crate) async fn measure(
    running: &Running,
    request: control::Measure,
) -> Result<control::Measured, Failure> {
    if request.bytes == 0 || request.bytes > MAX_MEASURED_BYTES {
        return Err(bad(format!("1 to {MAX_MEASURED_BYTES} bytes are timed")));
    }
    let until = deadline(request.deadline_ms);
    if !running.leader.leads(until).await {
        let leader = running.replica.status().borrow().leader;
        return Err(not_leader(running, leader));
    }
    let bytes = usize::try_from(request.bytes).unwrap_or_default();
    let began = Instant::now();
    let entry = Bytes::from(vec![NO_COMMAND; bytes]);
    match running.replica.propose(entry, until).await {
        Ok(_) => Ok(control::Measured {
            commit_us: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
        }),
        Err(ProposeError::NotLeader { leader }) => Err(not_leader(running, leader)),
        Err(ProposeError::Overloaded) => Err(overloaded("proposals")),
        Err(error @ (ProposeError::Size(_) | ProposeError::Change(_))) => {
            Err(bad(error.to_string()))
        }
        Err(ProposeError::Timeout | ProposeError::LeadershipLost) => {
            Err(Failure::Unknown(control::Unknown {}))
        }
        Err(ProposeError::Stopped) => Err(Failure::Stopped(control::Stopped {
            reason: "stopping".into(),
        })),
    }
}

/// A field number of zero, which no message has: an entry of it is refused wherever it is applied.
const NO_COMMAND: u8 = 0;
