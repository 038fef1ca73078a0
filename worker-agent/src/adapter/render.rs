//! What an engine's chat template does with a conversation, found by having it render a few.
//!
//! Each sentinel is a word that no template has, so that where it stands in what was rendered, or that it does
//! not, says what the template did. Nothing is generated.

use forebay_scheduler::fingerprint::{LateSystem, Reasoning, RenderProfile, ToolsOrder};
use serde_json::{Value, json};

const SYSTEM: &str = "qalmet";
const LATE: &str = "hubrik";
const TOOL: &str = "zovwim";
const FIRST: &str = "tesbal";
const ANSWER: &str = "drofin";
const SECOND: &str = "mupkel";
const LAST: &str = "vadrux";
const OLD_THOUGHT: &str = "gimsot";
const NEW_THOUGHT: &str = "lokfen";
const NAME: &str = "pibzar";

/// Conversations to render.
pub(crate) const RENDERS: usize = 7;

/// The conversations, as members of a request: `messages`, perhaps `tools`.
pub(crate) fn conversations() -> [Value; RENDERS] {
    let says = |role: &str, text: &str| json!({"role": role, "content": text});
    let thinks = |text: &str, thought: &str| json!({"role": "assistant", "content": text, "reasoning_content": thought, "reasoning": thought});
    let tool = json!({"type": "function", "function": {
        "name": TOOL, "description": "looks", "parameters": {"type": "object", "properties": {}}}});
    let turn = [says("user", FIRST), says("assistant", ANSWER)];
    let [first, answer] = &turn;
    let text = |text: &str| json!({"type": "text", "text": text});
    [
        json!({"messages": [says("system", SYSTEM), first, answer, says("user", SECOND)], "tools": [tool]}),
        json!({"messages": [says("system", SYSTEM), first, answer, says("system", LATE), says("user", SECOND)]}),
        json!({"messages": [{"role": "user", "content": [text(FIRST), text(SECOND)]}]}),
        json!({"messages": [says("developer", SYSTEM), first]}),
        json!({"messages": [says("system", SYSTEM), first]}),
        json!({
            "messages": [first, thinks(ANSWER, OLD_THOUGHT), says("user", SECOND), thinks(LAST, NEW_THOUGHT)],
            "add_generation_prompt": false,
        }),
        json!({"messages": [{"role": "user", "name": NAME, "content": FIRST}]}),
    ]
}

/// The template's ways, by what it made of the conversations; `None`: it refused that one.
///
/// Returns nothing where it refused all of them.
pub(crate) fn profile(rendered: &[Option<String>; RENDERS]) -> Option<RenderProfile> {
    if rendered.iter().all(Option::is_none) {
        return None;
    }
    let [tools, late, parts, developer, system, thoughts, name] =
        rendered.each_ref().map(Option::as_deref);
    let usual = RenderProfile::default();
    Some(RenderProfile {
        tools: tools.and_then(order).unwrap_or(usual.tools),
        late_system: late.and_then(late_system).unwrap_or(usual.late_system),
        parts_on_lines: parts.is_some_and(on_lines),
        developer: developer.is_some_and(|developer| {
            developer.contains(SYSTEM) && system.is_some_and(|system| system != developer)
        }),
        reasoning: thoughts.map_or(usual.reasoning, reasoning),
        names: name.is_some_and(|name| name.contains(NAME)),
    })
}

/// Nothing where it leaves tools, or the system message, out.
fn order(rendered: &str) -> Option<ToolsOrder> {
    let tool = rendered.find(TOOL)?;
    let system = rendered.find(SYSTEM)?;
    Some(match rendered.find(ANSWER) {
        Some(answer) if tool > answer => ToolsOrder::LastUser,
        _ if tool < system => ToolsOrder::ToolsFirst,
        // In front of the first user's text or behind a system message is the same place here.
        _ if rendered.find(FIRST).is_none_or(|first| tool < first) => ToolsOrder::SystemTools,
        _ => ToolsOrder::FirstUser,
    })
}

fn late_system(rendered: &str) -> Option<LateSystem> {
    let (late, first) = (rendered.find(LATE)?, rendered.find(FIRST)?);
    Some(if late < first {
        LateSystem::Hoisted
    } else {
        LateSystem::InPlace
    })
}

fn on_lines(rendered: &str) -> bool {
    let between = || {
        let (_, behind) = rendered.split_once(FIRST)?;
        Some(behind.split_once(SECOND)?.0)
    };
    between().is_some_and(|between| between.starts_with('\n'))
}

fn reasoning(rendered: &str) -> Reasoning {
    match (
        rendered.contains(OLD_THOUGHT),
        rendered.contains(NEW_THOUGHT),
    ) {
        (true, _) => Reasoning::Kept,
        (false, true) => Reasoning::OfTurn,
        (false, false) => Reasoning::Dropped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Renders the conversations as a template would that puts these pieces together.
    fn check(template: impl Fn(&Value) -> Option<String>, expected: &str) {
        let rendered = conversations().each_ref().map(template);
        let found = profile(&rendered).map(|profile| profile.id());
        assert_eq!(found.as_deref(), Some(expected));
    }

    fn messages(conversation: &Value) -> Vec<Value> {
        conversation["messages"].as_array().unwrap().clone()
    }

    fn text(message: &Value, between: &str) -> String {
        match &message["content"] {
            Value::String(text) => text.clone(),
            parts => {
                let parts = parts.as_array().unwrap().iter();
                let texts: Vec<_> = parts.map(|part| part["text"].as_str().unwrap()).collect();
                texts.join(between)
            }
        }
    }

    fn plain(message: &Value) -> String {
        format!(
            "<{}>{}\n",
            message["role"].as_str().unwrap(),
            text(message, "")
        )
    }

    fn tools(conversation: &Value) -> String {
        conversation
            .get("tools")
            .map(Value::to_string)
            .unwrap_or_default()
    }

    #[test]
    fn a_template_that_only_strings_messages_together() {
        let all = |conversation: &Value| messages(conversation).iter().map(plain).collect();
        check(|c| Some(all(c)), "system_tools+developer+no_reasoning");
    }

    #[test]
    fn tools_are_found_where_they_stand() {
        let first = |c: &Value| {
            let said: String = messages(c).iter().map(plain).collect();
            Some(tools(c) + &said)
        };
        check(first, "tools_first+developer+no_reasoning");
        let behind_system = |c: &Value| {
            let mut said: Vec<String> = messages(c).iter().map(plain).collect();
            said.insert(1, tools(c));
            Some(said.concat())
        };
        check(behind_system, "system_tools+developer+no_reasoning");
        let in_the_last = |c: &Value| {
            let mut said: Vec<String> = messages(c).iter().map(plain).collect();
            said.insert(said.len() - 1, tools(c));
            Some(said.concat())
        };
        check(in_the_last, "tools_last_user+developer+no_reasoning");
    }

    #[test]
    fn a_template_with_ways_of_its_own() {
        let template = |c: &Value| {
            let mut said = messages(c);
            let late = said.iter().rposition(|message| message["role"] == "system");
            if let Some(at) = late.filter(|at| *at > 0) {
                let late = said.remove(at);
                said.insert(1, late);
            }
            let last_user = said.iter().rposition(|message| message["role"] == "user");
            let mut out = String::new();
            for (at, message) in said.iter().enumerate() {
                let role = match message["role"].as_str().unwrap() {
                    "developer" => "system",
                    role => role,
                };
                out += &format!("<{role} {}>", message["name"].as_str().unwrap_or_default());
                if Some(at) > last_user
                    && let Some(thought) = message["reasoning_content"].as_str()
                {
                    out += thought;
                }
                out += &text(message, "\n");
            }
            Some(out)
        };
        check(template, "system_tools+hoisted+lines+names");
    }

    #[test]
    fn what_a_template_refuses_is_as_usual_and_one_that_refuses_all_has_no_profile() {
        let without_system = |c: &Value| {
            let said = messages(c);
            let system = said
                .iter()
                .any(|m| m["role"] == "system" || m["role"] == "developer");
            (!system).then(|| {
                said.iter()
                    .map(|m| plain(m) + &m["reasoning"].to_string())
                    .collect()
            })
        };
        check(without_system, "system_tools+reasoning");
        assert_eq!(profile(&[const { None }; RENDERS]), None);
    }
}
