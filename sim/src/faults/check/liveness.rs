//! After the faults end, the group elects a leader, everyone converges, and everyone who asks gets an
//! answer (F2).

use forebay_proto::{FEATURE_LEVEL, NodeId};

use super::super::party::Party;
use super::{Held, Violation};

const NAME: &str = "heals";

/// What there is at the end.
pub(crate) struct Rest {
    pub(crate) nodes: Vec<NodeRest>,
    /// Parties without an outcome since the second half of the healing.
    pub(crate) stuck: Vec<String>,
    pub(crate) watchers: Vec<(Party, u64)>,
    /// Balancers that would place nothing, although a worker is ready.
    pub(crate) idle: Vec<Party>,
    pub(crate) feature_level: Option<u32>,
}

/// One node that should be well.
#[derive(Debug)]
pub(crate) struct NodeRest {
    pub(crate) id: NodeId,
    /// Leader as it knows it, applied index, revision, whether the membership is joint; `None`: it
    /// does not run.
    pub(crate) state: Option<(Option<NodeId>, u64, u64, bool)>,
}

pub(crate) struct Liveness;

impl Liveness {
    pub(crate) fn check(rest: &Rest) -> Held {
        let broken = |detail: String| Err(Violation::new(NAME, detail));
        let mut leader = None;
        let mut revision = 0;
        let (mut least, mut most) = (u64::MAX, 0);
        for node in &rest.nodes {
            let Some((led_by, applied, at, joint)) = node.state else {
                return broken(format!("{} does not run", node.id));
            };
            let Some(led_by) = led_by else {
                return broken(format!("{} knows no leader: {:?}", node.id, rest.nodes));
            };
            if *leader.get_or_insert(led_by) != led_by {
                return broken(format!("{} follows {led_by}, others do not", node.id));
            }
            if joint {
                return broken(format!("{} is between two memberships", node.id));
            }
            revision = revision.max(at);
            least = least.min(applied);
            most = most.max(applied);
        }
        // What was just agreed may be on its way.
        if most.saturating_sub(least) > 50 {
            return broken(format!("one node is at {least}, another at {most}"));
        }
        if let Some(stuck) = rest.stuck.first() {
            return broken(format!("{stuck} gets no answer"));
        }
        for (watcher, at) in &rest.watchers {
            if at + 100 < revision {
                return broken(format!("{watcher:?} is at {at}, the facts at {revision}"));
            }
        }
        if let Some(idle) = rest.idle.first() {
            return broken(format!(
                "{idle:?} places nothing, although a worker is ready"
            ));
        }
        match rest.feature_level {
            Some(level) if level < FEATURE_LEVEL => {
                broken(format!("the feature level stays at {level}"))
            }
            _ => Ok(()),
        }
    }
}
