//! Prompts that were taken and are on their way into an engine's cache.
//!
//! Whatever is taken later runs later and finds them: a prompt is **promised** from when it is taken until it
//! is computed, and **awaited** from there until the events of its blocks are in. From then on only events
//! count: what they remove is gone. What they never confirm is given up a moment after the request's end.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use forebay_proto::Now;

/// Events of a request come so long after its end, at most.
const LINGER: Duration = Duration::from_millis(250);
/// Requests that are over and whose events are waited for.
const MAX_LINGERING: usize = 1_024;

/// Whose prompts count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ahead {
    /// Of all that were taken: what one finds that is taken now.
    Taken,
    /// Of those that were given to the engine: what one finds that it is given now.
    Begun,
}

#[derive(Clone, Copy, Default)]
struct Promised {
    /// Requests that brought it and are not over, or not for long.
    users: u32,
    /// Those of them whose prompt is not computed, and those of these that the engine has.
    coming: u32,
    begun: u32,
    /// It was computed, and its events are to come.
    awaited: bool,
    /// Tokens up to its end, about.
    tokens: u32,
}

/// Promises by chunk. Bounded by what placements in flight and [`MAX_LINGERING`] others have of chunks.
#[derive(Default)]
pub(super) struct Promises {
    promised: HashMap<u64, Promised>,
    lingering: VecDeque<(Now, Vec<u64>)>,
}

impl Promises {
    /// Tokens up to the end of a chunk that is promised.
    pub(super) fn tokens_to(&self, chunk: u64, ahead: Ahead) -> Option<u32> {
        let promised = self.promised.get(&chunk)?;
        let coming = match ahead {
            Ahead::Taken => promised.coming,
            Ahead::Begun => promised.begun,
        };
        (coming > 0 || promised.awaited).then_some(promised.tokens)
    }

    /// All that is promised, and its tokens.
    pub(super) fn all(&self) -> impl Iterator<Item = (u64, u32)> {
        let all = self.promised.keys().copied();
        all.filter_map(|chunk| Some((chunk, self.tokens_to(chunk, Ahead::Taken)?)))
    }

    /// A prompt with this chunk was taken.
    pub(super) fn taken(&mut self, chunk: u64, tokens: u32) {
        let promised = self.promised.entry(chunk).or_default();
        if promised.coming == 0 && !promised.awaited {
            promised.tokens = tokens;
        }
        promised.users += 1;
        promised.coming += 1;
    }

    /// The engine was given it.
    pub(super) fn begun(&mut self, chunk: u64) {
        if let Some(promised) = self.promised.get_mut(&chunk) {
            promised.begun += 1;
        }
    }

    /// The engine computed it; by its events it is in the cache already, or is to be.
    pub(super) fn computed(&mut self, chunk: u64, resident: bool) {
        if let Some(promised) = self.promised.get_mut(&chunk) {
            promised.coming = promised.coming.saturating_sub(1);
            promised.begun = promised.begun.saturating_sub(1);
            promised.awaited |= !resident;
        }
    }

    /// There is nothing to wait for: its events are in, or there will be none.
    pub(super) fn settled(&mut self, chunk: u64) {
        if let Some(promised) = self.promised.get_mut(&chunk) {
            promised.awaited = false;
        }
    }

    /// One of those that brought it is over before it was computed.
    pub(super) fn abandoned(&mut self, chunk: u64, begun: bool) {
        if let Some(promised) = self.promised.get_mut(&chunk) {
            promised.coming = promised.coming.saturating_sub(1);
            promised.begun = promised.begun.saturating_sub(u32::from(begun));
        }
        self.over(chunk);
    }

    /// One of those that brought it is over, and its events are not waited for any more.
    pub(super) fn over(&mut self, chunk: u64) {
        if let Some(promised) = self.promised.get_mut(&chunk) {
            promised.users -= 1;
            if promised.users == 0 {
                self.promised.remove(&chunk);
            }
        }
    }

    /// A request whose prompt was computed is over: it is waited for its events a moment longer. Returns
    /// whose moment is over by that.
    pub(super) fn finished(&mut self, now: Now, chunks: &[u64]) -> Option<Vec<u64>> {
        self.lingering.push_back((now + LINGER, chunks.to_vec()));
        let full = self.lingering.len() > MAX_LINGERING;
        if full { self.pop() } else { None }
    }

    /// The chunks of a request whose moment is over.
    pub(super) fn expired(&mut self, now: Now) -> Option<Vec<u64>> {
        let (until, _) = self.lingering.front()?;
        if *until <= now { self.pop() } else { None }
    }

    fn pop(&mut self) -> Option<Vec<u64>> {
        let (_, chunks) = self.lingering.pop_front()?;
        Some(chunks)
    }
}
