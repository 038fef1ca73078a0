//! The table of families as a balancer looks a prompt up in it.

use std::sync::Arc;

use forebay_proto::{Family, WorkerId};

use crate::index::Fingerprints;

/// Where a family is to be held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Homed {
    /// Fingerprint of its last chunk.
    pub chunk: u64,
    /// Its length in chunks.
    pub chunks: u32,
    /// Its length in tokens.
    pub tokens: u32,
    /// Its homes, ascending.
    pub homes: Vec<WorkerId>,
    /// They were chosen by a drain or a rebalance.
    pub pinned: bool,
}

impl Homed {
    /// What a decision is told of it.
    #[must_use]
    pub fn as_asked(&self) -> Homes<'_> {
        Homes {
            chunk: self.chunk,
            tokens: self.tokens,
            workers: &self.homes,
        }
    }
}

/// The family of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Homes<'a> {
    /// Names it.
    pub chunk: u64,
    /// Its length in tokens.
    pub tokens: u32,
    /// Who is to hold it, ascending.
    pub workers: &'a [WorkerId],
}

/// All families of the facts. As bounded as these.
#[derive(Clone, Debug, Default)]
pub struct Table {
    families: Fingerprints<Arc<Homed>>,
    /// Their chunks at their places or behind them; four times as many places, a power of two, zero where none is.
    places: Vec<u64>,
    /// Lengths that there are, the longest first.
    lengths: Vec<u32>,
}

impl Table {
    /// The families that the facts have.
    #[must_use]
    pub fn new<'a>(families: impl IntoIterator<Item = &'a Family>) -> Self {
        let homed = families.into_iter().filter(|family| family.chunks > 0);
        let homed = homed.map(|family| {
            let homed = Homed {
                chunk: family.chunk,
                chunks: family.chunks,
                tokens: family.tokens,
                homes: family.homes.clone(),
                pinned: family.pinned,
            };
            (family.chunk, Arc::new(homed))
        });
        let families: Fingerprints<Arc<Homed>> = homed.collect();
        let mut lengths: Vec<u32> = families.values().map(|family| family.chunks).collect();
        lengths.sort_unstable_by(|one, other| other.cmp(one));
        lengths.dedup();
        let mut places = vec![0; (4 * families.len()).next_power_of_two()];
        for chunk in families.keys().filter(|chunk| **chunk != 0) {
            let mut at = *chunk as usize & (places.len() - 1);
            while places[at] != 0 {
                at = (at + 1) & (places.len() - 1);
            }
            places[at] = *chunk;
        }
        Self {
            families,
            places,
            lengths,
        }
    }

    /// The longest family that a prompt's path begins with.
    #[must_use]
    pub fn of(&self, path: &[u64]) -> Option<&Arc<Homed>> {
        self.all_of(path).next()
    }

    /// Every family that a prompt's path begins with, the longest first.
    pub fn all_of(&self, path: &[u64]) -> impl Iterator<Item = &Arc<Homed>> {
        let lengths = self.lengths.iter().copied();
        lengths.filter_map(move |length| {
            let last = *path.get(length as usize - 1)?;
            let family = self.has(last).then(|| self.families.get(&last))??;
            (family.chunks == length).then_some(family)
        })
    }

    /// Whether a family ends with this chunk. Most chunks are told apart by one look.
    #[inline]
    fn has(&self, chunk: u64) -> bool {
        let mut at = chunk as usize & (self.places.len() - 1);
        loop {
            match self.places[at] {
                0 => return false,
                held if held == chunk => return true,
                _ => at = (at + 1) & (self.places.len() - 1),
            }
        }
    }

    /// Whether this worker is one of this family's homes.
    #[must_use]
    pub fn is_home(&self, chunk: u64, worker: WorkerId) -> bool {
        let family = self.families.get(&chunk);
        family.is_some_and(|family| family.homes.contains(&worker))
    }

    /// How many families there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.families.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.families.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn family(chunk: u64, chunks: u32) -> Family {
        Family {
            pool: "p".into(),
            chunk,
            key_epoch: 1,
            chunks,
            tokens: chunks * 64,
            homes: vec![WorkerId(1), WorkerId(4)],
            saves: 0,
            takes: 0,
            pinned: false,
        }
    }

    #[test]
    fn a_request_belongs_to_the_longest_family_on_its_path() {
        let table = Table::new(&[family(13, 3), family(15, 5), family(24, 4), family(9, 1)]);
        let of = |path: &[u64]| table.of(path).map(|family| family.chunk);
        assert_eq!(of(&[11, 12, 13, 14, 15, 16]), Some(15));
        assert_eq!(of(&[11, 12, 13, 14]), Some(13));
        assert_eq!(of(&[21, 22, 23, 24]), Some(24));
        assert_eq!(of(&[11, 12]), None);
        assert_eq!(of(&[]), None);
        // A chunk at another depth is another path.
        assert_eq!(of(&[11, 13]), None);
        let path = [11, 12, 13, 14, 15];
        let all: Vec<u64> = table.all_of(&path).map(|family| family.chunk).collect();
        assert_eq!(all, [15, 13]);
        assert!(table.is_home(13, WorkerId(4)) && !table.is_home(13, WorkerId(2)));
        assert!(!table.is_home(14, WorkerId(4)));
        assert_eq!((table.len(), Table::default().is_empty()), (4, true));
    }
}
