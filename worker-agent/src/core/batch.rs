//! What the engine computes, reconstructed from what was given to it.
//!
//! Engines expose no iterations; the agent is the engine's only client, so what it gave and what came
//! back say enough. A prompt is pending until its first token; how far the oldest one is follows from the
//! latency model. Only the oldest is let shrink: the others wait for its sign, so that an engine slower
//! than its model is not given more and more.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use forebay_proto::Now;
use forebay_scheduler::learn::Spell;
use forebay_scheduler::model::{Backlog, Profile};

use super::placement::PlacementId;

/// A spell of prefills is looked at when so many chunks are done, or none is left.
const CHUNKS: f64 = 4.0;
/// Fewer tokens say little of the time between them.
const LEAST_TOKENS: u32 = 8;

/// The engine, as far as it can be told.
#[derive(Debug, Default)]
pub(super) struct Batch {
    at: Now,
    /// In the order in which they were given.
    prefills: VecDeque<Prefill>,
    decodes: BTreeMap<PlacementId, Decode>,
    /// Of the decodes: tokens of their prompts, and the sum of [`Done::iterations`] at their starts.
    prompts: f64,
    starts: f64,
    done: Done,
    spell: Option<Prefilling>,
}

/// A prompt as it is given to the engine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prefill {
    pub(super) id: PlacementId,
    /// Tokens of the prompt.
    pub(super) prompt: f64,
    /// Those that have to be computed and are not yet, and their attention pairs.
    pub(super) tokens: f64,
    pub(super) pairs: f64,
    /// Its first token comes without a sign: the answer comes whole.
    pub(super) unseen: bool,
}

#[derive(Clone, Copy, Debug)]
struct Decode {
    /// Its first token, where that was seen.
    seen: Option<Now>,
    prompt: f64,
    before: Done,
}

/// All that was computed so far. Decodes and context are summed over the iterations.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    iterations: f64,
    decodes: f64,
    context_tokens: f64,
    prefill_tokens: f64,
    pairs: f64,
}

/// Prefills that follow each other without a gap.
#[derive(Clone, Copy, Debug)]
struct Prefilling {
    since: Now,
    before: Done,
    tokens: f64,
    pairs: f64,
    /// Time in it that went to something else.
    other_ms: f64,
    /// Something was given up, or went by unseen: it says nothing.
    void: bool,
}

impl Batch {
    /// Lets time pass.
    pub(super) fn advance(&mut self, now: Now, profile: Option<&Profile>) {
        let mut left_ms = now.since(self.at).as_secs_f64() * 1e3;
        self.at = self.at.max(now);
        let Some(profile) = profile else { return };
        while left_ms > 0.0 {
            let (decodes, context) = (self.decodes.len() as f64, self.context_tokens());
            match self.prefills.front_mut() {
                Some(head) if head.tokens > 0.0 => {
                    let token_ms = head.token_ms(profile, decodes, context);
                    let tokens = (left_ms / token_ms).min(head.tokens);
                    let pairs = head.pairs * tokens / head.tokens;
                    left_ms -= tokens * token_ms;
                    head.tokens -= tokens;
                    head.pairs -= pairs;
                    if head.tokens < 1e-6 {
                        head.tokens = 0.0;
                    }
                    let chunk = profile.chunk_beside(decodes);
                    self.compute(tokens / chunk, tokens, pairs);
                }
                Some(head) if head.unseen => {
                    let head = *head;
                    self.prefills.pop_front();
                    self.decode(&head, None);
                }
                _ if decodes > 0.0 => {
                    let iteration_ms = profile.iteration_ms(0.0, decodes, context, 0.0).max(1e-3);
                    self.compute(left_ms / iteration_ms, 0.0, 0.0);
                    return;
                }
                _ => return,
            }
        }
    }

    fn compute(&mut self, iterations: f64, prefill_tokens: f64, pairs: f64) {
        let (decodes, context) = (self.decodes.len() as f64, self.context_tokens());
        self.done.iterations += iterations;
        self.done.decodes += decodes * iterations;
        self.done.context_tokens += context * iterations;
        self.done.prefill_tokens += prefill_tokens;
        self.done.pairs += pairs;
    }

    /// A prompt goes to the engine. Without a model an unseen one is taken to decode at once.
    pub(super) fn give(&mut self, prefill: Prefill, profile: Option<&Profile>) {
        if prefill.unseen && profile.is_none() {
            return self.decode(&prefill, None);
        }
        if self.prefills.is_empty() {
            let decodes = self.decodes.len() as f64;
            let iteration =
                |profile: &Profile| profile.iteration_ms(0.0, decodes, self.context_tokens(), 0.0);
            self.spell = Some(Prefilling {
                since: self.at,
                before: self.done,
                tokens: 0.0,
                pairs: 0.0,
                // It comes somewhere in the middle of one.
                other_ms: profile.map_or(0.0, iteration) / 2.0,
                void: false,
            });
        }
        if let Some(spell) = &mut self.spell {
            spell.void |= prefill.unseen;
            spell.tokens += prefill.tokens;
            spell.pairs += prefill.pairs;
        }
        self.prefills.push_back(prefill);
    }

    /// Its first token came. Returns the spell that ends with it.
    pub(super) fn first_token(
        &mut self,
        id: PlacementId,
        profile: Option<&Profile>,
    ) -> Option<Spell> {
        let at = self.prefills.iter().position(|prefill| prefill.id == id)?;
        let prefill = self.prefills.remove(at)?;
        // What the model had not let pass.
        self.done.prefill_tokens += prefill.tokens;
        self.done.pairs += prefill.pairs;
        self.decode(&prefill, Some(self.at));
        self.prefilled(profile?)
    }

    /// The spell of prefills that ends here, if one does.
    fn prefilled(&mut self, profile: &Profile) -> Option<Spell> {
        let spell = self.spell?;
        let (waiting, pairs) = self.pending();
        let tokens = spell.tokens - waiting;
        let enough = tokens >= CHUNKS * f64::from(profile.chunk_tokens);
        if !(self.prefills.is_empty() || enough) {
            return None;
        }
        self.spell = (!self.prefills.is_empty()).then_some(Prefilling {
            since: self.at,
            before: self.done,
            tokens: waiting,
            pairs,
            other_ms: 0.0,
            void: self.prefills.iter().any(|prefill| prefill.unseen),
        });
        let took_ms = self.at.since(spell.since).as_secs_f64() * 1e3 - spell.other_ms;
        // First tokens of one iteration do not come at the very same moment.
        let whole = took_ms > profile.floor_ms / 2.0;
        let done = self.done.beyond(&spell.before);
        let mean = |sum: f64| {
            if done.iterations > 0.0 {
                sum / done.iterations
            } else {
                0.0
            }
        };
        (whole && !spell.void).then(|| Spell {
            took_ms,
            iterations: None,
            prefill_tokens: tokens,
            pairs: spell.pairs - pairs,
            decodes: mean(done.decodes),
            context_tokens: mean(done.context_tokens),
        })
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
        self.starts -= decode.before.iterations;
        if self.decodes.is_empty() {
            (self.prompts, self.starts) = (0.0, 0.0);
        }
        let tokens = completion_tokens.filter(|tokens| *tokens >= LEAST_TOKENS)?;
        let took = self.at.since(decode.seen?);
        let done = self.done.beyond(&decode.before);
        (done.iterations > 0.0).then(|| Spell {
            took_ms: took.as_secs_f64() * 1e3,
            iterations: Some(f64::from(tokens) - 1.0),
            prefill_tokens: done.prefill_tokens,
            pairs: done.pairs,
            decodes: done.decodes / done.iterations,
            context_tokens: done.context_tokens / done.iterations,
        })
    }

    fn decode(&mut self, prefill: &Prefill, seen: Option<Now>) {
        self.prompts += prefill.prompt;
        self.starts += self.done.iterations;
        let decode = Decode {
            seen,
            prompt: prefill.prompt,
            before: self.done,
        };
        self.decodes.insert(prefill.id, decode);
    }

    /// What it has before it.
    pub(super) fn backlog(&self) -> Backlog {
        let (pending_tokens, pending_pairs) = self.pending();
        Backlog {
            pending_tokens,
            pending_pairs,
            decodes: self.decodes.len() as f64,
            context_tokens: self.context_tokens(),
        }
    }

    /// Prompt tokens that it was given and has not computed, and their attention pairs.
    fn pending(&self) -> (f64, f64) {
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
        let said = self.done.iterations * self.decodes.len() as f64 - self.starts;
        (self.prompts + said).max(0.0)
    }

    /// When no more than so many tokens will be pending, unless a sign comes before; `None`: only after a
    /// sign.
    pub(super) fn down_to(&self, tokens: f64, profile: &Profile) -> Option<Now> {
        let excess = self.pending().0 - tokens;
        let head = self.prefills.front()?;
        let goes = if head.unseen { head.tokens } else { excess };
        if head.tokens < goes {
            return None;
        }
        let (decodes, context) = (self.decodes.len() as f64, self.context_tokens());
        let ms = goes.min(excess) * head.token_ms(profile, decodes, context);
        // Rounded up: a moment too early would be asked for again and again.
        let wait = Duration::try_from_secs_f64(ms.max(0.0) / 1e3).unwrap_or(Duration::MAX);
        Some(self.at + wait + Duration::from_micros(1))
    }
}

impl Prefill {
    /// How long one of its tokens takes.
    fn token_ms(&self, profile: &Profile, decodes: f64, context: f64) -> f64 {
        let linear = 1.0 / profile.drain_per_ms(decodes, context).max(1e-9);
        let pairs = if self.tokens > 0.0 {
            self.pairs / self.tokens
        } else {
            0.0
        };
        (linear + pairs * profile.pair_ms).max(1e-9)
    }
}

impl Done {
    fn beyond(&self, before: &Self) -> Self {
        Self {
            iterations: self.iterations - before.iterations,
            decodes: self.decodes - before.decodes,
            context_tokens: self.context_tokens - before.context_tokens,
            prefill_tokens: self.prefill_tokens - before.prefill_tokens,
            pairs: self.pairs - before.pairs,
        }
    }
}
