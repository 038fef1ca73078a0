//! Files that are whole or absent: written aside, synced, renamed, and the folder synced.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::error::StoreError;
use super::fault::Fault;

/// The one process that may write a data directory holds this; the kernel lets go when it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    pub(crate) fn take(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("LOCK");
        let open = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path);
        let file = open.map_err(StoreError::io("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::InUse {
                dir: dir.to_owned(),
            }),
            Err(error) => Err(StoreError::io("lock", &path)(error.into())),
        }
    }
}

pub(crate) fn create_dir(dir: &Path) -> Result<(), StoreError> {
    if dir.is_dir() {
        return Ok(());
    }
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir);
    made.map_err(StoreError::io("create", dir))?;
    match dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(StoreError::io("sync", dir))
}

/// Writes a whole file durably under its name, which it has only once it is complete.
pub(crate) fn write_whole(
    path: &Path,
    parts: &[&[u8]],
    fault: &dyn Fault,
) -> Result<File, StoreError> {
    let aside = aside(path);
    let open = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&aside);
    let mut file = open.map_err(StoreError::io("create", &aside))?;
    for part in parts {
        write_all(&mut file, part, &aside, fault)?;
    }
    fault
        .sync(&aside)
        .and_then(|()| file.sync_all())
        .map_err(StoreError::io("sync", &aside))?;
    fs::rename(&aside, path).map_err(StoreError::io("rename", &aside))?;
    if let Some(dir) = path.parent() {
        sync_dir(dir)?;
    }
    Ok(file)
}

pub(crate) fn write_all(
    file: &mut File,
    bytes: &[u8],
    path: &Path,
    fault: &dyn Fault,
) -> Result<(), StoreError> {
    let allowed = fault.write(path, bytes.len()).min(bytes.len());
    file.write_all(&bytes[..allowed])
        .map_err(StoreError::io("write", path))?;
    if allowed < bytes.len() {
        return Err(StoreError::io("write", path)(
            io::ErrorKind::StorageFull.into(),
        ));
    }
    Ok(())
}

/// The files of a folder with this ending, sorted by name; none when there is no folder.
/// What a crash left half-written is removed.
pub(crate) fn list(dir: &Path, ending: &str) -> Result<Vec<PathBuf>, StoreError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io("read", dir)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(StoreError::io("read", dir))?.path();
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("tmp") => remove(&path)?,
            Some(other) if other == ending => found.push(path),
            _ => {}
        }
    }
    found.sort();
    Ok(found)
}

pub(crate) fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(StoreError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Reads a file; `None` when there is none.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::read(path) {
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
