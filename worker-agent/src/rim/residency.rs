//! Tells one balancer what is resident in the engine's cache, for as long as it listens.

use std::sync::Arc;
use std::time::Duration;

use forebay_link::{Code, FrameReceiver, FrameSender};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::work;
use forebay_scheduler::residency::{Cursor, Next};

use super::work::Shared;

/// Changes that come closer together are told together.
const BATCH: Duration = Duration::from_millis(20);

/// Between two pieces of a snapshot, each of which is 200 kB.
const PACE: Duration = Duration::from_millis(5);

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
    let patience = shared.patience.slow_reader;
    // Answers go first.
    sender.give_way();
    let mut changed = shared.residency();
    let telling = async {
        loop {
            changed.mark_unchanged();
            let mut turn = None;
            let (next, newest) = loop {
                if let Some(told) = told(&shared, cursor, turn.is_some()) {
                    break told;
                }
                // Whoever has a turn has it for a bounded time.
                turn = shared.snapshots.acquire().await.ok();
            };
            let sent = match next {
                Next::Nothing => true,
                Next::Deltas(deltas) => send_deltas(&mut sender, &deltas, patience).await,
                Next::Snapshot(pieces) => {
                    let sending = send_snapshot(&mut sender, pieces);
                    matches!(tokio::time::timeout(patience, sending).await, Ok(true))
                }
            };
            drop(turn);
            if !sent {
                return;
            }
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

/// What somebody with this cursor is to be told, and where it is then; `None`: it needs a snapshot, and
/// has no turn.
fn told(shared: &Shared, cursor: Option<Cursor>, has_turn: bool) -> Option<(Next, Cursor)> {
    shared.with(|core, _| {
        let publisher = core.publisher();
        publisher.flush();
        let may = has_turn || !publisher.needs_snapshot(cursor);
        may.then(|| (publisher.since(cursor), publisher.newest()))
    })
}

async fn send_deltas(
    sender: &mut FrameSender,
    deltas: &[Arc<work::ResidencyDelta>],
    patience: Duration,
) -> bool {
    for delta in deltas {
        let frame = Frame::message(Kind::ResidencyDelta, &**delta);
        let sent = tokio::time::timeout(patience, sender.send(&frame));
        if !matches!(sent.await, Ok(Ok(()))) {
            return false;
        }
    }
    true
}

/// Sends a snapshot, a piece at a time. What changes meanwhile waits in the publisher's ring.
async fn send_snapshot(sender: &mut FrameSender, pieces: Vec<work::ResidencySnapshot>) -> bool {
    for piece in pieces {
        let frame = Frame::message(Kind::ResidencySnapshot, &piece);
        if sender.send(&frame).await.is_err() {
            return false;
        }
        if !piece.last {
            tokio::time::sleep(PACE).await;
        }
    }
    true
}
