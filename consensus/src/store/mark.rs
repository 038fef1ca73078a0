//! How far the log was synced, in a file of its own: `wal/synced.mark`.
//!
//! A log that ends early looks like one whose last write was torn by a crash. This mark tells the two
//! apart: it is written after each sync, in place and without a sync of its own, so what the disk has of
//! it may be old but never claims too much. A log that ends before it has lost what was acknowledged.
//! A mark that is missing (an older version wrote the log) or cannot be read proves nothing.
//!
//! `magic 8 | segments 4 | (sequence 8 | bytes 8)… | crc32c 4`; what follows is left from a longer one.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::disk::{Disk, DiskFile};
use super::error::StoreError;
use super::files;

const MAGIC: &[u8; 8] = b"FBMARK\x00\x01";
const NAME: &str = "synced.mark";

/// Bytes that were synced, by the sequence number of the segment.
pub(crate) type Synced = BTreeMap<u64, u64>;

/// The open mark. A failure to write it costs the check, never the log: a node starts and writes on a
/// disk that is full.
#[derive(Debug)]
pub(crate) struct Mark {
    path: PathBuf,
    file: Option<Box<dyn DiskFile>>,
}

/// What the mark in a log's folder says; nothing if there is none that can be read.
pub(crate) fn read(disk: &dyn Disk, folder: &Path) -> Result<Synced, StoreError> {
    let path = folder.join(NAME);
    let Some(bytes) = files::read(disk, &path)? else {
        return Ok(Synced::new());
    };
    let synced = decode(&bytes);
    if synced.is_none() {
        tracing::warn!(path = %path.display(), "the mark cannot be read: a log cut short would not be noticed");
    }
    Ok(synced.unwrap_or_default())
}

impl Mark {
    /// Opens the mark, or makes one.
    pub(crate) fn open(disk: &dyn Disk, folder: &Path, synced: &Synced) -> Self {
        let path = folder.join(NAME);
        let opened = match disk.append(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                files::write_whole(disk, &path, &[&encode(synced)])
                    .map_err(|error| error.to_string())
            }
            opened => opened.map_err(|error| error.to_string()),
        };
        let file = opened.inspect_err(|error| lost(&path, error)).ok();
        let mut mark = Self { path, file };
        mark.note(synced);
        mark
    }

    /// Takes what was synced.
    pub(crate) fn note(&mut self, synced: &Synced) {
        if let Some(file) = &mut self.file
            && let Err(error) = file.replace(&encode(synced))
        {
            lost(&self.path, &error.to_string());
            self.file = None;
        }
    }
}

impl Drop for Mark {
    /// At rest the mark is exact.
    fn drop(&mut self) {
        if let Some(file) = &mut self.file {
            let _ = file.sync();
        }
    }
}

fn lost(path: &Path, error: &str) {
    tracing::warn!(path = %path.display(), error, "the mark is not written any more until the next start");
}

fn encode(synced: &Synced) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    // As many as there are files in a folder.
    bytes.extend_from_slice(&(synced.len() as u32).to_le_bytes());
    for (sequence, end) in synced {
        bytes.extend_from_slice(&sequence.to_le_bytes());
        bytes.extend_from_slice(&end.to_le_bytes());
    }
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<Synced> {
    let rest = bytes.strip_prefix(MAGIC)?;
    let (count, rest) = rest.split_first_chunk()?;
    let pairs_bytes = usize::try_from(u32::from_le_bytes(*count))
        .ok()?
        .checked_mul(16)?;
    let pairs = rest.get(..pairs_bytes)?;
    let (crc, _) = rest[pairs_bytes..].split_first_chunk()?;
    let covered = &bytes[..MAGIC.len() + 4 + pairs_bytes];
    if crc32c::crc32c(covered) != u32::from_le_bytes(*crc) {
        return None;
    }
    let number = |bytes: &[u8]| bytes.try_into().ok().map(u64::from_le_bytes);
    pairs
        .chunks_exact(16)
        .map(|pair| Some((number(&pair[..8])?, number(&pair[8..])?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_comes_back_whole_or_not_at_all() {
        let synced = Synced::from([(3, 16 << 20), (4, 44)]);
        let whole = encode(&synced);
        assert_eq!(decode(&whole), Some(synced.clone()));
        let longer = [&whole[..], &[7; 16]].concat();
        assert_eq!(decode(&longer), Some(synced));
        for at in 0..whole.len() {
            assert_eq!(decode(&whole[..at]), None);
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            assert_eq!(decode(&damaged), None, "byte {at}");
        }
        assert_eq!(decode(&[MAGIC, &[0xff; 40][..]].concat()), None);
    }
}
