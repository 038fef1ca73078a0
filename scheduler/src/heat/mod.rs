//! What a worker is asked for: which beginnings of prompts several conversations share, how often they come
//! and what they take; and a record of the last minutes' requests. Of fingerprints and lengths, never text.
//!
//! A **family** is a path of chunks after which at least two different next chunks were seen. The turns of
//! one conversation extend each other, so they make none. How often it comes are means that fade, with a
//! half-life of a minute, and contain the families below it.
//!
//! Bounded: paths that were not asked for the longest are forgotten first, of a record that is full every
//! other conversation.

mod mean;
mod record;
#[cfg(test)]
mod tests;
mod tree;

use std::time::Duration;

use forebay_proto::Now;
use forebay_proto::wire::control::{Arrival, FamilyHeat, Heat as Told};

use self::mean::Fading;
use self::record::{Entry, Record};
use self::tree::{Fork, NodeId, Tree};
use crate::index::Fingerprints;
use crate::residency::Spread;

/// Families that are told of.
pub const MOST_TOLD: usize = 64;

/// A request that a worker took.
#[derive(Clone, Copy, Debug)]
pub struct Arrived<'a> {
    /// Fingerprints of its prompt's full chunks.
    pub chunks: &'a [u64],
    /// Epoch of the key that they were made with.
    pub key_epoch: u32,
    /// How its tokens lie on them, as estimated.
    pub spread: Spread,
    /// Tokens of it that are believed to be in the cache.
    pub cached_tokens: u32,
    /// Tokens that its answer is expected to have.
    pub output_tokens: u32,
    /// Promised time to first token; infinite: nothing was promised.
    pub ttft_target_ms: f64,
}

/// What became of it, as the engine counted.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Those of them that were in the cache.
    pub cached_tokens: u32,
    /// Tokens of its answer.
    pub output_tokens: u32,
}

/// A request under way, for what is to be said of it later.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    end: Option<NodeId>,
    number: u64,
    at: Now,
    prompt_tokens: u32,
    cached_tokens: u32,
    took_ms: f64,
}

impl Ticket {
    /// Time that it took so far, in milliseconds.
    #[must_use]
    pub const fn took_ms(&self) -> f64 {
        self.took_ms
    }
}

/// What one worker is asked for.
#[derive(Debug, Default)]
pub struct Heat {
    tree: Tree,
    record: Record,
    totals: Fading<6>,
    /// What all requests took, and the most that this ever was: a correction takes something back.
    all_ms: f64,
    took_ms: f64,
    /// When the first request came.
    since: Option<Now>,
}

impl Heat {
    /// A request was taken.
    pub fn arrived(&mut self, now: Now, arrived: &Arrived<'_>) -> Ticket {
        self.since.get_or_insert(now);
        let tokens_at = |chunk| arrived.spread.tokens_at(chunk, (0, 0));
        let (end, branch) = self
            .tree
            .ask(now, arrived.chunks, arrived.key_epoch, tokens_at);
        let prompt_tokens = arrived.spread.prompt_tokens;
        let cached_tokens = arrived.cached_tokens.min(prompt_tokens);
        let mut entry = Entry::new(end, branch);
        entry.prompt_tokens = prompt_tokens;
        entry.cached_tokens = cached_tokens;
        entry.output_tokens = arrived.output_tokens;
        entry.ttft_target_ms = target(arrived.ttft_target_ms);
        let number = self.record.push(now, entry);
        let tokens = [prompt_tokens, cached_tokens].map(f64::from);
        self.totals
            .add(now, [1.0, 0.0, tokens[0], tokens[1], 0.0, 0.0]);
        Ticket {
            end,
            number,
            at: now,
            prompt_tokens,
            cached_tokens,
            took_ms: 0.0,
        }
    }

    /// It has taken so much of the worker's time by now, since the last time that this was said.
    pub fn took(&mut self, now: Now, ticket: &mut Ticket, ms: f64) {
        ticket.took_ms += ms;
        self.all_ms += ms;
        self.took_ms = self.took_ms.max(self.all_ms);
        self.totals.add(now, [0.0, ms, 0.0, 0.0, 0.0, 0.0]);
        if let Some(end) = ticket.end {
            self.tree.charge(now, end, ms);
        }
    }

    /// A first token of which a time was promised came; in time, or not.
    pub fn first_token(&mut self, now: Now, in_time: bool) {
        let in_time = f64::from(u8::from(in_time));
        self.totals.add(now, [0.0, 0.0, 0.0, 0.0, 1.0, in_time]);
    }

    /// It is over, and the engine counted.
    pub fn finished(&mut self, now: Now, ticket: &Ticket, finished: &Finished) {
        let more = |counted: u32, before: u32| f64::from(counted) - f64::from(before);
        let prompt = more(finished.prompt_tokens, ticket.prompt_tokens);
        let cached = more(finished.cached_tokens, ticket.cached_tokens);
        self.totals.add(now, [0.0, 0.0, prompt, cached, 0.0, 0.0]);
        if let Some(entry) = self.record.get_mut(ticket.number) {
            entry.prompt_tokens = finished.prompt_tokens;
            entry.cached_tokens = finished.cached_tokens.min(finished.prompt_tokens);
            entry.output_tokens = finished.output_tokens;
        }
    }

    /// It was sent back unserved: another worker has it.
    pub fn unserved(&mut self, now: Now, ticket: &Ticket) {
        let tokens = [ticket.prompt_tokens, ticket.cached_tokens].map(f64::from);
        let all = [1.0, ticket.took_ms, tokens[0], tokens[1], 0.0, 0.0];
        self.totals.take_off(now, ticket.at, all);
        if let Some(end) = ticket.end {
            self.tree.take_off(now, ticket.at, end, ticket.took_ms);
        }
        self.record.remove(ticket.number);
    }

    /// What to tell the leader: the totals, and the families of which holding them saves the most.
    /// `held`: tokens up to the end of a chunk that the worker holds. Looks at everything that is known:
    /// not for the path of requests.
    #[must_use]
    pub fn told(&self, now: Now, held: impl Fn(u64) -> Option<u32>) -> Told {
        let counted_for = self.counted_for(now);
        let [arrivals, takes, prompt, cached, first, in_time] =
            self.totals.a_second(now, counted_for);
        let hottest = self.hottest(now);
        let mut told = Fingerprints::default();
        for fork in &hottest {
            told.insert(fork.chunk, ());
        }
        let families = hottest.iter().map(|fork| {
            let [arrivals, takes] = fork.counts.a_second(now, counted_for);
            let known = held(fork.chunk);
            let parent = self
                .tree
                .above(fork.node)
                .find(|chunk| told.contains_key(chunk));
            FamilyHeat {
                chunk: fork.chunk,
                chunks: fork.chunks,
                tokens: known.unwrap_or(fork.tokens),
                parent: parent.unwrap_or(0),
                arrivals: whole(arrivals * 1e3),
                takes: whole(takes),
                held: known.is_some(),
                key_epoch: fork.key_epoch,
                pool: String::new(),
            }
        });
        Told {
            families: families.collect(),
            takes: whole(takes),
            arrivals: whole(arrivals * 1e3),
            prompt_tokens: whole(prompt),
            cached_tokens: whole(cached.min(prompt)),
            first_tokens: whole(first * 1e3),
            in_time: whole(in_time.min(first) * 1e3),
        }
    }

    /// Requests of the last so many milliseconds, at most `most`, and one conversation in how many they are.
    /// Each names the longest of the families that are told of.
    #[must_use]
    pub fn arrivals(&self, now: Now, since_ms: u64, most: usize) -> (Vec<Arrival>, u32) {
        let hottest = self.hottest(now);
        let families = hottest.iter().map(|fork| (fork.chunk, fork.tokens));
        let families: Fingerprints<u32> = families.collect();
        let window = Duration::from_millis(since_ms);
        self.record
            .arrivals(now, window, most, &self.tree, &families)
    }

    /// Families that are known.
    #[must_use]
    pub const fn families(&self) -> usize {
        self.tree.forks()
    }

    /// Requests that the record has had.
    #[must_use]
    pub const fn recorded(&self) -> u64 {
        self.record.kept
    }

    /// Time of the worker that all requests took so far, by the model, in milliseconds. It never falls.
    #[must_use]
    pub const fn took_ms(&self) -> f64 {
        self.took_ms
    }

    /// Paths, their chunks, and requests in the record: what room it takes.
    #[must_use]
    pub fn size(&self) -> [usize; 3] {
        [self.tree.len(), self.tree.chunks(), self.record.len()]
    }

    /// For how long it has counted, and its record goes back.
    #[must_use]
    pub fn since(&self, now: Now) -> Duration {
        self.counted_for(now).min(record::WINDOW)
    }

    fn counted_for(&self, now: Now) -> Duration {
        self.since.map_or(Duration::ZERO, |since| now.since(since))
    }

    /// Those of which holding them saves the most prompt tokens a second.
    fn hottest(&self, now: Now) -> Vec<Fork> {
        let counted_for = self.counted_for(now);
        let with_heat = self.tree.all_forks().filter_map(|fork| {
            let [arrivals, _] = fork.counts.a_second(now, counted_for);
            let saves = arrivals * f64::from(fork.tokens);
            (arrivals * 1e3 >= 0.5).then_some((saves, fork))
        });
        let mut hottest: Vec<_> = with_heat.collect();
        hottest.sort_unstable_by(|(one, fork), (other, rival)| {
            let by_saved = other.total_cmp(one);
            by_saved.then(fork.chunk.cmp(&rival.chunk))
        });
        hottest.truncate(MOST_TOLD);
        hottest.into_iter().map(|(_, fork)| fork).collect()
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
fn whole(value: f64) -> u32 {
    value.round() as u32
}

fn target(ms: f64) -> u32 {
    if ms.is_finite() { whole(ms).max(1) } else { 0 }
}
