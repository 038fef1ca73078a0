//! A small world: nodes, a network that loses, reorders and splits, and disks that forget what was not
//! synced. Everything comes from one seed; a failure names it.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash as _};

use bytes::Bytes;
use forebay_proto::NodeId;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;
use disk::{Disk, DiskFault};

mod disk;
mod tests;

const TICK_MS: u64 = 50;

/// How hostile a world is.
#[derive(Clone, Copy)]
struct Faults {
    lost: f64,
    doubled: f64,
    max_delay_ms: u64,
    /// Mean time between crashes of any node, and between changes of the partition.
    crash_every_ms: u64,
    max_down_ms: u64,
    split_every_ms: u64,
    disk: DiskFault,
}

const CALM: Faults = Faults {
    lost: 0.0,
    doubled: 0.0,
    max_delay_ms: 1,
    crash_every_ms: 0,
    max_down_ms: 3_000,
    split_every_ms: 0,
    disk: DiskFault::Honest,
};
const STORM: Faults = Faults {
    lost: 0.05,
    doubled: 0.05,
    max_delay_ms: 40,
    crash_every_ms: 1_500,
    max_down_ms: 3_000,
    split_every_ms: 2_000,
    disk: DiskFault::Honest,
};

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
            let down_ms = self.rng.random_range(10..self.faults.max_down_ms);
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
        host.disk.crash(self.faults.disk);
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
            let (disk, fault) = (&mut host.disk, self.faults.disk);
            let done = step.persist(|write| {
                disk.write(write, if torn { cut } else { usize::MAX }, fault);
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
            if let Some(node) = self.node(id) {
                node.applied();
            }
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
