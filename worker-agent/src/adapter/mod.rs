//! What is changed of a request on its way to the engine, and of the answer on its way back; and what
//! an engine's own words mean.
//!
//! A closed list, by the kind of engine. Everything else passes byte for byte; for an engine without
//! an adapter everything does. Pure.

mod answer;
#[cfg(test)]
mod answer_tests;
mod event;
mod gauges;
mod ids;
mod listing;
mod refusal;
mod render;
mod splice;

pub(crate) use answer::{Answers, Events, Verdict};
pub(crate) use gauges::Gauges;
pub(crate) use ids::Ids;
pub(crate) use listing::Listing;
pub(crate) use refusal::{NotStarted, not_started};
pub(crate) use render::{RENDERS, conversations, profile};
pub(crate) use splice::{Asked, Spliced, splice};

use forebay_scheduler::residency::Grade;

/// How an engine is spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Adapter {
    /// vLLM, and the emulated engine, which behaves like it.
    Vllm,
    /// SGLang: by its source's contract.
    Sglang,
    /// llama.cpp's server.
    LlamaCpp,
    /// Any other OpenAI-compatible engine: nothing is changed.
    #[default]
    Generic,
}

/// Names of kinds of engines, and how each is spoken to.
const KINDS: [(&str, Adapter); 5] = [
    ("vllm", Adapter::Vllm),
    ("sglang", Adapter::Sglang),
    ("llama.cpp", Adapter::LlamaCpp),
    ("openai", Adapter::Generic),
    ("emulated", Adapter::Vllm),
];

impl Adapter {
    /// The adapter for a kind of engine: `vllm`, `sglang`, `llama.cpp`, `openai` or `emulated`.
    #[must_use]
    pub fn named(kind: &str) -> Option<Self> {
        let kinds = KINDS.iter();
        let mut found = kinds.filter(|(name, _)| *name == kind);
        found.next().map(|(_, adapter)| *adapter)
    }

    /// Names of all kinds.
    pub(crate) fn kinds() -> [&'static str; KINDS.len()] {
        KINDS.map(|(name, _)| name)
    }

    /// Members that steer the engine and are not a client's to set.
    pub(crate) const fn removed(self) -> &'static [&'static [u8]] {
        match self {
            Self::Vllm => &[
                b"cache_salt",
                b"priority",
                b"kv_transfer_params",
                b"return_token_ids",
                b"return_tokens_as_token_ids",
                b"request_id",
                b"vllm_xargs",
            ],
            Self::Sglang => &[
                b"cache_salt",
                b"extra_key",
                b"priority",
                b"rid",
                b"routed_dp_rank",
                b"data_parallel_rank",
                b"disagg_prefill_dp_rank",
                b"bootstrap_host",
                b"bootstrap_port",
                b"bootstrap_room",
                b"session_params",
                b"return_token_ids",
                b"custom_labels",
            ],
            Self::LlamaCpp => &[b"cache_prompt", b"id_slot", b"n_cache_reuse"],
            Self::Generic => &[],
        }
    }

    /// Whether the engine keeps caches apart by a salt.
    pub(crate) const fn salts(self) -> bool {
        match self {
            Self::Vllm | Self::Sglang => true,
            Self::LlamaCpp | Self::Generic => false,
        }
    }

    /// Whether prompts that share a beginning share its cache, whoever sends them: such an engine serves one
    /// tenant.
    pub(crate) const fn shares_its_cache(self) -> bool {
        match self {
            Self::LlamaCpp => true,
            // Nobody knows whether it has a cache.
            Self::Vllm | Self::Sglang | Self::Generic => false,
        }
    }

    /// Whether it takes a number by which the least goes first.
    pub(crate) const fn takes_priority(self) -> bool {
        matches!(self, Self::Vllm)
    }

    /// Whether a stream that ended well has said why it ended.
    pub(crate) const fn says_why_it_ends(self) -> bool {
        match self {
            Self::Vllm | Self::Sglang | Self::LlamaCpp => true,
            Self::Generic => false,
        }
    }

    /// What is believed of predictions before the first answer.
    pub(crate) const fn first_grade(self) -> Grade {
        match self {
            Self::Vllm | Self::Sglang | Self::LlamaCpp => Grade::Inferred,
            Self::Generic => Grade::Blind,
        }
    }

    /// What makes the engine say how many tokens of a prompt were cached.
    pub(crate) const fn to_count_cached(self) -> &'static str {
        match self {
            Self::Vllm => "start vLLM with --enable-prompt-tokens-details",
            Self::Sglang => "start SGLang with --enable-cache-report",
            Self::LlamaCpp => "use a version of llama.cpp that reports usage.prompt_tokens_details",
            Self::Generic => "name its kind by --engine-kind, if there is one for it",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_known_by_name() {
        assert_eq!(Adapter::named("llama.cpp"), Some(Adapter::LlamaCpp));
        assert_eq!(Adapter::named("emulated"), Some(Adapter::Vllm));
        assert_eq!(Adapter::named("openai"), Some(Adapter::Generic));
        assert_eq!(Adapter::named("vLLM"), None);
        assert!(
            Adapter::kinds()
                .into_iter()
                .all(|kind| Adapter::named(kind).is_some())
        );
    }
}
