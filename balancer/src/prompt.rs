//! What a balancer finds out about a prompt before it places it: fingerprints, length, who holds it.

use std::sync::Arc;

use forebay_proto::suspect::Suspect;
use forebay_proto::wire::work;
use forebay_proto::{FingerprintKey, WorkerId};
use forebay_scheduler::fingerprint::{
    Endpoint, Root, Settings, engine_salt, raw, read as fingerprint, scope,
};
use forebay_scheduler::homes::table::Homed;
use forebay_scheduler::index::Hit;
use forebay_scheduler::length::{Length, Makeup};
use forebay_scheduler::model::Targets;
use forebay_scheduler::policy;

use crate::core::dispatch::Sought;
use crate::core::rotation;
use crate::core::suspects::Verdict;
use crate::exchange::Exchange;
use crate::shared::Facts;

/// The shape of what has no parameters that an engine could die of.
const EMBEDDINGS: &str = "embeddings";

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
    /// By what it is known if an engine dies of it; 0: by nothing.
    pub(crate) named: u64,
    /// The same by the key before, where something is held against a request under that.
    pub(crate) named_before: Option<u64>,
    /// Epoch of the key that made the name.
    pub(crate) named_epoch: u32,
    /// Which parameters it has, and of what class.
    pub(crate) shape: String,
}

/// Fingerprints the request's body, where there is a key and the endpoint has a prompt.
///
/// By the newest key, or for a while by the one before, if more of the prompt is cached under that.
pub(crate) fn read(exchange: &Exchange) -> Fingerprinted {
    let endpoint = match exchange.path {
        "/v1/chat/completions" => Some(Endpoint::Chat),
        "/v1/completions" => Some(Endpoint::Completions),
        _ => None,
    };
    let Some(facts) = exchange.shared.facts() else {
        return by_size(exchange);
    };
    let Some(newest) = facts.fleet.keys.last() else {
        return by_size(exchange);
    };
    let mut prompt = read_by(exchange, endpoint, &facts, newest);
    let Some((older, age)) = facts.older_key() else {
        return prompt;
    };
    if exchange.shared.suspects.read().knows_epoch(older.epoch) {
        let before = read_by(exchange, endpoint, &facts, older);
        prompt.named_before = Some(before.named);
    }
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
        Fingerprinted {
            named: prompt.named,
            named_before: prompt.named_before,
            named_epoch: prompt.named_epoch,
            ..before
        }
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
    endpoint: Option<Endpoint>,
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
    let text = exchange.body.text.expose();
    let Some(endpoint) = endpoint else {
        return Fingerprinted {
            named: raw(text, &settings, EMBEDDINGS),
            named_epoch: key.epoch,
            shape: EMBEDDINGS.into(),
            ..by_size(exchange)
        };
    };
    let kind = match endpoint {
        Endpoint::Chat => "chat",
        Endpoint::Completions => "completion",
    };
    let shaped = |shape: &str| match shape {
        "" => kind.to_owned(),
        shape => format!("{kind}, {shape}"),
    };
    match fingerprint(endpoint, text, &settings) {
        // Its own template renders it: nobody knows into what.
        Ok(prompt) if prompt.bytes == 0 => Fingerprinted {
            affinity: prompt.affinity,
            salt: prompt.salt,
            key_epoch: key.epoch,
            named: prompt.whole,
            named_epoch: key.epoch,
            shape: shaped(&prompt.shape),
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
            named: prompt.whole,
            named_before: None,
            named_epoch: key.epoch,
            shape: shaped(&prompt.shape),
        },
        // Engines have their own word for what is wrong with it. Should one find nothing, it shares this
        // prompt with nobody: whom its client's own salt leaves out cannot be read.
        Err(_) => Fingerprinted {
            salt: engine_salt(key, &scope(&exchange.tenant, Some(&exchange.request_id))),
            key_epoch: key.epoch,
            named: raw(text, &settings, kind),
            named_epoch: key.epoch,
            shape: shaped("unreadable"),
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
        suspected: exchange.verdict().suspected,
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

    /// What is held against it; nothing where its pool does without.
    pub(crate) fn verdict(&self) -> Verdict {
        let suspects = self.shared.suspects.read();
        if suspects.is_empty() || !self.pool.quarantine || self.prompt.named == 0 {
            return Verdict::default();
        }
        let now = self.shared.now();
        let before = self.prompt.named_before;
        let before = before.map_or_else(Verdict::default, |named| suspects.verdict(now, named));
        let verdict = suspects.verdict(now, self.prompt.named);
        Verdict {
            suspected: verdict.suspected || before.suspected,
            quarantined: verdict.quarantined || before.quarantined,
        }
    }

    /// An agent says that its engine died under this, and how much of that is held against it.
    pub(crate) fn died_under(&self, worker: WorkerId, share: u32) {
        if share == 0 || !self.pool.quarantine || self.prompt.named == 0 {
            return;
        }
        self.shared.metrics.deaths.inc();
        let named = Suspect {
            key: self.prompt.named,
            key_epoch: self.prompt.named_epoch,
            tenant: self.tenant.to_string(),
            model: self.model.to_string(),
            shape: self.prompt.shape.clone(),
            deaths: Vec::new(),
            cleared: 0,
            quarantined_at: None,
        };
        let now = self.shared.now();
        self.shared.suspects.write().saw(now, &named, worker, share);
        tracing::warn!(
            suspect = named.name(),
            shape = named.shape,
            %worker,
            share,
            "an engine died under a request"
        );
    }

    /// It was answered to its end.
    pub(crate) fn ran_well(&self) {
        if self.verdict().suspected {
            self.shared.suspects.write().ran_well(self.prompt.named);
        }
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
