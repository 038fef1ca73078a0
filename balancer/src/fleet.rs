//! The facts as far as a balancer uses them: who may serve, and how each pool is treated.

use std::collections::BTreeMap;
use std::sync::Arc;

use forebay_proto::config::{Config, Pool};
use forebay_proto::suspect::Suspect;
use forebay_proto::{Family, FingerprintKey, Millis, Revision};
use forebay_scheduler::Known;
use forebay_scheduler::fingerprint::{Rendering, renderings};

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
    /// Families of prompts, and who is to hold them.
    pub families: Vec<Family>,
    /// Requests that engines died under.
    pub suspects: Vec<Suspect>,
    /// The newest time that the cell agreed on.
    pub cell_time: Millis,
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

    /// How each model's prompts are rendered in its pool.
    pub(crate) fn renderings(
        &self,
        pools: &BTreeMap<Arc<str>, Arc<str>>,
    ) -> BTreeMap<Arc<str>, Rendering> {
        let present = self.workers.iter().filter(|worker| !worker.departed);
        let specs = present.map(|worker| (worker.incarnation.worker, &worker.spec));
        let found = renderings(specs).into_iter();
        let of_pool = found.filter_map(|((pool, model), rendering)| {
            let (model, serving) = pools.get_key_value(model)?;
            (**serving == *pool).then(|| (model.clone(), rendering))
        });
        of_pool.collect()
    }
}
