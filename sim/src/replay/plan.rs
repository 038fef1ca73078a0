//! What is sent when: a trace turned into requests, one at a time.
//!
//! The first request starts at once and the others keep their distance to it, divided by the
//! speed. A block of the trace becomes `block size × 4` bytes of words that depend on its id
//! alone, the last one cut to the input's length; what no block covers, the whole prompt in a
//! trace without blocks, is text that no other request has.

use super::words::{self, Owner};
use crate::engine::text::Prompt;
use crate::trace::{Request, Trace};
use bytes::Bytes;
use serde::Serialize;
use std::time::Duration;

/// One request to send.
pub struct Planned {
    /// Its place in the trace, from 0.
    pub index: u64,
    /// When to send it, from the start of the replay.
    pub start: Duration,
    /// The body of a streaming chat request; it has a prompt in it.
    pub body: Bytes,
    /// What has to come back.
    pub expected: Expected,
}

/// What has to come back.
#[derive(Clone)]
pub struct Expected {
    /// Tokens asked for.
    pub output_tokens: u64,
    /// The prompt, where the answer's text is to be verified.
    pub prompt: Option<Prompt>,
}

/// The requests of a trace in order, each made when it is asked for.
pub struct Plan {
    requests: std::iter::Enumerate<std::vec::IntoIter<Request>>,
    first: Duration,
    block_tokens: u32,
    model: String,
    speed: f64,
    verify: bool,
}

impl Plan {
    /// Plans the first `limit` requests of a trace at `speed` times its own speed, which must be
    /// finite and greater than 0. With `verify` the answers' texts are expected too.
    #[must_use]
    pub fn new(
        trace: Trace,
        model: String,
        speed: f64,
        limit: Option<usize>,
        verify: bool,
    ) -> Plan {
        let Trace {
            block_tokens,
            mut requests,
        } = trace;
        requests.truncate(limit.unwrap_or(usize::MAX));
        let first = requests
            .first()
            .map_or(Duration::ZERO, |request| request.at);
        let requests = requests.into_iter().enumerate();
        Plan {
            requests,
            first,
            block_tokens,
            model,
            speed,
            verify,
        }
    }

    fn planned(&self, index: u64, request: &Request) -> Planned {
        let content = self.content(index, request);
        let prompt = self.verify.then(|| Prompt::chat([("user", &*content)]));
        let since = request.at.saturating_sub(self.first).as_secs_f64();
        let body = Body {
            model: &self.model,
            messages: [Message {
                role: "user",
                content: &content,
            }],
            max_tokens: request.output_tokens,
            stream: true,
            stream_options: StreamOptions {
                include_usage: true,
            },
        };
        Planned {
            index,
            start: Duration::try_from_secs_f64(since / self.speed).unwrap_or(Duration::MAX),
            body: serde_json::to_vec(&body)
                .expect("strings and numbers serialise")
                .into(),
            expected: Expected {
                output_tokens: u64::from(request.output_tokens),
                prompt,
            },
        }
    }

    fn content(&self, index: u64, request: &Request) -> String {
        let bytes = request.input_tokens as usize * BYTES_PER_TOKEN;
        let block_bytes = self.block_tokens as usize * BYTES_PER_TOKEN;
        let mut content = String::with_capacity(bytes + 128);
        for id in request.block_ids() {
            let room = bytes - content.len();
            if room == 0 {
                break;
            }
            words::write(&mut content, Owner::Block(id), block_bytes.min(room));
        }
        let rest = bytes - content.len();
        words::write(&mut content, Owner::Request(index), rest);
        content
    }
}

impl Iterator for Plan {
    type Item = Planned;

    fn next(&mut self) -> Option<Planned> {
        let (index, request) = self.requests.next()?;
        Some(self.planned(index as u64, &request))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.requests.size_hint()
    }
}

impl ExactSizeIterator for Plan {}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    messages: [Message<'a>; 1],
    max_tokens: u32,
    stream: bool,
    stream_options: StreamOptions,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'a str,
    content: &'a str,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

const BYTES_PER_TOKEN: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Options;

    fn plan(lines: &[&str], block_tokens: u32, speed: f64, limit: Option<usize>) -> Vec<Planned> {
        let options = Options {
            block_tokens: Some(block_tokens),
            limit: None,
        };
        let trace = Trace::from_bytes(lines.join("\n").as_bytes(), options).unwrap();
        Plan::new(trace, "m".to_owned(), speed, limit, true).collect()
    }

    fn content(planned: &Planned) -> String {
        let body: serde_json::Value = serde_json::from_slice(&planned.body).unwrap();
        body["messages"][0]["content"].as_str().unwrap().to_owned()
    }

    #[test]
    fn times_keep_their_distance_divided_by_the_speed() {
        let lines = [
            r#"{"timestamp":500,"input_length":1,"output_length":1}"#,
            r#"{"timestamp":500,"input_length":1,"output_length":1}"#,
            r#"{"timestamp":1500,"input_length":1,"output_length":1}"#,
        ];
        let starts = |speed, limit| -> Vec<u128> {
            plan(&lines, 512, speed, limit)
                .iter()
                .map(|p| p.start.as_millis())
                .collect()
        };
        assert_eq!(starts(1.0, None), [0, 0, 1000]);
        assert_eq!(starts(10.0, None), [0, 0, 100]);
        assert_eq!(starts(1.0, Some(2)), [0, 0]);
    }

    #[test]
    fn equal_blocks_are_equal_text_and_the_last_is_cut() {
        let lines = [
            r#"{"timestamp":0,"input_length":40,"output_length":7,"hash_ids":[1,[5,2]]}"#,
            r#"{"timestamp":0,"input_length":24,"output_length":7,"hash_ids":[1,5]}"#,
            r#"{"timestamp":0,"input_length":48,"output_length":7,"hash_ids":[1,9,6]}"#,
        ];
        let plan = plan(&lines, 16, 1.0, None);
        let texts: Vec<String> = plan.iter().map(content).collect();
        assert_eq!(
            texts.iter().map(String::len).collect::<Vec<_>>(),
            [160, 96, 192]
        );
        assert_eq!(texts[0][..96], texts[1]);
        assert_eq!(texts[0][..64], texts[2][..64]);
        assert_eq!(
            texts[0][128..],
            texts[2][128..160],
            "block 6, wherever it stands"
        );
        assert_ne!(texts[0][64..96], texts[2][64..96]);
    }

    #[test]
    fn what_no_block_covers_is_unique() {
        let line = r#"{"timestamp":0,"input_length":40,"output_length":7,"hash_ids":[1]}"#;
        let bare = r#"{"timestamp":0,"input_length":40,"output_length":7}"#;
        let texts: Vec<String> = plan(&[line, line, bare, bare], 16, 1.0, None)
            .iter()
            .map(content)
            .collect();
        assert_eq!(texts[0][..64], texts[1][..64]);
        assert_ne!(texts[0][64..], texts[1][64..]);
        assert_ne!(texts[2][..64], texts[3][..64]);
        assert!(texts.iter().all(|text| text.len() == 160));
    }

    #[test]
    fn a_body_asks_for_a_stream_with_usage() {
        let line = r#"{"timestamp":0,"input_length":4,"output_length":7}"#;
        let planned = plan(&[line], 16, 1.0, None).remove(0);
        let body: serde_json::Value = serde_json::from_slice(&planned.body).unwrap();
        assert_eq!(body["model"], "m");
        assert_eq!(body["max_tokens"], 7);
        assert_eq!(body["stream"], true);
        assert_eq!(body["stream_options"]["include_usage"], true);
        let prompt = Prompt::chat([("user", &*content(&planned))]);
        assert_eq!(prompt.tokens(), 4);
        assert!(
            planned
                .expected
                .prompt
                .is_some_and(|expected| expected == prompt)
        );
    }
}
