//! What one control node keeps on its disk, and how it gets it back.
//!
//! ```text
//! DIR/LOCK              held by the one process that may write here
//! DIR/store.json        this disk's random id; alone, it means "uninitialised"
//! DIR/cluster.json      which cluster and which member this disk belongs to, from `init` on
//! DIR/wal/*.log         the log and the hard state, in segments (see `wal`)
//! DIR/wal/synced.mark   how far they were synced (see `mark`)
//! DIR/snapshots/*.snap  the newest two snapshots of the machine (see `snapshot`)
//! ```
//!
//! One batch is one sync. A sync that failed is never tried again: the kernel may have dropped the
//! pages, so the store takes nothing more and the process must end. A full disk is no such failure:
//! what found no room is cut off, and the same batch can be tried again. Files are 0600 and folders 0700.
#![allow(clippy::disallowed_methods)] // the disk's rim: draws the store's id from the system

pub mod disk;
mod error;
mod files;
mod identity;
mod mark;
mod record;
mod snapshot;
mod wal;

#[cfg(test)]
mod damage;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod model;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use forebay_proto::{ClusterId, StoreId};

pub use error::StoreError;
pub use identity::{ClusterFile, MemberRecord};
pub(crate) use snapshot::{decode as decode_snapshot, encode as encode_snapshot};

use crate::node::{HardState, Restored, Snapshot, Write};
use crate::probe::{Probe, hit};
use disk::{Disk, RealDisk};
use files::Lock;
use wal::{Apart, Wal};

/// How a store writes.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// A segment that has reached this size is followed by a new one.
    pub segment_bytes: u64,
    /// The disk it writes to.
    pub disk: Arc<dyn Disk>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 16 << 20,
            disk: Arc::new(RealDisk),
        }
    }
}

/// An opened data directory: either without a cluster, or the memory of one member.
#[derive(Debug)]
pub enum Opened {
    /// `init` has not reached this node.
    Uninitialised(Uninitialised),
    /// A member, with what it remembers.
    Member(Box<Store>, Box<Restored>),
}

/// A locked data directory that belongs to no cluster yet.
#[derive(Debug)]
pub struct Uninitialised {
    dir: PathBuf,
    lock: Lock,
    store_id: StoreId,
    options: StoreOptions,
}

/// The memory of one member. See the module's page.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    _lock: Lock,
    store_id: StoreId,
    cluster: ClusterFile,
    wal: Wal,
    options: StoreOptions,
    broken: bool,
}

impl Store {
    /// Opens a data directory, creating it and its store id when it is empty.
    ///
    /// # Errors
    ///
    /// Returns a [`StoreError`] whose message names the path and says what to do.
    pub fn open(dir: impl Into<PathBuf>, options: StoreOptions) -> Result<Opened, StoreError> {
        let dir = dir.into();
        let disk = options.disk.clone();
        let disk = &*disk;
        files::create_dir(disk, &dir)?;
        let lock = Lock::take(disk, &dir)?;
        let store_id = identity::open_store_id(disk, &dir)?;
        let Some(cluster) = identity::read_cluster(disk, &dir)? else {
            let leftovers = wal::has_segments(disk, &dir)? || snapshot::any(disk, &dir)?;
            if leftovers && !identity::is_bootstrapping(disk, &dir) {
                return Err(StoreError::ClusterFileMissing { dir });
            }
            // A bootstrap that did not get as far as cluster.json never answered anyone.
            identity::clear_bootstrap(disk, &dir)?;
            return Ok(Opened::Uninitialised(Uninitialised {
                dir,
                lock,
                store_id,
                options,
            }));
        };
        identity::check_own(&dir, &cluster, store_id)?;
        if identity::is_bootstrapping(disk, &dir) {
            identity::end_bootstrap(disk, &dir)?;
        }
        let (snapshot, passed_over) = snapshot::newest(disk, &dir)?
            .ok_or_else(|| StoreError::SnapshotMissing { dir: dir.clone() })?;
        let (mut wal, replayed) = Wal::open(&dir, options.segment_bytes, options.disk.clone())?;
        let found = snapshot.index;
        let (restored, stale) = replayed.onto(snapshot).map_err(|apart| {
            passed_over.unwrap_or_else(|| match apart {
                Apart::EntriesMissing(error) => error,
                Apart::SnapshotMissing { index } => StoreError::NewerSnapshotMissing {
                    folder: snapshot::folder(&dir),
                    found,
                    index,
                },
            })
        })?;
        if stale {
            hit(Probe::SnapshotBeforeReset);
            wal.reset(&restored.snapshot)?;
        }
        let store = Self {
            dir,
            _lock: lock,
            store_id,
            cluster,
            wal,
            options,
            broken: false,
        };
        Ok(Opened::Member(Box::new(store), Box::new(restored)))
    }

    /// Makes one step's write durable: snapshot first, then entries and hard state in one sync.
    ///
    /// # Errors
    ///
    /// After an error that is not [`StoreError::is_full`] the store takes nothing more; the process
    /// must end. When the disk was full, the same write can be tried again.
    pub fn write(&mut self, write: &Write) -> Result<(), StoreError> {
        self.guarded(|store| store.write_all(write))
    }

    fn write_all(&mut self, write: &Write) -> Result<(), StoreError> {
        if let Some(snapshot) = &write.snapshot {
            snapshot::save(&*self.options.disk, &self.dir, snapshot)?;
        }
        if !write.is_empty() {
            self.wal.write(write)?;
        }
        if let Some(snapshot) = &write.snapshot {
            self.wal.forget(snapshot.index)?;
        }
        Ok(())
    }

    /// Keeps a snapshot that the machine made, and drops segments that hold nothing after `keep`
    /// entries before it.
    ///
    /// # Errors
    ///
    /// As [`Store::write`].
    pub fn save_snapshot(&mut self, snapshot: &Snapshot, keep: u64) -> Result<(), StoreError> {
        self.guarded(|store| {
            snapshot::save(&*store.options.disk, &store.dir, snapshot)?;
            store.wal.forget(snapshot.index.saturating_sub(keep))
        })
    }

    /// This disk.
    #[must_use]
    pub fn store_id(&self) -> StoreId {
        self.store_id
    }

    /// Which member this disk belongs to, and with whom it began.
    #[must_use]
    pub fn cluster(&self) -> &ClusterFile {
        &self.cluster
    }

    /// The data directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Refuses a disk of another cluster.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::OtherCluster`].
    pub fn expect_cluster(&self, expected: ClusterId) -> Result<(), StoreError> {
        if self.cluster.cluster_id == expected {
            return Ok(());
        }
        let (dir, found) = (self.dir.clone(), self.cluster.cluster_id);
        Err(StoreError::OtherCluster {
            dir,
            found,
            expected,
        })
    }

    fn guarded(
        &mut self,
        write: impl FnOnce(&mut Self) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        if self.broken {
            return Err(StoreError::Broken {
                dir: self.dir.clone(),
            });
        }
        let written = write(self);
        self.broken = matches!(&written, Err(error) if !error.is_full());
        written
    }
}

impl Uninitialised {
    /// This disk.
    #[must_use]
    pub fn store_id(&self) -> StoreId {
        self.store_id
    }

    /// The data directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes this disk the memory of a new member: the snapshot that all start from, an empty log,
    /// and last `cluster.json`, which makes it count.
    ///
    /// # Errors
    ///
    /// Returns a [`StoreError`]; the directory then opens as uninitialised again, unless it got as
    /// far as `cluster.json`.
    pub fn bootstrap(
        self,
        cluster: ClusterFile,
        snapshot: &Snapshot,
    ) -> Result<(Store, Restored), StoreError> {
        let Self {
            dir,
            lock,
            store_id,
            options,
        } = self;
        identity::check_own(&dir, &cluster, store_id)?;
        let disk = options.disk.clone();
        identity::begin_bootstrap(&*disk, &dir)?;
        snapshot::save(&*disk, &dir, snapshot)?;
        let mut wal = Wal::create(&dir, options.segment_bytes, disk.clone())?;
        let hard_state = HardState {
            term: snapshot.term,
            vote: 0,
            commit: snapshot.index,
        };
        wal.write(&Write {
            hard_state: Some(hard_state),
            must_sync: true,
            ..Write::default()
        })?;
        identity::write_cluster(&*disk, &dir, &cluster)?;
        identity::end_bootstrap(&*disk, &dir)?;
        let restored = Restored {
            hard_state,
            snapshot: snapshot.clone(),
            entries: Vec::new(),
        };
        let store = Store {
            dir,
            _lock: lock,
            store_id,
            cluster,
            wal,
            options,
            broken: false,
        };
        Ok((store, restored))
    }
}
