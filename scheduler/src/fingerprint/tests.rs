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
    let none = message(
        r#"{"role":"assistant","tool_calls":[{"function":{"arguments":null,"name":"f"}}]}"#,
    );
    assert!(same(&none, &call("a", "", "")));

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

/// A user's message of these parts.
fn parts(parts: &str) -> Prompt {
    message(&format!(r#"{{"role":"user","content":[{parts}]}}"#))
}

#[test]
fn media_are_what_their_parts_say() {
    let one = parts(r#"{"type":"image_url","image_url":{"url":"https://a/1","detail":"low"}}"#);
    for other in [
        r#"{"image_url":{"detail":"low","url":"https://a/1"},"type":"image_url"}"#,
        r#"{"type":"image\u005furl","image_url":{"u\u0072l":"https:\/\/a\/1","detail":"low"}}"#,
        r#"{"type":"image_url","image_url":{"url":"https://a/1","detail":"low"},"cache_control":{},"foo":1}"#,
        r#"{"type":"image_url","image_url":{"url":"x","url":"https://a/1","detail":"low"},"text":"a"}"#,
    ] {
        assert!(same(&one, &parts(other)), "{other}");
    }
    let different = [
        r#"{"type":"image_url","image_url":{"url":"https://a/1","detail":"low"}}"#,
        r#"{"type":"image_url","image_url":{"url":"https://a/1","detail":"high"}}"#,
        r#"{"type":"image_url","image_url":{"url":"https://a/1"}}"#,
        r#"{"type":"image_url","image_url":{"url":"https://a/2"}}"#,
        r#"{"type":"video_url","video_url":{"url":"https://a/1"}}"#,
        r#"{"type":"image_url","image_url":{"url":"https://a/1"},"uuid":"a"}"#,
        r#"{"type":"image_url","image_url":null,"uuid":"a"}"#,
        r#"{"type":"image_url","image_url":null,"uuid":"b"}"#,
        r#"{"type":"image_url","image_url":{"url":"https://a/3"},"text":"a"}"#,
        r#"{"type":"image_url","image_url":{"url":"https://a/4"},"foo":1}"#,
        r#"{"type":"image_url","image_url":{"url":"data:image/png;base64,aGk="}}"#,
        r#"{"type":"image_url","image_url":{"url":"data:image/png;base64,aGo="}}"#,
        r#"{"type":"image_url","image_url":{"url":"data:image/png;base64,aGk"}}"#,
        r#"{"type":"image_url","image_url":{"url":"hi"}}"#,
        r#"{"type":"input_audio","input_audio":{"data":"aGk=","format":"wav"}}"#,
        r#"{"type":"input_audio","input_audio":{"data":"aGk=","format":"mp3"}}"#,
        r#"{"image_url":{"url":"https://a/1"}}"#,
        r#"{"image_url":{"url":"https://a/2"},"text":"a"}"#,
        r#"{"type":"text","text":"https://a/1"}"#,
    ];
    for (at, one) in different.iter().enumerate() {
        for other in &different[..at] {
            assert!(!same(&parts(one), &parts(other)), "{one} {other}");
        }
    }
    // Texts beside them are texts, and the image stands where it was.
    let (image, text) = (different[0], r#"{"type":"text","text":"a"}"#);
    assert!(!same(
        &parts(&format!("{image},{text}")),
        &parts(&format!("{text},{image}"))
    ));
    assert!(same(
        &parts(r#"{"type":"refusal","refusal":"a"}"#),
        &parts(text)
    ));
    assert!(same(&parts(r#"{"text":"a"}"#), &parts(text)));
    assert!(same(&parts(r#""a""#), &parts(text)));
}

#[test]
fn media_are_counted_however_many_they_are() {
    let image = r#"{"type":"image_url","image_url":"a"},"#;
    let of = |images: usize| {
        let text = format!("\"{}\"", "x".repeat(100));
        parts(&format!("{text},{}{text}", image.repeat(images)))
    };
    let tokens = |images: usize| {
        let prompt = of(images);
        Lengths::default().predict(&prompt.makeup, 0, 0).tokens
    };
    let (one, many) = (tokens(1), tokens(140_001));
    assert!((700.0..1_000.0).contains(&one), "{one}");
    assert!((many - one) / 140_000.0 > 790.0, "{many}");
}

#[test]
fn calls_of_another_type_count_as_they_are() {
    let call = |call: &str| message(&format!(r#"{{"role":"assistant","tool_calls":[{call}]}}"#));
    let one = call(r#"{"type":"custom","custom":{"name":"f","input":"a"}}"#);
    assert!(!same(
        &one,
        &call(r#"{"type":"custom","custom":{"name":"f","input":"b"}}"#)
    ));
    assert!(!same(
        &one,
        &call(r#"{"type":"function","function":{"name":"f","arguments":"a"}}"#)
    ));
}

#[test]
fn cache_control_is_nothing_only_where_clients_put_it() {
    let call = |arguments: &str| {
        let arguments = Value::from(arguments);
        message(&format!(
            r#"{{"role":"assistant","tool_calls":[{{"function":{{"name":"f","arguments":{arguments}}}}}]}}"#
        ))
    };
    assert!(!same(&call(r#"{"cache_control":1}"#), &call("{}")));
    let other = |members: &str| tool(&format!(r#"{{"type":"other","x":{{"a":1}}{members}}}"#));
    assert!(same(
        &other(r#","cache_control":{"type":"ephemeral"}"#),
        &other("")
    ));
    assert!(!same(
        &other(r#","y":{"cache_control":1}"#),
        &other(r#","y":{}"#)
    ));
    let parameters = |value: &str| {
        tool(&format!(
            r#"{{"type":"function","function":{{"name":"f","parameters":{value}}}}}"#
        ))
    };
    assert!(!same(
        &parameters(r#"{"cache_control":1}"#),
        &parameters("{}")
    ));
}

#[test]
fn a_templates_ways_are_followed() {
    let says = |message: &str, profile: &RenderProfile| {
        let body = format!(r#"{{"messages":[{message},{{"role":"user","content":"{REST}"}}]}}"#);
        with(Endpoint::Chat, body.as_bytes(), "t", profile)
    };
    let differ = |one: &str, other: &str, profile: &RenderProfile| {
        !same(&says(one, profile), &says(other, profile))
    };
    let thought = r#"{"role":"assistant","reasoning":"hm","content":"a"}"#;
    let silent = r#"{"role":"assistant","content":"a"}"#;
    for (reasoning, kept) in [
        (Reasoning::Kept, true),
        (Reasoning::OfTurn, false),
        (Reasoning::Dropped, false),
    ] {
        let profile = RenderProfile {
            reasoning,
            ..PROFILE
        };
        assert_eq!(differ(thought, silent, &profile), kept, "{reasoning:?}");
        // Behind the last user message it is of the turn that goes on, and before the answer.
        let ends = |reason: &str| {
            let body = format!(
                r#"{{"messages":[{{"role":"user","content":"q"}},{{"role":"assistant","reasoning_content":"{reason}","content":"{REST}"}}]}}"#
            );
            with(Endpoint::Chat, body.as_bytes(), "t", &profile)
        };
        let (one, other) = (ends("one"), ends("two"));
        assert_eq!(one.chunks == other.chunks, reasoning == Reasoning::Dropped);
        assert!(reasoning == Reasoning::Dropped || one.chunks.last() != other.chunks.last());
    }
    let named = r#"{"role":"user","name":"n","content":"a"}"#;
    let nameless = r#"{"role":"user","content":"a"}"#;
    assert!(differ(
        named,
        nameless,
        &RenderProfile {
            names: true,
            ..PROFILE
        }
    ));
    let developer = r#"{"role":"developer","content":"a"}"#;
    let system = r#"{"role":"system","content":"a"}"#;
    assert!(differ(
        developer,
        system,
        &RenderProfile {
            developer: true,
            ..PROFILE
        }
    ));
    let two =
        r#"{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}"#;
    let lines = RenderProfile {
        parts_on_lines: true,
        ..PROFILE
    };
    assert!(!differ(two, r#"{"role":"user","content":"ab"}"#, &PROFILE));
    assert!(!differ(two, r#"{"role":"user","content":"a\nb"}"#, &lines));
}

#[test]
fn what_concerns_the_whole_prompt_is_in_its_root() {
    let of = |more: &str| {
        chat(&format!(
            r#"{{"messages":[{{"role":"user","content":"{REST}"}}]{more}}}"#
        ))
    };
    let plain = of("");
    for ignored in [
        r#","prompt_cache_key":"a""#,
        r#","session_id":"a""#,
        r#","tool_choice":"auto""#,
        r#","chat_template":null,"documents":null"#,
        r#","add_generation_prompt":false,"continue_final_message":true"#,
    ] {
        assert!(same(&plain, &of(ignored)), "{ignored}");
    }
    for counts in [
        r#","tool_choice":"none""#,
        r#","reasoning_effort":"high""#,
        r#","documents":[{"text":"a"}]"#,
        r#","chat_template_kwargs":{"a":1}"#,
    ] {
        assert_ne!(plain.chunks[0], of(counts).chunks[0], "{counts}");
    }
    let body = format!(r#"{{"messages":[{{"role":"user","content":"{REST}"}}]}}"#);
    let other = RenderProfile {
        names: true,
        ..PROFILE
    };
    let rendered = with(Endpoint::Chat, body.as_bytes(), "t", &other);
    assert_ne!(plain.chunks[0], rendered.chunks[0]);
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
    let more = say(
        &json!([{"role": "user", "content": long.clone() + "y"}, {"role": "user", "content": long}]),
    );
    assert_eq!(more.chunks, prompt.chunks);
    let tokens = |prompt: &Prompt| Lengths::default().predict(&prompt.makeup, 0, 0).tokens;
    assert!((1.9..2.1).contains(&(tokens(&more) / tokens(&prompt))));
}

#[test]
fn depth_is_bounded_wherever_there_may_be_any() {
    let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    let of = |body: &str| read(Endpoint::Chat, body.as_bytes(), &settings("t", &PROFILE));
    for body in [
        format!(r#"{{"tools":{},"messages":[]}}"#, nested(129)),
        format!(r#"{{"messages":[],"other":{}}}"#, nested(129)),
        format!(
            r#"{{"messages":[{{"role":"user","content":[{{"type":"x","x":{}}}]}}]}}"#,
            nested(129)
        ),
    ] {
        assert_eq!(of(&body), Err(Unreadable::TooDeep));
    }
    assert!(of(&format!(r#"{{"tools":{},"messages":[]}}"#, nested(128))).is_ok());
    // JSON in a string that goes deeper is a string.
    let call = |depth: usize| {
        message(&format!(
            r#"{{"role":"assistant","tool_calls":[{{"function":{{"name":"f","arguments":"{}"}}}}]}}"#,
            nested(depth)
        ))
    };
    assert_eq!(call(10_000).bytes - call(200).bytes, 2 * 9_800);
    let many = format!(r#"{{"messages":[{}{{}}]}}"#, "{},".repeat(70_000));
    assert_eq!(of(&many), Err(Unreadable::TooMany));
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

/// A message of few words, so that many say the same in other fields.
#[derive(Clone, Debug, PartialEq)]
struct Said {
    role: &'static str,
    name: Option<&'static str>,
    reasoning: Option<&'static str>,
    parts: Vec<Spoken>,
    calls: Vec<(&'static str, &'static str)>,
}

#[derive(Clone, Debug, PartialEq)]
enum Spoken {
    Text(String),
    Image(&'static str),
}

fn word() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(&["", "a", "b", "ab", "é", "水\n", "{}", "user"][..])
}

fn said() -> impl Strategy<Value = Said> {
    let part = prop_oneof![
        3 => word().prop_map(|text| Spoken::Text(text.into())),
        1 => word().prop_map(Spoken::Image),
    ];
    let arguments = proptest::sample::select(
        &[
            "",
            "{}",
            "a",
            "ab",
            r#"{"a":1}"#,
            r#"{ "a" : 1 }"#,
            r#"{"a":1.0}"#,
            r#"{"a":"b"}"#,
            r#"{"ab":1}"#,
        ][..],
    );
    let roles = proptest::sample::select(&["user", "assistant", "tool", "system"][..]);
    let optional = || proptest::option::weighted(0.2, word());
    (
        roles,
        optional(),
        optional(),
        proptest::collection::vec(part, 0..4),
        proptest::collection::vec((word(), arguments), 0..3),
    )
        .prop_map(|(role, name, reasoning, parts, calls)| Said {
            role,
            name,
            reasoning,
            parts,
            calls,
        })
}

impl Said {
    /// What of it a renderer sees, which keeps all reasoning and names of tools only.
    fn seen(&self) -> Self {
        let mut parts: Vec<Spoken> = Vec::new();
        for part in &self.parts {
            match (parts.last_mut(), part) {
                (_, Spoken::Text(text)) if text.is_empty() => {}
                (Some(Spoken::Text(before)), Spoken::Text(text)) => before.push_str(text),
                (_, part) => parts.push(part.clone()),
            }
        }
        let plain = |arguments: &&'static str| match *arguments {
            "" => "{}",
            r#"{ "a" : 1 }"# => r#"{"a":1}"#,
            other => other,
        };
        Self {
            name: self.name.filter(|_| self.role == "tool"),
            parts,
            calls: self
                .calls
                .iter()
                .map(|(name, arguments)| (*name, plain(arguments)))
                .collect(),
            ..self.clone()
        }
    }

    /// As one SDK or another would send it.
    fn body(&self, sdk: u8) -> Value {
        let texts_only = self
            .parts
            .iter()
            .all(|part| matches!(part, Spoken::Text(_)));
        let part = |part: &Spoken| match part {
            Spoken::Text(text) if sdk & 1 == 0 => json!({"type": "text", "text": text}),
            Spoken::Text(text) => {
                json!({"text": text, "cache_control": {"type": "ephemeral"}, "type": "text"})
            }
            Spoken::Image(url) => json!({"type": "image_url", "image_url": {"url": url}}),
        };
        let content = match &self.seen().parts[..] {
            [] if sdk & 2 == 0 => Value::Null,
            [] => "".into(),
            [Spoken::Text(text)] if texts_only && sdk & 2 == 0 => text.as_str().into(),
            _ => self.parts.iter().map(part).collect(),
        };
        let call = |(at, (name, arguments)): (usize, &(&str, &str))| json!({"id": format!("c{sdk}{at}"), "index": at, "type": "function", "function": {"name": name, "arguments": arguments}});
        let calls: Vec<Value> = self.calls.iter().enumerate().map(call).collect();
        let mut message = json!({"role": self.role, "content": content, "reasoning_content": self.reasoning, "name": self.name});
        if sdk & 4 == 0 {
            message["refusal"] = Value::Null;
            message["annotations"] = json!([]);
            message["tool_call_id"] = "x".into();
        }
        if !calls.is_empty() || sdk & 4 == 0 {
            message["tool_calls"] = calls.into();
        }
        message
    }
}

fn sent(all: &[Said], sdk: u8) -> Prompt {
    let mut messages: Vec<Value> = all.iter().map(|said| said.body(sdk)).collect();
    messages.push(json!({"role": "user", "content": REST}));
    let body = json!({ "messages": messages });
    let text = if sdk & 8 == 0 {
        body.to_string()
    } else {
        serde_json::to_string_pretty(&body).unwrap()
    };
    let profile = RenderProfile {
        reasoning: Reasoning::Kept,
        ..PROFILE
    };
    with(Endpoint::Chat, text.as_bytes(), "t", &profile)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Most pairs differ in structure; a third of them in nothing that is rendered.
    #[test]
    fn prompts_share_a_form_if_and_only_if_they_say_the_same(
        one in proptest::collection::vec(said(), 0..4), other in proptest::collection::vec(said(), 0..4),
        again in 0..3_u8, sdks: (u8, u8),
    ) {
        let other = if again == 0 { one.clone() } else { other };
        let seen = |all: &[Said]| all.iter().map(Said::seen).collect::<Vec<_>>();
        let shared = same(&sent(&one, sdks.0), &sent(&other, sdks.1));
        prop_assert_eq!(shared, seen(&one) == seen(&other));
    }

    /// The same words, cut into other messages, parts and calls.
    #[test]
    fn words_that_move_to_another_field_make_another_form(
        said in said(), at in 0_usize..5, word in "[ab]{1,3}",
    ) {
        let word: &'static str = word.leak();
        let plain = Said { name: None, reasoning: None, role: "tool", calls: vec![], ..said };
        let text = |more: Spoken| {
            let mut parts = plain.parts.clone();
            parts.push(more);
            Said { parts, ..plain.clone() }
        };
        let with = |field: usize| match field {
            0 => vec![text(Spoken::Text(word.into()))],
            1 => vec![Said { name: Some(word), ..plain.clone() }],
            2 => vec![Said { reasoning: Some(word), ..plain.clone() }],
            3 => vec![Said { calls: vec![(word, "")], ..plain.clone() }],
            4 => vec![text(Spoken::Image(word))],
            _ => vec![plain.clone(), Said { parts: vec![Spoken::Text(word.into())], ..plain.clone() }],
        };
        for other in (0..=5).filter(|other| *other != at) {
            prop_assert!(!same(&sent(&with(at), 0), &sent(&with(other), 0)), "{at} {other}");
        }
    }
}

proptest! {
    #[test]
    fn prompts_that_begin_alike_share_that_many_chunks(
        shared in "[a-zé水\\n\"]{10000}", one in ".{0,600}", other in ".{0,600}", before in messages(),
    ) {
        let settings = Settings { chunk_bytes: 256, ..settings("t", &PROFILE) };
        let of = |rest: &str| {
            let mut messages: Vec<Value> = before.iter().map(|(role, text)| json!({"role": role, "content": text})).collect();
            messages.push(json!({"role": "user", "content": format!("{shared}{rest}")}));
            read(Endpoint::Chat, json!({"messages": messages}).to_string().as_bytes(), &settings).unwrap()
        };
        let (one, other) = (of(&one), of(&other));
        let same = one.chunks.iter().zip(&other.chunks).take_while(|(one, other)| one == other).count();
        prop_assert!(same >= shared.len() / 256 - 1, "{same} of {}", shared.len());
    }

    #[test]
    fn a_conversation_with_calls_and_images_extends_too(
        all in proptest::collection::vec(said(), 1..6), at in 0_usize..6, sdk: u8,
    ) {
        let form = |all: &[Said]| {
            let messages: Vec<Value> = all.iter().map(|said| said.body(sdk)).collect();
            let profile = RenderProfile { reasoning: Reasoning::Kept, ..PROFILE };
            with(Endpoint::Chat, json!({"messages": messages}).to_string().as_bytes(), "t", &profile)
        };
        let shorter = form(&all[..at.min(all.len())]);
        prop_assert!(form(&all).chunks.starts_with(&shorter.chunks));
    }

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
