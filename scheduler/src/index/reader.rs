//! What readers have of the index.

use std::fmt;
use std::sync::Arc;

use super::arena::Arena;
use super::entry::Holders;
use super::lookup::Lookup;
use super::sync::{AtomicU64, AtomicUsize, Ordering, Published};
use super::table::{Directory, NOBODY};
use super::{Hit, Size};

/// All workers' resident chunks, as an [`IndexWriter`](super::IndexWriter) has them. Cheap to clone, and
/// read by any number of threads.
#[derive(Clone)]
pub struct PrefixIndex(pub(super) Arc<Shared>);

pub(super) struct Shared {
    pub(super) directory: Published<Directory>,
    pub(super) arena: Arena,
    pub(super) counts: Counts,
}

/// Written with each change; apart from what each lookup reads.
#[repr(align(128))]
pub(super) struct Counts {
    pub(super) pairs: AtomicUsize,
    pub(super) version: AtomicU64,
    /// Whether the table names slots that are dead.
    pub(super) dead: AtomicUsize,
}

impl Shared {
    pub(super) fn new(directory: Directory, size: Size) -> Self {
        Self {
            directory: Published::new(directory),
            arena: Arena::new(size.pages, size.page_words),
            counts: Counts {
                pairs: AtomicUsize::new(0),
                version: AtomicU64::new(0),
                dead: AtomicUsize::new(0),
            },
        }
    }

    /// How many of these are alive.
    fn living(&self, directory: &Directory, holders: Holders) -> usize {
        let alive = |slot: super::entry::Slot| {
            let worker = directory.workers.get(usize::from(slot.0));
            worker.is_some_and(|worker| worker.load(Ordering::Relaxed) != NOBODY)
        };
        match holders {
            Holders::Nobody => 0,
            Holders::One(one) => usize::from(alive(one)),
            Holders::Two(one, two) => usize::from(alive(one)) + usize::from(alive(two)),
            Holders::Many(set) => {
                let members = self.arena.members(set);
                if self.counts.dead.load(Ordering::Relaxed) == 0 {
                    members.len()
                } else {
                    members.iter().filter(|slot| alive(*slot)).count()
                }
            }
        }
    }
}

impl PrefixIndex {
    /// Every worker that holds at least the first chunk, with what it holds without a gap, in the order of
    /// their numbers. What is true of gaps, the module says.
    pub fn hits(&self, chunks: &[u64], into: &mut Vec<Hit>) {
        into.clear();
        let shared = &*self.0;
        shared.directory.read(|directory| {
            Lookup::new(directory, &shared.arena, chunks, into).run();
        });
    }

    /// What names a prompt's conversation: its first chunk that fewer than half of `workers` hold.
    /// What nearly everybody holds is a system prompt, which says nothing.
    #[must_use]
    pub fn conversation(&self, chunks: &[u64], workers: usize) -> Option<u64> {
        let shared = &*self.0;
        shared.directory.read(|directory| {
            let mut last = (Holders::Nobody, 0);
            let mut chunks = chunks.iter();
            let rare = chunks.find(|chunk| {
                let holders = directory.entry(**chunk).holders();
                if last.0 != holders {
                    last = (holders, shared.living(directory, holders));
                }
                last.1 * 2 < workers.max(1)
            });
            rare.copied()
        })
    }

    /// How many workers hold this chunk.
    #[must_use]
    pub fn holders(&self, chunk: u64) -> usize {
        let shared = &*self.0;
        let count = |directory: &Directory| {
            let holders = directory.entry(chunk).holders();
            shared.living(directory, holders)
        };
        shared.directory.read(count)
    }

    /// Counts the changes that were made here.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.0.counts.version.load(Ordering::Acquire)
    }

    /// Pairs of a chunk and a worker that holds it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.counts.pairs.load(Ordering::Relaxed)
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for PrefixIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pairs, version) = (self.len(), self.version());
        write!(f, "PrefixIndex {{ pairs: {pairs}, version: {version} }}")
    }
}
