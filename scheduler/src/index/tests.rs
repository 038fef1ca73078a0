//! The index beside a plain map.

use std::collections::{BTreeMap, BTreeSet};

use forebay_proto::WorkerId;
use proptest::prelude::*;

use super::{Hit, IndexWriter, PrefixIndex, Size};

const WORKERS: u32 = 6;

/// Everything happens often: segments grow, sweeps lag behind, slots and rooms are used again.
const SMALL: Size = Size {
    pairs: usize::MAX,
    segments: 2,
    slots: 12,
    pages: 64,
    page_words: 16,
    retired_words: 12,
    swept: 3,
};

/// Who holds which chunk, plainly, and the tokens last told of each.
#[derive(Default)]
struct Plain {
    pairs: BTreeSet<(u32, u64)>,
    tokens: BTreeMap<u64, u32>,
}

impl Plain {
    fn holds(&self, worker: u32, chunk: u64) -> bool {
        self.pairs.contains(&(worker, chunk))
    }

    /// Leading chunks without a gap.
    fn depth(&self, worker: u32, chunks: &[u64]) -> usize {
        let held = chunks.iter().take_while(|it| self.holds(worker, **it));
        held.count()
    }

    fn hits(&self, chunks: &[u64]) -> Vec<Hit> {
        let hit = |worker| {
            let depth = self.depth(worker, chunks);
            let last = *chunks[..depth].last()?;
            Some(hit(worker, depth, self.tokens[&last]))
        };
        (0..WORKERS).filter_map(hit).collect()
    }

    fn holders(&self, chunk: u64) -> usize {
        (0..WORKERS).filter(|it| self.holds(*it, chunk)).count()
    }
}

fn hit(worker: u32, chunks: usize, tokens: u32) -> Hit {
    Hit {
        worker: WorkerId(worker),
        chunks: chunks as u32,
        tokens,
    }
}

fn hits(index: &PrefixIndex, chunks: &[u64]) -> Vec<Hit> {
    let mut hits = vec![hit(99, 99, 99)];
    index.hits(chunks, &mut hits);
    hits
}

/// Both, changed alike.
struct Both {
    writer: IndexWriter,
    index: PrefixIndex,
    plain: Plain,
}

impl Both {
    fn new(size: Size) -> Self {
        let writer = IndexWriter::with(size);
        Self {
            index: writer.index().clone(),
            writer,
            plain: Plain::default(),
        }
    }

    fn store(&mut self, worker: u32, chunk: u64, tokens: u32) {
        self.writer.store(WorkerId(worker), chunk, tokens);
        self.plain.pairs.insert((worker, chunk));
        self.plain.tokens.insert(chunk, tokens);
    }

    fn remove(&mut self, worker: u32, chunk: u64) {
        self.writer.remove(WorkerId(worker), chunk);
        self.plain.pairs.remove(&(worker, chunk));
    }

    fn clear(&mut self, worker: u32) {
        self.writer.clear(WorkerId(worker));
        self.plain.pairs.retain(|(holder, _)| *holder != worker);
    }

    /// What has to be the same whatever is held.
    fn check(&self, chunks: &[u64]) {
        assert_eq!(self.index.len(), self.plain.pairs.len());
        assert_eq!(self.index.is_empty(), self.plain.pairs.is_empty());
        for chunk in chunks {
            assert_eq!(self.index.holders(*chunk), self.plain.holders(*chunk));
        }
        let rare = |chunk: &&u64| self.plain.holders(**chunk) * 2 < WORKERS as usize;
        let conversation = self.index.conversation(chunks, WORKERS as usize);
        assert_eq!(conversation, chunks.iter().find(rare).copied());
    }
}

/// A path is the letters that lead to a place; what a worker holds of it are its leading chunks.
type Path = Vec<u8>;

/// A path's chunks. Many want the same cell, so they stand in each other's way.
fn chunks(path: &[u8]) -> Vec<u64> {
    let step = |name: &mut u64, letter: &u8| {
        *name = (*name ^ (u64::from(*letter) + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *name ^= *name >> 29;
        Some(!(*name & !0xffff_ffff | *name & 3))
    };
    path.iter().scan(0, step).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Store(u32, Path),
    /// The end of the path, or of one that goes on from there, if the worker holds it.
    Remove(u32, Path),
    Clear(u32),
    Look(Path),
}

fn op() -> impl Strategy<Value = Op> {
    let worker = || 0..WORKERS;
    // Paths part seldom, so they share a lot.
    let letter = prop_oneof![6 => Just(0_u8), 1 => Just(1_u8)];
    let path = proptest::collection::vec(letter, 0..24);
    prop_oneof![
        4 => (worker(), path.clone()).prop_map(|(worker, path)| Op::Store(worker, path)),
        8 => (worker(), path.clone()).prop_map(|(worker, path)| Op::Remove(worker, path)),
        1 => worker().prop_map(Op::Clear),
        4 => path.prop_map(Op::Look),
    ]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    proptest::collection::vec(op(), 0..150)
}

/// The last chunk of a path that goes on from this one as long as the worker holds it.
fn leaf(plain: &Plain, worker: u32, mut path: Path) -> Option<u64> {
    path.truncate(plain.depth(worker, &chunks(&path)));
    let end = |path: &Path| chunks(path).last().copied();
    loop {
        let held = (0..2).find(|letter| {
            let longer = [&path[..], &[*letter]].concat();
            end(&longer).is_some_and(|chunk| plain.holds(worker, chunk))
        });
        match held {
            Some(letter) => path.push(letter),
            None => return end(&path),
        }
    }
}

fn store_path(both: &mut Both, worker: u32, path: &[u8], tokens: u32) {
    for (at, chunk) in (1..).zip(chunks(path)) {
        both.store(worker, chunk, at * 10 + tokens);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn of_workers_without_gaps_it_says_what_a_plain_map_says(ops in ops()) {
        let mut both = Both::new(SMALL);
        for (told, op) in (1..).zip(ops) {
            match op {
                Op::Store(worker, path) => store_path(&mut both, worker, &path, told % 2),
                Op::Remove(worker, path) => {
                    if let Some(chunk) = leaf(&both.plain, worker, path) {
                        both.remove(worker, chunk);
                    }
                }
                Op::Clear(worker) => both.clear(worker),
                Op::Look(path) => {
                    let path = chunks(&path);
                    both.check(&path);
                    prop_assert_eq!(hits(&both.index, &path), both.plain.hits(&path));
                }
            }
        }
    }

    #[test]
    fn of_workers_with_gaps_it_says_a_held_chunk_before_a_gap(ops in ops()) {
        let mut both = Both::new(SMALL);
        for op in ops {
            match op {
                Op::Store(worker, path) => store_path(&mut both, worker, &path, 0),
                Op::Remove(worker, path) => {
                    if let Some(chunk) = chunks(&path).last() {
                        both.remove(worker, *chunk);
                    }
                }
                Op::Clear(worker) => both.clear(worker),
                Op::Look(path) => {
                    let path = chunks(&path);
                    both.check(&path);
                    check_gaps(&both, &path);
                }
            }
        }
    }
}

fn check_gaps(both: &Both, path: &[u64]) {
    let Both { index, plain, .. } = both;
    let told = hits(index, path);
    let expected = plain.hits(path);
    let workers = |hits: &[Hit]| hits.iter().map(|hit| hit.worker).collect::<Vec<_>>();
    assert_eq!(workers(&told), workers(&expected));
    for (told, expected) in told.iter().zip(&expected) {
        let WorkerId(worker) = told.worker;
        let end = told.chunks as usize;
        assert!(told.chunks >= expected.chunks, "{told:?} {expected:?}");
        assert!(plain.holds(worker, path[end - 1]), "{told:?} ends in a gap");
        assert_eq!(told.tokens, plain.tokens[&path[end - 1]]);
        assert!(path.get(end).is_none_or(|next| !plain.holds(worker, *next)));
        let gaps = path[expected.chunks as usize..].iter();
        if gaps.clone().all(|chunk| !plain.holds(worker, *chunk)) {
            assert_eq!(told, expected, "it has no gap");
        }
    }
}

#[test]
fn a_gap_of_one_worker_does_not_change_what_is_said_of_another() {
    let mut both = Both::new(SMALL);
    let path = chunks(&[0; 20]);
    for worker in 0..4 {
        store_path(&mut both, worker, &[0; 20], 0);
    }
    path[12..].iter().for_each(|chunk| both.remove(3, *chunk));
    both.remove(1, path[10]);
    let told = hits(&both.index, &path);
    assert_eq!(told[0], hit(0, 20, 200));
    assert_eq!(told[2..], [hit(2, 20, 200), hit(3, 12, 120)]);
}

#[test]
fn holders_may_change_at_every_chunk_of_a_long_prompt() {
    let mut writer = IndexWriter::default();
    let path = chunks(&[0; 300]);
    for worker in 1..=200 {
        for (at, chunk) in (1..).zip(&path[..worker]) {
            writer.store(WorkerId(worker as u32), *chunk, at * 10);
        }
    }
    let expected = (1..=200).map(|it| hit(it, it as usize, it * 10));
    let expected: Vec<Hit> = expected.collect();
    assert_eq!(hits(writer.index(), &path), expected);
}

#[test]
fn at_its_bounds_it_stores_nothing_more_and_goes_on() {
    let full = Size { pairs: 6, ..SMALL };
    let mut both = Both::new(full);
    let path = chunks(&[0; 8]);
    store_path(&mut both, 0, &[0; 6], 0);
    let mut more = |worker, chunk| both.writer.store(WorkerId(worker), chunk, 70);
    more(0, path[6]);
    more(1, path[0]);
    more(0, path[5]);
    assert_eq!(
        hits(&both.index, &path),
        [hit(0, 6, 70)],
        "tokens are told anew"
    );
    assert_eq!(both.index.len(), 6);
    both.clear(0);
    store_path(&mut both, 1, &[0; 6], 0);
    both.check(&path);
    assert_eq!(
        hits(&both.index, &path),
        [hit(1, 6, 60)],
        "a clear makes room"
    );
}

#[test]
fn workers_that_come_and_go_leave_room_for_others() {
    let mut both = Both::new(Size { slots: 3, ..SMALL });
    for turn in 0..50 {
        let worker = turn % WORKERS;
        store_path(&mut both, worker, &[0; 5], 0);
        both.check(&chunks(&[0; 6]));
        if turn % 2 == 1 {
            both.clear(turn % WORKERS);
            both.clear((turn - 1) % WORKERS);
        }
    }
    store_path(&mut both, 0, &[0; 5], 0);
    store_path(&mut both, 1, &[0; 5], 0);
    store_path(&mut both, 2, &[0; 5], 0);
    both.check(&chunks(&[0; 6]));
    both.writer.store(WorkerId(3), chunks(&[0])[0], 10);
    both.check(&chunks(&[0; 6]));
}

#[test]
fn what_the_arena_cannot_take_is_not_said_and_nothing_else_is_lost() {
    let size = Size {
        pages: 2,
        slots: 15,
        ..SMALL
    };
    let mut writer = IndexWriter::with(size);
    let index = writer.index().clone();
    let sum = || (1..=20).map(|chunk| index.holders(chunk)).sum::<usize>();
    for round in 0..2 {
        for (worker, chunk) in (0..12).flat_map(|it| (1..=20_u64).map(move |chunk| (it, chunk))) {
            if chunk * 5 % (worker + 2) < 3 {
                writer.store(WorkerId(worker as u32), chunk, 1);
            }
        }
        assert_eq!(sum(), index.len());
        assert!((60..200).contains(&sum()), "{round}: {}", sum());
        // To smaller sets, for which there is no room either.
        for chunk in 1..=20 {
            writer.remove(WorkerId(0), chunk);
            assert_eq!(sum(), index.len());
        }
        (1..12).for_each(|worker| writer.clear(WorkerId(worker)));
        assert!(index.is_empty());
        assert_eq!(sum(), 0);
    }
}

#[test]
fn a_version_counts_changes() {
    let mut both = Both::new(SMALL);
    both.store(0, 1, 10);
    both.store(0, 1, 10);
    both.remove(0, 2);
    both.clear(0);
    assert_eq!(both.index.version(), 4);
}

#[test]
fn every_fingerprint_has_its_place() {
    let mut both = Both::new(Size::CELL);
    let chunks = [0, 1, 2, u64::MAX - 2, 1 << 32, 1 << 63, 0xffff_ffff];
    for (tokens, chunk) in (1..).zip(chunks) {
        both.store(1, chunk, tokens);
    }
    both.check(&chunks);
    assert_eq!(hits(&both.index, &chunks), [hit(1, 7, 7)]);
}
