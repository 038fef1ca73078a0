//! Whether the workers beside this one render prompts as it does.

use forebay_control_client::Facts;
use forebay_scheduler::fingerprint::{RENDER_PROFILE, RenderProfile};

/// Says once when another worker of the pool renders the same model's prompts otherwise.
#[derive(Default)]
pub(super) struct Peers {
    differs: bool,
}

impl Peers {
    pub(super) fn look(&mut self, facts: &Facts, name: &str) {
        let other = other(facts, name);
        let before = std::mem::replace(&mut self.differs, other.is_some());
        if let Some((peer, theirs, own)) = other.filter(|_| !before) {
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
fn other<'a>(facts: &'a Facts, name: &str) -> Option<(&'a str, String, String)> {
    let own = facts.workers.get(name)?;
    let said = |profile: Option<RenderProfile>| profile.map_or("unknown".into(), |p| p.id());
    let profile = RenderProfile::declared(&own.spec.labels);
    facts.workers.iter().find_map(|(peer, worker)| {
        let alike = worker.departed
            || worker.spec.pool != own.spec.pool
            || !worker
                .spec
                .models
                .iter()
                .any(|model| own.spec.models.contains(model))
            || RenderProfile::declared(&worker.spec.labels) == profile;
        (!alike).then(|| {
            let theirs = RenderProfile::declared(&worker.spec.labels);
            (peer.as_str(), said(theirs), said(profile))
        })
    })
}
