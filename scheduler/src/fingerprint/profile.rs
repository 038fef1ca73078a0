//! What an engine's chat template does with a conversation, as far as prefixes depend on it.

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
    /// Reasoning of earlier answers stays in the history.
    pub keeps_reasoning: bool,
    /// Names of users and assistants are rendered, not only those of tools.
    pub names: bool,
}

impl RenderProfile {
    /// A short name that no two profiles share.
    #[must_use]
    pub fn id(&self) -> String {
        let tools = match self.tools {
            ToolsOrder::ToolsFirst => "tools_first",
            ToolsOrder::SystemTools => "system_tools",
            ToolsOrder::FirstUser => "tools_first_user",
            ToolsOrder::LastUser => "tools_last_user",
        };
        let mut id = tools.to_owned();
        let rest = [
            (self.late_system == LateSystem::Hoisted, "+hoisted"),
            (self.parts_on_lines, "+lines"),
            (self.developer, "+developer"),
            (self.keeps_reasoning, "+reasoning"),
            (self.names, "+names"),
        ];
        for (set, name) in rest {
            if set {
                id.push_str(name);
            }
        }
        id
    }
}
