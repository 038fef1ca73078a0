//! What clients of a fleet met with, measured and simulated alike.

use forebay_sim::fleet::{Outcome, quantile};
use forebay_sim::replay::OneRequest;
use forebay_sim::trace::{BlockRun, Trace};

/// Of the emulated engine's cache.
const ENGINE_BLOCK: u32 = 16;

/// What clients met with.
#[derive(Debug, Default)]
pub struct Figures {
    pub ttft_p10: f64,
    pub ttft_p50: f64,
    pub ttft_p90: f64,
    pub ttft_p99: f64,
    pub tpot_p50: f64,
    pub tpot_p99: f64,
    pub cached: f64,
}

impl Figures {
    pub fn print(&self, who: &str) {
        eprintln!(
            "{who:>10}: ttft p10 {:4.0} ms, p50 {:6.0}, p90 {:6.0}, p99 {:6.0}; tpot p50 {:5.1} ms, p99 {:5.1}; \
             cached {:4.1} %",
            self.ttft_p10,
            self.ttft_p50,
            self.ttft_p90,
            self.ttft_p99,
            self.tpot_p50,
            self.tpot_p99,
            self.cached * 100.0
        );
    }

    fn of(ttft: &[f32], tpot: &[f32], cached: f64) -> Self {
        Self {
            ttft_p10: quantile(ttft, 0.1),
            ttft_p50: quantile(ttft, 0.5),
            ttft_p90: quantile(ttft, 0.9),
            ttft_p99: quantile(ttft, 0.99),
            tpot_p50: quantile(tpot, 0.5),
            tpot_p99: quantile(tpot, 0.99),
            cached,
        }
    }

    pub fn simulated(outcome: &Outcome) -> Self {
        Self::of(&outcome.ttft_ms, &outcome.tpot_ms, outcome.hit_ratio)
    }

    pub fn measured(lines: &[OneRequest]) -> Self {
        let sorted = |values: &mut dyn Iterator<Item = f64>| {
            let mut values: Vec<f32> = values.map(|ms| ms as f32).collect();
            values.sort_by(f32::total_cmp);
            values
        };
        let first = |line: &OneRequest| line.first_byte_ms.unwrap();
        let ttft = sorted(&mut lines.iter().map(|line| first(line) - line.intended_ms));
        let several = lines.iter().filter(|line| line.output_tokens > Some(1));
        let tpot = sorted(&mut several.map(|line| {
            let between = line.output_tokens.unwrap() - 1;
            (line.end_ms.unwrap() - first(line)) / between as f64
        }));
        let sum = |of: fn(&OneRequest) -> Option<u64>| lines.iter().filter_map(of).sum::<u64>();
        let cached = sum(|line| line.cached_tokens) as f64 / sum(|line| line.prompt_tokens) as f64;
        Self::of(&ttft, &tpot, cached)
    }

    pub fn mean(all: &[Self]) -> Self {
        let mean = |of: fn(&Self) -> f64| all.iter().map(of).sum::<f64>() / all.len() as f64;
        Self {
            ttft_p10: mean(|one| one.ttft_p10),
            ttft_p50: mean(|one| one.ttft_p50),
            ttft_p90: mean(|one| one.ttft_p90),
            ttft_p99: mean(|one| one.ttft_p99),
            tpot_p50: mean(|one| one.tpot_p50),
            tpot_p99: mean(|one| one.tpot_p99),
            cached: mean(|one| one.cached),
        }
    }
}

/// The same prompts in blocks as the engine has them: what of a trace's block is held counts.
pub fn in_engine_blocks(mut trace: Trace) -> Trace {
    let parts = trace.block_tokens / ENGINE_BLOCK;
    for request in &mut trace.requests {
        for run in &mut request.blocks {
            *run = BlockRun {
                first: run.first * u64::from(parts),
                count: run.count * parts,
            };
        }
    }
    trace.block_tokens = ENGINE_BLOCK;
    trace
}
