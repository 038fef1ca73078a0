//! The shape of a request: which parameters it has, and of what class. Never a value of theirs.
//!
//! Engines die of parameters as often as of prompts (a seed, a penalty, a grammar), so what is held against a
//! request is held against its prompt with these, and not against the prompt with others.

use crate::json::{Kind, Scanner, Span, Unreadable, says, unescape};

/// The name of a parameter that counts by being there; `None`: it is none of these.
fn by_name(name: &str) -> Option<&'static str> {
    macro_rules! one_of {
        ($($known:literal)*) => {
            match name {
                $($known => Some($known),)*
                _ => None,
            }
        };
    }
    one_of!(
        "tools" "tool_choice" "functions" "suffix" "chat_template" "chat_template_kwargs" "documents"
        "reasoning_effort" "seed" "top_p" "top_k" "min_p" "presence_penalty" "frequency_penalty"
        "repetition_penalty" "logit_bias" "logprobs" "top_logprobs" "prompt_logprobs" "stop" "min_tokens"
        "ignore_eos" "bad_words" "allowed_token_ids" "best_of" "use_beam_search" "echo" "guided_json"
        "guided_regex" "guided_choice" "guided_grammar" "structured_outputs" "response_format"
    )
}

/// Whether it is no parameter of the engine's work, or in the prompt's own hash.
fn is_none(name: &str) -> bool {
    matches!(
        name,
        "model"
            | "messages"
            | "prompt"
            | "input"
            | "stream"
            | "stream_options"
            | "user"
            | "metadata"
            | "store"
            | "cache_salt"
            | "prompt_cache_key"
            | "session_id"
            | "safety_identifier"
            | "service_tier"
    )
}

/// Collects the shape of one body, member by member.
#[derive(Default)]
pub(super) struct Shaper {
    found: Vec<&'static str>,
}

impl Shaper {
    /// Takes a top-level member that is not `null`: its key as it stands, and its value.
    pub(super) fn take(&mut self, body: &[u8], key: &[u8], value: Span) -> Result<(), Unreadable> {
        let mut unescaped = Vec::new();
        let key = if memchr::memchr(b'\\', key).is_none() {
            key
        } else {
            unescape(key, |piece| unescaped.extend_from_slice(piece))?;
            &unescaped
        };
        // Keys that are no text are nobody's.
        let name = std::str::from_utf8(key).unwrap_or_default();
        let found = match name {
            name if is_none(name) => return Ok(()),
            "response_format" => format_of(body, value)?,
            "temperature" if number(body, value) == Some(0.0) => "temperature=0",
            "temperature" => "temperature",
            "n" if number(body, value).is_none_or(|n| n <= 1.0) => return Ok(()),
            "n" => "n>1",
            "max_tokens" | "max_completion_tokens" => length_class(number(body, value)),
            name => by_name(name).unwrap_or("other"),
        };
        self.found.push(found);
        Ok(())
    }

    /// Such as `max_tokens<=256, seed`; the order of the body's members makes no difference.
    pub(super) fn finish(mut self) -> String {
        self.found.sort_unstable();
        self.found.dedup();
        self.found.join(", ")
    }
}

fn number(body: &[u8], value: Span) -> Option<f64> {
    let text = std::str::from_utf8(&body[value.from..value.to]).ok()?;
    text.trim().parse().ok()
}

fn length_class(tokens: Option<f64>) -> &'static str {
    match tokens {
        Some(tokens) if tokens <= 16.0 => "max_tokens<=16",
        Some(tokens) if tokens <= 256.0 => "max_tokens<=256",
        Some(tokens) if tokens <= 4_096.0 => "max_tokens<=4096",
        Some(_) | None => "max_tokens",
    }
}

/// By its `type`.
fn format_of(body: &[u8], value: Span) -> Result<&'static str, Unreadable> {
    let mut scanner = Scanner::within(body, value);
    if scanner.kind()? != Kind::Object {
        return Ok("response_format");
    }
    let mut format = "response_format";
    scanner.object(|key, value| {
        let is_type = says(&body[key.from..key.to], b"type");
        if !is_type || value.kind()? != Kind::String {
            return value.skip().map(drop);
        }
        let said = value.string()?;
        let said = &body[said.from..said.to];
        format = match said {
            _ if says(said, b"text") => "response_format=text",
            _ if says(said, b"json_object") => "response_format=json_object",
            _ if says(said, b"json_schema") => "response_format=json_schema",
            _ => "response_format",
        };
        Ok(())
    })?;
    Ok(format)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str, expected: &str) {
        let mut shaper = Shaper::default();
        let mut scanner = Scanner::new(body.as_bytes());
        let read = scanner.object(|key, value| {
            let raw = &body.as_bytes()[key.from..key.to];
            let null = value.kind()? == Kind::Null;
            let span = value.skip()?;
            if null {
                return Ok(());
            }
            shaper.take(body.as_bytes(), raw, span)
        });
        assert_eq!(read, Ok(()), "{body}");
        assert_eq!(shaper.finish(), expected, "{body}");
    }

    #[test]
    fn parameters_count_by_being_there_and_by_class() {
        check(
            r#"{"model":"m","messages":[],"stream":true,"user":"u"}"#,
            "",
        );
        check(r#"{"seed":7,"model":"m"}"#, "seed");
        check(r#"{"seed":null}"#, "");
        check(r#"{"s\u0065ed":7}"#, "seed");
        check(r#"{"n":1}"#, "");
        check(r#"{"n":3, "top_p":0.5}"#, "n>1, top_p");
        check(r#"{"top_p":0.1, "n":2}"#, "n>1, top_p");
        check(r#"{"temperature":0.0}"#, "temperature=0");
        check(r#"{"temperature":0.7}"#, "temperature");
        check(r#"{"max_tokens":16}"#, "max_tokens<=16");
        check(r#"{"max_completion_tokens":17}"#, "max_tokens<=256");
        check(r#"{"max_tokens":100000}"#, "max_tokens");
        check(
            r#"{"response_format":{"type":"json_schema","json_schema":{}}}"#,
            "response_format=json_schema",
        );
        check(
            r#"{"response_format":{"type":"json_object"}}"#,
            "response_format=json_object",
        );
        check(r#"{"guided_regex":"secret.*"}"#, "guided_regex");
    }

    #[test]
    fn names_and_values_of_clients_are_not_told() {
        check(r#"{"my secret":"text","another":{"seed":1}}"#, "other");
        check(r#"{"response_format":"my secret"}"#, "response_format");
        check(
            r#"{"response_format":{"type":"my secret"}}"#,
            "response_format",
        );
    }
}
