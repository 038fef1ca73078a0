//! A backup: one file with the whole agreed state, and the way back from it.
//!
//! The file is a snapshot as a control node keeps it (see [`crate::store`]), without fingerprint keys:
//! whoever reads a backup must not be able to tell which prompts share a prefix, and a new cluster
//! draws its own. The way back is a new cluster of one node, under a new id: what the old one agreed on
//! after the backup is not in it, so agents and balancers must not take the two for one.
#![allow(clippy::disallowed_methods)] // looks at a directory before the store opens it

use std::path::{Path, PathBuf};

use bytes::Bytes;
use forebay_proto::fleet::{Member, check_address};
use forebay_proto::ids::check_name;
use forebay_proto::{ClusterId, NodeId, StoreId};

use crate::fleet::{Fleet, RestoreError};
use crate::node::{Members, MembersError, Snapshot};
use crate::store::{
    ClusterFile, MemberRecord, Opened, Store, StoreError, StoreOptions, decode_snapshot,
    encode_snapshot,
};

/// What a backup holds.
#[derive(Clone, Debug)]
pub struct Backup {
    /// The last index of the log that the state includes.
    pub index: u64,
    /// The term of that index.
    pub term: u64,
    /// The group at that point.
    pub members: Members,
    /// The state.
    pub fleet: Fleet,
}

/// Why bytes are no backup, or cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file is none, or was damaged.
    #[error("this is not a whole snapshot file: {0}")]
    Damaged(String),
    /// What it holds is no state that this version can use.
    #[error(transparent)]
    State(#[from] RestoreError),
    /// The new node cannot be called so, or not be reached there.
    #[error("{0}")]
    Member(String),
    /// Somebody's data is there.
    #[error("{dir} is not empty: restore into a directory of its own, nothing is overwritten", dir = dir.display())]
    NotEmpty {
        /// The data directory.
        dir: PathBuf,
    },
    /// The disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A group of one node that is none.
    #[error(transparent)]
    Members(#[from] MembersError),
}

/// A cluster of one node that a backup was restored into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refounded {
    /// The new cluster.
    pub cluster_id: ClusterId,
    /// Its node.
    pub node_id: NodeId,
    /// The node's disk.
    pub store_id: StoreId,
}

/// A replica's state as the bytes of a backup.
///
/// # Errors
///
/// Returns [`BackupError`] when this is no state of a fleet.
pub fn write(state: &Snapshot) -> Result<Vec<u8>, BackupError> {
    let fleet = Fleet::restore(&state.data)?.without_keys();
    let without_keys = Snapshot {
        data: fleet.snapshot().into(),
        ..state.clone()
    };
    let parts = encode_snapshot(&without_keys).map_err(BackupError::Damaged)?;
    Ok(parts.concat())
}

/// Reads a backup and checks every checksum in it.
///
/// # Errors
///
/// Returns [`BackupError`]. Arbitrary bytes never panic.
pub fn read(file: impl Into<Bytes>) -> Result<Backup, BackupError> {
    let snapshot = decode_snapshot(&file.into()).map_err(BackupError::Damaged)?;
    Ok(Backup {
        index: snapshot.index,
        term: snapshot.term,
        members: snapshot.members,
        fleet: Fleet::restore(&snapshot.data)?,
    })
}

/// Makes an empty directory the disk of the only node of a new cluster with this state.
///
/// The node's id is one that the old cluster never had. What was cut off leaves a directory that is not
/// empty: remove it and restore again.
///
/// # Errors
///
/// Returns [`BackupError`]; a directory that is not empty is not touched.
pub fn restore(
    backup: Backup,
    dir: &Path,
    cluster_id: ClusterId,
    name: &str,
    address: &str,
) -> Result<Refounded, BackupError> {
    check_name("node", name).map_err(|error| BackupError::Member(error.to_string()))?;
    check_address(address).map_err(BackupError::Member)?;
    if std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(BackupError::NotEmpty { dir: dir.into() });
    }
    let Opened::Uninitialised(disk) = Store::open(dir, StoreOptions::default())? else {
        return Err(BackupError::NotEmpty { dir: dir.into() });
    };
    let node_id = NodeId(backup.fleet.newest_member().0 + 1);
    let record = MemberRecord {
        id: node_id,
        name: name.into(),
        address: address.into(),
        store_id: disk.store_id(),
    };
    let member = Member {
        id: node_id,
        name: name.into(),
        address: address.into(),
        store_id: disk.store_id(),
        learner: false,
    };
    let snapshot = Snapshot {
        index: backup.index,
        term: backup.term,
        members: Members::new([node_id], [])?,
        data: backup.fleet.refounded(cluster_id, member).snapshot().into(),
    };
    let store_id = disk.store_id();
    let file = ClusterFile::new(cluster_id, node_id, name.into(), vec![record]);
    disk.bootstrap(file, &snapshot)?;
    Ok(Refounded {
        cluster_id,
        node_id,
        store_id,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: ClusterId = ClusterId([1; 16]);
    const NEW: ClusterId = ClusterId([2; 16]);

    fn member(id: u64) -> Member {
        Member {
            id: NodeId(id),
            name: format!("c{id}"),
            address: format!("h{id}:1"),
            store_id: StoreId([1; 16]),
            learner: false,
        }
    }

    fn file() -> Vec<u8> {
        let fleet = Fleet::bootstrap(OLD, vec![member(1), member(2), member(3)]);
        let members = Members::new([1, 2, 3].map(NodeId), []).unwrap();
        let snapshot = Snapshot {
            index: 700,
            term: 4,
            ..Snapshot::bootstrap(members, fleet.snapshot().into())
        };
        write(&snapshot).unwrap()
    }

    #[test]
    fn a_backup_reads_back_and_a_damaged_one_does_not() {
        let file = file();
        let backup = read(file.clone()).unwrap();
        assert_eq!((backup.index, backup.term), (700, 4));
        assert_eq!(backup.fleet.members().len(), 3);
        for at in (0..file.len()).step_by(7) {
            let mut damaged = file.clone();
            damaged[at] ^= 1;
            assert!(read(damaged).is_err(), "byte {at}");
            assert!(read(file[..at].to_vec()).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn it_is_restored_as_one_node_of_a_new_cluster_into_an_empty_directory_only() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        let backup = read(file()).unwrap();
        let refounded = restore(backup.clone(), &disk, NEW, "c9", "h9:1").unwrap();
        assert_eq!(refounded.node_id, NodeId(4), "an id that nobody had");
        let Opened::Member(store, restored) = Store::open(&disk, StoreOptions::default()).unwrap()
        else {
            panic!("not a member's disk")
        };
        assert_eq!(store.cluster().cluster_id, NEW);
        assert_eq!(restored.snapshot.members.voters(), [NodeId(4)]);
        assert_eq!(
            (restored.hard_state.commit, restored.snapshot.index),
            (700, 700)
        );
        let fleet = Fleet::restore(&restored.snapshot.data).unwrap();
        assert_eq!(fleet.cluster_id(), NEW);
        assert_eq!(fleet.members()[0].store_id, refounded.store_id);
        drop(store);
        let again = restore(backup.clone(), &disk, NEW, "c9", "h9:1");
        assert!(
            matches!(again, Err(BackupError::NotEmpty { .. })),
            "{again:?}"
        );
        let named = restore(backup, &dir.path().join("other"), NEW, "a/b", "h9:1");
        assert!(matches!(named, Err(BackupError::Member(_))), "{named:?}");
    }
}
