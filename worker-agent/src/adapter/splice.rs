//! Top-level members that are put into, or taken out of, a request's body.

use bytes::{Bytes, BytesMut};
use forebay_scheduler::json::{Kind, Scanner, Span, Unreadable, says};

/// What is asked of an engine beyond what the client asked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked<'a> {
    /// Members that are taken out: they steer the engine and are not a client's to set.
    pub(crate) removed: &'static [&'static [u8]],
    /// Keeps its cache apart from others'.
    pub(crate) cache_salt: Option<&'a str>,
    /// The least goes first.
    pub(crate) priority: Option<u32>,
    /// It tells the tokens of the prompt and of the answer, which [`super::Ids`] takes out again.
    pub(crate) ids: bool,
}

/// A body as the engine gets it.
#[derive(PartialEq, Eq)]
pub(crate) struct Spliced {
    /// The bytes, in pieces: long members are those that were received.
    pub(crate) body: Vec<Bytes>,
    /// The client did not ask for the event with the token counts: it is taken out again.
    pub(crate) strip_usage: bool,
}

/// Splices a body of `/v1/chat/completions` or `/v1/completions`: besides what is asked, streams are to end
/// with an event that has the token counts.
///
/// A body that cannot be read is left alone: the engine has its own word for what is wrong with it.
#[must_use]
pub(crate) fn splice(body: &Bytes, asked: &Asked<'_>) -> Spliced {
    spliced(body, asked).unwrap_or_else(|_| Spliced {
        body: vec![body.clone()],
        strip_usage: false,
    })
}

/// A top-level member: from its key's quote to its value's end, and the value alone.
struct Member {
    whole: Span,
    value: Span,
}

fn spliced(body: &Bytes, to: &Asked<'_>) -> Result<Spliced, Unreadable> {
    let mut kept = Vec::new();
    let mut removed = false;
    let mut stream = false;
    let mut options: Option<(usize, Kind)> = None;
    let mut scanner = Scanner::new(body);
    scanner.object(|key, value| {
        let kind = value.kind()?;
        let span = value.skip()?;
        let raw = &body[key.from..key.to];
        if to.removed.iter().any(|name| says(raw, name)) {
            removed = true;
            return Ok(());
        }
        if says(raw, b"stream") {
            stream = kind == Kind::True;
        }
        if says(raw, b"stream_options") {
            options = Some((kept.len(), kind));
        }
        kept.push(Member {
            whole: Span {
                from: key.from - 1,
                to: span.to,
            },
            value: span,
        });
        Ok(())
    })?;
    scanner.end()?;
    let mut added = Vec::new();
    if let Some(salt) = to.cache_salt {
        added.push(format!("\"cache_salt\":\"{salt}\"").into_bytes());
    }
    if let Some(priority) = to.priority {
        added.push(format!("\"priority\":{priority}").into_bytes());
    }
    if to.ids {
        added.push(br#""return_token_ids":true"#.to_vec());
    }
    let mut replaced = None;
    if stream {
        match options {
            Some((at, Kind::Object)) => {
                if let Some(value) = with_usage(body, kept[at].value)? {
                    let key = &body[kept[at].whole.from..kept[at].value.from];
                    replaced = Some((at, [key, &value].concat()));
                }
            }
            None => added.push(br#""stream_options":{"include_usage":true}"#.to_vec()),
            Some((at, Kind::Null)) => {
                let key = &body[kept[at].whole.from..kept[at].value.from];
                replaced = Some((at, [key, br#"{"include_usage":true}"#.as_slice()].concat()));
            }
            // The engine says what is wrong with it.
            Some(_) => {}
        }
    }
    let asked = options.is_some_and(|(_, kind)| kind == Kind::Object) && replaced.is_none();
    let strip_usage = stream && !asked;
    if added.is_empty() && !removed && replaced.is_none() {
        return Ok(Spliced {
            body: vec![body.clone()],
            strip_usage,
        });
    }
    let mut members: Vec<Bytes> = added.into_iter().map(Bytes::from).collect();
    for (at, member) in kept.iter().enumerate() {
        members.push(match &mut replaced {
            Some((replaced, bytes)) if *replaced == at => std::mem::take(bytes).into(),
            _ => body.slice(member.whole.from..member.whole.to),
        });
    }
    Ok(Spliced {
        body: object(members),
        strip_usage,
    })
}

/// A member that is longer is not copied.
const COPIED_BYTES: usize = 4 << 10;

/// An object of these members, in pieces.
fn object(members: Vec<Bytes>) -> Vec<Bytes> {
    let short = members.iter().map(Bytes::len);
    let short: usize = short.filter(|bytes| *bytes <= COPIED_BYTES).sum();
    // Each with a comma or brace, and one brace more.
    let mut between = BytesMut::with_capacity(short + members.len() + 1);
    let mut pieces = Vec::new();
    between.extend_from_slice(b"{");
    for (at, member) in members.into_iter().enumerate() {
        if at > 0 {
            between.extend_from_slice(b",");
        }
        if member.len() <= COPIED_BYTES {
            between.extend_from_slice(&member);
        } else {
            pieces.push(between.split().freeze());
            pieces.push(member);
        }
    }
    between.extend_from_slice(b"}");
    pieces.push(between.freeze());
    pieces
}

/// `stream_options` with `include_usage`; `None`: it has it. Counts in every event would follow from ours,
/// where the client did not ask for any.
fn with_usage(body: &[u8], options: Span) -> Result<Option<Vec<u8>>, Unreadable> {
    let mut members = Vec::new();
    let mut asked = false;
    Scanner::within(body, options).object(|key, value| {
        let kind = value.kind()?;
        let span = value.skip()?;
        if says(&body[key.from..key.to], b"include_usage") {
            asked = kind == Kind::True;
        } else if !says(&body[key.from..key.to], b"continuous_usage_stats") {
            members.push(&body[key.from - 1..span.to]);
        }
        Ok(())
    })?;
    if asked {
        return Ok(None);
    }
    let mut out = br#"{"include_usage":true"#.to_vec();
    for member in members {
        out.push(b',');
        out.extend_from_slice(member);
    }
    out.push(b'}');
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;

    use crate::adapter::Adapter;

    const VLLM: Asked<'_> = Asked {
        removed: Adapter::Vllm.removed(),
        cache_salt: None,
        priority: None,
        ids: false,
    };

    fn check(body: &str, salt: Option<&str>, expected: Option<&str>, strip_usage: bool) {
        let asked = Asked {
            cache_salt: salt,
            ..VLLM
        };
        told(body, &asked, expected, strip_usage);
    }

    fn told(body: &str, asked: &Asked<'_>, expected: Option<&str>, strip_usage: bool) {
        let (got, stripped) = whole(body.as_bytes(), asked);
        let got = String::from_utf8(got).unwrap();
        assert_eq!(got, expected.unwrap_or(body), "{body}");
        assert_eq!(stripped, strip_usage, "{body}");
    }

    fn whole(body: &[u8], asked: &Asked<'_>) -> (Vec<u8>, bool) {
        let spliced = splice(&Bytes::copy_from_slice(body), asked);
        (spliced.body.concat(), spliced.strip_usage)
    }

    #[test]
    fn what_is_long_is_not_copied() {
        let text = "x".repeat(COPIED_BYTES);
        let body = Bytes::from(format!(r#"{{"a":1,"b":"{text}","c":2,"priority":1}}"#));
        let spliced = splice(&body, &SALTED).body;
        let expected = format!(r#"{{"cache_salt":"s","a":1,"b":"{text}","c":2}}"#);
        assert_eq!(String::from_utf8(spliced.concat()).unwrap(), expected);
        assert!(
            spliced
                .iter()
                .any(|piece| piece.as_ptr() == body[7..].as_ptr())
        );
    }

    #[test]
    fn a_body_gets_its_salt_and_a_stream_its_counts() {
        check(r#"{"model":"m"}"#, None, None, false);
        check(
            r#"{ "model" : "m" , "n":1}"#,
            Some("s"),
            Some(r#"{"cache_salt":"s","model" : "m","n":1}"#),
            false,
        );
        check(
            r#"{"stream":true}"#,
            None,
            Some(r#"{"stream_options":{"include_usage":true},"stream":true}"#),
            true,
        );
        check(
            r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            None,
            None,
            false,
        );
        check(
            r#"{"stream":true,"stream_options":{"x":[1],"include_usage":false}}"#,
            None,
            Some(r#"{"stream":true,"stream_options":{"include_usage":true,"x":[1]}}"#),
            true,
        );
        check(
            r#"{"stream":true,"stream_options":null}"#,
            None,
            Some(r#"{"stream":true,"stream_options":{"include_usage":true}}"#),
            true,
        );
        check("{}", Some("s"), Some(r#"{"cache_salt":"s"}"#), false);
    }

    #[test]
    fn counts_in_every_event_are_only_for_who_asked_for_counts() {
        check(
            r#"{"stream":true,"stream_options":{"continuous_usage_stats":true}}"#,
            None,
            Some(r#"{"stream":true,"stream_options":{"include_usage":true}}"#),
            true,
        );
        check(
            r#"{"stream":true,"stream_options":{"continuous_usage_stats":true,"include_usage":true}}"#,
            None,
            None,
            false,
        );
    }

    #[test]
    fn an_engine_is_told_what_goes_first() {
        let asked = Asked {
            priority: Some(7),
            ..VLLM
        };
        told(
            r#"{"priority":-9,"a":1}"#,
            &asked,
            Some(r#"{"priority":7,"a":1}"#),
            false,
        );
    }

    #[test]
    fn each_kind_of_engine_has_members_that_steer_it() {
        let without = |adapter: Adapter| Asked {
            removed: adapter.removed(),
            ..Asked::default()
        };
        let body = r#"{"id_slot":2,"rid":"x","vllm_xargs":{},"cache_prompt":false,"a":1}"#;
        let llama = r#"{"rid":"x","vllm_xargs":{},"a":1}"#;
        told(body, &without(Adapter::LlamaCpp), Some(llama), false);
        let sglang = r#"{"id_slot":2,"vllm_xargs":{},"cache_prompt":false,"a":1}"#;
        told(body, &without(Adapter::Sglang), Some(sglang), false);
        let vllm = r#"{"id_slot":2,"rid":"x","cache_prompt":false,"a":1}"#;
        told(body, &without(Adapter::Vllm), Some(vllm), false);
    }

    #[test]
    fn a_client_does_not_steer_the_engine() {
        check(
            r#"{"priority":-9,"a":1,"cache\u005fsalt":"mine","kv_transfer_params":{"x":{}},"b":2,"request_id":"r"}"#,
            Some("s"),
            Some(r#"{"cache_salt":"s","a":1,"b":2}"#),
            false,
        );
        check(r#"{"priority":1}"#, None, Some("{}"), false);
    }

    #[test]
    fn ids_are_asked_for_by_the_agent_alone() {
        let body = br#"{"a":1,"return_token_ids":false}"#;
        let asked = Asked {
            cache_salt: Some("s"),
            ids: true,
            ..VLLM
        };
        let (spliced, _) = whole(body, &asked);
        let expected = r#"{"cache_salt":"s","return_token_ids":true,"a":1}"#;
        assert_eq!(String::from_utf8(spliced).unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_read_is_left_to_the_engine() {
        for body in ["", "[]", "{", r#"{"a":1}x"#, r#"{"a"}"#] {
            check(body, Some("s"), None, false);
        }
        check(r#"{"stream":true,"stream_options":7}"#, None, None, true);
    }

    const SALTED: Asked<'_> = Asked {
        cache_salt: Some("s"),
        ..VLLM
    };

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 12, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(".{0,6}", inner, 0..4)
                    .prop_map(|map| Value::from(map.into_iter().collect::<Map<_, _>>())),
            ]
        })
    }

    proptest! {
        #[test]
        fn it_is_the_same_edit_as_on_a_tree(
            members in proptest::collection::btree_map("[a-c\"é\\\\]{1,3}", value(), 0..5),
            stream: bool, options in proptest::option::of(proptest::option::of(any::<bool>())),
            priority: bool, pretty: bool,
        ) {
            let mut body: Map<String, Value> = members.into_iter().collect();
            body.insert("stream".into(), stream.into());
            if priority {
                body.insert("priority".into(), 3.into());
            }
            if let Some(asked) = options {
                body.insert("stream_options".into(), asked.map_or(json!({}), |asked| json!({"include_usage": asked})));
            }
            let mut expected = body.clone();
            expected.remove("priority");
            expected.insert("cache_salt".into(), "s".into());
            if stream {
                expected.insert("stream_options".into(), json!({"include_usage": true}));
            }
            let body = Value::from(body);
            let text = if pretty { serde_json::to_vec_pretty(&body) } else { serde_json::to_vec(&body) }.unwrap();
            let (once, _) = whole(&text, &SALTED);
            prop_assert_eq!(serde_json::from_slice::<Value>(&once).unwrap(), Value::from(expected));
            let (twice, _) = whole(&once, &SALTED);
            prop_assert_eq!(once, twice);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = splice(&bytes.into(), &Asked { ids: true, ..SALTED });
        }
    }
}
