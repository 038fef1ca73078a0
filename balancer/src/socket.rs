//! A client's connection, with the deadlines that HTTP itself does not keep.
//!
//! Nothing is said for too long after the connection's beginning, a request's head does not become
//! whole, or nothing is taken for too long: the connection ends. And after an answer that came before the request was read to its end, the rest
//! is read and thrown away for a moment: closing at once would reset the connection, and the client
//! might never see the answer.
#![allow(clippy::disallowed_methods)] // the rim: this is where time passes

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::Limits;
use crate::connection::Usage;

/// How long, and how much, is read after the last answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 4 << 20;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) struct Socket<S> {
    inner: S,
    /// Until the protocol is known.
    opening: Option<Pin<Box<Sleep>>>,
    preface_seen: usize,
    head: Head,
    /// How long a head may take from its first byte, and that of an HTTP/1 head which has begun.
    header: Duration,
    begun: Option<Begun>,
    usage: Arc<Usage>,
    /// How long the client may take no byte.
    patience: Duration,
    /// While the client takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    lingering: Option<(Pin<Box<Sleep>>, usize)>,
}

/// A head that has begun to come: it is whole when its request is counted.
struct Begun {
    requests_before: u64,
    until: Pin<Box<Sleep>>,
}

/// The first head of an HTTP/1 connection, as far as it has come.
///
/// A line that ends without a carriage return is one line to some and two to others: a connection
/// that begins so is closed. (Later heads are read by one party only: nothing of them is passed on.)
#[derive(Default)]
struct Head {
    /// Of its end, `CR LF CR LF`.
    seen: usize,
    whole: bool,
}

impl Head {
    /// Whether it is still sound.
    fn take(&mut self, bytes: &[u8]) -> bool {
        for byte in bytes {
            if self.whole {
                return true;
            }
            let expects_lf = self.seen % 2 == 1;
            self.seen = match byte {
                b'\r' if expects_lf => return false,
                b'\r' => self.seen + 1,
                b'\n' if expects_lf => self.seen + 1,
                b'\n' => return false,
                _ if expects_lf => return false,
                _ => 0,
            };
            self.whole = self.seen == 4;
        }
        true
    }
}

impl<S> Socket<S> {
    pub(crate) fn new(inner: S, limits: Limits, usage: Arc<Usage>) -> Self {
        Self {
            inner,
            opening: Some(Box::pin(sleep(limits.first_bytes))),
            preface_seen: 0,
            head: Head::default(),
            header: limits.header,
            begun: None,
            usage,
            patience: limits.stall,
            stalled: None,
            lingering: None,
        }
    }

    /// HTTP/1 from the first byte that is not h2's preface; h2 once that is whole.
    fn opened_by(&mut self, bytes: &[u8]) {
        let expected = &PREFACE[self.preface_seen..];
        let common = bytes
            .iter()
            .zip(expected)
            .take_while(|(a, b)| a == b)
            .count();
        self.preface_seen += common;
        if common < bytes.len() || self.preface_seen == PREFACE.len() {
            self.opening = None;
        }
    }

    /// Whether a head that has begun is late. Between requests nothing is: a client may keep its
    /// connection.
    fn is_late(&mut self, read: usize, context: &mut Context<'_>) -> bool {
        let requests = self.usage.begun();
        self.begun
            .take_if(|begun| begun.requests_before != requests);
        if read > 0 && self.begun.is_none() && self.usage.running() == 0 {
            self.begun = Some(Begun {
                requests_before: requests,
                until: Box::pin(sleep(self.header)),
            });
        }
        let begun = self.begun.as_mut();
        begun.is_some_and(|begun| begun.until.as_mut().poll(context).is_ready())
    }

    fn watch_writes<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.patience;
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(context, buffer);
        if let Some(opening) = &mut self.opening {
            if read.is_pending() {
                ready!(opening.as_mut().poll(context));
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.opened_by(&buffer.filled()[before..]);
        }
        if self.preface_seen < PREFACE.len() {
            if !self.head.take(&buffer.filled()[before..]) {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            if self.is_late(buffer.filled().len() - before, context) {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.watch_writes(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(context, pieces);
        self.watch_writes(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.lingering.is_none() {
            ready!(Pin::new(&mut this.inner).poll_shutdown(context))?;
            this.lingering = Some((Box::pin(sleep(LINGER)), 0));
        }
        let (until, read) = this.lingering.as_mut().expect("it was just set");
        let mut scratch = [0; 8 << 10];
        loop {
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut this.inner).poll_read(context, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                    *read += buffer.filled().len();
                    if *read > LINGER_BYTES || until.deadline() <= Instant::now() {
                        return Poll::Ready(Ok(()));
                    }
                }
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => {
                    ready!(until.as_mut().poll(context));
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}
