//! What a page of OpenMetrics says, as far as verbs ask.

use std::collections::BTreeMap;

/// The samples of a page, by name; each with its labels as they are written.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Metrics(BTreeMap<String, Vec<(String, f64)>>);

impl Metrics {
    /// Reads a page; a line that is no sample is passed over.
    pub(crate) fn parse(page: &str) -> Self {
        let mut samples = BTreeMap::<String, Vec<(String, f64)>>::new();
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else {
                continue;
            };
            let Ok(value) = value.parse::<f64>() else {
                continue;
            };
            let (name, labels) = match series.split_once('{') {
                Some((name, labels)) => (name, labels.trim_end_matches('}')),
                None => (series, ""),
            };
            let of_name = samples.entry(name.to_owned()).or_default();
            of_name.push((labels.to_owned(), value));
        }
        Self(samples)
    }

    /// The sum over all labels; `None`: there is no such metric.
    pub(crate) fn sum(&self, name: &str) -> Option<f64> {
        let samples = self.0.get(name)?;
        Some(samples.iter().map(|(_, value)| value).sum())
    }

    /// The sum of what has this label.
    pub(crate) fn of(&self, name: &str, label: &str, value: &str) -> Option<f64> {
        let wanted = format!("{label}=\"{value}\"");
        let samples = self.0.get(name)?.iter();
        let samples = samples.filter(|(labels, _)| labels.split(',').any(|one| one == wanted));
        samples
            .map(|(_, value)| *value)
            .reduce(|sum, one| sum + one)
    }

    /// A quantile of a latency in milliseconds, if anything was counted.
    pub(crate) fn quantile(&self, name: &str, quantile: &str) -> Option<f64> {
        let counted = self.sum(&format!("{name}_count"))?;
        self.of(name, "quantile", quantile)
            .filter(|_| counted > 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_name_and_label() {
        let page = "# HELP a x\n# TYPE a counter\na_total{worker=\"w1\",outcome=\"ok\"} 3\na_total{worker=\"w2\",outcome=\"ok\"} 4\nb 1.5\nms{quantile=\"0.5\"} 7\nms_count 2\nidle{quantile=\"0.5\"} 0\nidle_count 0\nnonsense\n# EOF\n";
        let metrics = Metrics::parse(page);
        assert_eq!(metrics.sum("a_total"), Some(7.0));
        assert_eq!(metrics.of("a_total", "worker", "w2"), Some(4.0));
        assert_eq!(metrics.of("a_total", "worker", "w3"), None);
        assert_eq!(metrics.sum("b"), Some(1.5));
        assert_eq!(metrics.sum("c"), None);
        assert_eq!(metrics.quantile("ms", "0.5"), Some(7.0));
        assert_eq!(metrics.quantile("idle", "0.5"), None, "nothing was counted");
    }
}
