//! The node at work: a [`Core`](core::Core) that owns a [`Node`](crate::node::Node), its
//! [`Store`](crate::store::Store) and the [`Machine`] that commands are applied to, and the thread
//! that drives it.
//!
//! The thread is its own, never a worker of the async runtime, because it waits for the disk. What is
//! queued while it syncs goes into the next batch together, so proposals share syncs (group commit).
//! Everything goes through a [`ReplicaHandle`]; what comes out are messages to peers ([`Outbound`]),
//! answers to proposals and reads, and the machine itself after each batch ([`Hook`]).
//!
//! **Unknown outcomes.** A proposal that ends in [`ProposeError::Timeout`] or
//! [`ProposeError::LeadershipLost`] may still be committed. Callers try again with the same client
//! sequence number, and the machine tells repeats apart.
//!
//! **A wiped disk.** This module cannot see that a disk was emptied and then set up again under an old
//! node id: a member that forgot its votes and entries looks like a slow one, and could help to elect
//! a leader without committed entries. So peers compare store ids in their Hello, and refuse a known
//! node id with another store, before any message reaches [`ReplicaHandle::step`].
#![allow(clippy::disallowed_methods)] // the rim: ticks come from a clock, and the thread is its own

pub mod core;
mod engine;
mod handle;
mod reads;

#[cfg(test)]
mod tests;

use std::time::Duration;

use bytes::Bytes;
use forebay_proto::NodeId;

pub use handle::{Input, ProposeError, ReadError, ReplicaHandle, Reply, Status, TransferError};

use crate::node::{Message, NodeError, Restored};
use crate::store::{Store, StoreError};

/// What commands are applied to. Deterministic: equal commands in equal order give equal states and
/// outputs on every node.
pub trait Machine: Send + 'static {
    /// What one command gives back to the one who proposed it.
    type Output: Send + 'static;

    /// Applies one committed command. A new leader's no-ops are not shown.
    fn apply(&mut self, index: u64, term: u64, command: &Bytes) -> Self::Output;

    /// Applies one committed command that comes with a change of the members; says besides whether
    /// the change takes place.
    fn apply_change(&mut self, index: u64, term: u64, command: &Bytes) -> (Self::Output, bool);

    /// The whole state, so that [`Machine::restore`] brings it back.
    fn snapshot(&self) -> Vec<u8>;

    /// Replaces the state.
    ///
    /// # Errors
    ///
    /// Says why the bytes are no state of this machine; the replica then stops.
    fn restore(&mut self, bytes: &[u8]) -> Result<(), RestoreError>;
}

/// Why a machine could not take a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the snapshot cannot be read ({0}): it may come from a newer version; start that version")]
pub struct RestoreError(pub String);

/// Takes messages to peers. Never blocks: what cannot be queued is dropped and reported through
/// [`ReplicaHandle::report_unreachable`]. The fate of each message with a snapshot is reported through
/// [`ReplicaHandle::report_snapshot`], else its receiver gets nothing any more.
pub trait Outbound: Send + 'static {
    /// Queues one message for a peer.
    fn send(&mut self, to: NodeId, message: Message);
}

impl<F: FnMut(NodeId, Message) + Send + 'static> Outbound for F {
    fn send(&mut self, to: NodeId, message: Message) {
        self(to, message);
    }
}

/// Sees the machine after each batch that was applied, and once at the start. Runs on the replica's
/// thread, so it only publishes.
pub trait Hook<M: Machine>: Send + 'static {
    /// `applied` is the last index that `machine` includes; `outputs` is what this batch gave, empty
    /// at the start and when a snapshot replaced the state.
    fn applied(&mut self, machine: &M, applied: u64, outputs: &[Applied<M::Output>]);
}

impl<M: Machine, F> Hook<M> for F
where
    F: FnMut(&M, u64, &[Applied<M::Output>]) + Send + 'static,
{
    fn applied(&mut self, machine: &M, applied: u64, outputs: &[Applied<M::Output>]) {
        self(machine, applied, outputs);
    }
}

/// One command's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied<O> {
    /// Where the command stands in the log.
    pub index: u64,
    /// The term it was proposed in.
    pub term: u64,
    /// What the machine gave back.
    pub output: O,
}

/// How a replica runs. The defaults suit a control plane's rates.
#[derive(Clone, Copy, Debug)]
pub struct ReplicaOptions {
    /// Seeds elections; a fresh random number for each start.
    pub seed: u64,
    /// How often the node ticks.
    pub tick: Duration,
    /// A snapshot is made after so many entries,
    pub snapshot_entries: u64,
    /// or so many bytes of entries, whichever comes first.
    pub snapshot_bytes: u64,
    /// Entries before the snapshot that stay for followers that are a little behind.
    pub keep_entries: u64,
}

impl Default for ReplicaOptions {
    fn default() -> Self {
        Self {
            seed: rand::random(),
            tick: crate::node::TICK,
            snapshot_entries: 10_000,
            snapshot_bytes: 16 << 20,
            keep_entries: 1_000,
        }
    }
}

/// Why a replica did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The disk's memory cannot be a member's.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The machine does not know the snapshot.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The system gave no thread.
    #[error("cannot start the replica's thread: {0}")]
    Thread(std::io::Error),
}

/// Why a replica ended. All but [`StopReason::Asked`] are fatal for the process: log it and exit.
#[derive(Debug, thiserror::Error)]
pub enum StopReason {
    /// It was told to, or every handle was dropped.
    #[error("the replica was stopped")]
    Asked,
    /// The disk failed; nothing can be promised any more.
    #[error("the replica stopped: {0}")]
    Store(#[from] StoreError),
    /// The leader's snapshot cannot be read.
    #[error("the replica stopped: {0}")]
    Restore(#[from] RestoreError),
    /// It did not start on the disk that was just set up.
    #[error("the replica did not start: {0}")]
    Start(#[from] StartError),
    /// A bug: something that must hold did not.
    #[error("the replica stopped on a broken invariant: {0}")]
    Panicked(String),
}

/// Starts a replica from an opened store: restores the machine, then runs until it is stopped.
///
/// A group of one elects itself at once.
///
/// # Errors
///
/// Returns a [`StartError`] when the disk's memory cannot be used.
pub fn start<M: Machine>(
    options: ReplicaOptions,
    (store, restored): (Store, Restored),
    machine: M,
    outbound: impl Outbound,
    hook: impl Hook<M>,
) -> Result<ReplicaHandle<M::Output>, StartError> {
    engine::start(
        options,
        (store, restored),
        machine,
        Box::new(outbound),
        Box::new(hook),
    )
}
