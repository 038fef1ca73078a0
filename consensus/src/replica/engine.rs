//! The replica's thread: take what is queued, tick, and give the core its turn.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, bounded};
use forebay_proto::Now;
use tokio::sync::watch;

use super::core::{Core, panic_text};
use super::handle::{Budget, Input, QUEUE, ReplicaHandle, Status};
use super::{Hook, Machine, Outbound, ReplicaOptions, StartError, StopReason};
use crate::node::{Restored, Role};
use crate::store::{Store, StoreError};

/// Inputs that one turn takes before it writes.
const MAX_INPUTS_PER_TURN: usize = 1024;
/// Ticks made up for after the thread was held up. More would depose a healthy leader whose messages
/// wait in the queue.
const MAX_CATCH_UP_TICKS: u32 = 4;
/// A write that found the disk full is tried again after this.
const FULL_PAUSE: Duration = Duration::from_millis(500);

pub(crate) fn start<M: Machine>(
    options: ReplicaOptions,
    opened: (Store, Restored),
    machine: M,
    outbound: Box<dyn Outbound>,
    hook: Box<dyn Hook<M>>,
) -> Result<ReplicaHandle<M::Output>, StartError> {
    let id = opened.0.cluster().node_id;
    let (inputs, queue) = bounded(QUEUE);
    let budget = Budget::default();
    let (status, status_seen) = watch::channel(Status::default());
    let (stopped, stopped_seen) = watch::channel(None);
    let stopping = Arc::new(AtomicBool::new(false));
    let patience = wait_for_room(status.clone(), stopping.clone());
    let core = Core::new(options, opened, machine, outbound, hook, patience)?;
    let engine = Engine {
        tick: options.tick,
        started: Instant::now(),
        core,
        queue,
        budget: budget.clone(),
        status,
    };
    engine.publish_status();
    let last_status = engine.status.clone();
    let thread = std::thread::Builder::new().name(format!("replica-{}", id.0));
    let run = move || {
        // The engine, and with it the lock on the disk, is gone before anyone is told.
        let ended = catch_unwind(AssertUnwindSafe(move || engine.run()));
        let reason = match ended {
            Ok(Ok(())) => StopReason::Asked,
            Ok(Err(reason)) => reason,
            Err(panic) => StopReason::Panicked(panic_text(&*panic)),
        };
        last_status.send_modify(|status| {
            status.role = Role::Follower;
            status.leader = None;
        });
        stopped.send_replace(Some(Arc::new(reason)));
    };
    thread.spawn(run).map_err(StartError::Thread)?;
    Ok(ReplicaHandle {
        id,
        inputs,
        budget,
        status: status_seen,
        stopped: stopped_seen,
        stopping,
    })
}

/// Holds the thread while the disk is full: without ticks and messages the others elect another
/// leader, and this node goes on where it was once there is room.
fn wait_for_room(
    status: watch::Sender<Status>,
    stopping: Arc<AtomicBool>,
) -> super::core::Patience {
    let mut said = false;
    Box::new(move |full: &StoreError| {
        if !std::mem::replace(&mut said, true) {
            tracing::error!(%full, "this node waits for room on its disk");
        }
        status.send_modify(|status| {
            status.disk_full = true;
            status.role = Role::Follower;
            status.leader = None;
        });
        std::thread::sleep(FULL_PAUSE);
        !stopping.load(Ordering::Relaxed)
    })
}

struct Engine<M: Machine> {
    tick: Duration,
    started: Instant,
    core: Core<M>,
    queue: Receiver<Input<M::Output>>,
    budget: Budget,
    status: watch::Sender<Status>,
}

enum Turn {
    Go,
    End,
}

impl<M: Machine> Engine<M> {
    fn now(&self) -> Now {
        Now::at(self.started.elapsed())
    }

    fn run(mut self) -> Result<(), StopReason> {
        self.core.begin(self.now())?;
        let mut next_tick = Instant::now() + self.tick;
        loop {
            if let Turn::End = self.take_inputs(next_tick) {
                return Ok(());
            }
            next_tick = self.tick_until(Instant::now(), next_tick);
            self.core.turn(self.now())?;
            self.publish_status();
        }
    }

    /// Waits for an input or the next tick, then takes what else is queued.
    fn take_inputs(&mut self, next_tick: Instant) -> Turn {
        let wake = self.core.wake_at().map(|wake| {
            let left = wake.since(self.now());
            Instant::now() + left
        });
        let until = wake.map_or(next_tick, |wake| wake.min(next_tick));
        match self.queue.recv_deadline(until) {
            Ok(input) => {
                if let Turn::End = self.take(input) {
                    return Turn::End;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Turn::End,
        }
        for _ in 1..MAX_INPUTS_PER_TURN {
            if self.core.batch_is_full() {
                break;
            }
            let Ok(input) = self.queue.try_recv() else {
                break;
            };
            if let Turn::End = self.take(input) {
                return Turn::End;
            }
        }
        Turn::Go
    }

    fn take(&mut self, input: Input<M::Output>) -> Turn {
        self.budget.give_back(&input);
        if matches!(input, Input::Stop) {
            return Turn::End;
        }
        let now = self.now();
        self.core.take(now, input);
        Turn::Go
    }

    fn tick_until(&mut self, now: Instant, mut next: Instant) -> Instant {
        for _ in 0..MAX_CATCH_UP_TICKS {
            if now < next {
                return next;
            }
            self.core.tick();
            next += self.tick;
        }
        next.max(now + self.tick)
    }

    fn publish_status(&self) {
        let status = self.core.status();
        self.status.send_if_modified(|shown| {
            let heard = Status {
                leader_heard_ms: status.leader_heard_ms,
                ..shown.clone()
            };
            let changed = heard != status;
            *shown = status;
            changed
        });
    }
}
