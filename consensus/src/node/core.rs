//! The node: inputs, the ready loop's two halves, elections from the seed, and its status.

mod change;
mod look;

use std::time::Duration;

use bytes::Bytes;
use forebay_proto::NodeId;
use raft::eraftpb::{self, Message, MessageType};
use raft::{RawNode, Ready, SnapshotStatus, StateRole};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::error::{NodeError, ProposeRefused};
use super::log::Log;
use super::logger::logger;
use super::members::Members;
use super::status::SnapshotReport;
use super::step::{Outcome, ReadReady, Step, Write};
use super::types::{Entry, Restored, Snapshot};
use super::validate::{self, Rejected};

/// How often [`Node::tick`] is to be called.
pub const TICK: Duration = Duration::from_millis(50);
/// A leader shows itself every so many ticks.
pub const HEARTBEAT_TICKS: usize = 2;
/// A follower that hears no leader for this long, or up to [`MAX_ELECTION_TICKS`], stands.
pub const MIN_ELECTION_TICKS: usize = 10;
/// Above every election timeout (exclusive).
pub const MAX_ELECTION_TICKS: usize = 20;
/// A candidate that was not elected stands again after so many ticks: a split vote or a lost message
/// must not cost a whole timeout.
const MIN_RETRY_TICKS: u32 = 3;
/// And after so many more for each voter before it, so that two who split a vote do not split the next.
const RETRY_TICKS_APART: u32 = 2;
/// The largest command.
pub const MAX_COMMAND_BYTES: usize = 1 << 20;

const MAX_APPEND_BYTES: u64 = 512 << 10;
const MAX_INFLIGHT_APPENDS: usize = 128;
const MAX_UNCOMMITTED_BYTES: u64 = 16 << 20;
const MAX_COMMITTED_BYTES_PER_STEP: u64 = 4 << 20;

/// Who this node is and where its luck comes from.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// This member.
    pub id: NodeId,
    /// Seeds elections and marks this start's reads. A process gives a fresh random number, a
    /// simulation a chosen one.
    pub seed: u64,
}

/// One member of the group. See the module's page.
pub struct Node {
    raw: RawNode<Log>,
    members: Members,
    elections: StdRng,
    timeout: usize,
    /// Ticks that this node has stood without a result, and when it stands again.
    standing: u32,
    retry: u32,
    /// Marks reads of this start, so that an answer to an earlier start is not taken for ours.
    nonce: u64,
    leader_heard_ticks: u32,
    /// raft-rs moved the commit index in the second half of a step; the next write carries it.
    commit_owed: bool,
    /// A step is out; stays set if it is never persisted.
    stopped: bool,
    /// Entries were given out and are not applied yet.
    applying: bool,
    /// The term of the entry by which the group entered a joint membership.
    joint_since: u64,
}

impl Node {
    /// Starts from what the disk remembered, as a follower.
    ///
    /// # Errors
    ///
    /// Returns [`NodeError`] when that cannot be this member's memory.
    pub fn new(config: Config, restored: Restored) -> Result<Self, NodeError> {
        let members = restored.snapshot.members.clone();
        let joins = restored.snapshot.index == 0;
        if !joins && !members.contains(config.id) {
            return Err(NodeError::NotAMember {
                id: config.id,
                members,
            });
        }
        let log = Log::new(restored)?;
        let raft_config = raft::Config {
            id: config.id.0,
            election_tick: MIN_ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            min_election_tick: MIN_ELECTION_TICKS,
            max_election_tick: MAX_ELECTION_TICKS,
            applied: log.snapshot().index,
            max_size_per_msg: MAX_APPEND_BYTES,
            max_inflight_msgs: MAX_INFLIGHT_APPENDS,
            max_uncommitted_size: MAX_UNCOMMITTED_BYTES,
            max_committed_size_per_ready: MAX_COMMITTED_BYTES_PER_STEP,
            check_quorum: true,
            pre_vote: true,
            ..raft::Config::default()
        };
        let raw = RawNode::new(&raft_config, log, &logger(config.id.0))
            .map_err(|error| NodeError::Raft(error.to_string()))?;
        let mut node = Self {
            raw,
            members,
            elections: StdRng::seed_from_u64(config.seed),
            timeout: MIN_ELECTION_TICKS,
            standing: 0,
            retry: MIN_RETRY_TICKS,
            nonce: StdRng::seed_from_u64(!config.seed).random(),
            leader_heard_ticks: 0,
            commit_owed: false,
            stopped: false,
            applying: false,
            joint_since: 0,
        };
        node.draw_timeout();
        Ok(node)
    }

    /// One [`TICK`] has passed.
    pub fn tick(&mut self) {
        if self.stopped {
            return;
        }
        let before = self.position();
        self.raw.tick();
        self.leader_heard_ticks = match self.raw.raft.state {
            StateRole::Leader => 0,
            _ => self.leader_heard_ticks.saturating_add(1),
        };
        let stood = self.raw.raft.election_elapsed == 0;
        self.settle(before, stood);
        self.stand_again();
        self.leave_joint();
    }

    /// Stands again soon after an election without a winner. Pre-vote keeps that from disturbing a
    /// leader that others still hear.
    fn stand_again(&mut self) {
        let state = self.raw.raft.state;
        if !matches!(state, StateRole::Candidate | StateRole::PreCandidate) {
            self.standing = 0;
            return;
        }
        if self.standing == 0 {
            self.retry = self.retry_ticks();
        }
        self.standing += 1;
        if self.standing > self.retry {
            self.campaign();
        }
    }

    /// Stands for election without waiting, as the only voter of a group does at its start.
    pub fn campaign(&mut self) {
        if self.stopped {
            return;
        }
        let before = self.position();
        // The one error is a proposal's, which this is not.
        let _ = self.raw.campaign();
        self.settle(before, true);
        self.standing = 0;
        self.retry = self.retry_ticks();
    }

    fn retry_ticks(&self) -> u32 {
        let voters = self.members.voters();
        let before = voters.iter().filter(|voter| **voter < self.id()).count();
        MIN_RETRY_TICKS + RETRY_TICKS_APART * u32::try_from(before).unwrap_or_default()
    }

    /// Whether no other vote is needed.
    #[must_use]
    pub fn is_only_voter(&self) -> bool {
        self.members.voters() == [self.id()] && !self.members.is_joint()
    }

    /// A message of the peer `from` arrived.
    ///
    /// # Errors
    ///
    /// Returns why it was dropped; the node is unchanged.
    pub fn step(&mut self, from: NodeId, message: Message) -> Result<(), Rejected> {
        if self.stopped {
            return Err(Rejected::Stopped);
        }
        validate::check(&self.raw, from, &message)?;
        let before = self.position();
        let leads = matches!(
            message.get_msg_type(),
            MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot
        ) && message.term >= self.raw.raft.term;
        let stepped = self.raw.step(message);
        if leads {
            self.leader_heard_ticks = 0;
        }
        self.settle(before, false);
        stepped.map_err(|error| Rejected::Raft(error.to_string()))
    }

    /// Appends one command to the log if this node leads; returns its `(term, index)`.
    ///
    /// # Errors
    ///
    /// Returns [`ProposeRefused`]; nothing was appended.
    pub fn propose(&mut self, command: Bytes) -> Result<(u64, u64), ProposeRefused> {
        self.propose_all(vec![command])
    }

    /// Appends commands one after the other, all or none; returns `(term, index)` of the first.
    ///
    /// # Errors
    ///
    /// Returns [`ProposeRefused`]; nothing was appended.
    pub fn propose_all(&mut self, commands: Vec<Bytes>) -> Result<(u64, u64), ProposeRefused> {
        if self.stopped {
            return Err(ProposeRefused::Stopped);
        }
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader {
            return Err(ProposeRefused::NotLeader {
                leader: self.leader(),
            });
        }
        if commands.is_empty() {
            return Err(ProposeRefused::Empty);
        }
        for command in &commands {
            check_command(command)?;
        }
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = raft.id;
        let (term, first) = (raft.term, raft.raft_log.last_index() + 1);
        let entries = commands.into_iter().map(|data| eraftpb::Entry {
            data,
            ..eraftpb::Entry::default()
        });
        message.set_entries(entries.collect::<Vec<_>>().into());
        // Leadership is known, so only the bound on uncommitted bytes or a hand-over is left.
        self.raw
            .step(message)
            .map_err(|_| ProposeRefused::Overloaded)?;
        Ok((term, first))
    }

    /// All that the last step gave out has been applied.
    pub fn applied(&mut self) {
        if self.applying {
            self.raw.advance_apply();
            self.applying = false;
        }
    }

    /// Asks a quorum for an index at which a read is linearizable; it comes as a
    /// [`ReadReady`] with the same `ctx`.
    ///
    /// raft-rs drops the request silently when there is no leader, or a new one has not committed in
    /// its term: ask again, with another `ctx`, if nothing came.
    pub fn read_index(&mut self, ctx: u64) {
        if self.stopped {
            return;
        }
        let mut key = Vec::with_capacity(READ_KEY_BYTES);
        for part in [self.raw.raft.id, self.nonce, ctx] {
            key.extend_from_slice(&part.to_le_bytes());
        }
        self.raw.read_index(key);
    }

    /// Hands the leadership to another voter, within one election timeout or not at all.
    ///
    /// # Errors
    ///
    /// Refused when this node does not lead or `to` is no other voter.
    pub fn transfer(&mut self, to: NodeId) -> Result<(), Rejected> {
        if self.stopped {
            return Err(Rejected::Stopped);
        }
        if self.raw.raft.state != StateRole::Leader {
            return Err(Rejected::NotLeader);
        }
        if to == self.id() || !self.members.voters().contains(&to) {
            return Err(Rejected::Stranger(to));
        }
        self.raw.transfer_leader(to.0);
        Ok(())
    }

    /// A message to this peer could not be sent.
    pub fn report_unreachable(&mut self, peer: NodeId) {
        if !self.stopped {
            self.raw.report_unreachable(peer.0);
        }
    }

    /// A snapshot was sent to this peer, or could not be; until told, the leader sends it nothing.
    pub fn report_snapshot(&mut self, peer: NodeId, report: SnapshotReport) {
        if !self.stopped {
            let status = match report {
                SnapshotReport::Delivered => SnapshotStatus::Finish,
                SnapshotReport::Failed => SnapshotStatus::Failure,
            };
            self.raw.report_snapshot(peer.0, status);
        }
    }

    /// What to do next, if anything.
    pub fn ready(&mut self) -> Option<Step<'_>> {
        debug_assert!(
            !self.applying,
            "what was given out is applied before the next step"
        );
        if self.stopped || self.applying || !self.raw.has_ready() {
            return None;
        }
        let ready = self.raw.ready();
        self.stopped = true;
        let owed = std::mem::take(&mut self.commit_owed);
        Some(Step::new(self, ready, owed))
    }

    /// The second half of a step: the write is durable.
    pub(crate) fn persisted(&mut self, mut ready: Ready, write: Write) -> Outcome {
        let mut outcome = Outcome {
            send: ready.take_persisted_messages(),
            reads: self.own_reads(&mut ready),
            committed: ready
                .take_committed_entries()
                .iter()
                .map(Entry::from_raft)
                .collect(),
            installed: write.snapshot.clone(),
        };
        let log = self.raw.mut_store();
        if let Some(snapshot) = write.snapshot {
            self.members = snapshot.members.clone();
            log.install(snapshot);
        }
        log.append(&write.entries);
        if let Some(state) = write.hard_state {
            log.set_hard_state(state);
        }
        let mut light = self.raw.advance_append(ready);
        outcome.send.extend(light.take_messages());
        outcome
            .committed
            .extend(light.take_committed_entries().iter().map(Entry::from_raft));
        self.commit_owed |= light.commit_index().is_some();
        self.applying = true;
        self.stopped = false;
        outcome
    }

    /// Takes a snapshot that the machine made and the disk holds, and forgets entries up to `keep`
    /// before it. An index that was not yet given out for applying, or an older one, is ignored.
    pub fn compact(&mut self, snapshot: Snapshot, keep: u64) {
        let fits = snapshot.index <= self.raw.raft.raft_log.applied()
            && snapshot.index > self.raw.store().snapshot().index
            && self.raw.store().term_at(snapshot.index) == Some(snapshot.term);
        if fits {
            self.raw.mut_store().compact(snapshot, keep);
        }
    }

    fn own_reads(&self, ready: &mut Ready) -> Vec<ReadReady> {
        let ours = |key: &[u8]| {
            let part = |at: usize| Some(u64::from_le_bytes(key.get(at..at + 8)?.try_into().ok()?));
            (part(0)? == self.raw.raft.id && part(8)? == self.nonce).then(|| part(16))?
        };
        let states = ready.take_read_states();
        let reads = states.iter().filter_map(|state| {
            Some(ReadReady {
                ctx: ours(&state.request_ctx)?,
                index: state.index,
            })
        });
        reads.collect()
    }

    fn position(&self) -> (u64, StateRole, u64) {
        (
            self.raw.raft.term,
            self.raw.raft.state,
            self.raw.raft.leader_id,
        )
    }

    /// Puts our own election timeout in place of the one that raft-rs may just have drawn.
    fn settle(&mut self, before: (u64, StateRole, u64), stood: bool) {
        if stood || self.position() != before {
            self.draw_timeout();
        }
        self.raw.raft.set_randomized_election_timeout(self.timeout);
    }

    fn draw_timeout(&mut self) {
        self.timeout = self
            .elections
            .random_range(MIN_ELECTION_TICKS..MAX_ELECTION_TICKS);
        self.raw.raft.set_randomized_election_timeout(self.timeout);
    }
}

/// Node, start, caller's context.
const READ_KEY_BYTES: usize = 24;

fn check_command(command: &Bytes) -> Result<(), ProposeRefused> {
    if command.is_empty() {
        return Err(ProposeRefused::Empty);
    }
    if command.len() > MAX_COMMAND_BYTES {
        return Err(ProposeRefused::TooLarge(command.len()));
    }
    Ok(())
}
