//! Prompt text stays on the request path.

use std::path::Path;
use std::time::Duration;

use crate::harness::{FAST_ENGINE, Fleet, get, post, within};

const MARKER: &str = "forebay-prompt-marker-7f3a9c";

fn files_with(marker: &str, dir: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files_with(marker, &path, found);
        } else if let Ok(bytes) = std::fs::read(&path)
            && bytes
                .windows(marker.len())
                .any(|window| window == marker.as_bytes())
        {
            found.push(path.display().to_string());
        }
    }
}

#[test]
fn a_marker_sent_through_every_path_is_found_nowhere() {
    let fleet = Fleet::start(&FAST_ENGINE);
    let url = format!("{}/v1/chat/completions", fleet.url);
    let model = {
        let (_, models) = get(&format!("{}/v1/models", fleet.url));
        let models: serde_json::Value =
            serde_json::from_str(&models[models.find('{').unwrap()..=models.rfind('}').unwrap()])
                .unwrap();
        models["data"][0]["id"].as_str().unwrap().to_owned()
    };
    let message = format!(r#""messages":[{{"role":"user","content":"{MARKER}"}}]"#);
    let paths = [
        (
            "whole",
            format!(r#"{{"model":"{model}",{message},"max_tokens":4}}"#),
            200,
        ),
        (
            "streamed",
            format!(r#"{{"model":"{model}","stream":true,{message},"max_tokens":4}}"#),
            200,
        ),
        (
            "unknown model",
            format!(r#"{{"model":"{MARKER}",{message}}}"#),
            404,
        ),
        (
            "duplicate key",
            format!(r#"{{"model":"{model}",{message},{message}}}"#),
            400,
        ),
        (
            "marker as a key",
            format!(r#"{{"{MARKER}":1,"{MARKER}":1,"model":"{model}",{message}}}"#),
            400,
        ),
        ("broken", format!(r#"{{"model":"{model}",{message},"#), 400),
        (
            "refused by the engine",
            format!(r#"{{"model":"{model}",{message},"max_tokens":-1}}"#),
            400,
        ),
        (
            "wrong type",
            format!(r#"{{"model":["{MARKER}"],{message}}}"#),
            400,
        ),
    ];
    for (path, body, expected) in &paths {
        let (status, answer) = post(&url, body);
        assert_eq!(status, *expected, "{path}: {answer}");
        assert!(!answer.contains(MARKER), "{path} quotes the request");
    }
    // One that dies in the middle: the worker is killed under it.
    let long = format!(r#"{{"model":"{model}","stream":true,{message},"max_tokens":100000}}"#);
    let streaming = std::thread::spawn(move || post(&url, &long));
    within(Duration::from_secs(20), "the stream is under way", || {
        let (_, page) = get(&format!("{}/debug/workers", fleet.admin("b1")));
        page.contains("\"running\":1").then_some(())
    });
    std::thread::sleep(Duration::from_millis(500));
    // While it runs, and every process is there to ask.
    pages_are_clean(&fleet);
    fleet.kill("w1");
    fleet.kill("w2");
    let (_, broken) = streaming.join().unwrap();
    assert!(
        broken.contains("upstream_error") && !broken.contains("[DONE]"),
        "{}",
        broken.len()
    );

    let mut found = Vec::new();
    files_with(MARKER, fleet.dir.path(), &mut found);
    assert!(found.is_empty(), "on disk: {found:?}");
    pages_are_clean(&fleet);
}

/// Asks every process that runs for every page of its admin side.
fn pages_are_clean(fleet: &Fleet) {
    let mut asked = 0;
    for process in fleet
        .processes()
        .into_iter()
        .filter(|process| process.running)
    {
        let Some(admin) = process.addresses.get("admin") else {
            continue;
        };
        for page in [
            "/metrics",
            "/readyz",
            "/livez",
            "/debug/requests",
            "/debug/bookings",
            "/debug/workers",
        ] {
            let (_, text) = get(&format!("http://{admin}{page}"));
            assert!(!text.is_empty(), "{} {page}", process.name);
            assert!(!text.contains(MARKER), "{} {page}", process.name);
            asked += 1;
        }
    }
    assert!(
        asked >= 12,
        "a control node and a balancer at least: {asked}"
    );
}
