//! Waiting longer after each failure, never in step with others.

use std::time::Duration;

use rand::Rng;

/// Exponential back-off with full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter"):
/// each wait is drawn from `[least, min(most, least · 2ⁿ)]`. Pure: the generator is handed in.
#[derive(Clone, Debug)]
pub struct Backoff {
    least: Duration,
    most: Duration,
    failures: u32,
}

impl Backoff {
    /// Waits between `least` and `most`.
    #[must_use]
    pub const fn new(least: Duration, most: Duration) -> Self {
        Self {
            least,
            most,
            failures: 0,
        }
    }

    /// How long to wait after one more failure.
    pub fn next(&mut self, rng: &mut impl Rng) -> Duration {
        let ceiling = self
            .least
            .saturating_mul(1 << self.failures.min(16))
            .min(self.most);
        self.failures = self.failures.saturating_add(1);
        rng.random_range(self.least..=ceiling.max(self.least))
    }

    /// The peer answered: the next failure is a first one.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn waits_grow_to_their_bound_and_start_again_after_a_success() {
        let (least, most) = (Duration::from_millis(10), Duration::from_secs(1));
        let mut rng = StdRng::seed_from_u64(1);
        let mut backoff = Backoff::new(least, most);
        let waits: Vec<_> = (0..200).map(|_| backoff.next(&mut rng)).collect();
        assert!(waits.iter().all(|wait| (least..=most).contains(wait)));
        assert_eq!(waits[0], least);
        assert!(waits[20..].iter().max() > Some(&Duration::from_millis(900)));
        backoff.reset();
        assert_eq!(backoff.next(&mut rng), least);
    }
}
