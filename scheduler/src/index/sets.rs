//! Sets of three slots and more, each kept once, with the number of chunks that name it. The writer's;
//! readers see members in the arena.
//!
//! A set that no chunk names is retired, not reused: a reader may have met its name before. Who knows
//! that none has frees it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::entry::{Holders, SetId, Slot};
use super::fingerprints::Fingerprints;
use super::reader::Shared;
use super::slots::Slots;

pub(super) struct Sets {
    shared: Arc<Shared>,
    page_words: u32,
    /// Words in use or free, those never used not counted.
    used: u32,
    known: HashMap<SetId, Known>,
    by_content: Fingerprints<SetId>,
    /// Rooms to be had again, by their words.
    free: BTreeMap<u32, Vec<SetId>>,
    retired: Vec<Retired>,
    retired_words: usize,
    last: Option<Step>,
    members: Vec<Slot>,
}

struct Known {
    content: u64,
    /// Chunks that name it.
    named: u32,
    words: u32,
}

/// A set that no chunk names any more.
pub(super) struct Retired {
    set: SetId,
    words: u32,
}

/// The last change of a set. A path's chunks mostly have the same holders, and change alike.
#[derive(Clone, Copy)]
struct Step {
    adds: bool,
    from: Holders,
    slot: Slot,
    to: Holders,
}

/// The arena has no room for one more set.
pub(super) struct Full;

impl Sets {
    pub(super) fn new(shared: Arc<Shared>, page_words: usize) -> Self {
        Self {
            shared,
            page_words: u32::try_from(page_words).expect("a page is small"),
            used: 0,
            known: HashMap::new(),
            by_content: Fingerprints::default(),
            free: BTreeMap::new(),
            retired: Vec::new(),
            retired_words: 0,
            last: None,
            members: Vec::new(),
        }
    }

    /// The holders with one more, named once; the same if it is one of them. What is replaced by it has
    /// then to be released.
    pub(super) fn with(
        &mut self,
        from: Holders,
        slot: Slot,
        slots: &Slots,
    ) -> Result<Holders, Full> {
        self.step(true, from, slot, slots)
    }

    /// The holders with one less, named once; the same if it is none of them. What is replaced by it has
    /// then to be released.
    pub(super) fn without(
        &mut self,
        from: Holders,
        slot: Slot,
        slots: &Slots,
    ) -> Result<Holders, Full> {
        self.step(false, from, slot, slots)
    }

    /// The holders that are alive, named once. What is replaced by it has then to be released.
    pub(super) fn living(&mut self, from: Holders, slots: &Slots) -> Result<Holders, Full> {
        self.list(from);
        let before = self.members.len();
        self.members.retain(|slot| !slots.is_dead(*slot));
        if self.members.len() == before {
            Ok(self.named(from))
        } else {
            self.of_members()
        }
    }

    /// A chunk does not name these any more.
    pub(super) fn release(&mut self, holders: Holders) {
        let Holders::Many(set) = holders else { return };
        let known = self.known.get_mut(&set).expect("a named set is known");
        known.named -= 1;
        if known.named > 0 {
            return;
        }
        let Known { content, words, .. } = self.known.remove(&set).expect("it was there");
        if self.by_content.get(&content) == Some(&set) {
            self.by_content.remove(&content);
        }
        let names = |step: &Step| step.from == holders || step.to == holders;
        self.last = self.last.filter(|last| !names(last));
        self.retired_words += words as usize;
        self.retired.push(Retired { set, words });
    }

    /// A slot has another owner, and with that another place in sets to come.
    pub(super) const fn reordered(&mut self) {
        self.last = None;
    }

    /// Words of sets that were retired and not taken over yet.
    pub(super) const fn retired_words(&self) -> usize {
        self.retired_words
    }

    /// Hands over what was retired, for [`Sets::free`] when no reader can see it.
    pub(super) fn take_retired(&mut self) -> Vec<Retired> {
        self.retired_words = 0;
        std::mem::take(&mut self.retired)
    }

    pub(super) fn free(&mut self, Retired { set, words }: Retired) {
        self.free.entry(words).or_default().push(set);
    }

    /// The slots of `holders`, in order.
    pub(super) fn members(&mut self, holders: Holders) -> &[Slot] {
        self.list(holders);
        &self.members
    }

    fn list(&mut self, holders: Holders) {
        self.members.clear();
        match holders {
            Holders::Nobody => {}
            Holders::One(one) => self.members.push(one),
            Holders::Two(one, two) => self.members.extend([one, two]),
            Holders::Many(set) => self.members.extend(self.shared.arena.members(set).iter()),
        }
    }

    fn step(
        &mut self,
        adds: bool,
        from: Holders,
        slot: Slot,
        slots: &Slots,
    ) -> Result<Holders, Full> {
        let same = |last: &&Step| (last.adds, last.from, last.slot) == (adds, from, slot);
        if let Some(Step { to, .. }) = self.last.as_ref().filter(same) {
            return Ok(self.named(*to));
        }
        self.list(from);
        let rank = |slot: &Slot| slots.rank(*slot);
        let found = self.members.binary_search_by_key(&rank(&slot), rank);
        let to = match (adds, found) {
            (true, Ok(_)) | (false, Err(_)) => self.named(from),
            (true, Err(at)) => {
                self.members.insert(at, slot);
                self.of_members()?
            }
            (false, Ok(at)) => {
                self.members.remove(at);
                self.of_members()?
            }
        };
        self.last = Some(Step {
            adds,
            from,
            slot,
            to,
        });
        Ok(to)
    }

    /// The same, named once more.
    fn named(&mut self, holders: Holders) -> Holders {
        if let Holders::Many(set) = holders {
            self.known
                .get_mut(&set)
                .expect("a named set is known")
                .named += 1;
        }
        holders
    }

    fn of_members(&mut self) -> Result<Holders, Full> {
        Ok(match self.members[..] {
            [] => Holders::Nobody,
            [one] => Holders::One(one),
            [one, two] => Holders::Two(one, two),
            _ => Holders::Many(self.intern()?),
        })
    }

    fn intern(&mut self) -> Result<SetId, Full> {
        let content = content(&self.members);
        if let Some(set) = self.by_content.get(&content) {
            let members = self.shared.arena.members(*set);
            if members.iter().eq(self.members.iter().copied()) {
                self.known
                    .get_mut(set)
                    .expect("it is found by content")
                    .named += 1;
                return Ok(*set);
            }
        }
        let words = room(u32::try_from(self.members.len()).expect("there are fewer slots") + 1);
        let set = self.room(words.min(self.page_words)).ok_or(Full)?;
        self.shared.arena.write(set, &self.members);
        let known = Known {
            content,
            named: 1,
            words: words.min(self.page_words),
        };
        self.known.insert(set, known);
        // Two sets of one hash: the older is not found again, so it may come to be kept twice.
        self.by_content.insert(content, set);
        Ok(set)
    }

    fn room(&mut self, words: u32) -> Option<SetId> {
        if let Some(set) = self.free.get_mut(&words).and_then(Vec::pop) {
            return Some(set);
        }
        let left = self.used.next_multiple_of(self.page_words) - self.used;
        if left < words {
            let page = self.used.div_ceil(self.page_words);
            if !self.shared.arena.make(page as usize) {
                return None;
            }
            if left > 0 {
                self.free.entry(left).or_default().push(SetId(self.used));
            }
            self.used = page * self.page_words;
        }
        let set = SetId(self.used);
        self.used += words;
        Some(set)
    }
}

/// Words that are put aside for so many, an eighth more at most: freed rooms fit again.
const fn room(words: u32) -> u32 {
    let step = 1 << words.ilog2().saturating_sub(3);
    words.next_multiple_of(step)
}

fn content(members: &[Slot]) -> u64 {
    members
        .iter()
        .fold(0, |all, Slot(slot)| all ^ mixed(u64::from(*slot) + 1))
}

/// The finalizer of splitmix64.
const fn mixed(mut value: u64) -> u64 {
    value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
