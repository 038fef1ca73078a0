//! How others reach a replica: cheap to clone, never blocking, every wait with a deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use crossbeam::channel::{Sender, TrySendError};
use forebay_proto::NodeId;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout_at};

use super::{Applied, StopReason};
use crate::node::{
    ChangeRefused, MAX_COMMAND_BYTES, Members, MembersChange, Message, Role, Snapshot,
    SnapshotReport,
};

/// Inputs that wait for the replica's thread.
pub(crate) const QUEUE: usize = 4096;
/// And their bytes: beyond, proposals are refused and messages dropped.
const MAX_QUEUED_BYTES: usize = 128 << 20;

/// What a replica knows of itself and its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// What this node is.
    pub role: Role,
    /// The newest term it has seen.
    pub term: u64,
    /// Who leads, itself included, as far as known.
    pub leader: Option<NodeId>,
    /// The newest index known to be committed.
    pub commit: u64,
    /// The newest index that the machine has applied.
    pub applied: u64,
    /// Where the log ends.
    pub last_index: u64,
    /// Milliseconds since the leader was heard, zero on the leader. Always fresh to `borrow`, but a
    /// change of it alone wakes nobody.
    pub leader_heard_ms: u64,
    /// On the leader: what each other member has acknowledged, ascending by id.
    pub peers: Vec<(NodeId, u64)>,
    /// The group, as far as this node has applied its changes.
    pub members: Members,
    /// The disk has no room: the node waits and takes no part.
    pub disk_full: bool,
}

impl Default for Status {
    fn default() -> Self {
        Self {
            role: Role::Follower,
            term: 0,
            leader: None,
            commit: 0,
            applied: 0,
            last_index: 0,
            leader_heard_ms: 0,
            peers: Vec::new(),
            members: Members::unknown(),
            disk_full: false,
        }
    }
}

/// Gets what became of a proposal.
pub type Reply<O> = oneshot::Sender<Result<Applied<O>, ProposeError>>;

/// Why a proposal has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Not proposed: another node leads, or none is known to.
    #[error("this node does not lead")]
    NotLeader {
        /// Who leads, as far as known.
        leader: Option<NodeId>,
    },
    /// Not proposed: too much waits already. Try again.
    #[error("the control plane is overloaded: try again")]
    Overloaded,
    /// Not proposed: empty, or too large.
    #[error("a command has 1 to {max} bytes, not {0}", max = MAX_COMMAND_BYTES)]
    Size(usize),
    /// Not proposed: the members cannot be changed so.
    #[error(transparent)]
    Change(#[from] ChangeRefused),
    /// Unknown: no result by the deadline.
    #[error("no result by the deadline; the command may still take effect")]
    Timeout,
    /// Unknown: the leadership went elsewhere meanwhile.
    #[error("the leadership changed; the command may still take effect")]
    LeadershipLost,
    /// The replica has ended; see [`ReplicaHandle::stopped`].
    #[error("this node has stopped")]
    Stopped,
}

/// Why a read has no index.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Too many reads wait.
    #[error("too many reads are waiting: try again")]
    Overloaded,
    /// No quorum confirmed it by the deadline.
    #[error("no quorum by the deadline")]
    Timeout,
    /// The replica has ended.
    #[error("this node has stopped")]
    Stopped,
}

/// Why a hand-over of the leadership was not begun.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The node refused: it does not lead, or the target is no other voter.
    #[error("{0}")]
    Refused(String),
    /// Too much waits already.
    #[error("the control plane is overloaded: try again")]
    Overloaded,
    /// The replica has ended.
    #[error("this node has stopped")]
    Stopped,
}

/// What goes to the replica's thread. Without `Debug`: it holds commands.
pub enum Input<O> {
    /// A peer's message.
    Step {
        /// Whose connection it came on.
        from: NodeId,
        /// The message.
        message: Box<Message>,
    },
    /// A command.
    Propose {
        /// The command.
        command: Bytes,
        /// Gets its result.
        reply: Reply<O>,
    },
    /// A change of the members, and the command that comes with it.
    Change {
        /// The change.
        change: MembersChange,
        /// The command.
        command: Bytes,
        /// Gets its result.
        reply: Reply<O>,
    },
    /// A linearizable read.
    Read {
        /// Gets an index that the machine has applied.
        reply: oneshot::Sender<Result<u64, ReadError>>,
    },
    /// The machine's state as it is, with the members.
    State {
        /// Gets it; nobody does when no index is known for it.
        reply: oneshot::Sender<Snapshot>,
    },
    /// Hand the leadership over.
    Transfer {
        /// To whom.
        to: NodeId,
        /// Whether it was begun.
        reply: oneshot::Sender<Result<(), TransferError>>,
    },
    /// A message could not be sent.
    Unreachable(NodeId),
    /// What became of a snapshot.
    Snapshot(NodeId, SnapshotReport),
    /// End.
    Stop,
}

impl<O> Input<O> {
    fn cost(&self) -> usize {
        match self {
            Self::Step { message, .. } => {
                let entries: usize = message
                    .entries
                    .iter()
                    .map(|entry| entry.data.len() + 64)
                    .sum();
                entries + message.get_snapshot().data.len()
            }
            Self::Propose { command, .. } | Self::Change { command, .. } => command.len(),
            Self::Read { .. }
            | Self::State { .. }
            | Self::Transfer { .. }
            | Self::Unreachable(_)
            | Self::Snapshot(..)
            | Self::Stop => 0,
        }
    }
}

/// The bytes that wait in a replica's queue.
#[derive(Clone, Debug, Default)]
pub(crate) struct Budget(Arc<AtomicUsize>);

impl Budget {
    fn take(&self, bytes: usize) -> bool {
        let taken = self.0.fetch_add(bytes, Ordering::Relaxed);
        // One input always fits, however large it is.
        let fits = taken == 0 || taken.saturating_add(bytes) <= MAX_QUEUED_BYTES;
        if !fits {
            self.0.fetch_sub(bytes, Ordering::Relaxed);
        }
        fits
    }

    /// The thread has taken this input from the queue.
    pub(crate) fn give_back<O>(&self, input: &Input<O>) {
        self.0.fetch_sub(input.cost(), Ordering::Relaxed);
    }
}

/// Reaches one replica. When every clone is dropped, the replica ends.
pub struct ReplicaHandle<O> {
    pub(crate) id: NodeId,
    pub(crate) inputs: Sender<Input<O>>,
    pub(crate) budget: Budget,
    pub(crate) status: watch::Receiver<Status>,
    pub(crate) stopped: watch::Receiver<Option<Arc<StopReason>>>,
    /// Ends the wait for room on the disk.
    pub(crate) stopping: Arc<AtomicBool>,
}

impl<O> Clone for ReplicaHandle<O> {
    fn clone(&self) -> Self {
        Self {
            id: self.id,
            inputs: self.inputs.clone(),
            budget: self.budget.clone(),
            status: self.status.clone(),
            stopped: self.stopped.clone(),
            stopping: self.stopping.clone(),
        }
    }
}

impl<O> std::fmt::Debug for ReplicaHandle<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReplicaHandle({})", self.id)
    }
}

enum Full {
    Queue,
    Gone,
}

impl<O: Send + 'static> ReplicaHandle<O> {
    /// This member.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Proposes a command and waits for what the machine gives back for it.
    ///
    /// # Errors
    ///
    /// See [`ProposeError`] for which of them leave the outcome unknown.
    pub async fn propose(
        &self,
        command: Bytes,
        deadline: Instant,
    ) -> Result<Applied<O>, ProposeError> {
        if command.is_empty() || command.len() > MAX_COMMAND_BYTES {
            return Err(ProposeError::Size(command.len()));
        }
        self.result(deadline, |reply| Input::Propose { command, reply })
            .await
    }

    /// Proposes a change of the members with the command that says who they are, and waits for what
    /// the machine gives back for that.
    ///
    /// # Errors
    ///
    /// As [`ReplicaHandle::propose`].
    pub async fn propose_change(
        &self,
        change: MembersChange,
        command: Bytes,
        deadline: Instant,
    ) -> Result<Applied<O>, ProposeError> {
        if command.is_empty() || command.len() > MAX_COMMAND_BYTES {
            return Err(ProposeError::Size(command.len()));
        }
        let input = |reply| Input::Change {
            change,
            command,
            reply,
        };
        self.result(deadline, input).await
    }

    async fn result(
        &self,
        deadline: Instant,
        input: impl FnOnce(Reply<O>) -> Input<O>,
    ) -> Result<Applied<O>, ProposeError> {
        let (reply, answer) = oneshot::channel();
        self.send(input(reply)).map_err(|full| match full {
            Full::Queue => ProposeError::Overloaded,
            Full::Gone => ProposeError::Stopped,
        })?;
        match timeout_at(deadline, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(ProposeError::Stopped),
            Err(_) => Err(ProposeError::Timeout),
        }
    }

    /// Waits until the machine here holds everything that was committed before this call, anywhere;
    /// returns an index that it has applied. Works on every member.
    ///
    /// # Errors
    ///
    /// Returns [`ReadError`]; a read without a leader ends at its deadline.
    pub async fn read_index(&self, deadline: Instant) -> Result<u64, ReadError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::Read { reply })
            .map_err(|full| match full {
                Full::Queue => ReadError::Overloaded,
                Full::Gone => ReadError::Stopped,
            })?;
        match timeout_at(deadline, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(ReadError::Stopped),
            Err(_) => Err(ReadError::Timeout),
        }
    }

    /// The whole state as it is applied here. For one that is new enough, wait for
    /// [`ReplicaHandle::read_index`] first.
    ///
    /// # Errors
    ///
    /// Returns [`ReadError`]; also at the deadline when this node has no state yet.
    pub async fn snapshot(&self, deadline: Instant) -> Result<Snapshot, ReadError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::State { reply })
            .map_err(|full| match full {
                Full::Queue => ReadError::Overloaded,
                Full::Gone => ReadError::Stopped,
            })?;
        match timeout_at(deadline, answer).await {
            Ok(Ok(snapshot)) => Ok(snapshot),
            Ok(Err(_)) => Err(ReadError::Stopped),
            Err(_) => Err(ReadError::Timeout),
        }
    }

    /// Begins to hand the leadership to another voter; watch the status for what became of it.
    ///
    /// # Errors
    ///
    /// Returns [`TransferError`] when it was not begun.
    pub async fn transfer(&self, to: NodeId) -> Result<(), TransferError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::Transfer { to, reply })
            .map_err(|full| match full {
                Full::Queue => TransferError::Overloaded,
                Full::Gone => TransferError::Stopped,
            })?;
        answer.await.unwrap_or(Err(TransferError::Stopped))
    }

    /// A message of the peer `from`, whose identity and store id were checked. Dropped, with `false`,
    /// when the queue is full: Raft takes that as loss.
    pub fn step(&self, from: NodeId, message: Message) -> bool {
        self.send(Input::Step {
            from,
            message: Box::new(message),
        })
        .is_ok()
    }

    /// A message to this peer could not be sent.
    pub fn report_unreachable(&self, peer: NodeId) {
        let _ = self.send(Input::Unreachable(peer));
    }

    /// What became of a snapshot for this peer. Must not be lost, so it waits for room in the queue:
    /// not to be called from the [`Hook`](super::Hook) or [`Outbound`](super::Outbound).
    pub async fn report_snapshot(&self, peer: NodeId, report: SnapshotReport) {
        while let Err(Full::Queue) = self.send(Input::Snapshot(peer, report)) {
            tokio::time::sleep(crate::node::TICK).await;
        }
    }

    /// What the replica knows of itself; see [`Status::leader_heard_ms`] for what wakes a watcher.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Tells the replica to end, and waits until its files are closed.
    pub async fn stop(&self) -> Arc<StopReason> {
        self.stopping.store(true, Ordering::Relaxed);
        while let Err(Full::Queue) = self.send(Input::Stop) {
            tokio::time::sleep(crate::node::TICK).await;
        }
        self.stopped().await
    }

    /// Waits until the replica has ended and its files are closed.
    pub async fn stopped(&self) -> Arc<StopReason> {
        let mut stopped = self.stopped.clone();
        let reason = stopped
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|reason| reason.clone());
        reason.unwrap_or_else(|| Arc::new(StopReason::Asked))
    }

    fn send(&self, input: Input<O>) -> Result<(), Full> {
        let cost = input.cost();
        if !self.budget.take(cost) {
            return Err(Full::Queue);
        }
        self.inputs.try_send(input).map_err(|refused| {
            self.budget.give_back(match &refused {
                TrySendError::Full(input) | TrySendError::Disconnected(input) => input,
            });
            match refused {
                TrySendError::Full(_) => Full::Queue,
                TrySendError::Disconnected(_) => Full::Gone,
            }
        })
    }
}
