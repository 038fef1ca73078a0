//! What operators ask of the group itself.

use std::time::Duration;

use bytes::Bytes;
use forebay_proto::fleet::Member;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::control as wire;
use forebay_proto::wire::control::request::Request as Ask;
use forebay_proto::wire::control::response::Response;
use forebay_proto::wire::fleet::ChangeMembers;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::{Millis, NodeId};
use tokio::time::Instant;

use super::client::{ControlClient, Done, not_helpful, read_outcome, unexpected};
use crate::core::error::{ClientError, NodeError, Tried};
use crate::core::group::{AddError, Group, Step, next};

/// A node that does not answer a question about itself in this time is not reachable.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks for a leader, and at a node that joins.
const PAUSE: Duration = Duration::from_millis(100);

impl ControlClient {
    /// The group as its leader sees it.
    ///
    /// # Errors
    ///
    /// Returns why nobody leads, by the deadline.
    pub async fn group(&self, deadline: Duration) -> Result<Group, ClientError> {
        let until = Instant::now() + deadline;
        // Waits for an election, learns where everyone is, and says best what is wrong.
        self.read(deadline).await?;
        loop {
            let probed = self.probe_all(PROBE_PATIENCE).await;
            let statuses = probed.iter().filter_map(|(_, status)| status.as_ref().ok());
            if let Some(group) = Group::of(statuses) {
                return Ok(group);
            }
            if Instant::now() + PAUSE > until {
                let said = probed.into_iter().map(|(address, status)| {
                    let error = status
                        .err()
                        .unwrap_or(NodeError::NotLeader { leader: None });
                    (address, error)
                });
                let tried = Tried(said.collect());
                return Err(ClientError::NoQuorum { tried });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Makes the empty node at `address` a member that follows without a vote, and gives it its place.
    ///
    /// May be repeated: it goes on with what is left to do.
    ///
    /// # Errors
    ///
    /// Returns why not, and whether anything was changed.
    pub async fn add_member(
        &self,
        address: &str,
        reason: &str,
        deadline: Duration,
    ) -> Result<(Member, bool), AddError> {
        let until = Instant::now() + deadline;
        let left = || until.saturating_duration_since(Instant::now());
        let mut unchanged = true;
        loop {
            let group = self.group(left()).await?;
            let status = self.probe_one(address, left().min(PROBE_PATIENCE)).await?;
            match next(&group, address, &status)? {
                Step::Done(member) => return Ok((member, unchanged)),
                Step::Place(member) => {
                    unchanged = false;
                    self.place(&group, &member, left()).await?;
                    return Ok((member, unchanged));
                }
                Step::Agree(member) => {
                    let change = ChangeMembers {
                        add: vec![member.to_wire()],
                        ..ChangeMembers::default()
                    };
                    unchanged = false;
                    if let Err(error) = self.change_members(change, reason, left()).await {
                        // Somebody else added a node meanwhile: this one gets the next id.
                        let taken = match &error {
                            ClientError::Refused(Refusal::Invalid { path, .. }) => {
                                path == "add[0].id"
                            }
                            ClientError::Refused(Refusal::MembersUnfit { .. }) => {
                                let group = self.group(left()).await;
                                group.is_ok_and(|group| group.newest >= member.id)
                            }
                            _ => false,
                        };
                        if !taken || left().is_zero() {
                            return Err(error.into());
                        }
                    }
                }
            }
        }
    }

    async fn probe_one(
        &self,
        address: &str,
        patience: Duration,
    ) -> Result<wire::NodeStatus, AddError> {
        forebay_proto::fleet::check_address(address).map_err(AddError::Address)?;
        let probed = self.probe(vec![address.into()], patience).await;
        let answer = probed.into_iter().next().map(|(_, status)| status);
        answer
            .unwrap_or(Err(NodeError::NotAsked))
            .map_err(|error| AddError::Unreachable {
                address: address.into(),
                error,
            })
    }

    async fn place(
        &self,
        group: &Group,
        member: &Member,
        patience: Duration,
    ) -> Result<(), AddError> {
        let ask = Ask::Join(wire::Join {
            cluster_id: group.cluster_id.to_wire(),
            node_id: member.id.0,
            members: group.members.iter().map(Member::to_wire).collect(),
        });
        let error = match self.ask(&member.address, ask, patience).await {
            Ok(Response::Bootstrapped(_)) => return Ok(()),
            Ok(other) => not_helpful(other),
            Err(error) => error,
        };
        Err(AddError::Unfinished {
            address: member.address.clone(),
            id: member.id,
            error,
        })
    }

    /// Waits until the node has applied what the leader held when this was called; `false` at the
    /// deadline.
    pub async fn caught_up(&self, member: &Member, deadline: Duration) -> bool {
        let until = Instant::now() + deadline;
        let left = || until.saturating_duration_since(Instant::now());
        let Ok(group) = self.group(left()).await else {
            return false;
        };
        loop {
            let status = self
                .probe_one(&member.address, left().min(PROBE_PATIENCE))
                .await;
            if status.is_ok_and(|status| status.applied >= group.last_index) {
                return true;
            }
            if left() < PAUSE {
                return false;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Has the group agree on other members.
    ///
    /// # Errors
    ///
    /// As [`ControlClient::propose`].
    pub async fn change_members(
        &self,
        change: ChangeMembers,
        reason: &str,
        deadline: Duration,
    ) -> Result<Done, ClientError> {
        self.propose(Action::ChangeMembers(change), reason, deadline)
            .await
    }

    /// Hands the leadership to this voter and waits until it leads; `true` if it did already.
    ///
    /// # Errors
    ///
    /// Returns why it does not lead.
    pub async fn transfer(
        &self,
        to: NodeId,
        reason: &str,
        deadline: Duration,
    ) -> Result<bool, ClientError> {
        let ask = |left: Duration| {
            Ask::Transfer(wire::Transfer {
                to: to.0,
                reason: reason.into(),
                deadline_ms: Millis::from_duration(left).wire(),
            })
        };
        match self.call(deadline, ask).await? {
            (_, Response::Transferred(transferred)) => Ok(transferred.unchanged),
            (address, Response::Outcome(outcome)) => {
                let outcome = outcome.outcome.ok_or_else(|| unexpected(&address))?;
                read_outcome(&address, outcome).map(|done| done.unchanged)
            }
            (address, _) => Err(unexpected(&address)),
        }
    }

    /// The whole state as a file, at least as new as anything that was agreed on before this call.
    ///
    /// # Errors
    ///
    /// Returns why it could not be taken.
    pub async fn snapshot(&self, deadline: Duration) -> Result<Bytes, ClientError> {
        let ask = |left| {
            Ask::Snapshot(wire::Snapshot {
                deadline_ms: Millis::from_duration(left).wire(),
            })
        };
        // It may be large: one node gets all the time to send it.
        match self.call_patiently(deadline, deadline, ask).await? {
            (_, Response::Snapshot(snapshot)) => Ok(snapshot.file),
            (address, _) => Err(unexpected(&address)),
        }
    }

    /// Has the group agree on an entry of this size that changes nothing; how long the leader took.
    ///
    /// # Errors
    ///
    /// Returns why it was not agreed on.
    pub async fn measure(&self, bytes: u32, deadline: Duration) -> Result<Duration, ClientError> {
        let ask = |left| {
            Ask::Measure(wire::Measure {
                bytes,
                deadline_ms: Millis::from_duration(left).wire(),
            })
        };
        match self.call(deadline, ask).await? {
            (address, Response::Measured(measured)) => {
                self.note_leader(&address);
                Ok(Duration::from_micros(measured.commit_us))
            }
            (address, _) => Err(unexpected(&address)),
        }
    }
}
