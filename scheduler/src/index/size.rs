//! How large the index may be.

use super::MAX_PAIRS;

/// How large the parts are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// Pairs of a chunk and a worker.
    pub(super) pairs: usize,
    /// Pieces of the table.
    pub(super) segments: usize,
    /// Workers, those counted that are cleared and not swept.
    pub(super) slots: usize,
    /// Pages that sets may take.
    pub(super) pages: usize,
    /// Words a page; a power of two, and more than `slots`.
    pub(super) page_words: usize,
    /// Words of sets out of use until somebody looks whether readers still see them.
    pub(super) retired_words: usize,
    /// Cells that a change sweeps.
    pub(super) swept: usize,
}

impl Size {
    pub(super) const CELL: Self = Self {
        pairs: MAX_PAIRS,
        segments: 256,
        slots: 1 << 15,
        pages: 2_048,
        page_words: 1 << 16,
        retired_words: 1 << 16,
        swept: 32,
    };
}
