//! The keyed chain over the canonical bytes.
//!
//! `hᵢ = SipHash-1-3-128(key, hᵢ₋₁ | chunkᵢ)`; the whole state goes on, its low 64 bits are published.
//! Canonical bytes exist here only, a chunk at a time.

use std::hash::Hasher as _;

use forebay_proto::FingerprintKey;
use siphasher::sip128::{Hasher128 as _, SipHasher13};

use super::form::Sink;
use crate::length::Makeup;

/// Canonical bytes that are fingerprinted; what is beyond is counted only.
pub(super) const MAX_BYTES: u64 = 1 << 20;
/// Content bytes that [`Chain::head`] covers.
const HEAD_BYTES: usize = 100;

pub(super) fn keyed(key: &FingerprintKey) -> SipHasher13 {
    SipHasher13::new_with_key(&key.bytes)
}

pub(super) fn finish(hasher: &SipHasher13) -> [u8; 16] {
    hasher.finish128().as_bytes()
}

/// The low half, which is what others see.
pub(super) fn published(state: [u8; 16]) -> u64 {
    let (low, _) = state.split_first_chunk().expect("8 of 16 bytes");
    u64::from_le_bytes(*low)
}

/// Takes canonical bytes and keeps fingerprints of full chunks.
pub(super) struct Chain {
    key: FingerprintKey,
    state: [u8; 16],
    chunk_bytes: usize,
    /// What is left of the last chunk; never more than one.
    partial: Vec<u8>,
    pub(super) chunks: Vec<u64>,
    pub(super) bytes: u64,
    makeup: Makeup,
    head: Vec<u8>,
}

impl Sink for Chain {
    fn tag(&mut self, bytes: &[u8]) {
        self.take(bytes);
    }

    fn put(&mut self, bytes: &[u8]) {
        let missing = HEAD_BYTES - self.head.len();
        if missing > 0 {
            self.head
                .extend_from_slice(&bytes[..bytes.len().min(missing)]);
        }
        self.take(bytes);
    }

    fn medium(&mut self, tag: &[u8], hash: &[u8]) {
        self.tag(tag);
        self.put(hash);
        self.makeup.medium();
    }

    fn media_hasher(&self) -> SipHasher13 {
        let mut hasher = keyed(&self.key);
        hasher.write(b"media");
        hasher
    }
}

impl Chain {
    pub(super) fn new(
        key: FingerprintKey,
        root: [u8; 16],
        chunk_bytes: usize,
        expected: usize,
    ) -> Self {
        let capacity = expected.min(MAX_BYTES as usize) / chunk_bytes;
        Self {
            key,
            state: root,
            chunk_bytes,
            partial: Vec::with_capacity(chunk_bytes),
            chunks: Vec::with_capacity(capacity),
            bytes: 0,
            makeup: Makeup::with_capacity(capacity),
            head: Vec::with_capacity(HEAD_BYTES),
        }
    }

    /// What the bytes so far are, those of the last chunk, which is not full, included.
    pub(super) fn makeup(&mut self) -> Makeup {
        self.makeup.rest().count(&self.partial);
        std::mem::take(&mut self.makeup)
    }

    fn take(&mut self, mut bytes: &[u8]) {
        let room = MAX_BYTES.saturating_sub(self.bytes);
        self.bytes += bytes.len() as u64;
        if room < bytes.len() as u64 {
            let (first, beyond) = bytes.split_at(usize::try_from(room).unwrap_or(0));
            self.makeup.rest().count(beyond);
            bytes = first;
        }
        if !self.partial.is_empty() {
            let missing = self.chunk_bytes - self.partial.len();
            if bytes.len() < missing {
                self.partial.extend_from_slice(bytes);
                return;
            }
            self.partial.extend_from_slice(&bytes[..missing]);
            bytes = &bytes[missing..];
            let chunk = std::mem::take(&mut self.partial);
            self.chunk(&chunk);
            self.partial = chunk;
            self.partial.clear();
        }
        while bytes.len() >= self.chunk_bytes {
            let (chunk, rest) = bytes.split_at(self.chunk_bytes);
            self.chunk(chunk);
            bytes = rest;
        }
        self.partial.extend_from_slice(bytes);
    }

    fn chunk(&mut self, chunk: &[u8]) {
        let mut hasher = keyed(&self.key);
        hasher.write(&self.state);
        hasher.write(chunk);
        self.state = finish(&hasher);
        self.chunks.push(published(self.state));
        self.makeup.chunk(chunk);
    }

    /// Keyed hash of everything so far, the last chunk included, which is not full; and of this shape.
    pub(super) fn whole(&self, shape: &str) -> u64 {
        let mut hasher = keyed(&self.key);
        hasher.write(b"whole");
        hasher.write(&self.state);
        hasher.write(&self.bytes.to_le_bytes());
        hasher.write(shape.as_bytes());
        hasher.write(&[0xff]);
        hasher.write(&self.partial);
        super::named(finish(&hasher))
    }

    /// Keyed hash of the first content bytes.
    pub(super) fn head(&self) -> u64 {
        let mut hasher = keyed(&self.key);
        hasher.write(b"head");
        hasher.write(&self.head);
        published(finish(&hasher))
    }
}
