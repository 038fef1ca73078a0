//! Changes of the group's members.

use bytes::Bytes;
use forebay_proto::NodeId;
use raft::StateRole;
use raft::eraftpb::{self, Message, MessageType};

use super::{Node, check_command};
use crate::node::error::ProposeRefused;
use crate::node::members::{self, ChangeRefused, Members, MembersChange};
use crate::node::types::Entry;
use crate::node::validate::Rejected;
use crate::probe::{Probe, hit};

/// A learner that lacks more entries than this gets no vote.
const MAX_BEHIND: u64 = 1_000;

impl Node {
    /// Appends a change of the members, and the command that it comes with, if this node leads;
    /// returns its `(term, index)`. It takes effect when it is applied, see [`Node::change_members`].
    ///
    /// # Errors
    ///
    /// Returns [`ProposeRefused`]; nothing was appended.
    pub fn propose_change(
        &mut self,
        change: &MembersChange,
        command: Bytes,
    ) -> Result<(u64, u64), ProposeRefused> {
        if self.stopped {
            return Err(ProposeRefused::Stopped);
        }
        if self.raw.raft.state != StateRole::Leader {
            return Err(ProposeRefused::NotLeader {
                leader: self.leader(),
            });
        }
        check_command(&command)?;
        self.check_change(change)?;
        self.append_change(change.encode().into(), command)
    }

    fn check_change(&self, change: &MembersChange) -> Result<(), ChangeRefused> {
        let raft = &self.raw.raft;
        if raft.has_pending_conf() {
            return Err(ChangeRefused::UnderWay);
        }
        let voters = change.check(&self.members)?;
        if change.remove.contains(&self.id()) {
            return Err(ChangeRefused::Leader(self.id()));
        }
        let progress = |id: &NodeId| raft.prs().get(id.0);
        for id in &change.promote {
            let matched = progress(id).map_or(0, |progress| progress.matched);
            let behind = raft.raft_log.committed.saturating_sub(matched);
            // One that acknowledged nothing has no snapshot yet.
            if behind > MAX_BEHIND || matched == 0 {
                let node = *id;
                return Err(ChangeRefused::NotCaughtUp { node, behind });
            }
        }
        let answers = |id: &&NodeId| {
            **id == self.id() || progress(id).is_some_and(|progress| progress.recent_active)
        };
        let (alive, voters) = (voters.iter().filter(answers).count(), voters.len());
        if alive <= voters / 2 {
            return Err(ChangeRefused::NoQuorum { alive, voters });
        }
        Ok(())
    }

    fn append_change(
        &mut self,
        change: Bytes,
        command: Bytes,
    ) -> Result<(u64, u64), ProposeRefused> {
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.raw.raft.id;
        let mut entry = eraftpb::Entry {
            data: change,
            context: command,
            ..eraftpb::Entry::default()
        };
        entry.set_entry_type(eraftpb::EntryType::EntryConfChangeV2);
        message.set_entries(vec![entry].into());
        let (term, index) = (self.raw.raft.term, self.raw.raft.raft_log.last_index() + 1);
        self.raw
            .step(message)
            .map_err(|_| ProposeRefused::Overloaded)?;
        Ok((term, index))
    }

    /// A leader leaves a joint membership that is applied; raft-rs itself does so only where the
    /// leader that entered it still leads.
    pub(super) fn leave_joint(&mut self) {
        let raft = &self.raw.raft;
        if self.members.is_joint()
            && raft.state == StateRole::Leader
            && !raft.has_pending_conf()
            && raft.raft_log.applied == raft.raft_log.committed
        {
            // Refused only while too much waits; the next tick tries again.
            let _ = self.append_change(Bytes::new(), Bytes::new());
        }
    }

    /// A committed change of the members that the machine agreed to takes effect, on this node. One
    /// that it refused must not be given here, on any node. Call it for each entry in order, between
    /// [`Step::persist`] and [`Node::applied`].
    ///
    /// # Errors
    ///
    /// Says why the change is none that raft can carry out; the group stays as it is, on every node.
    pub fn change_members(&mut self, entry: &Entry) -> Result<&Members, Rejected> {
        let impossible = || Rejected::MembershipChange { index: entry.index };
        let change = entry.change.as_ref().ok_or_else(impossible)?;
        let change = members::conf_change(change).ok_or_else(impossible)?;
        if change.changes.is_empty() && !self.members.is_joint() {
            // Two leaders left the same joint membership.
            return Ok(&self.members);
        }
        let before = self.position();
        let state = self
            .raw
            .apply_conf_change(&change)
            .map_err(|error| Rejected::Raft(error.to_string()))?;
        let raft = &mut self.raw.raft;
        if raft.state == StateRole::Leader && !state.voters.contains(&raft.id) {
            // A leader of before began its removal. raft-rs would let it lead on, and panics when it
            // next counts the votes that it has none of.
            hit(Probe::LeaderRemoved);
            let term = raft.term;
            raft.become_follower(term, raft::INVALID_ID);
        }
        self.settle(before, false);
        let was_joint = self.members.is_joint();
        self.members = Members::from_raft(&state)?;
        if self.members.is_joint() {
            self.joint_since = entry.term;
        } else if was_joint && self.joint_since != entry.term {
            hit(Probe::JointLeftByAnotherLeader);
        }
        Ok(&self.members)
    }
}
