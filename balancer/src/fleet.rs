//! The facts as far as a balancer uses them: who may serve, and how each pool is treated.

use std::collections::BTreeMap;
use std::sync::Arc;

use forebay_proto::config::{Config, Pool};
use forebay_proto::suspect::Suspect;
use forebay_proto::{Family, FingerprintKey, Millis, Revision};
use forebay_scheduler::Known;
use forebay_scheduler::fingerprint::RenderProfile;

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

    /// How each model's prompts are rendered by the workers of its pool; none where they differ, or one says
    /// what this version does not know.
    pub(crate) fn profiles(
        &self,
        pools: &BTreeMap<Arc<str>, Arc<str>>,
    ) -> BTreeMap<Arc<str>, Option<RenderProfile>> {
        let mut profiles = BTreeMap::<Arc<str>, Option<RenderProfile>>::new();
        for worker in self.workers.iter().filter(|worker| !worker.departed) {
            let declared = RenderProfile::declared(&worker.spec.labels);
            for model in worker.names() {
                let Some((model, pool)) = pools.get_key_value(model) else {
                    continue;
                };
                if **pool == *worker.spec.pool {
                    let agreed = profiles.entry(model.clone()).or_insert(declared);
                    *agreed = agreed.filter(|agreed| Some(*agreed) == declared);
                }
            }
        }
        profiles
    }
}

#[cfg(test)]
mod tests {
    use forebay_proto::fleet::WorkerSpec;
    use forebay_proto::wire::fleet::Desired;
    use forebay_proto::{Incarnation, WorkerId};
    use forebay_scheduler::fingerprint::{RENDER_PROFILE, ToolsOrder};

    use super::*;

    /// `pool model profile`; a worker that left has `gone` behind it.
    fn worker(number: u32, said: &str) -> Known {
        let words: Vec<_> = said.split(' ').collect();
        let profile = words.get(2).filter(|profile| **profile != "-");
        let labels = profile.map(|profile| (RENDER_PROFILE.into(), (*profile).into()));
        Known {
            name: format!("w{number}"),
            incarnation: Incarnation {
                worker: WorkerId(number),
                grant: 1,
                start: 1,
            },
            spec: WorkerSpec {
                pool: words[0].into(),
                advertise: "10.0.0.1:7420".into(),
                engine: String::new(),
                models: vec![words[1].into()],
                revision: String::new(),
                gpu_type: String::new(),
                gpu_count: 0,
                kv_tokens: 0,
                max_context_tokens: 0,
                adapters: vec![],
                zone: String::new(),
                labels: labels.into_iter().collect(),
                slots: 1,
            },
            desired: Desired::Ready,
            departed: words.last() == Some(&"gone"),
        }
    }

    fn check(workers: &[&str], expected: Option<&str>) {
        let fleet = Fleet {
            revision: Revision(1),
            workers: (1..)
                .zip(workers)
                .map(|(n, said)| worker(n, said))
                .collect(),
            config: Config::default(),
            keys: vec![],
            families: vec![],
            suspects: vec![],
            cell_time: Millis(0),
        };
        let pools = BTreeMap::from([("m".into(), "p".into())]);
        let profile = fleet.profiles(&pools).remove("m").flatten();
        let id = profile.map(|profile| profile.id());
        assert_eq!(id.as_deref(), expected, "{workers:?}");
    }

    #[test]
    fn a_models_workers_have_to_agree_on_how_they_render() {
        check(&["p m -", "p m -"], Some("system_tools"));
        check(&["p m -", "p m system_tools"], Some("system_tools"));
        check(
            &["p m tools_first+names", "p m tools_first+names"],
            Some("tools_first+names"),
        );
        check(&["p m tools_first", "p m -"], None);
        check(&["p m -", "p m tools_first", "p m -"], None);
        check(&["p m of_the_future", "p m of_the_future"], None);
        check(&["p m tools_first", "p m - gone"], Some("tools_first"));
        check(&["p m tools_first", "q m -", "p n -"], Some("tools_first"));
        assert_eq!(RenderProfile::default().tools, ToolsOrder::SystemTools);
    }
}
