//! The fleet as the state machine of a replica.

use bytes::Bytes;

use super::{Applied, Fleet};
use crate::replica::{Machine, RestoreError};

impl Machine for Fleet {
    type Output = Applied;

    fn apply(&mut self, index: u64, _term: u64, command: &Bytes) -> Applied {
        Self::apply(self, index, command)
    }

    fn apply_change(&mut self, index: u64, _term: u64, command: &Bytes) -> (Applied, bool) {
        Self::apply_change(self, index, command)
    }

    fn snapshot(&self) -> Vec<u8> {
        Self::snapshot(self)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        let restored = Self::restore(bytes).map_err(|error| RestoreError(error.to_string()))?;
        *self = restored.as_build_of(self.knows);
        Ok(())
    }
}
