//! One member of the Raft group, pure: ticks, messages and proposals go in, a [`Step`] comes out.
//!
//! It wraps raft-rs 0.7 and takes away what is easy to get wrong there:
//!
//! * **Order of effects.** A [`Step`] borrows the node and gives out the messages that depend on the
//!   disk only after the closure that writes has returned ([`Step::persist`]), so a vote or an
//!   acknowledgement cannot leave before it is durable, and nothing can be stepped in between.
//! * **Panics on nonsense.** raft-rs asserts on inconsistent input. [`Node::step`] checks every
//!   message first ([`Rejected`] lists what is checked) and refuses it with a reason.
//! * **Luck.** raft-rs draws election timeouts from the thread's generator; here they come from the
//!   seed of the [`Config`], so equal seeds and inputs give equal outputs.
//! * **Forwarding.** A proposal is taken by the leader or refused, never passed on silently.
//!
//! Commands are opaque bytes; what they mean is for the machine that applies them. There is no clock
//! ([`TICK`] says how often to call [`Node::tick`]), no disk and no network here.
//!
//! **Members** come from the snapshot, which every node of a new cluster shares
//! ([`Snapshot::bootstrap`]), and change by entries ([`Node::propose_change`]) when they are applied:
//! the caller asks its machine, and tells the node by [`Node::change_members`] where it agrees. The
//! leader is never removed in place, and a joint membership is left by whoever leads.

mod core;
mod error;
mod log;
mod logger;
mod members;
mod status;
mod step;
mod types;
mod validate;
pub mod wire;

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod world;

pub use self::core::{
    Config, HEARTBEAT_TICKS, MAX_COMMAND_BYTES, MAX_ELECTION_TICKS, MIN_ELECTION_TICKS, Node, TICK,
};
pub use self::error::{NodeError, ProposeRefused};
pub use self::members::{ChangeRefused, Members, MembersChange, MembersError};
pub use self::status::{Role, SnapshotReport, Status};
pub use self::step::{Outcome, ReadReady, Step, Write};
pub use self::types::{Entry, HardState, Restored, RestoredError, Snapshot};
pub use self::validate::{MAX_SNAPSHOT_BYTES, Rejected};
/// A message between members, as raft-rs knows it; [`wire`] turns it into what peers exchange.
pub use raft::eraftpb::{Message, MessageType};
