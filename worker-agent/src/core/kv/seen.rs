//! How much came of an engine's events, and how well it predicted.

use super::stream::Counts;

/// How predictions held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Judged {
    /// Answers that told how much was cached.
    pub answers: u64,
    /// Those with a block more predicted than there was, or more still.
    pub over: u64,
    /// Tokens predicted.
    pub predicted: u64,
    /// Tokens that were cached.
    pub reported: u64,
}

impl Judged {
    pub(super) fn count(&mut self, predicted: u32, reported: u32, block_tokens: u32) {
        self.answers += 1;
        self.over += u64::from(predicted > reported.saturating_add(block_tokens));
        self.predicted += u64::from(predicted);
        self.reported += u64::from(reported);
    }
}

/// What a scrape sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Of the stream.
    pub stream: Counts,
    /// Blocks in the cache, copies counted.
    pub blocks: u64,
    /// Chunks that are known and not in the cache.
    pub absent: u64,
    /// Removals of blocks that were not known.
    pub unknown: u64,
    /// Prompts that were found in the engine's tokens, and those that were not.
    pub prompts: (u64, u64),
    /// Chunks that were found, and those that were not.
    pub chunks: (u64, u64),
    /// Tokens by which they may be off.
    pub error_tokens: u64,
    /// Predictions from events alone that had all of them.
    pub settled: Judged,
    /// Predictions that counted prompts on their way, and those whose blocks were gone already, of which the
    /// events came later.
    pub promised: Judged,
}
