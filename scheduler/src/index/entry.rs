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

/// A chunk's holders, and the tokens up to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) holders: Holders,
    pub(super) tokens: u32,
}

const TOKENS: u32 = MAX_TOKENS.trailing_ones();
const KIND: u32 = 62;

impl Entry {
    pub(super) const NONE: Self = Self {
        holders: Holders::Nobody,
        tokens: 0,
    };

    /// Two bits of kind, 38 of holders, 24 of tokens; nobody and no tokens is zero.
    pub(super) fn pack(self) -> u64 {
        let (kind, holders) = match self.holders {
            Holders::Nobody => (0, 0),
            Holders::One(Slot(one)) => (1, u64::from(one)),
            Holders::Two(Slot(one), Slot(two)) => (2, u64::from(one) << 16 | u64::from(two)),
            Holders::Many(SetId(set)) => (3, u64::from(set)),
        };
        kind << KIND | holders << TOKENS | u64::from(self.tokens.min(MAX_TOKENS))
    }

    pub(super) const fn unpack(word: u64) -> Self {
        let holders = (word >> TOKENS) as u32;
        let (high, low) = (Slot((holders >> 16) as u16), Slot(holders as u16));
        Self {
            holders: match word >> KIND {
                0 => Holders::Nobody,
                1 => Holders::One(low),
                2 => Holders::Two(high, low),
                _ => Holders::Many(SetId(holders)),
            },
            tokens: word as u32 & MAX_TOKENS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_says_what_was_put_into_it() {
        assert_eq!(Entry::NONE.pack(), 0);
        let (least, most) = (Slot(0), Slot(u16::MAX));
        for holders in [
            Holders::Nobody,
            Holders::One(least),
            Holders::One(most),
            Holders::Two(least, most),
            Holders::Two(most, least),
            Holders::Many(SetId(0)),
            Holders::Many(SetId(u32::MAX)),
        ] {
            for tokens in [0, 1, MAX_TOKENS] {
                let entry = Entry { holders, tokens };
                assert_eq!(Entry::unpack(entry.pack()), entry);
            }
        }
    }

    #[test]
    fn more_tokens_than_fit_are_the_most_that_do() {
        let entry = Entry {
            holders: Holders::One(Slot(7)),
            tokens: u32::MAX,
        };
        assert_eq!(Entry::unpack(entry.pack()).tokens, MAX_TOKENS);
    }
}
