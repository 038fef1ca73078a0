//! What a scrape sees. No label comes from a request but for names that the facts have.

use std::collections::HashSet;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use forebay_admin::Histogram;
use forebay_proto::wire::work;
use parking_lot::RwLock;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::shadow;

/// How a request, or one placement of it, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    /// Relayed to its end.
    Complete,
    /// Answered by the table of errors.
    Error(&'static str),
    /// Broke after its first byte.
    Broken,
    /// The client left while it waited for a worker, for the first byte, or for the rest.
    CancelledQueued,
    CancelledPrefill,
    CancelledDecode,
    /// A placement only: the agent did not take it.
    Refused,
    /// A placement only: it failed before the first byte.
    Failed,
    /// The client took no byte for too long.
    Stalled,
    /// It was asked where it would go, and went nowhere.
    WhatIf,
}

impl Outcome {
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Error(code) => code,
            Self::Broken => "broken",
            Self::CancelledQueued => "cancelled_queued",
            Self::CancelledPrefill => "cancelled_prefill",
            Self::CancelledDecode => "cancelled_decode",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Stalled => "stalled",
            Self::WhatIf => "what_if",
        }
    }

    /// Those that a placement can have.
    const OF_PLACEMENTS: [Self; 4] = [Self::Complete, Self::Broken, Self::Refused, Self::Failed];
}

type Labels<const N: usize> = [(&'static str, String); N];
type Number = Gauge<i64, AtomicI64>;

#[derive(Default)]
pub(crate) struct Metrics {
    /// Workers in the facts: nobody else has rows.
    workers: RwLock<HashSet<String>>,
    requests: Family<Labels<1>, Counter>,
    placements: Family<Labels<2>, Counter>,
    shadows: Family<[(&'static str, &'static str); 1], Counter>,
    pub(crate) families: Number,
    pub(crate) copies: Counter,
    pub(crate) retries: Counter,
    prompt_tokens: Counter,
    predicted_tokens: Counter,
    reported_tokens: Counter,
    prompt_tokens_on: Family<Labels<1>, Counter>,
    cached_tokens_on: Family<Labels<1>, Counter>,
    pub(crate) resyncs: Counter,
    pub(crate) deltas: Counter,
    pub(crate) reports: Counter,
    questions: Counter,
    quotes: Counter,
    pub(crate) by_older_key: Counter,
    pub(crate) deaths: Counter,
    pub(crate) quarantined: Counter,
    pub(crate) quarantine_active: Number,
    pub(crate) resident: Number,
    pub(crate) residency_pending: Number,
    pub(crate) residency_blind: Number,
    pub(crate) inflight: Number,
    pub(crate) bookings: Number,
    pub(crate) queued: Number,
    pub(crate) connections: Number,
    pub(crate) links: Number,
    pub(crate) body_bytes: Number,
    pub(crate) facts_revision: Number,
    ttft: Histogram,
    e2e: Histogram,
    placement: Histogram,
}

impl Metrics {
    /// The registry that exports these numbers.
    pub(crate) fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("forebay_balancer");
        registry.register(
            "requests",
            "Requests by how they ended",
            self.requests.clone(),
        );
        registry.register(
            "placements",
            "Placements by worker and how they ended",
            self.placements.clone(),
        );
        // A counter that never counted is zero, not absent.
        for outcome in [
            shadow::COMPLETE,
            shadow::REFUSED,
            shadow::FAILED,
            shadow::CANCELLED,
        ] {
            drop(self.shadows.get_or_create(&[("outcome", outcome)]));
        }
        registry.register(
            "shadows",
            "Copies of live requests that were sent to warm homes which a drain or a rebalance chose, by outcome",
            self.shadows.clone(),
        );
        registry.register(
            "worker_prompt_tokens",
            "Prompt tokens by worker, where the engine told how many were cached",
            self.prompt_tokens_on.clone(),
        );
        registry.register(
            "worker_cached_tokens",
            "Those of them that were in its cache",
            self.cached_tokens_on.clone(),
        );
        registry.register(
            "retries",
            "Placements after the first of a request",
            self.retries.clone(),
        );
        for (name, help, counter) in [
            (
                "prompt_tokens",
                "Prompt tokens, as engines counted them",
                &self.prompt_tokens,
            ),
            (
                "cached_tokens_predicted",
                "Prompt tokens that were expected in caches, where the engine told how many were",
                &self.predicted_tokens,
            ),
            (
                "cached_tokens_reported",
                "Prompt tokens that were in caches, as engines told",
                &self.reported_tokens,
            ),
            (
                "residency_resyncs",
                "Streams of residency that had to begin anew",
                &self.resyncs,
            ),
            (
                "residency_deltas",
                "Changes of what is in workers' caches that were taken over, as they came",
                &self.deltas,
            ),
            (
                "home_copies",
                "Requests that were placed on a home of their family that did not hold it, so that it does",
                &self.copies,
            ),
            (
                "reports",
                "Reports of workers' load that came by themselves, not with an answer",
                &self.reports,
            ),
            (
                "questions",
                "Questions to workers after a placement was refused because the view was too old",
                &self.questions,
            ),
            ("quotes", "Answers to them that came in time", &self.quotes),
            (
                "prompts_by_older_key",
                "Requests that stayed with the fingerprint key before the newest, for what is cached under it",
                &self.by_older_key,
            ),
            (
                "engine_deaths",
                "Requests under which an engine died unexplained, by the word of its agent",
                &self.deaths,
            ),
            (
                "quarantine_refusals",
                "Requests that were refused because engines died of them",
                &self.quarantined,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        for (name, help, gauge) in [
            (
                "residency_chunks",
                "Chunks that workers are known to hold",
                &self.resident,
            ),
            (
                "residency_pending",
                "Connected workers whose cache is not known: no snapshot of it is in",
                &self.residency_pending,
            ),
            (
                "residency_blind",
                "Connected workers whose agent does not trust what it tells of their cache",
                &self.residency_blind,
            ),
            ("inflight", "Requests being served", &self.inflight),
            ("bookings", "Bookings held on workers", &self.bookings),
            ("queued", "Requests that wait for a worker", &self.queued),
            ("connections", "Client connections", &self.connections),
            ("links", "Workers that are connected", &self.links),
            ("body_bytes", "Bytes of bodies held", &self.body_bytes),
            (
                "families",
                "Families of prompts that have homes, in the facts in use",
                &self.families,
            ),
            (
                "quarantine_active",
                "Requests that are refused because engines died of them, in the facts in use",
                &self.quarantine_active,
            ),
            (
                "facts_revision",
                "Revision of the facts in use",
                &self.facts_revision,
            ),
        ] {
            registry.register(name, help, gauge.clone());
        }
        for (name, help, histogram) in [
            ("ttft", "From the request to the first byte", &self.ttft),
            ("e2e", "From the request to its end", &self.e2e),
            (
                "placement",
                "Deciding and booking, without waiting",
                &self.placement,
            ),
        ] {
            histogram.register(&mut registry, name, help);
        }
        registry
    }

    pub(crate) fn request(&self, outcome: Outcome, took: Duration) {
        let labels = [("outcome", outcome.label().to_owned())];
        self.requests.get_or_create(&labels).inc();
        self.e2e.record(took);
    }

    pub(crate) fn placed(&self, worker: &str, outcome: Outcome) {
        // Held meanwhile, so that what ends after its worker was removed makes no row again.
        let workers = self.workers.read();
        if workers.contains(worker) {
            self.placements.get_or_create(&of(worker, outcome)).inc();
        }
    }

    /// What an engine counted, and what was predicted. A count that is absent is not zero.
    pub(crate) fn counted(&self, worker: &str, trailer: &work::Trailer, predicted: u32) {
        let workers = self.workers.read();
        if let (Some(prompt), Some(cached)) = (trailer.prompt_tokens, trailer.cached_tokens)
            && workers.contains(worker)
        {
            let on = [("worker", worker.to_owned())];
            self.prompt_tokens_on
                .get_or_create(&on)
                .inc_by(prompt.into());
            self.cached_tokens_on
                .get_or_create(&on)
                .inc_by(cached.into());
        }
        drop(workers);
        if let Some(tokens) = trailer.prompt_tokens {
            self.prompt_tokens.inc_by(tokens.into());
        }
        if let Some(cached) = trailer.cached_tokens {
            self.predicted_tokens.inc_by(predicted.into());
            self.reported_tokens.inc_by(cached.into());
        }
    }

    /// A copy for a home is over.
    pub(crate) fn shadow(&self, outcome: &'static str) {
        self.shadows.get_or_create(&[("outcome", outcome)]).inc();
    }

    pub(crate) fn asked(&self, questions: usize, quotes: usize) {
        self.questions.inc_by(questions as u64);
        self.quotes.inc_by(quotes as u64);
    }

    pub(crate) fn first_byte(&self, after: Duration) {
        self.ttft.record(after);
    }

    pub(crate) fn decided(&self, took: Duration) {
        self.placement.record(took);
    }

    /// These are the workers in the facts; the rows of those that are gone go, too.
    pub(crate) fn follow<'a>(&self, named: impl IntoIterator<Item = &'a str>) {
        let named: HashSet<String> = named.into_iter().map(str::to_owned).collect();
        let mut workers = self.workers.write();
        for worker in workers.difference(&named) {
            let on = [("worker", worker.clone())];
            self.prompt_tokens_on.remove(&on);
            self.cached_tokens_on.remove(&on);
            for outcome in Outcome::OF_PLACEMENTS {
                self.placements.remove(&of(worker, outcome));
            }
        }
        *workers = named;
    }
}

fn of(worker: &str, outcome: Outcome) -> Labels<2> {
    [
        ("worker", worker.to_owned()),
        ("outcome", outcome.label().to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scraped(metrics: &Metrics) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &metrics.registry()).unwrap();
        text
    }

    #[test]
    fn a_worker_that_was_removed_has_no_rows_also_when_its_last_requests_end_later() {
        let metrics = Metrics::default();
        let counted = work::Trailer {
            prompt_tokens: Some(10),
            cached_tokens: Some(5),
            ..work::Trailer::default()
        };
        metrics.follow(["w1", "w2"]);
        for worker in ["w1", "w2", "nobody"] {
            metrics.placed(worker, Outcome::Complete);
            metrics.counted(worker, &counted, 5);
        }
        let text = scraped(&metrics);
        assert!(text.contains(r#"placements_total{worker="w1",outcome="complete"} 1"#));
        assert!(text.contains(r#"worker_cached_tokens_total{worker="w2"} 5"#));
        assert!(!text.contains("nobody"), "{text}");

        metrics.follow(["w2"]);
        metrics.placed("w1", Outcome::Failed);
        metrics.counted("w1", &counted, 5);
        let text = scraped(&metrics);
        assert!(!text.contains("w1"), "{text}");
        assert!(text.contains(r#"placements_total{worker="w2",outcome="complete"} 1"#));
        // What is not by worker counts all of them.
        assert!(
            text.contains("forebay_balancer_prompt_tokens_total 40"),
            "{text}"
        );
    }
}
