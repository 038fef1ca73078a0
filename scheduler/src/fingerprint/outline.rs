//! Where a prompt's content lies in its canonical form: for whoever has to find it again in what an engine
//! made of it.
//!
//! An agent has a request's body, but not the key of its fingerprints, and needs none: which bytes a chunk
//! has follows from the body and the render profile alone. An outline is text; it lives for as long as it
//! is compared, and has no `Debug`.

use std::ops::Range;

use siphasher::sip128::SipHasher13;

use super::chain::MAX_BYTES;
use super::form::{Form, Sink};
use super::{Batch, Endpoint, Fields, First, RenderProfile, Unreadable};

/// The canonical form's beginning, and which of it is text.
pub struct Outline {
    bytes: Vec<u8>,
    pieces: Vec<Range<usize>>,
    total: u64,
    ids: bool,
}

impl Outline {
    /// The form's first bytes, a MiB at most: as many as have fingerprints.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Runs of text in [`Outline::bytes`], in their order; what is between them is structure.
    #[must_use]
    pub fn pieces(&self) -> &[Range<usize>] {
        &self.pieces
    }

    /// Bytes of the whole form.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// The prompt was given as token ids: four bytes of the form are one of them.
    #[must_use]
    pub const fn is_ids(&self) -> bool {
        self.ids
    }
}

/// The outline of a body's prompt; empty where a prompt has no fingerprint: with a template of its own, and
/// as one of several.
///
/// # Errors
///
/// Returns why the body has no form.
pub fn outline(
    endpoint: Endpoint,
    body: &[u8],
    profile: &RenderProfile,
) -> Result<Outline, Unreadable> {
    std::str::from_utf8(body).map_err(|_| Unreadable::NotUtf8)?;
    let fields = Fields::find(body)?;
    let mut sink = Text {
        outline: Outline {
            bytes: Vec::with_capacity(body.len().min(LIMIT)),
            pieces: Vec::new(),
            total: 0,
            ids: false,
        },
        in_text: false,
    };
    if fields.chat_template.is_some() {
        return Ok(sink.outline);
    }
    let mut form = Form {
        body,
        profile,
        chain: &mut sink,
    };
    match endpoint {
        Endpoint::Chat => form.chat(fields.messages, fields.tools)?,
        Endpoint::Completions => {
            let batch = Batch::find(body, fields.prompt)?;
            if batch.prompts == 1 {
                form.completion(&batch.first)?;
                sink.outline.ids = matches!(batch.first, First::Ids(_));
            }
        }
    }
    Ok(sink.outline)
}

const LIMIT: usize = MAX_BYTES as usize;

struct Text {
    outline: Outline,
    /// The last byte was text.
    in_text: bool,
}

impl Text {
    /// Takes what fits; returns where it lies.
    fn take(&mut self, bytes: &[u8]) -> Range<usize> {
        let outline = &mut self.outline;
        outline.total += bytes.len() as u64;
        let from = outline.bytes.len();
        let room = LIMIT - from;
        outline
            .bytes
            .extend_from_slice(&bytes[..bytes.len().min(room)]);
        from..outline.bytes.len()
    }
}

impl Sink for Text {
    fn tag(&mut self, bytes: &[u8]) {
        self.take(bytes);
        self.in_text = false;
    }

    fn put(&mut self, bytes: &[u8]) {
        // Marks of strings in JSON values are structure, and no text has such bytes.
        for part in bytes.split_inclusive(|byte| *byte >= 0xf8) {
            let text = part.len() - usize::from(part.last().is_some_and(|byte| *byte >= 0xf8));
            let Range {
                start: from,
                end: to,
            } = self.take(&part[..text]);
            if from < to {
                match self.outline.pieces.last_mut() {
                    Some(last) if self.in_text && last.end == from => last.end = to,
                    _ => self.outline.pieces.push(from..to),
                }
                self.in_text = true;
            }
            if text < part.len() {
                self.tag(&part[text..]);
            }
        }
    }

    fn medium(&mut self, tag: &[u8], hash: &[u8]) {
        self.tag(tag);
        self.tag(hash);
    }

    fn media_hasher(&self) -> SipHasher13 {
        // Its length is all that matters here.
        SipHasher13::new()
    }
}

#[cfg(test)]
mod tests {
    use super::super::chain::Chain;
    use super::super::{Root, Settings, read};
    use super::*;
    use forebay_proto::FingerprintKey;
    use proptest::prelude::*;

    const KEY: FingerprintKey = FingerprintKey {
        epoch: 1,
        bytes: *b"0123456789abcdef",
    };

    fn texts(outline: &Outline) -> Vec<&str> {
        let pieces = outline.pieces().iter();
        pieces
            .map(|piece| std::str::from_utf8(&outline.bytes()[piece.clone()]).unwrap())
            .collect()
    }

    /// The outline's bytes have the chunks that the body's fingerprint has.
    fn check(endpoint: Endpoint, body: &str, pieces: &[&str]) {
        let profile = RenderProfile::default();
        let outline =
            outline(endpoint, body.as_bytes(), &profile).unwrap_or_else(|_| panic!("{body}"));
        assert_eq!(texts(&outline), pieces, "{body}");
        let root = Root {
            pool: "p",
            model: "m",
            adapter: None,
            scope: "t",
        };
        let settings = Settings {
            key: &KEY,
            root,
            profile: &profile,
            chunk_bytes: 16,
        };
        let prompt = read(endpoint, body.as_bytes(), &settings).unwrap();
        assert_eq!(outline.total(), prompt.bytes, "{body}");
        let fields = Fields::find(body.as_bytes()).unwrap();
        let root = fields.root(body.as_bytes(), &settings, "t", outline.is_ids());
        let mut chain = Chain::new(KEY, root.unwrap(), 16, 0);
        chain.tag(outline.bytes());
        assert_eq!(chain.chunks, prompt.chunks, "{body}");
    }

    #[test]
    fn it_is_the_form_that_is_fingerprinted() {
        check(
            Endpoint::Chat,
            r#"{"messages":[{"role":"system","content":"be \u00e9 good"},{"role":"user","content":[{"type":"text","text":"one "},{"type":"text","text":"two"}]}]}"#,
            &["be é good", "one two"],
        );
        check(
            Endpoint::Chat,
            r#"{"tools":[{"type":"function","function":{"name":"look","parameters":{"a":[1,"x"]}}}],"messages":[{"role":"user","content":"hello there"},{"role":"assistant","tool_calls":[{"function":{"name":"look","arguments":"{\"a\": 2}"}}]}]}"#,
            &[
                "{",
                "name",
                "look",
                "parameters",
                "{",
                "a",
                "[1,",
                "x",
                "]}}",
                "hello there",
                "look",
                "{",
                "a",
                "2}",
            ],
        );
        check(
            Endpoint::Completions,
            r#"{"prompt":"once upon a time in the west"}"#,
            &["once upon a time in the west"],
        );
    }

    #[test]
    fn what_has_no_fingerprint_has_no_outline() {
        let none = |endpoint, body: &str| {
            let outline = outline(endpoint, body.as_bytes(), &RenderProfile::default())
                .unwrap_or_else(|_| panic!("{body}"));
            assert!(outline.bytes().is_empty(), "{body}");
        };
        none(Endpoint::Completions, r#"{"prompt":["a","b"]}"#);
        none(
            Endpoint::Chat,
            r#"{"chat_template":"x","messages":[{"role":"user","content":"a"}]}"#,
        );
        let ids = outline(
            Endpoint::Completions,
            br#"{"prompt":[1,70000]}"#,
            &RenderProfile::default(),
        );
        let ids = ids.unwrap_or_else(|_| panic!("ids have a form"));
        assert!(ids.is_ids());
        assert_eq!(ids.bytes(), [1, 0, 0, 0, 0x70, 0x11, 1, 0]);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), chat: bool) {
            let endpoint = if chat { Endpoint::Chat } else { Endpoint::Completions };
            let _ = outline(endpoint, &bytes, &RenderProfile::default());
        }

        #[test]
        fn its_pieces_are_in_order_and_are_text(words in proptest::collection::vec(".{0,40}", 1..6)) {
            let messages: Vec<_> = words
                .iter()
                .map(|word| serde_json::json!({"role": "user", "content": word}))
                .collect();
            let body = serde_json::json!({"messages": messages}).to_string();
            let outline = outline(Endpoint::Chat, body.as_bytes(), &RenderProfile::default());
            let outline = outline.unwrap_or_else(|_| panic!("a chat has a form"));
            let said: Vec<_> = words.iter().filter(|word| !word.is_empty()).collect();
            prop_assert_eq!(texts(&outline), said);
            prop_assert!(outline.pieces().is_sorted_by(|one, next| one.end <= next.start));
        }
    }
}
