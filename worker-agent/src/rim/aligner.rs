//! Finds the chunks of prompts in their engine's tokens, off the path of requests.

use std::sync::Arc;

use bytes::Bytes;
use forebay_scheduler::fingerprint::{Endpoint, RenderProfile, outline};
use parking_lot::RwLock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::work::Shared;
use crate::core::Offer;
use crate::core::kv::{Ahead, News, Vocabulary, align};

/// Prompts that wait for their turn; of more, nothing is learnt.
const MAX_WAITING: usize = 256;
/// KiB of bodies that are held for it.
const BUDGET_KIB: u32 = 64 << 10;
/// A body with more than a MiB of text, escaped, tells nothing more.
const MAX_BODY_BYTES: usize = 6 << 20;

/// Takes what is to be aligned.
pub(super) struct Aligner {
    jobs: mpsc::Sender<Job>,
    budget: Arc<Semaphore>,
    vocabulary: RwLock<Option<Arc<Vocabulary>>>,
}

/// A prompt whose tokens are to come. It holds its text until then, within a budget.
pub(super) struct Unaligned {
    body: Bytes,
    _held: OwnedSemaphorePermit,
}

struct Job {
    prompt: Unaligned,
    endpoint: Endpoint,
    chunk_bytes: u32,
    news: News,
}

impl Aligner {
    /// The aligner, and what is to be worked off by [`work`].
    pub(super) fn new() -> (Self, Jobs) {
        let (jobs, waiting) = mpsc::channel(MAX_WAITING);
        let aligner = Self {
            jobs,
            budget: Arc::new(Semaphore::new(BUDGET_KIB as usize)),
            vocabulary: RwLock::default(),
        };
        (aligner, Jobs(waiting))
    }

    /// From here on ids have bytes.
    pub(super) fn set_vocabulary(&self, vocabulary: Arc<Vocabulary>) {
        *self.vocabulary.write() = Some(vocabulary);
    }

    /// Whether ids have bytes.
    pub(super) fn is_able(&self) -> bool {
        self.vocabulary.read().is_some()
    }

    /// Keeps a body until the tokens of its prompt are there; `None` where they would be of no use.
    pub(super) fn expect(&self, shared: &Shared, offer: &Offer, body: &Bytes) -> Option<Unaligned> {
        if offer.prompt.chunks.is_empty() || !self.is_able() {
            return None;
        }
        // What is known of it already is not asked for again.
        let wanted = shared.with(|core, _| {
            core.events(|exact| {
                let hit = exact.hit(&offer.prompt.chunks, Ahead::Begun);
                !(hit.settled && hit.chunks == offer.prompt.chunks.len())
            })
        });
        if wanted != Some(true) || body.len() > MAX_BODY_BYTES {
            return None;
        }
        let kib = u32::try_from(body.len().div_ceil(1024)).unwrap_or(u32::MAX);
        let held = self.budget.clone().try_acquire_many_owned(kib).ok()?;
        Some(Unaligned {
            body: body.clone(),
            _held: held,
        })
    }

    /// The tokens of a prompt that was expected.
    pub(super) fn align(&self, prompt: Unaligned, offer: &Offer, ids: Vec<u32>) {
        let endpoint = match offer.path.as_str() {
            "/v1/chat/completions" => Endpoint::Chat,
            _ => Endpoint::Completions,
        };
        let news = News {
            chunks: offer.prompt.chunks.clone(),
            ids,
            scope: offer.cache_salt.clone(),
            model: offer.model.clone(),
            ..News::default()
        };
        let job = Job {
            prompt,
            endpoint,
            chunk_bytes: offer.prompt.chunk_bytes,
            news,
        };
        // Its next turn is as good.
        let _ = self.jobs.try_send(job);
    }
}

/// Prompts in line.
pub(super) struct Jobs(mpsc::Receiver<Job>);

/// Works off what is to be aligned, one after another.
pub(super) async fn work(shared: Arc<Shared>, mut jobs: Jobs) {
    while let Some(job) = jobs.0.recv().await {
        let Some(vocabulary) = shared.aligner.vocabulary.read().clone() else {
            continue;
        };
        let profile = shared.render();
        let aligned = tokio::task::spawn_blocking(move || aligned(job, &vocabulary, &profile));
        match aligned.await {
            Ok(Some(news)) => shared.with(|core, _| core.events(|exact| exact.aligned(news))),
            Ok(None) | Err(_) => shared.with(|core, _| core.events(|exact| exact.unaligned())),
        };
    }
}

fn aligned(job: Job, vocabulary: &Vocabulary, profile: &RenderProfile) -> Option<News> {
    let Job {
        prompt,
        endpoint,
        chunk_bytes,
        mut news,
    } = job;
    let outline = outline(endpoint, &prompt.body, profile).ok()?;
    let count = news.chunks.len();
    news.aligned = align(&outline, count, chunk_bytes, &news.ids, vocabulary)?;
    Some(news)
}
