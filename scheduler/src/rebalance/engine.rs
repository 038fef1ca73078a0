//! One worker of a replay: prefills one after the other, decodes beside them.

use std::collections::VecDeque;
use std::time::Duration;

use forebay_proto::{Incarnation, Now, Revision};

use crate::load::{Acceptance, Load};
use crate::model::{Backlog, Profile, Residuals, attention_pairs};

/// Requests that run at once: prefill and decode are what limits, not slots.
const SLOTS: u32 = 1 << 16;
/// Nobody is silent in a replay.
const NEVER: Duration = Duration::from_secs(24 * 3_600);

struct Prefill {
    begins_ms: f64,
    ends_ms: f64,
    tokens: f64,
    pairs: f64,
    context: f64,
    output: f64,
}

struct Decode {
    ends_ms: f64,
    context: f64,
}

/// What one replayed worker has to do.
pub(super) struct Engine {
    pub(super) incarnation: Incarnation,
    pub(super) profile: Profile,
    prefills: VecDeque<Prefill>,
    decodes: Vec<Decode>,
    seq: u64,
}

impl Engine {
    pub(super) const fn new(incarnation: Incarnation, profile: Profile) -> Self {
        Self {
            incarnation,
            profile,
            prefills: VecDeque::new(),
            decodes: Vec::new(),
            seq: 0,
        }
    }

    /// When something of it changes next.
    pub(super) fn next_ms(&self) -> f64 {
        let first = self
            .prefills
            .front()
            .map_or(f64::INFINITY, |one| one.ends_ms);
        let ends = self.decodes.iter().map(|decode| decode.ends_ms);
        ends.fold(first, f64::min)
    }

    /// How long the first token of a prompt would take, in milliseconds.
    pub(super) fn quote_ms(&self, now_ms: f64, cached: f64, prompt: f64) -> f64 {
        let (tokens, backlog) = (prompt - cached, self.backlog(now_ms));
        let joining_ms = self.profile.joining_ms(&backlog);
        let pairs = attention_pairs(cached, tokens);
        let own_ms = self.profile.prefill_ms(&backlog, tokens, pairs);
        self.begins_ms(now_ms) - now_ms + joining_ms + own_ms
    }

    /// When what comes now is begun.
    fn begins_ms(&self, now_ms: f64) -> f64 {
        self.prefills.back().map_or(now_ms, |last| last.ends_ms)
    }

    /// Takes a prompt. Returns how long its first token takes, in milliseconds.
    pub(super) fn take(&mut self, now_ms: f64, cached: f64, prompt: f64, output: f64) -> f64 {
        let (tokens, begins_ms) = (prompt - cached, self.begins_ms(now_ms));
        let pairs = attention_pairs(cached, tokens);
        let ends_ms = now_ms + self.quote_ms(now_ms, cached, prompt);
        self.prefills.push_back(Prefill {
            begins_ms,
            ends_ms,
            tokens,
            pairs,
            context: prompt,
            output,
        });
        ends_ms - now_ms
    }

    /// Lets time pass.
    pub(super) fn advance(&mut self, now_ms: f64) {
        while let Some(first) = self.prefills.front()
            && first.ends_ms <= now_ms
        {
            let at_ms = first.ends_ms;
            let Prefill {
                context, output, ..
            } = self.prefills.pop_front().expect("it was just seen");
            let backlog = self.backlog(at_ms);
            // Beside a prefill each token takes as long as its chunk.
            let prefill = if self.prefills.is_empty() {
                0.0
            } else {
                self.profile.chunk_beside(backlog.decodes + 1.0)
            };
            let each_ms = self.profile.iteration_ms(
                prefill,
                backlog.decodes + 1.0,
                backlog.context_tokens + context,
                0.0,
            );
            self.decodes.push(Decode {
                ends_ms: at_ms + output * each_ms,
                context: context + output / 2.0,
            });
        }
        self.decodes.retain(|decode| decode.ends_ms > now_ms);
    }

    fn backlog(&self, now_ms: f64) -> Backlog {
        let mut backlog = Backlog::default();
        for one in &self.prefills {
            let takes = (one.ends_ms - one.begins_ms).max(f64::MIN_POSITIVE);
            let left = ((one.ends_ms - now_ms) / takes).clamp(0.0, 1.0);
            backlog.pending_tokens += left * one.tokens;
            backlog.pending_pairs += left * one.pairs;
        }
        let running = self.decodes.iter().filter(|one| one.ends_ms > now_ms);
        for decode in running {
            backlog.decodes += 1.0;
            backlog.context_tokens += decode.context;
        }
        backlog
    }

    /// What its agent would report now.
    pub(super) fn load(&mut self, now_ms: f64) -> Load {
        self.seq += 1;
        let backlog = self.backlog(now_ms);
        let present = self.prefills.len() + self.decodes.len();
        Load {
            incarnation: self.incarnation,
            seq: self.seq,
            acceptance: Acceptance::Open,
            running: u32::try_from(present).unwrap_or(u32::MAX),
            queued: 0,
            slots: SLOTS,
            queue_limit: SLOTS,
            service: Duration::ZERO,
            facts_revision: Revision::default(),
            interval: NEVER,
            backlog,
            model: Some(self.profile),
            residuals: Residuals {
                ttft_p50: 1.0,
                ttft_p95: 1.3,
            },
        }
    }
}

/// A moment of a replay.
pub(super) fn at(ms: f64) -> Now {
    Now::at(Duration::from_secs_f64(ms.max(0.0) / 1e3))
}
