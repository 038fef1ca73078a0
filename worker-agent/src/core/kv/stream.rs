//! The order of batches: what is applied, what is missing, and when what was known is lost.
//!
//! Live batches carry a number that counts up from 0 in each process of the engine, and nothing else tells
//! one process from another. They get lost where a reader is slow or reconnects, which shows by a gap in the
//! numbers. What is missing is asked for again; an engine keeps the last few thousand batches, and answers
//! from the first that it has, without a word about those that it has not.

use std::collections::VecDeque;
use std::time::Duration;

use forebay_proto::Now;

use super::event::Batch;

/// Live batches that wait until what is before them was asked for again.
pub(super) const MAX_WAITING: usize = 1_024;
/// And their bytes.
pub(super) const MAX_WAITING_BYTES: usize = 64 << 20;
/// An answer that does not end in so long is not waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// So many requests without an answer, and what is missing is lost.
const TRIES: u32 = 3;

/// What is to be done with the map.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    /// These events are next.
    Apply(Batch),
    /// Batches are missing for good: what is known is of no use.
    Lost,
    /// The engine counts from the beginning again: its cache is that of another process.
    Restarted,
    /// All that there ever was is applied, up to here.
    Complete,
}

/// Where the stream is.
#[derive(Debug)]
pub(super) struct Stream {
    /// Whether there is whom to ask for what is missing.
    can_ask: bool,
    /// The newest batch that was applied.
    last: Option<u64>,
    /// The newest that came live, or did before this stream began.
    live: Option<u64>,
    asked: Option<Asked>,
    waiting: VecDeque<(u64, Batch)>,
    waiting_bytes: usize,
    tries: u32,
    /// Something is missing, and nobody was asked for it yet.
    wanted: bool,
    /// Something may be missing, and the next batch shows it.
    doubt: bool,
    counts: Counts,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    from: u64,
    /// When something of the answer came last.
    at: Now,
    /// Nothing of the answer came yet.
    nothing: bool,
    /// The answer has all from the first batch on.
    complete: bool,
}

/// How much came, and how much did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Batches applied.
    pub batches: u64,
    /// Times that batches were missing.
    pub gaps: u64,
    /// Answers that told again what was missing.
    pub replays: u64,
    /// Times that what was known was lost.
    pub losses: u64,
}

impl Stream {
    /// Goes on behind a batch that was applied before.
    pub(super) const fn behind(last: Option<u64>, can_ask: bool, counts: Counts) -> Self {
        Self {
            can_ask,
            last,
            live: last,
            asked: None,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            tries: 0,
            wanted: can_ask,
            doubt: !can_ask,
            counts,
        }
    }

    /// The newest batch that was applied.
    pub(super) const fn last(&self) -> Option<u64> {
        self.last
    }

    /// How much came.
    pub(super) const fn counts(&self) -> Counts {
        self.counts
    }

    /// Whether there is whom to ask.
    pub(super) const fn can_ask(&self) -> bool {
        self.can_ask
    }

    /// Whether nothing is missing, as far as is known.
    pub(super) fn is_whole(&self) -> bool {
        !self.doubt && !self.waits()
    }

    /// Whether something is to be told again before anything else is applied.
    fn waits(&self) -> bool {
        self.asked.is_some() || self.wanted || !self.waiting.is_empty()
    }

    /// The sockets are new, or gone: something may be missing.
    pub(super) const fn interrupted(&mut self) {
        self.asked = None;
        self.wanted = self.can_ask;
        self.doubt = !self.can_ask;
        self.tries = 0;
    }

    /// From which batch on the engine is to be asked, if it is to be.
    pub(super) fn ask(&mut self, now: Now) -> Option<u64> {
        if !std::mem::take(&mut self.wanted) {
            return None;
        }
        let from = self.last.map_or(0, |last| last + 1);
        self.asked = Some(Asked {
            from,
            at: now,
            nothing: true,
            complete: from == 0,
        });
        self.tries += 1;
        Some(from)
    }

    /// Time passed: an answer may be overdue.
    pub(super) fn pass(&mut self, now: Now, steps: &mut Vec<Step>) {
        if self
            .asked
            .is_none_or(|asked| now.since(asked.at) < PATIENCE)
        {
            return;
        }
        self.asked = None;
        if self.tries < TRIES {
            self.wanted = true;
        } else {
            self.tries = 0;
            self.lose(steps);
            self.drain(steps);
        }
    }

    /// A batch came live.
    pub(super) fn live(&mut self, seq: u64, batch: Batch, steps: &mut Vec<Step>) {
        if self.live.is_some_and(|live| seq <= live) {
            // A reader gets each number once, and in order.
            self.restart(steps);
        }
        self.live = Some(seq);
        if self.last.is_some_and(|last| seq <= last) {
            // It was told again before it came.
            return;
        }
        if self.waits() {
            self.wait(seq, batch);
            return;
        }
        let next = self.last.map_or(0, |last| last + 1);
        if seq == next {
            if seq == 0 {
                steps.push(Step::Complete);
            }
            self.apply(seq, batch, steps);
            return;
        }
        self.counts.gaps += 1;
        if self.can_ask {
            self.wanted = true;
            self.tries = 0;
            self.wait(seq, batch);
        } else {
            self.lose(steps);
            self.apply(seq, batch, steps);
        }
    }

    /// A batch was told again.
    pub(super) fn replayed(&mut self, now: Now, seq: u64, batch: Batch, steps: &mut Vec<Step>) {
        let Some(asked) = &mut self.asked else {
            return;
        };
        asked.at = now;
        asked.nothing = false;
        let next = self.last.map_or(0, |last| last + 1);
        if seq > next {
            // The engine does not have it any more, and does not say so.
            asked.complete = false;
            self.lose(steps);
        }
        if seq >= next {
            self.apply(seq, batch, steps);
        }
    }

    /// A batch came that cannot be read: told again it may be, and then not any more.
    pub(super) fn garbled(&mut self, seq: u64, again: bool, steps: &mut Vec<Step>) {
        if !again && self.can_ask {
            self.interrupted();
            return;
        }
        if let Some(asked) = &mut self.asked {
            asked.nothing = false;
            asked.complete = false;
        } else if again {
            return;
        }
        self.lose(steps);
        self.last = Some(seq);
    }

    /// That was all of the answer.
    pub(super) fn replay_end(&mut self, steps: &mut Vec<Step>) {
        let Some(asked) = self.asked.take() else {
            return;
        };
        self.tries = 0;
        self.counts.replays += 1;
        let waiting = self.waiting.front().map(|(seq, _)| *seq);
        if asked.nothing && waiting.is_some_and(|seq| seq > asked.from) {
            // It was kept for too short.
            self.lose(steps);
        } else if asked.complete {
            steps.push(Step::Complete);
        }
        self.drain(steps);
    }

    /// What waited is applied as far as it follows.
    fn drain(&mut self, steps: &mut Vec<Step>) {
        while let Some(seq) = self.waiting.front().map(|(seq, _)| *seq) {
            let next = self.last.map_or(seq, |last| last + 1);
            if seq > next {
                self.counts.gaps += 1;
                self.wanted = true;
                return;
            }
            if let Some((seq, batch)) = self.waiting.pop_front() {
                self.waiting_bytes -= batch.bytes();
                if seq == next {
                    self.apply(seq, batch, steps);
                }
            }
        }
    }

    /// What is before it comes first. At the bound those that wait are dropped: they will be asked for.
    fn wait(&mut self, seq: u64, batch: Batch) {
        let bytes = batch.bytes();
        if self.waiting.len() >= MAX_WAITING || self.waiting_bytes + bytes > MAX_WAITING_BYTES {
            self.forget_waiting();
        }
        self.waiting_bytes += bytes;
        self.waiting.push_back((seq, batch));
    }

    fn forget_waiting(&mut self) {
        self.waiting.clear();
        self.waiting_bytes = 0;
    }

    /// Batches that wait, and their bytes.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> (usize, usize) {
        (self.waiting.len(), self.waiting_bytes)
    }

    fn apply(&mut self, seq: u64, batch: Batch, steps: &mut Vec<Step>) {
        self.last = Some(seq);
        self.doubt = false;
        self.counts.batches += 1;
        steps.push(Step::Apply(batch));
    }

    fn lose(&mut self, steps: &mut Vec<Step>) {
        self.counts.losses += 1;
        self.last = None;
        steps.push(Step::Lost);
    }

    fn restart(&mut self, steps: &mut Vec<Step>) {
        self.forget_waiting();
        self.last = None;
        self.asked = None;
        self.tries = 0;
        // What came before this one is missing.
        self.wanted = self.can_ask;
        steps.push(Step::Restarted);
    }
}
