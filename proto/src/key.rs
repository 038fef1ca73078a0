//! The key of fingerprints.

use std::fmt;

use crate::wire::fleet as wire;

/// What chunks of prompts are chained with, and how often it was replaced before.
///
/// Whoever has it can tell which prompts share a prefix: balancers hold it, nobody else, and
/// `Debug` does not show it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FingerprintKey {
    /// Counts up with each replacement, from 1.
    pub epoch: u32,
    /// The key itself.
    pub bytes: [u8; 16],
}

impl FingerprintKey {
    /// The key as facts carry it; `None` where it is none.
    #[must_use]
    pub fn from_wire(key: &wire::FingerprintKey) -> Option<Self> {
        let bytes = key.key[..].try_into().ok()?;
        (key.epoch > 0).then_some(Self {
            epoch: key.epoch,
            bytes,
        })
    }

    /// The key for the facts.
    #[must_use]
    pub fn to_wire(&self) -> wire::FingerprintKey {
        wire::FingerprintKey {
            epoch: self.epoch,
            key: self.bytes.to_vec().into(),
        }
    }
}

impl fmt::Debug for FingerprintKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FingerprintKey(epoch {})", self.epoch)
    }
}
