//! Whether an engine that has requests makes any progress.
//!
//! A health page is answered by a process in front of the engine, which answers on when the engine hangs. What
//! counts is work: a piece of an answer, an answer's end, or a counter of the engine's own that went on.

use std::time::Duration;

use forebay_proto::Now;

/// What was last seen of an engine's work.
#[derive(Debug, Default)]
pub struct Progress {
    /// The newest sign of work, or when it got something to do.
    since: Option<Now>,
    /// The engine's own count of its work.
    work: Option<u64>,
}

/// What a look at an engine says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pulse {
    /// It works, or has nothing to do.
    Good,
    /// No sign for a while: its own counters are worth a look.
    Faint,
    /// No sign for longer than it may take.
    None,
}

impl Progress {
    /// A look: something is to be heard of so many requests, the engine's last word came then, and it may be
    /// silent for `patience`.
    pub fn look(
        &mut self,
        now: Now,
        expected: u32,
        heard: Option<Now>,
        patience: Duration,
    ) -> Pulse {
        if expected == 0 {
            self.since = None;
            return Pulse::Good;
        }
        let since = self.since.get_or_insert(now);
        *since = heard.map_or(*since, |heard| heard.max(*since));
        let silent = now.since(*since);
        if silent >= patience {
            Pulse::None
        } else if silent >= patience / 2 {
            Pulse::Faint
        } else {
            Pulse::Good
        }
    }

    /// The engine says that it has done so much; any change of it is work.
    pub fn counted(&mut self, now: Now, work: u64) {
        let before = self.work.replace(work);
        if before.is_some_and(|before| before != work) && self.since.is_some() {
            self.since = Some(now);
        }
    }

    /// It is another engine, or was judged: what was seen is of no account any more.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn at(seconds: u64) -> Now {
        Now::at(Duration::from_secs(seconds))
    }

    #[test]
    fn an_idle_engine_is_well_however_long_it_is_silent() {
        let mut progress = Progress::default();
        assert_eq!(progress.look(at(0), 0, None, PATIENCE), Pulse::Good);
        assert_eq!(
            progress.look(at(5_000), 0, Some(at(1)), PATIENCE),
            Pulse::Good
        );
        assert_eq!(
            progress.look(at(5_001), 1, Some(at(1)), PATIENCE),
            Pulse::Good,
            "it has just begun"
        );
    }

    #[test]
    fn one_with_requests_has_to_be_heard_of() {
        let mut progress = Progress::default();
        assert_eq!(progress.look(at(100), 2, None, PATIENCE), Pulse::Good);
        assert_eq!(progress.look(at(129), 2, None, PATIENCE), Pulse::Good);
        assert_eq!(progress.look(at(130), 2, None, PATIENCE), Pulse::Faint);
        assert_eq!(
            progress.look(at(159), 9, None, PATIENCE),
            Pulse::Faint,
            "new requests are no sign"
        );
        assert_eq!(progress.look(at(160), 9, None, PATIENCE), Pulse::None);
        assert_eq!(
            progress.look(at(161), 9, Some(at(150)), PATIENCE),
            Pulse::Good
        );
        assert_eq!(
            progress.look(at(210), 9, Some(at(150)), PATIENCE),
            Pulse::None
        );
        progress.forget();
        assert_eq!(
            progress.look(at(211), 1, Some(at(150)), PATIENCE),
            Pulse::Good
        );
    }

    #[test]
    fn its_own_counters_are_a_sign_too() {
        let mut progress = Progress::default();
        progress.look(at(0), 1, None, PATIENCE);
        progress.counted(at(30), 1_000);
        assert_eq!(
            progress.look(at(59), 1, None, PATIENCE),
            Pulse::Faint,
            "one count is no change"
        );
        progress.counted(at(59), 1_001);
        assert_eq!(progress.look(at(100), 1, None, PATIENCE), Pulse::Faint);
        progress.counted(at(118), 1_001);
        assert_eq!(progress.look(at(119), 1, None, PATIENCE), Pulse::None);
    }
}
