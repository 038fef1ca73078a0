//! What will be found of prompts: what is in the cache and stays there, and what is on its way.

use forebay_proto::Now;
use forebay_scheduler::residency::Change;

use super::exact::{Exact, Promise};
use super::order::{Horizon, Turn};
use super::promises::{Ahead, Promises};

impl Exact {
    /// What will be found of a prompt.
    #[must_use]
    pub fn hit(&self, chunks: &[u64], ahead: Ahead) -> Promise {
        self.hit_but(chunks, ahead, None)
    }

    /// What will be found of a prompt when nothing is that is evicted up to there.
    fn hit_but(&self, chunks: &[u64], ahead: Ahead, evicted: Option<Horizon>) -> Promise {
        let mut hit = Promise {
            settled: true,
            mark: self.blocks.chunks().mark(),
            ..Promise::default()
        };
        for (at, chunk) in chunks.iter().enumerate() {
            let resident = self.blocks.chunks().tokens_to(*chunk);
            let tokens = match resident {
                Some(_) if evicted.is_some_and(|upto| self.order.goes(*chunk, upto)) => break,
                Some(tokens) => tokens,
                None => match self.promises.tokens_to(*chunk, ahead) {
                    Some(tokens) => {
                        hit.settled = false;
                        tokens
                    }
                    None => break,
                },
            };
            hit.chunks = at + 1;
            hit.tokens = hit.tokens.max(tokens);
        }
        let size = self.blocks.block_tokens().unwrap_or(1);
        hit.tokens -= hit.tokens % size;
        hit
    }

    /// Tokens up to the end of this chunk, if it will be found.
    #[must_use]
    pub fn tokens_to(&self, chunk: u64) -> Option<u32> {
        let promised = || self.promises.tokens_to(chunk, Ahead::Taken);
        self.blocks.chunks().tokens_to(chunk).or_else(promised)
    }

    /// A prompt was taken: these of its chunks are on their way.
    pub fn taken(&mut self, chunks: &[u64], tokens_to: impl Fn(u64) -> Option<u32>) {
        for chunk in chunks.iter().copied() {
            let tokens = tokens_to(chunk).unwrap_or(0);
            self.promising(chunk, |promises| promises.taken(chunk, tokens));
        }
    }

    /// The engine is given a prompt of about so many tokens, of which the `held` first chunks were taken.
    /// Returns what it will find of it, and the request as it is to be named from here on.
    pub fn begun(&mut self, chunks: &[u64], held: usize, tokens: u32) -> (Promise, Turn) {
        let hit = self.hit_but(chunks, Ahead::Begun, self.order.horizon());
        let size = self.block_tokens().unwrap_or(1);
        // Its answer begins in a block of its own, or the one after.
        let needed = tokens.saturating_sub(hit.tokens) / size + 1;
        let needed = needed.saturating_mul(size);
        let chunks = &chunks[..held];
        chunks.iter().for_each(|chunk| self.promises.begun(*chunk));
        (hit, self.order.begun(chunks, needed))
    }

    /// The engine computed a prompt that it was given.
    pub fn computed(&mut self, chunks: &[u64], turn: Turn) {
        self.order.computed(turn);
        for chunk in chunks.iter().copied() {
            let resident = self.blocks.chunks().tokens_to(chunk).is_some();
            self.promises.computed(chunk, resident);
        }
    }

    /// A request is over whose prompt was computed, with its answer of so many tokens.
    pub fn finished(&mut self, now: Now, chunks: &[u64], tokens: u32) {
        self.left(chunks, tokens);
        if let Some(chunks) = self.promises.finished(now, chunks) {
            self.give_up(&chunks);
        }
    }

    /// A request is over whose prompt, of so many tokens, was not computed; the engine may have been given it.
    pub fn abandoned(&mut self, chunks: &[u64], turn: Option<Turn>, tokens: u32) {
        if let Some(turn) = turn {
            self.order.computed(turn);
            self.left(chunks, tokens);
        }
        for chunk in chunks.iter().copied() {
            self.promising(chunk, |promises| promises.abandoned(chunk, turn.is_some()));
        }
    }

    /// The engine uses these for one request less.
    fn left(&mut self, chunks: &[u64], tokens: u32) {
        let ends = chunks.iter().map(|chunk| (*chunk, self.tokens_to(*chunk)));
        let ends: Vec<_> = ends.collect();
        self.order.over(&ends, tokens);
    }

    /// What events did not confirm.
    pub(super) fn give_up(&mut self, chunks: &[u64]) {
        for chunk in chunks.iter().copied() {
            self.promising(chunk, |promises| promises.over(chunk));
        }
    }

    /// Changes what is promised of a chunk, and notes what follows where events do not say that it is there.
    pub(super) fn promising(&mut self, chunk: u64, change: impl FnOnce(&mut Promises)) {
        let before = self.promises.tokens_to(chunk, Ahead::Taken);
        change(&mut self.promises);
        let after = self.promises.tokens_to(chunk, Ahead::Taken);
        if self.blocks.chunks().tokens_to(chunk).is_some() {
            return;
        }
        match (before, after) {
            (None, Some(tokens)) => self.changes.push(Change::Stored { chunk, tokens }),
            (Some(_), None) => self.changes.push(Change::Removed { chunk }),
            (None, None) | (Some(_), Some(_)) => {}
        }
    }
}
