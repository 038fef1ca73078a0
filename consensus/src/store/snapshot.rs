//! Snapshots on disk: one file each, whole or absent, the newest two kept.
//!
//! `magic 8 | crc32c 4 | header length 4 | header (JSON) | data`; the checksum covers all after it.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::disk::Disk;
use super::error::StoreError;
use super::files;
use crate::node::{Members, Snapshot};
use crate::probe::{Probe, hit};

const MAGIC: &[u8; 8] = b"FBSNAP\x00\x01";
const KEPT: usize = 2;

#[derive(Serialize, Deserialize)]
struct Header {
    index: u64,
    term: u64,
    members: Members,
    bytes: u64,
}

pub(crate) fn folder(dir: &Path) -> PathBuf {
    dir.join("snapshots")
}

pub(crate) fn any(disk: &dyn Disk, dir: &Path) -> Result<bool, StoreError> {
    files::list(disk, &folder(dir), "snap").map(|found| !found.is_empty())
}

/// Writes a snapshot durably, then removes all but the newest [`KEPT`].
pub(crate) fn save(disk: &dyn Disk, dir: &Path, snapshot: &Snapshot) -> Result<(), StoreError> {
    let folder = folder(dir);
    files::create_dir(disk, &folder)?;
    let path = folder.join(format!(
        "{:016x}-{:016x}.snap",
        snapshot.index, snapshot.term
    ));
    let [head, header, data] = encode(snapshot).map_err(|detail| StoreError::Damaged {
        path: path.clone(),
        detail,
    })?;
    files::write_whole(disk, &path, &[&head, &header, &data])?;
    let all = files::list(disk, &folder, "snap")?;
    all.iter()
        .rev()
        .skip(KEPT)
        .try_for_each(|old| files::remove(disk, old))
}

/// A snapshot as it stands in its file, in three parts.
pub(crate) fn encode(snapshot: &Snapshot) -> Result<[Bytes; 3], String> {
    let header = Header {
        index: snapshot.index,
        term: snapshot.term,
        members: snapshot.members.clone(),
        bytes: snapshot.data.len() as u64,
    };
    let header = serde_json::to_vec(&header).map_err(|error| error.to_string())?;
    let length = u32::try_from(header.len())
        .map_err(|error| error.to_string())?
        .to_le_bytes();
    let mut crc = crc32c::crc32c(&length);
    crc = crc32c::crc32c_append(crc, &header);
    crc = crc32c::crc32c_append(crc, &snapshot.data);
    let head = [&MAGIC[..], &crc.to_le_bytes(), &length].concat();
    Ok([head.into(), header.into(), snapshot.data.clone()])
}

/// The newest snapshot that can be read, and what was wrong with the newest that cannot. A damaged one
/// is passed over for the one before it: the log reaches back that far only if it was not yet cut.
pub(crate) fn newest(
    disk: &dyn Disk,
    dir: &Path,
) -> Result<Option<(Snapshot, Option<StoreError>)>, StoreError> {
    let mut damage = None;
    for path in files::list(disk, &folder(dir), "snap")?.iter().rev() {
        match read(disk, path) {
            Ok(snapshot) => {
                if damage.is_some() {
                    hit(Probe::SnapshotPassedOver);
                }
                return Ok(Some((snapshot, damage)));
            }
            Err(error @ StoreError::Damaged { .. }) => {
                tracing::error!(%error, "a snapshot is passed over");
                damage = damage.or(Some(error));
            }
            Err(error) => return Err(error),
        }
    }
    damage.map_or(Ok(None), |damage| {
        hit(Probe::Damage);
        Err(damage)
    })
}

fn read(disk: &dyn Disk, path: &Path) -> Result<Snapshot, StoreError> {
    let damaged = |detail: String| StoreError::Damaged {
        path: path.to_owned(),
        detail,
    };
    let bytes = files::read(disk, path)?.ok_or_else(|| damaged("it is gone".into()))?;
    decode(&bytes.into()).map_err(damaged)
}

/// A snapshot from the bytes of its file, or what is wrong with them.
pub(crate) fn decode(bytes: &Bytes) -> Result<Snapshot, String> {
    let damaged = |detail: &str| detail.to_owned();
    let word = |at: usize| {
        let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
        word.map(u32::from_le_bytes)
            .ok_or_else(|| damaged("it is too short"))
    };
    if bytes.get(..8) != Some(MAGIC.as_slice()) {
        return Err(damaged("it does not begin like a snapshot"));
    }
    if word(8)? != crc32c::crc32c(&bytes[12..]) {
        return Err(damaged("its checksum is wrong"));
    }
    let data_at = 16 + word(12)? as usize;
    let header = bytes
        .get(16..data_at)
        .ok_or_else(|| damaged("its header is cut"))?;
    let header: Header =
        serde_json::from_slice(header).map_err(|error| damaged(&error.to_string()))?;
    let data = bytes.slice(data_at..);
    if data.len() as u64 != header.bytes {
        return Err(damaged("its length is wrong"));
    }
    Ok(Snapshot {
        index: header.index,
        term: header.term,
        members: header.members,
        data,
    })
}
