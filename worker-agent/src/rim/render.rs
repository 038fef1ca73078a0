//! Has an engine render the sentinel conversations.

use std::time::Duration;

use bytes::Bytes;
use forebay_scheduler::fingerprint::RenderProfile;
use serde_json::{Value, json};

use super::engine::Engine;
use crate::adapter::{Adapter, RENDERS, conversations, profile};

/// How the engine's template renders, where it has a page for that and answered it each time.
pub(super) async fn probe(
    engine: &Engine,
    adapter: Adapter,
    model: &str,
    patience: Duration,
) -> Option<RenderProfile> {
    let mut rendered = [const { None }; RENDERS];
    for (rendered, conversation) in rendered.iter_mut().zip(conversations()) {
        let answer = match adapter {
            Adapter::Vllm => tokenized(engine, model, conversation, patience).await,
            Adapter::LlamaCpp => {
                let page = ask(engine, "/apply-template", &conversation, patience).await;
                page.map(|page| page.map(|page: Applied| page.prompt))
            }
            // They have no such page.
            Adapter::Sglang | Adapter::Generic => Err(Unanswered),
        };
        *rendered = answer.ok()?;
    }
    profile(&rendered)
}

/// The engine did not answer: that says nothing of its template.
struct Unanswered;

#[derive(serde::Deserialize)]
struct Applied {
    prompt: String,
}

#[derive(serde::Deserialize)]
struct Tokenized {
    tokens: Vec<u32>,
}

/// vLLM tells the ids of a conversation, and the text of ids.
async fn tokenized(
    engine: &Engine,
    model: &str,
    mut conversation: Value,
    patience: Duration,
) -> Result<Option<String>, Unanswered> {
    conversation["model"] = model.into();
    let page = ask(engine, "/tokenize", &conversation, patience).await?;
    let Some(Tokenized { tokens }) = page else {
        return Ok(None);
    };
    let ids = json!({"model": model, "tokens": tokens});
    let page: Option<Applied> = ask(engine, "/detokenize", &ids, patience).await?;
    Ok(page.map(|page| page.prompt))
}

/// `None`: the engine refuses the conversation, as templates do that know no system messages.
async fn ask<T: serde::de::DeserializeOwned>(
    engine: &Engine,
    path: &str,
    body: &Value,
    patience: Duration,
) -> Result<Option<T>, Unanswered> {
    let body = Bytes::from(body.to_string());
    let page = engine.ask(path, body, patience).await;
    let page = page.map_err(|_| Unanswered)?;
    match page.status {
        200 => serde_json::from_slice(&page.body)
            .map(Some)
            .map_err(|_| Unanswered),
        404 | 405 | 501 => Err(Unanswered),
        // llama.cpp says 500 where a template raises.
        400..=500 => Ok(None),
        _ => Err(Unanswered),
    }
}
