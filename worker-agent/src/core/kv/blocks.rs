//! What an engine's cache holds, by its events: blocks with their copies, and which chunks follow from them.
//!
//! A block is known by its **path**: a keyed hash of its tokens, of what else it was hashed with, and of the
//! path before it. The engine's own hashes are never made again, they only name what is removed. A prompt
//! that was aligned says which paths each of its chunks touches; a chunk is resident while every one of
//! them has a copy. Two prompts may reach one chunk by different blocks behind its end: it is resident by
//! either way, and the newest two are kept.
//!
//! Keyed hashes and counts only: no tokens are kept.

use std::collections::HashMap;
use std::hash::Hasher as _;

use forebay_scheduler::residency::Change;
use siphasher::sip::SipHasher13;

use super::chunks::Chunks;
use super::event::{Event, Place, Stored};

/// Blocks that a map holds; no engine has more.
pub(super) const MAX_BLOCKS: usize = 1 << 21;
/// A block by what is in it and before it.
pub(super) type Path = u64;

/// Where prompts begin.
const ROOT: Path = 0;

/// A chunk of a prompt, aligned: the tokens up to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its fingerprint.
    pub chunk: u64,
    /// Tokens up to its end.
    pub tokens: u32,
}

/// What the engine has under one of its hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// None where it is not known what is before it.
    pub(super) path: Option<Path>,
    pub(super) copies: u32,
}

/// The map. See the module's page.
pub(super) struct Blocks {
    key: [u8; 16],
    block_tokens: Option<u32>,
    held: HashMap<u64, Held>,
    copies: u64,
    chunks: Chunks,
    /// Removals of what was never stored.
    unknown: u64,
}

/// An event contradicts what the map can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// More blocks than any engine has.
    TooMany,
    /// A block's size changed.
    BlockSize,
    /// The model has several caches: one of them says nothing of the others.
    Hybrid,
}

impl Blocks {
    /// The map of an empty cache.
    pub(super) fn new(key: [u8; 16]) -> Self {
        Self {
            key,
            block_tokens: None,
            held: HashMap::new(),
            copies: 0,
            chunks: Chunks::default(),
            unknown: 0,
        }
    }

    /// What paths are hashed with.
    pub(super) const fn key(&self) -> [u8; 16] {
        self.key
    }

    /// Tokens of a block; none before the first is stored.
    pub(super) const fn block_tokens(&self) -> Option<u32> {
        self.block_tokens
    }

    /// Blocks that are there, copies counted.
    pub(super) const fn copies(&self) -> u64 {
        self.copies
    }

    /// The chunks that follow.
    pub(super) const fn chunks(&self) -> &Chunks {
        &self.chunks
    }

    /// Removals of blocks that were never stored, as far as is known.
    pub(super) const fn unknown(&self) -> u64 {
        self.unknown
    }

    /// What became of chunks since this was last asked.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        self.chunks.take_changes()
    }

    /// An event came.
    ///
    /// # Errors
    ///
    /// The map does not hold for this engine, or not any more.
    pub(super) fn apply(&mut self, event: &Event) -> Result<(), Unfit> {
        match event {
            Event::Stored(stored) if counts(stored.place)? => self.store(stored),
            Event::Removed { hashes, place } if counts(*place)? => {
                hashes.iter().for_each(|hash| self.remove(*hash));
                Ok(())
            }
            Event::Stored(_) | Event::Removed { .. } => Ok(()),
            Event::Cleared => {
                self.clear();
                Ok(())
            }
        }
    }

    fn store(&mut self, stored: &Stored) -> Result<(), Unfit> {
        let size = *self.block_tokens.get_or_insert(stored.block_tokens);
        if size != stored.block_tokens {
            return Err(Unfit::BlockSize);
        }
        let size = size as usize;
        // Where blocks were left out, nobody knows whose tokens these are.
        let whole = stored.tokens.len() == stored.hashes.len() * size;
        let mut before = match stored.parent {
            None => Some(ROOT),
            Some(parent) => self.held.get(&parent).and_then(|parent| parent.path),
        };
        before = before.filter(|_| whole);
        let nothing = Vec::new();
        for (at, hash) in stored.hashes.iter().enumerate() {
            if self.copies >= MAX_BLOCKS as u64 {
                return Err(Unfit::TooMany);
            }
            let extras = stored.extras.get(at).unwrap_or(&nothing);
            let path = before.map(|before| {
                let tokens = &stored.tokens[at * size..(at + 1) * size];
                self.path(before, tokens, extras.iter().map(Vec::as_slice))
            });
            let held = self.held.entry(*hash).or_insert(Held { path, copies: 0 });
            held.copies += 1;
            self.copies += 1;
            // By the path that it was stored with first its removal is counted.
            let learnt = held.path.is_none() && path.is_some();
            let copies = if learnt { held.copies } else { 1 };
            held.path = held.path.or(path);
            before = held.path;
            if let Some(path) = before {
                (0..copies).for_each(|_| self.chunks.up(path));
            }
        }
        Ok(())
    }

    fn remove(&mut self, hash: u64) {
        let Some(held) = self.held.get_mut(&hash) else {
            self.unknown += 1;
            return;
        };
        held.copies -= 1;
        self.copies -= 1;
        let path = held.path;
        if held.copies == 0 {
            self.held.remove(&hash);
        }
        if let Some(path) = path {
            self.chunks.down(path, 1);
        }
    }

    fn clear(&mut self) {
        for held in std::mem::take(&mut self.held).into_values() {
            if let Some(path) = held.path {
                self.chunks.down(path, held.copies);
            }
        }
        self.copies = 0;
    }

    /// Forgets everything; what was resident is told to be gone.
    pub(super) fn forget(&mut self) {
        let (key, unknown) = (self.key, self.unknown);
        let mut before = std::mem::replace(self, Self::new(key)).chunks;
        self.chunks = before.forget();
        self.unknown = unknown;
    }

    /// A prompt's tokens are known: its chunks are resident when the blocks that they touch are there.
    /// Those that touch the last block, which is not full, are left out. `scope` is what the prompt's first
    /// block is hashed with beyond its tokens, `adapter` what all of them are.
    pub(super) fn align(
        &mut self,
        chunks: &[Placed],
        ids: &[u32],
        scope: Option<&str>,
        adapter: Option<&str>,
    ) {
        let Some(size) = self.block_tokens else {
            return;
        };
        let needed = chunks.last().map_or(0, |chunk| chunk.tokens.div_ceil(size));
        let paths = self.paths(ids, size, needed, scope, adapter);
        let mut from = 0;
        for Placed { chunk, tokens } in chunks.iter().copied() {
            let to = tokens.div_ceil(size) as usize;
            if to == 0 || to > paths.len() {
                return;
            }
            let first = ((from / size) as usize).min(to - 1);
            from = tokens;
            self.chunks.add_way(chunk, tokens, &paths[first..to]);
        }
    }

    /// The paths of a prompt's first full blocks.
    fn paths(
        &self,
        ids: &[u32],
        size: u32,
        most: u32,
        scope: Option<&str>,
        adapter: Option<&str>,
    ) -> Vec<Path> {
        let mut before = ROOT;
        let blocks = ids.chunks_exact(size as usize).take(most as usize);
        let first = adapter.into_iter().chain(scope);
        blocks
            .enumerate()
            .map(|(at, tokens)| {
                let scoped = first.clone().take(if at == 0 { 2 } else { 0 });
                let other = adapter.into_iter().filter(|_| at > 0);
                let extras = scoped.chain(other).map(str::as_bytes);
                before = self.path(before, tokens, extras);
                before
            })
            .collect()
    }

    fn path<'a>(
        &self,
        before: Path,
        tokens: &[u32],
        extras: impl Iterator<Item = &'a [u8]>,
    ) -> Path {
        let mut hasher = SipHasher13::new_with_key(&self.key);
        hasher.write_u64(before);
        for token in tokens {
            hasher.write_u32(*token);
        }
        for extra in extras {
            hasher.write_u64(extra.len() as u64);
            hasher.write(extra);
        }
        // No path is the root.
        hasher.finish().max(1)
    }

    /// What is held, to go on from: of chunks, those that are resident.
    pub(super) fn kept(&self) -> KeptBlocks {
        let blocks = self.held.iter().map(|(hash, held)| (*hash, *held));
        let ways = self.chunks.ways();
        KeptBlocks {
            key: self.key,
            block_tokens: self.block_tokens.unwrap_or(0),
            blocks: blocks.collect(),
            chunks: ways
                .map(|(chunk, tokens, paths)| (chunk, tokens, paths.into()))
                .collect(),
        }
    }

    /// The map that was kept.
    pub(super) fn restored(kept: &KeptBlocks) -> Self {
        let mut blocks = Self::new(kept.key);
        blocks.block_tokens = (kept.block_tokens > 0).then_some(kept.block_tokens);
        for (hash, held) in kept.blocks.iter().take(MAX_BLOCKS) {
            let copies = u64::from(held.copies);
            let fits = copies > 0 && blocks.copies + copies <= MAX_BLOCKS as u64;
            if !fits || blocks.held.contains_key(hash) {
                continue;
            }
            blocks.held.insert(*hash, *held);
            blocks.copies += copies;
            if let Some(path) = held.path {
                (0..held.copies).for_each(|_| blocks.chunks.up(path));
            }
        }
        for (chunk, tokens, paths) in &kept.chunks {
            blocks.chunks.add_way(*chunk, *tokens, paths);
        }
        blocks
    }
}

/// A map of blocks as it is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct KeptBlocks {
    pub(super) key: [u8; 16],
    /// 0: not known.
    pub(super) block_tokens: u32,
    pub(super) blocks: Vec<(u64, Held)>,
    /// Fingerprint, tokens to its end, the blocks that it touches.
    pub(super) chunks: Vec<(u64, u32, Box<[Path]>)>,
}

/// Whether what is said concerns the cache that prompts are found in.
const fn counts(place: Place) -> Result<bool, Unfit> {
    match place {
        Place { gpu: false, .. } => Ok(false),
        Place { group: 0, .. } => Ok(true),
        Place { .. } => Err(Unfit::Hybrid),
    }
}
