//! A shadow of an engine's prefix cache: least recently used chunks go first, from a path's end.
//!
//! It knows prompts as chunks, answers as tokens that take room, and the engine's size. Chunks become
//! resident when their prompt is prefilled, stay while a request uses them, and are then the newest.
//! The size is corrected by what the engine says of each request: an engine that had less than was
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
/// Where no size is stated.
const NOMINAL_TOKENS: u64 = 500_000;

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
    /// Tokens up to the end of a chunk, from 0. The last token of a prompt is never from the cache.
    #[must_use]
    pub fn tokens_at(&self, chunk: usize) -> u32 {
        let end = (chunk as u64 + 1) * u64::from(self.chunk_bytes);
        let tokens = u128::from(self.prompt_tokens) * u128::from(end.min(self.prompt_bytes))
            / u128::from(self.prompt_bytes.max(1));
        u32::try_from(tokens)
            .unwrap_or(u32::MAX)
            .min(self.prompt_tokens.saturating_sub(1))
    }
}

#[derive(Clone, Copy)]
struct Entry {
    /// Tokens up to its end.
    tokens: u32,
    /// Tokens of its own.
    own: u32,
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

    /// A prompt was prefilled: its chunks are resident, and in use until [`Shadow::finished`].
    pub fn prefilled(&mut self, chunks: &[u64], spread: &Spread) {
        let mut before = 0;
        for (at, chunk) in chunks.iter().enumerate() {
            if let Some(entry) = self.entries.get_mut(chunk) {
                if entry.users == 0 {
                    self.unused.remove(&entry.stamp);
                }
                entry.users += 1;
                before = entry.tokens.max(before);
                continue;
            }
            let tokens = spread.tokens_at(at).max(before);
            let own = tokens - before;
            before = tokens;
            let entry = Entry {
                tokens,
                own,
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
    }

    /// A request whose prompt was prefilled is over: nobody uses its chunks for it any more. `beyond`
    /// are the tokens that it leaves behind them: the prompt's end and the answer.
    pub fn finished(&mut self, chunks: &[u64], beyond: u32) {
        if beyond > 0 {
            self.used += u64::from(beyond);
            let stamp = self.tick();
            self.unused.insert(stamp, Unused::Tokens(beyond));
        }
        // From the end: what is nearest to the root is the newest.
        for chunk in chunks.iter().rev() {
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
        } else if reported > predicted.saturating_add(tolerance) {
            GROW
        } else {
            return;
        };
        self.capacity = (self.capacity * factor).clamp(self.stated * LEAST, self.stated * MOST);
        self.evict();
    }

    /// What nobody uses is not believed any more.
    pub fn forget_unused(&mut self) {
        while let Some((_, oldest)) = self.unused.pop_first() {
            self.drop_unused(oldest);
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

    fn evict(&mut self) {
        while self.used as f64 > self.capacity || self.entries.len() > MAX_CHUNKS {
            let Some((_, oldest)) = self.unused.pop_first() else {
                return;
            };
            self.drop_unused(oldest);
        }
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
