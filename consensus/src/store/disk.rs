//! What the store needs of a disk: a handful of calls, so that a simulator can be one.
//!
//! [`RealDisk`] is the file system. A disk that a simulator makes forgets, at a crash, whatever was
//! not synced: the bytes of a file without [`DiskFile::sync`], and names in a folder without
//! [`Disk::sync_dir`].

use std::any::Any;
use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// Held while one process may write a data directory; let go by dropping it, and by dying.
pub type Held = Box<dyn Any + Send>;

/// Where a store lives. Errors are those of the system, with their kinds.
pub trait Disk: Debug + Send + Sync {
    /// Whether there is a folder of this name.
    fn is_dir(&self, path: &Path) -> bool;

    /// Whether there is anything of this name.
    fn exists(&self, path: &Path) -> bool;

    /// Makes a folder and those above it.
    ///
    /// # Errors
    ///
    /// The system's.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    ///
    /// The system's.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// What lies in a folder, in any order.
    ///
    /// # Errors
    ///
    /// The system's; `NotFound` without such a folder.
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;

    /// A whole file.
    ///
    /// # Errors
    ///
    /// The system's; `NotFound` without such a file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// An empty file for writing, in place of what had its name.
    ///
    /// # Errors
    ///
    /// The system's.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// A file that is there, for writing at its end.
    ///
    /// # Errors
    ///
    /// The system's.
    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// Gives a file another name, in place of what had that.
    ///
    /// # Errors
    ///
    /// The system's.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    ///
    /// The system's; `NotFound` without such a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Removes a folder with all in it.
    ///
    /// # Errors
    ///
    /// The system's.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Takes the lock that a file of this name stands for; `None` while another holds it.
    ///
    /// # Errors
    ///
    /// The system's.
    fn lock(&self, path: &Path) -> io::Result<Option<Held>>;

    /// An id for a disk that is used for the first time.
    fn draw_id(&self) -> [u8; 16];
}

/// A file open for writing at its end.
pub trait DiskFile: Debug + Send {
    /// Writes all of it, or fails somewhere in the middle.
    ///
    /// # Errors
    ///
    /// The system's.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Writes the file's own bytes once more, in place, so that the next sync takes them to the disk.
    ///
    /// # Errors
    ///
    /// The system's.
    fn rewrite(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Writes over the file from its start. Longer content that was there keeps its end, or loses it.
    ///
    /// # Errors
    ///
    /// The system's; the file may then hold any mixture.
    fn replace(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.cut(0)?;
        self.write(bytes)
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    ///
    /// The system's. It must not be tried again: what was to be synced may be gone.
    fn sync(&mut self) -> io::Result<()>;

    /// Cuts the file to this length.
    ///
    /// # Errors
    ///
    /// The system's.
    fn cut(&mut self, len: u64) -> io::Result<()>;
}

/// The file system. Files are 0600, folders 0700.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn is_dir(&self, path: &Path) -> bool {
        path.is_dir()
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        fs::read_dir(dir)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect()
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.create(true).truncate(true).write(true).mode(0o600);
        Ok(Box::new(options.open(path)?))
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        use std::io::Seek as _;
        let mut file = OpenOptions::new().write(true).open(path)?;
        file.seek(io::SeekFrom::End(0))?;
        Ok(Box::new(file))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Held>> {
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let file = options.open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn draw_id(&self) -> [u8; 16] {
        rand::random()
    }
}

impl DiskFile for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn rewrite(&mut self, bytes: &[u8]) -> io::Result<()> {
        use std::io::Seek as _;
        self.seek(io::SeekFrom::Start(0))?;
        self.write_all(bytes)
    }

    fn replace(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.rewrite(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn cut(&mut self, len: u64) -> io::Result<()> {
        use std::io::Seek as _;
        self.set_len(len)?;
        // It would go on where it stood.
        self.seek(io::SeekFrom::Start(len)).map(|_| ())
    }
}
