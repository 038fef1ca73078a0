//! Reads the token counts out of an answer, and takes out what a splice brought in.

use bytes::{Bytes, BytesMut};

use crate::core::Usage;

/// An event, or an answer, that is longer is passed on unread.
const MAX_HELD_BYTES: usize = 1 << 20;

/// Reads a stream of server-sent events. What is not complete is held until it is.
pub(crate) struct Events {
    strip_usage: bool,
    held: BytesMut,
    /// In an event that was too long to hold.
    overlong: bool,
    usage: Usage,
}

impl Events {
    /// With `strip_usage` the event that has nothing but the token counts is taken out.
    #[must_use]
    pub(crate) fn new(strip_usage: bool) -> Self {
        Self {
            strip_usage,
            held: BytesMut::new(),
            overlong: false,
            usage: Usage::default(),
        }
    }

    /// What the engine counted, as far as it has said.
    #[must_use]
    pub(crate) const fn usage(&self) -> Usage {
        self.usage
    }

    /// Takes a piece of the stream; returns what is to be passed on, in whole events.
    pub(crate) fn push(&mut self, piece: Bytes) -> Bytes {
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

    /// The stream's end: what is left of it.
    pub(crate) fn finish(&mut self) -> Bytes {
        self.held.split().freeze()
    }

    fn and_hold(&mut self, ready: Bytes, rest: Bytes) -> Bytes {
        let passed = self.hold(rest);
        join(ready, passed)
    }

    fn hold(&mut self, piece: Bytes) -> Bytes {
        if self.overlong || piece.len() > MAX_HELD_BYTES {
            self.overlong = true;
            return piece;
        }
        self.held.extend_from_slice(&piece);
        Bytes::new()
    }

    /// Whole events. Nearly all have no counts: they are not looked at one by one.
    fn read(&mut self, events: Bytes) -> Bytes {
        if memchr::memmem::find(&events, b"\"usage\"").is_none() {
            return events;
        }
        let mut out = BytesMut::with_capacity(events.len());
        let mut left = events;
        while let Some(end) = first_end(&left) {
            let event = left.split_to(end);
            let read = read_event(&event);
            if let Some(read) = &read {
                self.usage = read.usage;
            }
            let only_counts = read.is_some_and(|read| read.only_counts);
            if !(only_counts && self.strip_usage) {
                out.extend_from_slice(&event);
            }
        }
        out.extend_from_slice(&left);
        out.freeze()
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

    /// What the engine counted.
    #[must_use]
    pub(crate) fn usage(&self) -> Usage {
        let read: Option<Document> = serde_json::from_slice(&self.held).ok();
        read.and_then(|document| document.usage)
            .map(Counts::usage)
            .unwrap_or_default()
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
    memchr::memmem::find(event, b"\"usage\"")?;
    let text = std::str::from_utf8(event).ok()?;
    let data = text.trim_end().strip_prefix("data:")?;
    let document: Document = serde_json::from_str(data.trim_start()).ok()?;
    Some(Read {
        usage: document.usage?.usage(),
        only_counts: document.choices.is_some_and(|choices| choices.is_empty()),
    })
}

#[derive(serde::Deserialize)]
struct Document {
    #[serde(default)]
    choices: Option<Vec<serde::de::IgnoredAny>>,
    #[serde(default)]
    usage: Option<Counts>,
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: &str = concat!(
        "data: {\"choices\":[{\"delta\":{\"content\":\"é \\\"usage\\\" \"}}]}\n\n",
        ": ping\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":\"stop\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":161,\"total_tokens\":173,\"completion_tokens\":12,\"prompt_tokens_details\":{\"cached_tokens\":160}}}\n\n",
        "data: [DONE]\n\n",
    );
    const COUNTED: Usage = Usage {
        prompt_tokens: Some(161),
        cached_tokens: Some(160),
        completion_tokens: Some(12),
    };

    fn relayed(stream: &str, cuts: &[usize], strip: bool) -> (String, Usage) {
        let mut events = Events::new(strip);
        let mut out = Vec::new();
        let mut from = 0;
        for to in cuts.iter().copied().chain([stream.len()]) {
            out.extend_from_slice(
                &events.push(Bytes::copy_from_slice(&stream.as_bytes()[from..to])),
            );
            from = to;
        }
        out.extend_from_slice(&events.finish());
        (String::from_utf8(out).unwrap(), events.usage())
    }

    #[test]
    fn counts_are_taken_out_unless_they_were_asked_for() {
        let (out, usage) = relayed(STREAM, &[], false);
        assert_eq!((out.as_str(), usage), (STREAM, COUNTED));
        let (out, usage) = relayed(STREAM, &[], true);
        assert_eq!(usage, COUNTED);
        assert!(!out.contains("total_tokens") && out.ends_with("data: [DONE]\n\n"));
        assert_eq!(out.matches("data:").count(), 3);
    }

    #[test]
    fn counts_beside_a_choice_stay() {
        let stream = "data: {\"choices\":[{}],\"usage\":{\"prompt_tokens\":1}}\r\n\r\n";
        let (out, usage) = relayed(stream, &[7, 9], true);
        assert_eq!((out.as_str(), usage.prompt_tokens), (stream, Some(1)));
        assert_eq!(usage.cached_tokens, None, "absent is not zero");
    }

    #[test]
    fn an_event_without_end_is_passed_on() {
        let long = format!("data: {}", "x".repeat(3 << 20));
        let stream = format!("{long}\n\n{STREAM}");
        let cuts: Vec<usize> = (1..30).map(|cut| cut * 100_000).collect();
        let (out, usage) = relayed(&stream, &cuts, true);
        assert_eq!(usage, COUNTED);
        assert!(out.starts_with(&long) && out.ends_with("data: [DONE]\n\n"));
        let (out, _) = relayed("data: broken off", &[3], true);
        assert_eq!(out, "data: broken off");
    }

    #[test]
    fn a_whole_answer_is_read_as_it_passes() {
        let mut answers = Answers::default();
        let text = r#"{"choices":[{"message":{"content":"x"}}],"usage":{"prompt_tokens":161,"completion_tokens":12,"prompt_tokens_details":{"cached_tokens":160}}}"#;
        for piece in text.as_bytes().chunks(7) {
            answers.push(&Bytes::copy_from_slice(piece));
        }
        assert_eq!(answers.usage(), COUNTED);
        assert_eq!(Answers::default().usage(), Usage::default());
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(mut cuts in proptest::collection::vec(0..STREAM.len(), 0..12), strip: bool) {
            cuts.sort_unstable();
            prop_assert_eq!(relayed(STREAM, &cuts, strip), relayed(STREAM, &[], strip));
        }

        #[test]
        fn arbitrary_bytes_pass(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0..200_usize) {
            let bytes = Bytes::from(bytes);
            let cut = cut.min(bytes.len());
            let mut events = Events::new(false);
            let mut out = events.push(bytes.slice(..cut)).to_vec();
            out.extend_from_slice(&events.push(bytes.slice(cut..)));
            out.extend_from_slice(&events.finish());
            prop_assert_eq!(&out[..], &bytes[..]);
        }
    }
}
