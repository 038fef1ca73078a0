//! A leader declares lost only whom it has not heard for a whole lease (I21).

use std::collections::BTreeMap;

use forebay_consensus::fleet::lease::AGENT_TTL;
use forebay_proto::{Incarnation, NodeId};

use super::{Held, Violation};

/// A renewal that a leader took.
#[derive(Clone, Copy, Debug)]
struct Heard {
    node: NodeId,
    at_us: u64,
}

#[derive(Default)]
pub(crate) struct Leases {
    heard: BTreeMap<Incarnation, Heard>,
    /// When each node last began to lead: until then it heard nobody.
    began: BTreeMap<NodeId, u64>,
    pub(crate) expiries: u64,
}

impl Leases {
    pub(crate) fn renewed(&mut self, node: NodeId, incarnation: Incarnation, at_us: u64) {
        self.heard.insert(incarnation, Heard { node, at_us });
    }

    pub(crate) fn began(&mut self, node: NodeId, at_us: u64) {
        self.began.insert(node, at_us);
    }

    /// The leader proposes that this one is lost. `jumped_at`: when its clock last jumped.
    pub(crate) fn expired(
        &mut self,
        node: NodeId,
        incarnation: Incarnation,
        at_us: u64,
        jumped_at: Option<u64>,
    ) -> Held {
        self.expiries += 1;
        let heard = self.heard.get(&incarnation);
        let heard = heard.filter(|heard| heard.node == node);
        let began = self.began.get(&node).copied();
        let Some(since) = heard.map(|heard| heard.at_us).max(began) else {
            return Ok(());
        };
        let clock_is_right = jumped_at.is_none_or(|jumped| jumped < since);
        // A clock may run a hundredth too fast.
        let silent_us = (at_us - since) * 102 / 100;
        if !clock_is_right || u128::from(silent_us) >= AGENT_TTL.as_micros() {
            return Ok(());
        }
        let detail = format!(
            "{node} declares {incarnation} lost, and heard it, or began to lead, {} ms before",
            (at_us - since) / 1_000
        );
        Err(Violation::new("lost-after-a-lease", detail))
    }
}
