//! The highest rate at which enough of all offered requests keep both targets.

use std::collections::BTreeMap;

use super::{Outcome, Setup, Workload, run};

/// What a search found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Requests a second; 0: not even the lowest rate that was tried.
    pub rate: f64,
    /// The run at that rate.
    pub outcome: Option<Outcome>,
}

/// Runs of one seed by rate, so that searches for several shares have them in common.
#[derive(Default)]
struct Runs(BTreeMap<u64, Outcome>);

/// For each share of requests the highest rate, up to `most`, that keeps it: bisected in `steps` steps.
pub fn search(
    load: &Workload,
    setup: &Setup,
    seed: u64,
    most: f64,
    steps: u32,
    shares: &[f64],
    ran: &dyn Fn(),
) -> Vec<Found> {
    let mut runs = Runs::default();
    let mut one = |share: f64| {
        let (mut low, mut high) = (0.0, most);
        for _ in 0..steps {
            let rate = f64::midpoint(low, high);
            let outcome = runs.0.entry(rate.to_bits()).or_insert_with(|| {
                let outcome = run(load, setup, rate, seed);
                ran();
                outcome
            });
            if outcome.attainment() >= share {
                low = rate;
            } else {
                high = rate;
            }
        }
        Found {
            rate: low,
            outcome: runs.0.get(&low.to_bits()).cloned(),
        }
    };
    shares.iter().map(|share| one(*share)).collect()
}
