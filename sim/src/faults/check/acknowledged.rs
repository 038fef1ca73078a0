//! What a client was told is done survives a loss of power on any minority (F1): it is on the disks of
//! a quorum when it is said.

use forebay_consensus::node::Members;
use forebay_proto::NodeId;

use super::{Held, Violation};

#[derive(Default)]
pub(crate) struct Acknowledged {
    looked: u64,
}

impl Acknowledged {
    /// Whether to look at the disks this time: it is slow.
    pub(crate) fn is_due(&mut self) -> bool {
        self.looked += 1;
        self.looked % 16 == 1
    }

    pub(crate) fn check(
        (index, term): (u64, u64),
        (members, before): (&Members, Option<&Members>),
        holds: impl Fn(NodeId) -> bool,
    ) -> Held {
        // What was committed before the members changed needed a quorum of those before.
        if members.is_quorum(&holds) || before.is_some_and(|before| before.is_quorum(&holds)) {
            return Ok(());
        }
        let detail =
            format!("{index}@{term} was acknowledged, and no quorum of {members:?} has it on disk");
        Err(Violation::new("acknowledged-is-on-a-quorum", detail))
    }
}
