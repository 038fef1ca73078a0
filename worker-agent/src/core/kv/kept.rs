//! A map of blocks as bytes: what a restarted agent goes on from. Keyed hashes and counts, nothing else.

use super::blocks::{Held, KeptBlocks, MAX_BLOCKS};
use crate::core::map::take;

/// Chunks of one map, each with no more than two ways.
const MAX_WAYS: usize = 2 * forebay_scheduler::residency::MAX_CHUNKS;
/// A chunk of 32,768 bytes has no more blocks.
const MAX_PATHS: usize = 1 << 15;

/// A map as it is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeptExact {
    /// The newest batch that is in it.
    pub(super) last: Option<u64>,
    /// Everything that is in the cache is in it.
    pub(super) complete: bool,
    pub(super) blocks: KeptBlocks,
}

impl KeptExact {
    /// Appends it.
    pub(crate) fn encode(&self, bytes: &mut Vec<u8>) {
        let KeptBlocks {
            key,
            block_tokens,
            blocks,
            chunks,
        } = &self.blocks;
        bytes.push(u8::from(self.complete) | u8::from(self.last.is_some()) << 1);
        bytes.extend_from_slice(&self.last.unwrap_or(0).to_le_bytes());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(&block_tokens.to_le_bytes());
        bytes.extend_from_slice(&number(blocks.len()));
        for (hash, held) in blocks {
            bytes.extend_from_slice(&hash.to_le_bytes());
            // No path is 0.
            bytes.extend_from_slice(&held.path.unwrap_or(0).to_le_bytes());
            bytes.extend_from_slice(&held.copies.to_le_bytes());
        }
        bytes.extend_from_slice(&number(chunks.len()));
        for (chunk, tokens, paths) in chunks {
            bytes.extend_from_slice(&chunk.to_le_bytes());
            bytes.extend_from_slice(&tokens.to_le_bytes());
            bytes.extend_from_slice(&number(paths.len()));
            for path in paths {
                bytes.extend_from_slice(&path.to_le_bytes());
            }
        }
    }

    /// Takes it from the front of these bytes; `None`: they are something else.
    pub(crate) fn decode(rest: &mut &[u8]) -> Option<Self> {
        let [flags] = take(rest)?;
        let last = u64::from_le_bytes(take(rest)?);
        let key = take(rest)?;
        let block_tokens = u32::from_le_bytes(take(rest)?);
        let count = length(rest, MAX_BLOCKS, 20)?;
        let mut blocks = Vec::with_capacity(count);
        for _ in 0..count {
            let hash = u64::from_le_bytes(take(rest)?);
            let path = u64::from_le_bytes(take(rest)?);
            let copies = u32::from_le_bytes(take(rest)?);
            let path = (path != 0).then_some(path);
            blocks.push((hash, Held { path, copies }));
        }
        let count = length(rest, MAX_WAYS, 16)?;
        let mut chunks = Vec::with_capacity(count);
        for _ in 0..count {
            let chunk = u64::from_le_bytes(take(rest)?);
            let tokens = u32::from_le_bytes(take(rest)?);
            let count = length(rest, MAX_PATHS, 8)?;
            let mut paths = Vec::with_capacity(count);
            for _ in 0..count {
                paths.push(u64::from_le_bytes(take(rest)?));
            }
            chunks.push((chunk, tokens, paths.into()));
        }
        (flags < 4).then_some(Self {
            last: (flags & 2 != 0).then_some(last),
            complete: flags & 1 != 0,
            blocks: KeptBlocks {
                key,
                block_tokens,
                blocks,
                chunks,
            },
        })
    }
}

fn number(length: usize) -> [u8; 4] {
    // Bounded far below.
    u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes()
}

/// A length that is no more than this and whose items, of so many bytes at least, are there.
fn length(rest: &mut &[u8], most: usize, each: usize) -> Option<usize> {
    let length = u32::from_le_bytes(take(rest)?) as usize;
    (length <= most && rest.len() >= length * each).then_some(length)
}

#[cfg(test)]
impl KeptExact {
    pub(crate) fn any() -> impl proptest::strategy::Strategy<Value = Self> {
        use proptest::collection::vec;
        use proptest::prelude::*;
        let held = (any::<u64>(), proptest::option::of(1_u64..), any::<u32>());
        let blocks = vec(held, 0..20);
        let chunks = vec((any::<u64>(), any::<u32>(), vec(any::<u64>(), 0..5)), 0..20);
        let fixed = (
            proptest::option::of(any::<u64>()),
            any::<bool>(),
            any::<[u8; 16]>(),
            any::<u32>(),
        );
        (fixed, blocks, chunks).prop_map(|((last, complete, key, block_tokens), blocks, chunks)| {
            let last = last.filter(|last| *last > 0);
            let held = |(hash, path, copies)| (hash, Held { path, copies });
            let way = |(chunk, tokens, paths): (u64, u32, Vec<u64>)| (chunk, tokens, paths.into());
            Self {
                last,
                complete,
                blocks: KeptBlocks {
                    key,
                    block_tokens,
                    blocks: blocks.into_iter().map(held).collect(),
                    chunks: chunks.into_iter().map(way).collect(),
                },
            }
        })
    }
}
