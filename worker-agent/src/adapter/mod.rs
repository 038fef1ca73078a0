//! What is changed of a request on its way to the engine, and of the answer on its way back.
//!
//! A closed list, by the kind of engine. Everything else passes byte for byte; for an engine without
//! an adapter everything does. Pure.

mod answer;
mod ids;
mod splice;

pub(crate) use answer::{Answers, Events};
pub(crate) use ids::Ids;
pub(crate) use splice::splice;

/// How an engine is spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Adapter {
    /// vLLM, and the emulated engine, which behaves like it.
    Vllm,
    /// Any other OpenAI-compatible engine: nothing is changed.
    #[default]
    Generic,
}

impl Adapter {
    /// The adapter for an engine's kind.
    #[must_use]
    pub fn of(kind: &str) -> Self {
        match kind {
            "vllm" | "emulated" => Self::Vllm,
            _ => Self::Generic,
        }
    }
}
