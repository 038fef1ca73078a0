//! A disk that forgets what was not synced.
//!
//! Each file has the bytes that a reader sees and those that would survive a loss of power; each folder
//! has names that are not durable yet, in the order in which they were given. A power cut keeps a random
//! prefix of the names, and of each file's unsynced bytes random sectors. A process that is killed loses
//! nothing: its pages stay with the kernel. After a sync that failed, the kernel takes the pages for
//! clean although the disk never got them, so they are seen until the power goes (Rebello et al., "Can
//! Applications Recover from fsync Failures?", ATC 2020).

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forebay_consensus::store::disk::{Disk, DiskFile, Held};
use parking_lot::Mutex;
use rand::Rng as _;
use rand::rngs::StdRng;

/// What a disk writes at once.
const SECTOR_BYTES: usize = 512;

/// One node's disk. Clones are the same disk.
#[derive(Clone, Debug)]
pub(super) struct SimDisk(Arc<Mutex<State>>);

#[derive(Clone, Debug, Default)]
struct State {
    /// The names as readers see them, and as they would survive.
    names: BTreeMap<PathBuf, u64>,
    durable: BTreeMap<PathBuf, u64>,
    pending: Vec<Renaming>,
    files: BTreeMap<u64, Content>,
    folders: Vec<PathBuf>,
    next: u64,
    held: bool,
    id: [u8; 16],
    faults: DiskFaults,
}

/// What goes wrong on a disk next.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DiskFaults {
    /// The process dies in the middle of the operation after so many others.
    pub(super) dies_after: Option<u32>,
    /// The next sync of a file fails.
    pub(super) sync_fails: bool,
    /// There is no room.
    pub(super) full: bool,
}

#[derive(Clone, Debug)]
struct Renaming {
    folder: PathBuf,
    name: PathBuf,
    /// What the name stands for from then on; `None`: nothing.
    file: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct Content {
    seen: Vec<u8>,
    durable: Vec<u8>,
    /// From where on `seen` waits for a sync.
    dirty_from: usize,
    /// The shortest length since the last sync.
    cut_to: Option<usize>,
}

impl SimDisk {
    pub(super) fn new(id: [u8; 16]) -> Self {
        Self(Arc::new(Mutex::new(State {
            id,
            ..State::default()
        })))
    }

    /// What goes wrong next.
    pub(super) fn faults(&self, change: impl FnOnce(&mut DiskFaults)) {
        change(&mut self.0.lock().faults);
    }

    /// Whether the process that uses this disk has died in an operation.
    pub(super) fn process_died(&self) -> bool {
        self.0.lock().faults.dies_after == Some(0)
    }

    /// Whether the next sync of a file fails.
    pub(super) fn fails_to_sync(&self) -> bool {
        self.0.lock().faults.sync_fails
    }

    /// The process is gone, and nothing else is lost.
    pub(super) fn killed(&self) {
        let mut state = self.0.lock();
        state.held = false;
        state.faults.dies_after = None;
    }

    /// The power went. `rng` draws what of the unsynced survives.
    pub(super) fn power_lost(&self, rng: &mut StdRng) {
        let mut state = self.0.lock();
        state.held = false;
        state.faults.dies_after = None;
        state.faults.sync_fails = false;
        let kept = rng.random_range(0..=state.pending.len());
        state.lose(kept, |content| content.torn(rng));
    }

    /// A copy as it would be after the worst loss of power at this moment.
    pub(super) fn worst_case(&self) -> Self {
        let mut state = self.0.lock().clone();
        state.held = false;
        state.faults = DiskFaults::default();
        state.lose(0, |content| content.durable.clone());
        Self(Arc::new(Mutex::new(state)))
    }

    /// Turns one bit of what is durable, while nobody uses the disk. Returns what was hit.
    pub(super) fn rot(&self, rng: &mut StdRng) -> Option<(PathBuf, usize)> {
        let mut state = self.0.lock();
        let State { names, files, .. } = &mut *state;
        // A log is as likely as a snapshot, and the newest as all others, however many there are.
        let kind = if rng.random() { "log" } else { "snap" };
        let lengths: Vec<_> = names
            .iter()
            .filter(|(path, _)| path.extension().is_some_and(|it| it == kind))
            .filter_map(|(path, file)| {
                let length = files.get(file)?.seen.len();
                (length > 0).then(|| (path.clone(), *file, length))
            })
            .collect();
        if lengths.is_empty() {
            return None;
        }
        let newest = lengths.len() - 1;
        let hit = if rng.random() {
            newest
        } else {
            rng.random_range(0..=newest)
        };
        let (path, file, length) = lengths[hit].clone();
        let (at, bit) = (rng.random_range(0..length), rng.random_range(0..8));
        let content = files.get_mut(&file)?;
        content.seen[at] ^= 1 << bit;
        if let Some(byte) = content.durable.get_mut(at) {
            *byte ^= 1 << bit;
        }
        Some((path, at))
    }
}

impl State {
    /// One operation; the process may die in it.
    fn operation(&mut self) -> io::Result<()> {
        match &mut self.faults.dies_after {
            Some(0) => Err(io::Error::other("the process is dead")),
            Some(left) => {
                *left -= 1;
                if *left == 0 {
                    return Err(io::Error::other("the process dies"));
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn rename(&mut self, name: &Path, file: Option<u64>) {
        match file {
            Some(file) => {
                self.names.insert(name.to_owned(), file);
            }
            None => {
                self.names.remove(name);
            }
        }
        self.pending.push(Renaming {
            folder: folder(name),
            name: name.to_owned(),
            file,
        });
    }

    fn make_durable(durable: &mut BTreeMap<PathBuf, u64>, renaming: Renaming) {
        match renaming.file {
            Some(file) => durable.insert(renaming.name, file),
            None => durable.remove(&renaming.name),
        };
    }

    fn lose(&mut self, kept: usize, mut survives: impl FnMut(&Content) -> Vec<u8>) {
        for renaming in std::mem::take(&mut self.pending).into_iter().take(kept) {
            Self::make_durable(&mut self.durable, renaming);
        }
        self.names = self.durable.clone();
        let mut files = BTreeMap::new();
        for file in self.names.values() {
            if let Some(content) = self.files.get(file) {
                let bytes = survives(content);
                files.insert(
                    *file,
                    Content {
                        dirty_from: bytes.len(),
                        durable: bytes.clone(),
                        seen: bytes,
                        cut_to: None,
                    },
                );
            }
        }
        self.files = files;
    }

    fn file(&mut self, file: u64) -> io::Result<&mut Content> {
        self.files
            .get_mut(&file)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn open(&mut self) -> u64 {
        self.next += 1;
        self.files.insert(self.next, Content::default());
        self.next
    }
}

impl Content {
    fn write(&mut self, bytes: &[u8]) {
        self.seen.extend_from_slice(bytes);
    }

    fn cut(&mut self, len: usize) {
        self.seen.truncate(len);
        self.dirty_from = self.dirty_from.min(len);
        self.cut_to = Some(self.cut_to.map_or(len, |cut| cut.min(len)));
    }

    fn sync(&mut self) {
        if let Some(cut) = self.cut_to.take() {
            self.durable.truncate(cut);
        }
        // What a failed sync left out is a hole.
        if self.durable.len() < self.dirty_from {
            self.durable.resize(self.dirty_from, 0);
        }
        self.durable.truncate(self.dirty_from);
        self.durable
            .extend_from_slice(&self.seen[self.dirty_from..]);
        self.dirty_from = self.seen.len();
    }

    /// The kernel drops the pages and takes them for written.
    fn sync_failed(&mut self) {
        self.dirty_from = self.seen.len();
    }

    /// Of what was not synced, any sectors.
    fn torn(&self, rng: &mut StdRng) -> Vec<u8> {
        let phantom = self.dirty_from > self.durable.len();
        if phantom || self.seen == self.durable || rng.random_bool(0.3) {
            return self.durable.clone();
        }
        let (short, long) = (
            self.seen.len().min(self.durable.len()),
            self.seen.len().max(self.durable.len()),
        );
        let length = rng.random_range(short..=long);
        let mut bytes = Vec::with_capacity(length);
        for start in (0..length).step_by(SECTOR_BYTES) {
            let end = (start + SECTOR_BYTES).min(length);
            let new = rng.random_bool(0.7);
            for at in start..end {
                let byte = if new {
                    self.seen.get(at).or(self.durable.get(at))
                } else {
                    self.durable.get(at)
                };
                bytes.push(byte.copied().unwrap_or(0));
            }
        }
        bytes
    }
}

fn folder(path: &Path) -> PathBuf {
    path.parent().map(Path::to_owned).unwrap_or_default()
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    file: u64,
}

impl Disk for SimDisk {
    fn is_dir(&self, path: &Path) -> bool {
        self.0.lock().folders.iter().any(|folder| folder == path)
    }

    fn exists(&self, path: &Path) -> bool {
        self.is_dir(path) || self.0.lock().names.contains_key(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.operation()?;
        state.folders.push(path.to_owned());
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.operation()?;
        let State {
            pending, durable, ..
        } = &mut *state;
        // As one journal: what was renamed earlier elsewhere goes with it.
        if let Some(last) = pending.iter().rposition(|renaming| renaming.folder == path) {
            for renaming in pending.drain(..=last) {
                State::make_durable(durable, renaming);
            }
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        if !self.is_dir(dir) {
            return Err(not_found());
        }
        let state = self.0.lock();
        let inside = state.names.keys().filter(|name| folder(name) == dir);
        Ok(inside.cloned().collect())
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut state = self.0.lock();
        let file = *state.names.get(path).ok_or_else(not_found)?;
        state.file(file).map(|content| content.seen.clone())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.0.lock();
        state.operation()?;
        if state.faults.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = state.open();
        state.rename(path, Some(file));
        let disk = self.clone();
        Ok(Box::new(SimFile { disk, file }))
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.0.lock();
        state.operation()?;
        let file = *state.names.get(path).ok_or_else(not_found)?;
        let disk = self.clone();
        Ok(Box::new(SimFile { disk, file }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.operation()?;
        let file = *state.names.get(from).ok_or_else(not_found)?;
        // One entry of a journal: a name is never without a file in between.
        state.rename(to, Some(file));
        state.rename(from, None);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.operation()?;
        if !state.names.contains_key(path) {
            return Err(not_found());
        }
        state.rename(path, None);
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.operation()?;
        let inside: Vec<_> = state.names.keys().cloned().collect();
        for name in inside.iter().filter(|name| name.starts_with(path)) {
            state.rename(name, None);
        }
        state.folders.retain(|folder| !folder.starts_with(path));
        Ok(())
    }

    fn lock(&self, _path: &Path) -> io::Result<Option<Held>> {
        let mut state = self.0.lock();
        let free = !std::mem::replace(&mut state.held, true);
        Ok(free.then(|| Box::new(()) as Held))
    }

    fn draw_id(&self) -> [u8; 16] {
        self.0.lock().id
    }
}

impl DiskFile for SimFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let done = state.operation();
        let full = state.faults.full;
        let content = state.file(self.file)?;
        let whole = done.is_ok() && !full;
        content.write(if whole {
            bytes
        } else {
            &bytes[..bytes.len() / 2]
        });
        done?;
        if full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn rewrite(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.operation()?;
        let content = state.file(self.file)?;
        assert!(content.seen == bytes, "a file's own bytes are rewritten");
        content.dirty_from = 0;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.operation()?;
        let fails = std::mem::take(&mut state.faults.sync_fails);
        let content = state.file(self.file)?;
        if fails {
            content.sync_failed();
            return Err(io::Error::other("the disk does not answer"));
        }
        content.sync();
        Ok(())
    }

    fn cut(&mut self, len: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.operation()?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        state.file(self.file)?.cut(len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    fn path(name: &str) -> PathBuf {
        Path::new("d").join(name)
    }

    #[test]
    fn what_was_synced_survives_and_what_was_not_may_go() {
        let mut kept = [0; 2];
        for seed in 0..50 {
            let disk = SimDisk::new([1; 16]);
            let mut file = disk.create(&path("f")).unwrap();
            file.write(b"synced").unwrap();
            file.sync().unwrap();
            disk.sync_dir(Path::new("d")).unwrap();
            file.write(&[7; 4_000]).unwrap();
            disk.create(&path("g")).unwrap();
            disk.power_lost(&mut StdRng::seed_from_u64(seed));
            let bytes = disk.read(&path("f")).unwrap();
            assert!(bytes.starts_with(b"synced"));
            kept[0] += usize::from(bytes.len() > 6);
            kept[1] += usize::from(disk.exists(&path("g")));
        }
        assert!(kept.iter().all(|kept| (5..45).contains(kept)), "{kept:?}");
    }

    #[test]
    fn after_a_failed_sync_the_bytes_are_seen_until_the_power_goes() {
        let disk = SimDisk::new([1; 16]);
        let mut file = disk.create(&path("f")).unwrap();
        disk.sync_dir(Path::new("d")).unwrap();
        disk.faults(|faults| faults.sync_fails = true);
        file.write(b"lost").unwrap();
        file.sync().unwrap_err();
        disk.killed();
        assert_eq!(disk.read(&path("f")).unwrap(), b"lost");
        file.sync().unwrap();
        assert_eq!(disk.worst_case().read(&path("f")).unwrap(), [0; 4]);
        file.rewrite(b"lost").unwrap();
        file.sync().unwrap();
        assert_eq!(disk.worst_case().read(&path("f")).unwrap(), b"lost");
    }

    #[test]
    fn a_process_dies_in_the_middle_of_a_write() {
        let disk = SimDisk::new([1; 16]);
        let mut file = disk.create(&path("f")).unwrap();
        disk.faults(|faults| faults.dies_after = Some(1));
        file.write(b"half").unwrap_err();
        assert!(disk.process_died());
        file.sync().unwrap_err();
        disk.killed();
        assert_eq!(disk.read(&path("f")).unwrap(), b"ha");
    }
}
