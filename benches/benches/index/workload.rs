//! What workers hold, what is asked and what changes.
//!
//! A conversation's first 4 to 32 chunks are one of 2,000 system prompts, the n-th of which is used n times
//! less often than the first. Then come 1 to 96 chunks of its own, fewer ones more often. One worker holds
//! a conversation; for three in ten another one or two hold a beginning of it, its system prompt at least:
//! engines evict from the end.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Chunks of every prompt that is looked up.
pub(crate) const PROMPT: usize = 128;
const SYSTEMS: u64 = 2_000;

pub(crate) struct Workload {
    conversations: Vec<Conversation>,
    pub(crate) pairs: usize,
}

struct Conversation {
    system: u64,
    number: u64,
    holders: [Holder; 3],
}

/// Who holds how many of a conversation's chunks; of none: nobody.
#[derive(Clone, Copy, Default)]
pub(crate) struct Holder {
    pub(crate) worker: u32,
    pub(crate) chunks: usize,
}

impl Workload {
    /// About so many pairs of a chunk and a worker.
    pub(crate) fn new(pairs: usize, workers: u32) -> Self {
        let mut rng = StdRng::seed_from_u64(1);
        let mut seen = vec![false; SYSTEMS as usize * workers as usize];
        let mut all = Self {
            conversations: Vec::new(),
            pairs: 0,
        };
        while all.pairs < pairs {
            let system = ((SYSTEMS as f64).powf(rng.random()) as u64).min(SYSTEMS - 1);
            let shared = system_chunks(system);
            let mut own = 96_f64.powf(rng.random()) as usize;
            let mut holders = [Holder::default(); 3];
            let others: f64 = rng.random();
            for (holder, likely) in holders.iter_mut().zip([1.0, 0.3, 0.05]) {
                if others < likely {
                    let worker = rng.random_range(0..workers);
                    let chunks = shared + own;
                    *holder = Holder { worker, chunks };
                    let first = &mut seen[(system * u64::from(workers)) as usize + worker as usize];
                    all.pairs += if *first { own } else { chunks };
                    *first = true;
                    own = rng.random_range(0..=own);
                }
            }
            all.conversations.push(Conversation {
                system,
                number: rng.random(),
                holders,
            });
        }
        all
    }

    pub(crate) fn len(&self) -> usize {
        self.conversations.len()
    }

    /// Writes the first chunks of a prompt that continues a conversation. Returns how many are its
    /// system prompt's.
    pub(crate) fn prompt(&self, conversation: usize, chunks: &mut [u64]) -> usize {
        let Conversation { system, number, .. } = self.conversations[conversation];
        let shared = system_chunks(system);
        for (at, chunk) in (0_u64..).zip(chunks) {
            let of = if at < shared as u64 { system } else { number };
            *chunk = mixed(mixed(of) ^ at);
        }
        shared
    }

    pub(crate) fn holders(&self, conversation: usize) -> impl Iterator<Item = Holder> {
        let holders = self.conversations[conversation].holders;
        holders.into_iter().filter(|holder| holder.chunks > 0)
    }
}

const fn system_chunks(system: u64) -> usize {
    4 + (mixed(system) % 29) as usize
}

/// The finalizer of splitmix64.
const fn mixed(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
