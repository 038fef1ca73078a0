//! The audit beyond what the state keeps: files of this node, each a part of the chain, a record a line.
//!
//! They are this node's own and nobody waits for them: what a crash leaves unwritten is still among the newest
//! entries of the state, and written then. Whoever reads them checks the chain.

mod keep;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use crate::fleet::archive::Record;

pub(crate) use keep::Kept;

/// The longest line, in bytes: an entry's texts are cut far below.
const MAX_LINE_BYTES: u64 = 32 << 10;
const ENDING: &str = ".jsonl";

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// A file that is larger is followed by another.
    pub(crate) segment_bytes: u64,
    /// Above this the oldest file goes.
    pub(crate) all_bytes: u64,
}

/// The files of one node.
#[derive(Debug)]
pub(crate) struct Segments {
    dir: PathBuf,
    bounds: Bounds,
    /// By number.
    held: Vec<Segment>,
    /// The newest one, once something was added.
    out: Option<File>,
    /// Hash of the newest record.
    head: Option<String>,
    unsynced: bool,
}

/// One file: records without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    first: u64,
    last: u64,
    bytes: u64,
}

/// Why records cannot be kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SegmentError {
    /// The disk.
    #[error("{}: {error}", path.display())]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// What it says.
        error: io::Error,
    },
    /// The files are of another audit.
    #[error(
        "the files in {} end with record {number}, which entry {} of this cluster does not follow: move them away, and restart",
        dir.display(), number + 1
    )]
    Other {
        /// Where they are.
        dir: PathBuf,
        /// Their last record.
        number: u64,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> SegmentError + '_ {
    move |error| SegmentError::Io {
        path: path.into(),
        error,
    }
}

impl Segments {
    /// Finds what is there. A line that a crash cut off is removed.
    ///
    /// # Errors
    ///
    /// Returns what the disk says, or which file is none of ours.
    pub(crate) fn open(dir: &Path, bounds: Bounds) -> Result<Self, SegmentError> {
        fs::create_dir_all(dir).map_err(at(dir))?;
        let mut segments = Self {
            dir: dir.into(),
            bounds,
            held: Vec::new(),
            out: None,
            head: None,
            unsynced: false,
        };
        let mut firsts: Vec<u64> = Vec::new();
        for entry in fs::read_dir(dir).map_err(at(dir))? {
            let name = entry.map_err(at(dir))?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(ENDING));
            firsts.extend(number.and_then(|number| number.parse::<u64>().ok()));
        }
        firsts.sort_unstable();
        for first in firsts {
            let path = segments.path(first);
            let Some((last, bytes)) = mended(&path).map_err(at(&path))? else {
                fs::remove_file(&path).map_err(at(&path))?;
                continue;
            };
            segments.held.push(Segment {
                first,
                last: last.number,
                bytes,
            });
            segments.head = Some(last.hash);
        }
        Ok(segments)
    }

    fn path(&self, first: u64) -> PathBuf {
        self.dir.join(format!("{first:020}{ENDING}"))
    }

    /// The newest record's number; 0: there is none.
    pub(crate) fn last(&self) -> u64 {
        self.held.last().map_or(0, |segment| segment.last)
    }

    /// The first of those that lead up to the newest without a gap; one more than that where there is none.
    pub(crate) fn begins(&self) -> u64 {
        let mut begins = self.last() + 1;
        for segment in self.held.iter().rev() {
            if segment.last + 1 != begins {
                break;
            }
            begins = segment.first;
        }
        begins
    }

    /// Adds those of the records, in order and without a gap, that are newer than the newest.
    ///
    /// # Errors
    ///
    /// Returns why they are not kept; the files are to be opened again then.
    pub(crate) fn append(&mut self, records: &[Record]) -> Result<(), SegmentError> {
        let last = self.last();
        let known = records.partition_point(|record| record.number <= last);
        let new = &records[known..];
        let Some(first) = new.first() else {
            return Ok(());
        };
        let follows = first.number == last + 1;
        let other = |head: &String| *head != first.previous_hash;
        if follows && self.head.as_ref().is_some_and(other) {
            let dir = self.dir.clone();
            return Err(SegmentError::Other { dir, number: last });
        }
        let room = |segment: &Segment| segment.bytes < self.bounds.segment_bytes;
        if !(follows && self.held.last().is_some_and(room)) {
            self.sync()?;
            self.out = None;
            self.held.push(Segment {
                first: first.number,
                last: last.max(first.number - 1),
                bytes: 0,
            });
        }
        let lines: String = new.iter().map(|record| record.line() + "\n").collect();
        self.write(lines.as_bytes())?;
        if let (Some(segment), Some(newest)) = (self.held.last_mut(), new.last()) {
            segment.last = newest.number;
            segment.bytes += lines.len() as u64;
            self.head = Some(newest.hash.clone());
        }
        self.trim()
    }

    fn write(&mut self, lines: &[u8]) -> Result<(), SegmentError> {
        let first = self.held.last().map_or(1, |segment| segment.first);
        let path = self.path(first);
        let out = match &mut self.out {
            Some(out) => out,
            none => {
                let opened = OpenOptions::new().create(true).append(true).open(&path);
                none.insert(opened.map_err(at(&path))?)
            }
        };
        self.unsynced = true;
        out.write_all(lines).map_err(at(&path))
    }

    /// Has what was added outlive the machine.
    ///
    /// # Errors
    ///
    /// Returns what the disk says.
    pub(crate) fn sync(&mut self) -> Result<(), SegmentError> {
        if let Some(out) = self.out.as_ref().filter(|_| self.unsynced) {
            out.sync_data().map_err(at(&self.dir))?;
            let dir = File::open(&self.dir).map_err(at(&self.dir))?;
            dir.sync_all().map_err(at(&self.dir))?;
        }
        self.unsynced = false;
        Ok(())
    }

    fn trim(&mut self) -> Result<(), SegmentError> {
        let mut bytes: u64 = self.held.iter().map(|segment| segment.bytes).sum();
        while bytes > self.bounds.all_bytes && self.held.len() > 1 {
            let oldest = self.held.remove(0);
            let path = self.path(oldest.first);
            fs::remove_file(&path).map_err(at(&path))?;
            bytes -= oldest.bytes;
            let Segment { first, last, .. } = oldest;
            tracing::info!(
                first,
                last,
                "the oldest entries of the audit gave way to newer ones here"
            );
        }
        Ok(())
    }

    /// Records from this number on, at most so many and of one file; none where it is not there.
    ///
    /// # Errors
    ///
    /// Returns what the disk says, or which file was changed.
    pub(crate) fn read(&self, from: u64, most: usize) -> Result<Vec<Record>, SegmentError> {
        let holds = |segment: &&Segment| (segment.first..=segment.last).contains(&from);
        let Some(segment) = self.held.iter().find(holds) else {
            return Ok(Vec::new());
        };
        let path = self.path(segment.first);
        let mut lines = BufReader::new(File::open(&path).map_err(at(&path))?);
        let mut records = Vec::new();
        while records.len() < most
            && let Some(record) = next(&mut lines).map_err(at(&path))?
        {
            if record.number >= from {
                records.push(record);
            }
        }
        Ok(records)
    }
}

/// The next line of a file.
fn next(lines: &mut impl BufRead) -> io::Result<Option<Record>> {
    let mut line = Vec::new();
    let read = lines.take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
    if read == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

/// The last whole line of a file and the file's size, after what is behind that was cut off; none: there is no line.
fn mended(path: &Path) -> io::Result<Option<(Record, u64)>> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let size = file.metadata()?.len();
    let from = size.saturating_sub(2 * MAX_LINE_BYTES);
    file.seek(SeekFrom::Start(from))?;
    let mut end = Vec::new();
    file.read_to_end(&mut end)?;
    let Some(whole) = end.iter().rposition(|byte| *byte == b'\n') else {
        return Ok(None);
    };
    let bytes = from + whole as u64 + 1;
    if bytes < size {
        file.set_len(bytes)?;
        file.sync_all()?;
    }
    let begins = end[..whole].iter().rposition(|byte| *byte == b'\n');
    let line = &end[begins.map_or(0, |before| before + 1)..whole];
    Ok(Some((serde_json::from_slice(line)?, bytes)))
}

#[cfg(test)]
mod tests;
