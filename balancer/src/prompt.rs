//! What a balancer finds out about a prompt before it places it: fingerprints, length, who holds it.

use forebay_proto::wire::work;
use forebay_scheduler::fingerprint::{
    Endpoint, RenderProfile, Root, Settings, read as fingerprint,
};
use forebay_scheduler::index::Hit;
use forebay_scheduler::model::Targets;
use forebay_scheduler::policy;

use crate::core::dispatch::Sought;
use crate::exchange::Exchange;

/// A prompt as it is told to agents. Empty: it has no fingerprint, and is placed by its size.
#[derive(Default)]
pub(crate) struct Fingerprinted {
    pub(crate) chunks: Vec<u64>,
    pub(crate) bytes: u64,
    pub(crate) head: u64,
    pub(crate) affinity: Option<u64>,
    pub(crate) salt: String,
    pub(crate) key_epoch: u32,
}

/// Fingerprints the request's body, where there is a key and the endpoint has a prompt.
pub(crate) fn read(exchange: &Exchange) -> Fingerprinted {
    let size = exchange.body.text.len() as u64;
    let by_size = || Fingerprinted {
        bytes: size,
        ..Fingerprinted::default()
    };
    let endpoint = match exchange.path {
        "/v1/chat/completions" => Endpoint::Chat,
        "/v1/completions" => Endpoint::Completions,
        _ => return by_size(),
    };
    let facts = exchange.shared.facts();
    let Some(key) = facts.as_ref().and_then(|facts| facts.fleet.keys.last()) else {
        return by_size();
    };
    let settings = Settings {
        key,
        root: Root {
            pool: &exchange.pool_name,
            model: &exchange.model,
            adapter: None,
            scope: &exchange.tenant,
        },
        profile: &RenderProfile::default(),
        chunk_bytes: exchange.pool.chunk_bytes,
    };
    match fingerprint(endpoint, exchange.body.text.expose(), &settings) {
        // Its own template renders it: nobody knows into what.
        Ok(prompt) if prompt.bytes == 0 => Fingerprinted {
            affinity: prompt.affinity,
            salt: prompt.salt,
            key_epoch: key.epoch,
            ..by_size()
        },
        Ok(prompt) => Fingerprinted {
            chunks: prompt.chunks,
            bytes: prompt.bytes,
            head: prompt.head,
            affinity: prompt.affinity,
            salt: prompt.salt,
            key_epoch: key.epoch,
        },
        // Engines have their own word for what is wrong with it.
        Err(_) => by_size(),
    }
}

/// Looks up who holds the prompt now.
pub(crate) fn seek(exchange: &Exchange) -> Sought {
    let prompt = &exchange.prompt;
    let mut hits = Vec::new();
    let (mut conversation, mut index_version) = (None, 0);
    if !prompt.chunks.is_empty() {
        let workers = exchange.workers();
        let index = &exchange.shared.index;
        // What is used is at least as new.
        index_version = index.version();
        index.hits(&prompt.chunks, &mut hits);
        conversation = index.conversation(&prompt.chunks, workers);
    }
    let conversation = if hits.is_empty() {
        // Where nobody holds anything, its first chunk may be everybody's.
        prompt.affinity.or(conversation)
    } else {
        conversation.or(prompt.affinity)
    };
    let prompt_tokens = exchange.prompt_tokens(&hits) as f64;
    Sought {
        request_id: exchange.request_id.clone(),
        policy: policy::named(&exchange.pool.policy).unwrap_or_else(policy::default),
        prompt_tokens,
        targets: exchange.targets(prompt_tokens),
        hits,
        index_version,
        conversation,
        head: prompt.head,
    }
}

impl Exchange {
    /// Length of the prompt: what is held somewhere was counted there, the rest is estimated.
    fn prompt_tokens(&self, hits: &[Hit]) -> u64 {
        let longest = hits.iter().max_by_key(|hit| hit.chunks);
        let (chunks, counted) = longest.map_or((0, 0), |hit| (hit.chunks, hit.tokens));
        let held = u64::from(chunks) * u64::from(self.pool.chunk_bytes);
        let rest = self.prompt.bytes.saturating_sub(held);
        let lengths = self.shared.lengths.lock();
        u64::from(counted) + lengths.tokens(&self.model, rest)
    }

    /// What its pool promises a prompt of this length, less the time that has gone by.
    pub(crate) fn targets(&self, prompt_tokens: f64) -> Targets {
        let per_token_ms = f64::from(self.pool.ttft_us_per_token) / 1e3;
        let whole_ms = f64::from(self.pool.ttft_ms) + per_token_ms * prompt_tokens;
        let spent_ms = self.tracked.age().as_secs_f64() * 1e3;
        Targets {
            ttft_ms: (whole_ms - spent_ms).max(0.0),
            tpot_ms: self.pool.tpot_ms.into(),
        }
    }

    fn workers(&self) -> usize {
        let facts = self.shared.facts();
        facts.map_or(0, |facts| {
            let workers = facts.fleet.workers.iter();
            workers.filter(|known| known.serves(&self.model)).count()
        })
    }

    /// Learns from what the engine counted.
    pub(crate) fn learn(&self, trailer: &work::Trailer, predicted: u32) {
        if let Some(tokens) = trailer.prompt_tokens {
            let mut lengths = self.shared.lengths.lock();
            lengths.learn(&self.model, self.prompt.bytes, tokens);
        }
        self.shared.metrics.counted(trailer, predicted);
    }
}
