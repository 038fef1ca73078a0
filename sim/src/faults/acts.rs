//! What a fault does to the world, and how the world heals.

use std::time::Duration;

use forebay_proto::FEATURE_LEVEL;
use rand::Rng as _;

use super::net::{Trouble, TroubleKind};
use super::party::Party;
use super::plan::{Kind, Target};
use super::world::{Event, World};

/// A node that is started again by an operator takes so long, in microseconds.
const RESTART_US: u64 = 1_000_000;

impl World {
    /// The fault happens now. Returns nothing: a target that is not there makes it none.
    pub(super) fn fault(&mut self, kind: &Kind) {
        if self.happens(kind).is_some() {
            *self.injected.entry(kind.name()).or_default() += 1;
        }
    }

    fn happens(&mut self, kind: &Kind) -> Option<()> {
        match *kind {
            Kind::Kill { node, back_ms } => {
                let node = self.running(node)?;
                self.crash(node, false);
                self.at(self.now_us + back_ms * 1_000, Event::Start(node));
            }
            Kind::PowerLoss { node, back_ms } => {
                let node = self.running(node)?;
                self.crash(node, true);
                self.at(self.now_us + back_ms * 1_000, Event::Start(node));
            }
            Kind::PowerLossEverywhere { back_ms } => {
                for node in self.nodes() {
                    self.crash(node, true);
                    let apart = self.rng.random_range(0..500_000);
                    self.at(self.now_us + back_ms * 1_000 + apart, Event::Start(node));
                }
            }
            Kind::PowerLossInWrite {
                node, operations, ..
            } => {
                let node = self.running(node)?;
                let host = self.hosts.get(&node)?;
                host.disk
                    .faults(|faults| faults.dies_after = Some(operations));
            }
            Kind::Pause { node, for_ms } => {
                let node = self.running(node)?;
                let until = self.now_us + for_ms * 1_000;
                let host = self.hosts.get_mut(&node)?;
                host.paused_until = host.paused_until.max(until);
            }
            Kind::Partition {
                groups,
                one_way,
                for_ms,
            } => self.trouble(for_ms, TroubleKind::Partition { groups, one_way }),
            Kind::Isolate {
                node,
                clients,
                for_ms,
            } => {
                let node = self.target(node)?;
                self.trouble(for_ms, TroubleKind::Isolated { node, clients });
            }
            Kind::Loss { ppm, for_ms } => self.trouble(for_ms, TroubleKind::Loss(ppm)),
            Kind::Delay { most_ms, for_ms } => {
                let most_us = most_ms * 1_000;
                self.trouble(for_ms, TroubleKind::Delay { most_us });
            }
            Kind::Duplicates { ppm, for_ms } => self.trouble(for_ms, TroubleKind::Duplicates(ppm)),
            Kind::Clog { from, to, for_ms } => {
                let (from, to) = (self.target(from)?, self.target(to)?);
                self.trouble(for_ms, TroubleKind::Clog { from, to });
            }
            Kind::DiskFull { node, for_ms } => {
                let node = self.target(node)?;
                let until = self.now_us + for_ms * 1_000;
                let host = self.hosts.get_mut(&node)?;
                host.full_until = host.full_until.max(until);
                host.disk.faults(|faults| faults.full = true);
                let room = host.full_until;
                self.at(room, Event::Room(node));
            }
            Kind::SyncError { node, .. } => {
                let node = self.running(node)?;
                let host = self.hosts.get(&node)?;
                host.disk.faults(|faults| faults.sync_fails = true);
            }
            Kind::BitRot { node } => {
                let node = self.running(node)?;
                self.crash(node, false);
                let host = self.hosts.get_mut(&node)?;
                host.rotten = host.disk.rot(&mut self.rng).is_some();
                self.at(self.now_us + RESTART_US, Event::Start(node));
            }
            Kind::ClockJump { node, by_ms } => {
                let node = self.target(node)?;
                let now = self.now_us;
                let host = self.hosts.get_mut(&node)?;
                host.clock.ahead += by_ms * 1_000;
                host.jumped_at = Some(now);
                self.checks.time.jumped(by_ms);
            }
            Kind::AgentRestart { agent, wiped } => {
                let party = self.agent_at(agent);
                self.restart_agent(party, wiped)?;
            }
            Kind::AgentZombie { agent } => self.zombie(self.agent_at(agent))?,
            Kind::AgentSilent { agent, for_ms } => {
                let until = self.now_us + for_ms * 1_000;
                let party = self.agent_at(agent);
                self.askers.get_mut(&party)?.silent_until = until;
            }
            Kind::LeaderLostInJoint { back_ms } => self.joint_trap = Some(back_ms),
            Kind::Upgrade { node } => {
                let node = self.running(node)?;
                self.crash(node, false);
                self.hosts.get_mut(&node)?.knows = FEATURE_LEVEL;
                self.at(self.now_us + RESTART_US, Event::Start(node));
            }
        }
        Some(())
    }

    fn restart_agent(&mut self, party: Party, wiped: bool) -> Option<()> {
        let mut asker = self.askers.remove(&party)?;
        asker.restart(wiped, &mut self.rng, &mut self.history);
        self.askers.insert(party, asker);
        self.follows_again(party);
        self.awake(party);
        Some(())
    }

    fn running(&self, target: Target) -> Option<forebay_proto::NodeId> {
        let node = self.target(target)?;
        self.hosts.get(&node)?.process.as_ref().map(|_| node)
    }

    fn agent_at(&self, target: Target) -> Party {
        Party::Agent(u32::from(target.0) % self.params.agents)
    }

    fn trouble(&mut self, for_ms: u64, kind: TroubleKind) {
        let until_us = self.now_us + for_ms * 1_000;
        self.network.trouble(Trouble { until_us, kind });
    }

    /// An older start of an agent, from a copy of its disk as it was before the newest start.
    fn zombie(&mut self, party: Party) -> Option<()> {
        let Party::Agent(number) = party else {
            return None;
        };
        if self.askers.get_mut(&party)?.as_agent()?.start == 1 {
            self.restart_agent(party, false);
        }
        let copy = self.askers.get_mut(&party)?.as_agent()?.copied()?;
        let again = Party::Zombie(number);
        if self.askers.contains_key(&again) {
            return None;
        }
        if let Some(core) = &copy.core {
            self.checks.force.copied(core.incarnation());
        }
        self.agent(again, copy);
        Some(())
    }

    /// The faults end: what is broken for good stays so, all else comes back.
    pub(super) fn heal(&mut self) {
        self.healing = true;
        self.network.heal();
        self.params.lost_ppm = 0;
        self.params.doubled_ppm = 0;
        self.params.most_delay = self.params.most_delay.min(Duration::from_millis(5));
        self.params.churn = false;
        let now = self.now_us;
        let mut back = Vec::new();
        for (id, host) in &mut self.hosts {
            host.disk.faults(|faults| {
                faults.full = false;
                faults.sync_fails = false;
                faults.dies_after = None;
            });
            host.full_until = now;
            host.paused_until = host.paused_until.min(now);
            let knew = std::mem::replace(&mut host.knows, FEATURE_LEVEL);
            if host.process.is_none() || knew < FEATURE_LEVEL {
                back.push(*id);
            }
        }
        for node in back {
            self.crash(node, false);
            let apart = self.rng.random_range(0..RESTART_US);
            self.at(now + apart, Event::Start(node));
        }
        for asker in self.askers.values_mut() {
            asker.silent_until = asker.silent_until.min(now);
        }
        let parties: Vec<Party> = self.askers.keys().copied().collect();
        for party in parties {
            self.awake(party);
        }
    }

    pub(super) fn awake(&mut self, party: Party) {
        if let Some(asker) = self.askers.get_mut(&party) {
            let number = asker.wake_number();
            self.at(self.now_us, Event::Wake(party, number));
        }
    }
}
