//! Who belongs to the group, and how that changes.
//!
//! A change of one member takes effect at once; one of several goes through a joint membership, in
//! which both the old and the new group must agree (Ongaro, "Consensus: Bridging Theory and
//! Practice", 4.3), and which the leader leaves as soon as the change is applied.

use forebay_proto::NodeId;
use forebay_proto::wire::raft as wire;
use prost::Message as _;
use raft::eraftpb;
use serde::{Deserialize, Serialize};

/// Who belongs to the group. Sorted, without duplicates; no id is zero; a learner does not vote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawMembers")]
pub struct Members {
    voters: Vec<NodeId>,
    learners: Vec<NodeId>,
    /// The voters of before, while the group is between two memberships.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    outgoing: Vec<NodeId>,
    /// Of them those that will be learners.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    learners_next: Vec<NodeId>,
}

#[derive(Deserialize)]
struct RawMembers {
    voters: Vec<NodeId>,
    learners: Vec<NodeId>,
    #[serde(default)]
    outgoing: Vec<NodeId>,
    #[serde(default)]
    learners_next: Vec<NodeId>,
}

impl TryFrom<RawMembers> for Members {
    type Error = MembersError;

    fn try_from(raw: RawMembers) -> Result<Self, MembersError> {
        let lists = [
            &raw.voters,
            &raw.learners,
            &raw.outgoing,
            &raw.learners_next,
        ];
        if lists.iter().all(|list| list.is_empty()) {
            return Ok(Self::unknown());
        }
        Self::joint(raw.voters, raw.learners, raw.outgoing, raw.learners_next)
    }
}

/// Why a list of members cannot be a group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MembersError {
    /// Nobody votes.
    #[error("the group has no voter")]
    NoVoter,
    /// Zero is nobody's id.
    #[error("node id 0 cannot be a member")]
    Zero,
    /// One id stands twice.
    #[error("node {0} is named twice")]
    Twice(NodeId),
    /// More members than [`Members::MAX`].
    #[error("{0} members, at most {max} are supported", max = Members::MAX)]
    TooMany(usize),
    /// A list that no joint membership has.
    #[error("these members are between two memberships that do not fit each other")]
    Joint,
}

impl Members {
    /// The most members of a group, learners included.
    pub const MAX: usize = 32;

    /// Checks and sorts.
    ///
    /// # Errors
    ///
    /// Returns [`MembersError`] when this cannot be a group.
    pub fn new(
        voters: impl IntoIterator<Item = NodeId>,
        learners: impl IntoIterator<Item = NodeId>,
    ) -> Result<Self, MembersError> {
        let few = |ids: &mut dyn Iterator<Item = NodeId>| ids.take(Self::MAX + 1).collect();
        Self::joint(
            few(&mut voters.into_iter()),
            few(&mut learners.into_iter()),
            Vec::new(),
            Vec::new(),
        )
    }

    /// What a node that joins knows before its first snapshot: nobody.
    #[must_use]
    pub const fn unknown() -> Self {
        Self {
            voters: Vec::new(),
            learners: Vec::new(),
            outgoing: Vec::new(),
            learners_next: Vec::new(),
        }
    }

    fn joint(
        mut voters: Vec<NodeId>,
        mut learners: Vec<NodeId>,
        mut outgoing: Vec<NodeId>,
        mut learners_next: Vec<NodeId>,
    ) -> Result<Self, MembersError> {
        for list in [
            &mut voters,
            &mut learners,
            &mut outgoing,
            &mut learners_next,
        ] {
            list.sort_unstable();
        }
        let mut all: Vec<_> = voters.iter().chain(&learners).copied().collect();
        all.sort_unstable();
        if voters.is_empty() {
            return Err(MembersError::NoVoter);
        }
        let count = all.len().max(outgoing.len()).max(learners_next.len());
        if count > Self::MAX {
            return Err(MembersError::TooMany(count));
        }
        if all.contains(&NodeId(0)) {
            return Err(MembersError::Zero);
        }
        for list in [&all, &outgoing, &learners_next] {
            if let Some(pair) = list.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(MembersError::Twice(pair[0]));
            }
        }
        // A learner of the new group cannot vote in the old one: it would be in `learners_next`.
        if outgoing.contains(&NodeId(0))
            || learners.iter().any(|id| outgoing.contains(id))
            || learners_next
                .iter()
                .any(|id| !outgoing.contains(id) || all.contains(id))
        {
            return Err(MembersError::Joint);
        }
        Ok(Self {
            voters,
            learners,
            outgoing,
            learners_next,
        })
    }

    /// Those whose votes count, ascending.
    #[must_use]
    pub fn voters(&self) -> &[NodeId] {
        &self.voters
    }

    /// Those that only follow, ascending.
    #[must_use]
    pub fn learners(&self) -> &[NodeId] {
        &self.learners
    }

    /// Those whose votes count, too, while the group is between two memberships.
    #[must_use]
    pub fn outgoing(&self) -> &[NodeId] {
        &self.outgoing
    }

    /// Whether the group is between two memberships.
    #[must_use]
    pub fn is_joint(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether this node belongs to the group.
    #[must_use]
    pub fn contains(&self, node: NodeId) -> bool {
        [&self.voters, &self.learners, &self.outgoing]
            .iter()
            .any(|ids| ids.contains(&node))
    }

    /// Whether these nodes are a majority wherever one is needed.
    #[must_use]
    pub fn is_quorum(&self, has: impl Fn(NodeId) -> bool) -> bool {
        [&self.voters, &self.outgoing].iter().all(|ids| {
            let count = ids.iter().filter(|id| has(**id)).count();
            ids.is_empty() || count > ids.len() / 2
        })
    }

    pub(crate) fn from_raft(state: &eraftpb::ConfState) -> Result<Self, MembersError> {
        let ids = |ids: &[u64]| {
            ids.iter()
                .copied()
                .map(NodeId)
                .take(Self::MAX + 1)
                .collect()
        };
        Self::joint(
            ids(&state.voters),
            ids(&state.learners),
            ids(&state.voters_outgoing),
            ids(&state.learners_next),
        )
    }

    pub(crate) fn to_raft(&self) -> eraftpb::ConfState {
        let ids = |ids: &[NodeId]| ids.iter().map(|id| id.0).collect::<Vec<_>>();
        let mut state = eraftpb::ConfState::from((ids(&self.voters), ids(&self.learners)));
        state.voters_outgoing = ids(&self.outgoing);
        state.learners_next = ids(&self.learners_next);
        state.auto_leave = self.is_joint();
        state
    }
}

/// A change of the members. More than one step goes through a joint membership.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MembersChange {
    /// New nodes, which follow without a vote.
    pub add: Vec<NodeId>,
    /// Learners that get a vote.
    pub promote: Vec<NodeId>,
    /// Members that belong no more.
    pub remove: Vec<NodeId>,
}

/// Why the members are not changed so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeRefused {
    /// Nothing to do, or one node in two roles.
    #[error("a change names each node once, and at least one")]
    Malformed,
    /// A node is added that is there.
    #[error("{0} is a member already")]
    AlreadyMember(NodeId),
    /// A node is to be promoted that is no learner.
    #[error("{0} is no learner: add it first, and let it catch up")]
    NotALearner(NodeId),
    /// A node is removed that is not there.
    #[error("{0} is not a member")]
    NotAMember(NodeId),
    /// A learner that lacks entries would make every commit wait for it.
    #[error("{node} is {behind} entries behind: wait until it has caught up")]
    NotCaughtUp {
        /// Which.
        node: NodeId,
        /// How many entries it lacks.
        behind: u64,
    },
    /// The leader is never removed in place.
    #[error("{0} leads: hand the leadership over first (`forebay raft transfer`)")]
    Leader(NodeId),
    /// Another change is under way.
    #[error("another change of the members is under way: try again when it is done")]
    UnderWay,
    /// The group would have no majority that answers.
    #[error(
        "of the voters that would remain, {alive} of {voters} answer: nothing could be agreed on any more"
    )]
    NoQuorum {
        /// Voters that were heard lately.
        alive: usize,
        /// All voters there would be.
        voters: usize,
    },
    /// What would remain is no group.
    #[error(transparent)]
    Members(#[from] MembersError),
}

impl MembersChange {
    /// The change itself against the members as they are, and who would vote then.
    pub(crate) fn check(&self, members: &Members) -> Result<Vec<NodeId>, ChangeRefused> {
        let mut named: Vec<_> = [&self.add, &self.promote, &self.remove]
            .into_iter()
            .flatten()
            .copied()
            .collect();
        named.sort_unstable();
        if named.is_empty() || named.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(ChangeRefused::Malformed);
        }
        if members.is_joint() {
            return Err(ChangeRefused::UnderWay);
        }
        if let Some(there) = self.add.iter().find(|id| members.contains(**id)) {
            return Err(ChangeRefused::AlreadyMember(*there));
        }
        if let Some(id) = self
            .promote
            .iter()
            .find(|id| !members.learners.contains(id))
        {
            return Err(ChangeRefused::NotALearner(*id));
        }
        if let Some(id) = self.remove.iter().find(|id| !members.contains(**id)) {
            return Err(ChangeRefused::NotAMember(*id));
        }
        let stays = |id: &&NodeId| !self.remove.contains(id);
        let voters = members.voters.iter().filter(stays).chain(&self.promote);
        let voters: Vec<NodeId> = voters.copied().collect();
        let learners = members.learners.iter().filter(stays).chain(&self.add);
        let learners = learners.filter(|id| !self.promote.contains(id)).copied();
        Members::new(voters.iter().copied(), learners)?;
        Ok(voters)
    }

    /// As the entry's data.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let step = |kind| move |id: &NodeId| wire::ConfStep { kind, node: id.0 };
        let changes = self.promote.iter().map(step(VOTER));
        let changes = changes.chain(self.remove.iter().map(step(REMOVED)));
        let changes = changes.chain(self.add.iter().map(step(LEARNER))).collect();
        wire::ConfChange {
            transition: 0,
            changes,
            context: bytes::Bytes::new(),
        }
        .encode_to_vec()
    }
}

const VOTER: u32 = 0;
const REMOVED: u32 = 1;
const LEARNER: u32 = 2;

/// What raft-rs applies for an entry's change; `None` for what no node of ours writes.
///
/// Parsed here, because what a peer sent must not reach the parser of protobuf 2.
pub(crate) fn conf_change(data: &bytes::Bytes) -> Option<eraftpb::ConfChangeV2> {
    let decoded = wire::ConfChange::decode(data.clone()).ok()?;
    let fits = decoded.transition == 0
        && decoded.context.is_empty()
        && decoded.changes.len() <= Members::MAX
        && (data.is_empty() || !decoded.changes.is_empty());
    if !fits {
        return None;
    }
    let mut change = eraftpb::ConfChangeV2::default();
    for step in decoded.changes {
        let mut single = eraftpb::ConfChangeSingle {
            node_id: step.node,
            ..eraftpb::ConfChangeSingle::default()
        };
        single.set_change_type(match step.kind {
            VOTER => eraftpb::ConfChangeType::AddNode,
            REMOVED => eraftpb::ConfChangeType::RemoveNode,
            LEARNER => eraftpb::ConfChangeType::AddLearnerNode,
            _ => return None,
        });
        if step.node == 0 {
            return None;
        }
        change.mut_changes().push(single);
    }
    Some(change)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[u64]) -> Vec<NodeId> {
        ids.iter().copied().map(NodeId).collect()
    }

    #[test]
    fn a_change_is_checked_against_the_members_as_they_are() {
        let members = Members::new(ids(&[1, 2, 3]), ids(&[4])).unwrap();
        let check = |add: &[u64], promote: &[u64], remove: &[u64]| {
            let change = MembersChange {
                add: ids(add),
                promote: ids(promote),
                remove: ids(remove),
            };
            change.check(&members)
        };
        assert_eq!(check(&[5], &[], &[]), Ok(ids(&[1, 2, 3])));
        assert_eq!(check(&[], &[4], &[3]), Ok(ids(&[1, 2, 4])));
        assert_eq!(check(&[], &[], &[]), Err(ChangeRefused::Malformed));
        assert_eq!(check(&[], &[4], &[4]), Err(ChangeRefused::Malformed));
        assert_eq!(
            check(&[3], &[], &[]),
            Err(ChangeRefused::AlreadyMember(NodeId(3)))
        );
        assert_eq!(
            check(&[], &[3], &[]),
            Err(ChangeRefused::NotALearner(NodeId(3)))
        );
        assert_eq!(
            check(&[], &[], &[9]),
            Err(ChangeRefused::NotAMember(NodeId(9)))
        );
        assert_eq!(
            check(&[], &[], &[1, 2, 3]),
            Err(MembersError::NoVoter.into())
        );
    }

    #[test]
    fn a_change_reads_back_as_raft_writes_it() {
        let change = MembersChange {
            add: ids(&[9]),
            promote: ids(&[4]),
            remove: ids(&[300]),
        };
        let ours = bytes::Bytes::from(change.encode());
        let raft = conf_change(&ours).unwrap();
        let theirs = protobuf::Message::write_to_bytes(&raft).unwrap();
        assert_eq!(ours, theirs);
        assert_eq!(raft.enter_joint(), Some(true));
        assert_eq!(conf_change(&bytes::Bytes::new()).unwrap().changes.len(), 0);
        assert_eq!(conf_change(&bytes::Bytes::from_static(&[8, 1])), None);
    }

    #[test]
    fn a_joint_membership_needs_a_majority_of_both_groups() {
        let joint = Members::joint(ids(&[1, 2, 4]), vec![], ids(&[1, 2, 3]), vec![]).unwrap();
        assert!(joint.is_joint() && joint.contains(NodeId(3)));
        assert!(joint.is_quorum(|id| [1, 2].contains(&id.0)));
        assert!(!joint.is_quorum(|id| [1, 4].contains(&id.0)));
        let text = serde_json::to_string(&joint).unwrap();
        assert_eq!(serde_json::from_str::<Members>(&text).unwrap(), joint);
        let bad = Members::joint(ids(&[1]), ids(&[2]), ids(&[2]), vec![]);
        assert_eq!(bad, Err(MembersError::Joint));
    }
}
