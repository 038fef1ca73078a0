//! Whether the workers beside this one render prompts as it does.

use forebay_control_client::Facts;
use forebay_proto::WorkerId;
use forebay_proto::fleet::WorkerSpec;
use forebay_scheduler::fingerprint::{RENDER_PROFILE, RenderProfile, renderings};

/// Says once when this worker renders prompts otherwise than its pool.
#[derive(Default)]
pub(super) struct Peers {
    differs: bool,
}

impl Peers {
    pub(super) fn look(&mut self, facts: &Facts, name: &str) {
        let present = facts.workers.values().filter(|worker| !worker.departed);
        let specs: Vec<_> = present.map(|worker| (worker.id, &worker.spec)).collect();
        let own = facts.workers.get(name);
        let pool = own.and_then(|own| other(&specs, own.id));
        let before = std::mem::replace(&mut self.differs, pool.is_some());
        if let (Some(own), Some(pool), false) = (own, pool, before) {
            tracing::warn!(
                own = said(RenderProfile::declared(&own.spec.labels)),
                pool = said(pool),
                "{RENDER_PROFILE}: this engine renders prompts otherwise than most of its pool; what it has cached counts for nothing until they are alike"
            );
        }
    }
}

/// How the worker's pool renders one of its models, if that is not how the worker does.
fn other(workers: &[(WorkerId, &WorkerSpec)], own: WorkerId) -> Option<Option<RenderProfile>> {
    let found = renderings(workers.iter().copied());
    let unlike = found.into_values().find(|one| one.is_unlike(own));
    unlike.map(|rendering| rendering.profile)
}

fn said(profile: Option<RenderProfile>) -> String {
    profile.map_or_else(|| "not known here".to_owned(), |profile| profile.id())
}
