//! At most one node leads in a term (I1).

use std::collections::BTreeMap;

use forebay_consensus::node::Role;
use forebay_consensus::replica::Status;
use forebay_proto::NodeId;

use super::{Held, Violation};

#[derive(Default)]
pub(crate) struct Election {
    leaders: BTreeMap<u64, NodeId>,
}

impl Election {
    pub(crate) fn status(&mut self, node: NodeId, status: &Status) -> Held {
        if status.role != Role::Leader {
            return Ok(());
        }
        let first = *self.leaders.entry(status.term).or_insert(node);
        if first == node {
            return Ok(());
        }
        let detail = format!("{first} and {node} both lead in term {}", status.term);
        Err(Violation::new("one-leader-a-term", detail))
    }

    /// Terms with a leader.
    pub(crate) fn terms(&self) -> usize {
        self.leaders.len()
    }
}
