//! Why a data directory cannot be used, each with its way out.

use std::io;
use std::path::{Path, PathBuf};

use forebay_proto::{ClusterId, StoreId};

/// Why a data directory cannot be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it.
    #[error("{dir} is in use by another process: stop that one, or give this one its own --data-dir", dir = dir.display())]
    InUse {
        /// The data directory.
        dir: PathBuf,
    },
    /// The system refused an operation on a file.
    #[error("cannot {action} {path}: {source}{hint}", path = path.display(), hint = hint(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is a log or a cluster but no store id: this is not a whole data directory.
    #[error(
        "{dir} has data of a control node but no store.json: restore the whole directory, or move it \
         away and join as a new node",
        dir = dir.display()
    )]
    StoreFileMissing {
        /// The data directory.
        dir: PathBuf,
    },
    /// There is a log but no `cluster.json`.
    #[error(
        "{dir} has a log but no cluster.json: restore the whole directory, or move it away and join \
         as a new node",
        dir = dir.display()
    )]
    ClusterFileMissing {
        /// The data directory.
        dir: PathBuf,
    },
    /// A member's directory without any whole snapshot.
    #[error(
        "{dir} belongs to a cluster but has no readable snapshot: this disk lost data; remove the node \
         and join as a new one",
        dir = dir.display()
    )]
    SnapshotMissing {
        /// The data directory.
        dir: PathBuf,
    },
    /// The log goes on from a snapshot that is not there.
    #[error(
        "{folder} lacks the snapshot at index {index}, the newest one left is at {found}, and the log does \
         not reach back to it: this disk lost data; remove the node and join as a new one",
        folder = folder.display()
    )]
    NewerSnapshotMissing {
        /// Where snapshots are kept.
        folder: PathBuf,
        /// Index of the newest one that is there.
        found: u64,
        /// Index after which the log begins.
        index: u64,
    },
    /// A member's directory without a log.
    #[error(
        "{dir} belongs to a cluster but its log is gone: this disk lost data; remove the node and join \
         as a new one",
        dir = dir.display()
    )]
    LogMissing {
        /// The data directory.
        dir: PathBuf,
    },
    /// A small file that is not what this program writes.
    #[error("{path} is damaged: {detail}; restore it from a copy, or remove the node and join as a new one", path = path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A record that was synced cannot be read any more.
    #[error(
        "{path} is damaged at offset {offset}: {detail}; entries that were acknowledged are lost, so this \
         disk must not be used: remove the node and join as a new one",
        path = path.display()
    )]
    Corrupt {
        /// Which segment.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong.
        detail: String,
    },
    /// Written by a newer version.
    #[error("{path} has format {found}, this version knows {known}: start a newer version", path = path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// The format in it.
        found: u32,
        /// The format of this program.
        known: u32,
    },
    /// `cluster.json` came from another disk.
    #[error(
        "{dir} was put together from two disks: cluster.json names store {named}, store.json is {own}; \
         remove the node and join as a new one",
        dir = dir.display()
    )]
    OtherStore {
        /// The data directory.
        dir: PathBuf,
        /// The store in `cluster.json`.
        named: StoreId,
        /// The store in `store.json`.
        own: StoreId,
    },
    /// The directory of another cluster.
    #[error(
        "{dir} belongs to cluster {found}, expected {expected}: give the right --data-dir or --control",
        dir = dir.display()
    )]
    OtherCluster {
        /// The data directory.
        dir: PathBuf,
        /// Its cluster.
        found: ClusterId,
        /// The one asked for.
        expected: ClusterId,
    },
    /// Larger than a record can be.
    #[error("{what} of {bytes} bytes is too large for the store, at most {max}")]
    TooLarge {
        /// What.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The bound.
        max: usize,
    },
    /// An earlier write failed; nothing more is written, because nobody can tell what is on disk.
    #[error("the store in {dir} stopped after a failed write; restart the process", dir = dir.display())]
    Broken {
        /// The data directory.
        dir: PathBuf,
    },
}

impl StoreError {
    /// Whether the disk had no room for a write. Nothing of the batch is on disk then, unless a sync
    /// failed, and it can be tried again.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(
            self,
            Self::Io { action, source, .. }
                if *action != "sync"
                    && matches!(
                        source.kind(),
                        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                    )
        )
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; the directory must belong to the user that runs this",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free space and restart: nothing acknowledged is lost"
        }
        io::ErrorKind::ReadOnlyFilesystem => "; remount it writable, or replace the disk",
        io::ErrorKind::NotADirectory => "; --data-dir must name a directory",
        _ => "",
    }
}
