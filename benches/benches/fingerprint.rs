//! How long does it take to fingerprint a body of 400 KB?
//!
//! Three bodies: an agent's turn (code and tools), text in Chinese with every character escaped, and one
//! image. Beside each: the check that it is UTF-8, and a whole document tree by serde_json, in the same
//! run. The goal is 1 ms of one core for the agent's turn in a release build.

#![allow(clippy::print_stdout)] // its result

use std::hint::black_box;

use forebay_benches::Timed;
use forebay_proto::FingerprintKey;
use forebay_scheduler::fingerprint::{Endpoint, RenderProfile, Root, Settings, read};
use serde_json::json;

const RUNS: usize = 400;
const CODE: &str =
    "fn place(&mut self, now: Now) -> Option<Choice> {\n    let \"best\" = self.least(now)?;\n}\n";

fn agents_turn() -> String {
    let tool = |n: usize| {
        json!({"type": "function", "function": {"name": format!("tool_{n}"), "description": "Reads a file and returns its lines.",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "from": {"type": "integer", "default": 1.0}}, "required": ["path"]}}})
    };
    let mut messages = vec![json!({"role": "system", "content": "You write code. ".repeat(200)})];
    for n in 0..60 {
        messages.push(json!({"role": "assistant", "content": null, "tool_calls": [{"id": format!("c{n}"), "type": "function",
            "function": {"name": "tool_1", "arguments": format!("{{\"path\": \"src/{n}.rs\"}}")}}]}));
        messages.push(
            json!({"role": "tool", "tool_call_id": format!("c{n}"), "content": CODE.repeat(72)}),
        );
    }
    let tools: Vec<_> = (0..12).map(tool).collect();
    json!({"model": "m", "tools": tools, "messages": messages}).to_string()
}

fn escaped_chinese() -> String {
    let text = "\\u6c34\\u5e93".repeat(34_000);
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}]}}"#)
}

fn image() -> String {
    let data = "QUJD".repeat(100_000);
    format!(
        r#"{{"model":"m","messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{data}"}}}}]}}]}}"#
    )
}

fn main() {
    let key = FingerprintKey {
        epoch: 1,
        bytes: [7; 16],
    };
    let settings = Settings {
        key: &key,
        root: Root {
            pool: "default",
            model: "m",
            adapter: None,
            scope: "tenant",
        },
        profile: &RenderProfile::default(),
        chunk_bytes: 256,
    };
    println!(
        "{:<16} {:>8} {:>12} {:>12} {:>12} {:>12} {:>8}",
        "body", "KB", "p50", "p99", "utf-8 p50", "tree p50", "of tree"
    );
    for (name, body) in [
        ("agent's turn", agents_turn()),
        ("escaped Chinese", escaped_chinese()),
        ("image", image()),
    ] {
        let bytes = body.as_bytes();
        let ours = Timed::run(RUNS, || {
            black_box(read(Endpoint::Chat, black_box(bytes), &settings)).expect("it is a chat");
        });
        let utf8 = Timed::run(RUNS, || {
            black_box(std::str::from_utf8(black_box(bytes))).expect("it is text");
        });
        let tree = Timed::run(RUNS, || {
            let tree: serde_json::Value =
                serde_json::from_slice(black_box(bytes)).expect("it is JSON");
            black_box(tree);
        });
        let (p50, p99) = (ours.quantile(0.5), ours.quantile(0.99));
        let (utf8, tree) = (utf8.quantile(0.5), tree.quantile(0.5));
        let ratio = p50.as_secs_f64() / tree.as_secs_f64();
        let size = bytes.len() / 1_000;
        println!("{name:<16} {size:>8} {p50:>12?} {p99:>12?} {utf8:>12?} {tree:>12?} {ratio:>8.2}");
    }
}
