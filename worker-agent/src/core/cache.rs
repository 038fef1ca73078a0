//! What the agent believes of its engine's cache, and what it tells of it.

use std::time::Duration;

use forebay_proto::{Incarnation, Now};
use forebay_scheduler::residency::{Grade, Kept, Publisher, SelfCheck, Shadow, Spread, Verdict};

use super::kv::{Ahead, Exact, Promise, Seen, Turn};
use super::map::Map;
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
    pub(super) const fn spread(&self, prompt_tokens: u32) -> Spread {
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
    /// Those that its shadow has in the cache, and their tokens.
    cached: usize,
    tokens: u32,
    /// As the engine was given it, where its events are followed.
    turn: Option<Turn>,
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
    /// The engine's events say what its cache holds.
    Events,
    /// Some of them are missing for good: what the cache holds is guessed until they say it again.
    EventsLost,
    /// What they said did not hold, too often.
    EventsWrong,
}

/// What is known of the cache once the engine has said which process it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuity {
    /// Nothing is to be said: it is the process that was known, or nothing was held of any.
    Same,
    /// It is the process that a map was kept of, which goes on with so many chunks.
    Continued(usize),
    /// It is another process than the one that was known, or that a map was kept of: its cache is empty.
    Restarted,
    /// It does not say which process it is, so that a map that was kept is of no use.
    Unknown,
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
    /// The process whose cache this is, where the engine says.
    engine: Option<String>,
    /// Of the process that was before; it may be the one that answers next.
    map: Option<Map>,
    /// By the engine's events, where they are followed.
    exact: Option<Exact>,
    /// Whether what that predicts comes true.
    exact_check: SelfCheck,
    /// What is told of the cache is what events say.
    by_events: bool,
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
            engine: None,
            map: None,
            exact: None,
            exact_check: SelfCheck::default(),
            by_events: false,
        }
    }

    /// What is believed of predictions before the first answer; later, answers tell.
    pub(super) fn expect(&mut self, first: Grade) {
        if self.check.expect(first) {
            self.publisher.set_grade(self.grade());
        }
    }

    /// The engine's cache holds so many tokens.
    pub(super) fn holds(&mut self, kv_tokens: u64) {
        if self.kv_tokens != kv_tokens && self.shadow.is_empty() {
            self.shadow = Shadow::new(kv_tokens);
        }
        self.kv_tokens = kv_tokens;
        self.events(|exact| exact.holds_tokens(kv_tokens));
    }

    /// From here on the engine's events are followed. What was kept is gone on with if this is before
    /// [`Cache::engine_is`].
    pub(super) fn follow_events(&mut self, key: [u8; 16], can_ask: bool) {
        let mut exact = Exact::new(key, self.kv_tokens, can_ask);
        if self.engine.is_some() {
            exact.begin(None);
        }
        self.exact = Some(exact);
        self.note();
    }

    /// Does something with what is known by events.
    pub(super) fn events<T>(&mut self, act: impl FnOnce(&mut Exact) -> T) -> Option<T> {
        let done = act(self.exact.as_mut()?);
        self.note();
        Some(done)
    }

    /// What is known by events, where they are followed.
    pub(super) const fn exact(&self) -> Option<&Exact> {
        self.exact.as_ref()
    }

    /// What is known by events, where that is what is told.
    fn told_exact(&self) -> Option<&Exact> {
        self.exact.as_ref().filter(|_| self.by_events)
    }

    /// What was kept when this agent, or the link to its engine, was last there.
    pub(super) fn recall(&mut self, map: Map) {
        self.map = Some(map);
    }

    /// What to keep; `None` while it is not known which process it would be of.
    pub(super) fn map(&self) -> Option<Map> {
        let engine = self.engine.clone()?;
        // What is believed for a minute is not worth a file.
        let kept = match self.check.grade() {
            Grade::Blind => Kept::default(),
            Grade::Exact | Grade::Inferred => self.shadow.kept(),
        };
        Some(Map {
            engine,
            ratio: self.ratio,
            kept,
            exact: self.exact.as_ref().and_then(Exact::kept),
        })
    }

    /// Changes with everything that [`Cache::map`] shows.
    pub(super) fn version(&self) -> (u64, u64) {
        let events = self.exact.as_ref().map_or(0, Exact::version);
        (self.life, self.shadow.mark().wrapping_add(events))
    }

    /// The engine answers; it says that it is this process, or does not say. To be told before
    /// anything is placed on it.
    pub(super) fn engine_is(&mut self, process: Option<String>) -> Continuity {
        let map = self.map.take();
        let Some(process) = process else {
            return match map {
                Some(_) => Continuity::Unknown,
                None => Continuity::Same,
            };
        };
        match self.engine.replace(process) {
            Some(before) if self.engine.as_ref() == Some(&before) => Continuity::Same,
            Some(_) => {
                self.begin_events(None);
                self.begin_anew(Shadow::new(self.kv_tokens));
                Continuity::Restarted
            }
            None => match map {
                Some(map) if self.engine.as_ref() == Some(&map.engine) => {
                    self.begin_events(Some(&map));
                    self.ratio = map.ratio.or(self.ratio);
                    self.begin_anew(Shadow::restored(self.kv_tokens, &map.kept));
                    Continuity::Continued(self.resident_chunks())
                }
                other => {
                    self.begin_events(None);
                    self.note();
                    match other {
                        Some(_) => Continuity::Restarted,
                        None => Continuity::Same,
                    }
                }
            },
        }
    }

    /// A process of the engine is there, with what was kept of it.
    fn begin_events(&mut self, map: Option<&Map>) {
        if let Some(exact) = &mut self.exact {
            exact.begin(map.and_then(|map| map.exact.as_ref()));
        }
    }

    /// Tokens of the prompt that are believed to be resident; the last one never is.
    pub(super) fn hit(&self, prompt: &Prompt) -> u32 {
        if let Some(exact) = self.told_exact() {
            return exact.hit(&prompt.chunks, Ahead::Taken).tokens;
        }
        let (_, tokens) = self.shadow.hit(&prompt.chunks);
        tokens.min(prompt.tokens.saturating_sub(1))
    }

    /// The engine is given a prompt that was taken. Returns what it will find of it, by its events.
    pub(super) fn begun(&mut self, prompt: &Prompt, held: &mut Held) -> Option<Promise> {
        let exact = self.exact.as_mut().filter(|_| held.life == self.life)?;
        let (foreseen, turn) = exact.begun(&prompt.chunks, held.chunks, prompt.tokens);
        held.turn = Some(turn);
        exact.holds().then_some(foreseen)
    }

    /// Tokens up to the end of the last of these chunks that is resident; what is before one of a prompt is
    /// resident with it.
    pub(super) fn deepest(&self, chunks: &[u64]) -> u32 {
        let known = chunks.iter().rev();
        known
            .copied()
            .find_map(|chunk| self.tokens_to(chunk))
            .unwrap_or(0)
    }

    /// Tokens up to the end of a chunk that is believed to be resident.
    pub(super) fn tokens_to(&self, chunk: u64) -> Option<u32> {
        match self.told_exact() {
            Some(exact) => exact.tokens_to(chunk),
            None => self.shadow.tokens_to(chunk),
        }
    }

    /// The prompt was taken: it will be resident before anything that is taken later runs. Returns how
    /// many of its chunks are held for it.
    pub(super) fn taken(&mut self, prompt: &Prompt) -> Held {
        let (cached, tokens) = self.shadow.hit(&prompt.chunks);
        let spread = prompt.spread(self.estimate(prompt, cached, tokens));
        let chunks = self.shadow.taken(&prompt.chunks, &spread);
        if let Some(exact) = &mut self.exact {
            exact.taken(&prompt.chunks[..chunks], |chunk| {
                self.shadow.tokens_to(chunk)
            });
        }
        self.note();
        Held {
            chunks,
            cached,
            tokens: tokens.min(prompt.tokens.saturating_sub(1)),
            turn: None,
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
    pub(super) fn prefilled(&mut self, prompt: &Prompt, held: Held) {
        self.shadow.prefilled(&prompt.chunks);
        if let (Some(exact), Some(turn)) = (&mut self.exact, held.turn)
            && held.life == self.life
        {
            exact.computed(&prompt.chunks[..held.chunks], turn);
            self.note();
        }
    }

    /// The request is over and was not prefilled.
    pub(super) fn abandoned(&mut self, prompt: &Prompt, held: Held) {
        if held.life == self.life {
            self.shadow.abandoned(&prompt.chunks, held.chunks);
            if let Some(exact) = &mut self.exact {
                exact.abandoned(&prompt.chunks[..held.chunks], held.turn, prompt.tokens);
            }
            self.note();
        }
    }

    /// A request whose prompt was prefilled is over.
    pub(super) fn finished(&mut self, now: Now, prompt: &Prompt, held: Held, usage: Usage) {
        if held.life != self.life {
            return;
        }
        let tokens = usage.prompt_tokens.unwrap_or(prompt.tokens);
        let answer = usage.completion_tokens.unwrap_or(0);
        if let Some(exact) = &mut self.exact
            && held.turn.is_some()
        {
            let chunks = &prompt.chunks[..held.chunks];
            exact.finished(now, chunks, tokens.saturating_add(answer));
        }
        if let Some(counted) = usage.prompt_tokens {
            self.learn(prompt, counted);
            self.shadow.counted(&prompt.chunks, &prompt.spread(counted));
        }
        let (_, resident) = self.shadow.hit(&prompt.chunks);
        let beyond = tokens.saturating_sub(resident);
        self.shadow
            .finished(&prompt.chunks, held.chunks, beyond.saturating_add(answer));
        self.note();
    }

    /// The engine said, or did not say, what it had of a prompt, of which events foresaw so much.
    ///
    /// An answer without any count, of an engine that counts, is none: it refused the request.
    pub(super) fn observe(
        &mut self,
        prompt: &Prompt,
        held: Held,
        foreseen: Option<Promise>,
        usage: Usage,
    ) {
        let counts = usage != Usage::default();
        self.counts |= counts;
        let silent = !counts && self.counts;
        if prompt.chunks.is_empty() || silent || held.life != self.life {
            return;
        }
        if let Some(foreseen) = foreseen {
            self.judge(prompt, foreseen, usage.cached_tokens);
        }
        let grain = prompt.grain_tokens();
        // An estimate of lengths that was too high is no wrong belief of what is resident.
        let predicted = match (usage.prompt_tokens, held.cached.checked_sub(1)) {
            (Some(counted), Some(last)) => held
                .tokens
                .min(prompt.spread(counted).tokens_at(last, (0, 0))),
            _ => held.tokens,
        };
        if let Some(reported) = usage.cached_tokens {
            self.shadow.correct(predicted, reported, grain);
        }
        let told = match self.check.observe(predicted, usage.cached_tokens, grain) {
            Verdict::Same => None,
            // The shadow is not what is told.
            Verdict::Restored | Verdict::Overpredicted if self.by_events => None,
            Verdict::Restored => Some(GradeChange::Restored),
            Verdict::Overpredicted => Some(GradeChange::Overpredicted),
            Verdict::Silent => Some(GradeChange::Silent),
        };
        self.told = told.or(self.told);
        self.note();
    }

    /// Whether what events foresaw came true.
    fn judge(&mut self, prompt: &Prompt, foreseen: Promise, reported: Option<u32>) {
        let Some(exact) = &mut self.exact else { return };
        let block = exact.block_tokens().unwrap_or(1);
        if let Some(reported) = reported
            && !exact.judge(&prompt.chunks, foreseen, reported)
        {
            // That is no fault of the map.
            return;
        }
        let verdict = self
            .exact_check
            .observe(foreseen.tokens, reported, 2 * block);
        if verdict == Verdict::Overpredicted {
            exact.distrust();
            self.exact_check = SelfCheck::default();
            self.told = Some(GradeChange::EventsWrong);
        }
    }

    /// Time passed: without a grade nothing is believed for long.
    pub(super) fn pass(&mut self, now: Now) {
        if let Some(exact) = &mut self.exact {
            exact.pass(now);
            self.note();
        }
        if self.check.grade() == Grade::Blind && now.since(self.forgotten) >= BLIND_FOR {
            // Everything gets one to two of these spans.
            self.forgotten = now;
            self.shadow.forget_before(self.mark);
            self.mark = self.shadow.mark();
            self.note();
        }
    }

    /// The engine is away: the one that comes back may be another one, with an empty cache.
    pub(super) fn lost(&mut self) {
        self.map = self.map().or(self.map.take());
        self.engine = None;
        if let Some(exact) = &mut self.exact {
            exact.end();
        }
        self.begin_anew(Shadow::new(self.kv_tokens));
    }

    fn begin_anew(&mut self, shadow: Shadow) {
        self.life = self.life.wrapping_add(1);
        self.shadow = shadow;
        self.mark = 0;
        self.counts = false;
        self.check.reset();
        self.exact_check.reset();
        self.by_events = false;
        self.publisher = Publisher::new(self.incarnation, self.life, self.check.grade());
        self.note();
    }

    /// Takes over what changed. What is told are the events' map while it holds, and else the shadow.
    fn note(&mut self) {
        let guessed = self.shadow.take_changes();
        let known = self.exact.as_mut().map(Exact::take_changes);
        let holds = self.exact.as_ref().is_some_and(Exact::holds);
        let by_events = holds && self.exact_check.grade() != Grade::Blind;
        match (std::mem::replace(&mut self.by_events, by_events), by_events) {
            (true, true) => self.publisher.note(known.into_iter().flatten()),
            (false, false) => self.publisher.note(guessed),
            (false, true) => {
                self.publisher
                    .replace(self.exact.iter().flat_map(Exact::resident));
                self.told = Some(GradeChange::Events);
            }
            (true, false) => {
                self.publisher.replace(self.shadow.resident());
                let wrong = self.told == Some(GradeChange::EventsWrong);
                let why = if self.exact_check.grade() == Grade::Blind {
                    GradeChange::Silent
                } else {
                    GradeChange::EventsLost
                };
                self.told = if wrong { self.told } else { Some(why) };
            }
        }
        self.publisher.set_grade(self.grade());
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

    pub(super) fn grade(&self) -> Grade {
        match self.told_exact() {
            Some(exact) if exact.is_whole() => Grade::Exact,
            // Something is missing, and is being asked for.
            Some(_) => Grade::Inferred,
            None => self.check.grade(),
        }
    }

    pub(super) fn resident_chunks(&self) -> usize {
        self.told_exact().map_or(self.shadow.len(), Exact::len)
    }

    pub(super) fn totals(&self) -> (u64, u64) {
        let (predicted, reported) = self.check.totals();
        match self.told_exact().map(Exact::seen) {
            Some(seen) => {
                let Seen {
                    settled, promised, ..
                } = seen;
                (
                    settled.predicted + promised.predicted,
                    settled.reported + promised.reported,
                )
            }
            None => (predicted, reported),
        }
    }
}

#[cfg(test)]
mod tests {
    use forebay_proto::WorkerId;

    use super::*;

    const OWN: Incarnation = Incarnation {
        worker: WorkerId(1),
        grant: 1,
        start: 1,
    };

    fn warm(process: &str) -> Cache {
        let mut cache = Cache::new(OWN, 1, 10_000);
        assert_eq!(cache.engine_is(Some(process.into())), Continuity::Same);
        let prompt = Prompt {
            chunks: vec![1, 2, 3],
            bytes: 768,
            chunk_bytes: 256,
            tokens: 200,
        };
        let held = cache.taken(&prompt);
        cache.prefilled(&prompt, held);
        cache.finished(Now::default(), &prompt, held, Usage::default());
        cache
    }

    /// What becomes of the map of a process when the engine says this of itself.
    fn check(before: &str, says: Option<&str>, expected: Continuity, chunks: usize) {
        let says = || says.map(str::to_owned);
        // By another start of the agent,
        let mut cache = Cache::new(OWN, 2, 10_000);
        cache.recall(warm(before).map().unwrap());
        assert_eq!(cache.engine_is(says()), expected);
        assert_eq!(cache.resident_chunks(), chunks);
        assert_eq!(cache.engine_is(says()), Continuity::Same, "said once");
        // and by the same one, from which the engine was out of sight.
        let mut cache = warm(before);
        cache.lost();
        assert_eq!(cache.resident_chunks(), 0);
        let (life, _) = cache.news();
        assert_eq!(cache.engine_is(says()), expected);
        assert_eq!(cache.resident_chunks(), chunks);
        assert_eq!(cache.news().0 != life, chunks > 0, "followers are told");
    }

    #[test]
    fn a_map_goes_on_with_its_own_process_only() {
        check("e since 1", Some("e since 1"), Continuity::Continued(3), 3);
        check("e since 1", Some("e since 2"), Continuity::Restarted, 0);
        check("e since 1", None, Continuity::Unknown, 0);
    }

    #[test]
    fn a_restart_between_two_looks_empties_the_map() {
        let mut cache = warm("e since 1");
        assert_eq!(cache.engine_is(None), Continuity::Same, "a page was late");
        assert_eq!(cache.resident_chunks(), 3);
        let other = Some("e since 2".to_owned());
        assert_eq!(cache.engine_is(other), Continuity::Restarted);
        assert_eq!(cache.resident_chunks(), 0);
        assert_eq!(cache.map().unwrap().engine, "e since 2");
    }

    #[test]
    fn before_the_first_answer_the_kind_of_engine_says_what_is_believed() {
        let mut cache = Cache::new(OWN, 1, 10_000);
        assert_eq!(cache.grade(), Grade::Inferred);
        cache.expect(Grade::Blind);
        assert_eq!(cache.grade(), Grade::Blind);
        let prompt = Prompt {
            chunks: vec![1],
            bytes: 256,
            chunk_bytes: 256,
            tokens: 70,
        };
        let held = cache.taken(&prompt);
        let counted = Usage {
            prompt_tokens: Some(70),
            cached_tokens: Some(0),
            completion_tokens: Some(1),
        };
        for _ in 0..20 {
            cache.observe(&prompt, held, None, counted);
        }
        assert_eq!(cache.grade(), Grade::Inferred, "its answers say otherwise");
        cache.expect(Grade::Blind);
        assert_eq!(cache.grade(), Grade::Inferred, "and they count");
    }

    #[test]
    fn the_size_that_an_engine_tells_is_its_shadows() {
        let mut cache = Cache::new(OWN, 1, 0);
        cache.holds(100);
        let long = Prompt {
            chunks: (1..=8).collect(),
            bytes: 8 * 256,
            chunk_bytes: 256,
            tokens: 400,
        };
        for first in [0, 100] {
            let prompt = Prompt {
                chunks: long.chunks.iter().map(|chunk| chunk + first).collect(),
                ..long.clone()
            };
            let held = cache.taken(&prompt);
            cache.prefilled(&prompt, held);
            cache.finished(Now::default(), &prompt, held, Usage::default());
        }
        assert!(cache.resident_chunks() <= 2, "{}", cache.resident_chunks());
    }

    #[test]
    fn what_is_believed_for_a_minute_is_not_kept() {
        let mut cache = warm("e since 1");
        let prompt = Prompt {
            chunks: vec![1],
            bytes: 256,
            chunk_bytes: 256,
            tokens: 70,
        };
        for _ in 0..20 {
            let held = cache.taken(&prompt);
            let silent = Usage {
                prompt_tokens: Some(70),
                ..Usage::default()
            };
            cache.observe(&prompt, held, None, silent);
        }
        assert_eq!(cache.grade(), Grade::Blind);
        assert_eq!(cache.map().unwrap().kept, Kept::default());
    }
}
