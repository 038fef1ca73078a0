//! Follows what is resident in a worker's cache, for as long as its link stands.
#![allow(clippy::disallowed_methods)] // the rim: this is where time passes

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use forebay_link::{Code, FrameReceiver, Link};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::work;
use forebay_proto::{Incarnation, WorkerId};
use forebay_scheduler::residency::{Follower, Grade, Op, Resync};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::metrics::Metrics;
use crate::shared::Shared;

/// Until a stream that ended is opened anew, and at most, where none is any use.
const AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// Changes of the index under one lock: other workers' wait for no more, lookups for none.
const BATCH: usize = 512;

/// Workers whose snapshots are taken at once; others wait for their turn.
const SNAPSHOTS: usize = 16;
/// A snapshot that takes longer makes the others wait no more.
const TURN: Duration = Duration::from_secs(10);

/// What is known of the caches of the workers that are connected.
pub(crate) struct Caches {
    known: Mutex<BTreeMap<WorkerId, Option<Grade>>>,
    turns: Semaphore,
}

impl Default for Caches {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            turns: Semaphore::new(SNAPSHOTS),
        }
    }
}

impl Caches {
    /// How a worker's agent knows what it tells; `None`: its snapshot is not in, or it is not connected.
    pub(crate) fn grade(&self, worker: WorkerId) -> Option<Grade> {
        self.known.lock().get(&worker).copied().flatten()
    }

    /// Workers that are connected and whose snapshots are not in.
    pub(crate) fn pending(&self) -> usize {
        let known = self.known.lock();
        known.values().filter(|grade| grade.is_none()).count()
    }

    fn set(&self, metrics: &Metrics, worker: WorkerId, known: Option<Option<Grade>>) {
        let mut all = self.known.lock();
        match known {
            Some(grade) => drop(all.insert(worker, grade)),
            None => drop(all.remove(&worker)),
        }
        let count = |of: Option<Grade>| {
            let grades = all.values().filter(|grade| **grade == of);
            i64::try_from(grades.count()).unwrap_or(i64::MAX)
        };
        metrics.residency_pending.set(count(None));
        metrics.residency_blind.set(count(Some(Grade::Blind)));
    }
}

/// Follows one start of a worker until dropped; then nothing is known of it. It counts as pending from
/// this call on.
pub(crate) fn follow(
    shared: Arc<Shared>,
    link: Link,
    incarnation: Incarnation,
) -> impl Future<Output = Infallible> {
    let mut following = Following {
        follower: Follower::new(incarnation),
        incarnation,
        chunks: 0,
        grade: None,
        shared,
    };
    let (all, worker) = (&following.shared, incarnation.worker);
    all.caches.set(&all.metrics, worker, Some(None));
    async move { following.run(&link).await }
}

struct Following {
    shared: Arc<Shared>,
    incarnation: Incarnation,
    follower: Follower,
    /// As the gauge has it.
    chunks: i64,
    /// As it is shown.
    grade: Option<Grade>,
}

impl Following {
    async fn run(&mut self, link: &Link) -> Infallible {
        let shared = self.shared.clone();
        let mut wait = AGAIN.0;
        loop {
            let mut useful = false;
            let cursor = self.follower.cursor();
            let turn = match cursor {
                None => shared.caches.turns.acquire().await.ok(),
                Some(_) => None,
            };
            if let Ok((mut sender, mut receiver)) = link.open() {
                let follow = work::Follow {
                    incarnation: Some(self.incarnation.to_wire()),
                    cache: cursor.map_or(0, |cursor| cursor.cache),
                    seq: cursor.map_or(0, |cursor| cursor.seq),
                };
                let frame = Frame::message(Kind::Follow, &follow);
                if sender.send(&frame).await.is_ok() {
                    useful = self.take(&mut receiver, turn).await;
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

    /// Takes what comes until the stream ends or has to begin anew. Returns whether any was of use.
    /// The turn is held until a snapshot is in.
    async fn take(
        &mut self,
        receiver: &mut FrameReceiver,
        mut turn: Option<SemaphorePermit<'_>>,
    ) -> bool {
        let mut useful = false;
        let given_up = tokio::time::sleep(TURN);
        tokio::pin!(given_up);
        loop {
            let frame = tokio::select! {
                frame = receiver.recv() => frame,
                () = &mut given_up, if turn.is_some() => {
                    turn = None;
                    continue;
                }
            };
            let Ok(Some(frame)) = frame else {
                return useful;
            };
            match self.ops(&frame) {
                Ok(ops) => {
                    useful = true;
                    self.apply(&ops).await;
                    if self.follower.cursor().is_some() {
                        turn = None;
                    }
                }
                Err(resync) => {
                    tracing::debug!(worker = %self.incarnation, %resync, "residency begins anew");
                    self.shared.metrics.resyncs.inc();
                    self.apply(&[Op::Clear]).await;
                    return useful;
                }
            }
        }
    }

    fn ops(&mut self, frame: &Frame) -> Result<Vec<Op>, Resync> {
        match frame.kind {
            Kind::ResidencySnapshot => {
                let piece = frame.decode().map_err(|_| Resync::Malformed)?;
                self.follower.snapshot(&piece)
            }
            Kind::ResidencyDelta => {
                let delta = frame.decode().map_err(|_| Resync::Malformed)?;
                let ops = self.follower.delta(&delta)?;
                self.shared.metrics.deltas.inc();
                Ok(ops)
            }
            _ => Err(Resync::Malformed),
        }
    }

    async fn apply(&mut self, ops: &[Op]) {
        let worker = self.incarnation.worker;
        for (turn, batch) in ops.chunks(BATCH).enumerate() {
            if turn > 0 {
                // A snapshot has thousands of these: requests go between them.
                tokio::task::yield_now().await;
            }
            let mut index = self.shared.index_writer.lock();
            for op in batch {
                match *op {
                    Op::Clear => index.clear(worker),
                    Op::Store(chunk, tokens) => index.store(worker, chunk, tokens),
                    Op::Remove(chunk) => index.remove(worker, chunk),
                }
            }
        }
        self.show();
    }

    fn show(&mut self) {
        let Self {
            shared, follower, ..
        } = self;
        let grade = follower.cursor().map(|_| follower.grade());
        if grade != self.grade {
            let worker = self.incarnation.worker;
            shared.caches.set(&shared.metrics, worker, Some(grade));
            self.grade = grade;
        }
        self.count(i64::try_from(self.follower.len()).unwrap_or(i64::MAX));
    }

    fn count(&mut self, chunks: i64) {
        self.shared.metrics.resident.inc_by(chunks - self.chunks);
        self.chunks = chunks;
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let worker = self.incarnation.worker;
        self.shared.index_writer.lock().clear(worker);
        self.count(0);
        let metrics = &self.shared.metrics;
        self.shared.caches.set(metrics, worker, None);
    }
}
