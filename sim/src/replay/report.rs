//! What a replay found: counts, percentiles and who served.

use super::reply::{Fault, Served};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

/// The result of a replay. Latencies are those of good answers, from the intended start of each.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Of this shape; it changes when a field changes its meaning or goes away.
    pub schema_version: u32,
    /// Requests that were due, errors included.
    pub requests: u64,
    /// Requests without a good answer.
    pub errors: u64,
    /// The errors, most frequent first.
    pub errors_by: Vec<ErrorCount>,
    /// How late requests were sent: the generator's own fault, in no case the fleet's.
    pub send_lag_ms: Lag,
    /// To the first token.
    pub ttft_ms: Percentiles,
    /// From token to token after the first, a mean for each request.
    pub tpot_ms: Percentiles,
    /// To the end of the answer.
    pub e2e_ms: Percentiles,
    /// Cached prompt tokens over all prompt tokens of the answers that told both.
    pub cached_token_ratio: Option<f64>,
    /// Prompt tokens of good answers.
    pub input_tokens: u64,
    /// Tokens of good answers.
    pub output_tokens: u64,
    /// Requests by the worker that the answer named.
    pub workers: BTreeMap<String, u64>,
    /// From the first intended start to the last answer.
    pub duration_s: f64,
}

/// How often an error came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ErrorCount {
    /// The HTTP status, if there was one.
    pub status: Option<u16>,
    /// The error's code as the server gave it, or one of the replay's own: `connect`, `transport`,
    /// `timeout`, `in_flight_limit`, `no_error_object`, `unnamed_error`, `bad_stream`, `bad_event`,
    /// `event_after_done`, `no_finish_reason`, `bad_finish_reason`, `no_done`, `no_usage`,
    /// `wrong_token_count`, `text_mismatch`, `other`.
    pub code: String,
    /// How many requests.
    pub count: u64,
}

/// The lag in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Lag {
    /// Half were sent within; absent if none was.
    pub p50: Option<f64>,
    /// 99 of 100 were sent within; absent if none was.
    pub p99: Option<f64>,
}

/// Percentiles in milliseconds; absent if nothing was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    /// The mean.
    pub mean: Option<f64>,
    /// The median.
    pub p50: Option<f64>,
    /// 90 of 100 are within.
    pub p90: Option<f64>,
    /// 99 of 100 are within.
    pub p99: Option<f64>,
}

/// One request, as a line of a file. Times are in milliseconds from the first intended start.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OneRequest {
    /// Its place in the trace, from 0.
    pub index: u64,
    /// When it was to be sent.
    pub intended_ms: f64,
    /// When it was sent; absent: it was not.
    pub start_ms: Option<f64>,
    /// Who served it, where the answer says so.
    pub worker: Option<String>,
    /// Placements before that worker's, where the answer says so.
    pub attempts: Option<u32>,
    /// The HTTP status, if one came.
    pub status: Option<u16>,
    /// `ok`, or the error's code.
    pub outcome: String,
    /// When the first token came.
    pub first_byte_ms: Option<f64>,
    /// When the answer's end came.
    pub end_ms: Option<f64>,
    /// As the engine counted.
    pub prompt_tokens: Option<u64>,
    /// As the engine counted.
    pub output_tokens: Option<u64>,
    /// As the engine counted; absent is not zero.
    pub cached_tokens: Option<u64>,
}

/// What became of one request.
pub(super) struct Outcome {
    /// Its place in the trace.
    pub(super) index: u64,
    /// From the first intended start to its own.
    pub(super) intended: Duration,
    /// From the intended start to the sending; `None` if it was not sent.
    pub(super) lag: Option<Duration>,
    pub(super) worker: Option<String>,
    pub(super) attempts: Option<u32>,
    pub(super) result: Result<Served, Fault>,
}

impl Outcome {
    pub(super) fn line(&self) -> OneRequest {
        let ms = |after: Duration| (self.intended + after).as_secs_f64() * 1e3;
        let served = self.result.as_ref().ok();
        OneRequest {
            index: self.index,
            intended_ms: ms(Duration::ZERO),
            start_ms: self.lag.map(ms),
            worker: self.worker.clone(),
            attempts: self.attempts,
            status: match &self.result {
                Ok(_) => Some(200),
                Err(fault) => fault.status,
            },
            outcome: match &self.result {
                Ok(_) => "ok".to_owned(),
                Err(fault) => fault.code.to_string(),
            },
            first_byte_ms: served.map(|served| ms(served.first_token)),
            end_ms: served.map(|served| ms(served.end)),
            prompt_tokens: served.map(|served| served.prompt_tokens),
            output_tokens: served.map(|served| served.output_tokens),
            cached_tokens: served.and_then(|served| served.cached_tokens),
        }
    }
}

/// Adds outcomes up.
pub(super) struct Tally {
    requests: u64,
    errors: u64,
    errors_by: BTreeMap<Fault, u64>,
    workers: BTreeMap<String, u64>,
    lag: Histogram<u64>,
    ttft: Histogram<u64>,
    tpot: Histogram<u64>,
    e2e: Histogram<u64>,
    input_tokens: u64,
    output_tokens: u64,
    cached_tokens: u64,
    /// Prompt tokens of the answers that told their cached tokens.
    cached_of: u64,
}

impl Tally {
    pub(super) fn new() -> Tally {
        let histogram =
            || Histogram::new_with_bounds(1, MAX_US, 3).expect("the bounds are constants");
        Tally {
            requests: 0,
            errors: 0,
            errors_by: BTreeMap::new(),
            workers: BTreeMap::new(),
            lag: histogram(),
            ttft: histogram(),
            tpot: histogram(),
            e2e: histogram(),
            input_tokens: 0,
            output_tokens: 0,
            cached_tokens: 0,
            cached_of: 0,
        }
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests
    }

    pub(super) fn errors(&self) -> u64 {
        self.errors
    }

    pub(super) fn record(&mut self, outcome: Outcome) {
        self.requests += 1;
        if let Some(lag) = outcome.lag {
            self.lag.saturating_record(micros(lag));
        }
        if let Some(worker) = outcome.worker {
            count(&mut self.workers, worker, || OTHER.to_owned());
        }
        match outcome.result {
            Ok(served) => self.served(&served),
            Err(fault) => {
                self.errors += 1;
                count(&mut self.errors_by, fault, || Fault {
                    status: None,
                    code: Cow::Borrowed(OTHER),
                });
            }
        }
    }

    fn served(&mut self, served: &Served) {
        self.ttft.saturating_record(micros(served.first_token));
        self.e2e.saturating_record(micros(served.end));
        if served.output_tokens > 1 {
            let decode = micros(served.last_token.saturating_sub(served.first_token));
            self.tpot
                .saturating_record(decode / (served.output_tokens - 1));
        }
        self.input_tokens += served.prompt_tokens;
        self.output_tokens += served.output_tokens;
        if let Some(cached) = served.cached_tokens {
            self.cached_tokens += cached;
            self.cached_of += served.prompt_tokens;
        }
    }

    pub(super) fn report(self, duration: Duration) -> Report {
        let mut errors_by: Vec<ErrorCount> = self
            .errors_by
            .into_iter()
            .map(|(Fault { status, code }, count)| ErrorCount {
                status,
                code: code.into_owned(),
                count,
            })
            .collect();
        errors_by.sort_by_key(|error| std::cmp::Reverse(error.count));
        let ratio = self.cached_tokens as f64 / self.cached_of as f64;
        Report {
            schema_version: 1,
            requests: self.requests,
            errors: self.errors,
            errors_by,
            send_lag_ms: Lag {
                p50: percentile(&self.lag, 0.5),
                p99: percentile(&self.lag, 0.99),
            },
            ttft_ms: percentiles(&self.ttft),
            tpot_ms: percentiles(&self.tpot),
            e2e_ms: percentiles(&self.e2e),
            cached_token_ratio: (self.cached_of > 0).then_some(ratio),
            input_tokens: self.input_tokens,
            output_tokens: self.output_tokens,
            workers: self.workers,
            duration_s: duration.as_secs_f64(),
        }
    }
}

/// Counts by key, and what comes when there are too many keys under `other`.
fn count<K: Ord>(counts: &mut BTreeMap<K, u64>, key: K, other: impl FnOnce() -> K) {
    let full = counts.len() >= MAX_KEYS && !counts.contains_key(&key);
    *counts.entry(if full { other() } else { key }).or_default() += 1;
}

fn percentiles(histogram: &Histogram<u64>) -> Percentiles {
    let mean = histogram.mean() / 1_000.0;
    Percentiles {
        mean: (!histogram.is_empty()).then_some(mean),
        p50: percentile(histogram, 0.5),
        p90: percentile(histogram, 0.9),
        p99: percentile(histogram, 0.99),
    }
}

fn percentile(histogram: &Histogram<u64>, quantile: f64) -> Option<f64> {
    let us = histogram.value_at_quantile(quantile) as f64;
    (!histogram.is_empty()).then_some(us / 1000.0)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A day: what takes longer counts as that.
const MAX_US: u64 = 24 * 3600 * 1_000_000;
const MAX_KEYS: usize = 4096;
const OTHER: &str = "other";

#[cfg(test)]
mod tests {
    use super::*;

    fn served(first_ms: u64, cached_tokens: Option<u64>) -> Outcome {
        let ms = Duration::from_millis;
        let served = Served {
            first_token: ms(first_ms),
            last_token: ms(first_ms + 40),
            end: ms(first_ms + 50),
            prompt_tokens: 100,
            output_tokens: 5,
            cached_tokens,
        };
        Outcome {
            index: 0,
            intended: ms(7),
            lag: Some(ms(1)),
            worker: Some("w1".to_owned()),
            attempts: Some(1),
            result: Ok(served),
        }
    }

    fn failed(status: Option<u16>, code: &'static str) -> Outcome {
        Outcome {
            index: 0,
            intended: Duration::ZERO,
            lag: None,
            worker: None,
            attempts: None,
            result: Err(Fault::ours(status, code)),
        }
    }

    #[test]
    fn outcomes_add_up() {
        let mut tally = Tally::new();
        (1..=100).for_each(|ms| tally.record(served(ms, Some(25))));
        tally.record(served(1, None));
        tally.record(failed(None, "connect"));
        tally.record(failed(Some(503), "no_capacity"));
        tally.record(failed(Some(503), "no_capacity"));
        let report = tally.report(Duration::from_secs(3));
        assert_eq!((report.requests, report.errors), (104, 3));
        let errors: Vec<_> = report
            .errors_by
            .iter()
            .map(|e| (e.status, &*e.code, e.count))
            .collect();
        assert_eq!(
            errors,
            [(Some(503), "no_capacity", 2), (None, "connect", 1)]
        );
        assert_eq!(report.workers, BTreeMap::from([("w1".to_owned(), 101)]));
        assert_eq!(report.cached_token_ratio, Some(0.25));
        let near = |got: Option<f64>, expected: f64| {
            assert!(
                (got.unwrap() / expected - 1.0).abs() < 0.02,
                "{got:?} is not {expected}"
            );
        };
        near(report.ttft_ms.p50, 50.0);
        near(report.ttft_ms.p99, 99.0);
        near(report.tpot_ms.p90, 10.0);
        near(report.e2e_ms.p50, 100.0);
        near(report.send_lag_ms.p99, 1.0);
    }

    #[test]
    fn a_line_counts_from_the_first_intended_start() {
        let line = served(30, Some(25)).line();
        assert_eq!((line.intended_ms, line.start_ms), (7.0, Some(8.0)));
        assert_eq!((line.first_byte_ms, line.end_ms), (Some(37.0), Some(87.0)));
        assert_eq!(
            (line.outcome.as_str(), line.cached_tokens),
            ("ok", Some(25))
        );
        assert_eq!((line.status, line.attempts), (Some(200), Some(1)));
        let line = failed(Some(503), "no_capacity").line();
        assert_eq!((line.status, line.attempts), (Some(503), None));
        assert_eq!((line.outcome.as_str(), line.end_ms), ("no_capacity", None));
    }

    #[test]
    fn nothing_measured_is_null_and_not_zero() {
        let json = serde_json::to_value(Tally::new().report(Duration::ZERO)).unwrap();
        assert_eq!(json["schema_version"], 1);
        assert!(json["ttft_ms"]["p50"].is_null());
        assert!(json["send_lag_ms"]["p99"].is_null());
        assert!(json["cached_token_ratio"].is_null());
    }

    #[test]
    fn names_beyond_the_bound_are_counted_together() {
        let mut tally = Tally::new();
        for number in 0..MAX_KEYS + 9 {
            let worker = Some(format!("w{number}"));
            tally.record(Outcome {
                worker,
                ..failed(None, "connect")
            });
        }
        let report = tally.report(Duration::ZERO);
        assert_eq!(report.workers.len(), MAX_KEYS + 1);
        assert_eq!(report.workers["other"], 9);
    }
}
