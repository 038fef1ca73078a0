//! What a shell must do next, in an order that it cannot get wrong.

use raft::Ready;
use raft::eraftpb::Message;

use super::core::Node;
use super::types::{Entry, HardState, Snapshot};

/// One round of effects: send [`Step::take_send_now`], then write in [`Step::persist`], then perform
/// the [`Outcome`].
///
/// It borrows the node, so nothing else can happen to it in between. A step that is dropped without
/// being persisted, or whose write failed, stops the node for good: what it would have remembered is
/// not on disk, and only a restart can tell what is.
#[must_use = "a step that is not persisted stops the node"]
pub struct Step<'a> {
    node: &'a mut Node,
    ready: Ready,
    send_now: Vec<Message>,
    write: Write,
}

/// What must be on disk before anything that depends on it leaves this node. One batch, one sync.
#[derive(Clone, Debug, Default)]
pub struct Write {
    /// A snapshot from the leader, which replaces the whole log. To be written first.
    pub snapshot: Option<Snapshot>,
    /// Entries to append; the first index may lie inside the log and then replaces its end.
    pub entries: Vec<Entry>,
    /// The hard state to remember.
    pub hard_state: Option<HardState>,
    /// Whether the closure of [`Step::persist`] may only return when all this is durable. Otherwise
    /// there is at most a commit index, which may be written lazily.
    pub must_sync: bool,
}

impl Write {
    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.snapshot.is_none() && self.entries.is_empty() && self.hard_state.is_none()
    }
}

/// What may happen once the write is durable.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Messages that promise what was written.
    pub send: Vec<Message>,
    /// The leader's snapshot: the machine's state is replaced by it, before `committed` is applied.
    pub installed: Option<Snapshot>,
    /// Entries to apply, in order, each exactly once a process; no-ops and changes of the members
    /// included. When all are applied, [`Node::applied`] must be called.
    pub committed: Vec<Entry>,
    /// Reads that may be answered once the machine has applied their index.
    pub reads: Vec<ReadReady>,
}

/// A read that a quorum confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadReady {
    /// What was given to [`Node::read_index`].
    pub ctx: u64,
    /// The machine must have applied this index before it answers.
    pub index: u64,
}

impl<'a> Step<'a> {
    pub(crate) fn new(node: &'a mut Node, mut ready: Ready, commit_owed: bool) -> Self {
        let send_now = ready.take_messages();
        let lazy = commit_owed.then(|| node.hard_state());
        let snapshot = ready.snapshot();
        let write = Write {
            snapshot: (!snapshot.is_empty()).then(|| {
                Snapshot::from_raft(snapshot).expect("members were checked before raft took it")
            }),
            entries: ready.take_entries().iter().map(Entry::from_raft).collect(),
            hard_state: ready.hs().map(HardState::from_raft).or(lazy),
            must_sync: ready.must_sync(),
        };
        Self {
            node,
            ready,
            send_now,
            write,
        }
    }

    /// A leader's appends, which may leave while its own disk still writes.
    pub fn take_send_now(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.send_now)
    }

    /// What is going to be written.
    #[must_use]
    pub fn write(&self) -> &Write {
        &self.write
    }

    /// Writes through `to_disk` and gives out what depends on it.
    ///
    /// # Errors
    ///
    /// Returns the error of `to_disk`; the node then takes nothing more.
    pub fn persist<E>(self, to_disk: impl FnOnce(&Write) -> Result<(), E>) -> Result<Outcome, E> {
        to_disk(&self.write)?;
        Ok(self.node.persisted(self.ready, self.write))
    }
}
