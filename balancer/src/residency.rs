//! Follows what is resident in a worker's cache, for as long as its link stands.
#![allow(clippy::disallowed_methods)] // the rim: this is where time passes

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use forebay_link::{Code, FrameReceiver, Link};
use forebay_proto::Incarnation;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::work;
use forebay_scheduler::residency::{Follower, Op, Resync};

use crate::shared::Shared;

/// Until a stream that ended is opened anew, and at most, where none is any use.
const AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// Changes of the index under one lock: other workers' wait for no more, lookups for none.
const BATCH: usize = 512;

/// Follows one start of a worker until dropped; then nothing is known of it.
pub(crate) async fn follow(
    shared: Arc<Shared>,
    link: Link,
    incarnation: Incarnation,
) -> Infallible {
    let mut following = Following {
        follower: Follower::new(incarnation),
        incarnation,
        chunks: 0,
        shared,
    };
    let mut wait = AGAIN.0;
    loop {
        let mut useful = false;
        if let Ok((mut sender, mut receiver)) = link.open() {
            let cursor = following.follower.cursor();
            let follow = work::Follow {
                incarnation: Some(incarnation.to_wire()),
                cache: cursor.map_or(0, |cursor| cursor.cache),
                seq: cursor.map_or(0, |cursor| cursor.seq),
            };
            let frame = Frame::message(Kind::Follow, &follow);
            if sender.send(&frame).await.is_ok() {
                useful = following.take(&mut receiver).await;
            }
            receiver.stop(Code::Normal);
        }
        wait = if useful {
            AGAIN.0
        } else {
            AGAIN.1.min(wait * 2)
        };
        tokio::time::sleep(wait).await;
    }
}

struct Following {
    shared: Arc<Shared>,
    incarnation: Incarnation,
    follower: Follower,
    /// As the gauge has it.
    chunks: i64,
}

impl Following {
    /// Takes what comes until the stream ends or has to begin anew. Returns whether any was of use.
    async fn take(&mut self, receiver: &mut FrameReceiver) -> bool {
        let mut useful = false;
        while let Ok(Some(frame)) = receiver.recv().await {
            match self.ops(&frame) {
                Ok(ops) => {
                    useful = true;
                    self.apply(&ops);
                }
                Err(resync) => {
                    tracing::debug!(worker = %self.incarnation, %resync, "residency begins anew");
                    self.shared.metrics.resyncs.inc();
                    self.apply(&[Op::Clear]);
                    return useful;
                }
            }
        }
        useful
    }

    fn ops(&mut self, frame: &Frame) -> Result<Vec<Op>, Resync> {
        match frame.kind {
            Kind::ResidencySnapshot => {
                let piece = frame.decode().map_err(|_| Resync::Malformed)?;
                self.follower.snapshot(&piece)
            }
            Kind::ResidencyDelta => {
                let delta = frame.decode().map_err(|_| Resync::Malformed)?;
                self.follower.delta(&delta)
            }
            _ => Err(Resync::Malformed),
        }
    }

    fn apply(&mut self, ops: &[Op]) {
        let worker = self.incarnation.worker;
        for batch in ops.chunks(BATCH) {
            let mut index = self.shared.index_writer.lock();
            for op in batch {
                match *op {
                    Op::Clear => index.clear(worker),
                    Op::Store(chunk, tokens) => index.store(worker, chunk, tokens),
                    Op::Remove(chunk) => index.remove(worker, chunk),
                }
            }
        }
        self.show(i64::try_from(self.follower.len()).unwrap_or(i64::MAX));
    }

    fn show(&mut self, chunks: i64) {
        self.shared.metrics.resident.inc_by(chunks - self.chunks);
        self.chunks = chunks;
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let mut index = self.shared.index_writer.lock();
        index.clear(self.incarnation.worker);
        drop(index);
        self.show(0);
    }
}
