//! The flat table: open addressing, a cell a chunk, a cache line four cells. A cell's key is written once;
//! a chunk that nobody holds any more keeps its cell until the segment is built anew. So a reader that
//! meets a key reads that chunk's entry, at whatever moment: at first, that nobody holds it. Only entries
//! are ordered, for the sets that they name.

use std::array;
use std::hint::black_box;
use std::sync::Arc;

use super::entry::Entry;
use super::sync::{AtomicU32, AtomicU64, Ordering};

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
pub(super) struct Segment(Arc<[Line]>);

/// Cells, filled from the first.
#[repr(align(64))]
struct Line {
    /// Zero: the cell is free.
    keys: [AtomicU64; CELLS],
    entries: [AtomicU64; CELLS],
}

/// Cells a line.
const CELLS: usize = 4;

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
    /// What is said of a chunk.
    #[inline]
    pub(super) fn entry(&self, chunk: u64) -> Entry {
        let key = key(chunk);
        let segment = self.segment(key);
        let home = segment.home(key);
        let entry = segment.0[home].entry(key);
        entry.unwrap_or_else(|| segment.elsewhere(key, home))
    }

    /// Has fetched what is said of a chunk, for when it is asked. Nothing waits for it but what comes after
    /// all that is fetched.
    #[inline]
    pub(super) fn fetch(&self, chunk: u64) {
        let key = key(chunk);
        let segment = self.segment(key);
        black_box(segment.0[segment.home(key)].keys[0].load(Ordering::Relaxed));
    }

    fn segment(&self, key: u64) -> &Segment {
        &self.segments[segment(key, self.segments.len())]
    }
}

impl Line {
    /// What is said of a chunk in this line; none: it may be in the next.
    #[inline]
    fn entry(&self, key: u64) -> Option<Entry> {
        let [first, second, third, last] = &self.keys;
        let [first, second, third, last] =
            [first, second, third, last].map(|it| it.load(Ordering::Relaxed));
        // Without branches: where in its line a chunk stands, no processor foresees.
        let at = usize::from(second == key)
            + usize::from(third == key) * 2
            + usize::from(last == key) * 3;
        let found = (first == key) | (at > 0);
        let entry = self.entries[at % CELLS].load(Ordering::Acquire);
        (found || last == 0).then_some(Entry(if found { entry } else { 0 }))
    }
}

impl Segment {
    /// So many free cells, rounded up.
    pub(super) fn with(cells: usize) -> Self {
        let lines = (0..cells.div_ceil(CELLS)).map(|_| Line {
            keys: array::from_fn(|_| AtomicU64::new(0)),
            entries: array::from_fn(|_| AtomicU64::new(0)),
        });
        Self(lines.collect())
    }

    /// Cells.
    pub(super) fn len(&self) -> usize {
        self.0.len() * CELLS
    }

    /// The line in which a key is looked for first.
    fn home(&self, key: u64) -> usize {
        (((key & u64::from(u32::MAX)) * self.0.len() as u64) >> 32) as usize
    }

    /// What is said of a chunk that is not in this line, which is full.
    #[cold]
    fn elsewhere(&self, key: u64, line: usize) -> Entry {
        match self.find_from(key, line) {
            Place::At(at) => self.entry(at),
            Place::Free(_) => Entry::NONE,
        }
    }

    /// Looks for a key. Some cell is always free.
    pub(super) fn find(&self, key: u64) -> Place {
        self.find_from(key, self.home(key))
    }

    fn find_from(&self, key: u64, mut line: usize) -> Place {
        loop {
            for (cell, met) in self.0[line].keys.iter().enumerate() {
                match met.load(Ordering::Relaxed) {
                    0 => return Place::Free(line * CELLS + cell),
                    met if met == key => return Place::At(line * CELLS + cell),
                    _ => {}
                }
            }
            line = if line + 1 == self.0.len() {
                0
            } else {
                line + 1
            };
        }
    }

    fn at(&self, cell: usize) -> (&AtomicU64, &AtomicU64) {
        let (line, cell) = (&self.0[cell / CELLS], cell % CELLS);
        (&line.keys[cell], &line.entries[cell])
    }

    /// What is said of the chunk in a cell.
    pub(super) fn entry(&self, cell: usize) -> Entry {
        Entry(self.at(cell).1.load(Ordering::Acquire))
    }

    /// Says something else of the chunk in a cell: the writer's.
    pub(super) fn set(&self, cell: usize, entry: Entry) {
        self.at(cell).1.store(entry.0, Ordering::Release);
    }

    /// Puts a chunk into a free cell: the writer's.
    pub(super) fn fill(&self, cell: usize, key: u64, entry: Entry) {
        self.at(cell).0.store(key, Ordering::Relaxed);
        self.set(cell, entry);
    }

    /// The same chunks in so many cells, without those that nobody holds.
    pub(super) fn rebuilt(&self, cells: usize) -> Self {
        let new = Self::with(cells);
        for cell in 0..self.len() {
            let entry = self.entry(cell);
            if entry == Entry::NONE {
                continue;
            }
            let key = self.at(cell).0.load(Ordering::Relaxed);
            if let Place::Free(free) = new.find(key) {
                new.fill(free, key, entry);
            }
        }
        new
    }
}
