//! The body of an answer: what the exchange's events become on their way to the client.
#![allow(clippy::disallowed_methods)] // the rim: this is where time passes

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::core::error::ApiError;
use crate::events::{Event, Events};
use crate::exchange::died;

/// A stream that says nothing for this long says `: ping`.
pub(crate) const PING_INTERVAL: Duration = Duration::from_secs(15);

/// A body that is there, or one that comes.
pub(crate) enum Reply {
    Whole(Option<Bytes>),
    Relayed(Box<Relayed>),
}

/// An answer that broke: the connection, or the h2 stream, is aborted.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
pub(crate) struct BrokeOff;

/// Passes an exchange's events on. The exchange ends with it.
pub(crate) struct Relayed {
    events: Events,
    /// The client reads events: it can be told of failures, and be pinged.
    streaming: bool,
    at: Place,
    /// The client has got the head of a 200 before the engine's own came.
    early: bool,
    /// When the client was told something; and at the latest then it is looked whether it has to be again.
    said: Instant,
    ping: Pin<Box<Sleep>>,
    over: bool,
}

impl Relayed {
    pub(crate) fn new(events: Events, streaming: bool, early: bool) -> Self {
        let now = Instant::now();
        let said = if early {
            now.checked_sub(PING_INTERVAL).unwrap_or(now)
        } else {
            now
        };
        Self {
            events,
            streaming,
            at: Place::default(),
            early,
            said,
            ping: Box::pin(sleep_until(said + PING_INTERVAL)),
            over: false,
        }
    }

    /// Whether nothing was said for so long that a ping is due. Setting the alarm anew for each event would cost
    /// more than the look at a clock.
    fn poll_ping(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while self.ping.as_mut().poll(context).is_ready() {
            let (due, now) = (self.said + PING_INTERVAL, Instant::now());
            if due <= now {
                self.said = now;
                return Poll::Ready(());
            }
            self.ping.as_mut().reset(due);
        }
        Poll::Pending
    }

    fn take(&mut self, event: Option<Event>) -> Option<Result<Bytes, BrokeOff>> {
        match event {
            Some(Event::Head(head)) if self.early && !(head.status == 200 && head.streaming) => {
                // An error of the engine's comes too late for the status line.
                self.over = true;
                Some(Ok(
                    own_words(head.whole.as_deref()).unwrap_or_else(|| error_event(&died(), true))
                ))
            }
            Some(Event::Head(_)) => None,
            Some(Event::Data(piece)) => {
                self.at.advance(&piece);
                self.said = Instant::now();
                Some(Ok(piece))
            }
            Some(Event::End) => {
                self.over = true;
                None
            }
            Some(Event::Failed(error)) if self.streaming => {
                self.over = true;
                Some(Ok(error_event(&error, self.at.between_events())))
            }
            Some(Event::Failed(_)) | None => {
                self.over = true;
                Some(Err(BrokeOff))
            }
        }
    }
}

/// Where in a stream of events the client is: only between two may anything of ours be said.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// The last bytes; an end of an event may come in pieces. All zero: nothing came.
    last: [u8; 4],
}

impl Place {
    fn advance(&mut self, piece: &[u8]) {
        let from = piece.len().saturating_sub(self.last.len());
        for byte in &piece[from..] {
            self.last.rotate_left(1);
            self.last[3] = *byte;
        }
    }

    fn between_events(self) -> bool {
        self.last == [0; 4] || self.last.ends_with(b"\n\n") || self.last == *b"\r\n\r\n"
    }
}

/// An engine's own error as an event, if it is a JSON object: on one line, as events have to be.
fn own_words(body: Option<&[u8]>) -> Option<Bytes> {
    let object: serde_json::Map<_, _> = serde_json::from_slice(body?).ok()?;
    let object = serde_json::Value::Object(object);
    Some(format!("data: {object}\n\n").into())
}

/// An event of its own, also where the last one was cut short.
fn error_event(error: &ApiError, between_events: bool) -> Bytes {
    let event = error.event();
    if between_events {
        event.into()
    } else {
        format!("\n\n{event}").into()
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = BrokeOff;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokeOff>>> {
        let relayed = match self.get_mut() {
            Self::Whole(body) => return Poll::Ready(body.take().map(|body| Ok(Frame::data(body)))),
            Self::Relayed(relayed) => relayed,
        };
        while !relayed.over {
            match relayed.events.poll_next(context) {
                Poll::Ready(event) => {
                    if let Some(piece) = relayed.take(event) {
                        return Poll::Ready(Some(piece.map(Frame::data)));
                    }
                }
                Poll::Pending => {
                    if relayed.streaming
                        && relayed.at.between_events()
                        && relayed.poll_ping(context).is_ready()
                    {
                        return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(
                            b": ping\n\n",
                        )))));
                    }
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(body) => body.is_none(),
            Self::Relayed(relayed) => relayed.over,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body) => {
                SizeHint::with_exact(body.as_ref().map_or(0, |body| body.len() as u64))
            }
            Self::Relayed(_) => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_an_event_is_known_in_whatever_pieces_it_comes() {
        for text in ["data: 1\n\n", "data: 1\r\n\r\n", "data: 1\n\n: note\n\n"] {
            for size in 1..=text.len() {
                let mut at = Place::default();
                assert!(at.between_events(), "at the start");
                for piece in text.as_bytes().chunks(size) {
                    at.advance(piece);
                }
                assert!(at.between_events(), "{text:?} by {size}");
            }
            let mut at = Place::default();
            at.advance(&text.as_bytes()[..text.len() - 1]);
            assert!(!at.between_events(), "{text:?} is not over");
        }
    }
}
