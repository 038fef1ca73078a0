//! In which order an engine gives its blocks to new prompts: those that nobody uses, least recently used
//! first, and of one request's blocks the last first.
//!
//! What is evicted is told when the step is over that did it. A request that is given to the engine behind
//! others, to which it has not come, will not find what those evict: the chunks that stood unused for longest.
//! Only requests that came through this agent are known here; what others use is not foretold.

use std::collections::{BTreeMap, HashMap, VecDeque};

use forebay_scheduler::residency::MAX_CHUNKS;

/// Something that nobody uses.
#[derive(Clone, Copy)]
enum Idle {
    /// A chunk, and the tokens that it has more than the one before it.
    Chunk(u64, u32),
    /// Tokens of an answer, or of a prompt's end, which nobody finds again.
    Tokens(u32),
}

/// One request as the engine was given it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn(u64);

/// A place in the order of what nobody uses.
#[derive(Clone, Copy)]
pub(super) struct Horizon(u64);

/// See the module's page.
#[derive(Default)]
pub(super) struct Order {
    /// How many requests on the engine use a chunk.
    uses: HashMap<u64, u32>,
    /// Oldest first. No more chunks than a map has, and no more tokens than requests.
    idle: BTreeMap<u64, Idle>,
    stamps: HashMap<u64, u64>,
    clock: u64,
    /// Requests that the engine has not computed, and the tokens of blocks that it has yet to give them.
    ahead: VecDeque<(Turn, u32)>,
    turns: u64,
    full: bool,
}

impl Order {
    /// The engine is given a prompt that needs blocks for so many tokens beyond what it will find.
    pub(super) fn begun(&mut self, chunks: &[u64], tokens: u32) -> Turn {
        for chunk in chunks {
            *self.uses.entry(*chunk).or_default() += 1;
            self.drop_stamp(*chunk);
        }
        self.turns += 1;
        let turn = Turn(self.turns);
        self.ahead.push_back((turn, tokens));
        turn
    }

    /// The engine computed one, or will not.
    pub(super) fn computed(&mut self, turn: Turn) {
        self.ahead.retain(|(other, _)| *other != turn);
    }

    /// A request is over. `chunks` are those of its prompt with the tokens up to their ends, as far as they
    /// are known, `tokens` all that it had.
    pub(super) fn over(&mut self, chunks: &[(u64, Option<u32>)], tokens: u32) {
        let known = chunks.iter().filter_map(|(_, end)| *end);
        let beyond = tokens.saturating_sub(known.max().unwrap_or(0));
        if beyond > 0 {
            let stamp = self.tick();
            self.idle.insert(stamp, Idle::Tokens(beyond));
        }
        for (at, (chunk, end)) in chunks.iter().enumerate().rev() {
            let Some(uses) = self.uses.get_mut(chunk) else {
                continue;
            };
            *uses -= 1;
            if *uses > 0 {
                continue;
            }
            self.uses.remove(chunk);
            let before = at.checked_sub(1).and_then(|before| chunks[before].1);
            if let Some(end) = end {
                let own = end.saturating_sub(before.unwrap_or(0));
                let stamp = self.tick();
                self.idle.insert(stamp, Idle::Chunk(*chunk, own));
                self.stamps.insert(*chunk, stamp);
            }
        }
        while self.stamps.len() > MAX_CHUNKS || self.idle.len() > 2 * MAX_CHUNKS {
            self.drop_oldest();
        }
    }

    /// Blocks with so many tokens were given to prompts: to the first of those that wait for some.
    pub(super) fn stored(&mut self, tokens: u32) {
        let mut left = tokens;
        for (_, needed) in &mut self.ahead {
            let given = left.min(*needed);
            *needed -= given;
            left -= given;
        }
    }

    /// Something was evicted, so that every new block is taken from another prompt; or everything was, and
    /// none is.
    pub(super) const fn set_full(&mut self, full: bool) {
        self.full = full;
    }

    /// A chunk was evicted; the engine still has those that are resident.
    pub(super) fn removed(&mut self, chunk: u64, resident: impl Fn(u64) -> bool) {
        let Some(stamp) = self.stamps.get(&chunk).copied() else {
            return;
        };
        self.drop_stamp(chunk);
        // What stood unused for longer went with it, or before.
        let gone = |idle: &Idle| match *idle {
            Idle::Tokens(_) => true,
            Idle::Chunk(chunk, _) => !resident(chunk),
        };
        while let Some((oldest, idle)) = self.idle.first_key_value()
            && *oldest < stamp
            && gone(idle)
        {
            self.drop_oldest();
        }
    }

    /// How far evictions reach before the engine comes to what it is given next; `None`: there are none.
    pub(super) fn horizon(&self) -> Option<Horizon> {
        let ahead = self.ahead.iter().map(|(_, tokens)| u64::from(*tokens));
        let mut needed: u64 = ahead.sum();
        let mut horizon = None;
        if !self.full {
            return None;
        }
        for (stamp, idle) in &self.idle {
            if needed == 0 {
                break;
            }
            horizon = Some(Horizon(*stamp));
            let (Idle::Chunk(_, tokens) | Idle::Tokens(tokens)) = *idle;
            needed = needed.saturating_sub(tokens.into());
        }
        horizon
    }

    /// Whether a chunk is evicted up to there.
    pub(super) fn goes(&self, chunk: u64, upto: Horizon) -> bool {
        let stamp = self.stamps.get(&chunk);
        stamp.is_some_and(|stamp| *stamp <= upto.0)
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn drop_stamp(&mut self, chunk: u64) {
        if let Some(stamp) = self.stamps.remove(&chunk) {
            self.idle.remove(&stamp);
        }
    }

    fn drop_oldest(&mut self) {
        if let Some((_, Idle::Chunk(chunk, _))) = self.idle.pop_first() {
            self.stamps.remove(&chunk);
        }
    }
}
