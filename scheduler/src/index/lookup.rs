//! Who holds how much of a prompt.
//!
//! Looks at some places at once, because to fetch one takes as long as to fetch eight, then at some between
//! each two that are neighbours and differ, until these stand next to each other.

use std::array;

use forebay_proto::WorkerId;

use super::Hit;
use super::arena::Arena;
use super::entry::{Entry, Holders, Slot};
use super::sync::Ordering;
use super::table::{Directory, NOBODY};

/// Parts of a prompt at the ends of which is looked first.
const PARTS: usize = 8;
/// Places that are looked at between two that differ.
const BETWEEN: usize = 3;

pub(super) struct Lookup<'a> {
    directory: &'a Directory,
    arena: &'a Arena,
    chunks: &'a [u64],
    into: &'a mut Vec<Hit>,
    /// The place visited last.
    last: Place,
    /// Chunks that those hold who were last told of.
    told: u32,
}

/// A place in the prompt, and what is said of its chunk.
#[derive(Clone, Copy)]
struct Place {
    at: usize,
    entry: Entry,
}

/// Two places that differ.
#[derive(Clone, Copy)]
struct Span {
    from: Place,
    to: Place,
    /// The holders change more than once between them.
    often: bool,
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
            last: Place {
                at: 0,
                entry: Entry::NONE,
            },
            told: 0,
        }
    }

    pub(super) fn run(mut self) {
        let Some(end) = self.chunks.len().checked_sub(1) else {
            return;
        };
        let step = end.div_ceil(PARTS);
        let places: [Place; PARTS + 1] = self.look(array::from_fn(|n| (n * step).min(end)));
        if places[0].entry == Entry::NONE {
            return;
        }
        self.last = places[0];
        // Over or not, what was visited last is told.
        let _ = self.visit_all(&places);
        self.tell();
    }

    fn look<const N: usize>(&self, places: [usize; N]) -> [Place; N] {
        let entries = self.directory.entries(places.map(|at| self.chunks[at]));
        array::from_fn(|n| Place {
            at: places[n],
            entry: entries[n],
        })
    }

    /// Visits what has to be of what stands between these, the first of which was visited, and the last.
    fn visit_all(&mut self, places: &[Place]) -> Result<(), Over> {
        let nobody = |place: &Place| place.entry == Entry::NONE;
        let end = places.iter().position(nobody).unwrap_or(places.len() - 1);
        let mut spans = [Span::new(&places[0], &places[0]); PARTS];
        let mut differ = 0;
        for pair in places[..=end].windows(2) {
            spans[differ] = Span::new(&pair[0], &pair[1]);
            differ += usize::from(!pair[0].alike(&pair[1]));
        }
        let spans = &mut spans[..differ];
        self.narrow(spans);
        for Span { from, to, often } in spans {
            if *often {
                let [one, two, three] = self.look(from.between(to));
                self.visit_all(&[*from, one, two, three, *to])?;
            } else {
                self.visit(*from)?;
                self.visit(*to)?;
            }
        }
        self.visit(places[end])
    }

    /// Brings the ends of spans next to each other, unless the holders change more than once between them.
    fn narrow(&self, spans: &mut [Span]) {
        // What the next round looks at in a span is fetched while others are looked at.
        let fetch = |span: &Span| {
            let between = span.from.between(&span.to);
            self.directory.fetch(between.map(|at| self.chunks[at]));
        };
        let mut wide = !spans.is_empty();
        spans.iter().for_each(fetch);
        while wide {
            wide = false;
            for span in spans.iter_mut().filter(|span| span.is_wide()) {
                span.narrow(self.look(span.from.between(&span.to)));
                if span.is_wide() {
                    fetch(span);
                    wide = true;
                }
            }
        }
    }

    fn visit(&mut self, place: Place) -> Result<(), Over> {
        if !place.alike(&self.last) {
            self.tell();
            if place.entry == Entry::NONE {
                self.last = place;
                return Err(Over);
            }
        }
        self.last = place;
        Ok(())
    }

    /// Tells of those who hold the place visited last, and all before it, that they do.
    fn tell(&mut self) {
        let Place { at, entry, .. } = self.last;
        let hit = Hit {
            worker: WorkerId(NOBODY),
            chunks: u32::try_from(at + 1).unwrap_or(u32::MAX),
            tokens: entry.tokens(),
        };
        match entry.holders() {
            Holders::Nobody => return,
            Holders::One(one) => self.tell_of(hit, [one].into_iter()),
            Holders::Two(one, two) => self.tell_of(hit, [one, two].into_iter()),
            Holders::Many(set) => self.tell_of(hit, self.arena.members(set).iter()),
        }
        self.told = hit.chunks;
    }

    fn tell_of(&mut self, hit: Hit, slots: impl ExactSizeIterator<Item = Slot>) {
        let workers = &*self.directory.workers;
        let worker = |Slot(slot): Slot| {
            let worker = workers.get(usize::from(slot));
            worker.map_or(NOBODY, |worker| worker.load(Ordering::Relaxed))
        };
        if self.told == 0 {
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
                && found.chunks == self.told
            {
                *found = Hit { worker, ..hit };
            }
        }
    }
}

impl Span {
    const fn new(from: &Place, to: &Place) -> Self {
        Self {
            from: *from,
            to: *to,
            often: false,
        }
    }

    const fn is_wide(&self) -> bool {
        self.to.at - self.from.at > 1 && !self.often
    }

    /// Goes on between two of these, which stand between its ends. Without branches: where the change
    /// is, no processor foresees.
    fn narrow(&mut self, between: [Place; BETWEEN]) {
        let [one, two, three] = between;
        let places = [self.from, one, two, three, self.to];
        let like = |end: &Place| {
            let like = between.map(|it| usize::from(it.alike(end)));
            like.iter().sum()
        };
        let (before, after): (usize, usize) = (like(&self.from), like(&self.to));
        let (left, right) = (places[before], places[before + 1]);
        self.often = before + after != BETWEEN || !left.alike(&self.from) || !right.alike(&self.to);
        if !self.often {
            (self.from, self.to) = (left, right);
        }
    }
}

impl Place {
    /// Places between this one and a later one.
    fn between(&self, to: &Self) -> [usize; BETWEEN] {
        let step = (to.at - self.at).div_ceil(BETWEEN + 1);
        array::from_fn(|n| (self.at + (n + 1) * step).min(to.at))
    }

    const fn alike(&self, other: &Self) -> bool {
        self.entry.alike(other.entry)
    }
}
