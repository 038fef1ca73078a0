//! How fast: one file per question, in `benches/`. Each prints its question and workload, percentiles,
//! and a ratio against a reference measured in the same run, because absolute times drift between
//! machines and hours.
//!
//! `cargo bench -p forebay-benches` runs all of them. What every request takes is also counted, in instructions:
//! `cargo run --release -p forebay-benches --bin instructions` fails where one of them takes more than it did.

pub mod bodies;
pub mod fleets;
pub mod servers;

use std::sync::OnceLock;
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
        Self::prepared(times, &mut (), |()| {}, |()| operation())
    }

    /// The same where each operation needs something ready that is not timed.
    ///
    /// # Panics
    ///
    /// Never: the histogram resizes itself.
    pub fn prepared<S>(
        times: usize,
        state: &mut S,
        mut prepare: impl FnMut(&mut S),
        mut operation: impl FnMut(&mut S),
    ) -> Self {
        let mut timed = Self::default();
        for time in 0..times + times / 10 {
            prepare(state);
            let began = Instant::now();
            operation(state);
            let took = began.elapsed();
            if time >= times / 10 {
                timed.add(took);
            }
        }
        timed
    }

    /// One more time.
    ///
    /// # Panics
    ///
    /// Never: the histogram resizes itself.
    pub fn add(&mut self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let recorded = self.0.record(nanos.max(1));
        recorded.expect("the histogram resizes itself");
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value that `quantile` (0 to 1) of the operations did not exceed.
    #[must_use]
    pub fn quantile(&self, quantile: f64) -> Duration {
        Duration::from_nanos(self.0.value_at_quantile(quantile))
    }
}

impl Default for Timed {
    fn default() -> Self {
        Self(Histogram::new(3).expect("three digits are supported"))
    }
}

/// Time that this thread had a core, which others may share; without such a clock, time.
#[must_use]
pub fn on_core() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = stat.split(' ').next().and_then(|nanos| nanos.parse().ok());
    nanos.map_or_else(
        || START.get_or_init(Instant::now).elapsed(),
        Duration::from_nanos,
    )
}
