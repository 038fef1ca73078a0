//! The nodes of the control plane, and what they all understand.
//!
//! A change of the members travels in one entry with Raft's own change, and takes effect with it or
//! not at all ([`Fleet::apply_change`]), so that who votes and who is known never differ. Ids are
//! never used again: a node that was removed, or lost its disk, comes back as a new one.

use std::collections::BTreeSet;

use bytes::Bytes;
use forebay_proto::config::Config;
use forebay_proto::fleet::{Member, check_address};
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{ClusterId, NodeId};
use wire::change::Change;
use wire::command::Action;
use wire::outcome::Outcome;

use super::{Applied, Effect, Fleet};
use crate::bug::{Bug, on};
use crate::node::Members;
use crate::probe::{Probe, hit};

/// The feature level that changes of the members need.
pub const MEMBERS_LEVEL: u32 = 2;

/// The feature level that drains, and cordons judged by capacity, need.
pub const DRAINS_LEVEL: u32 = 4;

/// The feature level that prefix homes and rebalances need.
pub const HOMES_LEVEL: u32 = 5;

/// The feature level that suspicions and quarantines need.
pub const QUARANTINE_LEVEL: u32 = 6;

/// The feature level of the version that first understood this command.
#[must_use]
pub const fn level_of(action: &Action) -> u32 {
    match action {
        Action::ChangeMembers(_) | Action::RaiseFeatureLevel(_) => MEMBERS_LEVEL,
        Action::SetDesiredOf(_)
        | Action::StartDrain(_)
        | Action::CancelDrain(_)
        | Action::PassDrainDeadline(_) => DRAINS_LEVEL,
        Action::AssignHomes(_)
        | Action::StartRebalance(_)
        | Action::StepRebalance(_)
        | Action::StopRebalance(_)
        | Action::CancelRebalance(_) => HOMES_LEVEL,
        Action::AccuseRequests(_)
        | Action::ClearRequests(_)
        | Action::LiftQuarantine(_)
        | Action::ForgetSuspects(_) => QUARANTINE_LEVEL,
        Action::Register(_)
        | Action::Observe(_)
        | Action::Goodbye(_)
        | Action::SetDesired(_)
        | Action::Remove(_)
        | Action::ApplyConfig(_)
        | Action::Expire(_)
        | Action::RotateKey(_) => 1,
    }
}

/// The feature level that this command needs with what is in it.
fn needed(action: &Action) -> u32 {
    match action {
        Action::ApplyConfig(apply) => Config::level_of(&apply.config),
        action => level_of(action),
    }
}

/// Why a command must not even be proposed in a cell of this feature level: a node that does not
/// know it would refuse it in other words than one that does, and their states would differ.
/// Raising the level is left to whoever asked everyone.
#[must_use]
pub fn too_new(action: &Action, level: u32) -> Option<Refusal> {
    let needed = needed(action);
    let raises = matches!(action, Action::RaiseFeatureLevel(_));
    if needed <= level || raises || on(Bug::FeatureNotGated) {
        return None;
    }
    hit(Probe::FeatureTooNew);
    Some(Refusal::FeatureTooNew { needed, level })
}

impl Fleet {
    /// Applies one committed entry that carries Raft's change of its members, too; says besides
    /// whether that takes place. A repetition does not, because the first one did.
    pub fn apply_change(&mut self, index: u64, entry: &Bytes) -> (Applied, bool) {
        self.changing = true;
        let before = self.revision;
        let applied = self.apply(index, entry);
        self.changing = false;
        let done = matches!(applied.outcome.outcome, Some(Outcome::Done(_)));
        (applied, done && self.revision != before)
    }

    pub(super) fn change_members(
        &mut self,
        command: &wire::ChangeMembers,
    ) -> Result<Effect, Refusal> {
        self.needs(MEMBERS_LEVEL)?;
        if !self.changing {
            let problem = "takes effect with a change of the Raft group only";
            return Err(Refusal::invalid("change_members", problem));
        }
        let mut members = self.members.clone();
        let mut newest = self.newest_member;
        for (position, added) in command.add.iter().enumerate() {
            let path = |field: &str| format!("add[{position}].{field}");
            let added = Member::from_wire(added)
                .map_err(|error| Refusal::invalid(path("member"), error.to_string()))?;
            check_address(&added.address)
                .map_err(|problem| Refusal::invalid(path("address"), problem))?;
            if added.id.0 != newest + 1 {
                let problem = format!(
                    "is not {}, the next one: ids are never used again",
                    newest + 1
                );
                return Err(Refusal::invalid(path("id"), problem));
            }
            newest = added.id.0;
            for member in &members {
                let same = [
                    ("name", member.name == added.name),
                    ("address", member.address == added.address),
                    ("store_id", member.store_id == added.store_id),
                ];
                if let Some((field, _)) = same.into_iter().find(|(_, same)| *same) {
                    let problem = format!("is that of member {}", member.name);
                    return Err(Refusal::invalid(path(field), problem));
                }
            }
            members.push(Member {
                learner: true,
                ..added
            });
        }
        for id in &command.promote {
            let learner = members
                .iter_mut()
                .find(|member| member.id.0 == *id && member.learner)
                .ok_or_else(|| Refusal::invalid("promote", format!("node {id} is no learner")))?;
            learner.learner = false;
        }
        let gone: BTreeSet<_> = command.remove.iter().copied().map(NodeId).collect();
        if let Some(id) = gone
            .iter()
            .find(|id| members.iter().all(|member| member.id != **id))
        {
            return Err(Refusal::invalid(
                "remove",
                format!("node {id} is not a member"),
            ));
        }
        members.retain(|member| !gone.contains(&member.id));
        if members.len() > Members::MAX {
            return Err(Refusal::Full {
                what: "control nodes".into(),
                limit: Members::MAX as u64,
            });
        }
        if members.iter().all(|member| member.learner) {
            return Err(Refusal::invalid("remove", "leaves no node with a vote"));
        }
        self.newest_member = newest;
        if members == self.members {
            return Ok(Effect::unchanged());
        }
        self.members = members;
        let members = self.members.iter().map(Member::to_wire).collect();
        Ok(Effect::change(Change::Members(wire::MemberList {
            members,
        })))
    }

    pub(super) fn raise_feature_level(
        &mut self,
        command: &wire::RaiseFeatureLevel,
    ) -> Result<Effect, Refusal> {
        if command.to > self.knows {
            // Whoever proposed this counted this node among those that know it.
            let problem = format!("is {}, this node knows {}", command.to, self.knows);
            return Err(Refusal::invalid("raise_feature_level.to", problem));
        }
        if command.to <= self.feature_level {
            return Ok(Effect::unchanged());
        }
        self.feature_level = command.to;
        Ok(Effect::change(Change::FeatureLevel(command.to)))
    }

    /// A command that every member must understand to change its state alike.
    pub(super) fn needs(&self, level: u32) -> Result<(), Refusal> {
        if self.feature_level >= level {
            return Ok(());
        }
        Err(Refusal::FeatureTooNew {
            needed: level,
            level: self.feature_level,
        })
    }

    /// The same state as that of a new cluster of this one member, whose id is new.
    #[must_use]
    pub fn refounded(mut self, cluster_id: ClusterId, member: Member) -> Self {
        self.cluster_id = cluster_id;
        self.newest_member = self.newest_member.max(member.id.0);
        self.members = vec![Member {
            learner: false,
            ..member
        }];
        self
    }

    /// The newest id that any member ever had.
    #[must_use]
    pub const fn newest_member(&self) -> NodeId {
        NodeId(self.newest_member)
    }
}
