//! How a pool renders a model's prompts, when its workers may differ.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use forebay_proto::WorkerId;
use forebay_proto::fleet::WorkerSpec;

use super::profile::RenderProfile;

/// How prompts of one model are rendered in its pool. It follows from the facts alone, so that all who know the
/// same revision read a prompt alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendering {
    /// What most workers say; none where this version does not know it.
    pub profile: Option<RenderProfile>,
    /// Those that say something else, ascending: nobody can tell what of a prompt they hold.
    pub unlike: Vec<WorkerId>,
}

impl Rendering {
    /// What most of them say, or, where as many say something else, what the first of these by id says: it has been
    /// there for longest.
    fn agreed(said: &[(WorkerId, Option<RenderProfile>)]) -> Self {
        let votes = |profile| {
            let alike = said.iter().filter(|(_, said)| *said == profile);
            let first = alike.clone().map(|(worker, _)| *worker).min();
            (alike.count(), Reverse(first))
        };
        let most = said.iter().max_by_key(|(_, profile)| votes(*profile));
        let profile = most.and_then(|(_, profile)| *profile);
        let unlike = said.iter().filter(|(_, said)| *said != profile);
        let mut unlike: Vec<WorkerId> = unlike.map(|(worker, _)| *worker).collect();
        unlike.sort_unstable();
        Self { profile, unlike }
    }

    /// Whether the worker renders prompts otherwise.
    #[must_use]
    pub fn is_unlike(&self, worker: WorkerId) -> bool {
        self.unlike.binary_search(&worker).is_ok()
    }
}

/// How each pool renders the prompts of each model and adapter, of the workers that are present in the facts.
pub fn renderings<'a>(
    workers: impl IntoIterator<Item = (WorkerId, &'a WorkerSpec)>,
) -> BTreeMap<(&'a str, &'a str), Rendering> {
    let mut said = BTreeMap::<_, Vec<_>>::new();
    for (worker, spec) in workers {
        let profile = RenderProfile::declared(&spec.labels);
        for name in spec.models.iter().chain(&spec.adapters) {
            let of = (spec.pool.as_str(), name.as_str());
            said.entry(of).or_default().push((worker, profile));
        }
    }
    let agreed = said.into_iter();
    agreed
        .map(|(of, said)| (of, Rendering::agreed(&said)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::RENDER_PROFILE;
    use super::*;

    /// `pool model profile`; `-`: none is said.
    fn spec(said: &str) -> WorkerSpec {
        let words: Vec<_> = said.split(' ').collect();
        let label = (RENDER_PROFILE.into(), words[2].into());
        let labels = (words[2] != "-").then_some(label);
        WorkerSpec {
            pool: words[0].into(),
            models: vec![words[1].into()],
            labels: labels.into_iter().collect(),
            ..WorkerSpec::default()
        }
    }

    /// What pool p makes of model m, and who is unlike; ids from 1.
    fn check(workers: &[&str], profile: Option<&str>, unlike: &[u32]) {
        let specs: Vec<_> = workers.iter().map(|said| spec(said)).collect();
        let mut numbered: Vec<_> = (1..).map(WorkerId).zip(&specs).collect();
        for _ in 0..workers.len() {
            numbered.rotate_left(1);
            let found = renderings(numbered.iter().copied());
            let found = &found[&("p", "m")];
            let id = found.profile.map(|profile| profile.id());
            assert_eq!(id.as_deref(), profile, "{workers:?}");
            let ids: Vec<u32> = found.unlike.iter().map(|id| id.0).collect();
            assert_eq!(ids, unlike, "{workers:?}");
            assert!(unlike.iter().all(|id| found.is_unlike(WorkerId(*id))));
        }
    }

    #[test]
    fn a_pool_renders_as_most_of_its_workers_do() {
        check(&["p m -", "p m -"], Some("system_tools"), &[]);
        check(&["p m -", "p m system_tools"], Some("system_tools"), &[]);
        let other = "p m tools_first+names";
        check(&["p m -", other, other], Some("tools_first+names"), &[1]);
        check(&["p m -", "p m -", other], Some("system_tools"), &[3]);
        check(&[other, "q m -", "p n -"], Some("tools_first+names"), &[]);
    }

    #[test]
    fn of_equals_the_older_wins_and_what_is_not_known_is_no_profile() {
        check(&["p m tools_first", "p m -"], Some("tools_first"), &[2]);
        check(&["p m -", "p m tools_first"], Some("system_tools"), &[2]);
        check(&["p m of_the_future", "p m -"], None, &[2]);
        let future = "p m of_the_future";
        check(&["p m -", "p m -", future], Some("system_tools"), &[3]);
        check(&[future, future], None, &[]);
    }
}
