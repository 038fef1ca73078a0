//! A replica without its thread: takes inputs, and does in a turn what they lead to.
//!
//! The thread ([`super::start`]) and the fault simulator drive the same core: one with the clock and a
//! queue, the other with virtual time.

use std::any::Any;
use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use forebay_proto::{NodeId, Now};

use super::handle::{Input, ProposeError, Reply, Status, TransferError};
use super::reads::Reads;
use super::{
    Applied, Hook, Machine, Outbound, ReplicaOptions, RestoreError, StartError, StopReason,
};
use crate::bug::{Bug, on};
use crate::node::{
    Config, Entry, MAX_SNAPSHOT_BYTES, Message, Node, Outcome, ProposeRefused, Rejected, Restored,
    Role, Snapshot, Write,
};
use crate::probe::{Probe, hit};
use crate::store::{Store, StoreError};

/// Commands and bytes that go into the log together: one append to each follower.
const MAX_BATCH: usize = 512;
const MAX_BATCH_BYTES: usize = 256 << 10;
/// Proposals that wait for their entry to be applied.
const MAX_WAITERS: usize = 16_384;
/// At most one warning about a peer's messages in this time.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// Asked when the disk is full: waits, and says whether to try the write again.
pub type Patience = Box<dyn FnMut(&StoreError) -> bool + Send>;

/// A replica, to be driven by [`Core::take`], [`Core::tick`] and [`Core::turn`].
pub struct Core<M: Machine> {
    options: ReplicaOptions,
    node: Node,
    store: Store,
    machine: M,
    outbound: Box<dyn Outbound>,
    hook: Box<dyn Hook<M>>,
    patience: Patience,
    /// The last index that the machine includes.
    applied: u64,
    batch: Vec<(Bytes, Reply<M::Output>)>,
    batch_bytes: usize,
    /// By index: the term it was proposed in, and who waits.
    waiters: BTreeMap<u64, (u64, Reply<M::Output>)>,
    reads: Reads,
    warned_at: Option<Now>,
}

impl<M: Machine> Core<M> {
    /// Restores the machine and shows it to `hook`.
    ///
    /// # Errors
    ///
    /// Returns a [`StartError`] when the disk's memory cannot be used.
    pub fn new(
        options: ReplicaOptions,
        (store, restored): (Store, Restored),
        mut machine: M,
        outbound: Box<dyn Outbound>,
        mut hook: Box<dyn Hook<M>>,
        patience: Patience,
    ) -> Result<Self, StartError> {
        let snapshot = restored.snapshot.clone();
        let id = store.cluster().node_id;
        let seed = options.seed;
        let node = Node::new(Config { id, seed }, restored)?;
        // One that joins has no state yet.
        if snapshot.index > 0 {
            machine.restore(&snapshot.data)?;
        }
        // Before anyone can ask: nobody may take an empty state for the real one.
        hook.applied(&machine, snapshot.index, &[]);
        Ok(Self {
            options,
            node,
            store,
            machine,
            outbound,
            hook,
            patience,
            applied: snapshot.index,
            batch: Vec::new(),
            batch_bytes: 0,
            waiters: BTreeMap::new(),
            reads: Reads::default(),
            warned_at: None,
        })
    }

    /// A group of one elects itself at once.
    ///
    /// # Errors
    ///
    /// As [`Core::turn`].
    pub fn begin(&mut self, now: Now) -> Result<(), StopReason> {
        if self.node.is_only_voter() {
            self.node.campaign();
        }
        self.turn(now)
    }

    /// Takes one input; what it leads to happens in the next turn.
    pub fn take(&mut self, now: Now, input: Input<M::Output>) {
        match input {
            Input::Step { from, message } => {
                if let Err(rejected) = self.node.step(from, *message) {
                    self.note_rejected(now, &rejected);
                }
            }
            Input::Propose { command, reply } => {
                self.batch_bytes += command.len();
                self.batch.push((command, reply));
            }
            Input::Change {
                change,
                command,
                reply,
            } => {
                // In the order in which they came.
                self.propose_batch();
                let proposed = self.node.propose_change(&change, command.clone());
                if let (Ok((term, index)), true) = (&proposed, on(Bug::ChangeWhenProposed)) {
                    self.change_members(&Entry {
                        change: Some(change.encode().into()),
                        ..Entry::command(*index, *term, command)
                    });
                }
                self.wait_for(proposed, vec![reply]);
            }
            Input::Read { reply } => {
                let alone = on(Bug::LeaderReadsAlone) && self.node.role() == Role::Leader;
                if alone || on(Bug::StaleRead) {
                    let _ = reply.send(Ok(self.applied));
                } else {
                    self.reads.add(reply);
                }
            }
            Input::State { reply } => {
                if let Some(term) = self.node.term_at(self.applied).filter(|_| self.applied > 0) {
                    let _ = reply.send(self.state(term));
                }
            }
            Input::Transfer { to, reply } => {
                let begun = self.node.transfer(to);
                if begun.is_ok() {
                    hit(Probe::Transferred);
                }
                let _ = reply
                    .send(begun.map_err(|refused| TransferError::Refused(refused.to_string())));
            }
            Input::Unreachable(peer) => self.node.report_unreachable(peer),
            Input::Snapshot(peer, report) => self.node.report_snapshot(peer, report),
            Input::Stop => {}
        }
    }

    /// Whether a turn should come before more proposals.
    #[must_use]
    pub fn batch_is_full(&self) -> bool {
        self.batch.len() >= MAX_BATCH || self.batch_bytes >= MAX_BATCH_BYTES
    }

    /// One tick of [`ReplicaOptions::tick`] has passed.
    pub fn tick(&mut self) {
        self.node.tick();
    }

    /// When a turn is wanted without an input.
    #[must_use]
    pub fn wake_at(&self) -> Option<Now> {
        self.reads.wake_at()
    }

    /// Does all that the inputs lead to: proposes, writes, sends, applies, answers.
    ///
    /// # Errors
    ///
    /// Returns why the replica must end.
    pub fn turn(&mut self, now: Now) -> Result<(), StopReason> {
        self.propose_batch();
        self.drive()?;
        while let Some(ctx) = self.reads.question(now) {
            self.node.read_index(ctx);
            self.drive()?;
        }
        self.fail_lost_proposals();
        self.snapshot_when_due()
    }

    fn propose_batch(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        if batch.is_empty() {
            return;
        }
        let (commands, replies): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        let proposed = if self.waiters.len() + replies.len() > MAX_WAITERS {
            Err(ProposeRefused::Overloaded)
        } else {
            self.node.propose_all(commands)
        };
        self.wait_for(proposed, replies);
    }

    fn wait_for(
        &mut self,
        proposed: Result<(u64, u64), ProposeRefused>,
        replies: Vec<Reply<M::Output>>,
    ) {
        match proposed {
            Ok((term, first)) => {
                let waiters = replies.into_iter().map(|reply| (term, reply));
                self.waiters.extend((first..).zip(waiters));
            }
            Err(refused) => {
                for reply in replies {
                    let _ = reply.send(Err(refusal(&refused)));
                }
            }
        }
    }

    /// Does what the node says until it has nothing more to say.
    fn drive(&mut self) -> Result<(), StopReason> {
        while let Some(mut step) = self.node.ready() {
            for message in step.take_send_now() {
                send(&mut *self.outbound, message);
            }
            let (store, patience) = (&mut self.store, &mut self.patience);
            let Outcome {
                send: messages,
                installed,
                committed,
                reads,
            } = step.persist(|write| persist(store, write, patience))?;
            for message in messages {
                send(&mut *self.outbound, message);
            }
            if let Some(snapshot) = installed {
                self.install(&snapshot)?;
            }
            if !committed.is_empty() {
                self.apply(committed);
            }
            self.node.applied();
            for ready in reads {
                self.reads.answer(ready);
            }
            self.reads.applied(self.applied);
        }
        Ok(())
    }

    fn install(&mut self, snapshot: &Snapshot) -> Result<(), RestoreError> {
        hit(Probe::SnapshotInstalled);
        self.machine.restore(&snapshot.data)?;
        self.applied = snapshot.index;
        // Nobody leads while a snapshot is installed, so nothing that waits can have a result here.
        self.fail_all(&ProposeError::LeadershipLost);
        self.hook.applied(&self.machine, self.applied, &[]);
        Ok(())
    }

    fn apply(&mut self, committed: Vec<Entry>) {
        let mut results = Vec::with_capacity(committed.len());
        for entry in committed {
            self.applied = entry.index;
            if entry.is_noop() {
                continue;
            }
            let applied = |output| Applied {
                index: entry.index,
                term: entry.term,
                output,
            };
            if entry.change.is_none() {
                let output = self.machine.apply(entry.index, entry.term, &entry.data);
                results.push(applied(output));
                continue;
            }
            if entry.data.is_empty() {
                // A joint membership is left; no command comes with that.
                self.change_members(&entry);
                continue;
            }
            let (output, agreed) = self
                .machine
                .apply_change(entry.index, entry.term, &entry.data);
            results.push(applied(output));
            if agreed {
                self.change_members(&entry);
            } else {
                hit(Probe::ChangeRefused);
            }
        }
        self.hook.applied(&self.machine, self.applied, &results);
        for result in results {
            if let Some((term, reply)) = self.waiters.remove(&result.index) {
                let same = term == result.term || on(Bug::OutcomeOfAnother);
                let _ = reply.send(if same {
                    Ok(result)
                } else {
                    Err(ProposeError::LeadershipLost)
                });
            }
        }
    }

    fn change_members(&mut self, entry: &Entry) {
        match self.node.change_members(entry) {
            Ok(members) => tracing::info!(index = entry.index, ?members, "the members changed"),
            Err(problem) => {
                tracing::error!(index = entry.index, %problem, "a change of the members was passed over");
            }
        }
    }

    /// What this node proposed in a term that it no longer leads has an unknown outcome.
    fn fail_lost_proposals(&mut self) {
        if on(Bug::OutcomeOfAnother) {
            return;
        }
        let leads = self.node.role() == Role::Leader;
        let term = self.node.term();
        if self
            .waiters
            .values()
            .next_back()
            .is_some_and(|(proposed_in, _)| !leads || *proposed_in != term)
        {
            self.fail_all(&ProposeError::LeadershipLost);
        }
    }

    fn fail_all(&mut self, error: &ProposeError) {
        for (_, (_, reply)) in std::mem::take(&mut self.waiters) {
            hit(Probe::ProposalLost);
            let _ = reply.send(Err(error.clone()));
        }
    }

    fn snapshot_when_due(&mut self) -> Result<(), StopReason> {
        let members = self.node.members();
        if !members.contains(self.node.id()) {
            // It was removed: a snapshot of others is not one that it can begin from again.
            return Ok(());
        }
        let (entries, bytes) = self.node.log_size();
        // A node that was added can only be given a snapshot that has it as a member.
        let members_changed = self.node.members_changed();
        if entries < self.options.snapshot_entries
            && bytes < self.options.snapshot_bytes
            && !members_changed
        {
            return Ok(());
        }
        // Entries that are not applied yet cannot go into a snapshot; there is one for what is.
        let Some(term) = self.node.term_at(self.applied) else {
            return Ok(());
        };
        if self.node.snapshot_index() >= self.applied {
            return Ok(());
        }
        let mut snapshot = self.state(term);
        if on(Bug::SnapshotOfOlderMembers) {
            snapshot.members = self.node.snapshot_members().clone();
        }
        if snapshot.data.len() > MAX_SNAPSHOT_BYTES {
            let (bytes, max) = (snapshot.data.len(), MAX_SNAPSHOT_BYTES);
            tracing::error!(
                bytes,
                max,
                "the state is too large to be sent to a member that lost track"
            );
        }
        match self
            .store
            .save_snapshot(&snapshot, self.options.keep_entries)
        {
            // The log is whole without it; the next turn tries again.
            Err(full) if full.is_full() => {
                hit(Probe::DiskFull);
                return Ok(());
            }
            saved => saved?,
        }
        hit(Probe::SnapshotMade);
        self.node.compact(snapshot, self.options.keep_entries);
        Ok(())
    }

    /// The machine's state at the index that it includes, which has this term.
    fn state(&self, term: u64) -> Snapshot {
        Snapshot {
            index: self.applied,
            term,
            members: self.node.members().clone(),
            data: self.machine.snapshot().into(),
        }
    }

    /// What the replica knows of itself.
    #[must_use]
    pub fn status(&self) -> Status {
        let status = self.node.status();
        let tick_ms = u64::try_from(self.options.tick.as_millis()).unwrap_or(u64::MAX);
        Status {
            role: status.role,
            term: status.term,
            leader: status.leader,
            commit: status.commit,
            applied: self.applied,
            last_index: status.last_index,
            leader_heard_ms: tick_ms.saturating_mul(u64::from(status.leader_heard_ticks)),
            peers: status.peers,
            members: self.node.members().clone(),
            disk_full: false,
        }
    }

    /// The node, for those who look on.
    #[must_use]
    pub const fn node(&self) -> &Node {
        &self.node
    }

    /// The machine, for those who look on.
    #[must_use]
    pub const fn machine(&self) -> &M {
        &self.machine
    }

    /// The last index that the machine includes.
    #[must_use]
    pub const fn applied(&self) -> u64 {
        self.applied
    }

    fn note_rejected(&mut self, now: Now, rejected: &Rejected) {
        hit(Probe::MessageRejected);
        let harmless = matches!(
            rejected,
            Rejected::NotLeader | Rejected::NotYourLeadership(_) | Rejected::UnaskedVote
        );
        let quiet = self.warned_at.is_some_and(|at| now.since(at) < WARN_EVERY);
        if harmless || quiet {
            tracing::debug!(%rejected, "a peer's message was dropped");
        } else {
            self.warned_at = Some(now);
            tracing::warn!(%rejected, "a peer's message was dropped");
        }
    }
}

/// Writes, and waits while the disk is full; nothing that depends on it has left this node yet.
fn persist(store: &mut Store, write: &Write, patience: &mut Patience) -> Result<(), StoreError> {
    loop {
        match store.write(write) {
            Err(full) if full.is_full() => {
                hit(Probe::DiskFull);
                if !patience(&full) {
                    return Err(full);
                }
            }
            written => return written,
        }
    }
}

fn send(outbound: &mut dyn Outbound, message: Message) {
    let to = NodeId(message.to);
    outbound.send(to, message);
}

fn refusal(refused: &ProposeRefused) -> ProposeError {
    match refused {
        ProposeRefused::NotLeader { leader } => ProposeError::NotLeader { leader: *leader },
        ProposeRefused::Overloaded => ProposeError::Overloaded,
        ProposeRefused::Empty => ProposeError::Size(0),
        ProposeRefused::TooLarge(bytes) => ProposeError::Size(*bytes),
        ProposeRefused::Change(refused) => ProposeError::Change(refused.clone()),
        ProposeRefused::Stopped => ProposeError::Stopped,
    }
}

/// What a panic said, cut short: raft-rs' name indices and terms, never commands.
pub(super) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a text")
        .chars()
        .take(256)
        .collect()
}
