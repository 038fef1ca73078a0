//! Watch streams: a snapshot where it is needed, deltas, heartbeats; acknowledgements come back.

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
        let next = if started {
            running.published.since(held)
        } else {
            Next::Snapshot(running.published.facts())
        };
        match next {
            Next::Deltas(deltas) => {
                let last = deltas.last().map(|delta| delta.revision);
                for delta in deltas {
                    held = delta.revision;
                    let delta = delta_for(consumer, &delta);
                    // One that shows this consumer nothing only tells the revision: the last will do.
                    if delta.changes.is_empty() && Some(held) != last {
                        continue;
                    }
                    if deliver(send, watch_frame::Frame::Delta(delta))
                        .await
                        .is_none()
                    {
                        return;
                    }
                }
            }
            // A consumer may be ahead of a node that is catching up: nothing is taken back.
            Next::Snapshot(facts) if started && facts.revision <= held => {}
            Next::Snapshot(facts) => {
                held = facts.revision;
                let snapshot = watch_frame::Frame::Snapshot(facts_for(consumer, &facts));
                drop(facts);
                if deliver(send, snapshot).await.is_none() {
                    return;
                }
            }
        }
        started = true;
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
///
/// What an agent does depends on its own worker and on the configuration alone. Its pool would cost
/// a cell of a thousand agents a million frames when all of them register or change state once.
fn sees(consumer: &Identity, worker: &str) -> bool {
    consumer.role != Role::Agent || consumer.name == worker
}

/// Who makes fingerprints. Whoever has the key can tell which prompts share a prefix.
fn gets_keys(consumer: &Identity) -> bool {
    consumer.role == Role::Balancer
}

/// Copies no more than the consumer sees: agents of a whole cell may ask at once.
fn facts_for(consumer: &Identity, facts: &wire::Facts) -> wire::Facts {
    let workers = facts.workers.iter();
    let workers = workers.filter(|worker| sees(consumer, &worker.name));
    wire::Facts {
        cluster_id: facts.cluster_id.clone(),
        revision: facts.revision,
        cell_time_ms: facts.cell_time_ms,
        workers: workers.cloned().collect(),
        members: facts.members.clone(),
        config: facts.config.clone(),
        config_revision: facts.config_revision,
        correlated_expiry: facts.correlated_expiry.clone(),
        keys: facts.keys.clone().filter(|_| gets_keys(consumer)),
        feature_level: facts.feature_level,
    }
}

fn delta_for(consumer: &Identity, delta: &wire::Delta) -> wire::Delta {
    use wire::change::Change;
    let changes = delta.changes.iter();
    let changes = changes.filter(|change| match &change.change {
        Some(Change::WorkerPut(worker)) => sees(consumer, &worker.name),
        Some(Change::WorkerRemoved(name)) => sees(consumer, name),
        Some(Change::Keys(_)) => gets_keys(consumer),
        Some(
            Change::Config(_)
            | Change::CorrelatedExpiry(_)
            | Change::Members(_)
            | Change::FeatureLevel(_),
        )
        | None => true,
    });
    wire::Delta {
        revision: delta.revision,
        cell_time_ms: delta.cell_time_ms,
        changes: changes.cloned().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_keys_are_for_balancers_only() {
        let keys = Some(wire::KeyRing {
            keys: vec![wire::FingerprintKey {
                epoch: 1,
                key: vec![7; 16].into(),
            }],
        });
        let facts = wire::Facts {
            keys: keys.clone(),
            ..wire::Facts::default()
        };
        let delta = wire::Delta {
            changes: vec![wire::Change {
                change: keys.map(wire::change::Change::Keys),
            }],
            ..wire::Delta::default()
        };
        for role in Role::ALL {
            let consumer = Identity {
                trust_domain: "td".into(),
                role,
                name: "n".into(),
            };
            let may = role == Role::Balancer;
            assert_eq!(facts_for(&consumer, &facts).keys.is_some(), may, "{role:?}");
            assert_eq!(
                delta_for(&consumer, &delta).changes.len(),
                usize::from(may),
                "{role:?}"
            );
        }
    }
}
