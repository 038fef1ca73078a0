//! A disk in memory for tests: an image of it is cheap to take, to damage and to start from.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::disk::{Disk, DiskFile, Held};

/// Files by name. Clones share the contents.
pub(super) type Image = BTreeMap<PathBuf, Arc<Vec<u8>>>;

/// Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub(super) struct MemoryDisk(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    files: Image,
    folders: BTreeSet<PathBuf>,
}

#[derive(Debug)]
struct MemoryFile {
    disk: MemoryDisk,
    /// Its name at first: a file that is renamed while it is open is found by what it is now.
    path: PathBuf,
}

impl MemoryDisk {
    pub(super) fn of(image: Image) -> Self {
        let parents = image.keys().filter_map(|path| path.parent());
        let folders = parents.map(Path::to_owned).collect();
        let files = image;
        Self(Arc::new(Mutex::new(State { files, folders })))
    }

    pub(super) fn image(&self) -> Image {
        self.0.lock().files.clone()
    }
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for MemoryDisk {
    fn is_dir(&self, path: &Path) -> bool {
        self.0.lock().folders.contains(path)
    }
    fn exists(&self, path: &Path) -> bool {
        self.is_dir(path) || self.0.lock().files.contains_key(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.0.lock().folders.insert(path.to_owned());
        Ok(())
    }
    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        if !self.is_dir(dir) {
            return Err(not_found());
        }
        let state = self.0.lock();
        let inside = state.files.keys();
        Ok(inside
            .filter(|path| path.parent() == Some(dir))
            .cloned()
            .collect())
    }
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let state = self.0.lock();
        let bytes = state.files.get(path).ok_or_else(not_found)?;
        Ok(bytes.to_vec())
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.0.lock().files.insert(path.to_owned(), Arc::default());
        let (disk, path) = (self.clone(), path.to_owned());
        Ok(Box::new(MemoryFile { disk, path }))
    }
    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        if !self.exists(path) {
            return Err(not_found());
        }
        let (disk, path) = (self.clone(), path.to_owned());
        Ok(Box::new(MemoryFile { disk, path }))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        let file = state.files.remove(from).ok_or_else(not_found)?;
        state.files.insert(to.to_owned(), file);
        Ok(())
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        let removed = self.0.lock().files.remove(path);
        removed.map(|_| ()).ok_or_else(not_found)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.files.retain(|file, _| !file.starts_with(path));
        state.folders.retain(|folder| !folder.starts_with(path));
        Ok(())
    }
    fn lock(&self, _path: &Path) -> io::Result<Option<Held>> {
        Ok(Some(Box::new(())))
    }
    fn draw_id(&self) -> [u8; 16] {
        [9; 16]
    }
}

impl MemoryFile {
    fn with(&self, change: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        // Written aside and renamed: the ending is gone.
        let path = if state.files.contains_key(&self.path) {
            self.path.clone()
        } else {
            self.path.with_extension("")
        };
        let bytes = state.files.get_mut(&path).ok_or_else(not_found)?;
        change(Arc::make_mut(bytes));
        Ok(())
    }
}

impl DiskFile for MemoryFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.with(|file| file.extend_from_slice(bytes))
    }
    fn rewrite(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.with(|file| {
            let over = bytes.len().min(file.len());
            file.splice(..over, bytes.iter().copied());
        })
    }
    fn replace(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.rewrite(bytes)
    }
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn cut(&mut self, len: u64) -> io::Result<()> {
        self.with(|file| file.truncate(usize::try_from(len).unwrap_or(usize::MAX)))
    }
}
