//! How much of a worker copies of requests may take that run elsewhere: one at a time, a twentieth of its time
//! for prefills, and only while nobody needs it.

use forebay_proto::Now;

use super::placement::PlacementId;

/// Of the worker's time.
const SHARE: f64 = 0.05;
/// What was not used is kept up to this: one long prompt.
const MOST_MS: f64 = 2_000.0;

/// The copies' part. What is taken beyond it is made up for before the next one.
#[derive(Debug)]
pub(super) struct Shadows {
    /// The one that is here.
    pub(super) present: Option<PlacementId>,
    left_ms: f64,
    /// What the one that is here takes.
    takes_ms: f64,
    at: Now,
}

impl Default for Shadows {
    fn default() -> Self {
        Self {
            present: None,
            left_ms: MOST_MS,
            takes_ms: 0.0,
            at: Now::default(),
        }
    }
}

impl Shadows {
    /// Whether one may come that takes so long to prefill; of what takes nothing there is no use.
    pub(super) fn admit(&mut self, now: Now, prefill_ms: f64) -> bool {
        let earned = now.since(self.at).as_secs_f64() * 1e3 * SHARE;
        self.left_ms = (self.left_ms + earned).min(MOST_MS);
        self.at = self.at.max(now);
        if self.present.is_some() || self.left_ms < 0.0 || prefill_ms <= 0.0 {
            return false;
        }
        self.left_ms -= prefill_ms;
        self.takes_ms = prefill_ms;
        true
    }

    /// A placement is over; of one that never ran nothing was taken.
    pub(super) fn over(&mut self, id: PlacementId, unstarted: bool) {
        if self.present == Some(id) {
            self.present = None;
            if unstarted {
                self.left_ms = (self.left_ms + self.takes_ms).min(MOST_MS);
            }
        }
    }
}
