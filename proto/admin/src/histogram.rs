//! A latency distribution that a scrape can read.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// A distribution of durations since the start of the process, from 1 µs to 1 hour.
///
/// Clones share the same numbers. Longer durations count as an hour; three digits are kept, in
/// some 200 KiB.
#[derive(Clone)]
pub struct Histogram {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    micros: hdrhistogram::Histogram<u64>,
    sum: u64,
}

impl Histogram {
    /// An empty distribution.
    #[must_use]
    pub fn new() -> Self {
        let micros = hdrhistogram::Histogram::new_with_bounds(1, LONGEST_MICROS, 3)
            .expect("1 < an hour / 2, and three digits are allowed");
        Self {
            inner: Arc::new(Mutex::new(Inner { micros, sum: 0 })),
        }
    }

    /// An empty distribution that `registry` exports as `<name>_ms`, `<name>_ms_count` and
    /// `<name>_ms_sum`.
    pub fn registered(registry: &mut Registry, name: &str, help: &str) -> Self {
        let histogram = Self::new();
        histogram.register(registry, name, help);
        histogram
    }

    /// Exports the distribution as gauges in milliseconds: `<name>_ms{quantile="0.5|0.9|0.99|0.999"}`,
    /// `<name>_ms_count` and `<name>_ms_sum`; `name` is without the unit.
    pub fn register(&self, registry: &mut Registry, name: &str, help: &str) {
        registry.register_collector(Box::new(Exported {
            name: format!("{name}_ms"),
            // As the registry ends the help of all other metrics.
            help: format!("{help}."),
            histogram: self.clone(),
        }));
    }

    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let mut inner = self.inner.lock();
        inner
            .micros
            .saturating_record(micros.clamp(1, LONGEST_MICROS));
        inner.sum = inner.sum.saturating_add(micros);
    }

    /// How many durations were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.inner.lock().micros.len()
    }

    /// The duration that a share `quantile` (0 to 1) did not exceed; zero when nothing was counted.
    #[must_use]
    pub fn quantile(&self, quantile: f64) -> Duration {
        Duration::from_micros(self.inner.lock().micros.value_at_quantile(quantile))
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Histogram")
            .field("count", &self.count())
            .finish_non_exhaustive()
    }
}

/// One histogram under the name it is scraped by.
#[derive(Debug)]
struct Exported {
    name: String,
    help: String,
    histogram: Histogram,
}

impl Collector for Exported {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (quantiles, count, sum) = {
            let inner = self.histogram.inner.lock();
            let quantiles = QUANTILES.map(|(q, label)| (label, inner.micros.value_at_quantile(q)));
            (quantiles, inner.micros.len(), inner.sum)
        };
        let mut family =
            encoder.encode_descriptor(&self.name, &self.help, None, MetricType::Gauge)?;
        for (label, micros) in quantiles {
            family
                .encode_family(&[("quantile", label)])?
                .encode_gauge(&millis(micros))?;
        }
        encoder
            .encode_descriptor(
                &format!("{}_count", self.name),
                "How many were counted.",
                None,
                MetricType::Gauge,
            )?
            .encode_gauge(&i64::try_from(count).unwrap_or(i64::MAX))?;
        encoder
            .encode_descriptor(
                &format!("{}_sum", self.name),
                "Their sum in milliseconds.",
                None,
                MetricType::Gauge,
            )?
            .encode_gauge(&millis(sum))
    }
}

fn millis(micros: u64) -> f64 {
    Duration::from_micros(micros).as_secs_f64() * 1e3
}

const LONGEST_MICROS: u64 = 3_600_000_000;

const QUANTILES: [(f64, &str); 4] = [(0.5, "0.5"), (0.9, "0.9"), (0.99, "0.99"), (0.999, "0.999")];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_shows_quantiles_count_and_sum_in_milliseconds() {
        let mut registry = Registry::with_prefix("forebay");
        let histogram = Histogram::registered(&mut registry, "ttft", "Time to the first token");
        for ms in 1..=100 {
            histogram.record(Duration::from_millis(ms));
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(
            text.contains("forebay_ttft_ms{quantile=\"0.5\"} 50.0"),
            "{text}"
        );
        assert!(text.contains("forebay_ttft_ms_count 100\n"), "{text}");
        assert!(text.contains("forebay_ttft_ms_sum 5050.0"), "{text}");
    }

    #[test]
    fn an_absurd_duration_is_counted_as_the_longest() {
        let histogram = Histogram::new();
        histogram.record(Duration::MAX);
        histogram.record(Duration::ZERO);
        assert_eq!(histogram.count(), 2);
        assert!(histogram.quantile(1.0) >= Duration::from_secs(3_590));
    }
}
