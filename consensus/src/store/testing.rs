//! A disk that fails on demand, for tests.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::StoreOptions;
use super::disk::{Disk, DiskFile, Held, RealDisk};

/// The real disk, which fails as told and counts its syncs.
#[derive(Debug, Default)]
pub(crate) struct Failing(Arc<Orders>);

#[derive(Debug, Default)]
pub(crate) struct Orders {
    pub(crate) full: AtomicBool,
    pub(crate) sync: AtomicBool,
    pub(crate) syncs: AtomicUsize,
}

#[derive(Debug)]
struct FailingFile(Box<dyn DiskFile>, Arc<Orders>);

impl Failing {
    fn file(&self, file: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        Box::new(FailingFile(file, self.0.clone()))
    }
}

impl Disk for Failing {
    fn is_dir(&self, path: &Path) -> bool {
        RealDisk.is_dir(path)
    }
    fn exists(&self, path: &Path) -> bool {
        RealDisk.exists(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.sync_dir(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        RealDisk.list(dir)
    }
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        RealDisk.read(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        RealDisk.create(path).map(|file| self.file(file))
    }
    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        RealDisk.append(path).map(|file| self.file(file))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_dir(path)
    }
    fn lock(&self, path: &Path) -> io::Result<Option<Held>> {
        RealDisk.lock(path)
    }
    fn draw_id(&self) -> [u8; 16] {
        RealDisk.draw_id()
    }
}

impl DiskFile for FailingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.1.full.load(Ordering::Relaxed) {
            self.0.write(&bytes[..bytes.len() / 2])?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.write(bytes)
    }
    fn rewrite(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.rewrite(bytes)
    }
    fn replace(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.replace(bytes)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.1.syncs.fetch_add(1, Ordering::Relaxed);
        if self.1.sync.load(Ordering::Relaxed) {
            return Err(io::Error::other("EIO"));
        }
        self.0.sync()
    }
    fn cut(&mut self, len: u64) -> io::Result<()> {
        self.0.cut(len)
    }
}

/// Options of a store on such a disk, and what it is told.
pub(crate) fn failing() -> (StoreOptions, Arc<Orders>) {
    let disk = Failing::default();
    let orders = disk.0.clone();
    let options = StoreOptions {
        disk: Arc::new(disk),
        ..StoreOptions::default()
    };
    (options, orders)
}
