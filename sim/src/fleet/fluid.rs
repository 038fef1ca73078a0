//! The fluid bound: what a fleet could serve if work were water.
//!
//! Workers over the mean GPU time of a request, where every worker sees one pooled cache of the whole
//! fleet's size, batches are always full and nothing ever waits for an iteration's end. No placement can
//! reach it; it is what the others are measured against.

use std::collections::{BTreeMap, HashMap};

use forebay_scheduler::model::{Profile, attention_pairs};

use super::Setup;
use super::arrivals::{Job, Workload};

/// The bound and what it follows from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fluid {
    /// Requests a second.
    pub bound: f64,
    /// Share of the prompts' tokens that the pooled cache holds.
    pub hit_ratio: f64,
    /// Mean GPU time of a request, in milliseconds.
    pub request_ms: f64,
}

/// The bound for a fleet.
#[must_use]
pub fn fluid(load: &Workload, setup: &Setup) -> Fluid {
    let Setup {
        workers, profile, ..
    } = setup;
    let blocks = setup.kv_tokens / u64::from(load.block_tokens.max(1));
    let mut pool = Pool::new(u64::from(*workers) * blocks);
    let (mut total_ms, mut cached, mut prompts) = (0.0, 0.0, 0.0);
    for job in &load.jobs {
        let hit = pool.touch(&job.blocks) * u64::from(load.block_tokens);
        let prompt = f64::from(job.prompt_tokens);
        let hit = (hit as f64).min(prompt - 1.0);
        total_ms += gpu_ms(profile, job, hit);
        cached += hit;
        prompts += prompt;
    }
    let request_ms = total_ms / load.jobs.len().max(1) as f64;
    Fluid {
        bound: f64::from(*workers) * 1e3 / request_ms,
        hit_ratio: cached / prompts,
        request_ms,
    }
}

/// `u·(a1 + a0/K) + a3·A` for the prefill and `O·a1 + a2·O·(L + O/2)` for the decode.
fn gpu_ms(profile: &Profile, job: &Job, hit: f64) -> f64 {
    let (prompt, output) = (f64::from(job.prompt_tokens), f64::from(job.output_tokens));
    let uncached = prompt - hit;
    let share = profile.base_ms / f64::from(profile.chunk_tokens.max(1));
    let prefill =
        uncached * (profile.token_ms + share) + profile.pair_ms * attention_pairs(hit, uncached);
    let decode = output * profile.token_ms + profile.context_ms * output * (prompt + output / 2.0);
    prefill + decode
}

/// One cache of the whole fleet, least recently used out first, a prompt's end before its beginning.
struct Pool {
    room: u64,
    clock: u64,
    used: HashMap<u64, u64>,
    order: BTreeMap<u64, u64>,
}

impl Pool {
    fn new(room: u64) -> Self {
        Self {
            room,
            clock: 0,
            used: HashMap::new(),
            order: BTreeMap::new(),
        }
    }

    /// How many leading blocks are there; then all are.
    fn touch(&mut self, blocks: &[u64]) -> u64 {
        let there = blocks
            .iter()
            .take_while(|block| self.used.contains_key(block));
        let hit = there.count() as u64;
        for block in blocks.iter().rev() {
            self.clock += 1;
            if let Some(before) = self.used.insert(*block, self.clock) {
                self.order.remove(&before);
            }
            self.order.insert(self.clock, *block);
        }
        while self.used.len() as u64 > self.room
            && let Some((_, block)) = self.order.pop_first()
        {
            self.used.remove(&block);
        }
        hit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_forgets_the_least_recently_used_and_a_prompts_end_first() {
        let mut pool = Pool::new(3);
        assert_eq!(pool.touch(&[1, 2, 3]), 0);
        assert_eq!(pool.touch(&[4]), 0);
        assert_eq!(pool.touch(&[1, 2, 3]), 2, "the end gave way");
        assert_eq!(pool.touch(&[4]), 0);
    }

    #[test]
    fn a_request_costs_its_prefill_and_its_decode() {
        let job = |prompt_tokens, output_tokens| {
            let trace = format!(
                r#"{{"timestamp":0,"input_length":{prompt_tokens},"output_length":{output_tokens}}}"#
            );
            let trace =
                crate::trace::Trace::from_bytes(trace.as_bytes(), crate::trace::Options::default());
            Workload::new(&trace.unwrap())
        };
        let one = fluid(&job(1_024, 1), &Setup::default());
        let expected =
            1_024.0 * (0.068 + 8.0 / 1_024.0) + 7.4e-7 * 1_024.0 * 512.0 + 0.068 + 9.4e-5 * 1_024.5;
        assert!((one.request_ms - expected).abs() < 1e-9, "{one:?}");
        assert!((one.bound * expected - 8e3).abs() < 1e-6);
    }
}
