//! Tells one balancer what is resident in the engine's cache, for as long as it listens.

use std::sync::Arc;
use std::time::Duration;

use forebay_link::{Code, FrameReceiver, FrameSender};
use forebay_proto::frame::{Frame, Kind};
use forebay_scheduler::residency::Next;

use super::work::Shared;

/// Changes that come closer together are told together.
const BATCH: Duration = Duration::from_millis(20);

/// Serves a stream that began with `Follow`.
pub(super) async fn tell(
    shared: Arc<Shared>,
    follow: Frame,
    mut sender: FrameSender,
    mut receiver: FrameReceiver,
) {
    let Some(mut cursor) = crate::wire::cursor(&follow) else {
        sender.reset(Code::Protocol);
        receiver.stop(Code::Protocol);
        return;
    };
    let mut changed = shared.residency();
    let telling = async {
        loop {
            changed.mark_unchanged();
            let far_behind = shared.with(|core, _| core.publisher().needs_snapshot(cursor));
            // Who takes its snapshot slowly makes the others wait, but not for ever.
            let turn = match far_behind {
                true => tokio::time::timeout(shared.patience.peer, shared.snapshots.acquire())
                    .await
                    .ok(),
                false => None,
            };
            let (next, newest) = shared.with(|core, _| {
                let publisher = core.publisher();
                publisher.flush();
                (publisher.since(cursor), publisher.newest())
            });
            for frame in frames(next) {
                let sent = tokio::time::timeout(shared.patience.slow_reader, sender.send(&frame));
                if !matches!(sent.await, Ok(Ok(()))) {
                    return;
                }
            }
            drop(turn);
            cursor = Some(newest);
            if changed.changed().await.is_err() {
                return;
            }
            tokio::time::sleep(BATCH).await;
        }
    };
    tokio::select! {
        () = telling => {}
        // A balancer that says more, or leaves, does not follow any more.
        _ = receiver.recv() => {}
    }
}

fn frames(next: Next) -> Vec<Frame> {
    match next {
        Next::Nothing => Vec::new(),
        Next::Deltas(deltas) => {
            let deltas = deltas.iter();
            deltas
                .map(|delta| Frame::message(Kind::ResidencyDelta, &**delta))
                .collect()
        }
        Next::Snapshot(pieces) => {
            let pieces = pieces.iter();
            pieces
                .map(|piece| Frame::message(Kind::ResidencySnapshot, piece))
                .collect()
        }
    }
}
