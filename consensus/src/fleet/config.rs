//! The agreed configuration document: replaced whole, by compare-and-set.

use std::collections::BTreeSet;

use bytes::Bytes;
use forebay_proto::Revision;
use forebay_proto::config::{Config, ConfigError};
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use wire::change::Change;

use super::{Effect, Fleet};
use crate::bug::{Bug, on};

/// An encoded document, with whatever fields this version does not know.
pub(super) const MAX_CONFIG_BYTES: usize = 256 << 10;

/// The document that holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    /// The pools that it names.
    pub(super) pools: BTreeSet<String>,
    /// As it arrived.
    pub(super) bytes: Bytes,
    /// When it was applied; zero for the built-in one.
    pub(super) revision: Revision,
}

impl Agreed {
    pub(super) fn built_in() -> Self {
        let document = Config::default();
        Self::new(&document, document.to_wire(), Revision(0))
    }

    fn new(document: &Config, bytes: Bytes, revision: Revision) -> Self {
        let pools = document.pools.iter().map(|pool| pool.name.clone());
        Self {
            pools: pools.collect(),
            bytes,
            revision,
        }
    }

    /// The document that a cell agreed on at a feature level that is not above this one.
    pub(super) fn stored(
        bytes: Bytes,
        revision: Revision,
        level: u32,
    ) -> Result<Self, ConfigError> {
        // Below the level of targets nobody looked at them.
        let read = Config::from_wire_at(&bytes, level);
        let document =
            read.or_else(|problem| Config::from_wire_at(&bytes, 1).map_err(|_| problem))?;
        Ok(Self::new(&document, bytes, revision))
    }
}

impl Fleet {
    pub(super) fn apply_config(
        &mut self,
        at: Revision,
        command: &wire::ApplyConfig,
    ) -> Result<Effect, Refusal> {
        let level = if on(Bug::ConfigByOwnRules) {
            self.knows
        } else {
            // As every version reads it that is in the cell.
            self.feature_level.min(self.knows)
        };
        let document = read(&command.config, level)?;
        let current = self.config.revision;
        if command.expected_revision != current.0 && !on(Bug::ConfigOverwritten) {
            return Err(Refusal::RevisionConflict {
                expected: command.expected_revision,
                current: current.0,
            });
        }
        self.check_pools_in_use(&document)?;
        if command.config == self.config.bytes {
            return Ok(Effect::unchanged());
        }
        // A copy: a slice would keep the whole log entry in memory.
        let bytes = Bytes::copy_from_slice(&command.config);
        self.config = Agreed::new(&document, bytes, at);
        let mut effect = Effect::change(Change::Config(wire::ConfigChange {
            config: self.config.bytes.clone(),
            config_revision: at.0,
        }));
        let still = self.correlated.iter();
        let still = still.filter(|pool| self.config.pools.contains(*pool));
        let still = still.cloned().collect();
        effect.changes.extend(self.raise(still));
        effect.changes.extend(self.forget_rebalances());
        Ok(effect)
    }

    fn check_pools_in_use(&self, document: &Config) -> Result<(), Refusal> {
        let homeless = self
            .workers
            .values()
            .map(|worker| &worker.spec.pool)
            .find(|pool| document.pool(pool).is_none());
        let Some(pool) = homeless else { return Ok(()) };
        let workers = self.workers.values();
        let workers = workers.filter(|worker| worker.spec.pool == *pool).count();
        Err(Refusal::PoolInUse {
            pool: pool.clone(),
            workers: u32::try_from(workers).unwrap_or(u32::MAX),
        })
    }
}

fn read(bytes: &Bytes, level: u32) -> Result<Config, Refusal> {
    if bytes.len() > MAX_CONFIG_BYTES {
        let problem = format!("has {} bytes, at most {MAX_CONFIG_BYTES} fit", bytes.len());
        return Err(Refusal::invalid("config", problem));
    }
    Config::from_wire_at(bytes, level)
        .map_err(|error| Refusal::invalid(format!("config.{}", error.path), error.problem))
}
