//! Bodies of requests.

use serde_json::json;

const CODE: &str =
    "fn place(&mut self, now: Now) -> Option<Choice> {\n    let \"best\" = self.least(now)?;\n}\n";

/// An agent's turn: code and tools, 415 KB.
#[must_use]
pub fn agents_turn() -> String {
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

/// Text in Chinese, every character escaped, 408 KB.
#[must_use]
pub fn escaped_chinese() -> String {
    let text = "\\u6c34\\u5e93".repeat(34_000);
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}]}}"#)
}

/// One image in base64, 400 KB.
#[must_use]
pub fn image() -> String {
    let data = "QUJD".repeat(100_000);
    format!(
        r#"{{"model":"m","messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{data}"}}}}]}}]}}"#
    )
}
