//! The scheduler of one engine: who runs, who waits, what one iteration computes.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use forebay_proto::Now;
use forebay_scheduler::model::{Profile, attention_pairs};

use super::blocks::Blocks;

/// One engine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// How long an iteration takes.
    pub profile: Profile,
    /// Tokens that the cache holds.
    pub kv_tokens: u64,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// Requests that run at once.
    pub max_seqs: usize,
    /// Requests that wait beyond them; more are refused.
    pub queue: usize,
}

/// A request as it arrives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Names it in events.
    pub id: u64,
    /// Tokens of its prompt; at least 1 is assumed.
    pub prompt_tokens: u32,
    /// The hash of everything up to the end of each full block of the prompt.
    pub blocks: Vec<u64>,
    /// Tokens that it answers; at least 1 is assumed.
    pub output_tokens: u32,
}

/// What happened, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The first token of a request.
    First {
        /// Which.
        id: u64,
        /// When.
        at: Now,
        /// Tokens of the prompt that were in the cache.
        cached_tokens: u32,
    },
    /// One more token.
    Token {
        /// Which request.
        id: u64,
        /// When.
        at: Now,
    },
    /// That was its last token.
    Finished {
        /// Which.
        id: u64,
        /// When.
        at: Now,
    },
}

/// What became of the cache's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A block is full, and found by its hash.
    Filled {
        /// Whose it is.
        id: u64,
        /// Which of its blocks, from 0.
        block: u32,
        /// By which it is found.
        hash: u64,
        /// That of the block before it.
        parent: Option<u64>,
    },
    /// A block is not found any more.
    Forgotten {
        /// By which it was.
        hash: u64,
    },
}

/// What the engine has done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Prompt tokens of requests that were started.
    pub prompt_tokens: u64,
    /// Those of them that were in the cache.
    pub cached_tokens: u64,
    /// Prompt tokens computed, those that were computed again included.
    pub prefilled_tokens: u64,
    /// Tokens computed again after a pre-emption.
    pub recomputed_tokens: u64,
    /// Tokens answered.
    pub output_tokens: u64,
    /// Requests that had to give their blocks back.
    pub preemptions: u64,
    /// Iterations.
    pub iterations: u64,
    /// Time spent in them, in milliseconds.
    pub busy_ms: f64,
}

struct Request {
    id: u64,
    prompt: u32,
    output: u32,
    hashes: Vec<u64>,
    held: Vec<u32>,
    /// Tokens whose keys and values are in held blocks.
    computed: u32,
    said: u32,
    cached: u32,
    /// It was counted when it was first started.
    started: bool,
}

impl Request {
    /// Tokens that have to be computed before the next one can be said.
    const fn target(&self) -> u32 {
        // The newest token said is computed by the step that says the next.
        self.prompt + self.said
    }

    const fn decodes(&self) -> bool {
        self.said > 0 && self.computed + 1 == self.target()
    }
}

/// One part of an iteration.
#[derive(Clone, Copy)]
struct Part {
    slot: usize,
    id: u64,
    tokens: u32,
}

/// One engine. See the module's page.
pub struct Engine {
    settings: Settings,
    blocks: Blocks,
    requests: Vec<Option<Request>>,
    vacant: Vec<usize>,
    slots: HashMap<u64, usize>,
    /// In the order in which they were started.
    running: Vec<usize>,
    waiting: VecDeque<usize>,
    parts: Vec<Part>,
    /// The end of the iteration under way.
    until: Option<Now>,
    /// When the engine could begin the next one: an arrival, or the end of the last.
    ready: Option<Now>,
    counts: Counts,
    journal: Option<Vec<Change>>,
}

impl Engine {
    /// An empty engine.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let blocks = settings.kv_tokens / u64::from(settings.block_tokens.max(1));
        Self {
            settings,
            blocks: Blocks::new(u32::try_from(blocks).unwrap_or(u32::MAX - 1)),
            requests: Vec::new(),
            vacant: Vec::new(),
            slots: HashMap::new(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            parts: Vec::new(),
            until: None,
            ready: None,
            counts: Counts::default(),
            journal: None,
        }
    }

    /// From here on [`Engine::take_journal`] tells what becomes of blocks.
    pub fn keep_journal(&mut self) {
        self.blocks.tell_forgotten();
        self.journal.get_or_insert_default();
    }

    /// What became of blocks since this was last asked, in its order; of an iteration it is known when that begins.
    pub fn take_journal(&mut self) -> Vec<Change> {
        self.journal
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    fn note_forgotten(&mut self) {
        if let Some(journal) = &mut self.journal {
            let forgotten = self.blocks.take_forgotten();
            journal.extend(forgotten.into_iter().map(|hash| Change::Forgotten { hash }));
        }
    }

    /// Iterations that begin from here on take as long as this says.
    pub const fn set_profile(&mut self, profile: Profile) {
        self.settings.profile = profile;
    }

    /// A request arrives. Call [`Engine::advance`] up to `now` before. Refused (`false`) when the
    /// queue is full, or when the request would never fit.
    pub fn arrive(&mut self, now: Now, arrival: Arrival) -> bool {
        let tokens = u64::from(arrival.prompt_tokens) + u64::from(arrival.output_tokens);
        let present = self.running.len() + self.waiting.len();
        let full = present >= self.settings.max_seqs + self.settings.queue;
        if full || tokens > self.settings.kv_tokens {
            return false;
        }
        let request = Request {
            id: arrival.id,
            prompt: arrival.prompt_tokens.max(1),
            output: arrival.output_tokens.max(1),
            hashes: arrival.blocks,
            held: Vec::new(),
            computed: 0,
            said: 0,
            cached: 0,
            started: false,
        };
        let slot = match self.vacant.pop() {
            Some(slot) => slot,
            None => {
                self.requests.push(None);
                self.requests.len() - 1
            }
        };
        self.slots.insert(request.id, slot);
        self.requests[slot] = Some(request);
        self.waiting.push_back(slot);
        if self.until.is_none() && self.ready.is_none() {
            self.ready = Some(now);
        }
        true
    }

    /// A request is given up. The iteration under way still takes its time.
    pub fn abort(&mut self, id: u64) {
        if let Some(slot) = self.slots.get(&id).copied() {
            self.running.retain(|running| *running != slot);
            self.waiting.retain(|waiting| *waiting != slot);
            self.remove(slot);
        }
    }

    /// When to call [`Engine::advance`] next; `None`: there is nothing to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Now> {
        self.until.or(self.ready)
    }

    /// Lets time pass up to `now`.
    pub fn advance(&mut self, now: Now, events: &mut Vec<Event>) {
        loop {
            if let Some(end) = self.until {
                if end > now {
                    return;
                }
                self.until = None;
                self.complete(end, events);
                self.ready = Some(end);
            }
            let Some(start) = self.ready.filter(|start| *start <= now) else {
                return;
            };
            match self.plan() {
                Some(duration) => {
                    self.ready = None;
                    self.until = Some(start + duration);
                }
                None => {
                    self.ready = None;
                    return;
                }
            }
        }
    }

    /// Requests that run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Share of the cache's blocks that requests use.
    #[must_use]
    pub fn kv_usage(&self) -> f64 {
        let all = self.blocks.in_use() + self.blocks.available();
        self.blocks.in_use() as f64 / all.max(1) as f64
    }

    /// What it has done.
    #[must_use]
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// The blocks, for checks.
    #[must_use]
    pub const fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Decides on the next iteration; `None`: nothing can be done.
    fn plan(&mut self) -> Option<Duration> {
        self.parts.clear();
        let mut budget = self.settings.profile.chunk_tokens.max(1);
        let mut sum = Sum::default();
        let mut at = 0;
        while at < self.running.len() && budget > 0 {
            let slot = self.running[at];
            let Some(wanted) = self.next_part(slot, budget) else {
                // No block is left: the newest gives way, this one perhaps.
                self.preempt_newest();
                continue;
            };
            budget -= wanted;
            sum.add(self.requests[slot].as_ref(), wanted);
            self.push(slot, wanted);
            at += 1;
        }
        while budget > 0 && self.running.len() < self.settings.max_seqs {
            let Some(slot) = self.waiting.front().copied() else {
                break;
            };
            self.share_prefix(slot);
            let Some(wanted) = self.next_part(slot, budget) else {
                self.give_back(slot);
                break;
            };
            self.waiting.pop_front();
            self.running.push(slot);
            self.count_start(slot);
            budget -= wanted;
            sum.add(self.requests[slot].as_ref(), wanted);
            self.push(slot, wanted);
        }
        if self.parts.is_empty() {
            return None;
        }
        let ms =
            self.settings
                .profile
                .iteration_ms(sum.prefill, sum.decodes, sum.context, sum.pairs);
        self.counts.iterations += 1;
        self.counts.busy_ms += ms;
        // Whole nanoseconds, so that equal runs are equal to the bit.
        Some(Duration::from_nanos(nanos(ms)).max(Duration::from_nanos(1)))
    }

    /// A part of the iteration. The blocks that it fills are found from here on, also by those behind it.
    fn push(&mut self, slot: usize, tokens: u32) {
        self.note_forgotten();
        let block = self.settings.block_tokens.max(1);
        let Some(request) = self.requests[slot].as_mut() else {
            return;
        };
        let id = request.id;
        self.parts.push(Part { slot, id, tokens });
        for full in request.computed / block..(request.computed + tokens) / block {
            let full = full as usize;
            while request.hashes.len() <= full {
                // What was said is found again by nobody else.
                let number = request.hashes.len() as u64;
                request.hashes.push(unique(request.id, number));
            }
            let hash = request.hashes[full];
            let fresh = self.blocks.fill(request.held[full], hash);
            if let Some(journal) = self.journal.as_mut().filter(|_| fresh) {
                journal.push(Change::Filled {
                    id,
                    block: u32::try_from(full).unwrap_or(u32::MAX),
                    hash,
                    parent: full.checked_sub(1).map(|before| request.hashes[before]),
                });
            }
        }
    }

    /// Takes blocks for as many tokens as the budget allows; `None`: there are none.
    fn next_part(&mut self, slot: usize, budget: u32) -> Option<u32> {
        let block = self.settings.block_tokens.max(1);
        let request = self.requests[slot].as_mut()?;
        let wanted = (request.target() - request.computed).min(budget);
        let needed = (request.computed + wanted).div_ceil(block) as usize;
        let missing = needed.saturating_sub(request.held.len());
        if missing > self.blocks.available() {
            return None;
        }
        for _ in 0..missing {
            request.held.push(self.blocks.take()?);
        }
        Some(wanted)
    }

    /// Uses the blocks of the prompt that are there. The last token is always computed.
    fn share_prefix(&mut self, slot: usize) {
        let block = self.settings.block_tokens.max(1);
        let Some(request) = self.requests[slot].as_mut() else {
            return;
        };
        let most = (request.target() - 1) / block;
        let most = request.hashes.len().min(most as usize);
        for hash in &request.hashes[..most] {
            let Some(at) = self.blocks.share(*hash) else {
                break;
            };
            request.held.push(at);
        }
        request.computed = u32::try_from(request.held.len()).unwrap_or(0) * block;
    }

    fn count_start(&mut self, slot: usize) {
        let Some(request) = self.requests[slot].as_mut() else {
            return;
        };
        if !std::mem::replace(&mut request.started, true) {
            request.cached = request.computed;
            self.counts.prompt_tokens += u64::from(request.prompt);
            self.counts.cached_tokens += u64::from(request.computed);
        } else {
            self.counts.recomputed_tokens += u64::from(request.target() - request.computed);
        }
    }

    fn give_back(&mut self, slot: usize) {
        if let Some(request) = self.requests[slot].as_mut() {
            request.computed = 0;
            // From the end: what is nearest to the root is the newest.
            for block in request.held.drain(..).rev() {
                self.blocks.release(block);
            }
        }
    }

    fn preempt_newest(&mut self) {
        let Some(slot) = self.running.pop() else {
            return;
        };
        self.parts.retain(|part| part.slot != slot);
        self.give_back(slot);
        self.waiting.push_front(slot);
        self.counts.preemptions += 1;
    }

    /// The iteration is done: its tokens are said.
    fn complete(&mut self, at: Now, events: &mut Vec<Event>) {
        let parts = std::mem::take(&mut self.parts);
        let mut over = false;
        for Part { slot, id, tokens } in &parts {
            let Some(request) = self.requests[*slot].as_mut().filter(|r| r.id == *id) else {
                continue;
            };
            request.computed += tokens;
            if request.said == 0 || !(*tokens == 1 && request.computed == request.target()) {
                self.counts.prefilled_tokens += u64::from(*tokens);
            }
            if request.computed < request.target() {
                continue;
            }
            request.said += 1;
            self.counts.output_tokens += 1;
            let id = request.id;
            if request.said == 1 {
                let cached_tokens = request.cached;
                events.push(Event::First {
                    id,
                    at,
                    cached_tokens,
                });
            } else {
                events.push(Event::Token { id, at });
            }
            if request.said == request.output {
                events.push(Event::Finished { id, at });
                over = true;
                self.remove(*slot);
            }
        }
        if over {
            let requests = &self.requests;
            self.running.retain(|slot| requests[*slot].is_some());
        }
        self.parts = parts;
    }

    fn remove(&mut self, slot: usize) {
        self.give_back(slot);
        if let Some(request) = self.requests[slot].take() {
            self.slots.remove(&request.id);
            self.vacant.push(slot);
        }
    }
}

/// What an iteration's time follows from.
#[derive(Default)]
struct Sum {
    prefill: f64,
    decodes: f64,
    context: f64,
    pairs: f64,
}

impl Sum {
    fn add(&mut self, request: Option<&Request>, tokens: u32) {
        let Some(request) = request else { return };
        if request.decodes() {
            self.decodes += 1.0;
            self.context += f64::from(request.computed);
        } else {
            self.prefill += f64::from(tokens);
            self.pairs += attention_pairs(f64::from(request.computed), f64::from(tokens));
        }
    }
}

/// A hash that only this request has (splitmix64's finaliser over both).
const fn unique(id: u64, number: u64) -> u64 {
    let mut z = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
fn nanos(ms: f64) -> u64 {
    (ms * 1e6).round() as u64
}
