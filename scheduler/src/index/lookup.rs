//! Who holds how much of a prompt.
//!
//! Looks at some places at once, because to fetch several takes little longer than to fetch one, then
//! bisects between each two that are neighbours and differ, until these stand next to each other.

use std::array;

use forebay_proto::WorkerId;

use super::Hit;
use super::arena::Arena;
use super::entry::{Entry, Holders, Slot};
use super::sync::Ordering;
use super::table::{Directory, NOBODY};

/// Parts of a prompt at the ends of which is looked first.
const PARTS: usize = 8;

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
        let ahead: [usize; PARTS + 1] = array::from_fn(|n| (n * step).min(end));
        for at in ahead {
            self.directory.fetch(self.chunks[at]);
        }
        let mut places = [self.last; PARTS + 1];
        let mut seen = 0;
        for at in ahead {
            places[seen] = self.look(at);
            seen += 1;
            if places[seen - 1].entry == Entry::NONE {
                break;
            }
        }
        let places = &places[..seen];
        if places[0].entry == Entry::NONE {
            return;
        }
        self.last = places[0];
        // Over or not, what was visited last is told.
        let _ = self.visit_all(places);
        self.tell();
    }

    fn look(&self, at: usize) -> Place {
        let entry = self.directory.entry(self.chunks[at]);
        Place { at, entry }
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
                let middle = self.look(from.middle(to));
                self.visit_all(&[*from, middle, *to])?;
            } else {
                self.visit(*from)?;
                self.visit(*to)?;
            }
        }
        self.visit(places[end])
    }

    /// Brings the ends of spans next to each other, unless the holders change more than once between them.
    fn narrow(&self, spans: &mut [Span]) {
        // What the next two looks into a span may be at is fetched while others are looked into: it takes
        // hardly longer than to fetch the first, and the second need not wait for what that says.
        let fetch = |span: &Span| {
            for at in span.next_looks() {
                self.directory.fetch(self.chunks[at]);
            }
        };
        let mut wide = !spans.is_empty();
        spans.iter().for_each(fetch);
        while wide {
            wide = false;
            for span in spans.iter_mut().filter(|span| span.is_wide()) {
                for _ in 0..2 {
                    if span.is_wide() {
                        let middle = self.look(span.from.middle(&span.to));
                        span.narrow(middle);
                    }
                }
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

    /// The middle, and those of both halves.
    const fn next_looks(&self) -> [usize; 3] {
        let (from, to) = (self.from.at, self.to.at);
        let middle = from.midpoint(to);
        [middle, from.midpoint(middle), middle.midpoint(to)]
    }

    const fn is_wide(&self) -> bool {
        self.to.at - self.from.at > 1 && !self.often
    }

    /// Goes on in the half in which the change is. Without branches: no processor foresees which it is.
    fn narrow(&mut self, middle: Place) {
        let (before, after) = (middle.alike(&self.from), middle.alike(&self.to));
        let [from, to] = [[self.from, middle], [self.to, middle]];
        self.from = from[usize::from(before)];
        self.to = to[usize::from(after)];
        self.often = !before && !after;
    }
}

impl Place {
    const fn middle(&self, to: &Self) -> usize {
        self.at.midpoint(to.at)
    }

    const fn alike(&self, other: &Self) -> bool {
        self.entry.alike(other.entry)
    }
}
