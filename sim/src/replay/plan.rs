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

/// What the requests are sent to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`: a prompt is one message.
    #[default]
    Chat,
    /// `/v1/completions`: a prompt is text.
    Completions,
}

impl Endpoint {
    /// The path.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }
}

/// How a trace is sent.
#[derive(Clone, Debug)]
pub struct Options {
    /// The model to ask for.
    pub model: String,
    /// How many times the trace's own speed; finite and greater than 0.
    pub speed: f64,
    /// At most so many requests.
    pub limit: Option<usize>,
    /// Spread arrivals inside the quantum of the trace's timestamps, by this seed.
    pub jitter: Option<u64>,
    /// What they are sent to.
    pub endpoint: Endpoint,
    /// The answers' texts are expected, too.
    pub verify: bool,
}

/// The requests of a trace in the order of their arrival, each made when it is asked for.
pub struct Plan {
    /// With their places in the trace.
    requests: std::vec::IntoIter<(u64, Request)>,
    first: Duration,
    block_tokens: u32,
    options: Options,
}

impl Plan {
    /// Plans the first requests of a trace.
    #[must_use]
    pub fn new(trace: Trace, options: Options) -> Plan {
        let Trace {
            block_tokens,
            quantum,
            mut requests,
        } = trace;
        requests.truncate(options.limit.unwrap_or(usize::MAX));
        let mut requests: Vec<(u64, Request)> = (0..).zip(requests).collect();
        if let Some(seed) = options.jitter {
            for (index, request) in &mut requests {
                request.at += quantum.mul_f64(fraction(seed, *index));
            }
            requests.sort_by_key(|(_, request)| request.at);
        }
        let first = requests
            .first()
            .map_or(Duration::ZERO, |(_, request)| request.at);
        Plan {
            requests: requests.into_iter(),
            first,
            block_tokens,
            options,
        }
    }

    fn planned(&self, index: u64, request: &Request) -> Planned {
        let content = self.content(index, request);
        let Options {
            model,
            speed,
            endpoint,
            verify,
            ..
        } = &self.options;
        let prompt = verify.then(|| match endpoint {
            Endpoint::Chat => Prompt::chat([("user", &*content)]),
            Endpoint::Completions => Prompt::completion(&content),
        });
        let since = request.at.saturating_sub(self.first).as_secs_f64();
        let (messages, text) = match endpoint {
            Endpoint::Chat => {
                let message = Message {
                    role: "user",
                    content: &content,
                };
                (Some([message]), None)
            }
            Endpoint::Completions => (None, Some(&*content)),
        };
        let body = Body {
            model,
            messages,
            prompt: text,
            max_tokens: request.output_tokens,
            stream: true,
            stream_options: StreamOptions {
                include_usage: true,
            },
        };
        Planned {
            index,
            start: Duration::try_from_secs_f64(since / speed).unwrap_or(Duration::MAX),
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
        Some(self.planned(index, &request))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.requests.size_hint()
    }
}

impl ExactSizeIterator for Plan {}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    messages: Option<[Message<'a>; 1]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<&'a str>,
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

/// A number from 0 to 1 that follows from both (splitmix64).
fn fraction(seed: u64, index: u64) -> f64 {
    let mut z = seed ^ index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

const BYTES_PER_TOKEN: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Options as TraceOptions;

    fn plan(lines: &[&str], block_tokens: u32, speed: f64, limit: Option<usize>) -> Vec<Planned> {
        let options = TraceOptions {
            block_tokens: Some(block_tokens),
            limit: None,
        };
        let trace = Trace::from_bytes(lines.join("\n").as_bytes(), options).unwrap();
        Plan::new(trace, options_of(speed, limit)).collect()
    }

    fn options_of(speed: f64, limit: Option<usize>) -> Options {
        Options {
            model: "m".to_owned(),
            speed,
            limit,
            jitter: None,
            endpoint: Endpoint::Chat,
            verify: true,
        }
    }

    #[test]
    fn jitter_spreads_arrivals_inside_their_quantum_and_always_alike() {
        let trace = Trace::sample(Some(200)).unwrap();
        let plan = |jitter| -> Vec<(u64, Duration)> {
            let options = Options {
                jitter,
                ..options_of(1.0, None)
            };
            let plan = Plan::new(trace.clone(), options);
            plan.requests
                .map(|(index, request)| (index, request.at))
                .collect()
        };
        let spread = plan(Some(1));
        assert_eq!(spread, plan(Some(1)));
        assert_ne!(spread, plan(Some(2)));
        assert!(spread.is_sorted_by_key(|(_, at)| *at));
        for (index, at) in &spread {
            let own = trace.requests[*index as usize].at;
            assert!((own..own + trace.quantum).contains(at));
        }
        let distinct = |plan: &[(u64, Duration)]| {
            let times: std::collections::BTreeSet<_> = plan.iter().map(|(_, at)| *at).collect();
            times.len()
        };
        assert!(distinct(&plan(None)) < 60 && distinct(&spread) > 190);
    }

    #[test]
    fn a_completion_has_the_same_text_as_a_chat() {
        let line = r#"{"timestamp":0,"input_length":40,"output_length":7,"hash_ids":[1]}"#;
        let trace = Trace::from_bytes(line.as_bytes(), TraceOptions::default()).unwrap();
        let options = Options {
            endpoint: Endpoint::Completions,
            ..options_of(1.0, None)
        };
        let planned = Plan::new(trace, options).next().unwrap();
        let body: serde_json::Value = serde_json::from_slice(&planned.body).unwrap();
        assert_eq!(body["prompt"], content(&plan(&[line], 512, 1.0, None)[0]));
        assert!(body.get("messages").is_none());
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
