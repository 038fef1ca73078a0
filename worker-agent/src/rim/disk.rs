//! The agent's record on disk: who it is, and how often it has started.
//!
//! A start is on disk before anything is served under it, so that no two processes ever serve the
//! same incarnation. The directory is locked for as long as the process lives.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use forebay_proto::{ClusterId, Incarnation, WorkerId};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::error::AgentError;

const FORMAT: u32 = 1;
const MAX_BYTES: u64 = 64 << 10;

/// What is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    format: u32,
    /// The cluster that granted it.
    pub(super) cluster_id: ClusterId,
    worker: WorkerId,
    name: String,
    grant: u64,
    start: u32,
}

impl Record {
    pub(super) const fn incarnation(&self) -> Incarnation {
        Incarnation {
            worker: self.worker,
            grant: self.grant,
            start: self.start,
        }
    }
}

/// A locked data directory.
pub(super) struct DataDir {
    path: PathBuf,
    name: String,
    record: Option<Record>,
    _lock: File,
}

impl DataDir {
    /// Locks the directory, made if need be, and reads what it holds of worker `name`.
    pub(super) fn open(path: &Path, name: &str) -> Result<Self, AgentError> {
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path);
        made.map_err(|error| disk(path, error))?;
        let lock = File::open(path).map_err(|error| disk(path, error))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(AgentError::DirectoryTaken {
                    directory: path.into(),
                });
            }
            Err(error) => return Err(disk(path, error.into())),
        }
        let record = read(&path.join("agent.json"))?;
        if let Some(record) = &record
            && record.name != name
        {
            return Err(AgentError::OtherWorker {
                directory: path.into(),
                held: record.name.clone(),
                name: name.into(),
            });
        }
        Ok(Self {
            path: path.into(),
            name: name.into(),
            record,
            _lock: lock,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) const fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// Counts one more start; it is on disk on return.
    pub(super) fn count_start(&mut self) -> Result<Option<Record>, AgentError> {
        let Some(held) = &self.record else {
            return Ok(None);
        };
        let start = held
            .start
            .checked_add(1)
            .ok_or_else(|| AgentError::Record {
                path: self.path.join("agent.json"),
                problem: "its starts have run out".into(),
            })?;
        let record = Record {
            start,
            ..held.clone()
        };
        self.write(record.clone())?;
        Ok(Some(record))
    }

    /// Keeps what was granted; it is on disk on return.
    pub(super) fn granted(
        &mut self,
        cluster_id: ClusterId,
        incarnation: Incarnation,
    ) -> Result<(), AgentError> {
        self.write(Record {
            format: FORMAT,
            cluster_id,
            worker: incarnation.worker,
            name: self.name.clone(),
            grant: incarnation.grant,
            start: incarnation.start,
        })
    }

    fn write(&mut self, record: Record) -> Result<(), AgentError> {
        let path = self.path.join("agent.json");
        let text = serde_json::to_vec_pretty(&record).map_err(|error| disk(&path, error.into()))?;
        replace(&self.path, &path, &text).map_err(|error| disk(&path, error))?;
        self.record = Some(record);
        Ok(())
    }
}

fn read(path: &Path) -> Result<Option<Record>, AgentError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(disk(path, error)),
    };
    let mut text = Vec::new();
    file.take(MAX_BYTES)
        .read_to_end(&mut text)
        .map_err(|error| disk(path, error))?;
    let damaged = |problem: String| AgentError::Record {
        path: path.into(),
        problem,
    };
    let record: Record =
        serde_json::from_slice(&text).map_err(|error| damaged(format!("is damaged ({error})")))?;
    if record.format != FORMAT {
        let problem = format!("has format {}, this version reads {FORMAT}", record.format);
        return Err(damaged(problem));
    }
    if record.grant == 0 {
        return Err(damaged("is damaged (it holds no grant)".into()));
    }
    Ok(Some(record))
}

/// Written beside and renamed, so that there is always one whole file.
fn replace(directory: &Path, path: &Path, text: &[u8]) -> io::Result<()> {
    let beside = directory.join("agent.json.new");
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(text)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    File::open(directory)?.sync_all()
}

fn disk(path: &Path, error: io::Error) -> AgentError {
    AgentError::Disk {
        path: path.into(),
        error,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const CLUSTER: ClusterId = ClusterId([7; 16]);

    fn granted(path: &Path) -> DataDir {
        let mut dir = DataDir::open(path, "w1").unwrap();
        let incarnation = Incarnation {
            worker: WorkerId(3),
            grant: 12,
            start: 1,
        };
        dir.granted(CLUSTER, incarnation).unwrap();
        dir
    }

    #[test]
    fn each_start_is_counted_on_disk() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("w1");
        assert_eq!(
            DataDir::open(&path, "w1").unwrap().count_start().unwrap(),
            None
        );
        drop(granted(&path));
        for start in [2, 3] {
            let mut dir = DataDir::open(&path, "w1").unwrap();
            let record = dir.count_start().unwrap().unwrap();
            assert_eq!(record.incarnation().to_string(), format!("w3.12.{start}"));
            assert_eq!(record.cluster_id, CLUSTER);
        }
        let mode = std::fs::metadata(path.join("agent.json"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_directory_has_one_process_and_one_worker() {
        let temp = tempfile::tempdir().unwrap();
        let dir = granted(temp.path());
        let second = DataDir::open(temp.path(), "w1").err().unwrap();
        assert!(
            matches!(second, AgentError::DirectoryTaken { .. }),
            "{second}"
        );
        drop(dir);
        let other = DataDir::open(temp.path(), "w2").err().unwrap();
        assert!(matches!(other, AgentError::OtherWorker { .. }), "{other}");
    }

    #[test]
    fn a_damaged_record_is_named_and_not_overwritten() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("agent.json");
        for text in ["", "{", "{\"format\":1}", "\u{0}"] {
            std::fs::write(&path, text).unwrap();
            let error = DataDir::open(temp.path(), "w1").err().unwrap();
            assert!(matches!(error, AgentError::Record { .. }), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }
}
