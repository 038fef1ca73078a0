//! A shadow of an engine's prefix cache: least recently used chunks go first, from a path's end.
//!
//! It knows prompts as chunks, answers as tokens that take room, and the engine's size. Chunks count as
//! resident from the moment at which their prompt is taken: whatever is taken later runs later, and
//! finds them. They stay while a request uses them, and are then the newest; those of a request that
//! was over before it was prefilled never were. A request takes three steps: [`Shadow::taken`],
//! [`Shadow::prefilled`], [`Shadow::finished`]; or [`Shadow::abandoned`] in place of the last two.
//! Two guesses are corrected by what the engine says of each request: how many tokens its chunks have
//! ([`Shadow::counted`]), and how much fits ([`Shadow::correct`]): an engine that had less than was
//! predicted evicts earlier than its size says, one that had more later.

use std::collections::BTreeMap;

use super::{Change, MAX_CHUNKS};
use crate::index::Fingerprints;

/// Least and most of the engine's stated size that is believed.
const LEAST: f64 = 0.25;
const MOST: f64 = 1.25;
/// How fast the size is corrected, for each answer.
const SHRINK: f64 = 0.98;
const GROW: f64 = 1.005;
/// Emptier than this, it is not for its size that the shadow did not have something.
const FULL: f64 = 0.9;
/// Where no size is stated.
const NOMINAL_TOKENS: u64 = 500_000;
/// What may be let go, chunks and tokens beyond them, however large an engine says that it is.
pub(super) const MAX_UNUSED: usize = 2 * MAX_CHUNKS;

/// How a prompt's tokens lie on its chunks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Tokens of the prompt: the engine's count, or an estimate.
    pub prompt_tokens: u32,
    /// Bytes of its canonical form.
    pub prompt_bytes: u64,
    /// Bytes of one chunk.
    pub chunk_bytes: u32,
}

impl Spread {
    /// Tokens up to the end of a chunk, counted from 0, where `known` chunks are known to have
    /// `tokens`; the others share the rest by their bytes. The last token of a prompt is never from
    /// the cache.
    #[must_use]
    pub fn tokens_at(&self, chunk: usize, (known, tokens): (usize, u32)) -> u32 {
        let bytes =
            |chunks: usize| (chunks as u64 * u64::from(self.chunk_bytes)).min(self.prompt_bytes);
        let (from, to) = (bytes(known), bytes(chunk + 1));
        let rest = u128::from(self.prompt_tokens.saturating_sub(tokens));
        let beyond = rest * u128::from(to.saturating_sub(from))
            / u128::from((self.prompt_bytes - from).max(1));
        let beyond = u32::try_from(beyond).unwrap_or(u32::MAX);
        let most = self.prompt_tokens.saturating_sub(1);
        tokens.saturating_add(beyond).min(most)
    }
}

#[derive(Clone, Copy)]
struct Entry {
    /// Tokens up to its end.
    tokens: u32,
    /// Tokens of its own.
    own: u32,
    /// Its tokens follow from an engine's count, not from an estimate.
    counted: bool,
    /// A prompt that has it was prefilled.
    filled: bool,
    users: u32,
    /// Place in the order of use, while nobody uses it.
    stamp: u64,
}

#[derive(Clone, Copy)]
enum Unused {
    Chunk(u64),
    /// Tokens of an answer, or of a prompt's end.
    Tokens(u32),
}

/// Something that takes room, as a [`Kept`] has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptItem {
    /// A chunk of prompts.
    Chunk {
        /// Its fingerprint.
        chunk: u64,
        /// Tokens up to its end.
        tokens: u32,
        /// Tokens of its own.
        own: u32,
        /// They follow from an engine's count, not from an estimate.
        counted: bool,
    },
    /// Tokens of an answer, or of a prompt's end.
    Tokens(u32),
}

/// What a shadow holds: enough to go on from, beside an engine that ran on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kept {
    /// Tokens that fit, as far as was learnt.
    pub capacity: f64,
    /// At most [`MAX_CHUNKS`], least recently used first.
    pub items: Vec<KeptItem>,
}

/// See the module's page.
pub struct Shadow {
    stated: f64,
    capacity: f64,
    used: u64,
    entries: Fingerprints<Entry>,
    /// Oldest first.
    unused: BTreeMap<u64, Unused>,
    clock: u64,
    changes: Vec<Change>,
}

impl Shadow {
    /// The shadow of an empty cache of so many tokens; 0: not stated.
    #[must_use]
    pub fn new(kv_tokens: u64) -> Self {
        let stated = if kv_tokens == 0 {
            NOMINAL_TOKENS
        } else {
            kv_tokens
        } as f64;
        Self {
            stated,
            capacity: stated,
            used: 0,
            entries: Fingerprints::default(),
            unused: BTreeMap::new(),
            clock: 0,
            changes: Vec::new(),
        }
    }

    /// What is held of those requests that are over, and of those that run as if they were: their
    /// prompts that are prefilled are the newest, and from what is not prefilled nothing stays.
    #[must_use]
    pub fn kept(&self) -> Kept {
        let item = |chunk: u64, entry: &Entry| KeptItem::Chunk {
            chunk,
            tokens: entry.tokens,
            own: entry.own,
            counted: entry.counted,
        };
        let unused = self.unused.values().filter_map(|unused| match unused {
            Unused::Tokens(tokens) => Some(KeptItem::Tokens(*tokens)),
            Unused::Chunk(chunk) => self.entries.get(chunk).map(|entry| item(*chunk, entry)),
        });
        let mut used: Vec<_> = self.entries.iter().collect();
        used.retain(|(_, entry)| entry.users > 0 && entry.filled);
        // A path's end goes first.
        used.sort_unstable_by_key(|(chunk, entry)| (std::cmp::Reverse(entry.tokens), **chunk));
        let used = used.into_iter().map(|(chunk, entry)| item(*chunk, entry));
        let mut items: Vec<_> = unused.chain(used).collect();
        items.drain(..items.len().saturating_sub(MAX_CHUNKS));
        Kept {
            capacity: self.capacity,
            items,
        }
    }

    /// The shadow of a cache of so many tokens that holds what was kept, as far as it fits.
    #[must_use]
    pub fn restored(kv_tokens: u64, kept: &Kept) -> Self {
        let mut shadow = Self::new(kv_tokens);
        if kept.capacity.is_finite() {
            let (least, most) = (shadow.stated * LEAST, shadow.stated * MOST);
            shadow.capacity = kept.capacity.clamp(least, most);
        }
        let excess = kept.items.len().saturating_sub(MAX_CHUNKS);
        for item in &kept.items[excess..] {
            let stamp = shadow.tick();
            match *item {
                KeptItem::Tokens(tokens) => {
                    shadow.used += u64::from(tokens);
                    shadow.unused.insert(stamp, Unused::Tokens(tokens));
                }
                KeptItem::Chunk { chunk, .. } if shadow.entries.contains_key(&chunk) => {}
                KeptItem::Chunk {
                    chunk,
                    tokens,
                    own,
                    counted,
                } => {
                    let entry = Entry {
                        tokens,
                        own,
                        counted,
                        filled: true,
                        users: 0,
                        stamp,
                    };
                    shadow.entries.insert(chunk, entry);
                    shadow.used += u64::from(own);
                    shadow.unused.insert(stamp, Unused::Chunk(chunk));
                    shadow.changes.push(Change::Stored { chunk, tokens });
                }
            }
        }
        shadow.evict();
        shadow
    }

    /// Leading chunks that are resident, and the tokens up to their end.
    #[must_use]
    pub fn hit(&self, chunks: &[u64]) -> (usize, u32) {
        let mut hit = (0, 0);
        for (at, chunk) in chunks.iter().enumerate() {
            let Some(entry) = self.entries.get(chunk) else {
                break;
            };
            hit = (at + 1, entry.tokens.max(hit.1));
        }
        hit
    }

    /// Tokens up to the end of this chunk, if it is resident.
    #[must_use]
    pub fn tokens_to(&self, chunk: u64) -> Option<u32> {
        self.entries.get(&chunk).map(|entry| entry.tokens)
    }

    /// A prompt was taken: its chunks are in use until [`Shadow::finished`] or [`Shadow::abandoned`].
    /// Returns how many of them; fewer than all where no more fit the shadow.
    pub fn taken(&mut self, chunks: &[u64], spread: &Spread) -> usize {
        let known = self.hit(chunks);
        let mut before = 0;
        for (at, chunk) in chunks.iter().enumerate() {
            if self.hold(*chunk) {
                before = self.entries[chunk].tokens.max(before);
                continue;
            }
            while self.entries.len() >= MAX_CHUNKS {
                if !self.evict_oldest() {
                    return at;
                }
            }
            let tokens = spread.tokens_at(at, known).max(before);
            let own = tokens - before;
            before = tokens;
            let entry = Entry {
                tokens,
                own,
                counted: false,
                filled: false,
                users: 1,
                stamp: 0,
            };
            self.entries.insert(*chunk, entry);
            self.used += u64::from(own);
            self.changes.push(Change::Stored {
                chunk: *chunk,
                tokens,
            });
        }
        self.evict();
        chunks.len()
    }

    /// A prompt that was taken is prefilled.
    pub fn prefilled(&mut self, chunks: &[u64]) {
        for chunk in chunks {
            if let Some(entry) = self.entries.get_mut(chunk) {
                entry.filled = true;
            }
        }
    }

    /// A request is over before its prompt was prefilled: what nobody else brought is not there.
    pub fn abandoned(&mut self, chunks: &[u64], held: usize) {
        for chunk in chunks[..held].iter().rev() {
            let stamp = self.tick();
            let Some(entry) = self.entries.get_mut(chunk).filter(|entry| entry.users > 0) else {
                continue;
            };
            entry.users -= 1;
            if entry.users > 0 {
                continue;
            }
            entry.stamp = stamp;
            if entry.filled {
                self.unused.insert(stamp, Unused::Chunk(*chunk));
            } else {
                self.drop_unused(Unused::Chunk(*chunk));
            }
        }
    }

    /// The engine counted the tokens of this prompt: estimates of its chunks give way to that.
    pub fn counted(&mut self, chunks: &[u64], spread: &Spread) {
        let mut known = (0, 0);
        let mut before = 0;
        for (at, chunk) in chunks.iter().enumerate() {
            let Some(entry) = self.entries.get_mut(chunk) else {
                break;
            };
            if entry.counted {
                before = entry.tokens.max(before);
                known = (at + 1, before);
                continue;
            }
            let tokens = spread.tokens_at(at, known).max(before);
            let own = tokens - before;
            before = tokens;
            self.used = self.used - u64::from(entry.own) + u64::from(own);
            if entry.tokens != tokens {
                self.changes.push(Change::Stored {
                    chunk: *chunk,
                    tokens,
                });
            }
            entry.tokens = tokens;
            entry.own = own;
            entry.counted = true;
        }
        self.evict();
    }

    /// A request is over: nobody uses the `held` first of its chunks for it any more. `beyond` are the
    /// tokens that it leaves behind them: the prompt's end and the answer.
    pub fn finished(&mut self, chunks: &[u64], held: usize, beyond: u32) {
        if beyond > 0 {
            self.used += u64::from(beyond);
            let stamp = self.tick();
            self.unused.insert(stamp, Unused::Tokens(beyond));
        }
        // From the end: what is nearest to the root is the newest.
        for chunk in chunks[..held].iter().rev() {
            let stamp = self.tick();
            if let Some(entry) = self.entries.get_mut(chunk)
                && entry.users > 0
            {
                entry.users -= 1;
                if entry.users == 0 {
                    entry.stamp = stamp;
                    self.unused.insert(stamp, Unused::Chunk(*chunk));
                }
            }
        }
        self.evict();
    }

    /// The engine said what it had of a prompt, where `predicted` was expected; both in tokens.
    /// Differences up to `tolerance` are the grain of chunks and blocks.
    pub fn correct(&mut self, predicted: u32, reported: u32, tolerance: u32) {
        let factor = if predicted > reported.saturating_add(tolerance) {
            SHRINK
        } else if reported > predicted.saturating_add(tolerance)
            && self.used as f64 >= self.capacity * FULL
        {
            GROW
        } else {
            return;
        };
        self.capacity = (self.capacity * factor).clamp(self.stated * LEAST, self.stated * MOST);
        self.evict();
    }

    /// A point in the order of use: what is used from here on is newer.
    #[must_use]
    pub const fn mark(&self) -> u64 {
        self.clock
    }

    /// What was last used before a [`Shadow::mark`] is not believed any more.
    pub fn forget_before(&mut self, mark: u64) {
        while let Some(oldest) = self.unused.first_entry()
            && *oldest.key() <= mark
        {
            let unused = oldest.remove();
            self.drop_unused(unused);
        }
    }

    /// What changed since this was last asked.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// Tokens that are taken, and those that fit.
    #[must_use]
    pub fn tokens(&self) -> (u64, u64) {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // far below 2^53
        let capacity = self.capacity as u64;
        (self.used, capacity)
    }

    /// What is resident, with the tokens up to each end.
    pub fn resident(&self) -> impl Iterator<Item = (u64, u32)> {
        let entries = self.entries.iter();
        entries.map(|(chunk, entry)| (*chunk, entry.tokens))
    }

    /// Chunks that are resident.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no chunk is resident.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Takes a chunk into use, if it is resident.
    fn hold(&mut self, chunk: u64) -> bool {
        let Some(entry) = self.entries.get_mut(&chunk) else {
            return false;
        };
        if entry.users == 0 {
            self.unused.remove(&entry.stamp);
        }
        entry.users += 1;
        true
    }

    fn evict(&mut self) {
        while (self.used as f64 > self.capacity || self.unused.len() > MAX_UNUSED)
            && self.evict_oldest()
        {}
    }

    /// Returns whether there was anything that nobody uses.
    fn evict_oldest(&mut self) -> bool {
        let oldest = self.unused.pop_first();
        if let Some((_, unused)) = oldest {
            self.drop_unused(unused);
        }
        oldest.is_some()
    }

    fn drop_unused(&mut self, unused: Unused) {
        match unused {
            Unused::Tokens(tokens) => self.used -= u64::from(tokens),
            Unused::Chunk(chunk) => {
                if let Some(entry) = self.entries.remove(&chunk) {
                    self.used -= u64::from(entry.own);
                    self.changes.push(Change::Removed { chunk });
                }
            }
        }
    }
}
