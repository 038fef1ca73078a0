//! Files that are whole or absent: written aside, synced, renamed, and the folder synced.

use std::io;
use std::path::{Path, PathBuf};

use super::disk::{Disk, DiskFile, Held};
use super::error::StoreError;
use crate::bug::{Bug, on};

/// The one process that may write a data directory holds this; the kernel lets go when it ends.
pub(crate) struct Lock {
    _held: Held,
}

impl std::fmt::Debug for Lock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lock")
    }
}

impl Lock {
    pub(crate) fn take(disk: &dyn Disk, dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("LOCK");
        match disk.lock(&path).map_err(StoreError::io("lock", &path))? {
            Some(held) => Ok(Self { _held: held }),
            None => Err(StoreError::InUse {
                dir: dir.to_owned(),
            }),
        }
    }
}

pub(crate) fn create_dir(disk: &dyn Disk, dir: &Path) -> Result<(), StoreError> {
    if disk.is_dir(dir) {
        return Ok(());
    }
    disk.create_dir(dir)
        .map_err(StoreError::io("create", dir))?;
    match dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => sync_dir(disk, parent),
        None => Ok(()),
    }
}

pub(crate) fn sync_dir(disk: &dyn Disk, dir: &Path) -> Result<(), StoreError> {
    disk.sync_dir(dir).map_err(StoreError::io("sync", dir))
}

/// Writes a whole file durably under its name, which it has only once it is complete.
pub(crate) fn write_whole(
    disk: &dyn Disk,
    path: &Path,
    parts: &[&[u8]],
) -> Result<Box<dyn DiskFile>, StoreError> {
    let aside = aside(path);
    let mut file = disk
        .create(&aside)
        .map_err(StoreError::io("create", &aside))?;
    for part in parts {
        file.write(part).map_err(StoreError::io("write", &aside))?;
    }
    let is_snapshot = || path.extension().is_some_and(|ending| ending == "snap");
    if !(on(Bug::SnapshotNotSynced) && is_snapshot()) {
        file.sync().map_err(StoreError::io("sync", &aside))?;
    }
    disk.rename(&aside, path)
        .map_err(StoreError::io("rename", &aside))?;
    if let Some(dir) = path.parent().filter(|_| !on(Bug::FolderNotSynced)) {
        sync_dir(disk, dir)?;
    }
    Ok(file)
}

/// The files of a folder with this ending, sorted by name; none when there is no folder.
/// What a crash left half-written is removed.
pub(crate) fn list(disk: &dyn Disk, dir: &Path, ending: &str) -> Result<Vec<PathBuf>, StoreError> {
    let paths = match disk.list(dir) {
        Ok(paths) => paths,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io("read", dir)(error)),
    };
    let mut found = Vec::new();
    for path in paths {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("tmp") => remove(disk, &path)?,
            Some(other) if other == ending => found.push(path),
            _ => {}
        }
    }
    found.sort();
    Ok(found)
}

pub(crate) fn remove(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    match disk.remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(StoreError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Reads a file; `None` when there is none.
pub(crate) fn read(disk: &dyn Disk, path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match disk.read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("read", path)(error)),
    }
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}
