//! The flat table: open addressing, a cell a chunk. A cell's key is written once; a chunk that nobody
//! holds any more keeps its cell until the segment is built anew. So a reader that meets a key reads that
//! chunk's entry, at whatever moment.

use super::entry::Entry;
use super::sync::{Arc, AtomicU32, AtomicU64, Ordering, fence};

/// What a reader has before it for the time of a lookup.
pub(super) struct Directory {
    pub(super) segments: Box<[Segment]>,
    /// A slot's worker, or [`NOBODY`]. Slots beyond its end are younger than this directory.
    pub(super) workers: Arc<[AtomicU32]>,
}

/// No worker has this number.
pub(super) const NOBODY: u32 = u32::MAX;

/// A piece of the table, shared by all directories it is in.
#[derive(Clone)]
pub(super) struct Segment(Arc<[Cell]>);

#[repr(align(16))] // never across two cache lines
struct Cell {
    /// Zero: the cell is free.
    key: AtomicU64,
    entry: AtomicU64,
}

/// Where a chunk stands in a segment.
#[derive(Clone, Copy)]
pub(super) enum Place {
    At(usize),
    /// Nowhere; it could stand here.
    Free(usize),
}

/// A chunk's key: never zero. The two fingerprints that share one are told apart by nobody.
pub(super) const fn key(chunk: u64) -> u64 {
    match !chunk {
        0 => 1,
        key => key,
    }
}

/// A key's upper half says in which segment it is, its lower half where it is looked for first.
pub(super) const fn segment(key: u64, segments: usize) -> usize {
    (((key >> 32) * segments as u64) >> 32) as usize
}

impl Directory {
    /// What is said of several chunks. What has to be fetched for them is fetched at the same time.
    pub(super) fn entries<const N: usize>(&self, chunks: [u64; N]) -> [Entry; N] {
        let homes = chunks.map(|chunk| {
            let key = key(chunk);
            let segment = &self.segments[segment(key, self.segments.len())];
            (segment, key, segment.home(key))
        });
        let met = homes.map(|(segment, _, home)| segment.0[home].key.load(Ordering::Relaxed));
        let mut entries = [Entry::NONE; N];
        for (entry, ((segment, key, home), met)) in entries.iter_mut().zip(homes.iter().zip(met)) {
            if met == *key {
                fence(Ordering::Acquire);
                *entry = segment.entry(*home);
            } else if let Place::At(at) = segment.find(*key) {
                *entry = segment.entry(at);
            }
        }
        entries
    }

    /// What is said of a chunk.
    pub(super) fn entry(&self, chunk: u64) -> Entry {
        let [entry] = self.entries([chunk]);
        entry
    }
}

impl Segment {
    pub(super) fn with(cells: usize) -> Self {
        let cells = (0..cells).map(|_| Cell {
            key: AtomicU64::new(0),
            entry: AtomicU64::new(0),
        });
        Self(cells.collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    fn home(&self, key: u64) -> usize {
        (((key & u64::from(u32::MAX)) * self.0.len() as u64) >> 32) as usize
    }

    /// Looks for a key. Some cell is always free.
    pub(super) fn find(&self, key: u64) -> Place {
        let mut at = self.home(key);
        loop {
            match self.0[at].key.load(Ordering::Acquire) {
                0 => return Place::Free(at),
                met if met == key => return Place::At(at),
                _ => at = if at + 1 == self.0.len() { 0 } else { at + 1 },
            }
        }
    }

    /// What is said of the chunk in a cell.
    pub(super) fn entry(&self, at: usize) -> Entry {
        Entry::unpack(self.0[at].entry.load(Ordering::Acquire))
    }

    /// Says something else of the chunk in a cell: the writer's.
    pub(super) fn set(&self, at: usize, entry: Entry) {
        self.0[at].entry.store(entry.pack(), Ordering::Release);
    }

    /// Puts a chunk into a free cell: the writer's.
    pub(super) fn fill(&self, at: usize, key: u64, entry: Entry) {
        self.set(at, entry);
        self.0[at].key.store(key, Ordering::Release);
    }

    /// The same chunks in so many cells, without those that nobody holds.
    pub(super) fn rebuilt(&self, cells: usize) -> Self {
        let new = Self::with(cells);
        for (at, cell) in self.0.iter().enumerate() {
            let entry = self.entry(at);
            if entry.holders == Entry::NONE.holders {
                continue;
            }
            let key = cell.key.load(Ordering::Relaxed);
            if let Place::Free(at) = new.find(key) {
                new.fill(at, key, entry);
            }
        }
        new
    }
}
