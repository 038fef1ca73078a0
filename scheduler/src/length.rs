//! How many tokens a prompt makes, before an engine has counted them.
//!
//! Tokens are not bytes: a byte of English is a quarter of one, a digit may be a whole one. A prompt's
//! canonical bytes are counted by [`Class`] while they are hashed, and what a byte of each class is worth is
//! learnt for each model from what its engine counts ([`Lengths`]): recursive least squares on ratios to
//! nominal worths, as [`crate::learn`] does for times. What a worker holds of a prompt was counted there;
//! only the rest is predicted, and corrected by how the prediction does on the part that was counted.
//!
//! How far predictions are off is learnt beside it: its 0.95 quantile widens that of the time to first token.

use crate::learn::Quantile;

/// What a canonical byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// `a` to `z`
    Lower,
    /// `A` to `Z`
    Upper,
    /// `0` to `9`
    Digit,
    /// Space, line feeds and other controls.
    Space,
    /// The rest of ASCII.
    Punctuation,
    /// The first of a character's two bytes: Cyrillic, Arabic, accents. Those that follow are not counted.
    Two,
    /// The first of three or four: Chinese, Japanese, Korean, emoji.
    Three,
    /// Around a string inside JSON.
    Quote,
    /// Structure: what a template puts around messages and tools.
    Tag,
    /// Not a byte: an image, a sound or a file.
    Medium,
}

/// Number of classes.
pub const CLASSES: usize = 10;

/// Tokens for one of each class, where nothing was learnt: least squares over 700 conversations and the
/// vocabularies of Qwen 3, Llama 3.1 and Gemma 3 (`docs/evidence/prompt-length.md`); quotes and media
/// were not in them.
const NOMINAL: Worths = [0.27, 0.79, 0.97, 0.05, 0.45, 0.40, 0.75, 0.30, 1.5, 800.0];

type Worths = [f64; CLASSES];

/// Bytes of each class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts([u64; CLASSES]);

impl Counts {
    /// Counts text as it stands in a canonical form.
    pub fn count(&mut self, bytes: &[u8]) {
        for block in bytes.chunks(BLOCK) {
            self.add(&block_counts(block));
        }
    }

    /// One more of a class.
    pub fn one(&mut self, class: Class) {
        self.0[class as usize] += 1;
    }

    fn add(&mut self, few: &Few) {
        for (count, few) in self.0.iter_mut().zip(few) {
            *count += u64::from(*few);
        }
    }

    fn worth(&self, worths: &Worths) -> f64 {
        let each = self.0.iter().zip(worths);
        each.map(|(count, worth)| *count as f64 * worth).sum()
    }
}

/// Counts of one chunk.
pub(crate) type Few = [u16; CLASSES];

/// Bytes that a counter of eight bits can count.
const BLOCK: usize = 128;

/// Counts of few enough bytes, by loops that compilers make vectors of.
fn block_counts(block: &[u8]) -> Few {
    let many = |is: fn(u8) -> bool| {
        let count = block
            .iter()
            .fold(0_u8, |count, byte| count + u8::from(is(*byte)));
        u16::from(count)
    };
    let mut few = Few::default();
    let lower = many(|byte| byte.wrapping_sub(b'a') < 26);
    let upper = many(|byte| byte.wrapping_sub(b'A') < 26);
    let digit = many(|byte| byte.wrapping_sub(b'0') < 10);
    let space = many(|byte| byte <= b' ');
    let mut ascii = block.len() as u16;
    if !block.is_ascii() {
        let from = |least: fn(u8) -> bool| many(least);
        let quotes = from(|byte| byte >= 0xfc);
        let tags = from(|byte| byte >= 0xfe);
        let invalid = from(|byte| byte >= 0xf5);
        let three = from(|byte| byte >= 0xe0);
        let two = from(|byte| byte >= 0xc0);
        ascii -= from(|byte| byte >= 0x80);
        few[Class::Two as usize] = two - three;
        few[Class::Three as usize] = three - invalid;
        few[Class::Quote as usize] = quotes - tags;
        few[Class::Tag as usize] = tags;
    }
    few[Class::Lower as usize] = lower;
    few[Class::Upper as usize] = upper;
    few[Class::Digit as usize] = digit;
    few[Class::Space as usize] = space;
    few[Class::Punctuation as usize] = ascii - lower - upper - digit - space;
    few
}

/// What a prompt is made of, chunk by chunk, so that what is held of it can be told from the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Makeup {
    chunks: Vec<Few>,
    /// Behind the last full chunk that has a fingerprint.
    rest: Counts,
    /// The prompt is given in token ids: so many.
    ids: Option<u64>,
}

impl Makeup {
    /// Room for a prompt of so many chunks.
    #[must_use]
    pub(crate) fn with_capacity(chunks: usize) -> Self {
        Self {
            chunks: Vec::with_capacity(chunks),
            ..Self::default()
        }
    }

    /// One more full chunk.
    pub(crate) fn chunk(&mut self, bytes: &[u8]) {
        let mut few = Few::default();
        for block in bytes.chunks(BLOCK) {
            let counts = block_counts(block);
            few.iter_mut()
                .zip(counts)
                .for_each(|(sum, count)| *sum += count);
        }
        self.chunks.push(few);
    }

    /// What comes behind the last full chunk.
    pub(crate) const fn rest(&mut self) -> &mut Counts {
        &mut self.rest
    }

    /// An image, a sound or a file in the chunk that is under way, or behind all of them.
    pub(crate) fn medium(&mut self) {
        // That of the last full one is near enough. All that is beyond what has a fingerprint may be there.
        let last = self.chunks.last_mut();
        match last.and_then(|few| few.get_mut(Class::Medium as usize)) {
            Some(media) if *media < u16::MAX => *media += 1,
            Some(_) | None => self.rest.one(Class::Medium),
        }
    }

    /// Its length is known.
    pub(crate) const fn given_in_ids(&mut self, ids: u64) {
        self.ids = Some(ids);
    }

    /// Nothing of it has a fingerprint.
    pub(crate) fn without_chunks(&mut self) {
        for few in std::mem::take(&mut self.chunks) {
            self.rest.add(&few);
        }
    }

    /// Something that is not chat or completion: text of so many bytes.
    #[must_use]
    pub fn of_size(bytes: u64) -> Self {
        let mut makeup = Self::default();
        // A fifth of a text's bytes are spaces.
        makeup.rest.0[Class::Space as usize] = bytes / 5;
        makeup.rest.0[Class::Lower as usize] = bytes - bytes / 5;
        makeup
    }

    /// Leading chunks, and what is behind them.
    fn split(&self, chunks: usize) -> (Counts, Counts) {
        let (mut held, mut rest) = (Counts::default(), self.rest);
        let (before, behind) = self.chunks.split_at(chunks.min(self.chunks.len()));
        before.iter().for_each(|few| held.add(few));
        behind.iter().for_each(|few| rest.add(few));
        (held, rest)
    }

    fn all(&self) -> Counts {
        self.split(0).1
    }
}

/// A predicted length in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Length {
    /// The likely one.
    pub tokens: f64,
    /// How much longer it may be, at the 0.95 quantile.
    pub longer: f64,
}

/// What bytes are worth to one model's tokenizer, as far as it is learnt.
#[derive(Clone, Debug)]
pub struct Lengths {
    ratios: Worths,
    doubt: [Worths; CLASSES],
    tail: Quantile,
}

impl Default for Lengths {
    fn default() -> Self {
        Self {
            ratios: [1.0; CLASSES],
            doubt: prior(1.0),
            tail: Quantile::new(0.95, FIRST_TAIL),
        }
    }
}

/// Before anything was measured: what nominal worths leave.
const FIRST_TAIL: f64 = 1.35;
/// Ratios to the nominal worths stay within these.
const LEAST: f64 = 0.1;
const MOST: f64 = 10.0;
/// How far ratios may be from 1, as standard deviations: all together, and each by itself.
const TOGETHER: f64 = 0.3;
const APART: f64 = 0.4;
/// Share of the prior's doubt that comes back with every prompt: what is asked changes.
const FORGET: f64 = 2e-4;
/// What a count is off by, relative to the prediction.
const NOISE: f64 = 0.1;
/// A count that is more than this off counts as if it were so.
const OUTLIER: f64 = 1.0;
/// Shorter prompts say more of templates than of text.
const LEAST_TOKENS: f64 = 32.0;
/// Tokens as whose evidence the nominal mix of text counts, against that of the part that was counted.
const DOUBTFUL: f64 = 200.0;
/// How far that part may move the rest.
const BENDS: std::ops::RangeInclusive<f64> = 0.5..=2.0;

impl Lengths {
    /// The length of a prompt, of which the first `held` chunks have `counted` tokens.
    #[must_use]
    pub fn predict(&self, makeup: &Makeup, held: u32, counted: u32) -> Length {
        if let Some(ids) = makeup.ids {
            let tokens = ids.max(1) as f64;
            return Length {
                tokens,
                longer: 0.0,
            };
        }
        let worths = self.worths();
        let (held, rest) = makeup.split(held as usize);
        let (held, rest) = (held.worth(&worths), rest.worth(&worths));
        let counted = f64::from(counted);
        // A conversation goes on in its own language.
        let bend = (counted + DOUBTFUL) / (held + DOUBTFUL);
        let bend = if held > 0.0 {
            bend.clamp(*BENDS.start(), *BENDS.end())
        } else {
            1.0
        };
        let rest = rest * bend;
        Length {
            tokens: (counted + rest).ceil().max(1.0),
            longer: rest * (self.tail.value() - 1.0).max(0.0),
        }
    }

    /// An engine counted this prompt. A count that says nothing, or nonsense, changes nothing.
    pub fn learn(&mut self, makeup: &Makeup, tokens: u32) {
        let worths = self.worths();
        let counts = makeup.all();
        let predicted = counts.worth(&worths);
        let tokens = f64::from(tokens);
        if makeup.ids.is_some() || predicted < LEAST_TOKENS || tokens < LEAST_TOKENS {
            return;
        }
        self.tail.observe(tokens / predicted);
        // Relative to the prediction, so that long prompts do not drown short ones.
        let x: Worths = std::array::from_fn(|at| counts.0[at] as f64 * NOMINAL[at] / predicted);
        let off = (tokens / predicted - 1.0).clamp(-OUTLIER, OUTLIER);
        self.update(&x, off);
    }

    fn update(&mut self, x: &Worths, off: f64) {
        let prior = prior(FORGET);
        for (row, fresh) in self.doubt.iter_mut().zip(prior) {
            for (cell, fresh) in row.iter_mut().zip(fresh) {
                *cell = *cell * (1.0 - FORGET) + fresh;
            }
        }
        let along: Worths = std::array::from_fn(|at| dot(&self.doubt[at], x));
        let spread = dot(&along, x) + NOISE * NOISE;
        for at in 0..CLASSES {
            let ratio = self.ratios[at] + along[at] / spread * off;
            self.ratios[at] = ratio.clamp(LEAST, MOST);
            for other in 0..CLASSES {
                self.doubt[at][other] -= along[at] * along[other] / spread;
            }
        }
    }

    fn worths(&self) -> Worths {
        std::array::from_fn(|at| NOMINAL[at] * self.ratios[at])
    }
}

/// The doubt before any data, times `share`.
fn prior(share: f64) -> [Worths; CLASSES] {
    std::array::from_fn(|row| {
        std::array::from_fn(|column| {
            let apart = if row == column { APART * APART } else { 0.0 };
            share * (TOGETHER * TOGETHER + apart)
        })
    })
}

fn dot(one: &Worths, other: &Worths) -> f64 {
    one.iter().zip(other).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests;
