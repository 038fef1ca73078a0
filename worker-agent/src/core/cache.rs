//! What the agent believes of its engine's cache, and what it tells of it.

use std::time::Duration;

use forebay_proto::{Incarnation, Now};
use forebay_scheduler::residency::{Grade, Publisher, SelfCheck, Shadow, Spread, Verdict};

use super::placement::Usage;

/// Where predictions do not hold, what was sent is believed to be resident for no longer.
const BLIND_FOR: Duration = Duration::from_secs(60);
/// Chunks by which a prediction may be off: the grain of chunks and blocks.
const GRAIN_CHUNKS: u32 = 2;
/// Weight of a new prompt in what is learnt of estimates.
const SHARE: f64 = 0.05;
/// Shorter prompts say more of templates than of text.
const LEAST_BYTES: u64 = 256;
/// An estimate that is further off counts as if it were so.
const BOUNDS: std::ops::RangeInclusive<f64> = 0.1..=10.0;

/// A prompt, as a placement's header has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// Fingerprints of its full chunks.
    pub chunks: Vec<u64>,
    /// Bytes of its canonical form.
    pub bytes: u64,
    /// Bytes of one chunk.
    pub chunk_bytes: u32,
    /// Its length, as the balancer estimates it.
    pub tokens: u32,
}

impl Prompt {
    /// How its tokens lie on its chunks, if it has so many.
    const fn spread(&self, prompt_tokens: u32) -> Spread {
        Spread {
            prompt_tokens,
            prompt_bytes: self.bytes,
            chunk_bytes: self.chunk_bytes,
        }
    }

    fn grain_tokens(&self) -> u32 {
        let bytes = u128::from(self.chunk_bytes) * u128::from(GRAIN_CHUNKS);
        let tokens = u128::from(self.tokens) * bytes / u128::from(self.bytes.max(1));
        u32::try_from(tokens).unwrap_or(u32::MAX)
    }
}

/// What a placement holds of the cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    chunks: usize,
    /// Those that were predicted to be in the cache.
    cached: usize,
    /// Of which life of the engine's cache.
    life: u64,
}

/// A grade that changed, for whoever reads the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GradeChange {
    /// Predictions hold again.
    Restored,
    /// The engine held less than was predicted, too often.
    Overpredicted,
    /// The engine does not say how much of a prompt it had.
    Silent,
}

/// The shadow of one engine's cache, and its publication.
pub(super) struct Cache {
    shadow: Shadow,
    check: SelfCheck,
    publisher: Publisher,
    incarnation: Incarnation,
    /// Names this life of the engine's cache.
    life: u64,
    kv_tokens: u64,
    forgotten: Now,
    /// The order of use, as of then.
    mark: u64,
    told: Option<GradeChange>,
    /// Tokens that the engine counted, to those that balancers had estimated.
    ratio: Option<f64>,
    /// The engine counted something once.
    counts: bool,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cache({} chunks)", self.shadow.len())
    }
}

impl Cache {
    pub(super) fn new(incarnation: Incarnation, life: u64, kv_tokens: u64) -> Self {
        Self {
            shadow: Shadow::new(kv_tokens),
            check: SelfCheck::default(),
            publisher: Publisher::new(incarnation, life, Grade::Inferred),
            incarnation,
            life,
            kv_tokens,
            forgotten: Now::default(),
            mark: 0,
            told: None,
            ratio: None,
            counts: false,
        }
    }

    /// Tokens of the prompt that are believed to be resident; the last one never is.
    pub(super) fn hit(&self, prompt: &Prompt) -> u32 {
        let (_, tokens) = self.shadow.hit(&prompt.chunks);
        tokens.min(prompt.tokens.saturating_sub(1))
    }

    /// Tokens up to the end of the last of these chunks that is resident; what is before one of a prompt is
    /// resident with it.
    pub(super) fn deepest(&self, chunks: &[u64]) -> u32 {
        let known = chunks
            .iter()
            .rev()
            .find_map(|chunk| self.shadow.tokens_to(*chunk));
        known.unwrap_or(0)
    }

    /// The prompt was taken: it will be resident before anything that is taken later runs. Returns how
    /// many of its chunks are held for it.
    pub(super) fn taken(&mut self, prompt: &Prompt) -> Held {
        let (cached, tokens) = self.shadow.hit(&prompt.chunks);
        let spread = prompt.spread(self.estimate(prompt, cached, tokens));
        let chunks = self.shadow.taken(&prompt.chunks, &spread);
        self.note();
        Held {
            chunks,
            cached,
            life: self.life,
        }
    }

    /// The prompt's length: what is known of its first chunks, and the rest's share of what the balancer
    /// estimates, which knows what text it is, corrected by how this engine counts.
    fn estimate(&self, prompt: &Prompt, known: usize, tokens: u32) -> u32 {
        let Some(ratio) = self.ratio else {
            return prompt.tokens;
        };
        let each = f64::from(prompt.tokens) / prompt.bytes.max(1) as f64;
        let rest = prompt
            .bytes
            .saturating_sub(known as u64 * u64::from(prompt.chunk_bytes));
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates
        let rest = (rest as f64 * each * ratio).ceil() as u32;
        tokens.saturating_add(rest)
    }

    fn learn(&mut self, prompt: &Prompt, tokens: u32) {
        if prompt.bytes < LEAST_BYTES || tokens == 0 || prompt.tokens == 0 {
            return;
        }
        let sample = f64::from(tokens) / f64::from(prompt.tokens);
        let sample = sample.clamp(*BOUNDS.start(), *BOUNDS.end());
        let ratio = self.ratio.get_or_insert(sample);
        *ratio += SHARE * (sample - *ratio);
    }

    /// The prompt is prefilled.
    pub(super) fn prefilled(&mut self, prompt: &Prompt) {
        self.shadow.prefilled(&prompt.chunks);
    }

    /// The request is over and was not prefilled.
    pub(super) fn abandoned(&mut self, prompt: &Prompt, held: Held) {
        if held.life == self.life {
            self.shadow.abandoned(&prompt.chunks, held.chunks);
            self.note();
        }
    }

    /// A request whose prompt was prefilled is over.
    pub(super) fn finished(&mut self, prompt: &Prompt, held: Held, usage: Usage) {
        if held.life != self.life {
            return;
        }
        let tokens = usage.prompt_tokens.unwrap_or(prompt.tokens);
        if let Some(counted) = usage.prompt_tokens {
            self.learn(prompt, counted);
            self.shadow.counted(&prompt.chunks, &prompt.spread(counted));
        }
        let (_, resident) = self.shadow.hit(&prompt.chunks);
        let beyond = tokens.saturating_sub(resident);
        let answer = usage.completion_tokens.unwrap_or(0);
        self.shadow
            .finished(&prompt.chunks, held.chunks, beyond.saturating_add(answer));
        self.note();
    }

    /// The engine said, or did not say, what it had of a prompt.
    ///
    /// An answer without any count, of an engine that counts, is none: it refused the request.
    pub(super) fn observe(&mut self, prompt: &Prompt, held: Held, predicted: u32, usage: Usage) {
        let counts = usage != Usage::default();
        self.counts |= counts;
        let silent = !counts && self.counts;
        if prompt.chunks.is_empty() || silent || held.life != self.life {
            return;
        }
        let grain = prompt.grain_tokens();
        // An estimate of lengths that was too high is no wrong belief of what is resident.
        let predicted = match (usage.prompt_tokens, held.cached.checked_sub(1)) {
            (Some(counted), Some(last)) => {
                predicted.min(prompt.spread(counted).tokens_at(last, (0, 0)))
            }
            _ => predicted,
        };
        if let Some(reported) = usage.cached_tokens {
            self.shadow.correct(predicted, reported, grain);
        }
        let told = match self.check.observe(predicted, usage.cached_tokens, grain) {
            Verdict::Same => None,
            Verdict::Restored => Some(GradeChange::Restored),
            Verdict::Overpredicted => Some(GradeChange::Overpredicted),
            Verdict::Silent => Some(GradeChange::Silent),
        };
        self.told = told.or(self.told);
        self.publisher.set_grade(self.check.grade());
        self.note();
    }

    /// Time passed: without a grade nothing is believed for long.
    pub(super) fn pass(&mut self, now: Now) {
        if self.check.grade() == Grade::Blind && now.since(self.forgotten) >= BLIND_FOR {
            // Everything gets one to two of these spans.
            self.forgotten = now;
            self.shadow.forget_before(self.mark);
            self.mark = self.shadow.mark();
            self.note();
        }
    }

    /// The engine is another one, or was away: its cache may be empty.
    pub(super) fn lost(&mut self) {
        self.life = self.life.wrapping_add(1);
        self.shadow = Shadow::new(self.kv_tokens);
        self.mark = 0;
        self.counts = false;
        self.check.reset();
        self.publisher = Publisher::new(self.incarnation, self.life, self.check.grade());
    }

    fn note(&mut self) {
        self.publisher.note(self.shadow.take_changes());
    }

    pub(super) fn news(&self) -> (u64, bool) {
        (self.life, self.publisher.is_pending())
    }

    pub(super) const fn publisher(&mut self) -> &mut Publisher {
        &mut self.publisher
    }

    pub(super) fn take_grade_change(&mut self) -> Option<GradeChange> {
        self.told.take()
    }

    pub(super) const fn grade(&self) -> Grade {
        self.check.grade()
    }

    pub(super) fn resident_chunks(&self) -> usize {
        self.shadow.len()
    }

    pub(super) const fn totals(&self) -> (u64, u64) {
        self.check.totals()
    }
}
