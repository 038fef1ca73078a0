//! What is foretold of evictions, beside an engine that does as vLLM does: free blocks in one line, new ones
//! from its front, used ones out of it, and a request's blocks at its end, the last first.

use std::collections::VecDeque;
use std::time::Duration;

use forebay_proto::Now;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

const SIZE: u32 = 16;
/// Beginnings that prompts share, and the blocks of one.
const SHARED: u64 = 3;

/// One prompt: blocks of a shared beginning, then of its own.
struct Prompt {
    chunks: Vec<u64>,
}

impl Prompt {
    fn new(beginning: u64, own: u64, blocks: usize) -> Self {
        let shared = (0..4).map(|at| 1_000 * beginning + at);
        let rest = (0..blocks as u64).map(|at| 1_000_000 + 1_000 * (own * SHARED + beginning) + at);
        Self {
            chunks: shared.chain(rest).collect(),
        }
    }

    /// Each chunk is one block, whose tokens name it; one more token is behind them.
    fn ids(&self) -> Vec<u32> {
        let id = |chunk: &u64| u32::try_from(*chunk).unwrap();
        let blocks = self.chunks.iter();
        let blocks = blocks.flat_map(|chunk| std::iter::repeat_n(id(chunk), SIZE as usize));
        blocks.chain([7]).collect()
    }

    fn news(&self) -> News {
        let ends = 1..=self.chunks.len() as u32;
        News {
            chunks: self.chunks.clone(),
            aligned: Aligned {
                ends: ends.map(|at| at * SIZE).collect(),
                ..Aligned::default()
            },
            ids: self.ids(),
            ..News::default()
        }
    }

    fn tokens(&self) -> u32 {
        self.chunks.len() as u32 * SIZE + 1
    }
}

/// The engine's blocks: the chunk that each holds, if somebody may find it.
struct Engine {
    free: VecDeque<Option<u64>>,
    /// Each request with its blocks.
    running: Vec<(usize, Vec<Option<u64>>)>,
}

impl Engine {
    fn has(&self, chunk: u64) -> bool {
        let mut used = self.running.iter().flat_map(|(_, blocks)| blocks);
        self.free.contains(&Some(chunk)) || used.any(|block| *block == Some(chunk))
    }

    /// Begins a prompt. Returns the tokens that it found, and what it tells; `None`: there is no room.
    fn begin(&mut self, number: usize, prompt: &Prompt) -> Option<(u32, Batch)> {
        let chunks = &prompt.chunks;
        let found = chunks.iter().take_while(|chunk| self.has(**chunk)).count();
        let needed = chunks.len() - found + 1;
        let unused = chunks[..found].iter();
        let unused = unused.filter(|chunk| self.free.contains(&Some(**chunk)));
        if self.free.len() < needed + unused.count() {
            return None;
        }
        self.free
            .retain(|block| !block.is_some_and(|chunk| chunks[..found].contains(&chunk)));
        let evicted: Vec<u64> = self.free.drain(..needed).flatten().collect();
        let place = Place {
            gpu: true,
            group: 0,
        };
        let mut events = vec![];
        if !evicted.is_empty() {
            let hashes = evicted;
            events.push(Event::Removed { hashes, place });
        }
        if found < chunks.len() {
            events.push(Event::Stored(Stored {
                hashes: chunks[found..].to_vec(),
                parent: found.checked_sub(1).map(|last| chunks[last]),
                tokens: prompt.ids()[found * SIZE as usize..chunks.len() * SIZE as usize].to_vec(),
                block_tokens: SIZE,
                extras: Vec::new(),
                adapter: None,
                place,
            }));
        }
        let blocks = chunks.iter().copied().map(Some).chain([None]);
        self.running.push((number, blocks.collect()));
        Some((found as u32 * SIZE, Batch { at: 0.0, events }))
    }

    /// Ends one that runs. Returns which.
    fn end(&mut self, at: usize) -> usize {
        let (number, blocks) = self.running.remove(at);
        for block in blocks.into_iter().rev() {
            let used = |(_, others): &(usize, Vec<Option<u64>>)| others.contains(&block);
            if block.is_none() || !self.running.iter().any(used) {
                self.free.push_back(block);
            }
        }
        number
    }
}

/// Over many requests.
#[derive(Debug, Default)]
struct Sums {
    requests: u64,
    /// Tokens that were predicted and found.
    predicted: u64,
    found: u64,
    /// Requests of which too much was predicted, and would have been by what is in the cache alone.
    over: u64,
    over_by_now: u64,
}

/// A prompt of many.
fn any_prompt(rng: &mut StdRng) -> Prompt {
    let (beginning, own) = (rng.random_range(0..SHARED), rng.random_range(0..60));
    Prompt::new(beginning, own, rng.random_range(1..6))
}

/// Prompts are given to the engine faster than it begins them, and end in any order.
fn run(rng: &mut StdRng, blocks: usize, sums: &mut Sums) {
    let mut engine = Engine {
        free: std::iter::repeat_n(None, blocks).collect(),
        running: Vec::new(),
    };
    let mut exact = Exact::new([7; 16], blocks as u64 * u64::from(SIZE), true);
    exact.begin(None);
    let _ = exact.ask(Now::default());
    exact.replay_end();
    let (mut given, mut waiting, mut seq) = (Vec::new(), VecDeque::new(), 0);
    let mut now = Now::default();
    for _ in 0..400 {
        now = now + Duration::from_secs(1);
        exact.pass(now);
        match rng.random_range(0..3) {
            0 if waiting.len() < 4 => {
                let prompt = any_prompt(rng);
                let (chunks, held) = (&prompt.chunks, prompt.chunks.len());
                exact.taken(chunks, |chunk| {
                    let at = chunks.iter().position(|other| *other == chunk)?;
                    Some((at as u32 + 1) * SIZE)
                });
                let by_now = exact.hit(chunks, Ahead::Begun);
                let (predicted, turn) = exact.begun(chunks, held, prompt.tokens());
                waiting.push_back(given.len());
                given.push((prompt, by_now, predicted, turn));
            }
            1 => {
                let Some(number) = waiting.front().copied() else {
                    continue;
                };
                let (prompt, by_now, predicted, turn) = &given[number];
                let Some((found, batch)) = engine.begin(number, prompt) else {
                    continue;
                };
                waiting.pop_front();
                exact.live(seq, batch);
                seq += 1;
                exact.aligned(prompt.news());
                exact.computed(&prompt.chunks, *turn);
                sums.requests += 1;
                sums.predicted += u64::from(predicted.tokens);
                sums.found += u64::from(found);
                sums.over += u64::from(predicted.tokens > found);
                sums.over_by_now += u64::from(by_now.tokens > found);
            }
            2 if !engine.running.is_empty() => {
                let number = engine.end(rng.random_range(0..engine.running.len()));
                let prompt = &given[number].0;
                exact.finished(now, &prompt.chunks, prompt.tokens() + SIZE - 1);
            }
            _ => {}
        }
    }
}

#[test]
fn what_those_ahead_evict_is_not_predicted() {
    let mut sums = Sums::default();
    for seed in 0..150 {
        let mut rng = StdRng::seed_from_u64(seed);
        let blocks = rng.random_range(100..160);
        run(&mut rng, blocks, &mut sums);
    }
    assert!(
        sums.over_by_now as f64 > 0.004 * sums.requests as f64,
        "{sums:?}"
    );
    assert!(
        sums.over as f64 <= 0.0015 * sums.requests as f64,
        "{sums:?}"
    );
    let ratio = sums.predicted as f64 / sums.found as f64;
    assert!((0.99..=1.005).contains(&ratio), "{ratio} {sums:?}");
}
