//! What a scrape sees of an engine's cache events.

use std::sync::atomic::AtomicU64;

use forebay_admin::prometheus_client::metrics::counter::Counter;
use forebay_admin::prometheus_client::metrics::gauge::Gauge;
use forebay_admin::prometheus_client::registry::Registry;
use forebay_scheduler::residency::Grade;

use crate::core::kv::{Counts, Judged, Seen};

/// Clones share the numbers.
#[derive(Clone, Default)]
pub(super) struct EventMetrics {
    exact: Gauge,
    batches: Gauge,
    gaps: Gauge,
    replays: Gauge,
    losses: Gauge,
    pub(super) unreadable: Counter,
    pub(super) lag: Gauge<f64, AtomicU64>,
    blocks: Gauge,
    unknown: Gauge,
    absent: Gauge,
    prompts: Gauge,
    prompts_lost: Gauge,
    chunks: Gauge,
    chunks_lost: Gauge,
    error_tokens: Gauge,
    settled: JudgedGauges,
    promised: JudgedGauges,
}

#[derive(Clone, Default)]
struct JudgedGauges {
    answers: Gauge,
    over: Gauge,
    predicted: Gauge,
    reported: Gauge,
}

impl EventMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let Self {
            settled, promised, ..
        } = self;
        let gauges = [
            (
                &self.exact,
                "residency_exact",
                "Whether what is told of the engine's cache is what its events say, all of them",
            ),
            (
                &self.batches,
                "kv_batches",
                "Batches of the engine's cache events that were applied",
            ),
            (
                &self.gaps,
                "kv_gaps",
                "Times that such batches were missing",
            ),
            (
                &self.replays,
                "kv_replays",
                "Times that the engine told again what was missing",
            ),
            (
                &self.losses,
                "kv_losses",
                "Times that it could not, so that what was known of its cache was of no use",
            ),
            (
                &self.blocks,
                "kv_blocks",
                "Blocks in the engine's cache by its events, copies counted",
            ),
            (
                &self.unknown,
                "kv_unknown_removals",
                "Blocks that were removed and had not been stored, as far as is known",
            ),
            (
                &self.absent,
                "kv_absent_chunks",
                "Chunks whose blocks are known and not in the cache",
            ),
            (
                &self.prompts,
                "aligned_prompts",
                "Prompts that were found in the engine's tokens",
            ),
            (
                &self.prompts_lost,
                "unaligned_prompts",
                "Prompts that were not: another render profile, perhaps",
            ),
            (
                &self.chunks,
                "aligned_chunks",
                "Chunks that were found in the engine's tokens",
            ),
            (
                &self.chunks_lost,
                "unaligned_chunks",
                "Chunks of prompts that were found, and that were not",
            ),
            (
                &self.error_tokens,
                "alignment_error_tokens",
                "Tokens by which the ends of aligned chunks may be off, at most and in sum",
            ),
            (
                &settled.answers,
                "kv_settled_answers",
                "Answers that told what was cached, where it was predicted by events that were in",
            ),
            (
                &settled.over,
                "kv_settled_over",
                "Those of them that had a block less than was predicted, or less still",
            ),
            (
                &settled.predicted,
                "kv_settled_predicted_tokens",
                "Cached tokens that were predicted of them",
            ),
            (
                &settled.reported,
                "kv_settled_reported_tokens",
                "Cached tokens that they told",
            ),
            (
                &promised.answers,
                "kv_promised_answers",
                "Answers that told what was cached, where prompts on their way were counted, or blocks whose removal was told later",
            ),
            (
                &promised.over,
                "kv_promised_over",
                "Those of them that had a block less than was predicted, or less still",
            ),
            (
                &promised.predicted,
                "kv_promised_predicted_tokens",
                "Cached tokens that were predicted of them",
            ),
            (
                &promised.reported,
                "kv_promised_reported_tokens",
                "Cached tokens that they told",
            ),
        ];
        for (gauge, name, help) in gauges {
            registry.register(format!("forebay_agent_{name}"), help, gauge.clone());
        }
        registry.register(
            "forebay_agent_kv_lag_seconds",
            "From the engine's writing of its newest batch of cache events to the agent's reading of it",
            self.lag.clone(),
        );
        registry.register(
            "forebay_agent_kv_unreadable",
            "Messages on the socket of cache events that were none",
            self.unreadable.clone(),
        );
    }

    pub(super) fn show(&self, grade: Grade, seen: &Seen) {
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.exact.set((grade == Grade::Exact).into());
        let Counts {
            batches,
            gaps,
            replays,
            losses,
        } = seen.stream;
        for (gauge, value) in [
            (&self.batches, batches),
            (&self.gaps, gaps),
            (&self.replays, replays),
            (&self.losses, losses),
            (&self.blocks, seen.blocks),
            (&self.unknown, seen.unknown),
            (&self.absent, seen.absent),
            (&self.prompts, seen.prompts.0),
            (&self.prompts_lost, seen.prompts.1),
            (&self.chunks, seen.chunks.0),
            (&self.chunks_lost, seen.chunks.1),
            (&self.error_tokens, seen.error_tokens),
        ] {
            gauge.set(number(value));
        }
        for (gauges, judged) in [
            (&self.settled, seen.settled),
            (&self.promised, seen.promised),
        ] {
            let Judged {
                answers,
                over,
                predicted,
                reported,
            } = judged;
            gauges.answers.set(number(answers));
            gauges.over.set(number(over));
            gauges.predicted.set(number(predicted));
            gauges.reported.set(number(reported));
        }
    }
}
