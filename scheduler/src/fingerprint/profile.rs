//! What an engine's chat template does with a conversation, as far as prefixes depend on it.

use std::collections::BTreeMap;

/// The label of a worker by which its operator says how its engine renders prompts.
pub const RENDER_PROFILE: &str = "render-profile";

/// Where tools stand in the rendered prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ToolsOrder {
    /// Before everything (Hermes, Granite).
    ToolsFirst,
    /// Behind the leading system messages (Qwen3, DeepSeek V3, Phi-4, Gemma 4, Llama 4).
    #[default]
    SystemTools,
    /// In the first user message (Llama 3.1).
    FirstUser,
    /// In the last user message (Mistral): such prompts do not extend.
    LastUser,
}

/// Where a system message behind others stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LateSystem {
    /// Where it was sent.
    #[default]
    InPlace,
    /// Behind the leading ones (DeepSeek).
    Hoisted,
}

/// Which reasoning of answers stands in the prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reasoning {
    /// That of answers behind the last user message: a turn that goes on with its tools (Qwen3).
    #[default]
    OfTurn,
    /// All of it.
    Kept,
    /// None.
    Dropped,
}

/// A template's ways. The default suits most of today's models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RenderProfile {
    /// Where tools stand.
    pub tools: ToolsOrder,
    /// Where late system messages stand.
    pub late_system: LateSystem,
    /// Text parts of one message are joined with a line feed rather than with nothing.
    pub parts_on_lines: bool,
    /// The template knows the role `developer`; otherwise it is `system`.
    pub developer: bool,
    /// What of the answers' reasoning it renders.
    pub reasoning: Reasoning,
    /// Names of users and assistants are rendered, not only those of tools.
    pub names: bool,
}

impl RenderProfile {
    /// A short name that no two profiles share, such as `tools_first+hoisted`.
    #[must_use]
    pub fn id(&self) -> String {
        let tools = TOOLS.iter().find(|(_, tools)| *tools == self.tools);
        let mut id = tools.map_or("", |(name, _)| name).to_owned();
        for (name, apply) in WAYS {
            let mut with = *self;
            apply(&mut with);
            if with == *self {
                id.push('+');
                id.push_str(name);
            }
        }
        id
    }

    /// What a worker's labels say; the default where they say nothing, none where it is not understood.
    #[must_use]
    pub fn declared(labels: &BTreeMap<String, String>) -> Option<Self> {
        match labels.get(RENDER_PROFILE) {
            Some(id) => Self::named(id),
            None => Some(Self::default()),
        }
    }

    /// The profile of this name; the ways behind the order of tools may stand in any order.
    #[must_use]
    pub fn named(id: &str) -> Option<Self> {
        let mut parts = id.split('+');
        let order = parts.next()?;
        let (_, tools) = TOOLS.iter().find(|(name, _)| *name == order)?;
        let mut profile = Self {
            tools: *tools,
            ..Self::default()
        };
        for part in parts {
            let (_, apply) = WAYS.iter().find(|(name, _)| *name == part)?;
            let before = profile;
            apply(&mut profile);
            if profile == before {
                return None;
            }
        }
        Some(profile)
    }
}

const TOOLS: [(&str, ToolsOrder); 4] = [
    ("tools_first", ToolsOrder::ToolsFirst),
    ("system_tools", ToolsOrder::SystemTools),
    ("tools_first_user", ToolsOrder::FirstUser),
    ("tools_last_user", ToolsOrder::LastUser),
];

/// What a profile may say beyond the order of tools: its name, and what it means.
type Way = (&'static str, fn(&mut RenderProfile));

const WAYS: [Way; 6] = [
    ("hoisted", |profile| {
        profile.late_system = LateSystem::Hoisted;
    }),
    ("lines", |profile| profile.parts_on_lines = true),
    ("developer", |profile| profile.developer = true),
    ("reasoning", |profile| profile.reasoning = Reasoning::Kept),
    ("no_reasoning", |profile| {
        profile.reasoning = Reasoning::Dropped;
    }),
    ("names", |profile| profile.names = true),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_known_by_their_names() {
        for id in [
            "system_tools",
            "tools_first+hoisted",
            "tools_first_user+lines+developer",
            "tools_last_user+hoisted+lines+developer+reasoning+names",
            "system_tools+no_reasoning",
        ] {
            assert_eq!(RenderProfile::named(id).unwrap().id(), id);
        }
        assert_eq!(RenderProfile::default().id(), "system_tools");
        let turned = RenderProfile::named("system_tools+names+hoisted").unwrap();
        assert_eq!(turned.id(), "system_tools+hoisted+names");
        for nonsense in [
            "",
            "tools",
            "system_tools+",
            "system_tools+lines+lines",
            "lines",
        ] {
            assert_eq!(RenderProfile::named(nonsense), None, "{nonsense}");
        }
    }
}
