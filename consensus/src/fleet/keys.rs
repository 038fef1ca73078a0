//! The fingerprint keys: what balancers chain prompts' chunks with.
//!
//! The leader's controller proposes the first one by itself. A rotation keeps the key before, so
//! that balancers and agents which have not heard of the new one yet still agree on the old.

use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use wire::change::Change;

use super::{Effect, Fleet};

/// Keys that are known at a time.
pub(super) const MAX_KEYS: usize = 2;
const KEY_BYTES: usize = 16;

impl Fleet {
    pub(super) fn rotate_key(&mut self, command: &wire::RotateKey) -> Result<Effect, Refusal> {
        if command.key.len() != KEY_BYTES {
            let problem = format!("has {} bytes, not {KEY_BYTES}", command.key.len());
            return Err(Refusal::invalid("key", problem));
        }
        let current = self.keys.last().map_or(0, |key| key.epoch);
        if command.expected_epoch != current {
            return Err(Refusal::RevisionConflict {
                expected: command.expected_epoch.into(),
                current: current.into(),
            });
        }
        self.keys.push(wire::FingerprintKey {
            epoch: current + 1,
            // A copy: a slice would keep the whole log entry in memory.
            key: bytes::Bytes::copy_from_slice(&command.key),
        });
        let excess = self.keys.len().saturating_sub(MAX_KEYS);
        self.keys.drain(..excess);
        Ok(Effect::change(Change::Keys(wire::KeyRing {
            keys: self.keys.clone(),
        })))
    }
}
