//! Judges one answer: from the events of a stream to times and counts, or to a fault.
//!
//! `[DONE]` alone is not success, since engines send it after an error too: a `finish_reason`,
//! `[DONE]` and the right token count together are.

use super::plan::Expected;
use crate::engine::text::Verifier;
use serde::Deserialize;
use serde_json::Value;
use std::borrow::Cow;
use std::time::Duration;

/// Why a request counts as an error.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Fault {
    /// The HTTP status, if there was one.
    pub(super) status: Option<u16>,
    /// The error's code as the server gave it, or one of ours.
    pub(super) code: Cow<'static, str>,
}

impl Fault {
    pub(super) fn ours(status: Option<u16>, code: &'static str) -> Fault {
        Fault {
            status,
            code: Cow::Borrowed(code),
        }
    }

    /// The fault that an answer other than 200 tells of.
    pub(super) fn of_answer(status: u16, body: &[u8]) -> Fault {
        let chunk = serde_json::from_slice::<Chunk>(body).ok();
        match chunk.and_then(|chunk| chunk.error) {
            Some(error) => Fault {
                status: Some(status),
                code: error.code(),
            },
            None => Fault::ours(Some(status), "no_error_object"),
        }
    }
}

/// A request that was answered as it should be. Times count from its intended start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Served {
    pub(super) first_token: Duration,
    pub(super) last_token: Duration,
    pub(super) end: Duration,
    pub(super) prompt_tokens: u64,
    pub(super) output_tokens: u64,
    /// Absent is not zero: the engine did not say.
    pub(super) cached_tokens: Option<u64>,
}

/// An answer of status 200 as far as it has come.
pub(super) struct Reply {
    expected_tokens: u64,
    verifier: Option<Verifier>,
    first: Option<Duration>,
    last: Duration,
    finish_reason: Option<String>,
    usage: Option<Usage>,
    done: bool,
    fault: Option<Fault>,
}

impl Reply {
    pub(super) fn new(expected: &Expected) -> Reply {
        Reply {
            expected_tokens: expected.output_tokens,
            verifier: expected.prompt.as_ref().map(Verifier::new),
            first: None,
            last: Duration::ZERO,
            finish_reason: None,
            usage: None,
            done: false,
            fault: None,
        }
    }

    /// Takes the data of the next event. The first fault is the one that counts.
    pub(super) fn event(&mut self, data: &[u8], at: Duration) {
        if self.fault.is_some() {
            return;
        }
        if data == b"[DONE]" {
            self.done = true;
        } else if self.done {
            self.fault("event_after_done");
        } else {
            match serde_json::from_slice::<Chunk>(data) {
                Ok(chunk) => self.chunk(chunk, at),
                Err(_) => self.fault("bad_event"),
            }
        }
    }

    fn chunk(&mut self, chunk: Chunk, at: Duration) {
        if let Some(error) = chunk.error {
            self.fault = Some(Fault {
                status: Some(200),
                code: error.code(),
            });
            return;
        }
        self.usage = chunk.usage.or(self.usage.take());
        for choice in chunk.choices {
            let delta = choice.delta.and_then(|delta| delta.content);
            if let Some(text) = delta.or(choice.text).filter(|text| !text.is_empty()) {
                self.first.get_or_insert(at);
                self.last = at;
                if self
                    .verifier
                    .as_mut()
                    .is_some_and(|verifier| verifier.push(&text).is_err())
                {
                    return self.fault("text_mismatch");
                }
            }
            self.finish_reason = choice.finish_reason.or(self.finish_reason.take());
        }
    }

    /// The stream ended in order, `at` after the intended start.
    pub(super) fn end(mut self, at: Duration) -> Result<Served, Fault> {
        let bad = |code| Err(Fault::ours(Some(200), code));
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let Some(finish_reason) = self.finish_reason else {
            return bad("no_finish_reason");
        };
        if !self.done {
            return bad("no_done");
        }
        let (Some(usage), Some(first_token)) = (self.usage, self.first) else {
            return bad("no_usage");
        };
        let counted = match &*finish_reason {
            "length" => usage.completion_tokens == self.expected_tokens,
            "stop" => (1..=self.expected_tokens).contains(&usage.completion_tokens),
            _ => return bad("bad_finish_reason"),
        };
        let verified = self.verifier.map(Verifier::finish);
        if verified.is_some_and(|tokens| tokens != Ok(usage.completion_tokens)) {
            return bad("text_mismatch");
        }
        if !counted {
            return bad("wrong_token_count");
        }
        Ok(Served {
            first_token,
            last_token: self.last,
            end: at,
            prompt_tokens: usage.prompt_tokens,
            output_tokens: usage.completion_tokens,
            cached_tokens: usage
                .prompt_tokens_details
                .and_then(|details| details.cached_tokens),
        })
    }

    /// The stream broke off: what it said before counts for more than how it broke.
    pub(super) fn broken(self, code: &'static str) -> Fault {
        self.fault.unwrap_or(Fault::ours(Some(200), code))
    }

    fn fault(&mut self, code: &'static str) {
        self.fault = Some(Fault::ours(Some(200), code));
    }
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<ErrorObject>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Option<Delta>,
    text: Option<String>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct ErrorObject {
    #[serde(default)]
    code: Value,
    #[serde(default)]
    r#type: Value,
}

impl ErrorObject {
    /// The code, else the type; engines give numbers, which say no more than the status.
    fn code(&self) -> Cow<'static, str> {
        let text = [&self.code, &self.r#type]
            .into_iter()
            .find_map(Value::as_str);
        let plain = |c: &char| c.is_ascii_alphanumeric() || "_-. ".contains(*c);
        let code: String = text
            .unwrap_or_default()
            .chars()
            .filter(plain)
            .take(64)
            .collect();
        if code.is_empty() {
            Cow::Borrowed("unnamed_error")
        } else {
            Cow::Owned(code)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::text::Prompt;
    use proptest::prelude::*;

    fn judge(events: &[&str], prompt: Option<Prompt>) -> Result<Served, Fault> {
        let mut reply = Reply::new(&Expected {
            output_tokens: 2,
            prompt,
        });
        for (at, event) in events.iter().enumerate() {
            reply.event(event.as_bytes(), Duration::from_millis(at as u64));
        }
        reply.end(Duration::from_millis(events.len() as u64))
    }

    fn said(text: &str) -> String {
        format!(r#"{{"choices":[{{"delta":{{"content":"{text}"}},"finish_reason":null}}]}}"#)
    }

    const ROLE: &str =
        r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
    const LAST: &str = r#"{"choices":[{"delta":{"content":"b"},"finish_reason":"length"}]}"#;
    const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4}}}"#;

    #[test]
    fn a_whole_stream_is_served() {
        let served = judge(&[ROLE, &said("a"), LAST, USAGE, "[DONE]"], None).unwrap();
        let ms = Duration::from_millis;
        assert_eq!(
            (served.first_token, served.last_token, served.end),
            (ms(1), ms(2), ms(5))
        );
        assert_eq!((served.prompt_tokens, served.output_tokens), (9, 2));
        assert_eq!(served.cached_tokens, Some(4));
    }

    #[test]
    fn what_is_missing_or_wrong_is_a_fault() {
        let a = said("a");
        let three = USAGE.replace(":2", ":3");
        let stop = LAST.replace("length", "stop");
        let abort = LAST.replace("length", "abort");
        let error = r#"{"error":{"message":"m","type":"InternalServerError","code":500}}"#;
        for (events, code) in [
            (&[] as &[&str], "no_finish_reason"),
            (&["[DONE]"], "no_finish_reason"),
            (&[&a, LAST, USAGE], "no_done"),
            (&[&a, LAST, "[DONE]"], "no_usage"),
            (&[&a, LAST, &three, "[DONE]"], "wrong_token_count"),
            (&[&a, &stop, &three, "[DONE]"], "wrong_token_count"),
            (&[&a, &abort, USAGE, "[DONE]"], "bad_finish_reason"),
            (&[&a, error, "[DONE]"], "InternalServerError"),
            (&[&a, "{", "[DONE]"], "bad_event"),
            (&[&a, LAST, USAGE, "[DONE]", USAGE], "event_after_done"),
        ] {
            assert_eq!(judge(events, None).unwrap_err().code, code);
        }
        let early = USAGE.replace(":2", ":1");
        assert!(
            judge(&[&stop, &early, "[DONE]"], None).is_ok(),
            "a model may stop early"
        );
    }

    #[test]
    fn a_wrong_text_is_a_fault_when_verified() {
        let prompt = Prompt::chat([("user", "hi")]);
        let tokens: Vec<String> = prompt
            .answer()
            .take(3)
            .map(|token| token.as_str().to_owned())
            .collect();
        let stream = |first: &str, second: &str| {
            let last = LAST.replace("\"b\"", &format!("\"{second}\""));
            judge(&[&said(first), &last, USAGE, "[DONE]"], Some(prompt)).map_err(|f| f.code)
        };
        assert!(stream(&tokens[0], &tokens[1]).is_ok());
        assert_eq!(stream(&tokens[0], &tokens[2]).unwrap_err(), "text_mismatch");
        assert_eq!(stream(&tokens[0], &tokens[0]).unwrap_err(), "text_mismatch");
        assert_eq!(stream(&tokens[0], "").unwrap_err(), "text_mismatch");
    }

    #[test]
    fn an_error_answer_is_known_by_its_code() {
        let code = |body: &str| Fault::of_answer(503, body.as_bytes()).code;
        assert_eq!(
            code(r#"{"error":{"message":"m","type":"t","code":"no_capacity"}}"#),
            "no_capacity"
        );
        assert_eq!(
            code(r#"{"error":{"type":"Service Unavailable","code":503}}"#),
            "Service Unavailable"
        );
        assert_eq!(code(r#"{"error":{"code":"\u0007<b>"}}"#), "b");
        assert_eq!(code(r#"{"error":{}}"#), "unnamed_error");
        assert_eq!(code("<html>"), "no_error_object");
    }

    proptest! {
        #[test]
        fn no_event_panics(events in proptest::collection::vec(".{0,40}", 0..5)) {
            let events: Vec<&str> = events.iter().map(|event| &**event).collect();
            let _ = judge(&events, Some(Prompt::completion("x")));
        }
    }
}
