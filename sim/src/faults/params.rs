//! What is drawn once for a seed: how large the world is, how its network and disks behave all the
//! time, and how long it lasts.

use std::time::Duration;

use rand::Rng as _;
use rand::rngs::StdRng;

/// One world.
#[derive(Clone, Debug)]
pub(super) struct Params {
    /// Control nodes at the start.
    pub(super) nodes: u32,
    pub(super) clients: u32,
    pub(super) agents: u32,
    pub(super) balancers: u32,
    /// How long faults happen, and how long the world then heals.
    pub(super) faults_for: Duration,
    pub(super) heals_for: Duration,
    /// Mean time between two operations of a client.
    pub(super) think: Duration,
    /// A message takes from the one to the other; and so many in a million are lost or doubled.
    pub(super) least_delay: Duration,
    pub(super) most_delay: Duration,
    pub(super) lost_ppm: u32,
    pub(super) doubled_ppm: u32,
    /// A turn of a replica takes up to this.
    pub(super) most_turn: Duration,
    /// Of a replica.
    pub(super) segment_bytes: u64,
    pub(super) snapshot_entries: u64,
    pub(super) keep_entries: u64,
    /// Deltas a node keeps for balancers.
    pub(super) max_deltas: usize,
    /// A clock runs up to so many parts in a million too fast or too slow.
    pub(super) drift_ppm: i64,
    /// Whether members come and go.
    pub(super) churn: bool,
    /// Whether some nodes begin with the version before.
    pub(super) mixed: bool,
    /// Mean time between two faults.
    pub(super) fault_every: Duration,
}

impl Params {
    pub(super) fn draw(rng: &mut StdRng, nodes: Option<u32>) -> Self {
        let ms = |rng: &mut StdRng, from: u64, to: u64| {
            Duration::from_millis(rng.random_range(from..=to))
        };
        let nodes = nodes.unwrap_or(if rng.random_bool(0.7) { 3 } else { 5 });
        let quiet_network = rng.random_bool(0.4);
        Self {
            nodes,
            clients: rng.random_range(3..=6),
            agents: rng.random_range(2..=5),
            balancers: rng.random_range(1..=3),
            faults_for: ms(rng, 20_000, 60_000),
            heals_for: Duration::from_secs(25),
            think: ms(rng, 50, 400),
            least_delay: Duration::from_micros(rng.random_range(50..=500)),
            most_delay: Duration::from_micros(if quiet_network {
                rng.random_range(600..=3_000)
            } else {
                rng.random_range(3_000..=40_000)
            }),
            lost_ppm: if quiet_network {
                0
            } else {
                rng.random_range(0..=30_000)
            },
            doubled_ppm: if quiet_network {
                0
            } else {
                rng.random_range(0..=20_000)
            },
            most_turn: Duration::from_micros(rng.random_range(100..=8_000)),
            segment_bytes: rng.random_range(2_000..=60_000),
            snapshot_entries: rng.random_range(10..=300),
            keep_entries: rng.random_range(0..=60),
            max_deltas: rng.random_range(4..=400),
            drift_ppm: rng.random_range(0..=10_000),
            churn: rng.random_bool(0.6),
            mixed: rng.random_bool(0.3),
            fault_every: ms(rng, 600, 6_000),
        }
    }
}
