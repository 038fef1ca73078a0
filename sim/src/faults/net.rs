//! What becomes of a message between two places, now.

use forebay_proto::NodeId;
use rand::Rng as _;
use rand::rngs::StdRng;

use super::params::Params;

/// Where messages begin and end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    Node(NodeId),
    /// Clients, agents and watchers: each beside all nodes.
    Outside,
}

/// A trouble of the network, until some time.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    pub(super) until_us: u64,
    pub(super) kind: TroubleKind,
}

#[derive(Clone, Debug)]
pub(super) enum TroubleKind {
    /// Nodes of the second group, by the bits of their ids modulo 8.
    Partition {
        groups: u8,
        one_way: bool,
    },
    /// From the other nodes, and from clients or not.
    Isolated {
        node: NodeId,
        clients: bool,
    },
    Loss(u32),
    Delay {
        most_us: u64,
    },
    Duplicates(u32),
    Clog {
        from: NodeId,
        to: NodeId,
    },
}

#[derive(Debug, Default)]
pub(super) struct Network {
    troubles: Vec<Trouble>,
}

impl Network {
    pub(super) fn trouble(&mut self, trouble: Trouble) {
        self.troubles.push(trouble);
    }

    pub(super) fn heal(&mut self) {
        self.troubles.clear();
    }

    /// When the copies of a message arrive; none when it is lost.
    pub(super) fn send(
        &mut self,
        rng: &mut StdRng,
        params: &Params,
        now_us: u64,
        (from, to): (Place, Place),
    ) -> Vec<u64> {
        self.troubles.retain(|trouble| trouble.until_us > now_us);
        let (mut lost, mut doubled) = (params.lost_ppm, params.doubled_ppm);
        let mut most = micros(params.most_delay);
        let mut not_before = 0;
        for trouble in &self.troubles {
            match trouble.kind {
                TroubleKind::Loss(ppm) => lost += ppm,
                TroubleKind::Duplicates(ppm) => doubled += ppm,
                TroubleKind::Delay { most_us } => most = most.max(most_us),
                TroubleKind::Isolated { node, clients } => {
                    let hit = from == Place::Node(node) || to == Place::Node(node);
                    let outside = from == Place::Outside || to == Place::Outside;
                    if hit && (clients || !outside) {
                        return Vec::new();
                    }
                }
                TroubleKind::Partition { groups, one_way } => {
                    if apart(groups, one_way, from, to) {
                        return Vec::new();
                    }
                }
                TroubleKind::Clog { from: f, to: t } => {
                    if from == Place::Node(f) && to == Place::Node(t) {
                        not_before = trouble.until_us;
                    }
                }
            }
        }
        if rng.random_ratio(lost.min(900_000), 1_000_000) {
            return Vec::new();
        }
        let copies = 1 + u32::from(rng.random_ratio(doubled.min(900_000), 1_000_000));
        let least = micros(params.least_delay);
        (0..copies)
            .map(|_| {
                // Most are quick, some are not.
                let slow: f64 = rng.random::<f64>().powi(3);
                let delay = least + ((most.saturating_sub(least)) as f64 * slow) as u64;
                (now_us + delay).max(not_before)
            })
            .collect()
    }
}

fn apart(groups: u8, one_way: bool, from: Place, to: Place) -> bool {
    let (Place::Node(from), Place::Node(to)) = (from, to) else {
        return false;
    };
    let second = |node: NodeId| groups >> (node.0 % 8) & 1 == 1;
    if one_way {
        !second(from) && second(to)
    } else {
        second(from) != second(to)
    }
}

fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
