//! A balancer's side of the residency stream of one worker.

use forebay_proto::Incarnation;
use forebay_proto::wire::work as wire;

use super::publish::Cursor;
use super::{Grade, MAX_CHUNKS, REMOVED_BYTES, STORED_BYTES, mixed, removed, stored};
use crate::index::Fingerprints;

/// What to do with the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Forget everything of this worker.
    Clear,
    /// It holds a chunk, with so many tokens up to its end.
    Store(u64, u32),
    /// It does not any more.
    Remove(u64),
}

/// Why the stream has to begin anew, with a snapshot. What is in the index must be cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Resync {
    /// A delta is missing, doubled or out of order.
    #[error("a delta is missing")]
    Gap,
    /// The set is not the one that the agent has.
    #[error("the checksum does not hold")]
    Checksum,
    /// Not a message of this stream.
    #[error("a message is malformed")]
    Malformed,
    /// Another start of the worker speaks.
    #[error("another start of the worker speaks")]
    Incarnation,
    /// A delta is of another life of the engine's cache.
    #[error("it is of another life of the engine's cache")]
    Cache,
}

enum State {
    /// Waits for a snapshot.
    Empty,
    /// Takes a snapshot's pieces.
    Taking(Cursor),
    /// Is up to date as of the cursor.
    Holds(Cursor),
}

/// What a balancer knows of one worker's cache. After an error it waits for a snapshot.
pub struct Follower {
    incarnation: Incarnation,
    state: State,
    grade: Grade,
    held: Fingerprints<u32>,
    checksum: u64,
}

impl Follower {
    /// Knows nothing yet of this start of a worker.
    #[must_use]
    pub fn new(incarnation: Incarnation) -> Self {
        Self {
            incarnation,
            state: State::Empty,
            grade: Grade::Blind,
            held: Fingerprints::default(),
            checksum: 0,
        }
    }

    /// How far it is; `None`: it needs a snapshot.
    #[must_use]
    pub const fn cursor(&self) -> Option<Cursor> {
        match self.state {
            State::Holds(cursor) => Some(cursor),
            State::Empty | State::Taking(_) => None,
        }
    }

    /// How the agent knows what it says.
    #[must_use]
    pub const fn grade(&self) -> Grade {
        self.grade
    }

    /// Chunks that the worker holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Takes a piece of a snapshot; the index follows with the last one.
    ///
    /// # Errors
    ///
    /// Returns why it is no use.
    pub fn snapshot(&mut self, piece: &wire::ResidencySnapshot) -> Result<Vec<Op>, Resync> {
        self.take_piece(piece).inspect_err(|_| self.forget())
    }

    fn take_piece(&mut self, piece: &wire::ResidencySnapshot) -> Result<Vec<Op>, Resync> {
        let speaks = Incarnation::from_wire(piece.incarnation.as_ref());
        if speaks.map_err(|_| Resync::Malformed)? != self.incarnation {
            return Err(Resync::Incarnation);
        }
        let cursor = Cursor {
            cache: piece.cache,
            seq: piece.seq,
        };
        if piece.first {
            self.forget();
            self.state = State::Taking(cursor);
        }
        match self.state {
            State::Taking(taking) if taking == cursor => {}
            State::Taking(_) | State::Empty | State::Holds(_) => return Err(Resync::Gap),
        }
        let count = piece.stored.len() / STORED_BYTES;
        if !piece.stored.len().is_multiple_of(STORED_BYTES) || self.held.len() + count > MAX_CHUNKS
        {
            return Err(Resync::Malformed);
        }
        for (chunk, tokens) in stored(&piece.stored) {
            self.hold(chunk, tokens);
        }
        if !piece.last {
            return Ok(Vec::new());
        }
        if self.checksum != piece.checksum {
            return Err(Resync::Checksum);
        }
        self.grade = Grade::from_wire(piece.grade);
        self.state = State::Holds(cursor);
        let stores = self
            .held
            .iter()
            .map(|(chunk, tokens)| Op::Store(*chunk, *tokens));
        Ok(std::iter::once(Op::Clear).chain(stores).collect())
    }

    /// Takes a delta.
    ///
    /// # Errors
    ///
    /// Returns why it is no use.
    pub fn delta(&mut self, delta: &wire::ResidencyDelta) -> Result<Vec<Op>, Resync> {
        self.take_delta(delta).inspect_err(|_| self.forget())
    }

    fn take_delta(&mut self, delta: &wire::ResidencyDelta) -> Result<Vec<Op>, Resync> {
        let State::Holds(cursor) = self.state else {
            return Err(Resync::Gap);
        };
        if delta.cache != 0 && delta.cache != cursor.cache {
            return Err(Resync::Cache);
        }
        if Some(delta.seq) != cursor.seq.checked_add(1) {
            return Err(Resync::Gap);
        }
        let whole = delta.stored.len().is_multiple_of(STORED_BYTES)
            && delta.removed.len().is_multiple_of(REMOVED_BYTES);
        let count = delta.stored.len() / STORED_BYTES;
        if !whole || self.held.len() + count > MAX_CHUNKS {
            return Err(Resync::Malformed);
        }
        let mut ops = Vec::with_capacity(count + delta.removed.len() / REMOVED_BYTES);
        for chunk in removed(&delta.removed) {
            if let Some(tokens) = self.held.remove(&chunk) {
                self.checksum = self.checksum.wrapping_sub(mixed(chunk, tokens));
            }
            ops.push(Op::Remove(chunk));
        }
        for (chunk, tokens) in stored(&delta.stored) {
            self.hold(chunk, tokens);
            ops.push(Op::Store(chunk, tokens));
        }
        if self.checksum != delta.checksum {
            return Err(Resync::Checksum);
        }
        self.grade = Grade::from_wire(delta.grade);
        self.state = State::Holds(Cursor {
            seq: delta.seq,
            ..cursor
        });
        Ok(ops)
    }

    fn hold(&mut self, chunk: u64, tokens: u32) {
        let before = self.held.insert(chunk, tokens);
        let was = before.map_or(0, |tokens| mixed(chunk, tokens));
        let sum = self.checksum.wrapping_sub(was);
        self.checksum = sum.wrapping_add(mixed(chunk, tokens));
    }

    fn forget(&mut self) {
        self.held.clear();
        self.checksum = 0;
        self.state = State::Empty;
    }
}
