//! What an engine says of itself.

use std::time::Duration;

use forebay_scheduler::fingerprint::RenderProfile;

use super::engine::Engine;
use super::pool::CallError;
use super::render;
use crate::adapter::{Adapter, Gauges, Listing};

/// What an engine said when it was asked who it is.
pub(super) struct Found {
    pub(super) models: Vec<String>,
    pub(super) engine: EngineFacts,
    /// Tokens of one block of its cache.
    pub(super) block_tokens: Option<u64>,
    pub(super) prefix_caching: Option<bool>,
    /// It counts its work, so that it is seen to work where it says nothing.
    pub(super) counts: bool,
    /// Which process it is.
    pub(super) process: Option<String>,
}

/// What is declared of an engine besides its models, as far as it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineFacts {
    /// What kind it is, such as `vllm`.
    pub kind: String,
    /// How it is spoken to.
    pub adapter: Adapter,
    /// Tokens that its cache holds.
    pub kv_tokens: Option<u64>,
    /// The longest context of its models, in tokens.
    pub max_context_tokens: Option<u32>,
    /// Requests that it runs at once.
    pub slots: Option<u32>,
    /// How its template renders prompts.
    pub render: Option<RenderProfile>,
}

/// Asks an engine who it is; `chosen`: the kind that an operator named.
pub(super) async fn ask(
    engine: &Engine,
    chosen: Option<&str>,
    patience: Duration,
) -> Result<Found, CallError> {
    let listing = listing(engine, patience).await?;
    let kind = chosen.unwrap_or(listing.kind);
    let adapter = Adapter::named(kind).unwrap_or_default();
    let gauges = gauges(engine, patience).await.unwrap_or_default();
    let slots = match adapter {
        Adapter::LlamaCpp => slots(engine, patience).await,
        Adapter::Vllm | Adapter::Sglang | Adapter::Generic => None,
    };
    let render = render::probe(engine, adapter, &listing.models[0], patience).await;
    Ok(Found {
        models: listing.models,
        block_tokens: gauges.block_tokens,
        prefix_caching: gauges.prefix_caching,
        counts: gauges.work.is_some(),
        process: process(engine, &gauges),
        engine: EngineFacts {
            kind: kind.to_owned(),
            adapter,
            kv_tokens: gauges.kv_tokens.or(slots.map(|slots| slots.tokens)),
            max_context_tokens: listing.max_context_tokens,
            slots: slots.map(|slots| slots.count),
            render,
        },
    })
}

pub(super) async fn listing(engine: &Engine, patience: Duration) -> Result<Listing, CallError> {
    let document = engine.get("/v1/models", patience).await?;
    let problem = match document.status {
        200 => match Listing::read(&document.body) {
            Ok(listing) => return Ok(listing),
            Err(problem) => problem.to_owned(),
        },
        status => format!("/v1/models answers {status}"),
    };
    Err(CallError::Failed(problem))
}

/// What the metrics page says, where there is one; a page that is late is asked for twice.
pub(super) async fn gauges(engine: &Engine, patience: Duration) -> Option<Gauges> {
    for _ in 0..2 {
        if let Ok(page) = engine.get("/metrics", patience).await {
            return (page.status == 200).then(|| Gauges::read(&page.body));
        }
    }
    None
}

/// Which process it is, where the agent runs it or its metrics page says.
pub(super) fn process(engine: &Engine, gauges: &Gauges) -> Option<String> {
    if let Some(process) = engine.process() {
        return process.identity();
    }
    let since = gauges.started.as_ref();
    since.map(|since| format!("{} since {since}", engine.address()))
}

/// The slots of a llama.cpp server.
#[derive(Clone, Copy)]
struct Slots {
    count: u32,
    /// Of all of them.
    tokens: u64,
}

async fn slots(engine: &Engine, patience: Duration) -> Option<Slots> {
    #[derive(serde::Deserialize)]
    struct Slot {
        n_ctx: u32,
    }
    let page = engine.get("/slots", patience).await.ok()?;
    let slots: Vec<Slot> = serde_json::from_slice(&page.body).ok()?;
    let count = u32::try_from(slots.len()).ok().filter(|count| *count > 0)?;
    let tokens = slots.iter().map(|slot| u64::from(slot.n_ctx)).sum();
    Some(Slots { count, tokens })
}
