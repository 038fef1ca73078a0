//! The request parser against `serde_json`, on valid, mutated and hostile bodies.

use proptest::prelude::*;
use serde_json::Value as Tree;

use super::*;

fn check(body: &str, expected: &str) {
    let said = match parse(body.as_bytes()) {
        Ok(head) => format!("{} {} {:?}", head.model, head.stream, head.max_tokens),
        Err(error) => error.code.row().code.to_owned(),
    };
    assert_eq!(said, expected, "{body}");
}

#[test]
fn the_fields_of_placement_are_read_and_the_rest_is_passed_over() {
    check(r#"{"model":"m"}"#, "m false None");
    check(
        r#" {"messages":[{"role":"user","content":[{"a":1,"a":2}]}],"model":"m","stream":true,"max_tokens":7,"x":{"y":[null,1.5,-2]}} "#,
        "m true Some(7)",
    );
    check(
        r#"{"model":"m","stream":null,"max_tokens":null}"#,
        "m false None",
    );
    check(r#"{"\u006dodel":"m\u00fc"}"#, "mü false None");
    check(
        r#"{"model":"m","messages":"not mine to judge"}"#,
        "m false None",
    );
}

#[test]
fn what_is_not_an_object_with_a_model_is_refused() {
    for body in [
        "",
        "{",
        "[]",
        "null",
        "3",
        "\"x\"",
        "{\"model\":\"m\"}x",
        "{'model':1}",
    ] {
        check(body, "invalid_json");
    }
    check(r#"{"model":"m","stream":"yes"}"#, "invalid_json");
    check(r#"{"model":"m","x":1e999}"#, "invalid_json");
    for body in [
        "{}",
        r#"{"model":null}"#,
        r#"{"model":""}"#,
        r#"{"model":{"a":1}}"#,
    ] {
        check(body, "model_required");
    }
}

#[test]
fn a_key_that_appears_twice_is_refused_also_where_it_is_escaped() {
    check(r#"{"model":"m","model":"n"}"#, "duplicate_key");
    check(r#"{"model":"m","mod\u0065l":"m"}"#, "duplicate_key");
    check(r#"{"x":1,"model":"m","x":1}"#, "duplicate_key");
    check(
        r#"{"model":"m","messages":[{"content":"a","c\u006fntent":"b"}]}"#,
        "duplicate_key",
    );
    check(r#"{"model":"m","tools":[{"a":1,"a":2}]}"#, "m false None");
}

#[test]
fn depth_and_keys_are_bounded() {
    let deep = |n: usize| {
        format!(
            "{{\"model\":\"m\",\"x\":{}{}}}",
            "[".repeat(n),
            "]".repeat(n)
        )
    };
    check(&deep(100), "m false None");
    check(&deep(200), "invalid_json");
    check(&deep(100_000), "invalid_json");
    let keys: Vec<_> = (0..2_000).map(|i| format!("\"k{i}\":0")).collect();
    check(&format!("{{{}}}", keys.join(",")), "invalid_json");
}

#[test]
fn errors_never_quote_the_body() {
    for body in [
        r#"{"MARKER":MARKER}"#,
        r#"{"model":"m","MARKER":1,"MARKER":2}"#,
        r#"{"model":["MARKER"]}"#,
        r#"{"model":"m","stream":"MARKER"}"#,
        r#""MARKER""#,
    ] {
        let said = parse(body.as_bytes()).unwrap_err().object().to_string();
        assert!(!said.contains("MARKER"), "{said}");
    }
}

fn has_duplicate(error: &ApiError) -> bool {
    error.code == Code::DuplicateKey
}

/// Random documents as text, so that duplicates, odd numbers and escapes occur.
fn document() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        Just("true".to_owned()),
        any::<i64>().prop_map(|n| n.to_string()),
        any::<f64>().prop_map(|n| n.to_string()),
        Just("\"m\"".to_owned()),
        Just("\"\\u00e4\\n\"".to_owned()),
        Just("1e400".to_owned()),
    ];
    let key = prop_oneof![
        Just("\"model\""),
        Just("\"stream\""),
        Just("\"messages\""),
        Just("\"mod\\u0065l\""),
        Just("\"a\""),
        Just("\"b\""),
    ];
    leaf.prop_recursive(4, 40, 5, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4)
                .prop_map(|items| format!("[{}]", items.join(","))),
            proptest::collection::vec((key.clone(), inner), 0..5).prop_map(|pairs| {
                let pairs: Vec<_> = pairs.iter().map(|(k, v)| format!("{k}: {v}")).collect();
                format!("{{{}}}", pairs.join(" , "))
            }),
        ]
    })
}

/// Accepts what a document tree accepts, and reads the same from it.
fn agrees(body: &[u8]) -> Result<(), TestCaseError> {
    let tree: Result<Tree, _> = serde_json::from_slice(body);
    match (parse(body), tree) {
        (Ok(head), Ok(tree)) => {
            prop_assert_eq!(tree["model"].as_str(), Some(head.model.as_str()));
            prop_assert_eq!(tree["stream"].as_bool().unwrap_or(false), head.stream);
        }
        (Ok(_), Err(error)) => prop_assert!(false, "taken, but {error}"),
        (Err(error), Ok(tree)) => {
            let fits = tree["model"]
                .as_str()
                .is_some_and(|model| !model.is_empty())
                && (tree["stream"].is_boolean() || tree["stream"].is_null());
            prop_assert!(!fits || has_duplicate(&error), "refused: {:?}", error.code);
        }
        (Err(_), Err(_)) => {}
    }
    Ok(())
}

proptest! {
    #[test]
    fn documents_are_taken_exactly_when_a_tree_would_take_them(body in document()) {
        agrees(body.as_bytes())?;
    }

    #[test]
    fn broken_documents_too(body in document(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut body = body.into_bytes();
        let at = at.index(body.len());
        body[at] = byte;
        agrees(&body)?;
        body.truncate(at);
        agrees(&body)?;
    }

    #[test]
    fn garbage_never_panics(body in proptest::collection::vec(any::<u8>(), 0..300)) {
        agrees(&body)?;
    }
}
