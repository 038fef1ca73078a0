//! An agent's side of the residency stream: one ring of deltas, a cursor for each balancer.

use std::collections::VecDeque;
use std::sync::Arc;

use forebay_proto::Incarnation;
use forebay_proto::wire::work as wire;

use super::{Change, Grade, MAX_CHUNKS, STORED_BYTES, mixed, put_stored};
use crate::index::Fingerprints;

/// Deltas that are kept; who is further behind gets a snapshot.
pub const MAX_DELTAS: usize = 1_024;
/// And their bytes.
pub const MAX_DELTA_BYTES: usize = 4 << 20;
/// Chunks in one delta, so that it fits a frame.
const MAX_DELTA_CHUNKS: usize = 8_192;
/// Chunks that may have changed before a delta is made of them, asked for or not.
pub(super) const MAX_TOUCHED: usize = 1 << 16;
/// Chunks in one piece of a snapshot.
const PIECE_CHUNKS: usize = 16_384;

/// How far a balancer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Which life of the cache it follows.
    pub cache: u64,
    /// The newest delta, or snapshot, that it has.
    pub seq: u64,
}

/// What a balancer needs to be up to date.
pub enum Next {
    /// Nothing.
    Nothing,
    /// These, in order.
    Deltas(Vec<Arc<wire::ResidencyDelta>>),
    /// Everything, in pieces.
    Snapshot(Vec<wire::ResidencySnapshot>),
}

/// What is resident, and how it came to be so.
pub struct Publisher {
    incarnation: Incarnation,
    cache: u64,
    grade: Grade,
    seq: u64,
    resident: Fingerprints<u32>,
    checksum: u64,
    ring: VecDeque<Arc<wire::ResidencyDelta>>,
    ring_bytes: usize,
    /// Changed since the last delta: what it was then. At [`MAX_TOUCHED`] a delta is made unasked.
    touched: Fingerprints<Option<u32>>,
    grade_told: Grade,
    /// Deltas were made that nobody asked for.
    untold: bool,
}

impl Publisher {
    /// Publishes an empty cache. `cache` is drawn anew for each life of the engine's cache.
    #[must_use]
    pub fn new(incarnation: Incarnation, cache: u64, grade: Grade) -> Self {
        Self {
            incarnation,
            cache,
            grade,
            seq: 0,
            resident: Fingerprints::default(),
            checksum: 0,
            ring: VecDeque::new(),
            ring_bytes: 0,
            touched: Fingerprints::default(),
            grade_told: grade,
            untold: false,
        }
    }

    /// Notes changes; they are told by the next [`Publisher::flush`].
    pub fn note(&mut self, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            let (chunk, before) = match change {
                Change::Stored { chunk, tokens } => {
                    if self.resident.len() >= MAX_CHUNKS && !self.resident.contains_key(&chunk) {
                        continue;
                    }
                    (chunk, self.resident.insert(chunk, tokens))
                }
                Change::Removed { chunk } => (chunk, self.resident.remove(&chunk)),
            };
            self.touched.entry(chunk).or_insert(before);
            if self.touched.len() >= MAX_TOUCHED {
                // Nobody has asked for long: nobody follows, or all that do are slow.
                self.untold |= self.make_delta();
            }
        }
    }

    /// Notes that these are resident, with the tokens up to their ends, and no others.
    pub fn replace(&mut self, resident: impl IntoIterator<Item = (u64, u32)>) {
        let fresh: Fingerprints<u32> = resident.into_iter().collect();
        let gone = self
            .resident
            .keys()
            .filter(|chunk| !fresh.contains_key(chunk));
        let gone: Vec<_> = gone
            .map(|chunk| Change::Removed { chunk: *chunk })
            .collect();
        self.note(gone);
        let stored = fresh.into_iter();
        self.note(stored.map(|(chunk, tokens)| Change::Stored { chunk, tokens }));
    }

    /// The grade from here on.
    pub fn set_grade(&mut self, grade: Grade) {
        self.grade = grade;
    }

    /// Whether the next [`Publisher::flush`] may have something to tell.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        !self.touched.is_empty() || self.grade != self.grade_told || self.untold
    }

    /// Whether somebody with this cursor needs a snapshot.
    #[must_use]
    pub fn needs_snapshot(&self, cursor: Option<Cursor>) -> bool {
        let Some(cursor) = cursor.filter(|cursor| cursor.cache == self.cache) else {
            return true;
        };
        let oldest = self.ring.front().map_or(self.seq + 1, |delta| delta.seq);
        cursor.seq > self.seq || cursor.seq + 1 < oldest
    }

    /// How many chunks are resident.
    #[must_use]
    pub fn len(&self) -> usize {
        self.resident.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.resident.is_empty()
    }

    /// Deltas that are kept, and their bytes.
    #[must_use]
    pub fn ring(&self) -> (usize, usize) {
        (self.ring.len(), self.ring_bytes)
    }

    #[cfg(test)]
    pub(super) fn touched(&self) -> usize {
        self.touched.len()
    }

    /// Makes deltas of what was noted. Returns whether there is something new.
    pub fn flush(&mut self) -> bool {
        let made = self.make_delta();
        std::mem::take(&mut self.untold) || made
    }

    fn make_delta(&mut self) -> bool {
        let mut stored = Vec::new();
        let mut removed = Vec::new();
        for (chunk, before) in std::mem::take(&mut self.touched) {
            match (before, self.resident.get(&chunk)) {
                (before, Some(tokens)) if before != Some(*tokens) => stored.push((chunk, *tokens)),
                (Some(_), None) => removed.push(chunk),
                // Came and went, or is as it was.
                _ => {}
            }
            let was = before.map_or(0, |tokens| mixed(chunk, tokens));
            let is = self
                .resident
                .get(&chunk)
                .map_or(0, |tokens| mixed(chunk, *tokens));
            self.checksum = self.checksum.wrapping_sub(was).wrapping_add(is);
        }
        let nothing = stored.is_empty() && removed.is_empty();
        if nothing && self.grade == self.grade_told {
            return false;
        }
        self.grade_told = self.grade;
        if stored.len() + removed.len() > MAX_DELTA_CHUNKS {
            // More than a frame holds: everybody takes a snapshot.
            self.seq += 1;
            self.ring.clear();
            self.ring_bytes = 0;
            return true;
        }
        self.seq += 1;
        let mut stored_bytes = Vec::with_capacity(stored.len() * STORED_BYTES);
        for (chunk, tokens) in stored {
            put_stored(&mut stored_bytes, chunk, tokens);
        }
        let delta = wire::ResidencyDelta {
            seq: self.seq,
            grade: self.grade.to_wire(),
            stored: stored_bytes.into(),
            removed: removed
                .iter()
                .flat_map(|chunk| chunk.to_le_bytes())
                .collect::<Vec<_>>()
                .into(),
            checksum: self.checksum,
            cache: self.cache,
        };
        self.ring_bytes += bytes_of(&delta);
        self.ring.push_back(Arc::new(delta));
        while (self.ring.len() > MAX_DELTAS || self.ring_bytes > MAX_DELTA_BYTES)
            && let Some(oldest) = self.ring.pop_front()
        {
            self.ring_bytes -= bytes_of(&oldest);
        }
        true
    }

    /// Where a follower is who has all that was flushed.
    #[must_use]
    pub const fn newest(&self) -> Cursor {
        Cursor {
            cache: self.cache,
            seq: self.seq,
        }
    }

    /// What somebody with this cursor needs; `None`: has nothing.
    #[must_use]
    pub fn since(&self, cursor: Option<Cursor>) -> Next {
        let Some(cursor) = cursor.filter(|_| !self.needs_snapshot(cursor)) else {
            return Next::Snapshot(self.snapshot());
        };
        if cursor.seq == self.seq {
            return Next::Nothing;
        }
        let first = self.ring.partition_point(|delta| delta.seq <= cursor.seq);
        Next::Deltas(self.ring.range(first..).cloned().collect())
    }

    fn snapshot(&self) -> Vec<wire::ResidencySnapshot> {
        // As of the last flush: what was touched since comes with the next delta.
        let held = self.resident.iter().filter_map(|(chunk, tokens)| {
            let then = self.touched.get(chunk).copied().unwrap_or(Some(*tokens));
            then.map(|tokens| (*chunk, tokens))
        });
        let gone = self.touched.iter().filter_map(|(chunk, before)| {
            let gone = !self.resident.contains_key(chunk);
            before.filter(|_| gone).map(|tokens| (*chunk, tokens))
        });
        let mut pieces = vec![Vec::new()];
        for (at, (chunk, tokens)) in held.chain(gone).enumerate() {
            if at > 0 && at % PIECE_CHUNKS == 0 {
                pieces.push(Vec::new());
            }
            if let Some(piece) = pieces.last_mut() {
                put_stored(piece, chunk, tokens);
            }
        }
        let last = pieces.len() - 1;
        let piece = |(at, stored): (usize, Vec<u8>)| wire::ResidencySnapshot {
            incarnation: Some(self.incarnation.to_wire()),
            cache: self.cache,
            seq: self.seq,
            grade: self.grade_told.to_wire(),
            stored: stored.into(),
            first: at == 0,
            last: at == last,
            checksum: if at == last { self.checksum } else { 0 },
        };
        pieces.into_iter().enumerate().map(piece).collect()
    }
}

fn bytes_of(delta: &wire::ResidencyDelta) -> usize {
    delta.stored.len() + delta.removed.len() + 64
}
