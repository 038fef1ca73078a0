//! The metrics page, in Prometheus text and by vLLM's names.

use serde_json::json;
use std::fmt::Write;

/// A reading of everything that is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Reading {
    pub(super) running: usize,
    pub(super) waiting: usize,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) preemptions: u64,
    pub(super) kv_usage: f64,
    pub(super) generation_tokens: u64,
    pub(super) finished: u64,
    pub(super) aborted: u64,
    pub(super) refused: u64,
}

impl Reading {
    /// The page of a process that runs since this many milliseconds of Unix time.
    pub(super) fn page(&self, model: &str, since_ms: u64) -> String {
        // JSON escapes quotes and backslashes as the text format wants it.
        let model = json!(model);
        let labels = format!("engine=\"0\",model_name={model}");
        let mut page = String::new();
        let mut family = |name: &str, kind: &str, help: &str, series: &[(&str, u64)]| {
            let _ = writeln!(page, "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}");
            let suffix = if kind == "counter" { "_total" } else { "" };
            for (label, value) in series {
                let _ = writeln!(page, "vllm:{name}{suffix}{{{labels}{label}}} {value}.0");
            }
        };
        let Reading {
            running, waiting, ..
        } = *self;
        family(
            "num_requests_running",
            "gauge",
            "Requests that run.",
            &[("", running as u64)],
        );
        family(
            "num_requests_waiting",
            "gauge",
            "Requests that wait.",
            &[("", waiting as u64)],
        );
        family(
            "prompt_tokens",
            "counter",
            "Prompt tokens of started requests.",
            &[("", self.prompt_tokens)],
        );
        for (name, help, value) in [
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the cache.",
                self.prompt_tokens,
            ),
            (
                "prefix_cache_hits",
                "Prompt tokens found there.",
                self.cached_tokens,
            ),
            (
                "num_preemptions",
                "Requests that gave their blocks back.",
                self.preemptions,
            ),
        ] {
            family(name, "counter", help, &[("", value)]);
        }
        family(
            "generation_tokens",
            "counter",
            "Tokens said.",
            &[("", self.generation_tokens)],
        );
        family(
            "request_success",
            "counter",
            "Requests by how they ended.",
            &[
                (",finished_reason=\"length\"", self.finished),
                (",finished_reason=\"abort\"", self.aborted),
            ],
        );
        family(
            "admission_rejections",
            "counter",
            "Requests refused with 503.",
            &[(",reason=\"max_num_queued_reqs\"", self.refused)],
        );
        let _ = writeln!(
            page,
            "# HELP vllm:kv_cache_usage_perc Share of the cache that live requests hold.\n\
             # TYPE vllm:kv_cache_usage_perc gauge\n\
             vllm:kv_cache_usage_perc{{{labels}}} {:.4}",
            self.kv_usage
        );
        let _ = writeln!(
            page,
            "# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.\n\
             # TYPE process_start_time_seconds gauge\n\
             process_start_time_seconds {}.{:03}",
            since_ms / 1000,
            since_ms % 1000
        );
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_vllms() {
        let page = Reading {
            running: 2,
            waiting: 1,
            finished: 7,
            prompt_tokens: 100,
            cached_tokens: 64,
            preemptions: 3,
            kv_usage: 0.25,
            ..Reading::default()
        }
        .page("m\"x", 1_795_377_126_049);
        for line in [
            "# TYPE vllm:num_requests_running gauge",
            "process_start_time_seconds 1795377126.049",
            "vllm:num_requests_running{engine=\"0\",model_name=\"m\\\"x\"} 2.0",
            "vllm:num_requests_waiting{engine=\"0\",model_name=\"m\\\"x\"} 1.0",
            "vllm:request_success_total{engine=\"0\",model_name=\"m\\\"x\",finished_reason=\"length\"} 7.0",
            "vllm:prefix_cache_queries_total{engine=\"0\",model_name=\"m\\\"x\"} 100.0",
            "vllm:prefix_cache_hits_total{engine=\"0\",model_name=\"m\\\"x\"} 64.0",
            "vllm:num_preemptions_total{engine=\"0\",model_name=\"m\\\"x\"} 3.0",
            "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\\\"x\"} 0.2500",
        ] {
            assert!(
                page.lines().any(|got| got == line),
                "no {line:?} in\n{page}"
            );
        }
    }
}
