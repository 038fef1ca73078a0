//! The one who changes the index.

use std::collections::VecDeque;
use std::sync::Arc;

use forebay_proto::WorkerId;

use super::Size;
use super::entry::{Entry, Slot};
use super::reader::{PrefixIndex, Shared};
use super::sets::{Full, Retired, Sets};
use super::slots::{Left, Slots};
use super::sync::{self, Ordering};
use super::table::{self, Directory, Place, Segment};

/// Cells of a segment when it is new.
const FEWEST_CELLS: usize = 8;
/// Cells of a hundred that may have a key, and that are held in a segment built anew.
const MOST_PERCENT: usize = 70;
const NEW_PERCENT: usize = 56;

/// Takes in what workers store and remove, for all [`PrefixIndex`] that it gave out.
pub struct IndexWriter {
    index: PrefixIndex,
    size: Size,
    segments: Vec<Filled>,
    slots: Slots,
    sets: Sets,
    /// Pairs in the table, those of dead slots too.
    pairs: usize,
    version: u64,
    sweep: Option<Sweep>,
    /// Slots that died since the sweep began: the next one's.
    unswept: Vec<Slot>,
    /// Slots that no entry names any more.
    unnamed: Vec<Slot>,
    /// Directories that were replaced, oldest first, as long as readers may have them.
    replaced: VecDeque<Replaced>,
}

struct Filled {
    segment: Segment,
    /// Cells that have a key.
    keys: usize,
    /// Those that somebody holds.
    held: usize,
}

#[derive(Clone, Copy)]
struct Cell {
    segment: usize,
    at: usize,
}

/// Goes through the table and takes dead slots out.
struct Sweep {
    next: Cell,
    slots: Vec<Slot>,
}

/// A directory, and what whoever reads in it, or in an older one, may still see.
struct Replaced {
    directory: sync::Arc<Directory>,
    sets: Vec<Retired>,
    slots: Vec<Slot>,
}

impl Default for IndexWriter {
    fn default() -> Self {
        Self::with(Size::CELL)
    }
}

impl IndexWriter {
    pub(super) fn with(size: Size) -> Self {
        let slots = Slots::new(size.slots);
        let filled = |_| Filled {
            segment: Segment::with(FEWEST_CELLS),
            keys: 0,
            held: 0,
        };
        let segments: Vec<Filled> = (0..size.segments).map(filled).collect();
        let directory = directory(&segments, &slots);
        let shared = Arc::new(Shared::new(directory, size));
        Self {
            index: PrefixIndex(shared.clone()),
            size,
            segments,
            slots,
            sets: Sets::new(shared, size.page_words),
            pairs: 0,
            version: 0,
            sweep: None,
            unswept: Vec::new(),
            unnamed: Vec::new(),
            replaced: VecDeque::new(),
        }
    }

    /// What is known, to be read. A clone of it sees later changes too.
    #[must_use]
    pub const fn index(&self) -> &PrefixIndex {
        &self.index
    }

    /// A worker holds a chunk, up to the end of which its prompt has so many tokens.
    pub fn store(&mut self, worker: WorkerId, chunk: u64, tokens: u32) {
        if self.pairs >= self.size.pairs && self.slots.dead_pairs() > 0 {
            self.sweep_all();
        }
        if let Some(slot) = self.slot(worker) {
            self.put(slot, table::key(chunk), tokens);
        }
        self.changed();
    }

    /// A worker does not hold a chunk any more.
    pub fn remove(&mut self, worker: WorkerId, chunk: u64) {
        let key = table::key(chunk);
        let cell = |at| Cell {
            segment: table::segment(key, self.segments.len()),
            at,
        };
        if let Some(slot) = self.slots.of(worker)
            && let Place::At(at) = self.segments[cell(0).segment].segment.find(key)
        {
            self.take_from(cell(at), slot);
        }
        self.changed();
    }

    /// Nothing is known of a worker any more. Takes no longer when it holds much: later changes tidy up.
    pub fn clear(&mut self, worker: WorkerId) {
        match self.slots.kill(worker) {
            Some(Left::Swept(slot)) => self.unswept.push(slot),
            Some(Left::Seen(slot)) => self.unnamed.push(slot),
            None => {}
        }
        self.changed();
    }

    /// A worker's slot, or a new one if any is left.
    fn slot(&mut self, worker: WorkerId) -> Option<Slot> {
        if let Some(slot) = self.slots.of(worker) {
            return Some(slot);
        }
        if self.slots.is_full() {
            self.sweep_all();
            self.publish();
        }
        let (slot, grown) = self.slots.take(worker)?;
        self.sets.reordered();
        if grown {
            self.publish();
        }
        Some(slot)
    }

    fn put(&mut self, slot: Slot, key: u64, tokens: u32) {
        let segment = table::segment(key, self.segments.len());
        let table = &self.segments[segment].segment;
        let (at, from) = match table.find(key) {
            Place::At(at) => (Some(at), table.entry(at)),
            Place::Free(_) => (None, Entry::NONE),
        };
        let held_by = from.holders();
        let Ok(holders) = self.sets.with(held_by, slot, &self.slots) else {
            return;
        };
        if holders != held_by {
            if self.pairs >= self.size.pairs {
                self.sets.release(holders);
                return;
            }
            self.pairs += 1;
            self.slots.add(slot);
        }
        let to = Entry::new(holders, tokens);
        match at {
            Some(at) => self.say(Cell { segment, at }, from, to),
            None => self.fill(segment, key, to),
        }
    }

    fn take_from(&mut self, cell: Cell, slot: Slot) {
        let from = self.entry(cell);
        let held_by = from.holders();
        match self.sets.without(held_by, slot, &self.slots) {
            Ok(holders) => {
                if holders != held_by {
                    self.pairs -= 1;
                    self.slots.subtract(slot);
                }
                self.say(cell, from, Entry::new(holders, from.tokens()));
            }
            Err(Full) => self.forget(cell, from),
        }
    }

    fn entry(&self, cell: Cell) -> Entry {
        self.segments[cell.segment].segment.entry(cell.at)
    }

    /// Says `to` of the chunk in a cell, the holders of which are named, instead of `from`.
    fn say(&mut self, cell: Cell, from: Entry, to: Entry) {
        let filled = &mut self.segments[cell.segment];
        filled.held -= usize::from(from != Entry::NONE);
        filled.held += usize::from(to != Entry::NONE);
        if to != from {
            filled.segment.set(cell.at, to);
        }
        self.sets.release(from.holders());
    }

    /// A chunk that is in no cell.
    fn fill(&mut self, segment: usize, key: u64, entry: Entry) {
        let filled = &self.segments[segment];
        if (filled.keys + 1) * 100 > filled.segment.len() * MOST_PERCENT {
            self.rebuild(segment);
        }
        let filled = &mut self.segments[segment];
        if let Place::Free(at) = filled.segment.find(key) {
            filled.segment.fill(at, key, entry);
            filled.keys += 1;
            filled.held += 1;
        }
    }

    /// Makes a segment larger or smaller, as what is held in it needs. Readers go on in the old one.
    fn rebuild(&mut self, segment: usize) {
        let filled = &mut self.segments[segment];
        let cells = (filled.held * 100 / NEW_PERCENT + 1).max(FEWEST_CELLS);
        filled.segment = filled.segment.rebuilt(cells);
        filled.keys = filled.held;
        if let Some(sweep) = self.sweep.as_mut().filter(|it| it.next.segment == segment) {
            sweep.next.at = 0;
        }
        self.publish();
    }

    /// The arena is full and a smaller set is needed: what cannot be said is not said at all.
    fn forget(&mut self, cell: Cell, from: Entry) {
        for slot in self.sets.members(from.holders()) {
            self.slots.subtract(*slot);
            self.pairs -= 1;
        }
        self.say(cell, from, Entry::NONE);
    }

    fn sweep_all(&mut self) {
        while self.sweep.is_some() || !self.unswept.is_empty() {
            self.sweep(usize::MAX);
        }
    }

    /// Takes dead slots out of the next cells, if there are any.
    fn sweep(&mut self, cells: usize) {
        if self.sweep.is_none() && !self.unswept.is_empty() {
            self.sweep = Some(Sweep {
                next: Cell { segment: 0, at: 0 },
                slots: std::mem::take(&mut self.unswept),
            });
        }
        for _ in 0..cells {
            let Some(sweep) = &mut self.sweep else { return };
            let Some(filled) = self.segments.get(sweep.next.segment) else {
                self.unnamed.append(&mut sweep.slots);
                self.sweep = None;
                return;
            };
            let cell = sweep.next;
            if cell.at < filled.segment.len() {
                sweep.next.at += 1;
                self.sweep_cell(cell);
            } else {
                sweep.next = Cell {
                    segment: cell.segment + 1,
                    at: 0,
                };
            }
        }
    }

    fn sweep_cell(&mut self, cell: Cell) {
        let from = self.entry(cell);
        let dead = |slot: &Slot| self.slots.is_dead(*slot);
        if !self.sets.members(from.holders()).iter().any(dead) {
            return;
        }
        let Ok(holders) = self.sets.living(from.holders(), &self.slots) else {
            return self.forget(cell, from);
        };
        for slot in self.sets.members(from.holders()) {
            if self.slots.is_dead(*slot) {
                self.slots.subtract(*slot);
                self.pairs -= 1;
            }
        }
        self.say(cell, from, Entry::new(holders, from.tokens()));
    }

    /// Ends a change.
    fn changed(&mut self) {
        self.sweep(self.size.swept);
        let retired = self.sets.retired_words() >= self.size.retired_words;
        if retired || self.unnamed.len() * 8 > self.size.slots {
            self.publish();
        } else if !self.replaced.is_empty() {
            self.reclaim();
        }
        let counts = &self.index.0.counts;
        let dead = self.slots.dead_pairs();
        counts.dead.store(dead, Ordering::Relaxed);
        counts.pairs.store(self.pairs - dead, Ordering::Relaxed);
        self.version += 1;
        counts.version.store(self.version, Ordering::Release);
    }

    /// Lets readers begin with what is the case, and keeps what those who began before may see.
    fn publish(&mut self) {
        let directory = directory(&self.segments, &self.slots);
        self.replaced.push_back(Replaced {
            directory: self.index.0.directory.replace(directory),
            sets: self.sets.take_retired(),
            slots: std::mem::take(&mut self.unnamed),
        });
        self.reclaim();
    }

    /// Frees what only readers of directories could see that nobody reads in any more.
    fn reclaim(&mut self) {
        while let Some(oldest) = self.replaced.front_mut()
            && sync::Arc::get_mut(&mut oldest.directory).is_some()
        {
            oldest.sets.drain(..).for_each(|set| self.sets.free(set));
            oldest
                .slots
                .drain(..)
                .for_each(|slot| self.slots.free(slot));
            self.replaced.pop_front();
        }
    }
}

fn directory(segments: &[Filled], slots: &Slots) -> Directory {
    Directory {
        segments: segments.iter().map(|it| it.segment.clone()).collect(),
        workers: slots.workers(),
    }
}
