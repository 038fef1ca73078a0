//! The log on disk: segments of records, one sync a batch.
//!
//! A segment is `magic 8 | sequence 8 | term 8 | vote 8 | commit 8 | crc32c 4`, so that the hard state
//! survives the removal of older segments, then records (see `record`). An entry whose index is not
//! after the last one replaces the log from there; a reset empties it at a snapshot.
//!
//! **What a crash may leave.** A write that was not synced can end anywhere, so the last segment is cut
//! at its first bad record. But each record carries how much of its segment was synced before it: when
//! a whole record further on says that the bad place had been synced, that is damage, not a torn
//! write, and is refused, as is anything bad in an earlier segment. So is a log that ends before its
//! mark (see `mark`), cut cleanly or not: what that leaves to chance is the last write before a loss of
//! power, as long as the mark of it had not reached the disk.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::{Disk, DiskFile};
use super::error::StoreError;
use super::files;
use super::mark::{self, Mark, Synced};
use super::record::{self, Record};
use crate::bug::{Bug, on};
use crate::node::{Entry, HardState, Restored, Snapshot, Write};
use crate::probe::{Probe, hit};

const MAGIC: &[u8; 7] = b"FBWAL\x00\x00";
const FORMAT: u8 = 1;
const HEADER_BYTES: usize = 44;

/// The open log. Only the last segment is written.
#[derive(Debug)]
pub(crate) struct Wal {
    folder: PathBuf,
    segment_bytes: u64,
    disk: Arc<dyn Disk>,
    /// Oldest first; the last one is `file`.
    segments: VecDeque<Segment>,
    file: Box<dyn DiskFile>,
    written: u64,
    synced: u64,
    mark: Mark,
    hard_state: HardState,
}

#[derive(Debug)]
struct Segment {
    path: PathBuf,
    sequence: u64,
    /// Where it ends, once another one follows.
    bytes: u64,
    /// The highest index of an entry in it; zero without any.
    max_index: u64,
}

/// What the segments held.
#[derive(Debug, Default)]
pub(crate) struct Replayed {
    hard_state: HardState,
    entries: Vec<Entry>,
    /// The log was emptied at this index; the first entry follows it.
    base: Option<u64>,
    /// The last segment, and where it ends.
    end: (PathBuf, u64),
}

pub(crate) fn has_segments(disk: &dyn Disk, dir: &Path) -> Result<bool, StoreError> {
    files::list(disk, &dir.join("wal"), "log").map(|found| !found.is_empty())
}

impl Wal {
    /// Makes an empty log.
    pub(crate) fn create(
        dir: &Path,
        segment_bytes: u64,
        disk: Arc<dyn Disk>,
    ) -> Result<Self, StoreError> {
        let folder = dir.join("wal");
        files::create_dir(&*disk, &folder)?;
        let hard_state = HardState::default();
        let (segment, file) = create_segment(&*disk, &folder, 1, hard_state)?;
        Ok(Self::at_end(
            folder,
            segment_bytes,
            disk,
            [segment].into(),
            file,
            HEADER_BYTES as u64,
            hard_state,
        ))
    }

    /// Reads all segments and opens the last one for writing.
    pub(crate) fn open(
        dir: &Path,
        segment_bytes: u64,
        disk: Arc<dyn Disk>,
    ) -> Result<(Self, Replayed), StoreError> {
        let folder = dir.join("wal");
        let paths = files::list(&*disk, &folder, "log")?;
        let Some((last, _)) = paths.split_last() else {
            return Err(StoreError::LogMissing {
                dir: dir.to_owned(),
            });
        };
        let synced = mark::read(&*disk, &folder)?;
        let mut replayed = Replayed::default();
        let mut segments: VecDeque<Segment> = VecDeque::new();
        let (mut end, mut bytes) = (0, Vec::new());
        for path in &paths {
            bytes = files::read(&*disk, path)?.unwrap_or_default();
            let mut segment = read_header(path, &bytes, &mut replayed)?;
            if let Some(before) = segments.back()
                && before.sequence + 1 != segment.sequence
            {
                let detail = format!("the segment after number {} is missing", before.sequence);
                return Err(StoreError::Corrupt {
                    path: path.clone(),
                    offset: 8,
                    detail,
                });
            }
            let synced = synced.get(&segment.sequence).copied().unwrap_or(0);
            let is_last = path == last;
            end = replay_records(path, &bytes, is_last, synced, &mut replayed, &mut segment)?;
            segment.bytes = end;
            segments.push_back(segment);
        }
        let newest = segments.back().map_or(0, |segment| segment.sequence);
        if let Some((lost, _)) = synced.range(newest + 1..).next() {
            return Err(StoreError::Corrupt {
                path: segment_path(&folder, *lost),
                offset: 0,
                detail: "the segment is missing".into(),
            });
        }
        replayed.end = (last.clone(), end);
        let mut file = disk.append(last).map_err(StoreError::io("open", last))?;
        // After a sync that failed the kernel shows bytes that the disk never got, and takes them for
        // written: only writing them again makes a sync take them there.
        bytes.truncate(usize::try_from(end).unwrap_or(usize::MAX));
        file.cut(end)
            .and_then(|()| file.rewrite(&bytes))
            .and_then(|()| file.sync())
            .map_err(StoreError::io("cut", last))?;
        let wal = Self::at_end(
            folder,
            segment_bytes,
            disk,
            segments,
            file,
            end,
            replayed.hard_state,
        );
        Ok((wal, replayed))
    }

    fn at_end(
        folder: PathBuf,
        segment_bytes: u64,
        disk: Arc<dyn Disk>,
        segments: VecDeque<Segment>,
        file: Box<dyn DiskFile>,
        end: u64,
        hard_state: HardState,
    ) -> Self {
        let mark = Mark::open(&*disk, &folder, &synced_of(&segments, end));
        Self {
            folder,
            segment_bytes,
            disk,
            segments,
            file,
            written: end,
            synced: end,
            mark,
            hard_state,
        }
    }

    /// Appends a batch, and syncs it when it must be. When the disk was full, nothing was appended.
    pub(crate) fn write(&mut self, write: &Write) -> Result<(), StoreError> {
        if self.written >= self.segment_bytes {
            self.roll()?;
        }
        let mut batch = Vec::new();
        if let Some(snapshot) = &write.snapshot {
            record::reset(&mut batch, self.synced, snapshot.index, snapshot.term);
        }
        for entry in &write.entries {
            record::entry(&mut batch, self.synced, entry)?;
        }
        if let Some(mut state) = write.hard_state {
            if on(Bug::VoteNotPersisted) {
                state.vote = 0;
            }
            if !on(Bug::HardStateWithEntriesOnly) || !write.entries.is_empty() {
                record::hard_state(&mut batch, self.synced, state);
            }
        }
        let segment = self
            .segments
            .back_mut()
            .expect("there is always a segment that is written");
        if let Err(error) = self.file.write(&batch) {
            let failed = StoreError::io("write", &segment.path)(error);
            if failed.is_full() {
                // The part that found room goes again, so that the batch can be tried once more.
                self.file
                    .cut(self.written)
                    .map_err(StoreError::io("cut", &segment.path))?;
            }
            return Err(failed);
        }
        self.written += batch.len() as u64;
        if let Some(last) = write.entries.last() {
            segment.max_index = segment.max_index.max(last.index);
        }
        self.hard_state = write.hard_state.unwrap_or(self.hard_state);
        if write.must_sync && !on(Bug::AckBeforeSync) {
            self.sync()?;
        }
        Ok(())
    }

    /// Empties the log at a snapshot that the disk already holds.
    pub(crate) fn reset(&mut self, snapshot: &Snapshot) -> Result<(), StoreError> {
        let snapshot = Snapshot {
            data: bytes::Bytes::new(),
            ..snapshot.clone()
        };
        self.write(&Write {
            snapshot: Some(snapshot),
            must_sync: true,
            ..Write::default()
        })
    }

    /// Removes old segments that hold nothing after `index`.
    pub(crate) fn forget(&mut self, index: u64) -> Result<(), StoreError> {
        let mut removed = false;
        while self.segments.len() > 1
            && self
                .segments
                .front()
                .is_some_and(|first| first.max_index <= index)
        {
            if let Some(segment) = self.segments.pop_front() {
                files::remove(&*self.disk, &segment.path)?;
                removed = true;
            }
        }
        if removed {
            files::sync_dir(&*self.disk, &self.folder)
        } else {
            Ok(())
        }
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        let path = self
            .segments
            .back()
            .map_or(self.folder.as_path(), |segment| &segment.path);
        match self.file.sync() {
            Err(_) if on(Bug::FailedSyncPassedOver) => {}
            synced => synced.map_err(StoreError::io("sync", path))?,
        }
        self.synced = self.written;
        self.mark.note(&synced_of(&self.segments, self.synced));
        Ok(())
    }

    fn roll(&mut self) -> Result<(), StoreError> {
        hit(Probe::SegmentRolled);
        self.sync()?;
        let sequence = self
            .segments
            .back()
            .map_or(1, |segment| segment.sequence + 1);
        let (segment, file) = create_segment(&*self.disk, &self.folder, sequence, self.hard_state)?;
        if let Some(closed) = self.segments.back_mut() {
            closed.bytes = self.written;
        }
        self.segments.push_back(segment);
        self.file = file;
        self.written = HEADER_BYTES as u64;
        self.synced = self.written;
        self.mark.note(&synced_of(&self.segments, self.synced));
        Ok(())
    }
}

/// What the mark says: where each segment ends, and how far the last one was synced.
fn synced_of(segments: &VecDeque<Segment>, last: u64) -> Synced {
    let mut synced: Synced = segments
        .iter()
        .map(|segment| (segment.sequence, segment.bytes))
        .collect();
    if let Some(mut entry) = synced.last_entry() {
        entry.insert(last);
    }
    synced
}

impl Replayed {
    /// Joins the log to the newest snapshot that can be read. Returns whether the log on disk must be
    /// reset: a snapshot from the leader was written, and a crash came before the log was emptied at it.
    ///
    /// # Errors
    ///
    /// Refuses a log that begins after the snapshot, or ends before what it says is committed.
    pub(crate) fn onto(self, snapshot: Snapshot) -> Result<(Restored, bool), Apart> {
        let Self {
            hard_state,
            mut entries,
            base,
            end,
        } = self;
        let at = snapshot.index;
        let begins_after = match entries.first() {
            Some(first) => first.index.saturating_sub(1),
            None => base.unwrap_or(at),
        };
        if begins_after > at {
            return Err(Apart::SnapshotMissing {
                index: begins_after,
            });
        }
        let stale = match (entries.first(), entries.last()) {
            (Some(first), Some(last)) if first.index <= at => {
                last.index < at || entries[(at - first.index) as usize].term != snapshot.term
            }
            (Some(_), _) => false,
            (None, _) => base.is_some_and(|base| base != at),
        };
        if stale {
            entries.clear();
        }
        let last = entries.last().map_or(at, |last| last.index.max(at));
        if hard_state.commit > last {
            let (path, offset) = end;
            let commit = hard_state.commit;
            return Err(Apart::EntriesMissing(StoreError::Corrupt {
                path,
                offset,
                detail: format!(
                    "index {commit} is committed, and the newest snapshot and the log end at {last}"
                ),
            }));
        }
        Ok((
            Restored {
                hard_state,
                snapshot,
                entries,
            },
            stale,
        ))
    }
}

/// Why a log does not belong to a snapshot.
pub(crate) enum Apart {
    /// The log goes on from a newer snapshot, at this index.
    SnapshotMissing {
        /// Its index.
        index: u64,
    },
    /// Less is there than was committed.
    EntriesMissing(StoreError),
}

fn segment_path(folder: &Path, sequence: u64) -> PathBuf {
    folder.join(format!("{sequence:016x}.log"))
}

fn create_segment(
    disk: &dyn Disk,
    folder: &Path,
    sequence: u64,
    hard_state: HardState,
) -> Result<(Segment, Box<dyn DiskFile>), StoreError> {
    let path = segment_path(folder, sequence);
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend_from_slice(MAGIC);
    header.push(FORMAT);
    for number in [
        sequence,
        hard_state.term,
        hard_state.vote,
        hard_state.commit,
    ] {
        header.extend_from_slice(&number.to_le_bytes());
    }
    header.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
    let file = files::write_whole(disk, &path, &[&header])?;
    Ok((
        Segment {
            path,
            sequence,
            bytes: 0,
            max_index: 0,
        },
        file,
    ))
}

fn read_header(path: &Path, bytes: &[u8], replayed: &mut Replayed) -> Result<Segment, StoreError> {
    let corrupt = |offset, detail: &str| StoreError::Corrupt {
        path: path.to_owned(),
        offset,
        detail: detail.to_owned(),
    };
    let header = bytes
        .get(..HEADER_BYTES)
        .ok_or_else(|| corrupt(0, "its header is cut"))?;
    if &header[..7] != MAGIC {
        return Err(corrupt(0, "it does not begin like a segment"));
    }
    if header[7] != FORMAT {
        let (found, known) = (u32::from(header[7]), u32::from(FORMAT));
        return Err(StoreError::Format {
            path: path.to_owned(),
            found,
            known,
        });
    }
    let number = |at: usize| record::number(header, at);
    if crc32c::crc32c(&header[..40]).to_le_bytes() != header[40..] {
        return Err(corrupt(0, "the checksum of its header is wrong"));
    }
    let sequence = number(8);
    replayed.hard_state = HardState {
        term: number(16),
        vote: number(24),
        commit: number(32),
    };
    Ok(Segment {
        path: path.to_owned(),
        sequence,
        bytes: 0,
        max_index: 0,
    })
}

/// Takes over one segment's records; returns where the good part ends, at `synced` or after it.
fn replay_records(
    path: &Path,
    bytes: &[u8],
    is_last: bool,
    synced: u64,
    replayed: &mut Replayed,
    segment: &mut Segment,
) -> Result<u64, StoreError> {
    let corrupt = |at: usize, detail: String| {
        hit(Probe::Damage);
        Err(StoreError::Corrupt {
            path: path.to_owned(),
            offset: at as u64,
            detail,
        })
    };
    let (mut at, mut said) = (HEADER_BYTES, 0);
    while at < bytes.len() {
        let (record, next) = match record::read(bytes, at, &mut said) {
            Ok(read) => read,
            Err(bad) if !is_last => return corrupt(at, bad.to_string()),
            Err(bad) if (at as u64) < synced => {
                return corrupt(at, format!("{bad}, and it was synced up to {synced}"));
            }
            Err(bad) if record::proves_synced(bytes, at) => {
                return corrupt(
                    at,
                    format!("{bad}, and what follows was written after it was synced"),
                );
            }
            Err(bad) => {
                let cut = bytes.len() - at;
                hit(Probe::TornTail);
                tracing::info!(path = %path.display(), at, cut, %bad, "an unfinished write is cut off");
                break;
            }
        };
        if let Err(detail) = replayed.take(record, segment) {
            return corrupt(at, detail);
        }
        at = next;
    }
    if (at as u64) < synced {
        return corrupt(at, format!("it ends here, and was synced up to {synced}"));
    }
    Ok(at as u64)
}

impl Replayed {
    fn take(&mut self, record: Record, segment: &mut Segment) -> Result<(), String> {
        match record {
            Record::HardState(state) => self.hard_state = state,
            Record::Reset { index } => {
                self.entries.clear();
                self.base = Some(index);
            }
            Record::Entry(entry) => {
                let first = self.entries.first().map(|first| first.index);
                let last = self.entries.last().map(|last| last.index).or(self.base);
                if let Some(last) = last.filter(|last| entry.index > last + 1) {
                    return Err(format!("entry {} follows entry {last}", entry.index));
                }
                if let Some(base) = self.base.filter(|base| entry.index <= *base) {
                    return Err(format!(
                        "entry {} lies before the snapshot at {base}",
                        entry.index
                    ));
                }
                if on(Bug::ReplacedEntriesComeBack) && last.is_some_and(|last| entry.index <= last)
                {
                    return Ok(());
                }
                // Before the first one held: what it replaces was in a segment that a later snapshot
                // covered, so nothing that is held stays.
                let keep = first.map_or(0, |first| entry.index.saturating_sub(first));
                self.entries
                    .truncate(usize::try_from(keep).unwrap_or(usize::MAX));
                segment.max_index = segment.max_index.max(entry.index);
                self.entries.push(entry);
            }
        }
        Ok(())
    }
}
