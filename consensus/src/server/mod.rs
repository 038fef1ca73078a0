//! A control node at work: its disk, its replica, its peers and everyone who asks it something.
//!
//! A node with an empty disk waits, *uninitialised*, until `forebay init` makes it one of the first
//! members, or `forebay raft add` a later one; no flag creates a cluster. A member runs the replica, carries Raft messages to its peers, answers RPCs and
//! feeds watchers. Peers whose disk is not the one that the cluster knows are refused before any
//! message of theirs is looked at.
#![allow(clippy::disallowed_methods)] // the rim: clocks, tasks and sockets are what it is made of

mod bootstrap;
mod callers;
mod group;
mod leader;
mod lifecycle;
mod membership;
mod peers;
mod plans;
pub mod publish;
mod rpc;
mod segments;
mod snapshots;
mod watchers;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use forebay_link::{BindError, CredentialPaths, CredentialsError};

use crate::replica::{StartError, StopReason};
use crate::store::StoreError;

pub use leader::{Leader, ProposeFailure};
pub use lifecycle::{ControlNode, start, start_with};
pub use plans::{Candidate, Planner, Question};

/// How long a node is up before it lets itself be bootstrapped: time for a cluster that already
/// counts it as a member to say so.
const BOOTSTRAP_AFTER: Duration = Duration::from_secs(1);

/// What a control node needs to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its disk.
    pub data_dir: PathBuf,
    /// Where it listens (UDP).
    pub listen: SocketAddr,
    /// Its certificate (role control; the name in it is the node's), key and CA.
    pub credentials: CredentialPaths,
    /// Settings of the replica; the defaults suit production.
    pub replica: crate::replica::ReplicaOptions,
    /// Above so many bytes of files the audit's oldest entries give way, on this node.
    pub audit_bytes: u64,
}

/// What production never changes, and tests do.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Deltas kept for watchers that resume; who is further behind gets a snapshot.
    pub watch_deltas: usize,
    /// How many times faster than the node's clock leases run out and cell time passes. What the
    /// state machine demands of a lease stays as it is, so that every replica agrees on it.
    pub pace: u32,
    /// A file of the audit that is larger is followed by another.
    pub audit_file_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            watch_deltas: publish::MAX_DELTAS,
            pace: 1,
            audit_file_bytes: 4 << 20,
        }
    }
}

/// Why a control node does not start or has ended.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The certificate cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The certificate is for something else.
    #[error("the certificate names {found}: a control node needs one with --role control")]
    WrongRole {
        /// Whom it names.
        found: String,
    },
    /// The address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The disk cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The data directory is of another node.
    #[error(
        "{dir} belongs to node {found}, but the certificate names {name}: use the matching pair",
        dir = dir.display()
    )]
    OtherNode {
        /// The data directory.
        dir: PathBuf,
        /// Whose it is.
        found: String,
        /// Whom the certificate names.
        name: String,
    },
    /// The replica cannot start from its disk.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The replica ended by itself.
    #[error("{0}")]
    Stopped(Arc<StopReason>),
}
