//! Where sets of slots stand: words in pages that never move. A set is its length, then its members.

use std::sync::OnceLock;

use super::entry::{SetId, Slot};
use super::sync::{AtomicU16, Ordering};

pub(super) struct Arena {
    pages: Box<[OnceLock<Box<[AtomicU16]>>]>,
    /// Words a page are two to the power of this.
    shift: u32,
}

impl Arena {
    pub(super) fn new(pages: usize, page_words: usize) -> Self {
        Self {
            pages: (0..pages).map(|_| OnceLock::new()).collect(),
            shift: page_words.ilog2(),
        }
    }

    /// The members of a set that an entry names.
    pub(super) fn members(&self, set: SetId) -> Members<'_> {
        let (length, words) = self.words(set).split_first().expect("a set has its length");
        Members(&words[..length.load(Ordering::Relaxed).into()])
    }

    /// Writes a set that no entry names, onto a page that is there.
    pub(super) fn write(&self, set: SetId, members: &[Slot]) {
        let length = u16::try_from(members.len()).expect("there are fewer slots");
        let words = self.words(set);
        words[0].store(length, Ordering::Relaxed);
        for (word, Slot(slot)) in words[1..].iter().zip(members) {
            word.store(*slot, Ordering::Relaxed);
        }
    }

    /// Makes a page, if there may be one more.
    pub(super) fn make(&self, page: usize) -> bool {
        let words = || (0..1 << self.shift).map(|_| AtomicU16::new(0)).collect();
        let Some(page) = self.pages.get(page) else {
            return false;
        };
        page.get_or_init(words);
        true
    }

    /// From a set on to the end of its page.
    fn words(&self, SetId(at): SetId) -> &[AtomicU16] {
        let (page, word) = (at >> self.shift, at & ((1 << self.shift) - 1));
        let page = self.pages[page as usize].get();
        &page.expect("a set is written before it is named")[word as usize..]
    }
}

/// The members of a set, in the order of their workers.
#[derive(Clone, Copy)]
pub(super) struct Members<'a>(&'a [AtomicU16]);

impl<'a> Members<'a> {
    pub(super) const fn len(self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(self) -> impl ExactSizeIterator<Item = Slot> + 'a {
        let slot = |word: &AtomicU16| Slot(word.load(Ordering::Relaxed));
        self.0.iter().map(slot)
    }
}
