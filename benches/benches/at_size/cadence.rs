//! How many reports come to a balancer in a whole cell: the agents' own cadence, one worker at a time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use forebay_proto::Now;
use forebay_worker_agent::core::Cadence;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A cell's load, as one worker meets it.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) balancers: usize,
    /// Requests a second on one worker.
    pub(crate) rate: f64,
    pub(crate) to_first_token: Duration,
    pub(crate) to_end: Duration,
}

/// What comes of it.
pub(crate) struct Told {
    /// Reports a second to one balancer of one worker.
    pub(crate) reports: f64,
    /// Others' placements that a balancer had not heard of when one of its own was taken.
    pub(crate) unseen: f64,
    /// Moments, 20 ms apart at least, at which what the worker holds changed, a second.
    pub(crate) deltas: f64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Arrives,
    FirstToken,
    Ends(usize),
}

const LASTS: Duration = Duration::from_secs(200);
/// As the agent gathers changes of what is resident.
const BATCH: Duration = Duration::from_millis(20);

/// Runs one worker for a while.
pub(crate) fn run(load: Load) -> Told {
    let mut rng = StdRng::seed_from_u64(1);
    let mut cadences = vec![Cadence::default(); load.balancers];
    let mut unseen = vec![0_u64; load.balancers];
    let mut events = BinaryHeap::from([Reverse((Duration::ZERO, What::Arrives))]);
    let (mut seq, mut in_flight) = (0, 0);
    let (mut reports, mut placed, mut not_seen, mut deltas) = (0_u64, 0_u64, 0_u64, 0_u64);
    let mut told_of_cache = Duration::ZERO;
    loop {
        let Some(Reverse((at, what))) = events.pop() else {
            unreachable!("each arrival has one behind it");
        };
        // What was due before that, in order.
        loop {
            let dues = cadences.iter().enumerate();
            let due = dues.map(|(to, cadence)| (cadence.due(seq), to)).min();
            let Some((due, to)) = due.filter(|(due, _)| *due <= Now::at(at)) else {
                break;
            };
            cadences[to].told(due, seq, in_flight);
            unseen[to] = 0;
            reports += 1;
        }
        if at > LASTS {
            break;
        }
        seq += 1;
        // What a prompt will leave is told of when it is taken, and again when the engine has counted it.
        let changes = matches!(what, What::Arrives | What::Ends(_));
        if changes && at >= told_of_cache + BATCH {
            told_of_cache = at;
            deltas += 1;
        }
        match what {
            What::Arrives => {
                let from = rng.random_range(0..load.balancers);
                placed += 1;
                not_seen += std::mem::take(&mut unseen[from]);
                for (to, count) in unseen.iter_mut().enumerate() {
                    *count += u64::from(to != from);
                }
                cadences[from].used(Now::at(at));
                in_flight += 1;
                let pause = -(1.0 - rng.random::<f64>()).ln() / load.rate;
                let after = [
                    (at + Duration::from_secs_f64(pause), What::Arrives),
                    (at + load.to_first_token, What::FirstToken),
                    (at + load.to_end, What::Ends(from)),
                ];
                events.extend(after.map(Reverse));
            }
            What::FirstToken => {}
            What::Ends(from) => {
                cadences[from].used(Now::at(at));
                unseen[from] = 0;
                in_flight -= 1;
            }
        }
    }
    let seconds = LASTS.as_secs_f64();
    Told {
        reports: reports as f64 / seconds / load.balancers as f64,
        unseen: not_seen as f64 / placed as f64,
        deltas: deltas as f64 / seconds,
    }
}
