//! The index's writer beside a reader, in every order of their steps and with all that weak memory allows,
//! as far as two or three changes of the running thread go.
//!
//! The index is built here from its own files on loom's primitives, and is as small as can be. What stands
//! in for `arc_swap` is a lock for as long as a share is taken.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // parts of a library; a test

use forebay_proto::WorkerId;
use forebay_scheduler::index::{Hit, MAX_PAIRS, MAX_TOKENS};

#[path = "../src/index/arena.rs"]
mod arena;
#[path = "../src/index/entry.rs"]
mod entry;
#[path = "../src/index/fingerprints.rs"]
mod fingerprints;
#[path = "../src/index/lookup.rs"]
mod lookup;
#[path = "../src/index/reader.rs"]
mod reader;
#[path = "../src/index/sets.rs"]
mod sets;
#[path = "../src/index/size.rs"]
mod size;
#[path = "../src/index/slots.rs"]
mod slots;
#[path = "../src/index/table.rs"]
mod table;
#[path = "../src/index/writer.rs"]
mod writer;

mod sync {
    pub(super) use loom::sync::Arc;
    pub(super) use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};

    pub(super) struct Published<T>(loom::sync::Mutex<Arc<T>>);

    impl<T> Published<T> {
        pub(super) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(Arc::new(value)))
        }

        pub(super) fn read<R>(&self, read: impl FnOnce(&T) -> R) -> R {
            let share = self.0.lock().unwrap().clone();
            read(&share)
        }

        pub(super) fn replace(&self, value: T) -> Arc<T> {
            std::mem::replace(&mut self.0.lock().unwrap(), Arc::new(value))
        }
    }
}

use reader::PrefixIndex;
use size::Size;
use writer::IndexWriter;

const SMALL: Size = Size {
    pairs: usize::MAX,
    segments: 1,
    slots: 6,
    pages: 4,
    page_words: 8,
    retired_words: 1,
    swept: 8,
};
const A: u64 = 1 << 40;
const B: u64 = 2 << 40;

/// Runs what changes the index beside what reads it, after what was before.
fn race(
    size: Size,
    before: fn(&mut IndexWriter),
    changes: fn(&mut IndexWriter),
    check: fn(&PrefixIndex),
) {
    let mut model = loom::model::Builder::new();
    model.max_branches = 20_000;
    model.preemption_bound = Some(2);
    model.check(move || {
        let mut writer = IndexWriter::with(size);
        before(&mut writer);
        let index = writer.index().clone();
        let reader = loom::thread::spawn(move || check(&index));
        changes(&mut writer);
        reader.join().unwrap();
    });
}

fn hits(index: &PrefixIndex, chunks: &[u64]) -> Vec<(u32, u32, u32)> {
    let mut hits = Vec::new();
    index.hits(chunks, &mut hits);
    let plain = |hit: &Hit| (hit.worker.0, hit.chunks, hit.tokens);
    hits.iter().map(plain).collect()
}

fn store(writer: &mut IndexWriter, workers: &[u32], chunk: u64, tokens: u32) {
    for worker in workers {
        writer.store(WorkerId(*worker), chunk, tokens);
    }
}

#[test]
fn the_room_of_a_set_is_not_used_again_while_it_is_read() {
    race(
        SMALL,
        |writer| {
            store(writer, &[4, 5], B, 2);
            store(writer, &[1, 2, 3], A, 1);
        },
        |writer| {
            writer.remove(WorkerId(3), A);
            store(writer, &[6], B, 2);
        },
        |index| {
            let held = hits(index, &[A]);
            let three = [(1, 1, 1), (2, 1, 1), (3, 1, 1)];
            assert!(held == three || held == three[..2], "{held:?}");
        },
    );
}

#[test]
fn the_slot_of_a_worker_is_not_anothers_while_it_is_read() {
    race(
        Size { slots: 1, ..SMALL },
        |writer| store(writer, &[1], A, 1),
        |writer| {
            writer.clear(WorkerId(1));
            store(writer, &[2], B, 2);
        },
        |index| {
            let held = hits(index, &[A]);
            assert!(held.is_empty() || held == [(1, 1, 1)], "{held:?}");
        },
    );
}

#[test]
fn a_table_that_grows_loses_nothing() {
    race(
        SMALL,
        |writer| {
            for chunk in 3..7 {
                store(writer, &[1], chunk << 40, 3);
            }
            store(writer, &[1], A, 1);
        },
        |writer| store(writer, &[1], B, 2),
        |index| {
            let held = hits(index, &[A, B]);
            assert!(held == [(1, 1, 1)] || held == [(1, 2, 2)], "{held:?}");
        },
    );
}

#[test]
fn holders_and_tokens_are_told_together() {
    race(
        SMALL,
        |writer| store(writer, &[1], A, 1),
        |writer| {
            writer.remove(WorkerId(1), A);
            store(writer, &[2], A, 2);
        },
        |index| {
            let held = hits(index, &[A]);
            assert!(
                held.is_empty() || held == [(1, 1, 1)] || held == [(2, 1, 2)],
                "{held:?}"
            );
        },
    );
}

#[test]
fn a_set_is_seen_whole() {
    race(
        SMALL,
        |writer| store(writer, &[1, 2], A, 1),
        |writer| store(writer, &[3], A, 1),
        |index| {
            let held = hits(index, &[A]);
            let three = [(1, 1, 1), (2, 1, 1), (3, 1, 1)];
            assert!(held == three || held == three[..2], "{held:?}");
            assert!([2, 3].contains(&index.holders(A)));
        },
    );
}

#[test]
fn a_new_version_is_seen_with_what_is_new_in_it() {
    race(
        SMALL,
        |_| {},
        |writer| store(writer, &[1], A, 1),
        |index| {
            if index.version() == 1 {
                assert_eq!(hits(index, &[A]), [(1, 1, 1)]);
            }
        },
    );
}
