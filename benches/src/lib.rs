//! How fast: one file per question, in `benches/`. Each prints its question and workload, percentiles,
//! and a ratio against a reference measured in the same run, because absolute times drift between
//! machines and hours.
//!
//! `cargo bench -p forebay-benches` runs all of them. What every request takes is also counted, in instructions:
//! `cargo run --release -p forebay-benches --bin instructions` fails where one of them takes more than it did.

pub mod bodies;
pub mod fleets;

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// Times of one operation.
pub struct Timed(Histogram<u64>);

impl Timed {
    /// Runs `operation` `times` times after a tenth as many for warming up.
    ///
    /// # Panics
    ///
    /// Never: the histogram resizes itself.
    pub fn run(times: usize, mut operation: impl FnMut()) -> Self {
        (0..times / 10).for_each(|_| operation());
        let mut histogram = Histogram::new(3).expect("three digits are supported");
        for _ in 0..times {
            let began = Instant::now();
            operation();
            let nanos = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            histogram
                .record(nanos.max(1))
                .expect("the histogram resizes itself");
        }
        Self(histogram)
    }

    /// The value that `quantile` (0 to 1) of the operations did not exceed.
    #[must_use]
    pub fn quantile(&self, quantile: f64) -> Duration {
        Duration::from_nanos(self.0.value_at_quantile(quantile))
    }
}
