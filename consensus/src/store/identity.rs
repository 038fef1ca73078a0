//! `store.json` and `cluster.json`: which disk this is, and whose.

use std::path::{Path, PathBuf};

use forebay_proto::{ClusterId, NodeId, StoreId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::disk::Disk;
use super::error::StoreError;
use super::{files, snapshot, wal};

const FORMAT: u32 = 1;
const CHECKSUM: &str = "crc32c";

#[derive(Serialize, Deserialize)]
struct StoreFile {
    format: u32,
    store_id: StoreId,
}

/// Which cluster and member a disk belongs to, and with whom the cluster began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterFile {
    /// Format of this file; [`ClusterFile::new`] fills it in.
    format: u32,
    /// The cluster.
    pub cluster_id: ClusterId,
    /// This member.
    pub node_id: NodeId,
    /// This member's name.
    pub node_name: String,
    /// The members when this one became one of them, itself included. Later ones are in the state.
    pub members: Vec<MemberRecord>,
}

/// One member as it was recorded then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// Its Raft id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: String,
    /// Its disk. A member with this id and another disk is refused everywhere.
    pub store_id: StoreId,
}

impl ClusterFile {
    /// The record that `init` makes for one member.
    #[must_use]
    pub fn new(
        cluster_id: ClusterId,
        node_id: NodeId,
        node_name: String,
        members: Vec<MemberRecord>,
    ) -> Self {
        Self {
            format: FORMAT,
            cluster_id,
            node_id,
            node_name,
            members,
        }
    }
}

/// Reads this disk's id, or draws one for an empty directory.
pub(crate) fn open_store_id(disk: &dyn Disk, dir: &Path) -> Result<StoreId, StoreError> {
    let path = dir.join("store.json");
    if let Some(file) = read_json::<StoreFile>(disk, &path)? {
        return Ok(file.store_id);
    }
    if disk.exists(&cluster_path(dir)) || wal::has_segments(disk, dir)? || snapshot::any(disk, dir)?
    {
        return Err(StoreError::StoreFileMissing {
            dir: dir.to_owned(),
        });
    }
    let store_id = StoreId(disk.draw_id());
    write_json(
        disk,
        &path,
        &StoreFile {
            format: FORMAT,
            store_id,
        },
    )?;
    Ok(store_id)
}

pub(crate) fn read_cluster(disk: &dyn Disk, dir: &Path) -> Result<Option<ClusterFile>, StoreError> {
    read_json(disk, &cluster_path(dir))
}

pub(crate) fn write_cluster(
    disk: &dyn Disk,
    dir: &Path,
    cluster: &ClusterFile,
) -> Result<(), StoreError> {
    write_json(disk, &cluster_path(dir), cluster)
}

/// The member that `cluster.json` speaks of must be on this very disk.
pub(crate) fn check_own(dir: &Path, cluster: &ClusterFile, own: StoreId) -> Result<(), StoreError> {
    match cluster
        .members
        .iter()
        .find(|member| member.id == cluster.node_id)
    {
        Some(member) if member.store_id != own => Err(StoreError::OtherStore {
            dir: dir.to_owned(),
            named: member.store_id,
            own,
        }),
        // A node that joined later is not among the first members.
        _ => Ok(()),
    }
}

/// While this mark stands, a log without `cluster.json` is a bootstrap that was cut off.
pub(crate) fn begin_bootstrap(disk: &dyn Disk, dir: &Path) -> Result<(), StoreError> {
    files::write_whole(disk, &mark(dir), &[b"bootstrap under way\n"]).map(|_| ())
}

pub(crate) fn end_bootstrap(disk: &dyn Disk, dir: &Path) -> Result<(), StoreError> {
    files::remove(disk, &mark(dir))?;
    files::sync_dir(disk, dir)
}

pub(crate) fn is_bootstrapping(disk: &dyn Disk, dir: &Path) -> bool {
    disk.exists(&mark(dir))
}

/// Removes what a bootstrap left that did not reach `cluster.json`.
pub(crate) fn clear_bootstrap(disk: &dyn Disk, dir: &Path) -> Result<(), StoreError> {
    if !is_bootstrapping(disk, dir) {
        return Ok(());
    }
    for name in ["wal", "snapshots"] {
        let path = dir.join(name);
        if disk.exists(&path) {
            disk.remove_dir(&path)
                .map_err(StoreError::io("remove", &path))?;
        }
    }
    end_bootstrap(disk, dir)
}

fn mark(dir: &Path) -> PathBuf {
    dir.join("bootstrap.mark")
}

fn cluster_path(dir: &Path) -> PathBuf {
    dir.join("cluster.json")
}

fn read_json<T: DeserializeOwned>(disk: &dyn Disk, path: &Path) -> Result<Option<T>, StoreError> {
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let Some(bytes) = files::read(disk, path)? else {
        return Ok(None);
    };
    let says = |detail: String| StoreError::Damaged {
        path: path.to_owned(),
        detail,
    };
    let damaged = |error: serde_json::Error| says(error.to_string());
    let mut value: Value = serde_json::from_slice(&bytes).map_err(damaged)?;
    let Versioned { format: found } = Versioned::deserialize(&value).map_err(damaged)?;
    let checksum = value
        .as_object_mut()
        .and_then(|object| object.remove(CHECKSUM));
    if checksum.is_some_and(|found| found != checksum_of(&value)) {
        return Err(says("its checksum is wrong".into()));
    }
    if found != FORMAT {
        return Err(StoreError::Format {
            path: path.to_owned(),
            found,
            known: FORMAT,
        });
    }
    T::deserialize(value).map(Some).map_err(damaged)
}

fn write_json<T: Serialize>(disk: &dyn Disk, path: &Path, value: &T) -> Result<(), StoreError> {
    let damaged = |error: serde_json::Error| StoreError::Damaged {
        path: path.to_owned(),
        detail: error.to_string(),
    };
    let mut value = serde_json::to_value(value).map_err(damaged)?;
    let checksum = checksum_of(&value);
    if let Some(object) = value.as_object_mut() {
        object.insert(CHECKSUM.to_owned(), checksum.into());
    }
    let mut text = serde_json::to_vec_pretty(&value).map_err(damaged)?;
    text.push(b'\n');
    files::write_whole(disk, path, &[&text]).map(|_| ())
}

/// Of the compact text without the checksum. An older version writes none and passes over ours.
fn checksum_of(value: &Value) -> u32 {
    crc32c::crc32c(value.to_string().as_bytes())
}
