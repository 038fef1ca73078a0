//! What a balancer finds out about a prompt before it places it: fingerprints, length, who holds it.

use std::sync::Arc;

use forebay_proto::wire::work;
use forebay_proto::{FingerprintKey, WorkerId};
use forebay_scheduler::fingerprint::{
    Endpoint, Root, Settings, engine_salt, read as fingerprint, scope,
};
use forebay_scheduler::homes::table::Homed;
use forebay_scheduler::index::Hit;
use forebay_scheduler::length::{Length, Makeup};
use forebay_scheduler::model::Targets;
use forebay_scheduler::policy;

use crate::core::dispatch::Sought;
use crate::core::rotation;
use crate::exchange::Exchange;
use crate::shared::Facts;

/// A prompt as it is told to agents. Empty: it has no fingerprint, and is placed by its size.
#[derive(Default)]
pub(crate) struct Fingerprinted {
    pub(crate) chunks: Vec<u64>,
    pub(crate) bytes: u64,
    pub(crate) makeup: Makeup,
    pub(crate) head: u64,
    pub(crate) affinity: Option<u64>,
    pub(crate) salt: String,
    pub(crate) key_epoch: u32,
}

/// Fingerprints the request's body, where there is a key and the endpoint has a prompt.
///
/// By the newest key, or for a while by the one before, if more of the prompt is cached under that.
pub(crate) fn read(exchange: &Exchange) -> Fingerprinted {
    let endpoint = match exchange.path {
        "/v1/chat/completions" => Endpoint::Chat,
        "/v1/completions" => Endpoint::Completions,
        _ => return by_size(exchange),
    };
    let Some(facts) = exchange.shared.facts() else {
        return by_size(exchange);
    };
    let Some(newest) = facts.fleet.keys.last() else {
        return by_size(exchange);
    };
    let prompt = read_by(exchange, endpoint, &facts, newest);
    let Some((older, age)) = facts.older_key() else {
        return prompt;
    };
    let overlap = exchange.shared.settings.key_overlap;
    // A keyed hash, and another one at each turn: as good as a draw.
    let Some(draw) = prompt.chunks.last() else {
        return prompt;
    };
    if rotation::moves(age, overlap, *draw) {
        return prompt;
    }
    let before = read_by(exchange, endpoint, &facts, older);
    if longest(exchange, &before) > longest(exchange, &prompt) {
        exchange.shared.metrics.by_older_key.inc();
        before
    } else {
        prompt
    }
}

fn by_size(exchange: &Exchange) -> Fingerprinted {
    let size = exchange.body.text.len() as u64;
    Fingerprinted {
        bytes: size,
        makeup: Makeup::of_size(size),
        ..Fingerprinted::default()
    }
}

/// Fingerprints the body by this key.
fn read_by(
    exchange: &Exchange,
    endpoint: Endpoint,
    facts: &Facts,
    key: &FingerprintKey,
) -> Fingerprinted {
    let rendering = facts.rendering_of(&exchange.model);
    let profile = rendering.and_then(|rendering| rendering.profile);
    let settings = Settings {
        key,
        root: Root {
            pool: &exchange.pool_name,
            model: &exchange.model,
            adapter: None,
            scope: &exchange.tenant,
        },
        profile: &profile.unwrap_or_default(),
        chunk_bytes: exchange.pool.chunk_bytes,
    };
    match fingerprint(endpoint, exchange.body.text.expose(), &settings) {
        // Its own template renders it: nobody knows into what.
        Ok(prompt) if prompt.bytes == 0 => Fingerprinted {
            affinity: prompt.affinity,
            salt: prompt.salt,
            key_epoch: key.epoch,
            ..by_size(exchange)
        },
        Ok(prompt) => Fingerprinted {
            // Where nobody knows how it is rendered, nobody knows which prompts begin alike.
            chunks: profile.map_or_else(Vec::new, |_| prompt.chunks),
            bytes: prompt.bytes,
            makeup: prompt.makeup,
            head: prompt.head,
            affinity: prompt.affinity,
            salt: prompt.salt,
            key_epoch: key.epoch,
        },
        // Engines have their own word for what is wrong with it. Should one find nothing, it shares this
        // prompt with nobody: whom its client's own salt leaves out cannot be read.
        Err(_) => Fingerprinted {
            salt: engine_salt(key, &scope(&exchange.tenant, Some(&exchange.request_id))),
            key_epoch: key.epoch,
            ..by_size(exchange)
        },
    }
}

/// How many of the prompt's first chunks the worker has that has most of them.
fn longest(exchange: &Exchange, prompt: &Fingerprinted) -> u32 {
    let mut hits = Vec::new();
    exchange.shared.index.hits(&prompt.chunks, &mut hits);
    hits.iter().map(|hit| hit.chunks).max().unwrap_or(0)
}

/// Looks up who holds the prompt now.
pub(crate) fn seek(exchange: &Exchange) -> Sought {
    let prompt = &exchange.prompt;
    let mut hits = Vec::new();
    let (mut conversation, mut index_version) = (None, 0);
    let family = exchange.family();
    if !prompt.chunks.is_empty() {
        let workers = exchange.workers();
        let index = &exchange.shared.index;
        // What is used is at least as new.
        index_version = index.version();
        index.hits(&prompt.chunks, &mut hits);
        exchange.without_unlike(&mut hits);
        // What a family shares, no conversation of it is known by, however few hold it.
        let shared = family.as_ref().map_or(0, |family| family.chunks as usize);
        let own = prompt.chunks.get(shared..).unwrap_or_default();
        conversation = index.conversation(own, workers);
    }
    let conversation = if hits.is_empty() {
        // Where nobody holds anything, its first chunk may be everybody's.
        prompt.affinity.or(conversation)
    } else {
        conversation.or(prompt.affinity)
    };
    let Length {
        tokens: prompt_tokens,
        longer: longer_tokens,
    } = exchange.length(&hits);
    Sought {
        request_id: exchange.request_id.clone(),
        zone: exchange.zone.clone(),
        policy: policy::named(&exchange.pool.policy).unwrap_or_else(policy::default),
        prompt_tokens,
        longer_tokens,
        targets: exchange.targets(prompt_tokens),
        hits,
        index_version,
        conversation,
        head: prompt.head,
        family,
    }
}

impl Exchange {
    /// Length of the prompt: what is held somewhere was counted there, the rest is predicted.
    fn length(&self, hits: &[Hit]) -> Length {
        let longest = hits.iter().max_by_key(|hit| hit.chunks);
        let (chunks, counted) = longest.map_or((0, 0), |hit| (hit.chunks, hit.tokens));
        let lengths = self.shared.lengths.lock().of(&self.model);
        lengths.predict(&self.prompt.makeup, chunks, counted)
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

    /// What a worker has under fingerprints of its pool from when it rendered as that does, it has no more.
    fn without_unlike(&self, hits: &mut Vec<Hit>) {
        let facts = self.shared.facts();
        let rendering = facts
            .as_ref()
            .and_then(|facts| facts.rendering_of(&self.model));
        if let Some(rendering) = rendering.filter(|rendering| !rendering.unlike.is_empty()) {
            hits.retain(|hit| !rendering.is_unlike(hit.worker));
        }
    }

    /// The chunks as the worker is told of them: none, if it renders prompts otherwise than its pool.
    pub(crate) fn chunks_for(&self, worker: WorkerId) -> Vec<u64> {
        let facts = self.shared.facts();
        if facts.is_some_and(|facts| facts.is_unlike(&self.model, worker)) {
            return Vec::new();
        }
        self.prompt.chunks.clone()
    }

    /// The longest family that the prompt begins with, of those with homes.
    fn family(&self) -> Option<Arc<Homed>> {
        let facts = self.shared.facts()?;
        facts.homes().of(&self.prompt.chunks).cloned()
    }

    fn workers(&self) -> usize {
        let facts = self.shared.facts();
        facts.map_or(0, |facts| {
            let workers = facts.fleet.workers.iter();
            workers.filter(|known| known.serves(&self.model)).count()
        })
    }

    /// Learns from what the engine counted.
    pub(crate) fn learn(&self, worker: &str, trailer: &work::Trailer, predicted: u32) {
        if let Some(tokens) = trailer.prompt_tokens {
            let mut lengths = self.shared.lengths.lock();
            lengths.learn(&self.model, &self.prompt.makeup, tokens);
        }
        self.shared.metrics.counted(worker, trailer, predicted);
    }
}
