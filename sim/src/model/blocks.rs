//! The blocks of a KV cache: reference counts, hashes, and the order in which unused ones go.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Takes a hash for its own.
#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Block {
    hash: u64,
    users: u32,
    /// Found by its hash.
    known: bool,
    /// In the list of unused ones.
    before: u32,
    after: u32,
}

/// All blocks of one cache.
pub struct Blocks {
    blocks: Vec<Block>,
    known: HashMap<u64, u32, BuildHasherDefault<Same>>,
    /// Never used, or forgotten.
    blank: Vec<u32>,
    oldest: u32,
    newest: u32,
    unused: usize,
    /// Hashes whose blocks were forgotten, where somebody asked to be told.
    forgotten: Option<Vec<u64>>,
}

impl Blocks {
    /// So many empty blocks.
    #[must_use]
    pub fn new(count: u32) -> Self {
        let block = Block {
            hash: 0,
            users: 0,
            known: false,
            before: NONE,
            after: NONE,
        };
        Self {
            blocks: vec![block; count as usize],
            known: HashMap::default(),
            blank: (0..count).rev().collect(),
            oldest: NONE,
            newest: NONE,
            unused: 0,
            forgotten: None,
        }
    }

    /// From here on [`Blocks::take_forgotten`] tells what is forgotten.
    pub fn tell_forgotten(&mut self) {
        self.forgotten.get_or_insert_default();
    }

    /// Hashes that were forgotten since this was last asked.
    pub fn take_forgotten(&mut self) -> Vec<u64> {
        self.forgotten
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// Blocks that can be taken: blank ones and those that nobody uses.
    #[must_use]
    pub fn available(&self) -> usize {
        self.blank.len() + self.unused
    }

    /// Blocks that requests use.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.blocks.len() - self.available()
    }

    /// Blocks that are found by their hash.
    #[must_use]
    pub fn known(&self) -> usize {
        self.known.len()
    }

    /// Leading hashes whose blocks are there.
    #[must_use]
    pub fn hit(&self, hashes: &[u64]) -> usize {
        let missing = hashes
            .iter()
            .position(|hash| !self.known.contains_key(hash));
        missing.unwrap_or(hashes.len())
    }

    /// Uses the block of this hash.
    pub fn share(&mut self, hash: u64) -> Option<u32> {
        let at = *self.known.get(&hash)?;
        if self.blocks[at as usize].users == 0 {
            self.unlink(at);
        }
        self.blocks[at as usize].users += 1;
        Some(at)
    }

    /// Uses an empty block; the oldest unused one is forgotten for it. `None`: all are in use.
    pub fn take(&mut self) -> Option<u32> {
        let at = match self.blank.pop() {
            Some(at) => at,
            None => {
                let at = self.oldest;
                if at == NONE {
                    return None;
                }
                self.unlink(at);
                let hash = self.blocks[at as usize].hash;
                self.known.remove(&hash);
                if let Some(forgotten) = &mut self.forgotten {
                    forgotten.push(hash);
                }
                at
            }
        };
        let block = &mut self.blocks[at as usize];
        block.users = 1;
        block.known = false;
        Some(at)
    }

    /// A block in use is full: it is found by this hash from now on (`true`), unless another one is.
    pub fn fill(&mut self, at: u32, hash: u64) -> bool {
        if !self.blocks[at as usize].known && !self.known.contains_key(&hash) {
            self.known.insert(hash, at);
            let block = &mut self.blocks[at as usize];
            block.hash = hash;
            block.known = true;
            return true;
        }
        false
    }

    /// One user less. A block that nobody uses is kept, as the newest, if it can be found.
    pub fn release(&mut self, at: u32) {
        let block = &mut self.blocks[at as usize];
        block.users -= 1;
        if block.users > 0 {
            return;
        }
        if !block.known {
            self.blank.push(at);
            return;
        }
        block.before = self.newest;
        block.after = NONE;
        match self.newest {
            NONE => self.oldest = at,
            newest => self.blocks[newest as usize].after = at,
        }
        self.newest = at;
        self.unused += 1;
    }

    fn unlink(&mut self, at: u32) {
        let Block { before, after, .. } = self.blocks[at as usize];
        match before {
            NONE => self.oldest = after,
            before => self.blocks[before as usize].after = after,
        }
        match after {
            NONE => self.newest = before,
            after => self.blocks[after as usize].before = before,
        }
        self.unused -= 1;
    }
}
