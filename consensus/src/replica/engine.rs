//! The replica's thread: take what is queued, tick, propose it together, and do what the node says.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam::channel::{Receiver, RecvTimeoutError, bounded};
use tokio::sync::{oneshot, watch};

use super::handle::{Budget, Input, ProposeError, QUEUE, ReplicaHandle, Status, TransferError};
use super::reads::Reads;
use super::{
    Applied, Hook, Machine, Outbound, ReplicaOptions, RestoreError, StartError, StopReason,
};
use crate::node::{
    Config, MAX_SNAPSHOT_BYTES, Node, Outcome, ProposeRefused, Rejected, Restored, Role, Snapshot,
};
use crate::store::Store;

/// Inputs that one turn takes before it writes.
const MAX_INPUTS_PER_TURN: usize = 1024;
/// Commands and bytes that go into the log together: one append to each follower.
const MAX_BATCH: usize = 512;
const MAX_BATCH_BYTES: usize = 256 << 10;
/// Proposals that wait for their entry to be applied.
const MAX_WAITERS: usize = 16_384;
/// Ticks made up for after the thread was held up. More would depose a healthy leader whose messages
/// wait in the queue.
const MAX_CATCH_UP_TICKS: u32 = 4;
/// At most one warning about a peer's messages in this time.
const WARN_EVERY: Duration = Duration::from_secs(10);

type Reply<O> = oneshot::Sender<Result<Applied<O>, ProposeError>>;

pub(crate) fn start<M: Machine>(
    options: ReplicaOptions,
    store: Store,
    restored: Restored,
    mut machine: M,
    outbound: Box<dyn Outbound>,
    hook: Box<dyn Hook<M>>,
) -> Result<ReplicaHandle<M::Output>, StartError> {
    let snapshot = restored.snapshot.clone();
    let id = store.cluster().node_id;
    let node = Node::new(
        Config {
            id,
            seed: options.seed,
        },
        restored,
    )?;
    machine.restore(&snapshot.data)?;
    let (inputs, queue) = bounded(QUEUE);
    let budget = Budget::default();
    let (status, status_seen) = watch::channel(Status::default());
    let (stopped, stopped_seen) = watch::channel(None);
    let mut engine = Engine {
        options,
        node,
        store,
        machine,
        outbound,
        hook,
        queue,
        budget: budget.clone(),
        applied: snapshot.index,
        batch: Vec::new(),
        batch_bytes: 0,
        waiters: BTreeMap::new(),
        reads: Reads::default(),
        status,
        warned_at: None,
    };
    // Before anyone can ask: nobody may take an empty state for the real one.
    engine.hook.applied(&engine.machine, engine.applied, &[]);
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
    })
}

struct Engine<M: Machine> {
    options: ReplicaOptions,
    node: Node,
    store: Store,
    machine: M,
    outbound: Box<dyn Outbound>,
    hook: Box<dyn Hook<M>>,
    queue: Receiver<Input<M::Output>>,
    budget: Budget,
    /// The last index that the machine includes.
    applied: u64,
    batch: Vec<(Bytes, Reply<M::Output>)>,
    batch_bytes: usize,
    /// By index: the term it was proposed in, and who waits.
    waiters: BTreeMap<u64, (u64, Reply<M::Output>)>,
    reads: Reads,
    status: watch::Sender<Status>,
    warned_at: Option<Instant>,
}

enum Turn {
    Go,
    End,
}

impl<M: Machine> Engine<M> {
    fn run(mut self) -> Result<(), StopReason> {
        if self.node.is_only_voter() {
            self.node.campaign();
            self.drive()?;
        }
        let mut next_tick = Instant::now() + self.options.tick;
        loop {
            if let Turn::End = self.take_inputs(next_tick) {
                return Ok(());
            }
            next_tick = self.tick_until(Instant::now(), next_tick);
            self.propose_batch();
            self.drive()?;
            while let Some(ctx) = self.reads.question(Instant::now()) {
                self.node.read_index(ctx);
                self.drive()?;
            }
            self.fail_lost_proposals();
            self.snapshot_when_due()?;
            self.publish_status();
        }
    }

    /// Waits for an input or the next tick, then takes what else is queued.
    fn take_inputs(&mut self, next_tick: Instant) -> Turn {
        let until = self
            .reads
            .wake_at()
            .map_or(next_tick, |wake| wake.min(next_tick));
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
            if self.batch.len() >= MAX_BATCH || self.batch_bytes >= MAX_BATCH_BYTES {
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
        match input {
            Input::Step { from, message } => {
                if let Err(rejected) = self.node.step(from, *message) {
                    self.note_rejected(&rejected);
                }
            }
            Input::Propose { command, reply } => {
                self.batch_bytes += command.len();
                self.batch.push((command, reply));
            }
            Input::Read { reply } => self.reads.add(reply),
            Input::Transfer { to, reply } => {
                let begun = self.node.transfer(to);
                let _ = reply
                    .send(begun.map_err(|refused| TransferError::Refused(refused.to_string())));
            }
            Input::Unreachable(peer) => self.node.report_unreachable(peer),
            Input::Snapshot(peer, report) => self.node.report_snapshot(peer, report),
            Input::Stop => return Turn::End,
        }
        Turn::Go
    }

    fn tick_until(&mut self, now: Instant, mut next: Instant) -> Instant {
        for _ in 0..MAX_CATCH_UP_TICKS {
            if now < next {
                return next;
            }
            self.node.tick();
            next += self.options.tick;
        }
        next.max(now + self.options.tick)
    }

    fn propose_batch(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        if batch.is_empty() {
            return;
        }
        let (commands, replies): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        let proposed = if self.waiters.len() + replies.len() > MAX_WAITERS {
            Err(ProposeRefused::Overloaded)
        } else {
            self.node.propose_all(commands)
        };
        match proposed {
            Ok((term, first)) => {
                let waiters = replies.into_iter().map(|reply| (term, reply));
                self.waiters.extend((first..).zip(waiters));
            }
            Err(refused) => {
                for reply in replies {
                    let _ = reply.send(Err(refusal(&refused)));
                }
            }
        }
    }

    /// Does what the node says until it has nothing more to say.
    fn drive(&mut self) -> Result<(), StopReason> {
        while let Some(mut step) = self.node.ready() {
            for message in step.take_send_now() {
                send(&mut *self.outbound, message);
            }
            let Outcome {
                send: messages,
                installed,
                committed,
                reads,
            } = step.persist(|write| self.store.write(write))?;
            for message in messages {
                send(&mut *self.outbound, message);
            }
            if let Some(snapshot) = installed {
                self.install(&snapshot)?;
            }
            if !committed.is_empty() {
                self.apply(committed);
            }
            for ready in reads {
                self.reads.answer(ready);
            }
            self.reads.applied(self.applied);
        }
        Ok(())
    }

    fn install(&mut self, snapshot: &Snapshot) -> Result<(), RestoreError> {
        self.machine.restore(&snapshot.data)?;
        self.applied = snapshot.index;
        // Nobody leads while a snapshot is installed, so nothing that waits can have a result here.
        self.fail_all(&ProposeError::LeadershipLost);
        self.hook.applied(&self.machine, self.applied, &[]);
        Ok(())
    }

    fn apply(&mut self, committed: Vec<crate::node::Entry>) {
        let mut results = Vec::with_capacity(committed.len());
        for entry in committed {
            self.applied = entry.index;
            if entry.is_noop() {
                continue;
            }
            let output = self.machine.apply(entry.index, entry.term, &entry.data);
            results.push(Applied {
                index: entry.index,
                term: entry.term,
                output,
            });
        }
        self.hook.applied(&self.machine, self.applied, &results);
        for result in results {
            if let Some((term, reply)) = self.waiters.remove(&result.index) {
                let same = term == result.term;
                let _ = reply.send(if same {
                    Ok(result)
                } else {
                    Err(ProposeError::LeadershipLost)
                });
            }
        }
    }

    /// What this node proposed in a term that it no longer leads has an unknown outcome.
    fn fail_lost_proposals(&mut self) {
        let leads = self.node.role() == Role::Leader;
        let term = self.node.term();
        if self
            .waiters
            .values()
            .next_back()
            .is_some_and(|(proposed_in, _)| !leads || *proposed_in != term)
        {
            self.fail_all(&ProposeError::LeadershipLost);
        }
    }

    fn fail_all(&mut self, error: &ProposeError) {
        for (_, (_, reply)) in std::mem::take(&mut self.waiters) {
            let _ = reply.send(Err(error.clone()));
        }
    }

    fn snapshot_when_due(&mut self) -> Result<(), StopReason> {
        let (entries, bytes) = self.node.log_size();
        if entries < self.options.snapshot_entries && bytes < self.options.snapshot_bytes {
            return Ok(());
        }
        // Entries that are not applied yet cannot go into a snapshot; there is one for what is.
        let Some(term) = self.node.term_at(self.applied) else {
            return Ok(());
        };
        let members = self.node.members().clone();
        if self.node.snapshot_index() >= self.applied {
            return Ok(());
        }
        let data = Bytes::from(self.machine.snapshot());
        if data.len() > MAX_SNAPSHOT_BYTES {
            let (bytes, max) = (data.len(), MAX_SNAPSHOT_BYTES);
            tracing::error!(
                bytes,
                max,
                "the state is too large to be sent to a member that lost track"
            );
        }
        let snapshot = Snapshot {
            index: self.applied,
            term,
            members,
            data,
        };
        self.store
            .save_snapshot(&snapshot, self.options.keep_entries)?;
        self.node.compact(snapshot, self.options.keep_entries);
        Ok(())
    }

    fn publish_status(&self) {
        let status = self.node.status();
        let tick_ms = u64::try_from(self.options.tick.as_millis()).unwrap_or(u64::MAX);
        let status = Status {
            role: status.role,
            term: status.term,
            leader: status.leader,
            commit: status.commit,
            applied: self.applied,
            last_index: status.last_index,
            leader_heard_ms: tick_ms.saturating_mul(u64::from(status.leader_heard_ticks)),
            peers: status.peers,
        };
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

    fn note_rejected(&mut self, rejected: &Rejected) {
        let harmless = matches!(
            rejected,
            Rejected::NotLeader | Rejected::NotYourLeadership(_) | Rejected::UnaskedVote
        );
        let now = Instant::now();
        let quiet = self
            .warned_at
            .is_some_and(|at| now.duration_since(at) < WARN_EVERY);
        if harmless || quiet {
            tracing::debug!(%rejected, "a peer's message was dropped");
        } else {
            self.warned_at = Some(now);
            tracing::warn!(%rejected, "a peer's message was dropped");
        }
    }
}

fn send(outbound: &mut dyn Outbound, message: crate::node::Message) {
    let to = forebay_proto::NodeId(message.to);
    outbound.send(to, message);
}

fn refusal(refused: &ProposeRefused) -> ProposeError {
    match refused {
        ProposeRefused::NotLeader { leader } => ProposeError::NotLeader { leader: *leader },
        ProposeRefused::Overloaded => ProposeError::Overloaded,
        ProposeRefused::Empty => ProposeError::Size(0),
        ProposeRefused::TooLarge(bytes) => ProposeError::Size(*bytes),
        ProposeRefused::Stopped => ProposeError::Stopped,
    }
}

/// What a panic said, cut short: raft-rs' name indices and terms, never commands.
fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a text")
        .chars()
        .take(256)
        .collect()
}
