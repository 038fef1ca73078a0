//! When the next report is due.

use std::time::Duration;

use forebay_proto::Now;

/// Changes that come closer together are reported together.
const COALESCE: Duration = Duration::from_millis(20);
/// At the latest while anything is in flight.
const BUSY: Duration = Duration::from_millis(100);
/// At the latest otherwise.
const IDLE: Duration = Duration::from_millis(250);

/// The interval that a report promises.
pub(super) const fn interval(in_flight: usize) -> Duration {
    if in_flight > 0 { BUSY } else { IDLE }
}

/// What was reported last, and when.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cadence {
    last: Option<(Now, u64)>,
}

impl Cadence {
    /// When to report: soon after a change, else at the promised interval.
    pub(super) fn due(self, seq: u64, in_flight: usize) -> Now {
        match self.last {
            None => Now::default(),
            Some((at, reported)) if reported != seq => at + COALESCE,
            Some((at, _)) => at + interval(in_flight),
        }
    }

    pub(super) const fn reported(&mut self, now: Now, seq: u64) {
        self.last = Some((now, seq));
    }
}
