//! The facts as far as a balancer uses them: who may serve, and how each pool is treated.

use forebay_proto::config::{Config, Pool};
use forebay_proto::{FingerprintKey, Revision};
use forebay_scheduler::Known;

/// What the facts say, as of one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fleet {
    /// As of when.
    pub revision: Revision,
    /// Every worker.
    pub workers: Vec<Known>,
    /// How pools are treated.
    pub config: Config,
    /// Fingerprint keys, the newest last; none until the leader drew the first one.
    pub keys: Vec<FingerprintKey>,
}

impl Fleet {
    /// How the pool of this name is treated; one that the document does not name is treated as
    /// the built-in one.
    #[must_use]
    pub fn pool(&self, name: &str) -> Pool {
        self.config
            .pool(name)
            .cloned()
            .unwrap_or_else(|| Pool::named(name))
    }
}
