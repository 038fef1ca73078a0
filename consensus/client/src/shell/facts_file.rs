//! The last facts on disk, so that a process starts again while the control plane is gone.
//!
//! `magic (8) | version u16 | CRC-32C u32 | encoded Facts`, numbers big-endian; mode 0600, because
//! facts will hold sealed keys. Written beside and renamed, so there is always one whole file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use forebay_proto::wire::fleet as wire;
use prost::Message;

use crate::core::facts::{Facts, FactsError};

const MAGIC: &[u8; 8] = b"FBYFACTS";
const VERSION: u16 = 1;

/// Larger files are not ours: facts come in frames of at most this.
const MAX_BYTES: u64 = 64 << 20;

/// Where a process keeps its facts.
#[derive(Clone, Debug)]
pub struct FactsFile {
    directory: PathBuf,
    path: PathBuf,
}

/// Why facts on disk cannot be used or written. A process goes on without them.
#[derive(Debug, thiserror::Error)]
pub enum FactsFileError {
    /// The system does not let us.
    #[error("{}: {error}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The file is damaged or not ours.
    #[error("{}: {problem}; it is ignored and will be written anew", .path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

impl FactsFile {
    /// The file in this directory, which must exist.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.into(),
            path: directory.join("facts.bin"),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the facts; `None` when there is no file.
    ///
    /// # Errors
    ///
    /// Returns why the file cannot be used.
    pub fn load(&self) -> Result<Option<Facts>, FactsFileError> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io(error)),
        };
        let mut bytes = vec![];
        file.take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| self.io(error))?;
        decode(&bytes)
            .map(Some)
            .map_err(|problem| FactsFileError::Damaged {
                path: self.path.clone(),
                problem,
            })
    }

    /// Writes the facts in place of those before; on disk when it returns.
    ///
    /// # Errors
    ///
    /// Returns what the system says; the file before is then still whole.
    pub fn save(&self, facts: &Facts) -> Result<(), FactsFileError> {
        let body = facts.to_wire().encode_to_vec();
        let mut bytes = Vec::with_capacity(MAGIC.len() + 6 + body.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_be_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(&body).to_be_bytes());
        bytes.extend_from_slice(&body);
        self.replace(&bytes).map_err(|error| self.io(error))
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let beside = self.directory.join("facts.bin.new");
        // Made anew: a file that is there already could have another mode.
        match std::fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, &self.path)?;
        File::open(&self.directory)?.sync_all()
    }

    fn io(&self, error: io::Error) -> FactsFileError {
        FactsFileError::Io {
            path: self.path.clone(),
            error,
        }
    }
}

fn decode(bytes: &[u8]) -> Result<Facts, String> {
    let rest = bytes.strip_prefix(MAGIC).ok_or("is not a file of facts")?;
    let (version, rest) = rest.split_first_chunk().ok_or("is cut off")?;
    let version = u16::from_be_bytes(*version);
    if version != VERSION {
        return Err(format!(
            "has format {version}, this version reads {VERSION}"
        ));
    }
    let (checksum, body) = rest.split_first_chunk().ok_or("is cut off")?;
    if crc32c::crc32c(body) != u32::from_be_bytes(*checksum) {
        return Err("is damaged: its checksum does not hold".into());
    }
    let wire = wire::Facts::decode(body).map_err(|_| "does not decode")?;
    Facts::from_wire(wire).map_err(|error: FactsError| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use forebay_proto::ClusterId;
    use forebay_proto::config::Config;

    use super::*;

    fn facts(revision: u64) -> Facts {
        Facts::from_wire(wire::Facts {
            cluster_id: ClusterId([1; 16]).to_wire(),
            revision,
            config: Config::default().to_wire(),
            ..Default::default()
        })
        .unwrap()
    }

    #[test]
    fn facts_read_back_as_they_were_written_and_only_their_owner_may_read_them() {
        let directory = tempfile::tempdir().unwrap();
        let file = FactsFile::new(directory.path());
        assert_eq!(file.load().unwrap(), None);
        for revision in [5, 6] {
            file.save(&facts(revision)).unwrap();
            assert_eq!(file.load().unwrap(), Some(facts(revision)));
        }
        let mode = std::fs::metadata(file.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_file_is_reported_and_can_be_written_anew() {
        let directory = tempfile::tempdir().unwrap();
        let file = FactsFile::new(directory.path());
        file.save(&facts(5)).unwrap();
        let good = std::fs::read(file.path()).unwrap();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x40;
            std::fs::write(file.path(), &bytes).unwrap();
            assert!(
                matches!(file.load(), Err(FactsFileError::Damaged { .. })),
                "byte {at}"
            );
            std::fs::write(file.path(), &good[..at]).unwrap();
            assert!(file.load().is_err(), "cut at {at}");
        }
        file.save(&facts(6)).unwrap();
        assert_eq!(file.load().unwrap(), Some(facts(6)));
    }
}
