//! What is resident in a worker's cache: how its agent guesses it, tells it, and checks itself.
//!
//! An agent keeps a [`Shadow`] of its engine's cache, corrected by what the engine says of each request,
//! publishes the shadow's changes ([`Publisher`]) to balancers ([`Follower`]) as a snapshot and deltas,
//! and lowers its own [`Grade`] where its predictions stop coming true ([`SelfCheck`]).

mod check;
mod follow;
mod publish;
mod shadow;

pub use check::{SelfCheck, Verdict};
pub use follow::{Follower, Op, Resync};
pub use publish::{Cursor, MAX_DELTA_BYTES, MAX_DELTAS, Next, Publisher};
pub use shadow::{Kept, KeptItem, Shadow, Spread};

use forebay_proto::wire::work as wire;

/// Chunks that one worker may publish. A 3-million-token cache has 40,000 of 75 tokens.
pub const MAX_CHUNKS: usize = 1 << 20;

/// How a worker's agent knows what is resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Grade {
    /// By the engine's own events.
    Exact,
    /// By a shadow of the engine's cache that the engine's answers correct.
    Inferred,
    /// By what was sent alone.
    Blind,
}

impl Grade {
    /// Its name in logs, metrics and pages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Inferred => "inferred",
            Self::Blind => "blind",
        }
    }

    fn to_wire(self) -> i32 {
        match self {
            Self::Exact => wire::Grade::Exact,
            Self::Inferred => wire::Grade::Inferred,
            Self::Blind => wire::Grade::Blind,
        }
        .into()
    }

    fn from_wire(grade: i32) -> Self {
        match wire::Grade::try_from(grade) {
            Ok(wire::Grade::Exact) => Self::Exact,
            Ok(wire::Grade::Inferred) => Self::Inferred,
            Ok(wire::Grade::Blind | wire::Grade::Unspecified) | Err(_) => Self::Blind,
        }
    }
}

/// A chunk came or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is resident; up to its end its prompt has so many tokens.
    Stored {
        /// Its fingerprint.
        chunk: u64,
        /// Tokens from the prompt's start to its end.
        tokens: u32,
    },
    /// It is not any more.
    Removed {
        /// Its fingerprint.
        chunk: u64,
    },
}

/// What one resident chunk adds to the checksum of a set (splitmix64's finaliser).
fn mixed(chunk: u64, tokens: u32) -> u64 {
    let salted = chunk ^ u64::from(tokens).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let mut z = salted.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const STORED_BYTES: usize = 12;
const REMOVED_BYTES: usize = 8;

fn put_stored(into: &mut Vec<u8>, chunk: u64, tokens: u32) {
    into.extend_from_slice(&chunk.to_le_bytes());
    into.extend_from_slice(&tokens.to_le_bytes());
}

fn stored(bytes: &[u8]) -> impl Iterator<Item = (u64, u32)> {
    let (entries, _) = bytes.as_chunks::<STORED_BYTES>();
    entries.iter().map(|entry| {
        let (chunk, tokens) = entry.split_at(8);
        let chunk = u64::from_le_bytes(chunk.try_into().expect("8 bytes"));
        (
            chunk,
            u32::from_le_bytes(tokens.try_into().expect("4 bytes")),
        )
    })
}

fn removed(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (entries, _) = bytes.as_chunks::<REMOVED_BYTES>();
    entries.iter().map(|entry| u64::from_le_bytes(*entry))
}

#[cfg(test)]
mod tests;
