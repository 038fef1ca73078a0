//! Watch streams: a snapshot where it is needed, deltas, heartbeats; acknowledgements come back.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use forebay_link::{FrameReceiver, FrameSender};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::control::{self, response::Response, watch_frame};
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Identity, Role};
use tokio::sync::watch;

use super::lifecycle::Running;
use super::publish::{NextTold, Publisher, Told};

/// Heartbeats of a watch stream.
const HEARTBEAT: Duration = Duration::from_millis(250);
/// A consumer that takes nothing for so long is cut off; it resumes elsewhere.
const SEND_PATIENCE: Duration = Duration::from_secs(5);

/// Watchers are woken at most so often: what comes in between they take together.
const COALESCE: Duration = Duration::from_millis(2);
/// And each adds so much, so that telling them never takes more than a part of what commits need: a
/// thousand are told within 40 ms.
const COALESCE_EACH: Duration = Duration::from_micros(40);

/// Wakes the watchers after each publication, for as long as the node runs.
///
/// Not the publication itself: a thousand of them would stand in line before whoever waits for the
/// outcome of what was just applied.
pub(crate) async fn wake(published: Arc<Publisher>, wakes: watch::Sender<u64>) {
    let mut changes = published.changes();
    drop(published);
    while changes.changed().await.is_ok() {
        tokio::task::yield_now().await;
        wakes.send_modify(|count| *count += 1);
        let watchers = u32::try_from(wakes.receiver_count()).unwrap_or(u32::MAX);
        tokio::time::sleep(COALESCE.max(COALESCE_EACH.saturating_mul(watchers))).await;
    }
}

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
    // Newer than what the consumer was told, and nothing that it sees: said with the next heartbeat. At
    // once it would be a million frames when a thousand agents register.
    let mut unseen: Option<Arc<Told>> = None;
    let mut changes = running.wakes.subscribe();
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        changes.mark_unchanged();
        let next = if started {
            running.published.told_since(held)
        } else {
            NextTold::Snapshot(running.published.facts())
        };
        match next {
            NextTold::Deltas(deltas) => {
                for told in deltas {
                    held = told.delta.revision;
                    let Told { delta, frames } = &*told;
                    let Encoded { frame, shows } = frames.for_consumer(consumer, delta);
                    if !shows {
                        unseen = Some(told);
                        continue;
                    }
                    unseen = None;
                    if deliver(send, &frame).await.is_none() {
                        return;
                    }
                }
            }
            // A consumer may be ahead of a node that is catching up: nothing is taken back.
            NextTold::Snapshot(facts) if started && facts.revision <= held => {}
            NextTold::Snapshot(facts) => {
                (held, unseen) = (facts.revision, None);
                let snapshot = watch_frame::Frame::Snapshot(facts_for(consumer, &facts));
                drop(facts);
                if deliver(send, &encode(snapshot)).await.is_none() {
                    return;
                }
            }
        }
        started = true;
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            _ = heartbeat.tick() => {
                if let Some(told) = unseen.take()
                    && deliver(send, &told.frames.for_consumer(consumer, &told.delta).frame).await.is_none()
                {
                    return;
                }
                let leader_heard_ms = running.replica.status().borrow().leader_heard_ms;
                let beat = control::Heartbeat { revision: held, leader_heard_ms };
                if deliver(send, &encode(watch_frame::Frame::Heartbeat(beat))).await.is_none() {
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

async fn deliver(send: &mut FrameSender, frame: &Frame) -> Option<()> {
    tokio::time::timeout(SEND_PATIENCE, send.send(frame))
        .await
        .ok()?
        .ok()
}

fn encode(frame: watch_frame::Frame) -> Frame {
    let watch = Response::Watch(control::WatchFrame { frame: Some(frame) });
    let response = control::Response {
        response: Some(watch),
    };
    Frame::message(Kind::Response, &response)
}

/// A delta as a frame, and whether it has more than the revision.
#[derive(Clone)]
pub(crate) struct Encoded {
    pub(crate) frame: Frame,
    pub(crate) shows: bool,
}

impl Encoded {
    fn of(consumer: &Identity, delta: &wire::Delta) -> Self {
        let delta = delta_for(consumer, delta);
        let shows = !delta.changes.is_empty();
        let frame = encode(watch_frame::Frame::Delta(delta));
        Self { frame, shows }
    }
}

/// The frames of one delta, each made when the first of its audience asks.
#[derive(Default)]
pub(crate) struct Frames {
    balancers: OnceLock<Encoded>,
    agents_not_named: OnceLock<Encoded>,
    others: OnceLock<Encoded>,
}

impl Frames {
    /// What this consumer sees of the delta that these frames are of.
    pub(crate) fn for_consumer(&self, consumer: &Identity, delta: &wire::Delta) -> Encoded {
        let audience = match consumer.role {
            Role::Balancer => &self.balancers,
            Role::Agent if names(delta, &consumer.name) => return Encoded::of(consumer, delta),
            Role::Agent => &self.agents_not_named,
            Role::Control | Role::Operator(_) => &self.others,
        };
        audience
            .get_or_init(|| Encoded::of(consumer, delta))
            .clone()
    }
}

/// Whether a delta changes this worker.
fn names(delta: &wire::Delta, worker: &str) -> bool {
    use wire::change::Change;
    delta.changes.iter().any(|change| match &change.change {
        Some(Change::WorkerPut(changed)) => changed.name == worker,
        Some(Change::WorkerRemoved(name)) => name == worker,
        _ => false,
    })
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

/// Who begins, follows and carries out drains and rebalances; balancers and agents need their workers alone.
fn sees_drains(consumer: &Identity) -> bool {
    matches!(consumer.role, Role::Control | Role::Operator(_))
}

/// Who places requests, and whoever moves homes or lets requests through. Agents are no home by their own doing, and
/// are told with each request whether it is suspected.
fn sees_families(consumer: &Identity) -> bool {
    consumer.role != Role::Agent
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
        drains: if sees_drains(consumer) {
            facts.drains.clone()
        } else {
            Vec::new()
        },
        key_epoch: 0,
        families: if sees_families(consumer) {
            facts.families.clone()
        } else {
            Vec::new()
        },
        rebalances: if sees_drains(consumer) {
            facts.rebalances.clone()
        } else {
            Vec::new()
        },
        suspects: if sees_families(consumer) {
            facts.suspects.clone()
        } else {
            Vec::new()
        },
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
            Change::DrainPut(_)
            | Change::DrainForgotten(_)
            | Change::RebalancePut(_)
            | Change::RebalanceForgotten(_),
        ) => sees_drains(consumer),
        Some(Change::Families(_) | Change::Suspects(_)) => sees_families(consumer),
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

    #[test]
    fn drains_are_for_operators_and_control_nodes() {
        let drain = wire::Drain {
            id: 7,
            ..wire::Drain::default()
        };
        let facts = wire::Facts {
            drains: vec![drain.clone()],
            ..wire::Facts::default()
        };
        let delta = wire::Delta {
            changes: vec![wire::Change {
                change: Some(wire::change::Change::DrainPut(drain)),
            }],
            ..wire::Delta::default()
        };
        for role in Role::ALL {
            let consumer = Identity {
                trust_domain: "td".into(),
                role,
                name: "n".into(),
            };
            let may = usize::from(!matches!(role, Role::Agent | Role::Balancer));
            assert_eq!(facts_for(&consumer, &facts).drains.len(), may, "{role:?}");
            assert_eq!(delta_for(&consumer, &delta).changes.len(), may, "{role:?}");
        }
    }

    #[test]
    fn an_audience_shares_one_frame_and_an_agent_sees_itself() {
        let put = wire::Change {
            change: Some(wire::change::Change::WorkerPut(wire::Worker {
                name: "w1".into(),
                ..wire::Worker::default()
            })),
        };
        let delta = wire::Delta {
            revision: 7,
            changes: vec![put],
            ..wire::Delta::default()
        };
        let frames = Frames::default();
        let seen = |role, name: &str| {
            let consumer = Identity {
                trust_domain: "td".into(),
                role,
                name: name.into(),
            };
            let Encoded { frame, shows } = frames.for_consumer(&consumer, &delta);
            assert_eq!(frame, Encoded::of(&consumer, &delta).frame);
            (frame.payload.as_ptr(), shows)
        };
        let balancer = seen(Role::Balancer, "b1");
        assert_eq!((balancer, true), (seen(Role::Balancer, "b2"), balancer.1));
        let stranger = seen(Role::Agent, "w2");
        assert_eq!((stranger, false), (seen(Role::Agent, "w3"), stranger.1));
        assert!(seen(Role::Agent, "w1").1);
    }
}
