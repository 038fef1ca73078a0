//! One control node: a disk, a clock, and the process on them while it runs.
//!
//! The process is the real one without its threads and sockets: the replica's core, the leader's reign,
//! what it publishes, and the controller.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_consensus::fleet::reign::{self, Asked, Reign};
use forebay_consensus::fleet::{Applied, Fleet, level_of, too_new};
use forebay_consensus::node::{
    Members, MembersChange, Message, Restored, Role, Snapshot, SnapshotReport,
};
use forebay_consensus::replica::core::Core;
use forebay_consensus::replica::{
    Applied as Entry, Input, ProposeError, ReadError, ReplicaOptions, Status, StopReason,
};
use forebay_consensus::server::publish::{Next, Publisher};
use forebay_consensus::store::disk::Disk;
use forebay_consensus::store::{
    ClusterFile, MemberRecord, Opened, Store, StoreError, StoreOptions,
};
use forebay_controller::{Action, Controller};
use forebay_proto::wire::control;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{FEATURE_LEVEL, Identity, Incarnation, Millis, NodeId, Now, WorkerId};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::oneshot;
use wire::command;

use super::disk::SimDisk;
use super::params::Params;
use super::party::{Answer, Ask, Party};

/// As the replica's thread does: inputs that wait, inputs a turn, ticks made up for.
const MAX_INBOX: usize = 4_096;
const MAX_INPUTS_PER_TURN: usize = 1_024;
const MAX_CATCH_UP_TICKS: u32 = 4;
/// What a wall clock says when the world begins.
pub(super) const WALL_CLOCK: Millis = Millis(1_800_000_000_000);
/// As the server does: a member that was silent for longer may come back as an older version.
const PRESENT: Duration = Duration::from_secs(3);
const HEARTBEAT: Duration = Duration::from_millis(250);
const CONTROLLER_EVERY: Duration = Duration::from_millis(500);

/// One control node.
pub(super) struct Host {
    pub(super) id: NodeId,
    pub(super) name: String,
    pub(super) disk: SimDisk,
    pub(super) clock: Clock,
    pub(super) process: Option<Process>,
    /// Processes started so far: what was meant for an earlier one is not for this one.
    pub(super) starts: u32,
    pub(super) inbox: Vec<Incoming>,
    pub(super) turn_is_due: bool,
    /// It stands still until then, in microseconds of the world.
    pub(super) paused_until: u64,
    /// Its disk has no room until then.
    pub(super) full_until: u64,
    /// A bit of its disk was turned: it may refuse to start.
    pub(super) rotten: bool,
    /// Why its disk cannot be used any more.
    pub(super) refused: Option<String>,
    /// The newest feature that the version on it understands.
    pub(super) knows: u32,
    /// Not in the group any more.
    pub(super) removed: bool,
    /// The group as its process has it, and the one before if it changed in this turn.
    pub(super) group: Option<Members>,
    pub(super) group_before: Option<Members>,
    /// Its clock jumped then last.
    pub(super) jumped_at: Option<u64>,
}

/// A monotonic clock that runs a little wrong.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    /// What it showed when the world began, and jumps since, in microseconds.
    pub(super) ahead: u64,
    pub(super) drift_ppm: i64,
}

/// What waits for a process.
#[allow(clippy::large_enum_variant)] // few at a time, and moved at once
pub(super) enum Incoming {
    Raft {
        from: NodeId,
        /// The newest feature that the sender understands.
        level: u32,
        message: Box<Message>,
    },
    Unreachable(NodeId),
    Snapshot(NodeId, SnapshotReport),
    Ask {
        party: Party,
        number: u64,
        ask: Ask,
    },
}

/// What happened in a process, for the checks.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) messages: Vec<(NodeId, Message)>,
    pub(super) batches: Vec<Batch>,
    /// A write found the disk full: what comes after waits.
    pub(super) stalled: bool,
}

/// The machine after a batch was applied.
pub(super) struct Batch {
    pub(super) applied: u64,
    pub(super) outputs: Vec<(u64, u64, Applied)>,
    pub(super) facts: wire::Facts,
    pub(super) state_hash: Option<[u8; 32]>,
    pub(super) audit: Vec<wire::AuditEntry>,
    pub(super) audit_head: [u8; 32],
    pub(super) audit_count: u64,
    pub(super) cell_time: Millis,
    pub(super) newest_member: NodeId,
}

pub(super) struct Process {
    pub(super) core: Core<Fleet>,
    pub(super) reign: Reign,
    /// The newest feature that it understands.
    knows: u32,
    /// When a member was heard last, and which feature it understood.
    heard: BTreeMap<NodeId, (Now, u32)>,
    election: Option<(u64, u64)>,
    pub(super) publisher: Arc<Publisher>,
    controller: Controller,
    pub(super) seen: Arc<Mutex<Seen>>,
    waiting: Vec<Waiting>,
    /// Observations under way, one a worker.
    observing: BTreeMap<WorkerId, oneshot::Receiver<Result<Entry<Applied>, ProposeError>>>,
    own: Vec<oneshot::Receiver<Result<Entry<Applied>, ProposeError>>>,
    next_tick: Now,
    next_step: Now,
    pub(super) streams: BTreeMap<Party, Stream>,
}

/// A watch, on the node's side.
pub(super) struct Stream {
    held: u64,
    started: bool,
    beat_at: Now,
    /// Its number at the watcher.
    pub(super) number: u64,
    /// When the last frame arrives: frames do not overtake each other.
    pub(super) arrives: u64,
}

enum Waiting {
    Outcome {
        party: Party,
        number: u64,
        /// The worker that registers.
        registers: Option<String>,
        reply: oneshot::Receiver<Result<Entry<Applied>, ProposeError>>,
    },
    Read {
        party: Party,
        number: u64,
        reply: oneshot::Receiver<Result<u64, ReadError>>,
    },
    Transfer {
        party: Party,
        number: u64,
        reply: oneshot::Receiver<Result<(), forebay_consensus::replica::TransferError>>,
    },
}

/// What a turn led to.
#[derive(Default)]
pub(super) struct Turned {
    pub(super) answers: Vec<(Party, u64, Answer)>,
    /// A reign began in this term.
    pub(super) began: Option<u64>,
    /// What the controller declares lost: the incarnation, and since when it was silent.
    pub(super) expired: Vec<(Incarnation, Duration)>,
}

impl Clock {
    /// What it shows at this microsecond of the world.
    pub(super) fn at(&self, world_us: u64) -> Now {
        let drift = i128::from(world_us) * i128::from(self.drift_ppm) / 1_000_000;
        let shown = i128::from(world_us) + drift + i128::from(self.ahead);
        Now::at(Duration::from_micros(
            u64::try_from(shown.max(0)).unwrap_or(u64::MAX),
        ))
    }

    /// How long the world takes for this time of the clock, in microseconds.
    pub(super) fn lasts(&self, shown: Duration) -> u64 {
        let shown = i128::try_from(shown.as_micros()).unwrap_or(i128::MAX);
        let world = shown * 1_000_000 / (1_000_000 + i128::from(self.drift_ppm));
        u64::try_from(world.max(1)).unwrap_or(u64::MAX)
    }
}

fn folder() -> PathBuf {
    PathBuf::from("/data/node")
}

fn store_options(params: &Params, disk: &SimDisk) -> StoreOptions {
    StoreOptions {
        segment_bytes: params.segment_bytes,
        disk: Arc::new(disk.clone()),
    }
}

/// Makes an empty disk the memory of a member.
pub(super) fn found(
    params: &Params,
    disk: &SimDisk,
    cluster: ClusterFile,
    snapshot: &Snapshot,
) -> Result<(), StoreError> {
    disk.create_dir(&PathBuf::from("/data"))
        .map_err(|source| StoreError::Io {
            action: "create",
            path: folder(),
            source,
        })?;
    match Store::open(folder(), store_options(params, disk))? {
        Opened::Uninitialised(empty) => empty.bootstrap(cluster, snapshot).map(|_| ())?,
        Opened::Member(..) => {}
    }
    disk.killed();
    Ok(())
}

/// What a disk would give back to a process that starts on it now.
pub(super) fn recover(params: &Params, disk: &SimDisk) -> Result<(Store, Restored), StoreError> {
    match Store::open(folder(), store_options(params, disk))? {
        Opened::Member(store, restored) => Ok((*store, *restored)),
        Opened::Uninitialised(_) => Err(StoreError::LogMissing { dir: folder() }),
    }
}

impl Host {
    /// Starts a process on the disk.
    ///
    /// # Errors
    ///
    /// Says why the disk cannot be used.
    pub(super) fn start(
        &mut self,
        params: &Params,
        seed: u64,
        now_us: u64,
    ) -> Result<Restored, String> {
        let now = self.clock.at(now_us);
        let (store, restored) = recover(params, &self.disk).map_err(|error| error.to_string())?;
        let cluster = store.cluster().clone();
        let publisher = Arc::new(Publisher::new(cluster.cluster_id, params.max_deltas));
        let seen = Arc::new(Mutex::new(Seen::default()));
        let outbox = seen.clone();
        let outbound = move |to, message| outbox.lock().messages.push((to, message));
        let (shown, noted) = (publisher.clone(), seen.clone());
        let mut audited = None;
        let hook = move |fleet: &Fleet, applied: u64, outputs: &[Entry<Applied>]| {
            shown.publish(fleet, applied, outputs);
            let batch = batch(fleet, applied, outputs, &mut audited);
            noted.lock().batches.push(batch);
        };
        let (stalled, disk) = (seen.clone(), self.disk.clone());
        let patience = move |_: &StoreError| {
            // The thread waits in the write; the world holds back what comes after it.
            stalled.lock().stalled = true;
            disk.faults(|faults| faults.full = false);
            true
        };
        let options = ReplicaOptions {
            seed,
            snapshot_entries: params.snapshot_entries,
            snapshot_bytes: 16 << 20,
            keep_entries: params.keep_entries,
            ..ReplicaOptions::default()
        };
        let machine = Fleet::bootstrap(cluster.cluster_id, Vec::new());
        let machine = machine.as_build_of(self.knows);
        let memory = restored.clone();
        let core = Core::new(
            options,
            (store, restored),
            machine,
            Box::new(outbound),
            Box::new(hook),
            Box::new(patience),
        )
        .map_err(|error| error.to_string())?;
        self.starts += 1;
        self.inbox.clear();
        self.turn_is_due = false;
        self.process = Some(Process {
            core,
            reign: Reign::default(),
            knows: self.knows,
            heard: BTreeMap::new(),
            election: None,
            publisher,
            controller: Controller::default(),
            seen,
            waiting: Vec::new(),
            observing: BTreeMap::new(),
            own: Vec::new(),
            next_tick: now + forebay_consensus::node::TICK,
            next_step: now + CONTROLLER_EVERY,
            streams: BTreeMap::new(),
        });
        Ok(memory)
    }

    /// Queues an input; `false` when there is no room or no process.
    pub(super) fn enqueue(&mut self, input: Incoming) -> bool {
        let room = self.process.is_some() && self.inbox.len() < MAX_INBOX;
        if room {
            self.inbox.push(input);
        }
        room
    }

    /// The process's status.
    pub(super) fn status(&self) -> Option<Status> {
        self.process.as_ref().map(|process| process.core.status())
    }

    pub(super) fn leads(&self) -> bool {
        self.status()
            .is_some_and(|status| status.role == Role::Leader)
    }

    /// Lets the process take what waits, and do what it leads to.
    pub(super) fn turn(&mut self, now_us: u64) -> Result<Turned, StopReason> {
        let now = self.clock.at(now_us);
        let Some(process) = &mut self.process else {
            return Ok(Turned::default());
        };
        let mut turned = Turned::default();
        for _ in 0..MAX_CATCH_UP_TICKS {
            if now < process.next_tick {
                break;
            }
            process.core.tick();
            process.next_tick = process.next_tick + forebay_consensus::node::TICK;
        }
        if now >= process.next_tick {
            process.next_tick = now + forebay_consensus::node::TICK;
        }
        let taken = self.inbox.len().min(MAX_INPUTS_PER_TURN);
        for input in self.inbox.drain(..taken) {
            process.take(now, input, &mut turned);
        }
        process.core.turn(now)?;
        process.settle(now, &mut turned);
        process.answer(now, &mut turned);
        if now >= process.next_step {
            process.next_step = now + CONTROLLER_EVERY;
            process.control(now, &mut turned);
        }
        Ok(turned)
    }

    /// When the process wants its next tick, in microseconds of the world.
    pub(super) fn next_tick_us(&self, now_us: u64) -> u64 {
        let Some(process) = &self.process else {
            return now_us;
        };
        now_us
            + self
                .clock
                .lasts(process.next_tick.since(self.clock.at(now_us)))
    }
}

fn batch(
    fleet: &Fleet,
    applied: u64,
    outputs: &[Entry<Applied>],
    audited: &mut Option<u64>,
) -> Batch {
    let count = fleet.audit_count();
    let new = count.saturating_sub(audited.unwrap_or(count));
    *audited = Some(count);
    let (audit, audit_head) = fleet.audit_tail(usize::try_from(new).unwrap_or(usize::MAX));
    Batch {
        applied,
        outputs: outputs
            .iter()
            .map(|entry| (entry.index, entry.term, entry.output.clone()))
            .collect(),
        facts: fleet.facts(),
        state_hash: applied.is_multiple_of(16).then(|| fleet.state_hash()),
        audit,
        audit_head,
        audit_count: count,
        cell_time: fleet.cell_time(),
        newest_member: fleet.newest_member(),
    }
}

impl Process {
    fn take(&mut self, now: Now, input: Incoming, turned: &mut Turned) {
        match input {
            Incoming::Raft {
                from,
                level,
                message,
            } => {
                self.heard.insert(from, (now, level));
                self.core.take(now, Input::Step { from, message });
            }
            Incoming::Unreachable(peer) => self.core.take(now, Input::Unreachable(peer)),
            Incoming::Snapshot(peer, report) => {
                self.core.take(now, Input::Snapshot(peer, report));
            }
            Incoming::Ask { party, number, ask } => {
                if let Some(answer) = self.ask(now, party, number, ask) {
                    turned.answers.push((party, number, answer));
                }
            }
        }
    }

    /// As the server does for each request; `None` while the answer waits.
    fn ask(&mut self, now: Now, party: Party, number: u64, ask: Ask) -> Option<Answer> {
        match ask {
            Ask::Propose { asked, change } => {
                let level = self.publisher.facts().feature_level;
                let action = wire::Command::decode(asked.command.clone()).ok();
                let action = action.and_then(|command| command.action);
                if self.reign.term().is_some()
                    && action.is_some_and(|action| self.refuses(&action, level))
                {
                    return Some(Answer::Refused);
                }
                let registers = asked.registers.clone();
                let Some(command) = self.reign.stamp(now, asked) else {
                    return Some(self.not_leader());
                };
                let (reply, answer) = oneshot::channel();
                self.core.take(now, propose(command, change, reply));
                self.waiting.push(Waiting::Outcome {
                    party,
                    number,
                    registers,
                    reply: answer,
                });
                None
            }
            Ask::Read => {
                let (reply, answer) = oneshot::channel();
                self.core.take(now, Input::Read { reply });
                self.waiting.push(Waiting::Read {
                    party,
                    number,
                    reply: answer,
                });
                None
            }
            Ask::Transfer { to } => {
                let (reply, answer) = oneshot::channel();
                self.core.take(now, Input::Transfer { to, reply });
                self.waiting.push(Waiting::Transfer {
                    party,
                    number,
                    reply: answer,
                });
                None
            }
            Ask::Renew { who, renew } => Some(self.renew(now, &who, &renew)),
        }
    }

    /// Whether a leader of this version proposes no such command in a cell of this feature level.
    fn refuses(&self, action: &command::Action, level: u32) -> bool {
        if self.knows < FEATURE_LEVEL {
            // It looks at nothing that it does not know.
            return level_of(action) > self.knows;
        }
        too_new(action, level).is_some()
    }

    /// The least feature level that a member understands, as [`Controller::step`] wants it.
    fn members_level(&self, now: Now, facts: &wire::Facts) -> u32 {
        let status = self.core.status();
        if status.members.is_joint() {
            return 0;
        }
        // It matters while this node leads.
        let own = status.leader;
        let others = facts.members.iter();
        let others = others.filter(|one| own != Some(NodeId(one.id)));
        let levels = others.map(|one| match self.heard.get(&NodeId(one.id)) {
            Some((at, level)) if now.since(*at) < PRESENT => *level,
            Some(_) | None => 0,
        });
        levels.min().unwrap_or(self.knows).min(self.knows)
    }

    fn not_leader(&self) -> Answer {
        Answer::NotLeader(self.core.status().leader)
    }

    fn renew(&mut self, now: Now, who: &Identity, renew: &control::Renew) -> Answer {
        use forebay_consensus::fleet::lease::RenewError;
        let incarnation = Incarnation::from_wire(renew.incarnation.as_ref()).ok();
        let publisher = self.publisher.clone();
        let taken = self.reign.renewed(
            now,
            || publisher.facts(),
            |leases, now| leases.renewed(now, who, renew),
        );
        match taken {
            None => self.not_leader(),
            Some(Ok(_)) => {
                let facts = self.publisher.facts();
                if let Some(incarnation) = incarnation {
                    self.observe(now, &facts, &who.name, incarnation, renew);
                }
                Answer::Renewed
            }
            Some(Err(RenewError::Superseded { .. })) => Answer::Superseded,
            Some(Err(_)) => Answer::NotRegistered,
        }
    }

    /// Gets agreed what an agent says of itself, as the server does, one proposal a worker at a time.
    fn observe(
        &mut self,
        now: Now,
        facts: &wire::Facts,
        name: &str,
        incarnation: Incarnation,
        renew: &control::Renew,
    ) {
        let Some(worker) = facts.workers.iter().find(|worker| worker.name == name) else {
            return;
        };
        let (said, is_news) = reign::said(worker, incarnation, renew);
        if !is_news || self.observing.contains_key(&incarnation.worker) {
            return;
        }
        let said = command::Action::Observe(said);
        if let Some(answer) = self.propose_own(now, said, "observed state") {
            self.observing.insert(incarnation.worker, answer);
        }
    }

    fn propose_own(
        &mut self,
        now: Now,
        action: command::Action,
        reason: &str,
    ) -> Option<oneshot::Receiver<Result<Entry<Applied>, ProposeError>>> {
        let command = wire::Command {
            action: Some(action),
        };
        let asked = Asked {
            actor: wire::Actor {
                identity: "control".into(),
                address: String::new(),
            },
            client: Bytes::from_static(&[0; 16]),
            sequence: 0,
            command: command.encode_to_vec().into(),
            reason: reason.into(),
            registers: None,
            takes_capacity: false,
        };
        let command = self.reign.stamp(now, asked)?;
        let (reply, answer) = oneshot::channel();
        self.core.take(now, Input::Propose { command, reply });
        Some(answer)
    }

    fn settle(&mut self, now: Now, turned: &mut Turned) {
        let leads = reign::begun(&mut self.election, &self.core.status());
        let facts = self.publisher.facts();
        if self.reign.settle(now, leads, &facts, || WALL_CLOCK) {
            turned.began = leads;
        }
    }

    fn answer(&mut self, now: Now, turned: &mut Turned) {
        self.observing
            .retain(|_, answer| answer.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        self.own
            .retain_mut(|answer| answer.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        let mut waiting = Vec::new();
        for mut one in std::mem::take(&mut self.waiting) {
            match self.look(now, &mut one) {
                Some(answer) => turned.answers.push(answer),
                None => waiting.push(one),
            }
        }
        self.waiting = waiting;
    }

    fn look(&mut self, now: Now, one: &mut Waiting) -> Option<(Party, u64, Answer)> {
        use oneshot::error::TryRecvError::Empty;
        match one {
            Waiting::Outcome {
                party,
                number,
                registers,
                reply,
            } => {
                let answer = match reply.try_recv() {
                    Err(Empty) => return None,
                    Ok(Ok(entry)) => {
                        self.note_registered(now, registers.as_deref(), &entry.output.outcome);
                        Answer::Outcome {
                            index: entry.index,
                            term: entry.term,
                            outcome: entry.output.outcome,
                        }
                    }
                    Ok(Err(ProposeError::NotLeader { leader })) => Answer::NotLeader(leader),
                    Ok(Err(ProposeError::Change(_))) => Answer::Refused,
                    Ok(Err(ProposeError::Overloaded | ProposeError::Size(_))) => {
                        Answer::NotLeader(None)
                    }
                    Ok(Err(_)) | Err(_) => Answer::Unknown,
                };
                Some((*party, *number, answer))
            }
            Waiting::Read {
                party,
                number,
                reply,
            } => {
                let answer = match reply.try_recv() {
                    Err(Empty) => return None,
                    Ok(Ok(_)) => Answer::Facts(self.publisher.facts()),
                    Ok(Err(_)) | Err(_) => Answer::NotLeader(None),
                };
                Some((*party, *number, answer))
            }
            Waiting::Transfer {
                party,
                number,
                reply,
            } => {
                let answer = match reply.try_recv() {
                    Err(Empty) => return None,
                    Ok(Ok(())) => Answer::Begun,
                    Ok(Err(_)) => Answer::Refused,
                    Err(_) => Answer::Unknown,
                };
                Some((*party, *number, answer))
            }
        }
    }

    /// Who has just registered lives.
    fn note_registered(&mut self, now: Now, name: Option<&str>, outcome: &wire::Outcome) {
        if let Some(name) = name
            && let Some(wire::outcome::Outcome::Done(done)) = &outcome.outcome
            && let Some(worker) = &done.worker
            && let Ok(incarnation) = Incarnation::from_wire(worker.incarnation.as_ref())
        {
            self.reign.registered(now, name, incarnation);
        }
    }

    fn control(&mut self, now: Now, turned: &mut Turned) {
        let facts = self.publisher.facts();
        let leads = self.reign.term().is_some();
        // One step's proposals at a time.
        if leads && !self.own.is_empty() {
            return;
        }
        let members_level = self.members_level(now, &facts);
        let actions = self.controller.step(
            now,
            leads,
            self.reign.leases(),
            &facts,
            members_level,
            self.reign.cell_time(now),
        );
        for action in actions {
            let (action, reason) = match action {
                Action::Expire(expire) => {
                    for lease in &expire.evidence {
                        if let Ok(incarnation) = Incarnation::from_wire(lease.incarnation.as_ref())
                        {
                            let silent = Millis(lease.silent_ms).duration();
                            turned.expired.push((incarnation, silent));
                        }
                    }
                    (command::Action::Expire(expire), "leases ran out")
                }
                Action::FirstKey => {
                    let rotate = wire::RotateKey {
                        expected_epoch: 0,
                        key: Bytes::from_static(b"0123456789abcdef"),
                    };
                    (command::Action::RotateKey(rotate), "the first key")
                }
                Action::RaiseFeatureLevel(to) => {
                    let raise = wire::RaiseFeatureLevel { to };
                    let action = command::Action::RaiseFeatureLevel(raise);
                    (action, "everyone understands it")
                }
                Action::PassDrainDeadline(id) => {
                    let deadline = wire::PassDrainDeadline { id };
                    let action = command::Action::PassDrainDeadline(deadline);
                    (action, "its deadline passed")
                }
                Action::AssignHomes(assign) => {
                    (command::Action::AssignHomes(assign), "as its heat asks")
                }
                Action::StepRebalance(step) => (command::Action::StepRebalance(step), "it is due"),
                Action::StopRebalance(stop) => (command::Action::StopRebalance(stop), "too late"),
                Action::ForgetSuspects => {
                    let forget = wire::ForgetSuspects {};
                    (command::Action::ForgetSuspects(forget), "it is long ago")
                }
            };
            let proposed = self.propose_own(now, action, reason);
            self.own.extend(proposed);
        }
    }

    /// One that joins has none before the leader's first snapshot, and nobody may take its empty facts
    /// for the fleet's.
    pub(super) fn has_state(&self) -> bool {
        self.core.applied() > 0
    }

    /// A watcher dialled in; its earlier watch here ends.
    pub(super) fn watch(&mut self, watcher: Party, number: u64, from: &control::Watch, now: Now) {
        let facts = self.publisher.facts();
        let same = from.cluster_id == facts.cluster_id;
        let held = if same { from.revision } else { 0 };
        let stream = Stream {
            held,
            started: same && held > 0,
            beat_at: now,
            number,
            arrives: 0,
        };
        self.streams.insert(watcher, stream);
    }

    /// What is to be sent to a watcher now.
    pub(super) fn frames(&mut self, watcher: Party, now: Now) -> Vec<control::WatchFrame> {
        use control::watch_frame::Frame;
        let Some(stream) = self.streams.get_mut(&watcher) else {
            return Vec::new();
        };
        let next = if stream.started {
            self.publisher.since(stream.held)
        } else {
            Next::Snapshot(self.publisher.facts())
        };
        let mut frames = Vec::new();
        match next {
            Next::Deltas(deltas) => {
                for delta in deltas {
                    stream.held = delta.revision;
                    frames.push(Frame::Delta((*delta).clone()));
                }
            }
            Next::Snapshot(facts) if stream.started && facts.revision <= stream.held => {}
            Next::Snapshot(facts) => {
                stream.held = facts.revision;
                frames.push(Frame::Snapshot((*facts).clone()));
            }
        }
        stream.started = true;
        if now >= stream.beat_at {
            stream.beat_at = now + HEARTBEAT;
            frames.push(Frame::Heartbeat(control::Heartbeat {
                revision: stream.held,
                leader_heard_ms: self.core.status().leader_heard_ms,
            }));
        }
        frames
            .into_iter()
            .map(|frame| control::WatchFrame { frame: Some(frame) })
            .collect()
    }
}

fn propose(
    command: Bytes,
    change: Option<MembersChange>,
    reply: oneshot::Sender<Result<Entry<Applied>, ProposeError>>,
) -> Input<Applied> {
    match change {
        Some(change) => Input::Change {
            change,
            command,
            reply,
        },
        None => Input::Propose { command, reply },
    }
}

/// Whether the entry, or a snapshot that includes it, is in what a disk would give back.
pub(super) fn holds(restored: &Restored, index: u64, term: u64) -> bool {
    if restored.snapshot.index >= index {
        return true;
    }
    let at = |entry: &&forebay_consensus::node::Entry| entry.index == index;
    restored
        .entries
        .iter()
        .find(at)
        .is_some_and(|entry| entry.term == term)
}

/// The file that makes a disk a member's.
pub(super) fn cluster_file(
    cluster: forebay_proto::ClusterId,
    id: NodeId,
    name: &str,
    members: Vec<MemberRecord>,
) -> ClusterFile {
    ClusterFile::new(cluster, id, name.to_owned(), members)
}

/// Everyone at the start.
pub(super) fn first_members(nodes: u32) -> Members {
    let ids = (1..=u64::from(nodes)).map(NodeId);
    Members::new(ids, []).expect("a few nodes are a group")
}
