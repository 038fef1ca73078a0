//! Whether the workers beside this one render prompts as it does.

use std::collections::BTreeMap;

use forebay_control_client::Facts;
use forebay_proto::fleet::WorkerSpec;
use forebay_scheduler::fingerprint::{RENDER_PROFILE, RenderProfile};

/// Says once when another worker of the pool renders the same model's prompts otherwise.
#[derive(Default)]
pub(super) struct Peers {
    differs: bool,
}

impl Peers {
    pub(super) fn look(&mut self, facts: &Facts, name: &str) {
        let present = facts.workers.iter().filter(|(_, worker)| !worker.departed);
        let specs = present.map(|(name, worker)| (name.as_str(), &worker.spec));
        let other = other(&specs.collect(), name);
        let before = std::mem::replace(&mut self.differs, other.is_some());
        if let Some(Other { peer, theirs, own }) = other.filter(|_| !before) {
            tracing::warn!(
                own,
                peer,
                theirs,
                "{RENDER_PROFILE} differs within the pool: prompts of the model are placed by load only until all its workers render alike"
            );
        }
    }
}

/// A worker that differs, what it says, and what this one does.
#[derive(Debug, PartialEq, Eq)]
struct Other<'a> {
    peer: &'a str,
    theirs: String,
    own: String,
}

fn other<'a>(workers: &BTreeMap<&'a str, &WorkerSpec>, name: &str) -> Option<Other<'a>> {
    let own = workers.get(name)?;
    let profile = RenderProfile::declared(&own.labels);
    workers.iter().find_map(|(peer, spec)| {
        let theirs = RenderProfile::declared(&spec.labels);
        let together =
            spec.pool == own.pool && spec.models.iter().any(|model| own.models.contains(model));
        (together && theirs != profile).then(|| Other {
            peer,
            theirs: said(theirs),
            own: said(profile),
        })
    })
}

fn said(profile: Option<RenderProfile>) -> String {
    profile.map_or_else(|| "not known here".to_owned(), |profile| profile.id())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `name pool model profile` of each; `-`: none is said.
    fn check(workers: &[&str], expected: Option<&str>) {
        let specs: Vec<(&str, WorkerSpec)> = workers.iter().map(|said| worker(said)).collect();
        let specs = specs.iter().map(|(name, spec)| (*name, spec)).collect();
        let found = other(&specs, "w1");
        assert_eq!(found.map(|other| other.peer), expected, "{workers:?}");
    }

    fn worker(said: &str) -> (&str, WorkerSpec) {
        let words: Vec<_> = said.split(' ').collect();
        let labels = (words[3] != "-").then(|| (RENDER_PROFILE.into(), words[3].into()));
        let spec = WorkerSpec {
            pool: words[1].into(),
            models: vec![words[2].into()],
            labels: labels.into_iter().collect(),
            advertise: "10.0.0.1:7420".into(),
            engine: String::new(),
            revision: String::new(),
            gpu_type: String::new(),
            gpu_count: 0,
            kv_tokens: 0,
            max_context_tokens: 0,
            adapters: vec![],
            zone: String::new(),
            slots: 1,
        };
        (words[0], spec)
    }

    #[test]
    fn a_worker_that_renders_otherwise_is_seen() {
        check(&["w1 p m tools_first", "w2 p m tools_first"], None);
        check(&["w1 p m tools_first", "w2 p m system_tools"], Some("w2"));
        check(&["w1 p m system_tools", "w2 p m -"], None);
        check(&["w1 p m -", "w2 p m of_the_future"], Some("w2"));
        check(
            &["w1 p m -", "w2 q m tools_first", "w3 p n tools_first"],
            None,
        );
        check(&["w2 p m tools_first", "w3 p m -"], None);
    }
}
