//! Who holds how much of a prompt.
//!
//! Looks at some places at once, because fetching one takes as long as fetching eight, then between those
//! whose holders differ. Places are visited from the front, so it ends where nobody goes on.

use std::array;

use forebay_proto::WorkerId;

use super::Hit;
use super::arena::{Arena, Members};
use super::entry::{Entry, Holders, Slot};
use super::sync::Ordering;
use super::table::{Directory, NOBODY};

/// Parts that what lies between two places is divided into.
const PARTS: usize = 8;

pub(super) struct Lookup<'a> {
    directory: &'a Directory,
    arena: &'a Arena,
    chunks: &'a [u64],
    into: &'a mut Vec<Hit>,
    /// The last place that was visited: all since `held` have its holders.
    last: Seen,
    /// Chunks that those who go on hold, as far as they are told apart.
    held: u32,
}

#[derive(Clone, Copy)]
struct Seen {
    at: usize,
    entry: Entry,
}

/// Nobody holds what comes next.
struct Over;

impl<'a> Lookup<'a> {
    pub(super) fn new(
        directory: &'a Directory,
        arena: &'a Arena,
        chunks: &'a [u64],
        into: &'a mut Vec<Hit>,
    ) -> Self {
        Self {
            directory,
            arena,
            chunks,
            into,
            last: Seen {
                at: 0,
                entry: Entry::NONE,
            },
            held: 0,
        }
    }

    pub(super) fn run(mut self) {
        let Some(end) = self.chunks.len().checked_sub(1) else {
            return;
        };
        let [first, last] = self.see([0, end]);
        if first.entry.holders == Holders::Nobody {
            return;
        }
        self.last = first;
        // Over or not, what was seen last is told.
        let _ = self.between(first, last);
        self.tell();
    }

    fn see<const N: usize>(&self, places: [usize; N]) -> [Seen; N] {
        let entries = self.directory.entries(places.map(|at| self.chunks[at]));
        array::from_fn(|n| Seen {
            at: places[n],
            entry: entries[n],
        })
    }

    /// Visits what has to be after `from`, which was visited, up to `to`.
    fn between(&mut self, from: Seen, to: Seen) -> Result<(), Over> {
        let gap = to.at - from.at;
        if gap <= 1 || from.entry.holders == to.entry.holders {
            return self.visit(to);
        }
        let step = gap.div_ceil(PARTS);
        let places: [usize; PARTS - 1] = array::from_fn(|n| (from.at + (n + 1) * step).min(to.at));
        let mut from = from;
        for seen in self.see(places) {
            if seen.at == to.at {
                break;
            }
            self.between(from, seen)?;
            from = seen;
        }
        self.between(from, to)
    }

    fn visit(&mut self, seen: Seen) -> Result<(), Over> {
        if seen.entry.holders != self.last.entry.holders {
            self.tell();
            if seen.entry.holders == Holders::Nobody {
                self.last.entry = Entry::NONE;
                return Err(Over);
            }
        }
        self.last = seen;
        Ok(())
    }

    /// Tells of those who hold the place visited last, and all before it, that they do.
    fn tell(&mut self) {
        let Entry { holders, tokens } = self.last.entry;
        let chunks = u32::try_from(self.last.at + 1).unwrap_or(u32::MAX);
        let before = std::mem::replace(&mut self.held, chunks);
        let hit = Hit {
            worker: WorkerId(NOBODY),
            chunks,
            tokens,
        };
        match holders {
            Holders::Nobody => self.held = before,
            Holders::One(one) => self.tell_of(before, hit, [one].into_iter()),
            Holders::Two(one, two) => self.tell_of(before, hit, [one, two].into_iter()),
            Holders::Many(set) => {
                let members: Members<'a> = self.arena.members(set);
                self.tell_of(before, hit, members.iter());
            }
        }
    }

    fn tell_of(&mut self, before: u32, hit: Hit, slots: impl ExactSizeIterator<Item = Slot>) {
        let workers = &*self.directory.workers;
        let worker = |Slot(slot): Slot| {
            let worker = workers.get(usize::from(slot));
            worker.map_or(NOBODY, |worker| worker.load(Ordering::Relaxed))
        };
        if before == 0 {
            let mut dead = false;
            self.into.extend(slots.map(|slot| {
                let worker = WorkerId(worker(slot));
                dead |= worker.0 == NOBODY;
                Hit { worker, ..hit }
            }));
            if dead {
                self.into.retain(|hit| hit.worker.0 != NOBODY);
            }
            return;
        }
        let hits = &mut self.into[..];
        let few = slots.len() * 8 < hits.len();
        let mut from = 0;
        for slot in slots {
            let worker = WorkerId(worker(slot));
            if worker.0 == NOBODY {
                continue;
            }
            let ahead = &hits[from..];
            from += if few {
                ahead.partition_point(|hit| hit.worker < worker)
            } else {
                let at = ahead.iter().position(|hit| hit.worker >= worker);
                at.unwrap_or(ahead.len())
            };
            if let Some(found) = hits.get_mut(from)
                && found.worker == worker
                && found.chunks == before
            {
                *found = Hit { worker, ..hit };
            }
        }
    }
}
