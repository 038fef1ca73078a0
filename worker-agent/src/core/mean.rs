//! A mean over recent ones.

use std::time::Duration;

/// Weight of a new sample: one eighth.
const SHARE: u32 = 8;

/// Exponentially weighted mean of durations; the first sample is taken whole.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mean(Option<Duration>);

impl Mean {
    pub(super) fn add(&mut self, sample: Duration) {
        self.0 = Some(match self.0 {
            None => sample,
            Some(mean) => mean - mean / SHARE + sample / SHARE,
        });
    }

    /// Zero: nothing was added.
    pub(super) fn value(self) -> Duration {
        self.0.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_starts_at_the_first_sample_and_follows_the_newer_ones() {
        let ms = Duration::from_millis;
        let mut mean = Mean::default();
        assert_eq!(mean.value(), Duration::ZERO);
        mean.add(ms(800));
        assert_eq!(mean.value(), ms(800));
        mean.add(ms(0));
        assert_eq!(mean.value(), ms(700));
        (0..100).for_each(|_| mean.add(ms(400)));
        assert!(mean.value().abs_diff(ms(400)) < ms(1));
    }
}
