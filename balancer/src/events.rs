//! What an exchange says to the reply that passes it on, and the two ways in which it gets there.
//!
//! Over HTTP/1 the reply itself runs the exchange, so that an event takes no other task's turn: a client that takes
//! nothing holds the exchange back, and the socket keeps the deadline for that. Over h2 a client may take nothing of
//! one answer for as long as it likes while its socket is well, so there the exchange is a task of its own, which
//! keeps that deadline.
#![allow(clippy::disallowed_methods)] // the rim: this is where time passes

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::attempt::Ended;
use crate::core::error::ApiError;
use crate::exchange::{Exchange, died};
use crate::links::Task;

/// What a reply is made of, in order: a head, data, an end; or an error instead, or in between.
pub(crate) enum Event {
    Head(ReplyHead),
    Data(Bytes),
    End,
    /// What to tell the client: as the answer, or as an event in a stream that has begun.
    Failed(ApiError),
}

pub(crate) struct ReplyHead {
    pub(crate) status: u16,
    pub(crate) content_type: String,
    pub(crate) retry_after: Option<String>,
    pub(crate) streaming: bool,
    pub(crate) worker: Arc<str>,
    pub(crate) attempts: u32,
    /// The answer, where it is complete already.
    pub(crate) whole: Option<Bytes>,
}

/// Events on their way to the client; more wait in QUIC's window.
const EVENTS_AHEAD: usize = 8;

/// Events of an exchange that runs. Dropped, it ends the exchange.
pub(crate) struct Events(Running);

enum Running {
    Here {
        waiting: Waiting,
        /// Until it has come to its end.
        exchange: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    },
    Aside {
        events: mpsc::Receiver<Event>,
        _task: Task,
    },
}

/// Events that were said and not yet taken, at most [`EVENTS_AHEAD`].
type Waiting = Arc<Mutex<VecDeque<Event>>>;

impl Events {
    /// Runs an exchange whenever its next event is asked for, and not otherwise.
    pub(crate) fn here(exchange: Exchange) -> Self {
        let waiting = Waiting::default();
        let exchange = Box::pin(exchange.run(Way::Here(waiting.clone())));
        Self(Running::Here {
            waiting,
            exchange: Some(exchange),
        })
    }

    /// Runs an exchange as a task of its own.
    pub(crate) fn aside(exchange: Exchange) -> Self {
        let (sender, events) = mpsc::channel(EVENTS_AHEAD);
        Self(Running::Aside {
            events,
            _task: Task::spawn(exchange.run(Way::Aside(sender))),
        })
    }

    /// The next event; `None`: the exchange broke off. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll_next(context)).await
    }

    pub(crate) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let (waiting, running) = match &mut self.0 {
            Running::Aside { events, .. } => return events.poll_recv(context),
            Running::Here { waiting, exchange } => (waiting, exchange),
        };
        // What was said first goes first, and makes room.
        if let Some(event) = waiting.lock().pop_front() {
            return Poll::Ready(Some(event));
        }
        if let Some(exchange) = running
            && exchange.as_mut().poll(context).is_ready()
        {
            *running = None;
        }
        match waiting.lock().pop_front() {
            None if running.is_some() => Poll::Pending,
            event => Poll::Ready(event),
        }
    }
}

/// How events get to the reply.
pub(crate) enum Way {
    Here(Waiting),
    Aside(mpsc::Sender<Event>),
}

/// Where events go. Knows whether anything went.
pub(crate) struct Sink {
    way: Way,
    /// How long the client may take no event.
    patience: Duration,
    begun: bool,
    stalled: bool,
}

impl Sink {
    pub(crate) const fn new(way: Way, patience: Duration) -> Self {
        Self {
            way,
            patience,
            begun: false,
            stalled: false,
        }
    }

    /// Whether the client has got the head of an engine's answer.
    pub(crate) const fn begun(&self) -> bool {
        self.begun
    }

    pub(crate) const fn stalled(&self) -> bool {
        self.stalled
    }

    pub(crate) fn left(&self) -> bool {
        match &self.way {
            // The exchange would have gone with it.
            Way::Here(_) => false,
            Way::Aside(events) => !self.stalled && events.is_closed(),
        }
    }

    pub(crate) async fn end(&mut self) {
        // Who left does not miss it.
        let _ = self.send(Event::End).await;
    }

    pub(crate) async fn fail(&mut self, error: ApiError) {
        // As above.
        let _ = self.send(Event::Failed(error)).await;
    }

    pub(crate) async fn send(&mut self, event: Event) -> Result<(), Ended> {
        self.begun |= matches!(event, Event::Head(_));
        match &self.way {
            Way::Here(waiting) => {
                room(waiting).await;
                waiting.lock().push_back(event);
                Ok(())
            }
            Way::Aside(events) => match timeout(self.patience, events.send(event)).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) => Err(Ended::Broken(died())),
                Err(_) => {
                    self.stalled = true;
                    Err(Ended::Broken(died()))
                }
            },
        }
    }
}

/// Until one more event may wait. Whoever takes one asks for the next by running the exchange on: nobody is woken.
async fn room(waiting: &Waiting) {
    poll_fn(|_| {
        if waiting.lock().len() < EVENTS_AHEAD {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}
