//! The facts as far as a balancer uses them: who may serve, and how each pool is treated.

use forebay_proto::Revision;
use forebay_proto::config::{Config, Pool};
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
