//! What a scrape sees.

use std::sync::atomic::{AtomicU64, Ordering};

use forebay_admin::Histogram;
use forebay_admin::prometheus_client::metrics::counter::Counter;
use forebay_admin::prometheus_client::metrics::family::Family;
use forebay_admin::prometheus_client::metrics::gauge::Gauge;
use forebay_admin::prometheus_client::registry::Registry;

use forebay_scheduler::learn::Calibration;
use forebay_scheduler::model::Residuals;
use forebay_scheduler::residency::Grade;

use super::event_metrics::EventMetrics;
use crate::adapter::{Gauges, NotStarted};
use crate::core::{Core, End, Ending, EngineState, GradeChange, RefusalReason};

type Labels = [(&'static str, &'static str); 1];

const TAKEN: &str = "taken";
const REFUSED: &str = "refused";

/// Counters and gauges; clones share the numbers.
#[derive(Clone, Default)]
pub(super) struct Metrics {
    running: Gauge,
    queued: Gauge,
    slots: Gauge,
    body_bytes: Gauge,
    engine_up: Gauge,
    engine_running: Gauge,
    engine_waiting: Gauge,
    engine_kv_usage: Gauge<f64, AtomicU64>,
    engine_refused: Family<Labels, Counter>,
    resident: Gauge,
    trusted: Gauge,
    downgrades: Family<Labels, Counter>,
    predicted: Gauge,
    reported: Gauge,
    late: Gauge,
    engine_deaths: Gauge,
    judged: Gauge,
    within: Gauge,
    late_p50: Gauge<f64, AtomicU64>,
    late_p95: Gauge<f64, AtomicU64>,
    accepted: Counter,
    unseen: Counter,
    families: Gauge,
    recorded: Gauge,
    work: Counter<f64, AtomicU64>,
    shadows: Family<Labels, Counter>,
    refused: Family<Labels, Counter>,
    ended: Family<Labels, Counter>,
    queue: Histogram,
    first_byte: Histogram,
    service: Histogram,
    events: EventMetrics,
}

impl Metrics {
    pub(super) fn new(slots: u32) -> Self {
        let metrics = Self::default();
        metrics.slots.set(slots.into());
        // A counter that never counted is zero, not absent.
        for reason in RefusalReason::ALL {
            drop(metrics.refused.get_or_create(&[("reason", reason.name())]));
        }
        for change in DOWNGRADES {
            drop(metrics.downgrades.get_or_create(&reason(change)));
        }
        for word in [TAKEN, REFUSED] {
            drop(metrics.shadows.get_or_create(&[("outcome", word)]));
        }
        for why in NotStarted::ALL {
            drop(
                metrics
                    .engine_refused
                    .get_or_create(&[("reason", why.name())]),
            );
        }
        for end in End::ALL {
            drop(metrics.ended.get_or_create(&[("end", end.name())]));
        }
        metrics
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let mut gauge = |name, help, gauge: &Gauge| registry.register(name, help, gauge.clone());
        gauge(
            "forebay_agent_running",
            "Requests on the engine",
            &self.running,
        );
        gauge(
            "forebay_agent_queued",
            "Requests in the agent's queue",
            &self.queued,
        );
        gauge(
            "forebay_agent_slots",
            "Requests that run at once",
            &self.slots,
        );
        gauge(
            "forebay_agent_body_bytes",
            "Bytes of request bodies held or announced",
            &self.body_bytes,
        );
        gauge(
            "forebay_agent_engine_up",
            "Whether the engine answers",
            &self.engine_up,
        );
        gauge(
            "forebay_agent_engine_running",
            "Requests that the engine says it runs, whoever asked",
            &self.engine_running,
        );
        gauge(
            "forebay_agent_engine_waiting",
            "Requests that the engine says wait in it; more than a few for long: --slots is too high",
            &self.engine_waiting,
        );
        gauge(
            "forebay_agent_resident_chunks",
            "Chunks of prompts that are believed to be in the engine's cache",
            &self.resident,
        );
        gauge(
            "forebay_agent_residency_trusted",
            "Whether predictions of the engine's cache hold; 0: the grade is blind",
            &self.trusted,
        );
        gauge(
            "forebay_agent_cached_tokens_predicted",
            "Prompt tokens that were predicted to be cached, where the engine told how many were",
            &self.predicted,
        );
        gauge(
            "forebay_agent_cached_tokens_reported",
            "Prompt tokens that were cached, as the engine told",
            &self.reported,
        );
        gauge(
            "forebay_agent_late",
            "Requests that could not start in time for their first-token target, and let others pass",
            &self.late,
        );
        gauge(
            "forebay_agent_engine_deaths",
            "Times that the engine died with requests on it and nobody knows why",
            &self.engine_deaths,
        );
        gauge(
            "forebay_agent_ttft_predicted",
            "First tokens whose time had been predicted",
            &self.judged,
        );
        gauge(
            "forebay_agent_ttft_within_p95",
            "Those of them that came within what was promised of it; to be 95 of 100",
            &self.within,
        );
        gauge(
            "forebay_agent_families",
            "Beginnings of prompts that several conversations were seen to share",
            &self.families,
        );
        gauge(
            "forebay_agent_recorded",
            "Requests whose fingerprints and lengths were recorded for plans, since the start; the last ten minutes' are kept",
            &self.recorded,
        );
        for (gauge, name, help) in [
            (
                &self.engine_kv_usage,
                "forebay_agent_engine_kv_usage",
                "Share of the engine's cache that running requests hold, as it says",
            ),
            (
                &self.late_p50,
                "forebay_agent_ttft_ratio_p50",
                "Median of actual / predicted time to first token",
            ),
            (
                &self.late_p95,
                "forebay_agent_ttft_ratio_p95",
                "0.95 quantile of actual / predicted time to first token: what is promised",
            ),
        ] {
            registry.register(name, help, gauge.clone());
        }
        registry.register(
            "forebay_agent_accepted",
            "Placements taken",
            self.accepted.clone(),
        );
        registry.register(
            "forebay_agent_unseen_arrivals",
            "Placements of others that a balancer had not heard of when one of its own was taken; over the placements taken it is to stay below 0.3",
            self.unseen.clone(),
        );
        registry.register(
            "forebay_agent_refused",
            "Placements not taken, by reason",
            self.refused.clone(),
        );
        registry.register(
            "forebay_agent_work_seconds",
            "Time of the worker that requests took, by the latency model: their prefill, and what their answers add to its iterations",
            self.work.clone(),
        );
        registry.register(
            "forebay_agent_shadows",
            "Copies of requests that run elsewhere, sent to warm the cache, by outcome; none of them is among the requests",
            self.shadows.clone(),
        );
        registry.register(
            "forebay_agent_engine_refused",
            "Requests that the engine did not begin, by reason: they went elsewhere",
            self.engine_refused.clone(),
        );
        registry.register(
            "forebay_agent_residency_downgrades",
            "How often the grade was lowered: the engine had less than was predicted, or does not say what it had; or its events were lost, or did not hold",
            self.downgrades.clone(),
        );
        registry.register(
            "forebay_agent_ended",
            "Placements taken that are over, by end",
            self.ended.clone(),
        );
        for (histogram, name, help) in [
            (&self.queue, "queue", "Time in the agent's queue"),
            (
                &self.first_byte,
                "first_byte",
                "From the slot to the engine's first byte",
            ),
            (&self.service, "service", "Time a slot was held"),
        ] {
            histogram.register(registry, &format!("forebay_agent_{name}"), help);
        }
        self.events.register(registry);
    }

    pub(super) fn show(&self, core: &Core) {
        self.running.set(core.running().into());
        self.queued.set(core.queued().into());
        self.slots.set(core.slots().into());
        let body_bytes = i64::try_from(core.body_bytes()).unwrap_or(i64::MAX);
        self.body_bytes.set(body_bytes);
        self.engine_up
            .set((core.engine() == EngineState::Up).into());
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.resident.set(number(core.resident_chunks() as u64));
        self.trusted.set((core.grade() != Grade::Blind).into());
        let (predicted, reported) = core.cached_tokens();
        self.predicted.set(number(predicted));
        self.reported.set(number(reported));
        self.late.set(number(core.late()));
        self.engine_deaths.set(number(core.engine_deaths()));
        self.families.set(number(core.families() as u64));
        self.recorded.set(number(core.recordings()));
        let work_secs = core.took_ms() / 1e3;
        self.work
            .inner()
            .store(work_secs.to_bits(), Ordering::Relaxed);
        let Calibration { judged, within } = core.calibration();
        self.judged.set(number(judged));
        self.within.set(number(within));
        let Residuals { ttft_p50, ttft_p95 } = core.residuals();
        self.late_p50.set(ttft_p50);
        self.late_p95.set(ttft_p95);
        if let Some(exact) = core.exact() {
            self.events.show(core.grade(), &exact.seen());
        }
    }

    /// A batch of cache events came, so many seconds after it was written.
    pub(super) fn lag(&self, seconds: f64) {
        self.events.lag.set(seconds);
    }

    /// A message on the socket of cache events was none.
    pub(super) fn unreadable(&self) {
        self.events.unreadable.inc();
    }

    /// What the engine's own page says.
    pub(super) fn engine(&self, gauges: &Gauges) {
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        if let Some(running) = gauges.running {
            self.engine_running.set(number(running));
        }
        if let Some(waiting) = gauges.waiting {
            self.engine_waiting.set(number(waiting));
        }
        if let Some(usage) = gauges.kv_usage {
            self.engine_kv_usage.set(usage);
        }
    }

    /// The engine answered that it did not begin.
    pub(super) fn engine_refused(&self, why: NotStarted) {
        self.engine_refused
            .get_or_create(&[("reason", why.name())])
            .inc();
    }

    pub(super) fn unseen(&self, arrivals: u64) {
        self.unseen.inc_by(arrivals);
    }

    /// A copy came that is nobody's request.
    pub(super) fn shadow(&self, taken: bool) {
        let word = if taken { TAKEN } else { REFUSED };
        self.shadows.get_or_create(&[("outcome", word)]).inc();
    }

    pub(super) fn accepted(&self) {
        self.accepted.inc();
    }

    pub(super) fn refused(&self, reason: RefusalReason) {
        self.refused
            .get_or_create(&[("reason", reason.name())])
            .inc();
    }

    /// The grade of what is told of the cache changed.
    pub(super) fn grade_changed(&self, change: GradeChange) {
        if DOWNGRADES.contains(&change) {
            self.downgrades.get_or_create(&reason(change)).inc();
        }
    }

    pub(super) fn ended(&self, end: End, ending: &Ending) {
        if ending.shadow {
            return;
        }
        self.ended.get_or_create(&[("end", end.name())]).inc();
        self.queue.record(ending.queue);
        if !ending.first_byte.is_zero() {
            self.first_byte.record(ending.first_byte);
        }
        if !ending.service.is_zero() {
            self.service.record(ending.service);
        }
    }
}

const DOWNGRADES: [GradeChange; 4] = [
    GradeChange::Overpredicted,
    GradeChange::Silent,
    GradeChange::EventsLost,
    GradeChange::EventsWrong,
];

const fn reason(change: GradeChange) -> Labels {
    let reason = match change {
        GradeChange::Restored => "restored",
        GradeChange::Overpredicted => "overpredicted",
        GradeChange::Silent => "silent",
        GradeChange::Events => "events",
        GradeChange::EventsLost => "events_lost",
        GradeChange::EventsWrong => "events_overpredicted",
    };
    [("reason", reason)]
}
