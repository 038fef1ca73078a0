//! What the canonical form keeps and drops, and what its chain promises.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::length::Lengths;

const KEY: FingerprintKey = FingerprintKey {
    epoch: 1,
    bytes: *b"0123456789abcdef",
};
const PROFILE: RenderProfile = RenderProfile {
    tools: ToolsOrder::SystemTools,
    late_system: LateSystem::InPlace,
    parts_on_lines: false,
    developer: false,
    reasoning: Reasoning::OfTurn,
    names: false,
};

const fn settings<'a>(scope: &'a str, profile: &'a RenderProfile) -> Settings<'a> {
    Settings {
        key: &KEY,
        root: Root {
            pool: "default",
            model: "m",
            adapter: None,
            scope,
        },
        profile,
        chunk_bytes: 16,
    }
}

fn with(endpoint: Endpoint, body: &[u8], scope: &str, profile: &RenderProfile) -> Prompt {
    read(endpoint, body, &settings(scope, profile)).unwrap()
}

fn chat(body: &str) -> Prompt {
    with(Endpoint::Chat, body.as_bytes(), "t", &PROFILE)
}

fn say(messages: &Value) -> Prompt {
    chat(&json!({"model": "m", "messages": messages}).to_string())
}

/// Long enough that its last chunk is full: what differs before it shows.
const REST: &str = "0123456789abcdef0123456789abcdef";

fn message(message: &str) -> Prompt {
    chat(&format!(
        r#"{{"messages":[{message},{{"role":"user","content":"{REST}"}}]}}"#
    ))
}

fn tool(tool: &str) -> Prompt {
    chat(&format!(
        r#"{{"tools":[{tool}],"messages":[{{"role":"user","content":"{REST}"}}]}}"#
    ))
}

fn same(one: &Prompt, other: &Prompt) -> bool {
    one.chunks == other.chunks && one.bytes == other.bytes
}

#[test]
fn what_the_renderer_ignores_changes_nothing() {
    let plain = message(r#"{"role":"assistant","content":"grüße 😀\n"}"#);
    for other in [
        r#"{"role":"assistant","content":"gr\u00fc\u00dfe \ud83d\ude00\u000a"}"#,
        "{ \"content\" : \"grüße 😀\\n\" ,\n\"role\":\"assistant\" }",
        r#"{"r\u006fle":"assistant","content":"grüße 😀\n"}"#,
        r#"{"role":"assistant","content":"grüße 😀\n","refusal":null,"annotations":[],"audio":null,"function_call":null,"tool_calls":[]}"#,
        r#"{"role":"assistant","content":"grüße 😀\n","tool_calls":null,"name":"anna"}"#,
        r#"{"role":"assistant","content":[{"type":"text","text":"grüße 😀\n"}]}"#,
        r#"{"role":"assistant","content":[{"type":"text","text":"grüße 😀\n","cache_control":{"type":"ephemeral"}}],"cache_control":{"type":"ephemeral"}}"#,
        r#"{"role":"assistant","content":[{"type":"text","text":"grüße "},{"type":"text","text":"😀\n"}]}"#,
        r#"{"role":"assistant","content":"grüße 😀\n","reasoning_content":"hm"}"#,
    ] {
        assert!(same(&plain, &message(other)), "{other}");
    }
    let system = message(r#"{"role":"system","content":"s"}"#);
    assert!(same(
        &system,
        &message(r#"{"role":"developer","content":"s"}"#)
    ));

    let call = |id: &str, arguments: &str, more: &str| {
        let arguments = Value::from(arguments);
        message(&format!(
            r#"{{"role":"assistant","content":null,"tool_calls":[{{"id":"{id}","type":"function","function":{{"name":"f","arguments":{arguments}}}{more}}}]}}"#
        ))
    };
    let plain = call("a", r#"{"x":1.0,"y":"ü"}"#, "");
    assert!(same(
        &plain,
        &call("b", r#"{"x":1.0,"y":"ü"}"#, r#","index":0"#)
    ));
    assert!(same(
        &plain,
        &call("a", r#"{ "x" : 1.00, "y" : "\u00fc" }"#, "")
    ));
    assert!(same(&plain, &call("a", r#"{"x":1e0,"y":"ü"}"#, "")));
    let without_content = plain;
    let empty = message(
        r#"{"role":"assistant","content":"","tool_calls":[{"function":{"arguments":"{\"x\":1.0,\"y\":\"ü\"}","name":"f"}}]}"#,
    );
    assert!(same(&without_content, &empty));
    assert!(same(&call("a", "", ""), &call("a", "{}", "")));

    let plain = tool(
        r#"{"type":"function","function":{"name":"f","description":"d","parameters":{"type":"object"}}}"#,
    );
    for other in [
        r#"{"function":{"parameters":{"type":"object"},"description":"d","name":"f","x":1},"type":"function"}"#,
        r#"{"type":"function","cache_control":{"type":"ephemeral"},"function":{"name":"f","description":"d","parameters":{"type":"object"}}}"#,
    ] {
        assert!(same(&plain, &tool(other)), "{other}");
    }

    let sampled = format!(
        r#"{{"model":"x","temperature":0.5,"n":2,"seed":1,"user":"u","metadata":{{}},"stop":["a"],"response_format":{{"type":"text"}},"parallel_tool_calls":true,"tool_choice":"auto","messages":[{{"role":"user","content":"{REST}"}}]}}"#
    );
    let bare = format!(r#"{{"messages":[{{"role":"user","content":"{REST}"}}]}}"#);
    assert!(same(&chat(&sampled), &chat(&bare)));
}

#[test]
fn what_the_renderer_renders_counts() {
    let call = |arguments: &str| {
        let arguments = Value::from(arguments);
        message(&format!(
            r#"{{"role":"assistant","tool_calls":[{{"function":{{"name":"f","arguments":{arguments}}}}}]}}"#
        ))
    };
    assert!(!same(&call(r#"{"x":1,"y":2}"#), &call(r#"{"y":2,"x":1}"#)));
    assert!(!same(&call(r#"{"x":1.0}"#), &call(r#"{"x":1}"#)));
    assert!(!same(&call("not json"), &call("not  json")));
    let content = |text: &str| message(&json!({"role": "assistant", "content": text}).to_string());
    assert!(!same(&content("a"), &content("a ")));
    assert!(!same(&content("é"), &content("e\u{301}")));
    let plain = tool(r#"{"type":"function","function":{"name":"f","parameters":{"a":1,"b":2}}}"#);
    for other in [
        r#"{"type":"function","function":{"name":"f","parameters":{"b":2,"a":1}}}"#,
        r#"{"type":"function","function":{"name":"f","parameters":{"a":1,"b":2},"strict":false}}"#,
        r#"{"type":"other","custom":{"name":"f"}}"#,
    ] {
        assert!(!same(&plain, &tool(other)), "{other}");
    }
    let image = |url: &str| {
        message(&format!(
            r#"{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"{url}"}}}}]}}"#
        ))
    };
    assert!(!same(&image("https://a/1"), &image("https://a/2")));
    assert!(same(
        &image("data:image/png;base64,aGk="),
        &image("data:image/png;base64,\\u0061Gk=")
    ));
    assert!(!same(
        &image("data:image/png;base64,aGk="),
        &image("data:image/png;base64,aGo=")
    ));
}

#[test]
fn borders_between_fields_cannot_be_moved() {
    let two = |a: &str, b: &str| {
        say(
            &json!([{"role": "user", "content": a}, {"role": "user", "content": b}, {"role": "user", "content": REST}]),
        )
    };
    assert!(!same(&two("ab", "c"), &two("a", "bc")));
    let one = say(&json!([{"role": "user", "content": "abc"}, {"role": "user", "content": REST}]));
    assert!(!same(&one, &two("abc", "")));
    let name = message(r#"{"role":"tool","name":"n","content":"c"}"#);
    assert!(!same(&name, &message(r#"{"role":"tool","content":"nc"}"#)));
}

#[test]
fn tools_stand_where_the_template_puts_them() {
    let body = |tools: &str, system: &str| {
        format!(
            r#"{{"tools":[{{"type":"function","function":{{"name":"{tools}"}}}}],"messages":[{{"role":"system","content":"{system}{REST}"}},{{"role":"user","content":"a{REST}"}},{{"role":"assistant","content":"b{REST}"}},{{"role":"user","content":"c{REST}"}}]}}"#
        )
    };
    let shared = |order, one: &str, other: &str| {
        let profile = RenderProfile {
            tools: order,
            ..PROFILE
        };
        let one = with(Endpoint::Chat, one.as_bytes(), "t", &profile).chunks;
        let other = with(Endpoint::Chat, other.as_bytes(), "t", &profile).chunks;
        one.iter()
            .zip(&other)
            .take_while(|(one, other)| one == other)
            .count()
    };
    let (one, tools, system) = (body("f", "s"), body("g", "s"), body("f", "r"));
    assert_eq!(shared(ToolsOrder::ToolsFirst, &one, &tools), 0);
    assert_eq!(shared(ToolsOrder::SystemTools, &one, &tools), 3);
    assert_eq!(shared(ToolsOrder::SystemTools, &one, &system), 0);
    assert_eq!(shared(ToolsOrder::FirstUser, &one, &tools), 3);
    assert_eq!(shared(ToolsOrder::LastUser, &one, &tools), 8);
}

#[test]
fn late_system_messages_are_hoisted_where_the_template_does_so() {
    let late = json!({"messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "u"},
        {"role": "system", "content": "t"}, {"role": "user", "content": REST}]});
    let early = json!({"messages": [
        {"role": "system", "content": "s"}, {"role": "system", "content": "t"},
        {"role": "user", "content": "u"}, {"role": "user", "content": REST}]});
    let form = |body: &Value, late_system| {
        let profile = RenderProfile {
            late_system,
            ..PROFILE
        };
        with(Endpoint::Chat, body.to_string().as_bytes(), "t", &profile)
    };
    assert!(same(
        &form(&late, LateSystem::Hoisted),
        &form(&early, LateSystem::Hoisted)
    ));
    assert!(!same(
        &form(&late, LateSystem::InPlace),
        &form(&early, LateSystem::InPlace)
    ));
}

#[test]
fn scopes_share_nothing_and_a_client_can_only_narrow_its_own() {
    let body =
        |salt: &str| format!(r#"{{"messages":[{{"role":"user","content":"{REST}"}}]{salt}}}"#);
    let read =
        |scope: &str, salt: &str| with(Endpoint::Chat, body(salt).as_bytes(), scope, &PROFILE);
    let prompts = [
        read("a", ""),
        read("b", ""),
        read("a", r#","cache_salt":"s""#),
        read("b", r#","cache_salt":"s""#),
    ];
    for (at, one) in prompts.iter().enumerate() {
        for other in &prompts[..at] {
            assert!(one.chunks.iter().all(|chunk| !other.chunks.contains(chunk)));
            assert_ne!(one.salt, other.salt);
        }
    }
    assert_eq!(prompts[0].salt, engine_salt(&KEY, "a"));
    assert_eq!(prompts[0].salt.len(), 32);
}

#[test]
fn completions_are_text_or_whole_ids() {
    let read = |body: &str| with(Endpoint::Completions, body.as_bytes(), "t", &PROFILE);
    let text = read(&format!(r#"{{"prompt":"{REST}"}}"#));
    assert_eq!((text.bytes, text.chunks.len()), (34, 2));
    assert!(same(&text, &read(&format!(r#"{{"prompt":["{REST}"]}}"#))));
    let ids = read(r#"{"prompt":[1,2,3,4,5,6,7,8]}"#);
    assert_eq!((ids.bytes, ids.chunks.len()), (32, 2));
    assert!(same(&ids, &read(r#"{"prompt":[[1,2,3,4,5,6,7,8]]}"#)));
    assert_ne!(text.chunks[0], ids.chunks[0]);
    let suffix = read(&format!(r#"{{"prompt":"{REST}","suffix":"end"}}"#));
    assert_ne!(text.chunks[0], suffix.chunks[0]);
    // 64 ids of any size are 256 bytes.
    let many: Vec<u32> = (0..130).map(|id| id * 33_000_000).collect();
    let body = json!({ "prompt": many }).to_string();
    let settings = Settings {
        chunk_bytes: 256,
        ..settings("t", &PROFILE)
    };
    let ids = super::read(Endpoint::Completions, body.as_bytes(), &settings).unwrap();
    assert_eq!((ids.bytes, ids.chunks.len()), (130 * 4, 2));
}

#[test]
fn a_batch_is_placed_by_the_size_of_all_its_prompts() {
    let read = |body: &str| with(Endpoint::Completions, body.as_bytes(), "t", &PROFILE);
    let lengths = Lengths::default();
    let tokens = |prompt: &Prompt| lengths.predict(&prompt.makeup, 0, 0).tokens;
    let one = read(&format!(r#"{{"prompt":"{REST}"}}"#));
    let batch = read(&format!(r#"{{"prompt":["{REST}","{REST}","{REST}"]}}"#));
    assert!(batch.chunks.is_empty());
    assert_eq!(batch.bytes, 2 + 3 * 32);
    assert!(tokens(&batch) > 2.5 * tokens(&one));
    assert_eq!(batch.affinity, one.chunks.last().copied());
    let other = read(&format!(r#"{{"prompt":["x{REST}","{REST}"]}}"#));
    assert_ne!(batch.affinity, other.affinity);
    let ids = read(r#"{"prompt":[[1,2,3,4],[5],[6,7]]}"#);
    assert_eq!((ids.bytes, ids.chunks.len()), (28, 0));
    assert_eq!(tokens(&ids), 7.0);
    let settings = settings("t", &PROFILE);
    for body in [
        r#"{"prompt":["a",[1]]}"#,
        r#"{"prompt":[[1],"a"]}"#,
        r#"{"prompt":[1,"a"]}"#,
    ] {
        let read = super::read(Endpoint::Completions, body.as_bytes(), &settings);
        assert_eq!(read, Err(Unreadable::Malformed), "{body}");
    }
}

#[test]
fn a_template_of_the_requests_own_is_not_fingerprinted() {
    let own = chat(&format!(
        r#"{{"chat_template":"x","messages":[{{"role":"user","content":"{REST}"}}]}}"#
    ));
    assert!(own.chunks.is_empty());
    let thinking = chat(&format!(
        r#"{{"chat_template_kwargs":{{"enable_thinking":false}},"messages":[{{"role":"user","content":"{REST}"}}]}}"#
    ));
    let plain = chat(&format!(
        r#"{{"messages":[{{"role":"user","content":"{REST}"}}]}}"#
    ));
    assert_ne!(thinking.chunks[0], plain.chunks[0]);
}

#[test]
fn a_session_is_known_by_its_key() {
    let affinity = |more: &str| chat(&format!(r#"{{"messages":[]{more}}}"#)).affinity;
    assert_eq!(affinity(""), None);
    let one = affinity(r#","prompt_cache_key":"a""#);
    assert!(one.is_some());
    assert_ne!(one, affinity(r#","prompt_cache_key":"b""#));
    assert_eq!(one, affinity(r#","session_id":"b","prompt_cache_key":"a""#));
}

#[test]
fn no_more_than_a_mebibyte_is_fingerprinted_and_all_is_counted() {
    let long = "x".repeat((1 << 20) + 1_000);
    let prompt = say(&json!([{"role": "user", "content": long}]));
    assert_eq!(prompt.chunks.len(), (1 << 20) / 16);
    assert_eq!(prompt.bytes, 2 + 4 + 1 + (1 << 20) + 1_000);
}

#[test]
fn what_cannot_be_read_is_an_error_without_text() {
    let settings = Settings {
        key: &KEY,
        root: Root {
            pool: "p",
            model: "m",
            adapter: None,
            scope: "t",
        },
        profile: &PROFILE,
        chunk_bytes: 256,
    };
    let deep = format!(r#"{{"messages":{}{}}}"#, "[".repeat(200), "]".repeat(200));
    for (body, why) in [
        (&b"{\"messages\":[\xff]}"[..], Unreadable::NotUtf8),
        (
            b"{\"messages\":[{\"role\":\"user\",\"content\":\"\\ud800\"}]}",
            Unreadable::LoneSurrogate,
        ),
        (b"{\"messages\":[{\"role\":\"user\"", Unreadable::Malformed),
        (b"{\"messages\":7}", Unreadable::Malformed),
        (b"{}", Unreadable::Malformed),
        (b"[]", Unreadable::Malformed),
        (deep.as_bytes(), Unreadable::TooDeep),
    ] {
        assert_eq!(read(Endpoint::Chat, body, &settings), Err(why));
    }
}

fn role() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(&["system", "user", "assistant", "tool"][..])
}

fn messages() -> impl Strategy<Value = Vec<(String, String)>> {
    let message = (role(), ".{0,60}").prop_map(|(role, text)| (role.to_owned(), text));
    proptest::collection::vec(message, 1..6)
}

fn spoken(messages: &[(String, String)]) -> Prompt {
    let messages: Vec<Value> = messages
        .iter()
        .map(|(role, text)| json!({"role": role, "content": text}))
        .collect();
    say(&Value::from(messages))
}

/// The form of plain messages, as the module's table has it.
fn plain_form(messages: &[(String, String)]) -> Vec<u8> {
    let mut form = Vec::new();
    for (role, text) in messages {
        form.extend_from_slice(&[0xff, 0x10]);
        form.extend_from_slice(role.as_bytes());
        form.push(0xfe);
        form.extend_from_slice(text.as_bytes());
    }
    form
}

proptest! {
    #[test]
    fn a_longer_conversation_extends_the_shorter(all in messages(), at in 0_usize..6) {
        let shorter = spoken(&all[..at.min(all.len())]);
        let longer = spoken(&all);
        prop_assert!(longer.chunks.starts_with(&shorter.chunks));
    }

    #[test]
    fn different_conversations_never_share_a_form(one in messages(), other in messages()) {
        let (a, b) = (plain_form(&one), plain_form(&other));
        let shared = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
        let (one, other) = (spoken(&one), spoken(&other));
        prop_assert_eq!(one.bytes, a.len() as u64);
        let same = one.chunks.iter().zip(&other.chunks).take_while(|(a, b)| a == b).count();
        prop_assert_eq!(same, (shared / 16).min(one.chunks.len()).min(other.chunks.len()));
    }

    #[test]
    fn spelling_does_not_matter(all in messages(), pretty: bool) {
        let body = json!({"messages": all.iter().map(|(role, text)| json!({"content": text, "role": role})).collect::<Vec<_>>()});
        let text = if pretty { serde_json::to_string_pretty(&body) } else { serde_json::to_string(&body) };
        let escaped: String = text.unwrap().chars().map(|c| {
            if c.is_ascii() { c.to_string() } else {
                let mut units = [0; 2];
                c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect()
            }
        }).collect();
        prop_assert!(same(&chat(&escaped), &spoken(&all)));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let settings = Settings {
            key: &KEY,
            root: Root { pool: "p", model: "m", adapter: None, scope: "t" },
            profile: &PROFILE,
            chunk_bytes: 16,
        };
        let _ = read(Endpoint::Chat, &bytes, &settings);
        let _ = read(Endpoint::Completions, &bytes, &settings);
    }

    #[test]
    fn damaged_bodies_never_panic(at in 0_usize..400, with: u8, cut in 0_usize..400) {
        let mut body = json!({
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, "x\u{e9}"]}}}],
            "prompt": [1, 2, [3]], "cache_salt": "s", "tool_choice": "none",
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "n", "arguments": "{\"a\":1}"}}]},
                {"role": "user", "content": [{"type": "text", "text": "\u{1f600}\n"}, {"type": "image_url", "image_url": {"url": "data:;base64,aGk="}}]},
            ],
        }).to_string().into_bytes();
        if let Some(byte) = body.get_mut(at) {
            *byte = with;
        }
        body.truncate(body.len() - cut.min(body.len()));
        let settings = Settings {
            key: &KEY,
            root: Root { pool: "p", model: "m", adapter: None, scope: "t" },
            profile: &RenderProfile { parts_on_lines: true, reasoning: Reasoning::Kept, names: true, ..PROFILE },
            chunk_bytes: 16,
        };
        let _ = read(Endpoint::Chat, &body, &settings);
        let _ = read(Endpoint::Completions, &body, &settings);
    }
}
