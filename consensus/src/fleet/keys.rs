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

    /// The same without any key, for those who must not have them.
    #[must_use]
    pub fn without_keys(mut self) -> Self {
        self.keys.clear();
        self
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::check;

    #[test]
    fn a_key_follows_the_one_that_it_names_and_two_are_kept() {
        let world = check(
            "rotate 0 key=first -> invalid key
             rotate 1 key=the_first_key_16 -> revision-conflict
             rotate 0 key=the_first_key_16 -> done
             rotate 0 key=another_key_____ -> revision-conflict
             rotate 1 key=the_second_key__ -> done
             rotate 2 key=the_third_key___ -> done",
        );
        let ring = world.fleet.facts().keys.unwrap();
        let kept: Vec<_> = ring
            .keys
            .iter()
            .map(|key| (key.epoch, &key.key[..]))
            .collect();
        assert_eq!(
            kept,
            [(2, &b"the_second_key__"[..]), (3, &b"the_third_key___"[..])]
        );
    }

    #[test]
    fn a_key_survives_snapshots_and_is_not_in_the_audit() {
        let world = check("rotate 0 key=the_first_key_16 -> done");
        let restored = super::Fleet::restore(&world.fleet.snapshot()).unwrap();
        assert_eq!(restored.facts().keys, world.fleet.facts().keys);
        let (audit, _) = world.fleet.audit_tail(10);
        assert_eq!(
            (audit[0].action.as_str(), audit[0].target.as_str()),
            ("rotate-key", "after epoch 0")
        );
        assert!(!format!("{audit:?}").contains("the_first"));
    }
}
