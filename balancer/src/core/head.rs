//! What placement needs of a request's body, in one streaming pass: no document tree is built.
//!
//! The body is forwarded as it came, so what is accepted here must mean the same to the engine:
//! whatever `serde_json` takes as a document is taken, but for a key that appears twice at top level
//! or in a message (compared after unescaping), of which the engine would read the other one.

use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::core::error::{ApiError, Code};

/// Keys at top level, or in one message.
const MAX_KEYS: usize = 1_024;

/// The fields that placement reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Head {
    /// Which model is asked.
    pub(crate) model: String,
    /// The answer is to come as events.
    pub(crate) stream: bool,
    /// Most tokens of the answer, where the client gives a usable number.
    pub(crate) max_tokens: Option<u64>,
}

/// Reads a body.
pub(crate) fn parse(body: &[u8]) -> Result<Head, ApiError> {
    let mut found = Found::default();
    let mut reader = serde_json::Deserializer::from_slice(body);
    let read = Document(&mut found)
        .deserialize(&mut reader)
        .and_then(|()| reader.end());
    if let Some(problem) = found.problem {
        return Err(problem.error());
    }
    // The library's own words may quote the body; only the place is told.
    read.map_err(|error| {
        let message = format!(
            "the body is not a JSON object that can be read: see line {} column {}",
            error.line(),
            error.column()
        );
        ApiError::new(Code::InvalidJson, message)
    })?;
    let model = found.model.ok_or_else(|| Problem::Model.error())?;
    Ok(Head {
        model,
        stream: found.stream,
        max_tokens: found.max_tokens,
    })
}

#[derive(Default)]
struct Found {
    model: Option<String>,
    stream: bool,
    max_tokens: Option<u64>,
    problem: Option<Problem>,
}

#[derive(Clone, Copy)]
enum Problem {
    NotAnObject,
    DuplicateKey,
    DuplicateInMessage,
    TooManyKeys,
    Model,
    Stream,
}

impl Problem {
    fn error(self) -> ApiError {
        match self {
            Self::NotAnObject => {
                ApiError::new(Code::InvalidJson, "the body is JSON, but not an object")
            }
            Self::DuplicateKey => ApiError::new(
                Code::DuplicateKey,
                "a key appears twice at the top level of the body: send it once",
            ),
            Self::DuplicateInMessage => ApiError::new(
                Code::DuplicateKey,
                "a key appears twice in a message: send it once",
            )
            .about("messages"),
            Self::TooManyKeys => ApiError::new(
                Code::InvalidJson,
                format!("an object of the body has more than {MAX_KEYS} keys"),
            ),
            Self::Model => {
                ApiError::new(Code::ModelRequired, "name the model in the string `model`")
                    .about("model")
            }
            Self::Stream => ApiError::new(Code::InvalidJson, "`stream` is neither true nor false")
                .about("stream"),
        }
    }
}

/// Keys of one object, each once.
#[derive(Default)]
struct KeysOnce(HashSet<String>);

impl KeysOnce {
    fn add(&mut self, key: &str, twice: Problem, problem: &mut Option<Problem>) -> bool {
        let why = if self.0.contains(key) {
            twice
        } else if self.0.len() >= MAX_KEYS {
            Problem::TooManyKeys
        } else {
            return self.0.insert(key.to_owned());
        };
        *problem = Some(why);
        false
    }
}

/// Why reading stopped early; `Found::problem` says what it was.
fn stop<E: Error>() -> E {
    E::custom("refused")
}

/// Implements the visits of all values that are not of the kind looked for.
macro_rules! others {
    ($($visit:ident($kind:ty))*) => {
        $(fn $visit<E: Error>(self, _: $kind) -> Result<Self::Value, E> {
            Ok(self.other())
        })*
    };
}

struct Document<'a>(&'a mut Found);

impl<'de> DeserializeSeed<'de> for Document<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl Document<'_> {
    fn other(self) {
        self.0.problem.get_or_insert(Problem::NotAnObject);
    }
}

impl<'de> Visitor<'de> for Document<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    others! { visit_bool(bool) visit_i64(i64) visit_u64(u64) visit_f64(f64) visit_str(&str) }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.other();
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Skip)?.is_some() {}
        self.other();
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let found = self.0;
        let mut keys = KeysOnce::default();
        while let Some(key) = map.next_key::<String>()? {
            if !keys.add(&key, Problem::DuplicateKey, &mut found.problem) {
                return Err(stop());
            }
            match key.as_str() {
                "model" => match map.next_value_seed(Scalar)? {
                    Value::Text(model) if !model.is_empty() => found.model = Some(model),
                    _ => {
                        found.problem.get_or_insert(Problem::Model);
                    }
                },
                "stream" => match map.next_value_seed(Scalar)? {
                    Value::Bool(stream) => found.stream = stream,
                    Value::Null => {}
                    _ => {
                        found.problem.get_or_insert(Problem::Stream);
                    }
                },
                "max_tokens" | "max_completion_tokens" => {
                    if let Value::Number(tokens) = map.next_value_seed(Scalar)? {
                        found.max_tokens = Some(tokens);
                    }
                }
                "messages" => map.next_value_seed(Messages(&mut found.problem))?,
                _ => map.next_value_seed(Skip)?,
            }
        }
        Ok(())
    }
}

/// A short value; of anything longer only that it is something else.
enum Value {
    Null,
    Bool(bool),
    Number(u64),
    Text(String),
    Other,
}

struct Scalar;

impl<'de> DeserializeSeed<'de> for Scalar {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        from.deserialize_any(self)
    }
}

/// A model's name in bytes, as the facts allow it.
const MAX_MODEL_BYTES: usize = 256;

impl<'de> Visitor<'de> for Scalar {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Value, E> {
        Ok(Value::Other)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Other)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        let end = text.floor_char_boundary(MAX_MODEL_BYTES + 1);
        Ok(Value::Text(text[..end].to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        while items.next_element_seed(Skip)?.is_some() {}
        Ok(Value::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Value, A::Error> {
        Skip.visit_map(map)?;
        Ok(Value::Other)
    }
}

struct Messages<'a>(&'a mut Option<Problem>);

impl<'de> DeserializeSeed<'de> for Messages<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl Messages<'_> {
    fn other(self) {}
}

impl<'de> Visitor<'de> for Messages<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("messages")
    }

    others! { visit_bool(bool) visit_i64(i64) visit_u64(u64) visit_f64(f64) visit_str(&str) }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Message(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        Skip.visit_map(map)
    }
}

struct Message<'a>(&'a mut Option<Problem>);

impl<'de> DeserializeSeed<'de> for Message<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl Message<'_> {
    fn other(self) {}
}

impl<'de> Visitor<'de> for Message<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message")
    }

    others! { visit_bool(bool) visit_i64(i64) visit_u64(u64) visit_f64(f64) visit_str(&str) }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Skip)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut keys = KeysOnce::default();
        while let Some(key) = map.next_key::<String>()? {
            if !keys.add(&key, Problem::DuplicateInMessage, self.0) {
                return Err(stop());
            }
            map.next_value_seed(Skip)?;
        }
        Ok(())
    }
}

/// Any value, looked at only as far as needed to know that it is one. Unlike `IgnoredAny` it is
/// bounded in depth (128, `serde_json`'s own limit) and refuses what a document tree would refuse.
struct Skip;

impl<'de> DeserializeSeed<'de> for Skip {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl Skip {
    fn other(self) {}
}

impl<'de> Visitor<'de> for Skip {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    others! { visit_bool(bool) visit_i64(i64) visit_u64(u64) visit_f64(f64) visit_str(&str) }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key::<IgnoredAny>()?.is_some() {
            map.next_value_seed(Self)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
