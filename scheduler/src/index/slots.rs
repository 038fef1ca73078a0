//! Workers by small numbers, and how many chunks each holds. The writer's, but for what tells readers
//! whose a number is.

use std::collections::HashMap;
use std::sync::Arc;

use forebay_proto::WorkerId;

use super::entry::Slot;
use super::sync::{AtomicU32, Ordering};
use super::table::NOBODY;

pub(super) struct Slots {
    limit: usize,
    workers: Arc<[AtomicU32]>,
    owners: Vec<Owner>,
    slots: HashMap<WorkerId, Slot>,
    free: Vec<Slot>,
    /// Chunks that the table says dead slots hold.
    dead_pairs: usize,
}

/// Whose a slot is, or was until it is another's: sets keep their order.
struct Owner {
    worker: WorkerId,
    pairs: usize,
    dead: bool,
}

/// What a cleared worker leaves.
pub(super) enum Left {
    /// Its slot is in the table.
    Swept(Slot),
    /// No chunk; readers may still see its slot.
    Seen(Slot),
}

impl Slots {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            workers: nobody(limit.min(64)),
            owners: Vec::new(),
            slots: HashMap::new(),
            free: Vec::new(),
            dead_pairs: 0,
        }
    }

    /// For readers: whose each slot is.
    pub(super) fn workers(&self) -> Arc<[AtomicU32]> {
        self.workers.clone()
    }

    pub(super) fn of(&self, worker: WorkerId) -> Option<Slot> {
        self.slots.get(&worker).copied()
    }

    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty() && self.owners.len() >= self.limit
    }

    /// A slot for a worker that has none, if one is left, and whether readers need [`Slots::workers`] anew.
    pub(super) fn take(&mut self, worker: WorkerId) -> Option<(Slot, bool)> {
        if self.is_full() || worker.0 == NOBODY {
            return None;
        }
        let owner = Owner {
            worker,
            pairs: 0,
            dead: false,
        };
        let new = || u16::try_from(self.owners.len()).expect("there are at most so many slots");
        let slot = self.free.pop().unwrap_or_else(|| Slot(new()));
        let at = usize::from(slot.0);
        if at == self.owners.len() {
            self.owners.push(owner);
        } else {
            self.owners[at] = owner;
        }
        self.slots.insert(worker, slot);
        let grown = at >= self.workers.len();
        if grown {
            let more = nobody(self.limit.min(at * 2 + 1));
            for (new, old) in more.iter().zip(self.workers.iter()) {
                new.store(old.load(Ordering::Relaxed), Ordering::Relaxed);
            }
            self.workers = more;
        }
        self.workers[at].store(worker.0, Ordering::Release);
        Some((slot, grown))
    }

    /// Takes a worker's slot from it: from here on readers pass over it.
    pub(super) fn kill(&mut self, worker: WorkerId) -> Option<Left> {
        let slot = self.slots.remove(&worker)?;
        let at = usize::from(slot.0);
        self.workers[at].store(NOBODY, Ordering::Release);
        let owner = &mut self.owners[at];
        owner.dead = true;
        self.dead_pairs += owner.pairs;
        Some(if owner.pairs > 0 {
            Left::Swept(slot)
        } else {
            Left::Seen(slot)
        })
    }

    /// Nobody sees this dead slot any more.
    pub(super) fn free(&mut self, slot: Slot) {
        let owner = &self.owners[usize::from(slot.0)];
        assert!(owner.dead && owner.pairs == 0, "a slot in use is freed");
        self.free.push(slot);
    }

    pub(super) fn is_dead(&self, slot: Slot) -> bool {
        self.owners[usize::from(slot.0)].dead
    }

    /// What sets are ordered by.
    pub(super) fn rank(&self, slot: Slot) -> (WorkerId, Slot) {
        (self.owners[usize::from(slot.0)].worker, slot)
    }

    /// A chunk more is said to be held by a live slot.
    pub(super) fn add(&mut self, slot: Slot) {
        self.owners[usize::from(slot.0)].pairs += 1;
    }

    /// A chunk less is said to be held by a slot.
    pub(super) fn subtract(&mut self, slot: Slot) {
        let owner = &mut self.owners[usize::from(slot.0)];
        owner.pairs -= 1;
        if owner.dead {
            self.dead_pairs -= 1;
        }
    }

    pub(super) const fn dead_pairs(&self) -> usize {
        self.dead_pairs
    }
}

fn nobody(slots: usize) -> Arc<[AtomicU32]> {
    (0..slots).map(|_| AtomicU32::new(NOBODY)).collect()
}
