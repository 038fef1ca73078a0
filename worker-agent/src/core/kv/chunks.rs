//! Chunks, by the blocks that they touch: which of them are resident.

use std::collections::{HashMap, VecDeque};

use forebay_scheduler::residency::{Change, MAX_CHUNKS};

use super::blocks::{Path, Placed};

/// Chunks that are known and not resident: their blocks are to come, or come back.
const MAX_ABSENT: usize = 1 << 16;
/// Chunks that touch one block. The last block of a beginning that conversations share is touched by a chunk of
/// each of them.
const MAX_SHARED: usize = 1 << 12;
const WAYS: usize = 2;

#[derive(Default)]
struct Spot {
    copies: u32,
    /// The chunks that touch it.
    chunks: Vec<u64>,
}

/// One set of blocks by which a chunk may be resident.
struct Way {
    tokens: u32,
    paths: Box<[Path]>,
    missing: u32,
}

struct Chunk {
    /// The newest last.
    ways: Vec<Way>,
    /// As it was told; none: it is not resident.
    resident: Option<u32>,
    /// Of its newest place in the line of those that are not resident.
    turn: u64,
}

impl Chunk {
    fn tokens(&self) -> Option<u32> {
        let there = self.ways.iter().rev().find(|way| way.missing == 0);
        there.map(|way| way.tokens)
    }
}

/// The chunks of one map, and the copies of each path.
#[derive(Default)]
pub(super) struct Chunks {
    spots: HashMap<Path, Spot>,
    chunks: HashMap<u64, Chunk>,
    resident: usize,
    absent: VecDeque<(u64, u64)>,
    turn: u64,
    changes: Vec<Change>,
}

impl Chunks {
    /// Chunks that are resident, and those that are known and are not.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.resident, self.chunks.len() - self.resident)
    }

    /// A point in the order of removals.
    pub(super) const fn mark(&self) -> u64 {
        self.turn
    }

    /// Whether a chunk went, and perhaps came back, since such a point.
    pub(super) fn went_since(&self, chunk: u64, mark: u64) -> bool {
        self.chunks.get(&chunk).is_none_or(|at| at.turn > mark)
    }

    /// Tokens up to the end of a chunk that is resident.
    pub(super) fn tokens_to(&self, chunk: u64) -> Option<u32> {
        self.chunks.get(&chunk)?.resident
    }

    /// Whether it is known which blocks a chunk touches.
    pub(super) fn knows(&self, chunk: u64) -> bool {
        self.chunks.contains_key(&chunk)
    }

    /// Chunks that are resident.
    pub(super) fn resident(&self) -> impl Iterator<Item = Placed> {
        self.chunks.iter().filter_map(|(chunk, at)| {
            let chunk = *chunk;
            at.resident.map(|tokens| Placed { chunk, tokens })
        })
    }

    /// What changed since this was last asked.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// A copy of a block came.
    pub(super) fn up(&mut self, path: Path) {
        let spot = self.spots.entry(path).or_default();
        spot.copies += 1;
        if spot.copies == 1 {
            self.turn_chunks(path, |missing| missing - 1);
        }
    }

    /// Copies of a block went.
    pub(super) fn down(&mut self, path: Path, copies: u32) {
        let Some(spot) = self.spots.get_mut(&path) else {
            return;
        };
        spot.copies -= copies;
        if spot.copies > 0 {
            return;
        }
        if spot.chunks.is_empty() {
            self.spots.remove(&path);
        } else {
            self.turn_chunks(path, |missing| missing + 1);
        }
    }

    /// A path came or went: chunks that touch it miss one less or more.
    fn turn_chunks(&mut self, path: Path, missing: impl Fn(u32) -> u32) {
        let Some(spot) = self.spots.get_mut(&path) else {
            return;
        };
        let touched = std::mem::take(&mut spot.chunks);
        for chunk in &touched {
            if let Some(at) = self.chunks.get_mut(chunk) {
                for way in &mut at.ways {
                    if way.paths.contains(&path) {
                        way.missing = missing(way.missing);
                    }
                }
            }
            self.tell(*chunk);
        }
        if let Some(spot) = self.spots.get_mut(&path) {
            spot.chunks = touched;
        }
    }

    /// Says what became of a chunk.
    fn tell(&mut self, chunk: u64) {
        let Some(at) = self.chunks.get_mut(&chunk) else {
            return;
        };
        let (before, tokens) = (at.resident, at.tokens());
        // By which way does not matter while it is resident.
        if before.is_some() && tokens.is_some() || before.is_none() && tokens.is_none() {
            return;
        }
        at.resident = tokens;
        match tokens {
            Some(tokens) => {
                self.resident += 1;
                self.changes.push(Change::Stored { chunk, tokens });
            }
            None => {
                self.resident -= 1;
                self.changes.push(Change::Removed { chunk });
                self.line_up(chunk);
            }
        }
    }

    /// The newest of those that are not resident.
    fn line_up(&mut self, chunk: u64) {
        self.turn += 1;
        if let Some(at) = self.chunks.get_mut(&chunk) {
            at.turn = self.turn;
            self.absent.push_back((chunk, self.turn));
        }
    }

    /// A chunk is found in these blocks: it is resident while all of them are there.
    pub(super) fn add_way(&mut self, chunk: u64, tokens: u32, paths: &[Path]) {
        let known = self.chunks.get(&chunk);
        if let Some(known) = known {
            // What is newest stands last; the same again moves there.
            let same = known.ways.iter().position(|way| *way.paths == *paths);
            if let Some(same) = same {
                if let Some(known) = self.chunks.get_mut(&chunk) {
                    known.ways[same..].rotate_left(1);
                }
                return;
            }
            if known.ways.len() >= WAYS {
                self.drop_way(chunk);
            }
        } else {
            if self.resident >= MAX_CHUNKS {
                return;
            }
            self.make_room();
        }
        let mut missing = 0;
        for path in paths {
            let spot = self.spots.entry(*path).or_default();
            missing += u32::from(spot.copies == 0);
            if spot.chunks.contains(&chunk) {
                continue;
            }
            if spot.chunks.len() >= MAX_SHARED && !self.drop_absent_at(*path) {
                // All others are resident: this one stays missing.
                missing += 1;
                continue;
            }
            self.spots.entry(*path).or_default().chunks.push(chunk);
        }
        let way = Way {
            tokens,
            paths: paths.into(),
            missing,
        };
        let fresh = !self.chunks.contains_key(&chunk);
        let at = self.chunks.entry(chunk).or_insert(Chunk {
            ways: Vec::with_capacity(1),
            resident: None,
            turn: 0,
        });
        at.ways.push(way);
        if fresh {
            self.line_up(chunk);
        }
        self.tell(chunk);
    }

    /// Drops one of a chunk's ways.
    fn drop_way(&mut self, chunk: u64) {
        let Some(at) = self.chunks.get_mut(&chunk) else {
            return;
        };
        // One that is resident stays, if there is another.
        let oldest = at.ways.iter().position(|way| way.missing > 0);
        let dropped = at.ways.remove(oldest.unwrap_or(0));
        let left: Vec<_> = at.ways.iter().map(|way| way.paths.clone()).collect();
        for path in &dropped.paths {
            if !left.iter().any(|paths| paths.contains(path)) {
                self.leave(*path, chunk);
            }
        }
    }

    /// A chunk does not touch this path any more.
    fn leave(&mut self, path: Path, chunk: u64) {
        if let Some(spot) = self.spots.get_mut(&path) {
            spot.chunks.retain(|other| *other != chunk);
            if spot.chunks.is_empty() && spot.copies == 0 {
                self.spots.remove(&path);
            }
        }
    }

    /// Forgets chunks that have not been resident for longest, so that there is room for one more.
    fn make_room(&mut self) {
        while self.chunks.len() - self.resident >= MAX_ABSENT || self.absent.len() >= 4 * MAX_ABSENT
        {
            let Some((chunk, turn)) = self.absent.pop_front() else {
                return;
            };
            let stands = self.chunks.get(&chunk);
            if !stands.is_some_and(|at| at.turn == turn && at.resident.is_none()) {
                continue;
            }
            self.drop_chunk(chunk);
        }
    }

    /// Forgets the oldest chunk at this path that is not resident; `false`: all are.
    fn drop_absent_at(&mut self, path: Path) -> bool {
        let absent = |chunk: &&u64| {
            let at = self.chunks.get(*chunk);
            at.is_none_or(|at| at.resident.is_none())
        };
        let touching = self.spots.get(&path).map(|spot| spot.chunks.iter());
        let oldest = touching.and_then(|mut chunks| chunks.find(absent).copied());
        let Some(oldest) = oldest else { return false };
        self.drop_chunk(oldest);
        self.leave(path, oldest);
        true
    }

    fn drop_chunk(&mut self, chunk: u64) {
        if let Some(gone) = self.chunks.remove(&chunk) {
            for path in gone.ways.iter().flat_map(|way| way.paths.iter()) {
                self.leave(*path, chunk);
            }
        }
    }

    /// The ways by which chunks are resident: chunk, tokens to its end, the blocks that it touches.
    pub(super) fn ways(&self) -> impl Iterator<Item = (u64, u32, &[Path])> {
        let resident = self.chunks.iter().filter(|(_, at)| at.resident.is_some());
        resident.flat_map(|(chunk, at)| {
            let there = at.ways.iter().filter(|way| way.missing == 0);
            there.map(|way| (*chunk, way.tokens, &*way.paths))
        })
    }

    /// The changes that lead from here to nothing.
    pub(super) fn forget(&mut self) -> Self {
        let mut changes = self.take_changes();
        let gone = self.resident();
        changes.extend(gone.map(|Placed { chunk, .. }| Change::Removed { chunk }));
        Self {
            changes,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last block of a beginning that all conversations share.
    const SHARED: Path = 1;

    /// A chunk of each conversation touches that and a block of its own.
    fn begun(chunks: &mut Chunks, conversations: std::ops::Range<u64>) {
        for conversation in conversations {
            chunks.up(100 + conversation);
            chunks.add_way(conversation, 64, &[SHARED, 100 + conversation]);
        }
    }

    #[test]
    fn as_many_conversations_share_a_beginning_as_like() {
        let mut chunks = Chunks::default();
        chunks.up(SHARED);
        begun(&mut chunks, 0..2_000);
        assert_eq!(chunks.count(), (2_000, 0));
        // What they share goes, and comes back.
        chunks.down(SHARED, 1);
        assert_eq!(chunks.count(), (0, 2_000));
        chunks.up(SHARED);
        assert_eq!(chunks.count(), (2_000, 0));
    }

    #[test]
    fn beyond_its_bound_a_block_is_counted_for_those_that_are_there() {
        let most = MAX_SHARED as u64;
        let mut chunks = Chunks::default();
        chunks.up(SHARED);
        begun(&mut chunks, 0..most);
        begun(&mut chunks, most..most + 1);
        assert_eq!(chunks.tokens_to(most), None, "all others are there");
        // Ten of them are evicted, which make room for ten that begin.
        (0..10).for_each(|gone| chunks.down(100 + gone, 1));
        begun(&mut chunks, most + 1..most + 11);
        let there = (most + 1..most + 11).filter(|chunk| chunks.tokens_to(*chunk).is_some());
        assert_eq!(there.count(), 10);
        assert_eq!(chunks.count().0 as u64, most);
        assert!(!chunks.knows(0) && chunks.knows(10));
    }
}
