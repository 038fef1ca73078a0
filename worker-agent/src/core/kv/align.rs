//! Which tokens of an engine's prompt a chunk of the canonical form ends in.
//!
//! The prompt's ids, as bytes, are the text that the engine's template made. The pieces of the canonical form
//! are searched in it, in their order; what lies between two that were found, tags here and the template's
//! own words there, is a gap. A chunk that ends in a piece ends where its last byte was found. One that ends
//! in a gap is counted to the gap's end, so that it never claims too little of what it needs, and the
//! gap's tokens are its **error** at most. What is behind the last piece that was found is left out.

use std::ops::Range;

use forebay_scheduler::fingerprint::Outline;
use memchr::memmem;

use super::vocabulary::Vocabulary;

/// Text that is searched: a prompt of a MiB, and what its template adds.
const MAX_TEXT_BYTES: usize = 4 << 20;
/// Shorter pieces are found where they are not: they are looked for between others, from their end.
const SHORT: usize = 16;
/// How far behind what was found last a piece is looked for, beyond four times the bytes since then.
const AHEAD: usize = 4_096;
/// Where a piece is not there as it was sent, parts of this size are looked for.
const PART: usize = 64;

/// A prompt whose chunks are found in its tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Aligned {
    /// For each of the first chunks, the tokens up to its end.
    pub ends: Vec<u32>,
    /// Chunks that have no end.
    pub lost: u32,
    /// Tokens by which the ends may be off, in sum.
    pub error_tokens: u64,
}

/// A run of bytes that is there and here.
#[derive(Clone, Copy, Debug)]
struct Run {
    form: usize,
    text: usize,
    length: usize,
}

impl Run {
    const fn form_end(&self) -> usize {
        self.form + self.length
    }

    const fn text_end(&self) -> usize {
        self.text + self.length
    }
}

/// Finds the ends of `count` chunks of so many bytes. `None`: the ids are not those of this prompt, or are
/// too many.
#[must_use]
pub fn align(
    outline: &Outline,
    count: usize,
    chunk_bytes: u32,
    ids: &[u32],
    vocabulary: &Vocabulary,
) -> Option<Aligned> {
    let chunk_bytes = chunk_bytes as usize;
    let form = outline.bytes();
    // The fingerprint is of another form: of another render profile, perhaps.
    if chunk_bytes == 0 || form.len() / chunk_bytes != count {
        return None;
    }
    let mut aligned = Aligned::default();
    let ends = (1..=count).map(|chunk| chunk * chunk_bytes);
    if outline.is_ids() {
        if form.len() / 4 > ids.len() {
            return None;
        }
        let tokens = |end: usize| u32::try_from(end.div_ceil(4)).unwrap_or(u32::MAX);
        aligned.ends = ends.map(tokens).collect();
        return Some(aligned);
    }
    let (text, starts) = vocabulary.detokenise(ids, MAX_TEXT_BYTES)?;
    let runs = Search::new(form, &text).runs(outline.pieces());
    let tokens = |end: usize| starts.partition_point(|start| (*start as usize) < end);
    for end in ends {
        let next = runs.partition_point(|run| run.form_end() < end);
        let Some(run) = runs.get(next) else {
            aligned.lost = u32::try_from(count - aligned.ends.len()).unwrap_or(u32::MAX);
            break;
        };
        let to = if run.form < end {
            tokens(run.text + (end - run.form))
        } else {
            let before = next
                .checked_sub(1)
                .map_or(0, |before| runs[before].text_end());
            let to = tokens(run.text);
            aligned.error_tokens += (to - tokens(before)) as u64;
            to
        };
        aligned.ends.push(u32::try_from(to).unwrap_or(u32::MAX));
    }
    Some(aligned)
}

struct Search<'a> {
    form: &'a [u8],
    text: &'a [u8],
    /// What was found, in order.
    runs: Vec<Run>,
    /// Short pieces behind the last run.
    short: Vec<Range<usize>>,
}

impl<'a> Search<'a> {
    const fn new(form: &'a [u8], text: &'a [u8]) -> Self {
        Self {
            form,
            text,
            runs: Vec::new(),
            short: Vec::new(),
        }
    }

    fn runs(mut self, pieces: &[Range<usize>]) -> Vec<Run> {
        for piece in pieces {
            if piece.len() < SHORT {
                self.short.push(piece.clone());
            } else {
                self.piece(piece.clone());
            }
        }
        let end = self.text.len();
        self.place_short(end);
        self.runs
    }

    /// A piece, whole or trimmed, or else as much of it as is there: a template that escapes or normalises
    /// keeps most of it.
    fn piece(&mut self, piece: Range<usize>) {
        if self.found_trimmed(&piece) {
            return;
        }
        let mut from = piece.start;
        for part in parts(&self.form[piece]) {
            let part = from..from + part;
            from = part.end;
            if part.len() < SHORT {
                self.short.push(part);
            } else {
                self.found_trimmed(&part);
            }
        }
    }

    fn found_trimmed(&mut self, bytes: &Range<usize>) -> bool {
        if self.found(bytes) {
            return true;
        }
        let text = &self.form[bytes.clone()];
        let front = text.len() - text.trim_ascii_start().len();
        let back = text.len() - text.trim_ascii_end().len();
        let trimmed = bytes.start + front..bytes.end.saturating_sub(back);
        trimmed.len() >= SHORT && trimmed.len() < bytes.len() && self.found(&trimmed)
    }

    /// Looks for bytes of the form behind what was found last.
    fn found(&mut self, bytes: &Range<usize>) -> bool {
        let (form, text) = self.last();
        let ahead = 4 * (bytes.end - form) + AHEAD;
        let window = &self.text[text..self.text.len().min(text + ahead)];
        let Some(at) = memmem::find(window, &self.form[bytes.clone()]) else {
            return false;
        };
        self.place_short(text + at);
        self.push(bytes, text + at);
        true
    }

    /// Places the short pieces in front of what was found there, the last of them first: the nearest to it
    /// claims the most tokens.
    fn place_short(&mut self, before: usize) {
        let (_, after) = self.last();
        let mut before = before;
        let mut placed = Vec::new();
        for piece in std::mem::take(&mut self.short).into_iter().rev() {
            let bytes = &self.form[piece.clone()];
            let Some(at) = memmem::rfind(&self.text[after..before], bytes) else {
                continue;
            };
            before = after + at;
            placed.push((piece, before));
        }
        for (piece, at) in placed.into_iter().rev() {
            self.push(&piece, at);
        }
    }

    fn push(&mut self, bytes: &Range<usize>, text: usize) {
        self.runs.push(Run {
            form: bytes.start,
            text,
            length: bytes.len(),
        });
    }

    /// Where what was found last ends, there and here.
    fn last(&self) -> (usize, usize) {
        let last = self.runs.last();
        last.map_or((0, 0), |run| (run.form_end(), run.text_end()))
    }
}

/// Lengths of the parts of a piece: broken where a template may change something, and no longer than
/// [`PART`].
fn parts(piece: &[u8]) -> impl Iterator<Item = usize> {
    piece
        .chunk_by(|one, next| changes(*one) == changes(*next))
        .flat_map(|run| run.chunks(PART))
        .map(<[u8]>::len)
}

/// Bytes that JSON escapes, that are trimmed, or that are not ASCII.
const fn changes(byte: u8) -> bool {
    matches!(byte, b'"' | b'\\' | 0..=0x1f | 0x7f..)
}

#[cfg(test)]
mod tests {
    use forebay_scheduler::fingerprint::{Endpoint, RenderProfile, outline};
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// A token for each byte: positions are tokens.
    fn bytewise() -> Vocabulary {
        let token = |byte: u8| (format!("<0x{byte:02X}>"), u32::from(byte));
        let vocab: serde_json::Map<_, _> = (0..=255)
            .map(|byte| {
                let (token, id) = token(byte);
                (token, id.into())
            })
            .collect();
        let file = json!({"model": {"vocab": vocab}}).to_string();
        Vocabulary::read(file.as_bytes()).unwrap()
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    fn aligned(body: &serde_json::Value, rendered: &str, chunk_bytes: u32) -> Option<Aligned> {
        let body = body.to_string();
        let outline = outline(Endpoint::Chat, body.as_bytes(), &RenderProfile::default());
        let outline = outline.unwrap_or_else(|_| panic!("a form"));
        let count = outline.bytes().len() / chunk_bytes as usize;
        align(&outline, count, chunk_bytes, &ids(rendered), &bytewise())
    }

    fn chat(messages: &[(&str, &str)]) -> serde_json::Value {
        let messages: Vec<_> = messages
            .iter()
            .map(|(role, content)| json!({"role": role, "content": content}))
            .collect();
        json!({"messages": messages})
    }

    const SYSTEM: &str = "You are a careful assistant who counts bytes.";
    const QUESTION: &str = "What is the length of this very question?";

    fn rendered(system: &str, question: &str) -> String {
        format!("<bos><|system|>\n{system}<|end|>\n<|user|>\n{question}<|end|>\n<|assistant|>\n")
    }

    #[test]
    fn a_chunk_ends_where_its_last_byte_was_found() {
        let body = chat(&[("system", SYSTEM), ("user", QUESTION)]);
        let text = rendered(SYSTEM, QUESTION);
        let aligned = aligned(&body, &text, 16).unwrap();
        // FF 10 "system" FE: nine bytes before the text; FF 10 "user" FE: seven.
        let system = text.find(SYSTEM).unwrap();
        let question = text.find(QUESTION).unwrap();
        let form_question = 9 + SYSTEM.len() + 7;
        let expected: Vec<u32> = (1..=aligned.ends.len())
            .map(|chunk| chunk * 16)
            .map(|end| match end {
                end if end <= 9 => system,
                end if end <= 9 + SYSTEM.len() => system + end - 9,
                end if end <= form_question => question,
                end => question + end - form_question,
            })
            .map(|end| u32::try_from(end).unwrap())
            .collect();
        assert_eq!(aligned.ends, expected);
        assert_eq!((aligned.ends.len(), aligned.lost), (6, 0));
        assert_eq!(aligned.error_tokens, 0, "no end is in a gap");
    }

    #[test]
    fn one_that_ends_in_a_gap_is_counted_to_its_end() {
        let body = chat(&[("system", SYSTEM), ("user", QUESTION)]);
        let text = rendered(SYSTEM, QUESTION);
        // 9 + 45 = 54: the tag of the user lies in 54..61.
        let aligned = aligned(&body, &text, 57).unwrap();
        let question = u32::try_from(text.find(QUESTION).unwrap()).unwrap();
        assert_eq!(aligned.ends, [question]);
        assert_eq!(aligned.error_tokens, "<|end|>\n<|user|>\n".len() as u64);
    }

    #[test]
    fn text_that_a_template_changed_is_found_in_parts() {
        let long = "a line of the \"document\" that has quotes\nand a break, and goes on for a while longer than that ";
        let body = chat(&[("system", SYSTEM), ("tool", long), ("user", QUESTION)]);
        // Escaped, and trimmed.
        let escaped = json!(long.trim()).to_string();
        let text = rendered(SYSTEM, &format!("{escaped}<|end|>\n<|user|>\n{QUESTION}"));
        let aligned = aligned(&body, &text, 16).unwrap();
        assert_eq!(aligned.lost, 0);
        let last = *aligned.ends.last().unwrap() as usize;
        let question = text.find(QUESTION).unwrap();
        assert!((question..question + QUESTION.len()).contains(&last));
        assert!(aligned.ends.is_sorted());
        assert!(aligned.error_tokens < 80, "{aligned:?}");
    }

    #[test]
    fn short_words_are_not_found_in_the_template() {
        // "s" is in every tag.
        let body = chat(&[("system", "s"), ("user", QUESTION)]);
        let text = rendered("s", QUESTION);
        let aligned = aligned(&body, &text, 16).unwrap();
        let question = text.find(QUESTION).unwrap();
        // Nine of a tag, one of text, seven of a tag.
        assert_eq!(aligned.ends[0] as usize, question, "in the second tag");
        assert_eq!(aligned.ends[1] as usize, question + 32 - 17);
    }

    #[test]
    fn what_is_not_there_has_no_end() {
        let body = chat(&[("system", SYSTEM), ("user", QUESTION)]);
        let text = rendered(SYSTEM, "another question than the one that was asked");
        let one = aligned(&body, &text, 16).unwrap();
        assert_eq!((one.ends.len(), one.lost), (3, 3));
        let text = rendered("nothing", "of it at all");
        let none = aligned(&body, &text, 16).unwrap();
        assert_eq!((none.ends.len(), none.lost), (0, 6));
    }

    #[test]
    fn a_piece_that_is_too_far_ahead_is_not_taken() {
        let body = chat(&[("system", SYSTEM), ("user", QUESTION)]);
        let far = "-".repeat(AHEAD + 4 * 120);
        let text = rendered(SYSTEM, &format!("{far}{QUESTION}"));
        assert_eq!(aligned(&body, &text, 16).unwrap().lost, 3);
    }

    #[test]
    fn ids_are_counted() {
        let body = json!({"prompt": (0..40).collect::<Vec<u32>>()}).to_string();
        let outline = outline(
            Endpoint::Completions,
            body.as_bytes(),
            &RenderProfile::default(),
        );
        let outline = outline.unwrap_or_else(|_| panic!("a form"));
        let ids: Vec<u32> = (0..40).collect();
        let aligned = align(&outline, 2, 64, &ids, &bytewise()).unwrap();
        assert_eq!(aligned.ends, [16, 32]);
        assert_eq!(align(&outline, 2, 64, &ids[..39], &bytewise()), None);
    }

    #[test]
    fn the_fingerprint_of_another_form_is_noticed() {
        let body = chat(&[("system", SYSTEM)]).to_string();
        let outline = outline(Endpoint::Chat, body.as_bytes(), &RenderProfile::default());
        let outline = outline.unwrap_or_else(|_| panic!("a form"));
        assert_eq!(align(&outline, 7, 16, &ids(SYSTEM), &bytewise()), None);
        assert_eq!(align(&outline, 7, 0, &ids(SYSTEM), &bytewise()), None);
    }

    fn word() -> impl Strategy<Value = String> {
        prop_oneof![".{0,12}", "[a-z \"\\n]{10,90}", "(ab){5,40}"]
    }

    proptest! {
        /// Whatever the words are, no chunk ends before the last of its bytes that is text.
        #[test]
        fn no_chunk_claims_too_few_tokens(words in proptest::collection::vec(word(), 1..7), chunk_bytes in 16..80_u32) {
            let said: Vec<_> = words.iter().map(|word| ("user", word.as_str())).collect();
            let body = chat(&said);
            let mut text = String::from("<bos>");
            // Where each byte of the form is, by construction.
            let mut at = Vec::new();
            for word in &words {
                text.push_str("<|user|>\n");
                at.extend(std::iter::repeat_n(text.len(), 7));
                at.extend((1..=word.len()).map(|byte| text.len() + byte));
                text.push_str(word);
                text.push_str("<|end|>\n");
            }
            let aligned = aligned(&body, &text, chunk_bytes).unwrap();
            for (chunk, end) in aligned.ends.iter().enumerate() {
                let last = at[(chunk + 1) * chunk_bytes as usize - 1];
                // A tag's bytes are nowhere: what counts is the text before them.
                let least = at[..(chunk + 1) * chunk_bytes as usize].iter().rev().find(|byte| **byte <= last).unwrap();
                prop_assert!(*end as usize >= *least || repeats(&words), "chunk {} ends at {}, not {}", chunk, end, least);
            }
            prop_assert!(aligned.ends.is_sorted());
        }

        #[test]
        fn arbitrary_ids_never_panic(ids in proptest::collection::vec(any::<u32>(), 0..200), words in proptest::collection::vec(word(), 0..4), chunk_bytes in 0..80_u32) {
            let said: Vec<_> = words.iter().map(|word| ("user", word.as_str())).collect();
            let body = chat(&said).to_string();
            if let Ok(outline) = outline(Endpoint::Chat, body.as_bytes(), &RenderProfile::default()) {
                let count = outline.bytes().len() / chunk_bytes.max(1) as usize;
                if let Some(aligned) = align(&outline, count, chunk_bytes, &ids, &bytewise()) {
                    prop_assert!(aligned.ends.iter().all(|end| *end as usize <= ids.len()));
                    prop_assert_eq!(aligned.ends.len() + aligned.lost as usize, count);
                }
            }
        }
    }

    /// A word that is in another one, or in the template, may be taken for it.
    fn repeats(words: &[String]) -> bool {
        let others = |at: usize| {
            let others = words
                .iter()
                .enumerate()
                .filter(move |(other, _)| *other != at);
            others
                .map(|(_, word)| word.as_str())
                .chain(["<|user|>\n<|end|>\n"])
        };
        let within =
            |(at, word): (usize, &String)| others(at).any(|other| other.contains(word.as_str()));
        words.iter().enumerate().any(within)
    }
}
