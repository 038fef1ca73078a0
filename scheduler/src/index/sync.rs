//! All that readers and the writer share is made of these; `tests/races.rs` puts loom's in their place.

pub(super) use std::sync::Arc;
pub(super) use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use arc_swap::ArcSwap;

/// A value that one thread replaces while others read it.
pub(super) struct Published<T>(ArcSwap<T>);

impl<T> Published<T> {
    pub(super) fn new(value: T) -> Self {
        Self(ArcSwap::from_pointee(value))
    }

    /// Reads the newest value; until then it is not given up.
    pub(super) fn read<R>(&self, read: impl FnOnce(&T) -> R) -> R {
        read(&self.0.load())
    }

    /// Puts another in its place. Who reads the old one still has a share of it.
    pub(super) fn replace(&self, value: T) -> Arc<T> {
        self.0.swap(Arc::new(value))
    }
}
