//! The bytes of each token, from a model's `tokenizer.json`: no merges, no expressions, no template.

use std::collections::HashMap;

/// Larger files are none of a model's.
pub const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
const MAX_TOKENS: usize = 1 << 21;

/// From ids to bytes.
pub struct Vocabulary(Kind);

enum Kind {
    /// Where the bytes of each id lie in one text; ids that are not there have none.
    Table { ends: Vec<u32>, bytes: Vec<u8> },
    /// An id is four bytes of the text, as the emulated engine has it.
    FourBytes,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vocabulary({:?} tokens)", self.len())
    }
}

/// A file is no vocabulary.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VocabularyError {
    /// Not the JSON of a tokenizer.
    #[error("it is no tokenizer.json: {0}")]
    Malformed(String),
    /// Its model has no list of tokens that is understood.
    #[error("its model has no vocabulary that is understood, or one of more than 2 million tokens")]
    Foreign,
}

impl Vocabulary {
    /// The emulated engine's: it has no tokenizer.
    #[must_use]
    pub const fn emulated() -> Self {
        Self(Kind::FourBytes)
    }

    /// Reads a `tokenizer.json`: byte-level BPE, or pieces with `▁` for a space and `<0x0A>` for a byte.
    ///
    /// # Errors
    ///
    /// Says why it is of no use.
    pub fn read(text: &[u8]) -> Result<Self, VocabularyError> {
        let file: File = serde_json::from_slice(text)
            .map_err(|error| VocabularyError::Malformed(error.to_string()))?;
        let byte_level = [&file.decoder, &file.pre_tokenizer]
            .into_iter()
            .any(|part| part.to_string().contains("\"ByteLevel\""));
        let alphabet = alphabet();
        let decode = |token: &str| {
            if byte_level {
                bytes_of(token, &alphabet)
            } else {
                piece(token)
            }
        };
        let mut tokens: Vec<(u32, Vec<u8>)> = match file.model.vocab {
            Vocab::Map(map) => map
                .into_iter()
                .map(|(token, id)| (id, decode(&token)))
                .collect(),
            Vocab::List(list) => (0..)
                .zip(list)
                .map(|(id, (token, _))| (id, decode(&token)))
                .collect(),
        };
        // Added tokens are text as it stands; some models write spaces of them as pieces do.
        tokens.extend(file.added_tokens.into_iter().map(|added| {
            let text = added.content;
            let bytes = if byte_level {
                text.into_bytes()
            } else {
                text.replace('▁', " ").into_bytes()
            };
            (added.id, bytes)
        }));
        // Of an id that is there twice, the added one.
        tokens.sort_by_key(|(id, _)| *id);
        let most = tokens.last().map_or(0, |(id, _)| *id as usize);
        if tokens.is_empty() || most >= MAX_TOKENS {
            return Err(VocabularyError::Foreign);
        }
        let mut ends = Vec::with_capacity(most + 1);
        let mut bytes = Vec::new();
        for (at, (id, token)) in tokens.iter().enumerate() {
            let again = tokens.get(at + 1).is_some_and(|(next, _)| next == id);
            if again {
                continue;
            }
            ends.resize(*id as usize, end(&bytes)?);
            bytes.extend_from_slice(token);
            ends.push(end(&bytes)?);
        }
        Ok(Self(Kind::Table { ends, bytes }))
    }

    /// The text that these ids make, and where in it each of them begins. Ids that are not known have no
    /// bytes. `None` where it would be longer than `most`.
    pub(super) fn detokenise(&self, ids: &[u32], most: usize) -> Option<(Vec<u8>, Vec<u32>)> {
        let mut text = Vec::with_capacity(ids.len() * 4);
        let mut starts = Vec::with_capacity(ids.len());
        for id in ids {
            starts.push(u32::try_from(text.len()).ok()?);
            match &self.0 {
                Kind::FourBytes => text.extend_from_slice(&id.to_le_bytes()),
                Kind::Table { ends, bytes } => {
                    let at = *id as usize;
                    let from = at.checked_sub(1).and_then(|before| ends.get(before));
                    let from = from.copied().unwrap_or(0);
                    if let Some(to) = ends.get(at) {
                        text.extend_from_slice(&bytes[from as usize..*to as usize]);
                    }
                }
            }
            if text.len() > most {
                return None;
            }
        }
        Some((text, starts))
    }

    /// How many ids have bytes, where they are counted.
    fn len(&self) -> Option<usize> {
        match &self.0 {
            Kind::Table { ends, .. } => Some(ends.len()),
            Kind::FourBytes => None,
        }
    }
}

fn end(bytes: &[u8]) -> Result<u32, VocabularyError> {
    u32::try_from(bytes.len()).map_err(|_| VocabularyError::Foreign)
}

#[derive(serde::Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    pre_tokenizer: serde_json::Value,
    #[serde(default)]
    decoder: serde_json::Value,
    model: Model,
}

#[derive(serde::Deserialize)]
struct Added {
    id: u32,
    content: String,
}

#[derive(serde::Deserialize)]
struct Model {
    vocab: Vocab,
}

#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Vocab {
    Map(HashMap<String, u32>),
    List(Vec<(String, f64)>),
}

/// The bytes that byte-level tokens are written with, by their characters: printable ones stand for
/// themselves, the others follow from U+0100 on.
fn alphabet() -> HashMap<char, u8> {
    let mut next = 0x100;
    (0..=255_u8)
        .map(|byte| {
            let itself = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
            let code = if itself {
                byte.into()
            } else {
                next += 1;
                next - 1
            };
            (char::from_u32(code).unwrap_or('\0'), byte)
        })
        .collect()
}

fn bytes_of(token: &str, alphabet: &HashMap<char, u8>) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token
        .chars()
        .map(|char| alphabet.get(&char).copied())
        .collect();
    // What is not written in the alphabet is text.
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

fn piece(token: &str) -> Vec<u8> {
    let byte = token
        .strip_prefix("<0x")
        .and_then(|hex| hex.strip_suffix('>'));
    match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => token.replace('▁', " ").into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn text(vocabulary: &Vocabulary, ids: &[u32]) -> Vec<u8> {
        vocabulary.detokenise(ids, 1 << 20).unwrap().0
    }

    #[test]
    fn byte_level_tokens_are_bytes() {
        let file = json!({
            "added_tokens": [{"id": 4, "content": "<|end|>"}, {"id": 0, "content": "<|é|>"}],
            "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": {"x": 0, "Ġhe": 1, "Ċ": 2, "Ã©": 3, "ł": 6}, "merges": ["a b"]},
        });
        let vocabulary = Vocabulary::read(file.to_string().as_bytes()).unwrap();
        assert_eq!(
            text(&vocabulary, &[0, 1, 2, 3, 4]),
            "<|é|> he\né<|end|>".as_bytes()
        );
        assert_eq!(text(&vocabulary, &[6]), [0xa0]);
        assert_eq!(text(&vocabulary, &[5, 7, u32::MAX]), b"", "nobody's ids");
        let (_, starts) = vocabulary.detokenise(&[1, 5, 2], 100).unwrap();
        assert_eq!(starts, [0, 3, 3]);
        assert!(vocabulary.detokenise(&[1, 1], 5).is_none());
    }

    #[test]
    fn pieces_are_text_with_marked_spaces() {
        let file = json!({
            "added_tokens": [{"id": 3, "content": "▁▁"}],
            "model": {"vocab": [["<unk>", 0.0], ["▁he", -1.5], ["<0x0A>", -2], ["", 0]]},
        });
        let vocabulary = Vocabulary::read(file.to_string().as_bytes()).unwrap();
        assert_eq!(text(&vocabulary, &[1, 2, 3]), b" he\n  ");
    }

    #[test]
    fn the_alphabet_has_every_byte_once() {
        let alphabet = alphabet();
        assert_eq!(alphabet.len(), 256);
        for (char, byte) in [
            ('A', 0x41),
            ('Ġ', 0x20),
            ('Ċ', 0x0a),
            ('ł', 0xa0),
            ('Ń', 0xad),
        ] {
            assert_eq!(alphabet[&char], byte);
        }
    }

    #[test]
    fn what_is_no_tokenizer_is_refused() {
        let read = |text: &str| Vocabulary::read(text.as_bytes()).map(drop);
        assert!(matches!(read("{"), Err(VocabularyError::Malformed(_))));
        assert!(matches!(
            read(r#"{"model":{}}"#),
            Err(VocabularyError::Malformed(_))
        ));
        assert_eq!(
            read(r#"{"model":{"vocab":{}}}"#),
            Err(VocabularyError::Foreign)
        );
        assert_eq!(
            read(r#"{"model":{"vocab":{"a":4000000000}}}"#),
            Err(VocabularyError::Foreign)
        );
    }

    #[test]
    fn the_emulated_engine_has_four_bytes_a_token() {
        let vocabulary = Vocabulary::emulated();
        let ids = [u32::from_le_bytes(*b"once"), u32::from_le_bytes(*b" upo")];
        assert_eq!(text(&vocabulary, &ids), b"once upo");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Vocabulary::read(&bytes);
        }
    }
}
