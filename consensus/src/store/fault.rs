//! Where a test makes the disk fail.

use std::fmt::Debug;
use std::io;
use std::path::Path;

/// Asked before each write and sync of the log and the snapshots.
pub trait Fault: Debug + Send + Sync {
    /// How many of `len` bytes reach the file; fewer, and the write then fails.
    fn write(&self, path: &Path, len: usize) -> usize;

    /// Whether the sync works.
    ///
    /// # Errors
    ///
    /// The error that the sync shall return.
    fn sync(&self, path: &Path) -> io::Result<()>;
}

/// A disk without injected failures.
#[derive(Debug)]
pub struct NoFault;

impl Fault for NoFault {
    fn write(&self, _path: &Path, len: usize) -> usize {
        len
    }

    fn sync(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }
}
