//! One fault after the other, each for a while, each healed before the next.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

use crate::cell::Cell;

/// What can happen. A disk or network fault needs rights that not every machine gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    LeaderKilled,
    FollowerKilled,
    AllKilled,
    LeaderStandsStill,
    FollowerStandsStill,
    DiskFull,
    DiskFullAndKilled,
    /// From the other nodes; clients still reach it.
    LeaderCutOffFromPeers,
    LeaderCutOffFromAll,
    FollowerCutOff,
    /// The leader hears nobody; what it sends arrives.
    LeaderDeaf,
    /// What the leader sends reaches no peer; it hears all.
    LeaderMute,
    /// Two nodes that do not reach each other, and one that reaches both.
    Bridge,
    /// A part of all packets is lost everywhere.
    Loss,
    /// The links between nodes are slow: late where the kernel can, else narrow.
    Slow,
    LossAndLeaderKilled,
}

const EVERYWHERE: [Fault; 5] = [
    Fault::LeaderKilled,
    Fault::FollowerKilled,
    Fault::AllKilled,
    Fault::LeaderStandsStill,
    Fault::FollowerStandsStill,
];
const OF_DISKS: [Fault; 2] = [Fault::DiskFull, Fault::DiskFullAndKilled];
const OF_NETWORKS: [Fault; 9] = [
    Fault::LeaderCutOffFromPeers,
    Fault::LeaderCutOffFromAll,
    Fault::FollowerCutOff,
    Fault::LeaderDeaf,
    Fault::LeaderMute,
    Fault::Bridge,
    Fault::Loss,
    Fault::Slow,
    Fault::LossAndLeaderKilled,
];

/// Where the disk is small.
const SMALL: usize = 1;

pub struct Faults {
    rng: StdRng,
    happened: BTreeMap<Fault, u32>,
}

impl Faults {
    pub const fn new(rng: StdRng) -> Self {
        let happened = BTreeMap::new();
        Self { rng, happened }
    }

    /// Lets faults happen until then: all kinds, in an order that is drawn, and again.
    pub async fn go_on(&mut self, until: Instant, cell: &mut Cell) {
        let mut kinds = EVERYWHERE.to_vec();
        kinds.extend(cell.small_disk.iter().flat_map(|_| OF_DISKS));
        kinds.extend(cell.net.iter().flat_map(|_| OF_NETWORKS));
        let mut round = vec![];
        while Instant::now() < until {
            if round.is_empty() {
                round.clone_from(&kinds);
            }
            let fault = round.swap_remove(self.rng.random_range(0..round.len()));
            let Some(leader) = cell.leader().await else {
                round.push(fault);
                continue;
            };
            self.happens(fault, leader, cell).await;
            *self.happened.entry(fault).or_default() += 1;
            cell.nobody_ended();
            self.wait(300..900).await;
        }
    }

    pub fn told(&self) -> String {
        let each = self
            .happened
            .iter()
            .map(|(fault, n)| format!("{fault:?} {n}"));
        each.collect::<Vec<_>>().join(", ")
    }

    async fn wait(&mut self, ms: std::ops::Range<u64>) {
        let ms = self.rng.random_range(ms);
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }

    async fn happens(&mut self, fault: Fault, leader: usize, cell: &mut Cell) {
        let followers: Vec<usize> = Cell::numbers().filter(|node| *node != leader).collect();
        let follower = followers[self.rng.random_range(0..followers.len())];
        let peers = |of: usize| Cell::numbers().filter(move |node| *node != of);
        match fault {
            Fault::LeaderKilled => self.killed(&[leader], cell).await,
            Fault::FollowerKilled => self.killed(&[follower], cell).await,
            Fault::AllKilled => self.killed(&[1, 2, 3], cell).await,
            Fault::LeaderStandsStill => self.stands_still(leader, cell).await,
            Fault::FollowerStandsStill => self.stands_still(follower, cell).await,
            Fault::DiskFull | Fault::DiskFullAndKilled => {
                let disk = cell.small_disk.as_ref().unwrap();
                disk.fill();
                self.wait(1_000..2_500).await;
                if fault == Fault::DiskFullAndKilled {
                    cell.kill(SMALL);
                }
                cell.small_disk.as_ref().unwrap().make_room();
                if fault == Fault::DiskFullAndKilled {
                    cell.start(SMALL);
                }
            }
            Fault::LeaderCutOffFromPeers => {
                let mut deaf: Vec<_> = peers(leader).map(|peer| (leader, drops(peer))).collect();
                deaf.extend(peers(leader).map(|peer| (peer, drops(leader))));
                self.filtered(&deaf, cell).await;
            }
            Fault::LeaderCutOffFromAll => self.unplugged(leader, cell).await,
            Fault::FollowerCutOff => self.unplugged(follower, cell).await,
            Fault::LeaderDeaf => {
                let deaf: Vec<_> = peers(leader).map(|peer| (leader, drops(peer))).collect();
                self.filtered(&deaf, cell).await;
            }
            Fault::LeaderMute => {
                let mute: Vec<_> = peers(leader).map(|peer| (peer, drops(leader))).collect();
                self.filtered(&mute, cell).await;
            }
            Fault::Bridge => {
                let apart = [(leader, drops(follower)), (follower, drops(leader))];
                self.filtered(&apart, cell).await;
            }
            Fault::Loss => self.filtered(&self.loss(), cell).await,
            Fault::LossAndLeaderKilled => {
                let lossy = self.loss();
                filter(&lossy, cell);
                self.killed(&[leader], cell).await;
                self.wait(1_000..2_000).await;
                heal(cell);
            }
            Fault::Slow => self.slow(cell).await,
        }
    }

    async fn killed(&mut self, nodes: &[usize], cell: &mut Cell) {
        for node in nodes {
            cell.kill(*node);
        }
        self.wait(100..1_500).await;
        for node in nodes {
            cell.start(*node);
        }
    }

    async fn stands_still(&mut self, node: usize, cell: &Cell) {
        cell.stand_still(node, true);
        self.wait(1_000..5_000).await;
        cell.stand_still(node, false);
    }

    async fn filtered(&mut self, rules: &[(usize, String)], cell: &Cell) {
        filter(rules, cell);
        self.wait(1_500..4_000).await;
        heal(cell);
    }

    async fn unplugged(&mut self, node: usize, cell: &Cell) {
        cell.net.as_ref().unwrap().plug(node, false).unwrap();
        self.wait(1_500..4_000).await;
        heal(cell);
    }

    fn loss(&self) -> Vec<(usize, String)> {
        let lost = "numgen random mod 100 < 15 drop";
        Cell::numbers().map(|node| (node, lost.into())).collect()
    }

    async fn slow(&mut self, cell: &Cell) {
        let net = cell.net.as_ref().unwrap();
        let how = match net.netem {
            true => "netem delay 40ms 20ms loss 2%",
            false => "tbf rate 400kbit burst 4kb latency 300ms",
        };
        for node in Cell::numbers() {
            net.shape(node, Some(how)).unwrap();
        }
        self.wait(1_500..4_000).await;
        heal(cell);
    }
}

fn drops(from: usize) -> String {
    format!("ip saddr 10.77.0.{from} drop")
}

fn filter(rules: &[(usize, String)], cell: &Cell) {
    let net = cell.net.as_ref().unwrap();
    for node in Cell::numbers() {
        let here = rules.iter().filter(|(at, _)| *at == node);
        let here: Vec<String> = here.map(|(_, rule)| rule.clone()).collect();
        net.filter(node, &here).unwrap();
    }
}

fn heal(cell: &Cell) {
    let net = cell.net.as_ref().unwrap();
    for node in Cell::numbers() {
        net.filter(node, &[]).unwrap();
        net.shape(node, None).unwrap();
        net.plug(node, true).unwrap();
    }
}
