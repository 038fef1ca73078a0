//! Which worker holds which chunk: what a balancer looks a prompt up in.
//!
//! A map from a chunk's fingerprint to its few holders. Fingerprints are keyed hashes, so they are not
//! hashed again, and holders are kept in order, so that a lookup is linear in what it meets. Bounded:
//! at [`MAX_PAIRS`] nothing more is stored, which costs hits and nothing else.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use forebay_proto::WorkerId;

/// Pairs of a chunk and a worker; three times what a cell is designed for.
pub const MAX_PAIRS: usize = 32 << 20;

/// How much of a prompt one worker holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Who.
    pub worker: WorkerId,
    /// Leading chunks, without a gap.
    pub chunks: u32,
    /// Tokens up to the end of the last of them.
    pub tokens: u32,
}

#[derive(Clone, Copy)]
struct Holder {
    worker: WorkerId,
    tokens: u32,
}

/// Takes a fingerprint for its own hash.
#[derive(Default)]
pub(crate) struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

pub(crate) type Fingerprints<V> = HashMap<u64, V, BuildHasherDefault<Same>>;

/// All workers' resident chunks.
#[derive(Default)]
pub struct PrefixIndex {
    chunks: Fingerprints<Vec<Holder>>,
    pairs: usize,
    version: u64,
}

impl PrefixIndex {
    /// A worker holds a chunk, up to the end of which its prompt has so many tokens.
    pub fn store(&mut self, worker: WorkerId, chunk: u64, tokens: u32) {
        self.version += 1;
        let full = self.pairs >= MAX_PAIRS;
        if full && !self.chunks.contains_key(&chunk) {
            return;
        }
        let holders = self.chunks.entry(chunk).or_default();
        match holders.binary_search_by_key(&worker, |holder| holder.worker) {
            Ok(at) => holders[at].tokens = tokens,
            Err(at) if !full => {
                holders.insert(at, Holder { worker, tokens });
                self.pairs += 1;
            }
            Err(_) => {}
        }
    }

    /// A worker does not hold a chunk any more.
    pub fn remove(&mut self, worker: WorkerId, chunk: u64) {
        self.version += 1;
        let Some(holders) = self.chunks.get_mut(&chunk) else {
            return;
        };
        if let Ok(at) = holders.binary_search_by_key(&worker, |holder| holder.worker) {
            holders.remove(at);
            self.pairs -= 1;
            if holders.is_empty() {
                self.chunks.remove(&chunk);
            }
        }
    }

    /// Nothing is known of a worker any more.
    pub fn clear(&mut self, worker: WorkerId) {
        self.version += 1;
        let pairs = &mut self.pairs;
        self.chunks.retain(|_, holders| {
            let before = holders.len();
            holders.retain(|holder| holder.worker != worker);
            *pairs -= before - holders.len();
            !holders.is_empty()
        });
    }

    /// Counts the changes that were made here.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// Every worker that holds at least the first chunk, with what it holds without a gap.
    pub fn hits(&self, chunks: &[u64], into: &mut Vec<Hit>) {
        into.clear();
        let mut alive = 0;
        for (at, chunk) in (0_u32..).zip(chunks) {
            let Some(holders) = self.chunks.get(chunk) else {
                return;
            };
            if at == 0 {
                into.extend(holders.iter().map(|holder| Hit {
                    worker: holder.worker,
                    chunks: 1,
                    tokens: holder.tokens,
                }));
                alive = into.len();
                continue;
            }
            // Those that go on stand in front, in order as the holders are.
            let mut next = 0;
            let mut holders = holders.iter().peekable();
            for hit in 0..alive {
                let worker = into[hit].worker;
                while holders.next_if(|holder| holder.worker < worker).is_some() {}
                if let Some(holder) = holders.next_if(|holder| holder.worker == worker) {
                    into[hit].chunks = at + 1;
                    into[hit].tokens = into[hit].tokens.max(holder.tokens);
                    into.swap(hit, next);
                    next += 1;
                }
            }
            alive = next;
            if alive == 0 {
                return;
            }
        }
    }

    /// What names a prompt's conversation: its first chunk that fewer than half of `workers` hold.
    /// What nearly everybody holds is a system prompt, which says nothing.
    #[must_use]
    pub fn conversation(&self, chunks: &[u64], workers: usize) -> Option<u64> {
        let mut chunks = chunks.iter();
        chunks
            .find(|chunk| self.holders(**chunk) * 2 < workers.max(1))
            .copied()
    }

    /// How many workers hold this chunk.
    #[must_use]
    pub fn holders(&self, chunk: u64) -> usize {
        self.chunks.get(&chunk).map_or(0, Vec::len)
    }

    /// Pairs of a chunk and a worker that holds it.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.pairs
    }

    /// Whether nothing is known.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.pairs == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Store(u32, u64),
        Remove(u32, u64),
        Clear(u32),
        Hits(Vec<u64>),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (0..4_u32, 0..12_u64).prop_map(|(worker, chunk)| Op::Store(worker, chunk)),
            3 => (0..4_u32, 0..12_u64).prop_map(|(worker, chunk)| Op::Remove(worker, chunk)),
            1 => (0..4_u32).prop_map(Op::Clear),
            4 => (0..12_u64, 1..8_u64).prop_map(|(from, n)| Op::Hits((from..from + n).collect())),
        ]
    }

    proptest! {
        #[test]
        fn it_says_what_a_plain_map_says(ops in proptest::collection::vec(op(), 0..120)) {
            let mut index = PrefixIndex::default();
            let mut plain: BTreeMap<(u32, u64), u32> = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Store(worker, chunk) => {
                        let tokens = chunk as u32 * 10 + 10;
                        index.store(WorkerId(worker), chunk, tokens);
                        plain.insert((worker, chunk), tokens);
                    }
                    Op::Remove(worker, chunk) => {
                        index.remove(WorkerId(worker), chunk);
                        plain.remove(&(worker, chunk));
                    }
                    Op::Clear(worker) => {
                        index.clear(WorkerId(worker));
                        plain.retain(|(held_by, _), _| *held_by != worker);
                    }
                    Op::Hits(chunks) => {
                        let mut hits = Vec::new();
                        index.hits(&chunks, &mut hits);
                        hits.sort_by_key(|hit| hit.worker);
                        let expected: Vec<Hit> = (0..4).filter_map(|worker| {
                            let held: Vec<u32> = chunks.iter().map_while(|chunk| plain.get(&(worker, *chunk)).copied()).collect();
                            let tokens = *held.last()?;
                            Some(Hit { worker: WorkerId(worker), chunks: held.len() as u32, tokens })
                        }).collect();
                        prop_assert_eq!(hits, expected);
                    }
                }
                prop_assert_eq!(index.len(), plain.len());
            }
        }
    }
}
