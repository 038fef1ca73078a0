//! One engine's cache by its events, with the prompts that are on their way into it.
//!
//! What will be found is what events say is there, and what [`Promises`] say is coming.

use std::collections::{BTreeSet, VecDeque};

use forebay_proto::Now;
use forebay_scheduler::residency::Change;

use super::align::Aligned;
use super::blocks::{Blocks, Placed, Unfit};
use super::event::{Batch, Event};
use super::kept::KeptExact;
use super::order::Order;
use super::promises::{Ahead, Promises};
use super::seen::Seen;
use super::stream::{Counts, Step, Stream};

/// Prompts whose tokens are known before the size of a block is.
const MAX_EARLY: usize = 64;
const MAX_ADAPTERS: usize = 256;
/// A map with this share of the engine's blocks has lost nothing that matters.
const FULL: f64 = 0.9;

/// A prompt's tokens, as the engine has them.
#[derive(Clone, Debug, Default)]
pub struct News {
    /// Fingerprints of its chunks.
    pub chunks: Vec<u64>,
    /// Where they end.
    pub aligned: Aligned,
    /// Its ids.
    pub ids: Vec<u32>,
    /// The isolation scope that the engine was given.
    pub scope: Option<String>,
    /// The model that was asked for; an adapter, perhaps.
    pub model: String,
}

/// What is predicted of a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Promise {
    /// Leading chunks that will be found.
    pub chunks: usize,
    /// Tokens of them, in whole blocks.
    pub tokens: u32,
    /// All of them are in the cache already, by its events.
    pub settled: bool,
    /// When that was, in the order of removals.
    pub(super) mark: u64,
}

/// See the module's page.
pub struct Exact {
    pub(super) blocks: Blocks,
    stream: Stream,
    /// Which process is spoken of is known.
    known: bool,
    /// Everything that is in the cache is in the map.
    complete: bool,
    /// Predictions by this map did not hold.
    distrusted: bool,
    unfit: Option<Unfit>,
    kv_tokens: u64,
    adapters: BTreeSet<String>,
    pub(super) promises: Promises,
    pub(super) order: Order,
    early: VecDeque<News>,
    seen: Seen,
    pub(super) changes: Vec<Change>,
}

impl Exact {
    /// The map of an engine with a cache of so many tokens (0: not told), of which nothing is known yet.
    /// `can_ask`: it tells again what it said. `key` is for hashes of its tokens.
    #[must_use]
    pub fn new(key: [u8; 16], kv_tokens: u64, can_ask: bool) -> Self {
        Self {
            blocks: Blocks::new(key),
            stream: Stream::behind(None, can_ask, Counts::default()),
            known: false,
            complete: false,
            distrusted: false,
            unfit: None,
            kv_tokens,
            adapters: BTreeSet::new(),
            promises: Promises::default(),
            order: Order::default(),
            early: VecDeque::new(),
            seen: Seen::default(),
            changes: Vec::new(),
        }
    }

    /// The engine's cache holds so many tokens.
    pub const fn holds_tokens(&mut self, kv_tokens: u64) {
        self.kv_tokens = kv_tokens;
    }

    /// Whether the map is to be believed rather than a shadow.
    #[must_use]
    pub const fn holds(&self) -> bool {
        self.known && self.complete && !self.distrusted && self.unfit.is_none()
    }

    /// Whether it has all that the engine said up to here.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.holds() && self.stream.is_whole()
    }

    /// A process of the engine is there, whose map was kept, or which is new.
    pub fn begin(&mut self, kept: Option<&KeptExact>) {
        let (can_ask, counts) = (self.stream.can_ask(), self.stream.counts());
        // Without a word about what came meanwhile a map is of no use.
        let kept = kept.filter(|_| can_ask);
        self.blocks = match kept {
            Some(kept) => Blocks::restored(&kept.blocks),
            None => Blocks::new(self.blocks.key()),
        };
        let last = kept.and_then(|kept| kept.last);
        self.stream = Stream::behind(last, can_ask, counts);
        self.complete = kept.is_some_and(|kept| kept.complete);
        self.distrusted = false;
        self.unfit = None;
        self.known = true;
        self.forget_requests();
    }

    /// The engine is away.
    pub fn end(&mut self) {
        self.begin(None);
        self.known = false;
    }

    /// What to go on from; `None` while nothing is known of the engine.
    #[must_use]
    pub fn kept(&self) -> Option<KeptExact> {
        let holds = self.holds() && self.stream.can_ask();
        holds.then(|| KeptExact {
            last: self.stream.last(),
            complete: self.complete,
            blocks: self.blocks.kept(),
        })
    }

    /// Changes with what is kept.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.stream.counts().batches
    }

    /// The link to the engine's events is new, or gone.
    pub const fn interrupted(&mut self) {
        self.stream.interrupted();
    }

    /// From which batch on the engine is to be asked for what it said, if it is to be.
    pub fn ask(&mut self, now: Now) -> Option<u64> {
        if self.known {
            self.stream.ask(now)
        } else {
            None
        }
    }

    /// A batch came.
    pub fn live(&mut self, seq: u64, batch: Batch) {
        self.step(|stream, steps| stream.live(seq, batch, steps));
    }

    /// A batch came again, because it was asked for.
    pub fn replayed(&mut self, now: Now, seq: u64, batch: Batch) {
        self.step(|stream, steps| stream.replayed(now, seq, batch, steps));
    }

    /// That was all that was asked for.
    pub fn replay_end(&mut self) {
        self.step(Stream::replay_end);
    }

    /// A batch came, live or again, that cannot be read.
    pub fn garbled(&mut self, seq: u64, again: bool) {
        self.step(|stream, steps| stream.garbled(seq, again, steps));
    }

    /// Time passed.
    pub fn pass(&mut self, now: Now) {
        self.step(|stream, steps| stream.pass(now, steps));
        while let Some(chunks) = self.promises.expired(now) {
            self.give_up(&chunks);
        }
    }

    fn step(&mut self, act: impl FnOnce(&mut Stream, &mut Vec<Step>)) {
        if !self.known {
            return;
        }
        let mut steps = Vec::new();
        act(&mut self.stream, &mut steps);
        for step in steps {
            match step {
                Step::Apply(batch) => self.apply(&batch),
                Step::Lost | Step::Restarted => {
                    self.blocks.forget();
                    self.complete = false;
                }
                Step::Complete => {
                    self.complete = true;
                    self.distrusted = false;
                }
            }
        }
        self.note();
    }

    fn apply(&mut self, batch: &Batch) {
        if self.unfit.is_some() {
            return;
        }
        for event in &batch.events {
            if let Event::Stored(stored) = event
                && let Some(adapter) = &stored.adapter
                && self.adapters.len() < MAX_ADAPTERS
            {
                self.adapters.insert(adapter.clone());
            }
            if let Err(unfit) = self.blocks.apply(event) {
                self.unfit = Some(unfit);
                self.blocks.forget();
                return;
            }
            match event {
                Event::Stored(stored) => {
                    let blocks = u32::try_from(stored.hashes.len()).unwrap_or(u32::MAX);
                    self.order
                        .stored(blocks.saturating_mul(stored.block_tokens));
                }
                Event::Removed { .. } => self.order.set_full(true),
                Event::Cleared => {
                    self.order.set_full(false);
                    // What is empty is known whole.
                    self.complete = true;
                }
            }
        }
        if let Some(size) = self.blocks.block_tokens() {
            let tokens = self.blocks.copies() * u64::from(size);
            self.complete |= self.kv_tokens > 0 && tokens as f64 >= self.kv_tokens as f64 * FULL;
            for news in std::mem::take(&mut self.early) {
                self.align(&news);
            }
        }
    }

    /// A prompt was found in the engine's tokens.
    pub fn aligned(&mut self, news: News) {
        if !self.known {
            return;
        }
        let seen = &mut self.seen;
        seen.prompts.0 += 1;
        seen.chunks.0 += news.aligned.ends.len() as u64;
        seen.chunks.1 += u64::from(news.aligned.lost);
        seen.error_tokens += news.aligned.error_tokens;
        if self.blocks.block_tokens().is_some() {
            self.align(&news);
            self.note();
        } else {
            if self.early.len() >= MAX_EARLY {
                self.early.pop_front();
            }
            self.early.push_back(news);
        }
    }

    /// A prompt was not found.
    pub const fn unaligned(&mut self) {
        self.seen.prompts.1 += 1;
    }

    fn align(&mut self, news: &News) {
        let ends = news.chunks.iter().zip(&news.aligned.ends);
        let placed: Vec<_> = ends
            .map(|(chunk, tokens)| Placed {
                chunk: *chunk,
                tokens: *tokens,
            })
            .collect();
        let adapter = self.adapters.get(&news.model).map(String::as_str);
        self.blocks
            .align(&placed, &news.ids, news.scope.as_deref(), adapter);
        // Of a block that is not full there will be no events.
        for chunk in &news.chunks {
            if !self.blocks.chunks().knows(*chunk) {
                self.promising(*chunk, |promises| promises.settled(*chunk));
            }
        }
    }

    fn forget_requests(&mut self) {
        self.promises = Promises::default();
        self.order = Order::default();
        self.early.clear();
        self.changes.clear();
        self.blocks.take_changes();
    }

    /// Takes over what became of chunks by events.
    fn note(&mut self) {
        for change in self.blocks.take_changes() {
            if let Change::Removed { chunk } = change {
                let resident = |chunk| self.blocks.chunks().tokens_to(chunk).is_some();
                self.order.removed(chunk, resident);
            }
            let change = match change {
                Change::Stored { chunk, .. } => {
                    self.promises.settled(chunk);
                    change
                }
                Change::Removed { chunk } => match self.promises.tokens_to(chunk, Ahead::Taken) {
                    Some(tokens) => Change::Stored { chunk, tokens },
                    None => change,
                },
            };
            self.changes.push(change);
        }
    }

    /// What changed since this was last asked.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// Everything that will be found.
    pub fn resident(&self) -> impl Iterator<Item = (u64, u32)> {
        let promised = self.promises.all();
        let promised =
            promised.filter(|(chunk, _)| self.blocks.chunks().tokens_to(*chunk).is_none());
        let settled = self
            .blocks
            .chunks()
            .resident()
            .map(|at| (at.chunk, at.tokens));
        settled.chain(promised)
    }

    /// Chunks in the cache, by events.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.chunks().count().0
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of a block, once one was stored.
    #[must_use]
    pub const fn block_tokens(&self) -> Option<u32> {
        self.blocks.block_tokens()
    }

    /// The engine said at a request's end how much of its prompt it had. Returns whether what was predicted
    /// had all events: what a request uses cannot go before its end, so that what went meanwhile was gone
    /// when it began.
    pub fn judge(&mut self, chunks: &[u64], predicted: Promise, reported: u32) -> bool {
        let block_tokens = self.blocks.block_tokens().unwrap_or(1);
        let mut found = chunks[..predicted.chunks.min(chunks.len())].iter();
        let went = |chunk: &u64| self.blocks.chunks().went_since(*chunk, predicted.mark);
        let settled = predicted.settled && !found.any(went);
        let judged = if settled {
            &mut self.seen.settled
        } else {
            &mut self.seen.promised
        };
        judged.count(predicted.tokens, reported, block_tokens);
        settled
    }

    /// Predictions do not hold: the map is not believed before it is known whole again.
    pub const fn distrust(&mut self) {
        self.distrusted = true;
    }

    /// What a scrape sees.
    #[must_use]
    pub fn seen(&self) -> Seen {
        let (_, absent) = self.blocks.chunks().count();
        Seen {
            stream: self.stream.counts(),
            blocks: self.blocks.copies(),
            absent: absent as u64,
            unknown: self.blocks.unknown(),
            ..self.seen
        }
    }
}
