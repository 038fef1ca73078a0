//! A small world: nodes, a network that loses, reorders and splits, and disks that forget what was not
//! synced. Everything comes from one seed; a failure names it.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use bytes::Bytes;
use forebay_proto::NodeId;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;

const TICK_MS: u64 = 50;

/// How hostile a world is.
#[derive(Clone, Copy)]
struct Faults {
    lost: f64,
    doubled: f64,
    max_delay_ms: u64,
    /// Mean time between crashes of any node, and between changes of the partition.
    crash_every_ms: u64,
    split_every_ms: u64,
}

const CALM: Faults = Faults {
    lost: 0.0,
    doubled: 0.0,
    max_delay_ms: 1,
    crash_every_ms: 0,
    split_every_ms: 0,
};
const STORM: Faults = Faults {
    lost: 0.05,
    doubled: 0.05,
    max_delay_ms: 40,
    crash_every_ms: 1_500,
    split_every_ms: 2_000,
};

/// What a disk holds for certain, and what it may forget at a crash.
#[derive(Clone)]
struct Disk {
    durable: Restored,
    lazy: Option<HardState>,
}

impl Disk {
    fn new(members: &Members) -> Self {
        let snapshot = Snapshot::bootstrap(members.clone(), Bytes::from_static(b"1"));
        let hard_state = HardState {
            term: 1,
            vote: 0,
            commit: 1,
        };
        Self {
            durable: Restored {
                hard_state,
                snapshot,
                entries: Vec::new(),
            },
            lazy: None,
        }
    }

    /// Writes the first `parts` of what is to be written: snapshot, each entry, hard state.
    fn write(&mut self, write: &Write, parts: usize) {
        let mut left = parts;
        let mut take = || {
            let some = left > 0;
            left = left.saturating_sub(1);
            some
        };
        if let Some(state) = self.lazy.take() {
            self.durable.hard_state = state;
        }
        if let Some(snapshot) = &write.snapshot
            && take()
        {
            self.durable.snapshot = snapshot.clone();
            self.durable.entries.clear();
        }
        for entry in &write.entries {
            if take() {
                self.durable.entries.retain(|held| held.index < entry.index);
                self.durable.entries.push(entry.clone());
            }
        }
        if let Some(state) = write.hard_state
            && take()
        {
            if write.must_sync {
                self.durable.hard_state = state;
            } else {
                self.lazy = Some(state);
            }
        }
    }
}

struct Host {
    disk: Disk,
    node: Option<Node>,
    starts: u64,
    back_at: u64,
    applied: u64,
}

struct World {
    seed: u64,
    rng: StdRng,
    faults: Faults,
    now: u64,
    members: Members,
    hosts: BTreeMap<u64, Host>,
    /// By time of arrival, then order of sending.
    network: BTreeMap<(u64, u64), (u64, Message)>,
    sent: u64,
    /// Nodes on the other side of a split.
    apart: Vec<u64>,
    leaders: HashMap<u64, u64>,
    committed: BTreeMap<u64, Entry>,
    /// Each entry that any disk ever held: its data and the term before it.
    logs: HashMap<(u64, u64), (u64, Bytes)>,
    proposals: u64,
    elected_at: Vec<u64>,
    snapshots_installed: u64,
    reads: BTreeMap<(u64, u64), u64>,
    reads_done: u64,
    trace: DefaultHasher,
}

impl World {
    fn new(seed: u64, nodes: u64, faults: Faults) -> Self {
        let members = Members::new((1..=nodes).map(NodeId), []).unwrap();
        let host = || Host {
            disk: Disk::new(&members),
            node: None,
            starts: 0,
            back_at: 0,
            applied: 1,
        };
        let hosts = (1..=nodes).map(|id| (id, host())).collect();
        Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            faults,
            now: 0,
            members,
            hosts,
            network: BTreeMap::new(),
            sent: 0,
            apart: Vec::new(),
            leaders: HashMap::new(),
            committed: BTreeMap::new(),
            logs: HashMap::new(),
            proposals: 0,
            elected_at: Vec::new(),
            snapshots_installed: 0,
            reads: BTreeMap::new(),
            reads_done: 0,
            trace: DefaultHasher::new(),
        }
    }

    fn run(&mut self, ms: u64) {
        let until = self.now + ms;
        while self.now < until {
            self.now += 1;
            self.misfortune();
            for id in self.ids() {
                self.start_if_due(id);
                if (self.now + id * 17).is_multiple_of(TICK_MS)
                    && let Some(node) = self.node(id)
                {
                    node.tick();
                    self.perform(id);
                }
            }
            while let Some(first) = self.network.first_entry() {
                if first.key().0 > self.now {
                    break;
                }
                let (to, message) = first.remove();
                let from = NodeId(message.from);
                if let Some(node) = self.node(to) {
                    // Stale answers and second leaders of old terms are refused; nothing else may be.
                    let stepped = node.step(from, message);
                    assert!(
                        !matches!(
                            stepped,
                            Err(Rejected::LostEntries { .. }
                                | Rejected::Order { .. }
                                | Rejected::ContradictsCommitted { .. }
                                | Rejected::SecondLeader { .. }
                                | Rejected::Range { .. }
                                | Rejected::Unexpected { .. })
                        ),
                        "seed {}: {stepped:?}",
                        self.seed
                    );
                    self.perform(to);
                }
            }
            if self.now.is_multiple_of(20) {
                self.propose_and_read();
            }
        }
    }

    fn ids(&self) -> Vec<u64> {
        self.hosts.keys().copied().collect()
    }

    fn node(&mut self, id: u64) -> Option<&mut Node> {
        self.hosts.get_mut(&id).and_then(|host| host.node.as_mut())
    }

    fn leader(&self) -> Option<u64> {
        let leads = |(id, host): (&u64, &Host)| {
            host.node
                .as_ref()
                .filter(|node| node.role() == Role::Leader)
                .map(|node| (node.term(), *id))
        };
        self.hosts.iter().filter_map(leads).max().map(|(_, id)| id)
    }

    fn misfortune(&mut self) {
        let Faults {
            crash_every_ms,
            split_every_ms,
            ..
        } = self.faults;
        if crash_every_ms > 0 && self.rng.random_ratio(1, crash_every_ms as u32) {
            let id = self.rng.random_range(1..=self.hosts.len() as u64);
            let down_ms = self.rng.random_range(10..3_000);
            self.crash(id, down_ms);
        }
        if split_every_ms > 0 && self.rng.random_ratio(1, split_every_ms as u32) {
            let others = self.ids();
            self.apart = others
                .into_iter()
                .filter(|_| self.rng.random_bool(0.3))
                .collect();
        }
    }

    fn crash(&mut self, id: u64, down_ms: u64) {
        let now = self.now;
        let host = self.hosts.get_mut(&id).unwrap();
        host.node = None;
        host.disk.lazy = None;
        host.back_at = now + down_ms;
    }

    fn start_if_due(&mut self, id: u64) {
        let (seed, now) = (self.seed, self.now);
        let host = self.hosts.get_mut(&id).unwrap();
        if host.node.is_none() && host.back_at <= now {
            host.starts += 1;
            let seed = seed ^ (id << 32) ^ (host.starts << 48);
            let node = Node::new(
                Config {
                    id: NodeId(id),
                    seed,
                },
                host.disk.durable.clone(),
            );
            host.applied = host.disk.durable.snapshot.index;
            host.node = Some(node.unwrap());
        }
    }

    fn propose_and_read(&mut self) {
        let id = self.rng.random_range(1..=self.hosts.len() as u64);
        let newest = self
            .committed
            .last_key_value()
            .map_or(0, |(index, _)| *index);
        self.proposals += 1;
        let number = self.proposals;
        let Some(node) = self.node(id) else { return };
        let _ = node.propose(Bytes::from(number.to_string()));
        node.read_index(number);
        self.reads.insert((id, number), newest);
        self.perform(id);
    }

    /// The shell of one node, with a crash possible in the middle of a write.
    fn perform(&mut self, id: u64) {
        loop {
            let torn = self.faults.crash_every_ms > 0 && self.rng.random_ratio(1, 3_000);
            let cut = self.rng.random_range(0..4);
            let host = self.hosts.get_mut(&id).unwrap();
            let Some(node) = host.node.as_mut() else {
                return;
            };
            let Some(mut step) = node.ready() else { break };
            let now = step.take_send_now();
            let entries = step.write().entries.clone();
            let disk = &mut host.disk;
            let done = step.persist(|write| {
                disk.write(write, if torn { cut } else { usize::MAX });
                if torn { Err(()) } else { Ok(()) }
            });
            self.check_logs(id, &entries);
            self.send(now);
            let Ok(outcome) = done else {
                assert!(
                    self.node(id).unwrap().ready().is_none(),
                    "a failed write stops the node"
                );
                self.crash(id, 100);
                return;
            };
            self.send(outcome.send);
            self.absorb(id, outcome.installed, outcome.committed, &outcome.reads);
        }
        self.note_leader(id);
        self.maybe_compact(id);
    }

    fn send(&mut self, messages: Vec<Message>) {
        for message in messages {
            wire::to_wire(message.clone())
                .encode_to_vec()
                .hash(&mut self.trace);
            let to = message.to;
            let copies = 1 + u32::from(self.rng.random_bool(self.faults.doubled));
            let split = self.apart.contains(&to) != self.apart.contains(&message.from);
            for _ in 0..copies {
                let at = self.now + self.rng.random_range(1..=self.faults.max_delay_ms);
                if !split && !self.rng.random_bool(self.faults.lost) {
                    self.sent += 1;
                    self.network.insert((at, self.sent), (to, message.clone()));
                }
            }
            if message.has_snapshot() {
                let report = if split {
                    SnapshotReport::Failed
                } else {
                    SnapshotReport::Delivered
                };
                if let Some(node) = self.node(message.from) {
                    node.report_snapshot(NodeId(to), report);
                }
            }
        }
    }

    fn absorb(
        &mut self,
        id: u64,
        installed: Option<Snapshot>,
        committed: Vec<Entry>,
        reads: &[ReadReady],
    ) {
        let seed = self.seed;
        let host = self.hosts.get_mut(&id).unwrap();
        if let Some(snapshot) = installed {
            self.snapshots_installed += 1;
            assert_eq!(
                snapshot.data,
                Bytes::from(snapshot.index.to_string()),
                "seed {seed}"
            );
            host.applied = snapshot.index;
        }
        for entry in committed {
            assert_eq!(
                entry.index,
                host.applied + 1,
                "seed {seed}: applied in order, once"
            );
            host.applied = entry.index;
            let held = self
                .committed
                .entry(entry.index)
                .or_insert_with(|| entry.clone());
            assert_eq!(*held, entry, "seed {seed}: committed is for ever");
            assert_eq!(held.data, entry.data, "seed {seed}");
        }
        for read in reads {
            let Some(newest) = self.reads.remove(&(id, read.ctx)) else {
                continue;
            };
            self.reads_done += 1;
            assert!(
                read.index >= newest,
                "seed {seed}: a read missed what was committed before it"
            );
        }
    }

    /// Equal index and term mean equal entries, and equal logs before them.
    fn check_logs(&mut self, id: u64, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        let node = self.hosts[&id].node.as_ref();
        let mut before = node
            .and_then(|node| node.term_at(first.index - 1))
            .unwrap_or(0);
        for entry in entries {
            let this = (before, entry.data.clone());
            let held = self
                .logs
                .entry((entry.index, entry.term))
                .or_insert_with(|| this.clone());
            if before != 0 {
                assert_eq!(
                    *held, this,
                    "seed {}: log matching at {}",
                    self.seed, entry.index
                );
            }
            before = entry.term;
        }
    }

    fn note_leader(&mut self, id: u64) {
        let Some(node) = self.hosts[&id]
            .node
            .as_ref()
            .filter(|node| node.role() == Role::Leader)
        else {
            return;
        };
        let leader = *self.leaders.entry(node.term()).or_insert_with(|| {
            self.elected_at.push(self.now);
            id
        });
        assert_eq!(
            leader,
            id,
            "seed {}: two leaders in term {}",
            self.seed,
            node.term()
        );
    }

    fn maybe_compact(&mut self, id: u64) {
        let host = self.hosts.get_mut(&id).unwrap();
        let Some(node) = host.node.as_mut() else {
            return;
        };
        if node.log_size().0 < 40 || host.applied == node.snapshot_index() {
            return;
        }
        let snapshot = Snapshot {
            index: host.applied,
            term: node.term_at(host.applied).unwrap(),
            members: self.members.clone(),
            data: Bytes::from(host.applied.to_string()),
        };
        host.disk.durable.snapshot = snapshot.clone();
        host.disk
            .durable
            .entries
            .retain(|entry| entry.index + 5 > snapshot.index);
        node.compact(snapshot, 5);
    }
}

#[test]
fn storms_never_lose_what_was_committed_and_the_calm_after_them_settles() {
    let (mut installed, mut reads, mut elections) = (0, 0, 0);
    for seed in 0..60 {
        let mut world = World::new(seed, 3 + 2 * (seed % 2), STORM);
        world.run(12_000);
        world.faults = CALM;
        world.apart.clear();
        world.run(6_000);
        let before = world.committed.len();
        world.run(1_000);
        assert!(
            world.committed.len() > before + 4,
            "seed {seed}: the calm serves"
        );
        let newest = *world.committed.last_key_value().unwrap().0;
        for (id, host) in &world.hosts {
            assert!(
                host.applied + 20 > newest,
                "seed {seed}: node {id} at {} of {newest}",
                host.applied
            );
        }
        installed += world.snapshots_installed;
        reads += world.reads_done;
        elections += world.elected_at.len();
    }
    assert!(
        installed > 10 && reads > 1_000 && elections > 48,
        "{installed} {reads} {elections}"
    );
}

#[test]
fn equal_seeds_and_inputs_give_equal_outputs() {
    let trace = |seed| {
        let mut world = World::new(seed, 3, STORM);
        world.run(10_000);
        (world.trace.finish(), world.sent)
    };
    for seed in 100..104 {
        assert_eq!(trace(seed), trace(seed));
    }
    assert_ne!(trace(100), trace(101));
}

#[test]
fn a_dead_leader_is_followed_within_half_a_second_to_one_and_a_half() {
    let mut took = Vec::new();
    for seed in 0..40 {
        let mut world = World::new(1_000 + seed, 3, CALM);
        world.run(4_000);
        let leader = world.leader().unwrap();
        let died = world.now;
        world.crash(leader, 60_000);
        while world.leader().is_none() {
            world.run(1);
            assert!(world.now < died + 5_000, "seed {seed}: no leader after 5 s");
        }
        took.push(world.now - died);
    }
    took.sort_unstable();
    let (least, median, most) = (took[0], took[20], took[39]);
    assert!(
        least >= 350 && median < 1_000 && most < 1_500,
        "{least} {median} {most}"
    );
}

#[test]
fn a_group_of_one_elects_itself_at_once() {
    let mut world = World::new(7, 1, CALM);
    world.run(1);
    world.node(1).unwrap().campaign();
    world.perform(1);
    assert_eq!(world.node(1).unwrap().role(), Role::Leader);
    world.run(100);
    assert!(world.committed.len() > 2 && world.reads_done > 2);
}

#[test]
fn leadership_is_handed_over_without_an_election_timeout() {
    let mut world = World::new(8, 3, CALM);
    world.run(4_000);
    let leader = world.leader().unwrap();
    let heir = 1 + leader % 3;
    world.node(leader).unwrap().transfer(NodeId(heir)).unwrap();
    world.perform(leader);
    world.run(40);
    assert_eq!(world.leader(), Some(heir));
}
