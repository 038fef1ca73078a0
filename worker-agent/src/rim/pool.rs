//! Kept HTTP/1.1 connections to one engine.
//!
//! Each connection's task belongs to whoever uses the connection: dropping it closes the socket at
//! once, which is how an engine learns that nobody waits for an answer any more.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::Request;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::tasks::OwnedTask;

const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// Engines close what idles for 5 s (uvicorn's default); one that is closing is not used.
const KEEP: Duration = Duration::from_secs(3);
/// From the end of an answer until its connection is ready for the next.
const SETTLE: Duration = Duration::from_millis(100);

/// A request's body, in pieces. Text: it has no `Debug`.
#[derive(Default)]
pub(super) struct Text {
    pieces: VecDeque<Bytes>,
    bytes: u64,
}

impl Text {
    fn push(&mut self, piece: Bytes) {
        self.bytes += piece.len() as u64;
        self.pieces.push_back(piece);
    }

    pub(super) fn of(whole: Bytes) -> Self {
        Self::from_iter([whole])
    }
}

impl FromIterator<Bytes> for Text {
    fn from_iter<I: IntoIterator<Item = Bytes>>(pieces: I) -> Self {
        let mut text = Self::default();
        pieces.into_iter().for_each(|piece| text.push(piece));
        text
    }
}

impl Body for Text {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let piece = self.pieces.pop_front();
        if let Some(piece) = &piece {
            self.bytes -= piece.len() as u64;
        }
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes)
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// Nothing was sent: the engine cannot be connected.
    #[error("the engine cannot be connected: {0}")]
    NotStarted(String),
    /// The engine may have begun.
    #[error("the engine broke off: {0}")]
    Failed(String),
}

/// An open connection; dropping it closes the socket.
pub(super) struct Connection {
    sender: SendRequest<Text>,
    _task: OwnedTask,
}

/// Connections that wait for their next request, bounded.
pub(super) struct Pool {
    address: String,
    most: usize,
    idle: Mutex<Vec<(Instant, Connection)>>,
}

impl Pool {
    pub(super) const fn new(address: String, most: usize) -> Self {
        Self {
            address,
            most,
            idle: Mutex::new(Vec::new()),
        }
    }

    /// Sends a request, on a kept connection if there is a good one.
    pub(super) async fn send(
        &self,
        mut request: Request<Text>,
    ) -> Result<(hyper::Response<Incoming>, Connection), CallError> {
        loop {
            let (kept, mut connection) = match self.take() {
                Some(connection) => (true, connection),
                None => (false, self.connect().await?),
            };
            match connection.sender.try_send_request(request).await {
                Ok(response) => return Ok((response, connection)),
                Err(mut error) => match error.take_message() {
                    // The engine closed a kept connection before it saw the request.
                    Some(unsent) if kept => request = unsent,
                    Some(_) => return Err(CallError::NotStarted(error.error().to_string())),
                    None => return Err(CallError::Failed(error.error().to_string())),
                },
            }
        }
    }

    /// Keeps a connection whose answer was read to its end.
    pub(super) async fn keep(&self, mut connection: Connection) {
        let ready = tokio::time::timeout(SETTLE, connection.sender.ready()).await;
        if !matches!(ready, Ok(Ok(()))) {
            return;
        }
        let now = Instant::now();
        let mut idle = self.idle.lock();
        idle.retain(|(since, _)| now.duration_since(*since) < KEEP);
        if idle.len() < self.most {
            idle.push((now, connection));
        }
    }

    fn take(&self) -> Option<Connection> {
        let now = Instant::now();
        let mut idle = self.idle.lock();
        loop {
            let (since, connection) = idle.pop()?;
            if now.duration_since(since) < KEEP && connection.sender.is_ready() {
                return Some(connection);
            }
        }
    }

    async fn connect(&self) -> Result<Connection, CallError> {
        let failed = |error: &dyn std::fmt::Display| {
            CallError::NotStarted(format!("{}: {error}", self.address))
        };
        let connecting = TcpStream::connect(&self.address);
        let stream = match tokio::time::timeout(CONNECT_PATIENCE, connecting).await {
            Ok(connected) => connected.map_err(|error| failed(&error))?,
            Err(_) => return Err(failed(&"does not answer")),
        };
        // Without it a small request may wait for an acknowledgement; failing is harmless.
        let _ = stream.set_nodelay(true);
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| failed(&error))?;
        let task = OwnedTask::spawn(async move {
            // How it ended is told to whoever waits for the answer.
            let _ = connection.await;
        });
        Ok(Connection {
            sender,
            _task: task,
        })
    }
}
