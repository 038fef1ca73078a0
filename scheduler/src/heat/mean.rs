//! Means that fade: what was a minute ago counts half.

use std::f64::consts::LN_2;
use std::time::Duration;

use forebay_proto::Now;

/// After so long something counts half.
pub(super) const HALF_LIFE: Duration = Duration::from_secs(60);
/// Nothing is called a mean before there was so much time to take it of.
const LEAST_AGE: Duration = Duration::from_secs(5);

/// Sums of several quantities that fade together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fading<const N: usize> {
    sums: [f64; N],
    at: Now,
}

impl<const N: usize> Default for Fading<N> {
    fn default() -> Self {
        Self {
            sums: [0.0; N],
            at: Now::default(),
        }
    }
}

impl<const N: usize> Fading<N> {
    pub(super) fn add(&mut self, now: Now, amounts: [f64; N]) {
        let kept = fade(now.since(self.at));
        for (sum, amount) in self.sums.iter_mut().zip(amounts) {
            *sum = *sum * kept + amount;
        }
        self.at = self.at.max(now);
    }

    /// What was added `then` is taken off.
    pub(super) fn take_off(&mut self, now: Now, then: Now, amounts: [f64; N]) {
        let left = fade(now.since(then));
        self.add(now, amounts.map(|amount| -amount * left));
    }

    /// Of each so much a second, by one who has counted for this long.
    pub(super) fn a_second(&self, now: Now, counted_for: Duration) -> [f64; N] {
        let rate = LN_2 / HALF_LIFE.as_secs_f64();
        // Of a mean over all time before, the part that there was.
        let part = 1.0 - fade(counted_for.max(LEAST_AGE));
        let kept = fade(now.since(self.at)) * rate / part;
        // What was taken off leaves rounding behind.
        self.sums.map(|sum| (sum * kept).max(0.0))
    }
}

fn fade(past: Duration) -> f64 {
    (-LN_2 * past.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64) -> Now {
        Now::at(Duration::from_secs(secs))
    }

    #[test]
    fn a_steady_rate_reads_as_it_is_from_the_first_seconds_on() {
        let mut fading = Fading::default();
        for second in 0..400 {
            for part in 0..4 {
                fading.add(at(second) + Duration::from_millis(250 * part), [1.0, 50.0]);
            }
            let counted_for = Duration::from_secs(second + 1);
            if second >= 5 {
                let [count, takes] = fading.a_second(at(second + 1), counted_for);
                assert!((3.9..4.2).contains(&count), "{count} after {second} s");
                assert!((takes / count - 50.0).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn what_was_a_half_life_ago_counts_half_and_what_is_taken_off_not_at_all() {
        let mut fading = Fading::default();
        fading.add(at(10), [1.0]);
        let always = Duration::from_secs(100_000);
        let [fresh] = fading.a_second(at(10), always);
        let [later] = fading.a_second(at(70), always);
        assert!((later / fresh - 0.5).abs() < 1e-9);
        fading.take_off(at(70), at(10), [1.0]);
        let [none] = fading.a_second(at(70), always);
        assert!(none.abs() < 1e-9);
    }
}
