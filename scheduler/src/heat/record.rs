//! The last minutes' requests, fingerprints and lengths only: what a plan is tried on.
//!
//! Where there are too many, one conversation in so many is kept, whole: what a rebalance moves is what
//! requests of one conversation find of each other.

use std::collections::VecDeque;
use std::time::Duration;

use forebay_proto::wire::control::Arrival;
use forebay_proto::{Millis, Now};

use super::tree::{Branch, NodeId, Tree};
use crate::index::Fingerprints;

/// Older requests are forgotten.
pub(super) const WINDOW: Duration = Duration::from_secs(600);
/// Requests that are kept.
pub(super) const MOST: usize = 8_192;
/// Fewer conversations than one in so many are not kept: their number says nothing then.
const RAREST: u32 = 1 << 16;

/// One request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    number: u64,
    at: Now,
    /// Where its path ends, while that is known; and where it left its family when it came.
    pub(super) end: Option<NodeId>,
    pub(super) branch: Branch,
    pub(super) prompt_tokens: u32,
    pub(super) cached_tokens: u32,
    pub(super) output_tokens: u32,
    /// 0: nothing was promised.
    pub(super) ttft_target_ms: u32,
}

impl Entry {
    pub(super) const fn new(end: Option<NodeId>, branch: Branch) -> Self {
        Self {
            number: 0,
            at: Now::at(Duration::ZERO),
            end,
            branch,
            prompt_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            ttft_target_ms: 0,
        }
    }

    /// Alike for all of its conversation.
    const fn draw(&self) -> u64 {
        let key = if self.branch.next == 0 {
            self.branch.family
        } else {
            self.branch.next
        };
        mix(key)
    }

    fn is_one_in(&self, one_in: u32) -> bool {
        self.draw().is_multiple_of(one_in.max(1).into())
    }
}

#[derive(Debug)]
pub(super) struct Record {
    /// Oldest first.
    entries: VecDeque<Entry>,
    newest: u64,
    one_in: u32,
    /// When that changed.
    changed: Now,
    /// What it was then, if fewer were kept.
    sparser: u32,
    /// Requests that were ever kept.
    pub(super) kept: u64,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            entries: VecDeque::new(),
            newest: 0,
            one_in: 1,
            changed: Now::default(),
            sparser: 1,
            kept: 0,
        }
    }
}

impl Record {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// A request came. Returns its number, also where it is not kept.
    pub(super) fn push(&mut self, now: Now, mut entry: Entry) -> u64 {
        self.forget(now);
        self.newest += 1;
        (entry.number, entry.at) = (self.newest, now);
        if !entry.is_one_in(self.one_in) {
            return self.newest;
        }
        while self.entries.len() >= MOST {
            if self.one_in >= RAREST {
                self.entries.pop_front();
                break;
            }
            self.one_in *= 2;
            let one_in = self.one_in;
            self.entries.retain(|entry| entry.is_one_in(one_in));
            self.changed = now;
        }
        if entry.is_one_in(self.one_in) {
            self.entries.push_back(entry);
            self.kept += 1;
        }
        self.newest
    }

    /// The entry of this number, if it is kept.
    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Entry> {
        let at = self
            .entries
            .binary_search_by_key(&number, |entry| entry.number);
        self.entries.get_mut(at.ok()?)
    }

    pub(super) fn remove(&mut self, number: u64) {
        let at = self
            .entries
            .binary_search_by_key(&number, |entry| entry.number);
        if let Ok(at) = at {
            self.entries.remove(at);
        }
    }

    /// Time passes: with what filled the record gone, more conversations are kept again.
    fn forget(&mut self, now: Now) {
        let old = |at: Now| now.since(at) > WINDOW;
        while self.entries.front().is_some_and(|entry| old(entry.at)) {
            self.entries.pop_front();
        }
        if old(self.changed) {
            self.sparser = self.one_in;
            if self.one_in > 1 && self.entries.len() < MOST / 4 {
                self.one_in /= 2;
                self.changed = now;
            }
        }
    }

    /// Those of the last `window`, at most so many, and which part of the conversations they are.
    pub(super) fn arrivals(
        &self,
        now: Now,
        window: Duration,
        most: usize,
        tree: &Tree,
        families: &Fingerprints<u32>,
    ) -> (Vec<Arrival>, u32) {
        let window = window.min(WINDOW);
        let recent = |entry: &&Entry| now.since(entry.at) <= window;
        // What is kept since is not all that was kept before.
        let mut one_in = self.one_in.max(self.sparser);
        let mut kept: Vec<&Entry> = self.entries.iter().filter(recent).collect();
        kept.retain(|entry| entry.is_one_in(one_in));
        while kept.len() > most && one_in < RAREST {
            one_in *= 2;
            kept.retain(|entry| entry.is_one_in(one_in));
        }
        // One conversation alone may be too many: its newest.
        kept.drain(..kept.len().saturating_sub(most));
        let arrival = |entry: &&Entry| {
            let known = entry.end.and_then(|end| tree.branch(end, families));
            let branch = known.unwrap_or(entry.branch);
            Arrival {
                ms_ago: Millis::from_duration(now.since(entry.at)).0,
                family: branch.family,
                family_tokens: branch.tokens,
                conversation: branch.next,
                prompt_tokens: entry.prompt_tokens,
                cached_tokens: entry.cached_tokens,
                output_tokens: entry.output_tokens,
                ttft_target_ms: entry.ttft_target_ms,
            }
        };
        (kept.iter().map(arrival).collect(), one_in)
    }
}

/// splitmix64's finaliser.
const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
