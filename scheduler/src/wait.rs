//! How long a request would wait before it starts, in predicted time.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::lineup::slack_ms;
use crate::model::{Backlog, Pace, Prefills, Profile, attention_pairs};

/// Time a request holds a slot where nothing has been measured yet.
const NOMINAL_SERVICE: Duration = Duration::from_secs(1);

/// What is in front of a new request on one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queueing {
    /// Requests running or waiting.
    pub present: u32,
    /// Requests that run at once; at least 1 is assumed.
    pub slots: u32,
    /// Mean time a request holds a slot; zero: not measured.
    pub service: Duration,
}

impl Queueing {
    /// Expected wait of one more request: none while a slot is free, else until as many of those
    /// present have left as stand in its way, one every `service ÷ slots`.
    #[must_use]
    pub fn wait(&self) -> Duration {
        let slots = self.slots.max(1);
        let in_the_way = self.present.saturating_add(1).saturating_sub(slots);
        if in_the_way == 0 {
            return Duration::ZERO;
        }
        let service = if self.service.is_zero() {
            NOMINAL_SERVICE
        } else {
            self.service
        };
        service.saturating_mul(in_the_way) / slots
    }
}

/// Time to first token of a prompt of which `cached` tokens are in the cache and `uncached` are not:
/// the wait for a slot, then the prefill behind what is there and more urgent. Balancers expect it, and agents hold it
/// against the same sum over their real queue and cache.
#[must_use]
pub fn first_token(
    queueing: &Queueing,
    profile: &Profile,
    backlog: &Backlog,
    (cached, uncached): (f64, f64),
    ttft_target_ms: f64,
) -> Duration {
    let (pace, own_pairs) = (
        Pace::of(profile, backlog.decodes, backlog.context_tokens),
        attention_pairs(cached, uncached),
    );
    let own_ms = pace.token_ms * uncached + pace.pair_ms * own_pairs;
    let prefills = Prefills {
        pending_tokens: backlog.pending_tokens,
        pending_pairs: backlog.pending_pairs,
        uncached,
        own_pairs,
    };
    let slack = slack_ms(ttft_target_ms, own_ms);
    let ms = pace.ttft_by_slack_ms(&backlog.lineup, &prefills, slack);
    let prefill = Duration::try_from_secs_f64(ms / 1e3).unwrap_or(Duration::MAX);
    queueing.wait().saturating_add(prefill)
}

/// Whether a worker's own estimate is so much worse than the balancer's that the placement was made
/// on a stale view: by more than 25 ms and more than a quarter.
#[must_use]
pub fn exceeds(real: Duration, expected: Duration) -> bool {
    real > expected + (expected / 4).max(Duration::from_millis(25))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait_ms(present: u32, slots: u32, service_ms: u64) -> u128 {
        let service = Duration::from_millis(service_ms);
        Queueing {
            present,
            slots,
            service,
        }
        .wait()
        .as_millis()
    }

    #[test]
    fn a_free_slot_means_no_wait() {
        assert_eq!(wait_ms(0, 4, 400), 0);
        assert_eq!(wait_ms(3, 4, 400), 0);
    }

    #[test]
    fn behind_full_slots_each_request_in_the_way_costs_its_share_of_a_service() {
        assert_eq!(wait_ms(4, 4, 400), 100);
        assert_eq!(wait_ms(7, 4, 400), 400);
        assert_eq!(wait_ms(1, 1, 400), 400);
    }

    #[test]
    fn what_is_not_measured_is_nominal_and_no_slots_count_as_one() {
        assert_eq!(wait_ms(1, 1, 0), 1_000);
        assert_eq!(wait_ms(1, 0, 100), 100);
    }

    #[test]
    fn a_report_out_of_this_world_is_a_long_wait_and_no_overflow() {
        assert!(wait_ms(u32::MAX, 1, 1_000) > 4_000_000_000_000);
        assert_eq!(wait_ms(u32::MAX, u32::MAX, u64::MAX), 0);
        assert!(wait_ms(u32::MAX, 1, u64::MAX) > 0);
    }

    #[test]
    fn a_view_is_stale_past_a_quarter_and_25_ms() {
        let ms = Duration::from_millis;
        assert!(!exceeds(ms(25), ms(0)));
        assert!(exceeds(ms(26), ms(0)));
        assert!(!exceeds(ms(1_250), ms(1_000)));
        assert!(exceeds(ms(1_251), ms(1_000)));
    }
}
