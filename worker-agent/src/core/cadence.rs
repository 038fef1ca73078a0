//! When a balancer is due its next report.
//!
//! Reports follow change: a balancer that used this worker lately is told soon after each, because what it
//! does not know of is what it places wrongly by. The others are told now and then: a change that nobody
//! acts on is worth no datagram, and a thousand workers have many.

use std::time::Duration;

use forebay_proto::Now;

/// Changes that come closer together are reported together.
const COALESCE: Duration = Duration::from_millis(20);
/// Who used the worker so recently hears of each change.
const LATELY: Duration = Duration::from_secs(1);
/// At the latest to those, while anything is in flight.
pub(super) const BUSY: Duration = Duration::from_millis(100);
/// At the latest otherwise.
pub(super) const IDLE: Duration = Duration::from_millis(250);

/// What one balancer was told last, and when it used this worker.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cadence {
    told: Option<Told>,
    used: Option<Now>,
}

#[derive(Clone, Copy, Debug)]
struct Told {
    at: Now,
    seq: u64,
    /// When the next report comes at the latest.
    interval: Duration,
}

impl Cadence {
    /// The balancer offered or asked something, or something of it ended.
    pub fn used(&mut self, now: Now) {
        self.used = Some(now);
    }

    /// When to report the state of this number.
    #[must_use]
    pub fn due(&self, seq: u64) -> Now {
        let Some(told) = self.told else {
            return Now::default();
        };
        let follows = told.seq != seq && self.is_lately(told.at);
        told.at + if follows { COALESCE } else { told.interval }
    }

    /// The state of this number is reported; returns the interval that is promised with it.
    pub fn told(&mut self, now: Now, seq: u64, in_flight: usize) -> Duration {
        let busy = in_flight > 0 && self.is_lately(now);
        let interval = if busy { BUSY } else { IDLE };
        self.told = Some(Told {
            at: now,
            seq,
            interval,
        });
        interval
    }

    fn is_lately(&self, now: Now) -> bool {
        self.used.is_some_and(|used| now.since(used) < LATELY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now::at(Duration::from_millis(ms))
    }

    #[test]
    fn who_used_it_lately_hears_of_changes_and_the_others_now_and_then() {
        let (mut user, mut other) = (Cadence::default(), Cadence::default());
        assert_eq!(user.due(1), at(0), "at once, if nothing was said yet");
        user.used(at(0));
        assert_eq!(user.told(at(0), 1, 1), BUSY);
        assert_eq!(other.told(at(0), 1, 1), IDLE);
        assert_eq!((user.due(1), other.due(1)), (at(100), at(250)));
        assert_eq!((user.due(2), other.due(2)), (at(20), at(250)));
        // What was promised is kept, also when the worker was not used for long.
        assert_eq!(user.told(at(990), 2, 1), BUSY);
        assert_eq!(user.due(2), at(1_090));
        assert_eq!(user.told(at(1_090), 2, 1), IDLE);
        assert_eq!(user.due(3), at(1_340));
        assert_eq!(user.told(at(1_400), 3, 0), IDLE);
    }
}
