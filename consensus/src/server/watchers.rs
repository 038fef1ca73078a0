//! Watch streams: a snapshot where it is needed, deltas, heartbeats; acknowledgements come back.

use std::sync::Arc;
use std::time::Duration;

use forebay_link::{FrameReceiver, FrameSender};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::control::{self, response::Response, watch_frame};
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Identity, Role};

use super::lifecycle::Running;
use super::publish::Next;

/// Heartbeats of a watch stream.
const HEARTBEAT: Duration = Duration::from_millis(250);
/// A consumer that takes nothing for so long is cut off; it resumes elsewhere.
const SEND_PATIENCE: Duration = Duration::from_secs(5);

/// Feeds one consumer until it leaves, the link ends or the node stops.
pub(crate) async fn feed(
    running: &Running,
    consumer: &Identity,
    request: &control::Watch,
    send: &mut FrameSender,
    recv: &mut FrameReceiver,
) {
    let same_cluster = request.cluster_id == running.cluster.cluster_id.0[..];
    let mut held = if same_cluster { request.revision } else { 0 };
    let mut started = same_cluster && held > 0;
    let mut changes = running.published.changes();
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        changes.mark_unchanged();
        let mut frames = Vec::new();
        match running.published.since(if started { held } else { 0 }) {
            Next::Deltas(deltas) if started => {
                for delta in deltas {
                    held = delta.revision;
                    frames.push(watch_frame::Frame::Delta(delta_for(consumer, &delta)));
                }
            }
            Next::Deltas(_) => {
                let facts = running.published.facts();
                held = facts.revision;
                frames.push(watch_frame::Frame::Snapshot(facts_for(consumer, &facts)));
            }
            Next::Snapshot(facts) => {
                // A consumer may be ahead of a node that is catching up: nothing is taken back.
                if !started || facts.revision > held {
                    held = facts.revision;
                    frames.push(watch_frame::Frame::Snapshot(facts_for(consumer, &facts)));
                }
            }
        }
        started = true;
        for frame in frames {
            if deliver(send, frame).await.is_none() {
                return;
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            _ = heartbeat.tick() => {
                let leader_heard_ms = running.replica.status().borrow().leader_heard_ms;
                let beat = control::Heartbeat { revision: held, leader_heard_ms };
                if deliver(send, watch_frame::Frame::Heartbeat(beat)).await.is_none() {
                    return;
                }
            }
            received = recv.recv() => match received {
                // Renewals carry the applied revision to the leader; here it only shows life.
                Ok(Some(frame)) if frame.kind == Kind::Applied => {}
                Ok(_) | Err(_) => return,
            },
            _ = running.replica.stopped() => return,
        }
    }
}

async fn deliver(send: &mut FrameSender, frame: watch_frame::Frame) -> Option<()> {
    let watch = Response::Watch(control::WatchFrame { frame: Some(frame) });
    let response = control::Response {
        response: Some(watch),
    };
    let frame = Frame::message(Kind::Response, &response);
    tokio::time::timeout(SEND_PATIENCE, send.send(&frame))
        .await
        .ok()?
        .ok()
}

/// Agents see themselves, all others the cell.
fn sees(consumer: &Identity, worker: &str) -> bool {
    consumer.role != Role::Agent || consumer.name == worker
}

fn facts_for(consumer: &Identity, facts: &Arc<wire::Facts>) -> wire::Facts {
    let mut facts = wire::Facts::clone(facts);
    facts.workers.retain(|worker| sees(consumer, &worker.name));
    facts
}

fn delta_for(consumer: &Identity, delta: &wire::Delta) -> wire::Delta {
    use wire::change::Change;
    let mut delta = delta.clone();
    delta.changes.retain(|change| match &change.change {
        Some(Change::WorkerPut(worker)) => sees(consumer, &worker.name),
        Some(Change::WorkerRemoved(name)) => sees(consumer, name),
        Some(Change::Config(_) | Change::CorrelatedExpiry(_)) | None => true,
    });
    delta
}
