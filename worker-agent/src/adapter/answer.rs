//! Reads an answer as it passes: whether it ended well, the token counts, and what a splice brought in, which
//! is taken out again.

use bytes::{Bytes, BytesMut};

use super::event::{FAILURES, Word, value, word};
use crate::core::Usage;

/// An event, or an answer, that is longer is passed on unread.
const MAX_HELD_BYTES: usize = 1 << 20;
const USAGE: &[u8] = b"\"usage\"";

/// Whether an answer that has come to its end is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is whole, as far as can be told.
    Whole,
    /// The engine failed within it, or somebody else ended it.
    Broken,
}

/// Reads a stream of server-sent events. What is not complete is held until it is.
///
/// An event that tells of a failure, and all behind it, is not passed on: nor is `[DONE]` where nothing said
/// why the stream ended, which engines send behind an error as well.
pub(crate) struct Events {
    strip_usage: bool,
    /// A stream that ended well has said why.
    says_why: bool,
    held: BytesMut,
    /// In an event that was too long to hold.
    overlong: bool,
    ended: bool,
    broken: bool,
    usage: Usage,
}

impl Events {
    /// With `strip_usage` the event that has nothing but the token counts is taken out; with `says_why` a
    /// stream without a finish reason is a broken one.
    #[must_use]
    pub(crate) fn new(strip_usage: bool, says_why: bool) -> Self {
        Self {
            strip_usage,
            says_why,
            held: BytesMut::new(),
            overlong: false,
            ended: false,
            broken: false,
            usage: Usage::default(),
        }
    }

    /// What the engine counted, as far as it has said.
    #[must_use]
    pub(crate) const fn usage(&self) -> Usage {
        self.usage
    }

    /// Whether the engine told of a failure: nothing more is passed on.
    #[must_use]
    pub(crate) const fn is_broken(&self) -> bool {
        self.broken
    }

    /// Takes a piece of the stream; returns what is to be passed on, in whole events.
    pub(crate) fn push(&mut self, piece: Bytes) -> Bytes {
        if self.broken {
            return Bytes::new();
        }
        let piece = if self.held.is_empty() {
            piece
        } else {
            self.held.extend_from_slice(&piece);
            self.held.split().freeze()
        };
        let Some(end) = last_end(&piece) else {
            return self.hold(piece);
        };
        let mut whole = piece;
        let rest = whole.split_off(end);
        if std::mem::take(&mut self.overlong) {
            // Its end: unread, as its beginning was.
            let first = first_end(&whole).unwrap_or(end);
            let tail = whole.split_to(first);
            let events = self.read(whole);
            return self.and_hold(join(tail, events), rest);
        }
        let events = self.read(whole);
        self.and_hold(events, rest)
    }

    /// The stream's end: what is left of it, and whether it is whole.
    pub(crate) fn finish(&mut self) -> (Bytes, Verdict) {
        let rest = self.held.split().freeze();
        self.broken |= self.says_why && !self.ended;
        if self.broken {
            (Bytes::new(), Verdict::Broken)
        } else {
            (rest, Verdict::Whole)
        }
    }

    fn and_hold(&mut self, ready: Bytes, rest: Bytes) -> Bytes {
        if self.broken {
            return ready;
        }
        let passed = self.hold(rest);
        join(ready, passed)
    }

    fn hold(&mut self, piece: Bytes) -> Bytes {
        if self.overlong || piece.len() > MAX_HELD_BYTES {
            self.overlong = true;
            // It may have said why the stream ends.
            self.ended = true;
            return piece;
        }
        self.held.extend_from_slice(&piece);
        Bytes::new()
    }

    /// Whole events. Nearly all are passed on as they came, and in one piece.
    fn read(&mut self, events: Bytes) -> Bytes {
        let mut out = BytesMut::new();
        let (mut from, mut at) = (0, 0);
        while let Some(end) = first_end(&events[at..]) {
            let event = at..at + end;
            at = event.end;
            if self.passes(&events[event.clone()]) {
                continue;
            }
            if self.broken {
                out.extend_from_slice(&events[from..event.start]);
                return out.freeze();
            }
            out.extend_from_slice(&events[from..event.start]);
            from = event.end;
        }
        if from == 0 {
            return events;
        }
        out.extend_from_slice(&events[from..]);
        out.freeze()
    }

    fn passes(&mut self, event: &[u8]) -> bool {
        match word(event, self.ended) {
            Word::Nothing => {}
            Word::Ends => self.ended = true,
            Word::Fails => {
                self.broken = true;
                return false;
            }
            Word::Done if self.says_why && !self.ended => {
                self.broken = true;
                return false;
            }
            Word::Done => return true,
        }
        let Some(read) = read_event(event) else {
            return true;
        };
        self.usage = read.usage;
        !(read.only_counts && self.strip_usage)
    }
}

/// Reads an answer that comes whole. It is passed on as it comes.
#[derive(Default)]
pub(crate) struct Answers {
    held: BytesMut,
    overlong: bool,
}

impl Answers {
    /// Looks at a piece.
    pub(crate) fn push(&mut self, piece: &Bytes) {
        if self.overlong || self.held.len() + piece.len() > MAX_HELD_BYTES {
            self.overlong = true;
            self.held = BytesMut::new();
        } else {
            self.held.extend_from_slice(piece);
        }
    }

    /// What the engine counted, and whether it ended the answer by itself.
    #[must_use]
    pub(crate) fn finish(&self) -> (Usage, Verdict) {
        let read: Option<Document> = serde_json::from_slice(&self.held).ok();
        let Some(document) = read else {
            return (Usage::default(), Verdict::Whole);
        };
        let usage = document.usage.map(Counts::usage).unwrap_or_default();
        let choices = document.choices.unwrap_or_default();
        let mut reasons = choices
            .iter()
            .filter_map(|choice| choice.finish_reason.as_deref());
        if reasons.any(|reason| FAILURES.contains(&reason.as_bytes())) {
            (usage, Verdict::Broken)
        } else {
            (usage, Verdict::Whole)
        }
    }
}

fn join(one: Bytes, other: Bytes) -> Bytes {
    match (one.is_empty(), other.is_empty()) {
        (_, true) => one,
        (true, false) => other,
        (false, false) => [one, other].concat().into(),
    }
}

/// Behind the first event's blank line.
fn first_end(events: &[u8]) -> Option<usize> {
    let lines = memchr::memchr_iter(b'\n', events);
    lines
        .map(|at| at + 1)
        .find(|next| ends_event(events, *next))
        .map(|next| {
            if events[next] == b'\r' {
                next + 2
            } else {
                next + 1
            }
        })
}

/// Behind the last event's blank line.
fn last_end(events: &[u8]) -> Option<usize> {
    let lines = memchr::memrchr_iter(b'\n', events);
    lines
        .map(|at| at + 1)
        .find(|next| ends_event(events, *next))
        .map(|next| {
            if events[next] == b'\r' {
                next + 2
            } else {
                next + 1
            }
        })
}

/// Whether an empty line begins here.
fn ends_event(events: &[u8], at: usize) -> bool {
    matches!(events.get(at..), Some([b'\n', ..] | [b'\r', b'\n', ..]))
}

struct Read {
    usage: Usage,
    /// The event has the counts and no choice.
    only_counts: bool,
}

fn read_event(event: &[u8]) -> Option<Read> {
    // Some engines say in each event that they do not count yet.
    let mut usages = memchr::memmem::find_iter(event, USAGE);
    let counts = |at| value(&event[at..], USAGE).is_some_and(|counts| counts.starts_with(b"{"));
    if !usages.any(counts) {
        return None;
    }
    let text = std::str::from_utf8(event).ok()?;
    let data = text.trim_end().strip_prefix("data:")?;
    let document: Document = serde_json::from_str(data.trim_start()).ok()?;
    Some(Read {
        usage: document.usage?.usage(),
        only_counts: document.choices.is_some_and(|choices| choices.is_empty()),
    })
}

#[derive(serde::Deserialize)]
struct Document<'a> {
    #[serde(default, borrow)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(default)]
    usage: Option<Counts>,
}

#[derive(serde::Deserialize)]
struct Choice<'a> {
    #[serde(default, borrow)]
    finish_reason: Option<std::borrow::Cow<'a, str>>,
}

#[derive(serde::Deserialize)]
struct Counts {
    #[serde(default)]
    prompt_tokens: Option<u32>,
    #[serde(default)]
    completion_tokens: Option<u32>,
    #[serde(default)]
    prompt_tokens_details: Option<Details>,
}

#[derive(serde::Deserialize)]
struct Details {
    #[serde(default)]
    cached_tokens: Option<u32>,
}

impl Counts {
    fn usage(self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            cached_tokens: self
                .prompt_tokens_details
                .and_then(|details| details.cached_tokens),
        }
    }
}
