//! Who votes is who the fleet knows (I24): Raft's group and the members in the facts change together.

use std::collections::BTreeSet;

use forebay_consensus::node::Members;
use forebay_proto::NodeId;
use forebay_proto::wire::fleet as wire;

use super::{Held, Violation};

#[derive(Default)]
pub(crate) struct GroupIsFleet;

impl GroupIsFleet {
    pub(crate) fn check(&self, node: NodeId, group: &Members, facts: &wire::Facts) -> Held {
        let ids = |learners: bool| -> BTreeSet<NodeId> {
            let members = facts.members.iter();
            let members = members.filter(|member| member.learner == learners);
            members.map(|member| NodeId(member.id)).collect()
        };
        let set = |ids: &[NodeId]| ids.iter().copied().collect::<BTreeSet<_>>();
        // A joiner knows nobody until it has a snapshot.
        if facts.members.is_empty() {
            return Ok(());
        }
        if set(group.voters()) == ids(false) && set(group.learners()) == ids(true) {
            return Ok(());
        }
        let detail = format!(
            "on {node} the group is {group:?} and the facts of revision {} say voters {:?}, learners {:?}",
            facts.revision,
            ids(false),
            ids(true)
        );
        Err(Violation::new("the-group-is-the-fleets-members", detail))
    }
}
