//! The requests in flight: the model of the engine on tokio's clock, and the release of what a
//! request holds when it goes away.
//!
//! One task lets the model's time pass and marks what each request has to say; the requests' own
//! tasks say it. Every request holds a [`Place`]; dropping it, for whatever reason, aborts it in the
//! model at once, and one that is not read holds nothing but its place.
#![allow(clippy::disallowed_methods)] // a rim: it runs the model on tokio's clock

use super::answer::{DONE, Form};
use super::error::ApiError;
use super::events::{Batch, Events};
use super::metrics::Reading;
use super::request::Job;
use super::text::Answer;
use crate::model::{Arrival, Engine, Event, Settings};
use bytes::{Bytes, BytesMut};
use forebay_proto::Now;
use futures::{Stream, stream};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};

/// The engine without its sockets.
pub(super) struct Service {
    origin: Instant,
    state: Mutex<State>,
    /// Something arrived: the model may have an earlier deadline.
    arrived: Notify,
}

struct State {
    engine: Engine,
    said: HashMap<u64, Arc<Said>>,
    newest: u64,
    /// All but what the model counts.
    counted: Reading,
    events: Vec<Event>,
    /// What becomes of the cache's blocks, and whoever publishes it.
    cache: Option<(Events, mpsc::Sender<Batch>)>,
}

/// What one request may say by now.
#[derive(Default)]
struct Said {
    tokens: AtomicU32,
    cached: AtomicU32,
    more: Notify,
}

impl Service {
    /// With `publish` it is told what becomes of the cache.
    pub(super) fn new(settings: Settings, publish: Option<mpsc::Sender<Batch>>) -> Arc<Service> {
        let mut engine = Engine::new(settings);
        if publish.is_some() {
            engine.keep_journal();
        }
        let cache = publish.map(|publish| (Events::new(settings.block_tokens), publish));
        Arc::new(Service {
            origin: Instant::now(),
            state: Mutex::new(State {
                engine,
                said: HashMap::new(),
                newest: 0,
                counted: Reading::default(),
                events: Vec::new(),
                cache,
            }),
            arrived: Notify::new(),
        })
    }

    /// Lets the model's time pass, until it is dropped.
    pub(super) async fn run(&self) -> Infallible {
        loop {
            let next = {
                let mut state = self.state.lock();
                state.advance(self.now());
                state.engine.next_deadline()
            };
            match next {
                Some(next) => {
                    let until = self.origin + next.since(Now::default());
                    tokio::select! {
                        () = sleep_until(until) => {}
                        // An iteration under way is not cut short, but an idle engine begins.
                        () = self.arrived.notified() => {}
                    }
                }
                None => self.arrived.notified().await,
            }
        }
    }

    fn now(&self) -> Now {
        Now::at(self.origin.elapsed())
    }

    pub(super) fn reading(&self) -> Reading {
        let state = self.state.lock();
        let counts = state.engine.counts();
        Reading {
            running: state.engine.running(),
            waiting: state.engine.waiting(),
            prompt_tokens: counts.prompt_tokens,
            cached_tokens: counts.cached_tokens,
            generation_tokens: counts.output_tokens,
            preemptions: counts.preemptions,
            kv_usage: state.engine.kv_usage(),
            ..state.counted
        }
    }

    /// Takes a place among those that run or wait.
    pub(super) fn enter(self: &Arc<Service>, job: &Job) -> Result<Place, ApiError> {
        let mut state = self.state.lock();
        let now = self.now();
        state.advance(now);
        state.newest += 1;
        let id = state.newest;
        let arrival = Arrival {
            id,
            prompt_tokens: u32::try_from(job.prompt_tokens).unwrap_or(u32::MAX),
            blocks: job.blocks.clone(),
            output_tokens: u32::try_from(job.max_tokens).unwrap_or(u32::MAX),
        };
        if !state.engine.arrive(now, arrival) {
            state.counted.refused += 1;
            return Err(ApiError::busy());
        }
        if let Some((events, _)) = &mut state.cache {
            let answer = job.prompt.answer();
            events.enter(id, job.ids.clone(), answer, job.salt.clone());
        }
        let said = Arc::<Said>::default();
        state.said.insert(id, said.clone());
        drop(state);
        self.arrived.notify_one();
        Ok(Place {
            service: self.clone(),
            id,
            said,
            finished: false,
        })
    }

    /// Answers in one piece, when the last token is said.
    pub(super) async fn whole(&self, job: Job, form: Form, place: Place) -> Bytes {
        let tokens = u32::try_from(job.max_tokens).unwrap_or(u32::MAX);
        place.says(tokens).await;
        let mut text = String::new();
        for token in job.prompt.answer().take(tokens as usize) {
            text.push_str(token.as_str());
        }
        let cached = place.cached();
        place.finish();
        form.whole(&text, job.max_tokens, cached)
    }

    /// Prefills a prompt and answers nothing.
    pub(super) async fn prefill(&self, place: Place) {
        place.says(1).await;
        place.finish();
    }

    /// Answers as server-sent events, each token when it is said.
    pub(super) fn stream(
        &self,
        job: &Job,
        form: Form,
        place: Place,
    ) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + use<> {
        let telling = Telling {
            form,
            place: Some(place),
            answer: job.prompt.answer(),
            max_tokens: u32::try_from(job.max_tokens).unwrap_or(u32::MAX),
            told: 0,
            include_usage: job.include_usage,
        };
        stream::unfold(telling, Telling::step)
    }
}

impl State {
    fn tell_cache(&mut self) {
        if let Some((events, publish)) = &mut self.cache {
            let at = SystemTime::now().duration_since(UNIX_EPOCH);
            let at = at.unwrap_or_default().as_secs_f64();
            if let Some(batch) = events.batch(at, &self.engine.take_journal()) {
                // Who does not read misses it, and sees it by its number.
                let _ = publish.try_send(batch);
            }
        }
    }

    fn advance(&mut self, now: Now) {
        let mut events = std::mem::take(&mut self.events);
        self.engine.advance(now, &mut events);
        self.tell_cache();
        for event in events.drain(..) {
            let (id, cached) = match event {
                Event::First {
                    id, cached_tokens, ..
                } => (id, Some(cached_tokens)),
                Event::Token { id, .. } => (id, None),
                Event::Finished { .. } => continue,
            };
            if let Some(said) = self.said.get(&id) {
                if let Some(cached) = cached {
                    said.cached.store(cached, Ordering::Relaxed);
                }
                said.tokens.fetch_add(1, Ordering::Release);
                said.more.notify_one();
            }
        }
        self.events = events;
    }
}

/// A running or waiting request's hold on the engine.
pub(super) struct Place {
    service: Arc<Service>,
    id: u64,
    said: Arc<Said>,
    finished: bool,
}

impl Place {
    /// Waits until so many tokens are said; returns how many are.
    async fn says(&self, tokens: u32) -> u32 {
        loop {
            let said = self.said.tokens.load(Ordering::Acquire);
            if said >= tokens {
                return said;
            }
            self.said.more.notified().await;
        }
    }

    fn cached(&self) -> u32 {
        self.said.cached.load(Ordering::Relaxed)
    }

    fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.service.state.lock();
        if self.finished {
            state.counted.finished += 1;
        } else {
            state.counted.aborted += 1;
        }
        state.said.remove(&self.id);
        state.engine.abort(self.id);
        if let Some((events, _)) = &mut state.cache {
            events.leave(self.id);
        }
    }
}

/// A stream under way.
struct Telling {
    form: Form,
    /// Given up with the last token.
    place: Option<Place>,
    answer: Answer,
    max_tokens: u32,
    told: u32,
    include_usage: bool,
}

impl Telling {
    /// All that is said and was not told, in one piece.
    async fn step(mut self) -> Option<(Result<Bytes, Infallible>, Telling)> {
        let place = self.place.as_ref()?;
        let said = place.says(self.told + 1).await.min(self.max_tokens);
        let mut piece = BytesMut::new();
        if self.told == 0
            && let Some(role) = self.form.role_event()
        {
            piece.extend_from_slice(&role);
        }
        while self.told < said {
            let token = self.answer.next().expect("an answer has no end");
            self.told += 1;
            let last = self.told == self.max_tokens;
            self.form.token_event(token, last, &mut piece);
        }
        if self.told == self.max_tokens
            && let Some(place) = self.place.take()
        {
            if self.include_usage {
                let cached = place.cached();
                piece.extend_from_slice(&self.form.usage_event(self.told.into(), cached));
            }
            piece.extend_from_slice(&DONE);
            place.finish();
        }
        Some((Ok(piece.freeze()), self))
    }
}
