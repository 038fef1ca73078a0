//! Takes the token ids that were asked for out of an answer again, and keeps those of the prompt.
//!
//! vLLM writes the same members with `null` where nobody asks for ids, and that is what the client gets. An
//! answer is looked at as it passes, however it is cut: where `"token_ids":[` stands in an answer's JSON it is
//! a key, because inside of a string its quotes would be escaped.

use bytes::{Bytes, BytesMut};
use memchr::memmem;

const OF_PROMPT: &[u8] = b"\"prompt_token_ids\":[";
const OF_ANSWER: &[u8] = b"\"token_ids\":[";
/// What both end in.
const END: &[u8] = b"token_ids\":[";
/// A prompt with more has no chunks for the rest.
const MAX_IDS: usize = 1 << 20;

/// See the module's page.
#[derive(Default)]
pub(crate) struct Ids {
    /// The end of a piece, in which a key may begin.
    held: BytesMut,
    within: Option<List>,
    /// Those of the prompt, once they are whole.
    prompt: Option<Vec<u32>>,
    /// They were seen.
    seen: bool,
}

/// A list that is being taken out.
struct List {
    ids: Vec<u32>,
    number: Option<u32>,
    /// Of the prompt, and for the first time.
    kept: bool,
}

impl Ids {
    /// Takes a piece; returns what is to be passed on.
    pub(crate) fn push(&mut self, piece: Bytes) -> Bytes {
        // Most pieces have no ids, and begin and end outside of any key.
        if self.held.is_empty()
            && self.within.is_none()
            && memmem::find(&piece, END).is_none()
            && begun(&piece) == 0
        {
            return piece;
        }
        self.held.extend_from_slice(&piece);
        let text = self.held.split().freeze();
        let mut out = BytesMut::with_capacity(text.len());
        let mut rest = &text[..];
        loop {
            if let Some(list) = &mut self.within {
                let Some(end) = list.read(rest) else {
                    return out.freeze();
                };
                rest = &rest[end..];
                if let Some(list) = self.within.take().filter(|list| list.kept) {
                    self.prompt = Some(list.ids);
                }
            }
            let Some(at) = memmem::find(rest, END) else {
                break;
            };
            let key = at + END.len();
            let (before, after) = rest.split_at(key);
            rest = after;
            let of_prompt = before.ends_with(OF_PROMPT);
            if of_prompt || before.ends_with(OF_ANSWER) {
                out.extend_from_slice(&before[..key - 1]);
                out.extend_from_slice(b"null");
                self.within = Some(List {
                    ids: Vec::new(),
                    number: None,
                    kept: of_prompt && !std::mem::replace(&mut self.seen, true),
                });
            } else {
                out.extend_from_slice(before);
            }
        }
        let (ready, held) = rest.split_at(rest.len() - begun(rest));
        out.extend_from_slice(ready);
        self.held.extend_from_slice(held);
        out.freeze()
    }

    /// The answer's end: what is left of it.
    pub(crate) fn finish(&mut self) -> Bytes {
        self.held.split().freeze()
    }

    /// The prompt's ids, once.
    pub(crate) const fn take_prompt(&mut self) -> Option<Vec<u32>> {
        self.prompt.take()
    }
}

impl List {
    /// Reads on; returns where the list ends, if it does.
    fn read(&mut self, text: &[u8]) -> Option<usize> {
        for (at, byte) in text.iter().enumerate() {
            match byte {
                b'0'..=b'9' => {
                    let digit = u32::from(byte - b'0');
                    let number = self.number.unwrap_or(0);
                    self.number = Some(number.saturating_mul(10).saturating_add(digit));
                }
                b']' => {
                    self.next();
                    return Some(at + 1);
                }
                _ => self.next(),
            }
        }
        None
    }

    fn next(&mut self) {
        if let Some(number) = self.number.take()
            && self.kept
            && self.ids.len() < MAX_IDS
        {
            self.ids.push(number);
        }
    }
}

/// Bytes at the end of a text in which a key may have begun.
fn begun(text: &[u8]) -> usize {
    let most = text.len().min(OF_PROMPT.len() - 1);
    let may_begin = |length: &usize| {
        let end = &text[text.len() - length..];
        OF_PROMPT.starts_with(end) || OF_ANSWER.starts_with(end)
    };
    (1..=most).rev().find(may_begin).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHAT: &str = include_str!("samples/vllm-chat-stream.sse");
    const COMPLETION: &str = include_str!("samples/vllm-completions-stream.sse");

    fn relayed(stream: &[u8], cuts: &[usize]) -> (Vec<u8>, Option<Vec<u32>>) {
        let mut ids = Ids::default();
        let (mut out, mut prompt, mut from) = (Vec::new(), None, 0);
        for to in cuts.iter().copied().chain([stream.len()]) {
            out.extend_from_slice(&ids.push(Bytes::copy_from_slice(&stream[from..to])));
            prompt = prompt.or(ids.take_prompt());
            from = to;
        }
        out.extend_from_slice(&ids.finish());
        (out, prompt)
    }

    /// The same answer where nobody asked for ids.
    fn without(stream: &str) -> String {
        let events = stream.split_inclusive("\n\n").map(|event| {
            let Some(data) = event.strip_prefix("data: {") else {
                return event.to_owned();
            };
            let mut text = format!("data: {{{data}");
            for key in ["prompt_token_ids", "token_ids"] {
                while let Some(at) = text.find(&format!("\"{key}\":[")) {
                    let list = at + key.len() + 3;
                    let end = list + text[list..].find(']').unwrap() + 1;
                    text.replace_range(list..end, "null");
                }
            }
            text
        });
        events.collect()
    }

    #[test]
    fn a_client_gets_what_it_would_get_without() {
        for (stream, prompt, first) in [(CHAT, 161, 1), (COMPLETION, 3, 748)] {
            let (out, ids) = relayed(stream.as_bytes(), &[]);
            let ids = ids.unwrap();
            assert_eq!((ids.len(), ids[0]), (prompt, first));
            let out = String::from_utf8(out).unwrap();
            assert_eq!(out, without(stream));
            assert!(!out.contains("token_ids\":["));
            assert_eq!(
                out.matches("data:").count(),
                stream.matches("data:").count()
            );
        }
        let whole = br#"{"choices":[{"message":{"content":"x"},"token_ids":[1,2]}],"prompt_token_ids":[3,4, 5],"usage":{}}"#;
        let (out, ids) = relayed(whole, &[]);
        assert_eq!(ids, Some(vec![3, 4, 5]));
        let expected = r#"{"choices":[{"message":{"content":"x"},"token_ids":null}],"prompt_token_ids":null,"usage":{}}"#;
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn text_that_speaks_of_ids_is_text() {
        let answer =
            r#"{"content":"{\"token_ids\":[1,2]} prompt_token_ids\":[3]","token_ids":null}"#;
        let (out, ids) = relayed(answer.as_bytes(), &[]);
        assert_eq!((out.as_slice(), ids), (answer.as_bytes(), None));
    }

    #[test]
    fn nothing_is_held_back_at_the_end_of_an_event() {
        let mut ids = Ids::default();
        for event in CHAT.split_inclusive("\n\n") {
            let out = ids.push(Bytes::copy_from_slice(event.as_bytes()));
            assert!(out.ends_with(b"\n\n") && ids.held.is_empty());
        }
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(mut cuts in proptest::collection::vec(0..CHAT.len(), 0..12)) {
            cuts.sort_unstable();
            prop_assert_eq!(relayed(CHAT.as_bytes(), &cuts), relayed(CHAT.as_bytes(), &[]));
        }

        #[test]
        fn what_has_no_ids_passes(text in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'"'), Just(b't')], 0..200), cut in 0..200_usize) {
            let cut = cut.min(text.len());
            prop_assert_eq!(relayed(&text, &[cut]), (text, None));
        }
    }
}
