//! The faults of a world, drawn before it begins, so that a failure can be replayed with fewer of them.

use std::time::Duration;

use rand::Rng as _;
use rand::rngs::StdRng;
use serde::Serialize;

use super::params::Params;

/// One fault. Targets are numbers modulo what there is when it happens, so that a plan stays one when
/// parts of it are left out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fault {
    /// When, in milliseconds of the world.
    pub at_ms: u64,
    /// What.
    pub kind: Kind,
}

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Kind {
    /// A process is killed; its disk's pages stay with the kernel.
    Kill {
        /// Which node.
        node: Target,
        /// When it is started again.
        back_ms: u64,
    },
    /// A machine loses power.
    PowerLoss {
        /// Which node.
        node: Target,
        /// When it is started again.
        back_ms: u64,
    },
    /// All machines lose power.
    PowerLossEverywhere {
        /// When they are started again.
        back_ms: u64,
    },
    /// A machine loses power in the middle of a disk operation.
    PowerLossInWrite {
        /// Which node.
        node: Target,
        /// After so many operations.
        operations: u32,
        /// When it is started again.
        back_ms: u64,
    },
    /// A process stands still.
    Pause {
        /// Which node.
        node: Target,
        /// For how long.
        for_ms: u64,
    },
    /// Two groups of nodes do not reach each other.
    Partition {
        /// A node is in the second group if its bit is set.
        groups: u8,
        /// Only messages to the second group are lost.
        one_way: bool,
        /// For how long.
        for_ms: u64,
    },
    /// A node reaches no other.
    Isolate {
        /// Which node.
        node: Target,
        /// Nor clients; else they go on asking a leader that has lost its followers.
        clients: bool,
        /// For how long.
        for_ms: u64,
    },
    /// Many messages are lost.
    Loss {
        /// So many in a million.
        ppm: u32,
        /// For how long.
        for_ms: u64,
    },
    /// Messages take long, and overtake each other.
    Delay {
        /// Up to.
        most_ms: u64,
        /// For how long.
        for_ms: u64,
    },
    /// Many messages come twice.
    Duplicates {
        /// So many in a million.
        ppm: u32,
        /// For how long.
        for_ms: u64,
    },
    /// What one node sends to another waits, and comes all at once.
    Clog {
        /// From.
        from: Target,
        /// To.
        to: Target,
        /// For how long.
        for_ms: u64,
    },
    /// A disk has no room.
    DiskFull {
        /// Whose.
        node: Target,
        /// For how long.
        for_ms: u64,
    },
    /// A disk does not sync.
    SyncError {
        /// Whose.
        node: Target,
        /// When the node is started again.
        back_ms: u64,
    },
    /// A bit turns on a disk whose node is down.
    BitRot {
        /// Whose.
        node: Target,
    },
    /// A clock goes on by so much at once, as after a machine was suspended.
    ClockJump {
        /// Whose.
        node: Target,
        /// By how much.
        by_ms: u64,
    },
    /// An agent starts again.
    AgentRestart {
        /// Which.
        agent: Target,
        /// Its disk is empty.
        wiped: bool,
    },
    /// An older start of an agent comes back from a copy of its disk.
    AgentZombie {
        /// Whose.
        agent: Target,
    },
    /// An agent says nothing.
    AgentSilent {
        /// Which.
        agent: Target,
        /// For how long.
        for_ms: u64,
    },
    /// The next leader that enters a joint membership is lost in it.
    LeaderLostInJoint {
        /// When it is started again.
        back_ms: u64,
    },
    /// A node is started again with the newest version.
    Upgrade {
        /// Which node.
        node: Target,
    },
}

/// A number modulo what there is; `LEADER` is the node that leads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Target(pub u8);

/// Whoever leads when the fault happens.
pub(super) const LEADER: Target = Target(u8::MAX);

impl Kind {
    /// Its name in reports.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Kill { .. } => "kill",
            Self::PowerLoss { .. } => "power_loss",
            Self::PowerLossEverywhere { .. } => "power_loss_everywhere",
            Self::PowerLossInWrite { .. } => "power_loss_in_write",
            Self::Pause { .. } => "pause",
            Self::Partition { one_way: false, .. } => "partition",
            Self::Partition { one_way: true, .. } => "partition_one_way",
            Self::Isolate { .. } => "isolate",
            Self::Loss { .. } => "loss",
            Self::Delay { .. } => "delay",
            Self::Duplicates { .. } => "duplicates",
            Self::Clog { .. } => "clog",
            Self::DiskFull { .. } => "disk_full",
            Self::SyncError { .. } => "sync_error",
            Self::BitRot { .. } => "bit_rot",
            Self::ClockJump { .. } => "clock_jump",
            Self::AgentRestart { wiped: false, .. } => "agent_restart",
            Self::AgentRestart { wiped: true, .. } => "agent_wiped",
            Self::AgentZombie { .. } => "agent_zombie",
            Self::AgentSilent { .. } => "agent_silent",
            Self::LeaderLostInJoint { .. } => "leader_lost_in_joint",
            Self::Upgrade { .. } => "upgrade",
        }
    }
}

/// Draws the faults of a world.
pub(super) fn draw(rng: &mut StdRng, params: &Params) -> Vec<Fault> {
    // Each world has its own mix, so that no kind always drowns another.
    let weights: Vec<u32> = (0..KINDS)
        .map(|_| {
            if rng.random_bool(0.45) {
                0
            } else {
                rng.random_range(1..=10)
            }
        })
        .collect();
    let total: u32 = weights.iter().sum();
    let mut plan = Vec::new();
    let mut at = Duration::from_secs(2);
    let mut rotten = false;
    if total == 0 {
        return plan;
    }
    loop {
        at += params
            .fault_every
            .mul_f64(-(1.0 - rng.random::<f64>()).ln());
        if at >= params.faults_for {
            break;
        }
        let mut left = rng.random_range(0..total);
        let kind = weights
            .iter()
            .position(|weight| {
                let here = left < *weight;
                left = left.saturating_sub(*weight);
                here
            })
            .unwrap_or_default();
        let kind = draw_kind(rng, kind);
        if matches!(kind, Kind::BitRot { .. }) && std::mem::replace(&mut rotten, true) {
            // More would be more than a minority's disks: what was agreed could be gone.
            continue;
        }
        plan.push(Fault {
            at_ms: millis(at),
            kind,
        });
    }
    // There is at most one, so that what a bit does would else be seen in few worlds.
    if !rotten && rng.random_bool(0.9) {
        let at_ms = rng.random_range(2_000..millis(params.faults_for));
        let node = Target(rng.random_range(0..LEADER.0));
        plan.push(Fault {
            at_ms,
            kind: Kind::BitRot { node },
        });
        plan.sort_by_key(|fault| fault.at_ms);
    }
    plan
}

fn millis(at: Duration) -> u64 {
    u64::try_from(at.as_millis()).unwrap_or(u64::MAX)
}

const KINDS: usize = 23;

fn draw_kind(rng: &mut StdRng, kind: usize) -> Kind {
    let node = if rng.random_bool(0.4) {
        LEADER
    } else {
        Target(rng.random_range(0..LEADER.0))
    };
    let other = Target(rng.random_range(0..LEADER.0));
    let back_ms = rng.random_range(50..=8_000);
    // As long as an election takes, or much longer.
    let for_ms = if rng.random_bool(0.5) {
        rng.random_range(100..=2_000)
    } else {
        rng.random_range(100..=8_000)
    };
    match kind {
        0 => Kind::Kill { node, back_ms },
        1 => Kind::PowerLoss { node, back_ms },
        2 => Kind::PowerLossEverywhere { back_ms },
        3 | 4 => Kind::PowerLossInWrite {
            node,
            operations: rng.random_range(1..=40),
            back_ms,
        },
        5 => Kind::Pause { node, for_ms },
        6 | 7 => Kind::Partition {
            groups: rng.random(),
            one_way: kind == 7,
            for_ms,
        },
        8 => Kind::Isolate {
            node,
            clients: true,
            for_ms,
        },
        9 => Kind::Loss {
            ppm: rng.random_range(50_000..=400_000),
            for_ms,
        },
        10 => Kind::Delay {
            most_ms: rng.random_range(50..=1_000),
            for_ms,
        },
        11 => Kind::Duplicates {
            ppm: rng.random_range(50_000..=300_000),
            for_ms,
        },
        12 => Kind::Clog {
            from: node,
            to: other,
            for_ms,
        },
        13 => Kind::DiskFull { node, for_ms },
        14 => Kind::SyncError { node, back_ms },
        15 => Kind::BitRot { node: other },
        16 => Kind::ClockJump {
            node,
            by_ms: rng.random_range(100..=30_000),
        },
        17 => Kind::AgentRestart {
            agent: other,
            wiped: rng.random_bool(0.3),
        },
        18 => match rng.random_range(0..3) {
            0 => Kind::AgentSilent {
                agent: other,
                for_ms: rng.random_range(1_000..=25_000),
            },
            _ => Kind::AgentZombie { agent: other },
        },
        19 => Kind::LeaderLostInJoint { back_ms },
        20 | 21 => Kind::Isolate {
            node: LEADER,
            clients: false,
            for_ms,
        },
        _ => Kind::Upgrade { node: other },
    }
}
