//! What the table says of a chunk, in one word, so that it is read and changed in one step.

use super::MAX_TOKENS;

/// A worker's number in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Slot(pub(super) u16);

/// Where a set stands in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct SetId(pub(super) u32);

/// Who holds a chunk, in the order of their workers. Equal ones are the same workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holders {
    Nobody,
    One(Slot),
    Two(Slot, Slot),
    /// Three or more.
    Many(SetId),
}

/// A chunk's holders, and the tokens up to its end: two bits of kind, 38 of holders, 24 of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub(super) u64);

const TOKENS: u32 = MAX_TOKENS.trailing_ones();
const KIND: u32 = 62;

impl Entry {
    /// Nobody holds it.
    pub(super) const NONE: Self = Self(0);

    /// Nobody's is [`Entry::NONE`]; tokens are cut to [`MAX_TOKENS`].
    pub(super) fn new(holders: Holders, tokens: u32) -> Self {
        let (kind, holders) = match holders {
            Holders::Nobody => return Self::NONE,
            Holders::One(Slot(one)) => (1, u64::from(one)),
            Holders::Two(Slot(one), Slot(two)) => (2, u64::from(one) << 16 | u64::from(two)),
            Holders::Many(SetId(set)) => (3, u64::from(set)),
        };
        Self(kind << KIND | holders << TOKENS | u64::from(tokens.min(MAX_TOKENS)))
    }

    pub(super) const fn holders(self) -> Holders {
        let holders = (self.0 >> TOKENS) as u32;
        let (high, low) = (Slot((holders >> 16) as u16), Slot(holders as u16));
        match self.0 >> KIND {
            0 => Holders::Nobody,
            1 => Holders::One(low),
            2 => Holders::Two(high, low),
            _ => Holders::Many(SetId(holders)),
        }
    }

    pub(super) const fn tokens(self) -> u32 {
        self.0 as u32 & MAX_TOKENS
    }

    /// Whether these are the same workers.
    pub(super) const fn alike(self, other: Self) -> bool {
        self.0 >> TOKENS == other.0 >> TOKENS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_says_what_was_put_into_it() {
        let (least, most) = (Slot(0), Slot(u16::MAX));
        for holders in [
            Holders::One(least),
            Holders::One(most),
            Holders::Two(least, most),
            Holders::Two(most, least),
            Holders::Many(SetId(0)),
            Holders::Many(SetId(u32::MAX)),
        ] {
            for tokens in [0, 1, MAX_TOKENS] {
                let entry = Entry::new(holders, tokens);
                assert_eq!((entry.holders(), entry.tokens()), (holders, tokens));
                assert!(entry.alike(Entry::new(holders, 7)));
                assert!(!entry.alike(Entry::NONE));
            }
        }
    }

    #[test]
    fn of_what_nobody_holds_there_are_no_tokens() {
        assert_eq!(Entry::new(Holders::Nobody, 7), Entry::NONE);
        assert_eq!(Entry::NONE.holders(), Holders::Nobody);
    }

    #[test]
    fn more_tokens_than_fit_are_the_most_that_do() {
        let entry = Entry::new(Holders::One(Slot(7)), u32::MAX);
        assert_eq!(entry.tokens(), MAX_TOKENS);
    }
}
