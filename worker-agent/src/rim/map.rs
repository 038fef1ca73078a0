//! The cache's map on disk, so that a restarted agent knows what its engine holds.
//!
//! Written beside and renamed, and not synced: what takes the disk's cache along, a loss of power or of
//! the host, takes the engine's along as well. A file that is of no use costs hits, so that it is passed
//! over with a warning and written anew.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::work::Shared;
use crate::core::{MAX_MAP_BYTES, Map};

/// What a kill loses at most. The largest map is 17 MB, an ordinary one 1.
const EVERY: Duration = Duration::from_secs(5);

/// Where the map is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapFile {
    /// The file.
    pub path: PathBuf,
    /// From one look at whether it changed to the next.
    pub every: Duration,
}

impl MapFile {
    /// That of the agent with this data directory.
    #[must_use]
    pub fn in_directory(directory: &Path) -> Self {
        Self {
            path: directory.join("cache.map"),
            every: EVERY,
        }
    }
}

/// What an earlier start kept, if it is of use.
pub(super) fn read(file: &MapFile) -> Option<Map> {
    let problem = match bytes(&file.path) {
        Ok(None) => return None,
        Ok(Some(bytes)) => match Map::decode(&bytes) {
            Ok(map) => return Some(map),
            Err(problem) => problem.to_string(),
        },
        Err(problem) => problem.to_string(),
    };
    tracing::warn!(
        file = %file.path.display(),
        problem,
        "the map of the engine's cache is passed over: its prefixes are found again as they are used"
    );
    None
}

fn bytes(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    // One byte more than a map has is none.
    file.take(MAX_MAP_BYTES as u64 + 1)
        .read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// Keeps the file up to date.
pub(super) struct Keeper {
    file: MapFile,
    shared: Arc<Shared>,
    state: Mutex<State>,
    /// One writer at a time.
    writing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    written: Option<(u64, u64)>,
    /// Said once, not at each try.
    failed: bool,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.file.fmt(f)
    }
}

impl Keeper {
    pub(super) fn new(file: MapFile, shared: Arc<Shared>) -> Self {
        Self {
            file,
            shared,
            state: Mutex::default(),
            writing: tokio::sync::Mutex::default(),
        }
    }

    /// Writes what changed, for as long as it is polled.
    pub(super) async fn keep(&self) {
        loop {
            tokio::time::sleep(self.file.every).await;
            self.write().await;
        }
    }

    /// Writes the map, if it changed and the engine is known.
    pub(super) async fn write(&self) {
        let _one = self.writing.lock().await;
        let written = self.state.lock().written;
        let map = self.shared.with(|core, _| {
            let version = core.map_version();
            let map = (Some(version) != written).then(|| core.map()).flatten();
            map.map(|map| (version, map))
        });
        let Some((version, map)) = map else {
            return;
        };
        let path = self.file.path.clone();
        let write = move || map.encode().map_or(Ok(()), |bytes| replace(&path, &bytes));
        let done = tokio::task::spawn_blocking(write).await;
        let done = done.unwrap_or_else(|error| Err(io::Error::other(error)));
        let mut state = self.state.lock();
        match done {
            Ok(()) => {
                state.written = Some(version);
                state.failed = false;
            }
            Err(problem) if !state.failed => {
                state.failed = true;
                tracing::warn!(
                    file = %self.file.path.display(),
                    %problem,
                    "the map of the engine's cache is not kept: a restart of this agent begins with an empty one"
                );
            }
            Err(_) => {}
        }
    }
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("map.new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(bytes)?;
    std::fs::rename(&beside, path)
}
