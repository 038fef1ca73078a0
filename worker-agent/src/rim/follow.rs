//! Whether an engine's events of its cache can be followed: where they are, and what its ids mean.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::engine::{Engine, model_directory};
use super::events;
use super::found::Found;
use super::sources::{Discovered, Sources, discovered};
use super::tasks::OwnedTask;
use super::work::Shared;
use crate::adapter::Adapter;
use crate::core::kv::{MAX_TOKENIZER_BYTES, Vocabulary};

/// How the engine's events are followed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvEvents {
    /// Where they are.
    pub at: EventsAt,
    /// What its ids mean.
    pub tokens: TokensOf,
}

/// Where an engine's events are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EventsAt {
    /// They are not followed.
    #[default]
    Nowhere,
    /// Where the engine says, if it does.
    Discovered,
    /// Here.
    Given(Sources),
}

/// What an engine's token ids mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TokensOf {
    /// What the model's directory says, if it is on this host; the emulated engine's have four bytes each.
    #[default]
    Engine,
    /// What this `tokenizer.json` says, or the one in this directory.
    File(PathBuf),
}

/// What is followed.
pub(super) struct Following {
    how: KvEvents,
    now: Mutex<Option<(Sources, OwnedTask)>>,
    /// What was said once is not said again.
    said: Mutex<Option<String>>,
}

impl Following {
    pub(super) fn new(how: KvEvents) -> Self {
        Self {
            how,
            now: Mutex::default(),
            said: Mutex::default(),
        }
    }

    fn warn(&self, problem: String) {
        let mut said = self.said.lock();
        if said.as_ref() != Some(&problem) {
            tracing::warn!(
                grade = "inferred",
                problem,
                "the engine's cache events are not followed: what its cache holds is guessed"
            );
            *said = Some(problem);
        }
    }
}

impl Shared {
    /// The engine answers: its events are followed from here on, if they can be.
    pub(super) async fn find_events(self: &Arc<Self>, found: &Found) {
        let patience = self.patience.look;
        if found.engine.adapter != Adapter::Vllm {
            return;
        }
        let sources = match &self.following.how.at {
            EventsAt::Nowhere => return,
            EventsAt::Given(sources) => sources.clone(),
            EventsAt::Discovered => match self.discover(patience).await {
                Some(sources) => sources,
                None => return,
            },
        };
        if !self.aligner.is_able() {
            match self.vocabulary(found, patience).await {
                Ok(vocabulary) => self.aligner.set_vocabulary(Arc::new(vocabulary)),
                Err(problem) => return self.following.warn(problem),
            }
        }
        let mut now = self.following.now.lock();
        if now.as_ref().is_none_or(|(before, _)| *before != sources) {
            let can_ask = sources.replay.is_some();
            self.with(|core, _| core.follow_events(rand::random(), can_ask));
            let task = OwnedTask::spawn(events::follow(self.clone(), sources.clone()));
            *now = Some((sources, task));
        }
    }

    async fn discover(&self, patience: Duration) -> Option<Sources> {
        let page = self.engine.get("/kv_event_sources", patience).await.ok();
        let page = page.filter(|page| page.status == 200)?;
        match discovered(&page.body, self.engine.address().is_loopback()) {
            Discovered::None => None,
            Discovered::At { sources, exposed } => {
                if exposed {
                    tracing::warn!(
                        "the engine publishes its cache's events, which are all of its prompts, to other hosts too: give its --kv-events-config an endpoint ipc://PATH"
                    );
                }
                Some(sources)
            }
            Discovered::Unusable(problem) => {
                self.following.warn(problem);
                None
            }
        }
    }

    async fn vocabulary(&self, found: &Found, patience: Duration) -> Result<Vocabulary, String> {
        let path = match &self.following.how.tokens {
            TokensOf::File(path) => path.clone(),
            TokensOf::Engine if found.engine.kind == "emulated" => {
                return Ok(Vocabulary::emulated());
            }
            TokensOf::Engine => directory(&self.engine, patience).await.ok_or(
                "the model's directory is not on this host: give its tokenizer.json by --tokenizer",
            )?,
        };
        let read = tokio::task::spawn_blocking(move || read(&path));
        read.await.map_err(|error| error.to_string())?
    }
}

async fn directory(engine: &Engine, patience: Duration) -> Option<PathBuf> {
    let page = engine.get("/v1/models", patience).await.ok()?;
    let directory = PathBuf::from(model_directory(&page.body)?);
    (directory.is_absolute() && directory.is_dir()).then_some(directory)
}

/// Reads a `tokenizer.json`, or the one in a directory.
pub(super) fn read(path: &Path) -> Result<Vocabulary, String> {
    let file = if path.is_dir() {
        path.join("tokenizer.json")
    } else {
        path.to_owned()
    };
    let named = |problem: String| format!("{}: {problem}", file.display());
    let size = std::fs::metadata(&file).map_err(|error| named(error.to_string()))?;
    if size.len() > MAX_TOKENIZER_BYTES {
        return Err(named("is too large for a tokenizer.json".into()));
    }
    let text = std::fs::read(&file).map_err(|error| named(error.to_string()))?;
    Vocabulary::read(&text).map_err(|error| named(error.to_string()))
}
