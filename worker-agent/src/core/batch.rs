//! What the engine computes, reconstructed from what was given to it.
//!
//! Engines expose no iterations; the agent is the engine's only client, so what it gave and what came
//! back say enough. Prefills go through in chunks, in the order in which they were given, each iteration
//! as long as the latency model says; each first token that comes sets the reconstruction right. Behind
//! one whose first token is due and has not come no more than a chunk is taken to be computed: an engine
//! slower than its model is not given more and more.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use forebay_proto::Now;
use forebay_scheduler::learn::Spell;
use forebay_scheduler::model::{Backlog, Profile};

use super::placement::PlacementId;

/// A spell of prefills is looked at when it has had so many iterations, or none is left.
const ITERATIONS: f64 = 4.0;
/// Fewer tokens say little of the time between them.
const LEAST_TOKENS: u32 = 8;

/// The engine, as far as it can be told.
#[derive(Debug, Default)]
pub(super) struct Batch {
    at: Now,
    /// In the order in which they were given.
    prefills: VecDeque<Prefill>,
    decodes: BTreeMap<PlacementId, Decode>,
    /// Of the decodes: tokens of their prompts, and the sum of the iterations before their starts.
    prompts: f64,
    starts: f64,
    /// The iteration under way, where that has a part of a prefill.
    step: Option<Step>,
    /// Such iterations so far.
    steps: u64,
    /// An iteration with decodes only is under way until about then.
    joins: Now,
    /// Tokens taken to be computed of prompts behind one whose first token has not come.
    ahead: f64,
    done: Done,
    spell: Option<Prefilling>,
}

/// A prompt as it is given to the engine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prefill {
    pub(super) id: PlacementId,
    /// Tokens of the prompt.
    pub(super) prompt: f64,
    /// Those that have to be computed and were not part of an iteration yet, and their attention pairs.
    pub(super) tokens: f64,
    pub(super) pairs: f64,
    /// Its first token comes without a sign: the answer comes whole.
    pub(super) unseen: bool,
    /// Number of the step with its last part.
    pub(super) last: u64,
}

#[derive(Clone, Copy, Debug)]
struct Decode {
    /// Its first token, where that was seen.
    seen: Option<Now>,
    prompt: f64,
    before: Done,
}

/// One iteration with parts of prefills.
#[derive(Clone, Copy, Debug)]
struct Step {
    takes: Duration,
    ends: Now,
    tokens: f64,
    pairs: f64,
}

/// What iterations computed, summed over them.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    /// All, and those of them that took the floor.
    iterations: f64,
    floors: f64,
    /// Tokens of the others, prefilled or decoded.
    tokens: f64,
    context_tokens: f64,
    pairs: f64,
}

/// All that was computed so far, with decodes alone and beside prefills.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    alone: Sums,
    beside: Sums,
}

/// Prefills that follow each other without a gap.
#[derive(Clone, Copy, Debug)]
struct Prefilling {
    since: Now,
    before: Done,
    /// Something was given up, or went by unseen: it says nothing.
    void: bool,
}

impl Batch {
    /// Lets time pass.
    pub(super) fn advance(&mut self, now: Now, profile: Option<&Profile>) {
        let Some(profile) = profile else {
            self.at = self.at.max(now);
            return;
        };
        while self.at < now {
            match self.step {
                Some(step) if step.ends <= now => {
                    self.at = self.at.max(step.ends);
                    self.complete(profile);
                }
                Some(_) => self.at = now,
                None => {
                    self.decode_until(self.joins.min(now), profile);
                    if self.at < now && !self.begin(profile) {
                        self.decode_until(now, profile);
                    }
                }
            }
        }
    }

    /// Iterations with decodes only.
    fn decode_until(&mut self, until: Now, profile: &Profile) {
        let ms = until.since(self.at).as_secs_f64() * 1e3;
        self.at = self.at.max(until);
        let (decodes, context) = (self.decodes.len() as f64, self.context_tokens());
        let iteration_ms = profile.iteration_ms(0.0, decodes, context, 0.0);
        if ms > 0.0 && iteration_ms > 0.0 {
            let count = ms / iteration_ms;
            self.done.alone.add(count, decodes, context, 0.0, profile);
        }
    }

    /// Begins an iteration with what is to be prefilled; `false`: there is nothing, or it has to wait for
    /// a sign.
    fn begin(&mut self, profile: &Profile) -> bool {
        let decodes = self.decodes.len() as f64;
        let chunk = profile.chunk_beside(decodes);
        let mut ahead = chunk - self.ahead;
        let (mut tokens, mut pairs, mut overdue) = (0.0, 0.0, false);
        for prefill in &mut self.prefills {
            let mut most: f64 = chunk - tokens;
            if overdue {
                most = most.min(ahead);
            }
            let part = prefill.tokens.min(most);
            if part > 0.0 {
                let its_pairs = prefill.pairs * part / prefill.tokens;
                prefill.tokens -= part;
                prefill.pairs -= its_pairs;
                (tokens, pairs) = (tokens + part, pairs + its_pairs);
                prefill.last = self.steps + 1;
                if overdue {
                    ahead -= part;
                }
            } else if prefill.tokens > 0.0 {
                break;
            }
            overdue |= prefill.tokens <= 0.0 && prefill.last <= self.steps;
        }
        if tokens <= 0.0 {
            return false;
        }
        self.ahead = chunk - ahead;
        self.steps += 1;
        let ms = profile.iteration_ms(tokens, decodes, self.context_tokens(), pairs);
        let takes = Duration::try_from_secs_f64(ms / 1e3).unwrap_or(Duration::MAX);
        // Some time, so that time passes.
        let takes = takes.max(Duration::from_micros(1));
        self.step = Some(Step {
            takes,
            ends: self.at + takes,
            tokens,
            pairs,
        });
        true
    }

    /// The iteration under way is over.
    fn complete(&mut self, profile: &Profile) {
        let Some(step) = self.step.take() else { return };
        let (decodes, context) = (self.decodes.len() as f64, self.context_tokens());
        let tokens = step.tokens + decodes;
        self.done
            .beside
            .add(1.0, tokens, context, step.pairs, profile);
        // Those whose first token nobody sees.
        while let Some(prefill) = self
            .prefills
            .pop_front_if(|prefill| prefill.unseen && prefill.tokens <= 0.0)
        {
            self.decode(&prefill, None);
        }
    }

    /// A prompt goes to the engine. Without a model an unseen one is taken to decode at once.
    pub(super) fn give(&mut self, prefill: Prefill, profile: Option<&Profile>) {
        let Some(profile) = profile else {
            if prefill.unseen {
                self.decode(&prefill, None);
            } else {
                self.prefills.push_back(prefill);
            }
            return;
        };
        if self.prefills.is_empty() {
            let ms = profile.joining_ms(&self.backlog());
            self.joins = self.at + Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default();
            self.spell = Some(Prefilling {
                since: self.joins,
                before: self.done,
                void: false,
            });
        }
        if let Some(spell) = &mut self.spell {
            spell.void |= prefill.unseen;
        }
        let nothing = prefill.tokens <= 0.0;
        if nothing && prefill.unseen {
            self.decode(&prefill, None);
        } else {
            self.prefills.push_back(prefill);
        }
    }

    /// Its first token came. Returns the spell that ends with it.
    pub(super) fn first_token(
        &mut self,
        id: PlacementId,
        profile: Option<&Profile>,
    ) -> Option<Spell> {
        let at = self.prefills.iter().position(|prefill| prefill.id == id)?;
        let prefill = self.prefills.remove(at)?;
        if let Some(profile) = profile {
            self.sign(&prefill, profile);
        }
        self.decode(&prefill, Some(self.at));
        self.prefilled(profile?)
    }

    /// Sets right what is believed by what came.
    fn sign(&mut self, prefill: &Prefill, profile: &Profile) {
        self.ahead = 0.0;
        if prefill.tokens > 0.0 || prefill.last == self.steps {
            // Earlier than the model says.
            self.complete(profile);
        } else if let Some(step) = &mut self.step {
            // The iteration that is believed to be under way begins only here.
            step.ends = step.ends.max(self.at + step.takes);
        }
        if prefill.tokens > 0.0 {
            let (decodes, context) = (self.decodes.len() as f64, self.context_tokens());
            let count = prefill.tokens / profile.chunk_beside(decodes);
            let tokens = profile.chunk_beside(decodes) + decodes;
            let sums = &mut self.done.beside;
            sums.add(count, tokens, context, prefill.pairs / count, profile);
        }
    }

    /// The spell of prefills that ends here, if one does.
    fn prefilled(&mut self, profile: &Profile) -> Option<Spell> {
        let spell = self.spell?;
        let done = self.done.beyond(&spell.before);
        if !(self.prefills.is_empty() || done.beside.iterations >= ITERATIONS) {
            return None;
        }
        self.spell = (!self.prefills.is_empty()).then_some(Prefilling {
            since: self.at,
            before: self.done,
            void: self.prefills.iter().any(|prefill| prefill.unseen),
        });
        let took_ms = self.at.since(spell.since).as_secs_f64() * 1e3;
        // First tokens of one iteration do not come at the very same moment.
        let whole = took_ms > profile.floor_ms / 2.0;
        (whole && !spell.void).then(|| done.beside.spell(took_ms, 0.0))
    }

    /// It is over. Returns the spell of its decode, where the engine counted its tokens.
    pub(super) fn end(&mut self, id: PlacementId, completion_tokens: Option<u32>) -> Option<Spell> {
        if let Some(at) = self.prefills.iter().position(|prefill| prefill.id == id) {
            self.prefills.remove(at);
            match &mut self.spell {
                Some(spell) if !self.prefills.is_empty() => spell.void = true,
                spell => *spell = None,
            }
            return None;
        }
        let decode = self.decodes.remove(&id)?;
        self.prompts -= decode.prompt;
        self.starts -= decode.before.iterations();
        if self.decodes.is_empty() {
            (self.prompts, self.starts) = (0.0, 0.0);
        }
        let tokens = completion_tokens.filter(|tokens| *tokens >= LEAST_TOKENS)?;
        let took = self.at.since(decode.seen?);
        let done = self.done.beyond(&decode.before);
        // One token an iteration: what is not known is how many had decodes alone.
        let counted = f64::from(tokens) - 1.0;
        let alone = counted - done.beside.iterations;
        if alone < 0.0 || done.alone.iterations <= 0.0 {
            return None;
        }
        let mut sums = done.alone.times(alone / done.alone.iterations);
        sums.extend(&done.beside);
        Some(sums.spell(took.as_secs_f64() * 1e3, done.beside.iterations / counted))
    }

    fn decode(&mut self, prefill: &Prefill, seen: Option<Now>) {
        self.prompts += prefill.prompt;
        self.starts += self.done.iterations();
        let decode = Decode {
            seen,
            prompt: prefill.prompt,
            before: self.done,
        };
        self.decodes.insert(prefill.id, decode);
    }

    /// Whether no part of a prefill can be taken to be computed next, before a sign.
    fn stuck(&self, profile: &Profile) -> bool {
        let chunk = profile.chunk_beside(self.decodes.len() as f64);
        let next = self
            .prefills
            .iter()
            .position(|prefill| prefill.tokens > 0.0);
        next.is_none_or(|next| next > 0 && self.ahead >= chunk)
    }

    /// What it has before it.
    pub(super) fn backlog(&self) -> Backlog {
        let (tokens, pairs) = self.waiting();
        let left = self.step.map(|step| step.left(self.at));
        let (under_way, its_pairs) = left.unwrap_or_default();
        Backlog {
            pending_tokens: tokens + under_way,
            pending_pairs: pairs + its_pairs,
            decodes: self.decodes.len() as f64,
            context_tokens: self.context_tokens(),
            ..Backlog::default()
        }
    }

    /// Prompt tokens that are for later iterations, and their attention pairs.
    fn waiting(&self) -> (f64, f64) {
        let prefills = self.prefills.iter();
        prefills.fold((0.0, 0.0), |(tokens, pairs), prefill| {
            (tokens + prefill.tokens, pairs + prefill.pairs)
        })
    }

    /// Tokens of the prompts that are not through.
    pub(super) fn prefilling_prompts(&self) -> f64 {
        self.prefills.iter().map(|prefill| prefill.prompt).sum()
    }

    fn context_tokens(&self) -> f64 {
        let said = self.done.iterations() * self.decodes.len() as f64 - self.starts;
        (self.prompts + said).max(0.0)
    }

    /// When to look again whether no more than so many tokens are pending; `None`: after a sign.
    pub(super) fn down_to(&self, tokens: f64, profile: &Profile) -> Option<Now> {
        // A moment too early would be asked for again and again.
        let just_after = |at: Now| at + Duration::from_micros(1);
        match self.step {
            Some(step) => {
                let room = tokens - self.waiting().0;
                let early = step.takes.mul_f64((room / step.tokens).clamp(0.0, 1.0));
                let left = step.ends.since(self.at).saturating_sub(early);
                Some(just_after(self.at + left))
            }
            None if self.stuck(profile) => None,
            None => Some(just_after(self.at.max(self.joins))),
        }
    }
}

impl Step {
    /// What is not computed of it.
    fn left(&self, at: Now) -> (f64, f64) {
        let share = self.ends.since(at).as_secs_f64() / self.takes.as_secs_f64();
        let share = share.min(1.0);
        (self.tokens * share, self.pairs * share)
    }
}

impl Sums {
    /// So many iterations, each with these tokens, context and pairs.
    fn add(&mut self, count: f64, tokens: f64, context: f64, pairs: f64, profile: &Profile) {
        self.iterations += count;
        if profile.base_ms + profile.token_ms * tokens > profile.floor_ms {
            self.tokens += count * tokens;
        } else {
            self.floors += count;
        }
        self.context_tokens += count * context;
        self.pairs += count * pairs;
    }

    fn spell(&self, took_ms: f64, mixed: f64) -> Spell {
        Spell {
            took_ms,
            floors: self.floors,
            linears: self.iterations - self.floors,
            tokens: self.tokens,
            context_tokens: self.context_tokens,
            pairs: self.pairs,
            mixed,
        }
    }

    fn times(&self, factor: f64) -> Self {
        Self {
            iterations: self.iterations * factor,
            floors: self.floors * factor,
            tokens: self.tokens * factor,
            context_tokens: self.context_tokens * factor,
            pairs: self.pairs * factor,
        }
    }

    fn extend(&mut self, other: &Self) {
        self.iterations += other.iterations;
        self.floors += other.floors;
        self.tokens += other.tokens;
        self.context_tokens += other.context_tokens;
        self.pairs += other.pairs;
    }
}

impl Done {
    fn iterations(&self) -> f64 {
        self.alone.iterations + self.beside.iterations
    }

    fn beyond(&self, before: &Self) -> Self {
        let mut beyond = *self;
        beyond.alone.extend(&before.alone.times(-1.0));
        beyond.beside.extend(&before.beside.times(-1.0));
        beyond
    }
}
