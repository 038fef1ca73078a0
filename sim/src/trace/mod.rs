//! Request traces: when each request arrived, how long it was, and which KV blocks it shares.
//!
//! A trace is JSON lines, gzipped or not, one request a line in arrival order:
//!
//! | field | meaning |
//! |---|---|
//! | `timestamp` | arrival, integer milliseconds from the start of the file |
//! | `input_length`, `output_length` | tokens |
//! | `hash_ids` | the input's KV blocks in order; an element is an id or `[first, count]` for a run of consecutive ids. Equal ids mean equal input up to the end of that block. Empty where the source has no content |
//! | `session`, `turn` | optional: the conversation and the number of the request in it |
//!
//! Other fields are ignored. The block size belongs to the trace, not to a request: it comes from
//! the caller, from a `manifest.json` beside the file, or is that of the shipped sample.
//! There is no text in a trace; what a replay sends is made up from the block ids.

mod line;
mod manifest;
mod read;

use std::time::Duration;

pub use line::{BlockRun, LineError, Request};
pub use read::{Options, Reader, Trace, TraceError};

/// Tokens in a block of the shipped sample, and of a trace of which nothing else is known.
pub const DEFAULT_BLOCK_TOKENS: u32 = 512;

/// The longest line that is read, in bytes.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// The most blocks that one request may name.
pub const MAX_BLOCKS_PER_REQUEST: u64 = 1 << 20;

/// The most tokens that one request may take in; four bytes each, it still fits a body.
pub const MAX_INPUT_TOKENS: u64 = 8_000_000;

/// The most tokens that one request may ask for.
pub const MAX_OUTPUT_TOKENS: u64 = 1_000_000;

/// The most requests that are kept of one trace.
pub const MAX_REQUESTS: usize = 5_000_000;

/// The most block runs that are kept of one trace (16 bytes each).
pub const MAX_TOTAL_RUNS: usize = 20_000_000;

/// The largest trace that is read, in bytes after decompression.
pub const MAX_TRACE_BYTES: u64 = 4 << 30;

/// A trace that ships with Forebay; `data/README.md` has sources and licences.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Its name.
    pub name: &'static str,
    bytes: &'static [u8],
    block_tokens: u32,
    quantum: Duration,
}

/// All samples, the default first.
pub static SAMPLES: [Sample; 5] = [
    Sample {
        name: "mooncake-conversation",
        bytes: include_bytes!("../../data/mooncake-conversation-sample.jsonl.gz"),
        block_tokens: 512,
        quantum: Duration::from_secs(3),
    },
    Sample {
        name: "agentic-coding",
        bytes: include_bytes!("../../data/agentic-coding-sample.jsonl.gz"),
        block_tokens: 64,
        quantum: Duration::ZERO,
    },
    Sample {
        name: "lmcache-agents",
        bytes: include_bytes!("../../data/lmcache-agents-sample.jsonl.gz"),
        block_tokens: 16,
        quantum: Duration::ZERO,
    },
    Sample {
        name: "azure-2023-code",
        bytes: include_bytes!("../../data/azure-2023-code-sample.jsonl.gz"),
        block_tokens: 512,
        quantum: Duration::ZERO,
    },
    Sample {
        name: "azure-2023-conv",
        bytes: include_bytes!("../../data/azure-2023-conv-sample.jsonl.gz"),
        block_tokens: 512,
        quantum: Duration::ZERO,
    },
];
