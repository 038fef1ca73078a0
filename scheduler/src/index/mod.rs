//! Which worker holds which chunk: what a balancer looks a prompt up in.
//!
//! One [`IndexWriter`] changes it, any number of [`PrefixIndex`] read it meanwhile: a lookup takes no
//! lock, waits for nobody and allocates nothing but room for its hits. It is the one structure of this
//! crate that threads share.
//!
//! * `table`: a flat table from a chunk's fingerprint to one word that says who holds it and how many
//!   tokens lead up to its end. In segments, so that it grows a piece at a time.
//! * `entry`: that word. One holder or two stand in it themselves; more are a set's number.
//! * `sets`, `arena`: such sets, each kept once, because they repeat along a path. A set never changes
//!   while a reader may look at it.
//! * `slots`: workers by small numbers. A cleared worker's number is dead at once; a later sweep takes it
//!   out of the table, and only then can it be another's.
//! * `writer`: who brings these together, and gives back what no reader can see any more.
//! * `reader`, `lookup`: the reading.
//!
//! **How a lookup reads.** A worker holds a prompt's leading chunks, so along a prompt the holders only
//! become fewer, and where two places have the same, all between them do. So a lookup probes some places
//! ahead, then looks between those that differ, until it has seen both sides of each change. Lost or late
//! events can break that. Then this still holds, whatever other workers do:
//!
//! * A worker without a gap is reported exactly.
//! * A worker with gaps is reported up to one of them, or to the prompt's end: it holds the last chunk that
//!   is reported and not the one after it, and all those before the first gap are reported.
//!
//! **Tokens** belong to the prefix, not to the worker: a chunk has one number, the one last told by any of
//! its holders, at most [`MAX_TOKENS`].
//!
//! **Bounds.** At [`MAX_PAIRS`], and where workers or sets are too many, nothing more is stored, which
//! costs hits and nothing else. What a clear left counts until it is swept, and is swept first.

mod arena;
mod entry;
mod fingerprints;
mod lookup;
mod reader;
mod sets;
mod size;
mod slots;
mod sync;
mod table;
#[cfg(test)]
mod tests;
mod writer;

use forebay_proto::WorkerId;

pub(crate) use fingerprints::Fingerprints;
pub use reader::PrefixIndex;
use size::Size;
pub use writer::IndexWriter;

/// Pairs of a chunk and a worker; three times what a cell is designed for.
pub const MAX_PAIRS: usize = 32 << 20;
/// Tokens up to a chunk's end, where there are more.
pub const MAX_TOKENS: u32 = (1 << 24) - 1;

/// How much of a prompt one worker holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Who.
    pub worker: WorkerId,
    /// Leading chunks, without a gap that was seen.
    pub chunks: u32,
    /// Tokens up to the end of the last of them.
    pub tokens: u32,
}
