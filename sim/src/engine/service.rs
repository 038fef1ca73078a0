//! The requests in flight: who runs, who waits, and the release of both when one goes away.
//!
//! Every request holds a [`Place`]; dropping it, for whatever reason, frees the slot at once.
#![allow(clippy::disallowed_methods)] // a rim: it runs the pace on tokio's clock

use super::answer::{DONE, Form};
use super::error::ApiError;
use super::metrics::Reading;
use super::pace::{Arrival, Line, Pace, Ticket};
use super::request::Job;
use super::text::Answer;
use bytes::Bytes;
use futures::{Stream, stream};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

/// The engine without its sockets.
pub(super) struct Service {
    pace: Pace,
    state: Mutex<State>,
}

struct State {
    line: Line,
    /// Who waits is told through these; never more than wait in the line.
    calls: HashMap<Ticket, oneshot::Sender<()>>,
    /// All but the gauges, which the line knows.
    counted: Reading,
}

impl Service {
    pub(super) fn new(pace: Pace, slots: usize, queue: usize) -> Service {
        let state = State {
            line: Line::new(slots, queue),
            calls: HashMap::new(),
            counted: Reading::default(),
        };
        Service {
            pace,
            state: Mutex::new(state),
        }
    }

    pub(super) fn reading(&self) -> Reading {
        let state = self.state.lock();
        Reading {
            running: state.line.running(),
            waiting: state.line.waiting(),
            ..state.counted
        }
    }

    /// Takes a place among those that run or wait.
    pub(super) fn enter(self: &Arc<Service>) -> Result<Place, ApiError> {
        let mut state = self.state.lock();
        let (ticket, call) = match state.line.arrive() {
            Arrival::Runs(ticket) => (ticket, None),
            Arrival::Waits(ticket) => {
                let (sender, receiver) = oneshot::channel();
                state.calls.insert(ticket, sender);
                (ticket, Some(receiver))
            }
            Arrival::Refused => {
                state.counted.refused += 1;
                return Err(ApiError::busy());
            }
        };
        drop(state);
        Ok(Place {
            service: self.clone(),
            ticket,
            call,
            finished: false,
        })
    }

    /// Answers in one piece, when the last token is due.
    pub(super) async fn whole(&self, job: Job, form: Form, mut place: Place) -> Bytes {
        place.runs(job.prompt_tokens).await;
        let start = Instant::now();
        let (prompt_tokens, tokens) = (job.prompt_tokens, job.max_tokens);
        sleep_until(start + self.pace.due(prompt_tokens, tokens - 1)).await;
        let mut text = String::new();
        for token in job
            .prompt
            .answer()
            .take(usize::try_from(tokens).unwrap_or(usize::MAX))
        {
            text.push_str(token.as_str());
        }
        place.said(tokens);
        place.finish();
        form.whole(&text, tokens)
    }

    /// Answers as server-sent events, each token when it is due.
    pub(super) fn stream(
        &self,
        job: &Job,
        form: Form,
        place: Place,
    ) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + use<> {
        let telling = Telling {
            pace: self.pace,
            form,
            place: Some(place),
            prompt_tokens: job.prompt_tokens,
            answer: job.prompt.answer(),
            max_tokens: job.max_tokens,
            told: 0,
            include_usage: job.include_usage,
            start: Instant::now(),
            next: Next::Role,
        };
        stream::unfold(telling, Telling::step)
    }
}

/// A running or waiting request's hold on the engine.
pub(super) struct Place {
    service: Arc<Service>,
    ticket: Ticket,
    call: Option<oneshot::Receiver<()>>,
    finished: bool,
}

impl Place {
    /// Waits until the request may run.
    async fn runs(&mut self, prompt_tokens: u64) {
        if let Some(call) = self.call.take() {
            // The sender is kept until it is used, or until this place is dropped.
            let _ = call.await;
        }
        self.service.state.lock().counted.prompt_tokens += prompt_tokens;
    }

    fn said(&self, tokens: u64) {
        self.service.state.lock().counted.generation_tokens += tokens;
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
        state.calls.remove(&self.ticket);
        let next = state.line.leave(self.ticket);
        if let Some(call) = next.and_then(|next| state.calls.remove(&next)) {
            // Were its receiver gone, its own drop would free the slot again.
            let _ = call.send(());
        }
    }
}

/// A stream under way.
struct Telling {
    pace: Pace,
    form: Form,
    /// Given up with the last token.
    place: Option<Place>,
    prompt_tokens: u64,
    answer: Answer,
    max_tokens: u64,
    told: u64,
    include_usage: bool,
    start: Instant,
    next: Next,
}

enum Next {
    Role,
    Token,
    Usage,
    Done,
    End,
}

impl Telling {
    async fn step(mut self) -> Option<(Result<Bytes, Infallible>, Telling)> {
        let event = loop {
            match self.next {
                Next::Role => {
                    if let Some(place) = &mut self.place {
                        place.runs(self.prompt_tokens).await;
                    }
                    self.start = Instant::now();
                    self.wait(self.pace.due(self.prompt_tokens, 0)).await;
                    self.next = Next::Token;
                    if let Some(event) = self.form.role_event() {
                        break event;
                    }
                }
                Next::Token => {
                    self.wait(self.pace.due(self.prompt_tokens, self.told))
                        .await;
                    break self.token();
                }
                Next::Usage => {
                    self.next = Next::Done;
                    break self.form.usage_event(self.told);
                }
                Next::Done => {
                    self.next = Next::End;
                    break DONE;
                }
                Next::End => return None,
            }
        };
        Some((Ok(event), self))
    }

    fn token(&mut self) -> Bytes {
        let token = self.answer.next().expect("an answer has no end");
        self.told += 1;
        if let Some(place) = &self.place {
            place.said(1);
        }
        let last = self.told == self.max_tokens;
        if last {
            self.next = if self.include_usage {
                Next::Usage
            } else {
                Next::Done
            };
            if let Some(place) = self.place.take() {
                place.finish();
            }
        }
        self.form.token_event(token, last)
    }

    /// Waits for a moment counted from the start. What is overdue goes out without a pause, so
    /// that events which are due together leave in one write.
    async fn wait(&self, due: Duration) {
        let at = self.start + due;
        if at > Instant::now() {
            sleep_until(at).await;
        }
    }
}
