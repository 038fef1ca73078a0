//! What one key may ask in a minute, and at once.
//!
//! Kept by each balancer for itself: a key of 60 requests a minute may ask 60 of each. Agreed quotas
//! are facts, and come with them.

use std::sync::Arc;
use std::time::Duration;

use forebay_proto::Now;
use parking_lot::Mutex;

/// A key's allowance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Allowance {
    /// Requests a minute, and in one go.
    pub(crate) requests_per_minute: Option<u32>,
    /// Requests that may be under way.
    pub(crate) max_parallel: Option<u32>,
}

/// What is left of a key's requests, for its client to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) limit: u32,
    pub(crate) remaining: u32,
    /// Until all of them may be asked again.
    pub(crate) reset: Duration,
}

/// A request that may not be asked now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exceeded {
    /// When to ask again; none: as soon as another of the key's requests ends.
    pub(crate) retry_after: Option<Duration>,
}

/// A key's use of its allowance.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    allowance: Allowance,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Requests that were taken from the minute's, as of `at`; they come back steadily.
    spent: f64,
    at: Now,
    parallel: u32,
}

/// One request under way, given back when dropped.
#[derive(Debug)]
pub(crate) struct Running(Arc<Meter>);

impl Meter {
    pub(crate) fn new(allowance: Allowance) -> Arc<Self> {
        Arc::new(Self {
            allowance,
            state: Mutex::default(),
        })
    }

    pub(crate) fn allowance(&self) -> Allowance {
        self.allowance
    }

    /// Takes one request, or says why not. Limited keys also learn what is left.
    pub(crate) fn ask(self: &Arc<Self>, now: Now) -> (Result<Running, Exceeded>, Option<Left>) {
        let mut state = self.state.lock();
        let limit = self.allowance.requests_per_minute;
        if let Some(limit) = limit {
            let back = now.since(state.at).as_secs_f64() * f64::from(limit) / 60.0;
            state.spent = (state.spent - back).max(0.0);
        }
        state.at = state.at.max(now);
        let busy = self.allowance.max_parallel;
        let asked = if busy.is_some_and(|most| state.parallel >= most) {
            Err(Exceeded { retry_after: None })
        } else if limit.is_some_and(|limit| state.spent + 1.0 > f64::from(limit)) {
            let limit = f64::from(limit.unwrap_or(1).max(1));
            let seconds = (state.spent + 1.0 - limit) * 60.0 / limit;
            Err(Exceeded {
                retry_after: Some(Duration::from_secs_f64(seconds)),
            })
        } else {
            state.spent += 1.0;
            state.parallel += 1;
            Ok(Running(self.clone()))
        };
        let left = limit.map(|limit| {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
            let remaining = (f64::from(limit) - state.spent).max(0.0) as u32;
            Left {
                limit,
                remaining,
                reset: Duration::from_secs_f64(state.spent * 60.0 / f64::from(limit.max(1))),
            }
        });
        (asked, left)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.state.lock().parallel -= 1;
    }
}

/// A duration as OpenAI's headers have it: `6m0s`, `1s`, `20ms`.
pub(crate) fn written(duration: Duration) -> String {
    let (seconds, millis) = (duration.as_secs(), duration.subsec_millis());
    match (seconds / 60, seconds % 60) {
        (0, 0) => format!("{millis}ms"),
        (0, seconds) => format!("{seconds}s"),
        (minutes, seconds) => format!("{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Now {
        Now::at(Duration::from_millis(ms))
    }

    #[test]
    fn a_minutes_requests_come_back_steadily() {
        let meter = Meter::new(Allowance {
            requests_per_minute: Some(60),
            max_parallel: None,
        });
        let ask = |ms| {
            let (asked, left) = meter.ask(at(ms));
            (asked.map(drop), left.unwrap())
        };
        for n in 1..=60 {
            let (asked, left) = ask(0);
            assert_eq!((asked, left.remaining), (Ok(()), 60 - n));
        }
        let (asked, left) = ask(0);
        let after = Some(Duration::from_secs(1));
        assert_eq!(asked, Err(Exceeded { retry_after: after }));
        assert_eq!((left.limit, left.remaining), (60, 0));
        assert_eq!(written(left.reset), "1m0s");
        assert!(ask(999).0.is_err());
        assert_eq!(ask(1_001).0, Ok(()));
        assert_eq!(ask(120_000).1.remaining, 59);
    }

    #[test]
    fn requests_at_once_are_given_back_by_their_end() {
        let meter = Meter::new(Allowance {
            requests_per_minute: None,
            max_parallel: Some(1),
        });
        let (first, left) = meter.ask(at(0));
        assert!(first.is_ok() && left.is_none());
        assert_eq!(
            meter.ask(at(0)).0.unwrap_err(),
            Exceeded { retry_after: None }
        );
        drop(first);
        assert!(meter.ask(at(0)).0.is_ok());
    }

    #[test]
    fn durations_are_written_as_openai_does() {
        let ms = Duration::from_millis;
        assert_eq!(written(ms(20)), "20ms");
        assert_eq!(written(ms(1_000)), "1s");
        assert_eq!(written(ms(360_000)), "6m0s");
    }
}
