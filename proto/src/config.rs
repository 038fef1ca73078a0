//! The fleet's configuration document: what operators edit, and what is checked before it is agreed.

use bytes::Bytes;
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::ids::check_name;
use crate::wire::fleet as wire;

/// Pools in one document.
pub const MAX_POOLS: usize = 256;

/// The document, whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Sets of interchangeable workers.
    pub pools: Vec<Pool>,
}

/// How requests to one pool are treated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// Its name, as agents give it.
    pub name: String,
    /// Requests that may wait in one balancer while no worker can take them; 0 to 100,000.
    #[serde(default = "defaults::queue_limit")]
    pub queue_limit: u32,
    /// How long a request may wait there; 1 ms to 10 min.
    #[serde(default = "defaults::queue_timeout_ms")]
    pub queue_timeout_ms: u32,
    /// Refusals after which the next worker has to queue the request; 0 to 8.
    #[serde(default = "defaults::max_refusals")]
    pub max_refusals: u32,
    /// From dispatch to the engine's first byte; 100 ms to 1 h.
    #[serde(default = "defaults::first_byte_timeout_ms")]
    pub first_byte_timeout_ms: u32,
    /// Between two pieces of an answer; 100 ms to 1 h.
    #[serde(default = "defaults::idle_timeout_ms")]
    pub idle_timeout_ms: u32,
    /// The placement rule, by its name; see [`POLICIES`].
    #[serde(default = "defaults::policy")]
    pub policy: String,
    /// Bytes of one chunk of a prompt's fingerprint: 128, 256 or 512. Fewer find more of short
    /// shared prefixes and cost more memory.
    #[serde(default = "defaults::chunk_bytes")]
    pub chunk_bytes: u32,
    /// Target of the first token, before what the prompt's length adds; 1 ms to 10 min.
    #[serde(default = "defaults::ttft_ms")]
    pub ttft_ms: u32,
    /// What each token of the prompt adds to it, in microseconds; 0 to 100,000.
    #[serde(default = "defaults::ttft_us_per_token")]
    pub ttft_us_per_token: u32,
    /// Target from token to token, in the mean; 1 ms to 1 min. Workers take no more requests at once
    /// than hold it.
    #[serde(default = "defaults::tpot_ms")]
    pub tpot_ms: u32,
    /// Whether requests that killed engines are told apart and refused. The switch for the day on which that
    /// does harm.
    #[serde(default = "defaults::quarantine")]
    pub quarantine: bool,
}

/// The feature level at which a document may name any of [`POLICIES`], and targets count.
pub const TARGETS_LEVEL: u32 = 3;

/// The feature level at which a document may switch quarantine off.
pub const QUARANTINE_LEVEL: u32 = 6;

/// Rules that a document may name at every feature level: as many of the first of [`POLICIES`].
const FIRST_POLICIES: usize = 7;

/// Placement rules that a pool may name.
pub const POLICIES: [&str; 15] = [
    "forebay",
    "round-robin",
    "random",
    "least-requests",
    "power-of-two",
    "longest-prefix",
    "bounded-hash",
    "sglang",
    "dynamo",
    "llm-d",
    "aibrix",
    "preble",
    "lmetric",
    "mooncake",
    "llumnix",
];

mod defaults {
    pub(super) const fn queue_limit() -> u32 {
        1_024
    }
    pub(super) const fn queue_timeout_ms() -> u32 {
        30_000
    }
    pub(super) const fn max_refusals() -> u32 {
        2
    }
    pub(super) const fn first_byte_timeout_ms() -> u32 {
        600_000
    }
    pub(super) const fn idle_timeout_ms() -> u32 {
        60_000
    }
    pub(super) fn policy() -> String {
        super::POLICIES[0].into()
    }
    pub(super) const fn chunk_bytes() -> u32 {
        256
    }
    pub(super) const fn ttft_ms() -> u32 {
        1_000
    }
    pub(super) const fn ttft_us_per_token() -> u32 {
        250
    }
    pub(super) const fn tpot_ms() -> u32 {
        150
    }
    pub(super) const fn quarantine() -> bool {
        true
    }
}

impl Pool {
    /// A pool with every setting at its default.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self {
            name: name.into(),
            queue_limit: defaults::queue_limit(),
            queue_timeout_ms: defaults::queue_timeout_ms(),
            max_refusals: defaults::max_refusals(),
            first_byte_timeout_ms: defaults::first_byte_timeout_ms(),
            idle_timeout_ms: defaults::idle_timeout_ms(),
            policy: defaults::policy(),
            chunk_bytes: defaults::chunk_bytes(),
            ttft_ms: defaults::ttft_ms(),
            ttft_us_per_token: defaults::ttft_us_per_token(),
            tpot_ms: defaults::tpot_ms(),
            quarantine: defaults::quarantine(),
        }
    }
}

/// The built-in document: one pool named `default`.
impl Default for Config {
    fn default() -> Self {
        Self {
            pools: vec![Pool::named("default")],
        }
    }
}

/// What is wrong with a document, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct ConfigError {
    /// Where, such as `pools[1].queue_limit`; empty for the document.
    pub path: String,
    /// What, and what to do.
    pub problem: String,
}

impl ConfigError {
    fn at(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            problem: problem.into(),
        }
    }
}

impl Config {
    /// Reads a document as operators write it (TOML) and checks it whole.
    ///
    /// # Errors
    ///
    /// Returns the first problem with its place.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)
            .map_err(|error| ConfigError::at("document", error.to_string().trim_end()))?;
        config.check()?;
        Ok(config)
    }

    /// The document as operators edit it.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("plain data serialises")
    }

    /// Decodes and checks a document as it is stored.
    ///
    /// # Errors
    ///
    /// Returns the first problem with its place.
    pub fn from_wire(bytes: &[u8]) -> Result<Self, ConfigError> {
        Self::from_wire_at(bytes, QUARANTINE_LEVEL)
    }

    /// The same as every version in a cell of this feature level reads it: what is newer is passed over
    /// or refused, as the oldest of them does.
    ///
    /// # Errors
    ///
    /// Returns the first problem with its place.
    pub fn from_wire_at(bytes: &[u8], level: u32) -> Result<Self, ConfigError> {
        let mut wire = wire::Config::decode(bytes)
            .map_err(|_| ConfigError::at("document", "does not decode"))?;
        if level < TARGETS_LEVEL {
            for pool in &mut wire.pools {
                pool.ttft_ms = None;
                pool.ttft_us_per_token = None;
                pool.tpot_ms = None;
            }
        }
        if level < QUARANTINE_LEVEL {
            for pool in &mut wire.pools {
                pool.without_quarantine = false;
            }
        }
        let pools = wire.pools.into_iter().map(|pool| Pool {
            name: pool.name,
            queue_limit: pool.queue_limit,
            queue_timeout_ms: pool.queue_timeout_ms,
            max_refusals: pool.max_refusals,
            first_byte_timeout_ms: pool.first_byte_timeout_ms,
            idle_timeout_ms: pool.idle_timeout_ms,
            // A document stored before these existed.
            policy: match pool.policy.as_str() {
                "" => defaults::policy(),
                _ => pool.policy,
            },
            chunk_bytes: match pool.chunk_bytes {
                0 => defaults::chunk_bytes(),
                bytes => bytes,
            },
            ttft_ms: pool.ttft_ms.unwrap_or(defaults::ttft_ms()),
            ttft_us_per_token: pool
                .ttft_us_per_token
                .unwrap_or(defaults::ttft_us_per_token()),
            tpot_ms: pool.tpot_ms.unwrap_or(defaults::tpot_ms()),
            quarantine: !pool.without_quarantine,
        });
        let config = Self {
            pools: pools.collect(),
        };
        config.check_at(level)?;
        Ok(config)
    }

    /// The feature level that a stored document needs.
    #[must_use]
    pub fn level_of(bytes: &[u8]) -> u32 {
        let new = Self::from_wire(bytes);
        let enough = [1, TARGETS_LEVEL]
            .into_iter()
            .find(|level| Self::from_wire_at(bytes, *level) == new);
        enough.unwrap_or(QUARANTINE_LEVEL)
    }

    /// The document for the wire and the log.
    #[must_use]
    pub fn to_wire(&self) -> Bytes {
        let pools = self.pools.iter().map(|pool| wire::Pool {
            name: pool.name.clone(),
            queue_limit: pool.queue_limit,
            queue_timeout_ms: pool.queue_timeout_ms,
            max_refusals: pool.max_refusals,
            first_byte_timeout_ms: pool.first_byte_timeout_ms,
            idle_timeout_ms: pool.idle_timeout_ms,
            policy: pool.policy.clone(),
            chunk_bytes: pool.chunk_bytes,
            ttft_ms: unless(pool.ttft_ms, defaults::ttft_ms()),
            ttft_us_per_token: unless(pool.ttft_us_per_token, defaults::ttft_us_per_token()),
            tpot_ms: unless(pool.tpot_ms, defaults::tpot_ms()),
            without_quarantine: !pool.quarantine,
        });
        wire::Config {
            pools: pools.collect(),
        }
        .encode_to_vec()
        .into()
    }

    /// The pool of this name.
    #[must_use]
    pub fn pool(&self, name: &str) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.name == name)
    }

    fn check(&self) -> Result<(), ConfigError> {
        self.check_at(QUARANTINE_LEVEL)
    }

    fn check_at(&self, level: u32) -> Result<(), ConfigError> {
        let policies = match level {
            TARGETS_LEVEL.. => &POLICIES[..],
            _ => &POLICIES[..FIRST_POLICIES],
        };
        if self.pools.is_empty() {
            return Err(ConfigError::at(
                "pools",
                "is empty: a fleet needs at least one pool",
            ));
        }
        if self.pools.len() > MAX_POOLS {
            return Err(ConfigError::at(
                "pools",
                format!("has more than {MAX_POOLS} entries"),
            ));
        }
        for (i, pool) in self.pools.iter().enumerate() {
            let at = |field: &str| format!("pools[{i}].{field}");
            check_name("pool", &pool.name)
                .map_err(|error| ConfigError::at(at("name"), error.to_string()))?;
            if self.pools[..i].iter().any(|other| other.name == pool.name) {
                return Err(ConfigError::at(
                    at("name"),
                    format!("{:?} appears twice", pool.name),
                ));
            }
            for (field, value, low, high) in [
                ("queue_limit", pool.queue_limit, 0, 100_000),
                ("queue_timeout_ms", pool.queue_timeout_ms, 1, 600_000),
                ("max_refusals", pool.max_refusals, 0, 8),
                (
                    "first_byte_timeout_ms",
                    pool.first_byte_timeout_ms,
                    100,
                    3_600_000,
                ),
                ("idle_timeout_ms", pool.idle_timeout_ms, 100, 3_600_000),
                ("ttft_ms", pool.ttft_ms, 1, 600_000),
                ("ttft_us_per_token", pool.ttft_us_per_token, 0, 100_000),
                ("tpot_ms", pool.tpot_ms, 1, 60_000),
            ] {
                if !(low..=high).contains(&value) {
                    let problem = format!("is {value}, must be {low} to {high}");
                    return Err(ConfigError::at(at(field), problem));
                }
            }
            if !policies.contains(&pool.policy.as_str()) {
                let problem = format!("is none of {}", policies.join(", "));
                return Err(ConfigError::at(at("policy"), problem));
            }
            if ![128, 256, 512].contains(&pool.chunk_bytes) {
                let problem = format!("is {}, must be 128, 256 or 512", pool.chunk_bytes);
                return Err(ConfigError::at(at("chunk_bytes"), problem));
            }
        }
        Ok(())
    }
}

/// A value that is written only where it is not the default one: nodes of all versions found a cell with
/// the same bytes.
fn unless(value: u32, default: u32) -> Option<u32> {
    (value != default).then_some(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn problem(toml: &str) -> String {
        Config::from_toml(toml).unwrap_err().to_string()
    }

    #[test]
    fn the_built_in_document_is_valid_in_every_form() {
        let built_in = Config::default();
        assert_eq!(Config::from_toml(&built_in.to_toml()), Ok(built_in.clone()));
        assert_eq!(Config::from_wire(&built_in.to_wire()), Ok(built_in));
    }

    #[test]
    fn a_bad_document_is_refused_with_its_place() {
        assert_eq!(
            problem("pools = []"),
            "pools: is empty: a fleet needs at least one pool"
        );
        assert!(problem("[[pools]]\nname = \"a/b\"").starts_with("pools[0].name: "));
        assert!(problem("[[pools]]\nname = \"a\"\n[[pools]]\nname = \"a\"").contains("twice"));
        assert!(problem("[[pools]]\nname = \"a\"\nqueue_timeout_ms = 0").contains("must be 1 to"));
        assert!(problem("[[pools]]\nname = \"a\"\ncolour = 1").contains("unknown field"));
        assert!(problem("[[pools]]\nname = \"a\"\npolicy = \"best\"").contains("none of forebay"));
        assert!(problem("[[pools]]\nname = \"a\"\nchunk_bytes = 100").contains("128, 256 or 512"));
        assert!(problem("[[pools]]\nname = \"a\"\ntpot_ms = 0").starts_with("pools[0].tpot_ms: "));
        assert!(problem("[[pools]\n").starts_with("document: "));
    }

    #[test]
    fn default_targets_are_not_written_and_a_document_is_as_before_there_were_any() {
        let mut config = Config::default();
        let wire = wire::Config::decode(config.to_wire()).unwrap();
        let pool = &wire.pools[0];
        let targets = (pool.ttft_ms, pool.ttft_us_per_token, pool.tpot_ms);
        assert_eq!(targets, (None, None, None));
        assert_eq!(Config::from_wire(&config.to_wire()), Ok(config.clone()));
        config.pools[0].tpot_ms = 60;
        assert_eq!(Config::from_wire(&config.to_wire()), Ok(config));
    }

    #[test]
    fn what_is_newer_than_the_feature_level_is_refused_or_passed_over_as_an_older_version_does() {
        let mut config = Config::default();
        config.pools[0].policy = POLICIES[FIRST_POLICIES].into();
        let bytes = config.to_wire();
        assert_eq!(Config::level_of(&bytes), TARGETS_LEVEL);
        let problem = Config::from_wire_at(&bytes, TARGETS_LEVEL - 1).unwrap_err();
        assert!(problem.problem.ends_with("longest-prefix, bounded-hash"));
        assert_eq!(Config::from_wire(&bytes), Ok(config));
        let mut config = Config::default();
        config.pools[0].tpot_ms = 0;
        let bytes = config.to_wire();
        assert_eq!(Config::level_of(&bytes), TARGETS_LEVEL);
        assert_eq!(Config::from_wire_at(&bytes, 1), Ok(Config::default()));
        assert_eq!(Config::level_of(&Config::default().to_wire()), 1);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Config::from_wire(&bytes);
            let _ = Config::from_toml(&String::from_utf8_lossy(&bytes));
        }
    }
}
