//! What is offered to the fleet: a trace's requests, at a rate.

use std::time::Duration;

use crate::trace::{Request, Trace};

/// One request as the simulation needs it.
#[derive(Clone, Debug)]
pub(super) struct Job {
    /// When it arrives in the trace.
    at: Duration,
    pub(super) prompt_tokens: u32,
    pub(super) output_tokens: u32,
    /// The hash of everything up to the end of each full block of its prompt.
    pub(super) blocks: Vec<u64>,
}

/// A trace's requests, ready to be offered at any rate.
pub struct Workload {
    pub(super) jobs: Vec<Job>,
    pub(super) block_tokens: u32,
    quantum: Duration,
    /// From the first arrival to the end of the last one's quantum.
    span: Duration,
}

/// What becomes of timestamps that the trace has rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// They are spread evenly over what they were rounded to.
    Jitter,
    /// They stay: all of one quantum arrive at one instant.
    Burst,
}

impl Workload {
    /// Takes a trace over.
    #[must_use]
    pub fn new(trace: &Trace) -> Self {
        let first = trace.requests.first().map_or(Duration::ZERO, |one| one.at);
        let last = trace.requests.last().map_or(Duration::ZERO, |one| one.at);
        let job = |request: &Request| {
            let full = (request.input_tokens / trace.block_tokens.max(1)) as usize;
            Job {
                at: request.at - first,
                prompt_tokens: request.input_tokens,
                output_tokens: request.output_tokens,
                blocks: request.block_ids().take(full).map(hash).collect(),
            }
        };
        Self {
            jobs: trace.requests.iter().map(job).collect(),
            block_tokens: trace.block_tokens,
            quantum: trace.quantum,
            span: (last - first + trace.quantum).max(Duration::from_millis(1)),
        }
    }

    /// How many requests there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Requests a second, as they were recorded.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.jobs.len() as f64 / self.span.as_secs_f64()
    }

    /// When each job arrives at so many requests a second, in order.
    pub(super) fn arrivals(&self, rate: f64, spread: Spread, seed: u64) -> Vec<(Duration, u32)> {
        let faster = rate / self.rate();
        let mut arrivals: Vec<(Duration, u32)> = (0..)
            .zip(&self.jobs)
            .map(|(number, job)| {
                let within = match spread {
                    Spread::Jitter => self.quantum.mul_f64(fraction(seed, number)),
                    Spread::Burst => Duration::ZERO,
                };
                let at = (job.at + within).as_secs_f64() / faster;
                (Duration::from_secs_f64(at), number)
            })
            .collect();
        arrivals.sort();
        arrivals
    }
}

/// Ids of a trace are small numbers; hashes are not.
fn hash(id: u64) -> u64 {
    mix(id.wrapping_add(0x5EED))
}

/// A number in [0, 1) that follows from the seed and the job.
fn fraction(seed: u64, number: u32) -> f64 {
    let bits = mix(mix(seed) ^ u64::from(number)) >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

/// splitmix64's finaliser.
pub(super) const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_requests_a_second_whatever_the_traces_own() {
        let load = Workload::new(&Trace::sample(None).unwrap());
        for rate in [1.0, 7.5] {
            let arrivals = load.arrivals(rate, Spread::Jitter, 3);
            let last = arrivals.last().unwrap().0.as_secs_f64();
            let offered = load.len() as f64 / last;
            assert!((offered / rate - 1.0).abs() < 0.05, "{offered} for {rate}");
            assert!(arrivals.is_sorted());
        }
    }

    #[test]
    fn bursts_stay_together_and_jitter_follows_from_the_seed() {
        let load = Workload::new(&Trace::sample(None).unwrap());
        let distinct = |arrivals: &[(Duration, u32)]| {
            let mut times: Vec<_> = arrivals.iter().map(|(at, _)| *at).collect();
            times.dedup();
            times.len()
        };
        let burst = load.arrivals(load.rate(), Spread::Burst, 1);
        let jitter = load.arrivals(load.rate(), Spread::Jitter, 1);
        assert!(distinct(&burst) * 4 < distinct(&jitter));
        assert_eq!(jitter, load.arrivals(load.rate(), Spread::Jitter, 1));
        assert_ne!(jitter, load.arrivals(load.rate(), Spread::Jitter, 2));
    }
}
