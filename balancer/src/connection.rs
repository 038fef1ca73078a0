//! One client's connection: HTTP/1.1 or h2, whichever it speaks, within its bounds.
#![allow(clippy::disallowed_methods)] // the rim: this is where time passes

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::http;
use crate::reply::{BrokeOff, Reply};
use crate::shared::Shared;
use crate::socket::Socket;

/// Of a request's head.
const MAX_HEAD_BYTES: u32 = 64 << 10;
/// Requests at once, and what may be on its way to us for one of them, and for all.
const MAX_STREAMS: u32 = 256;
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;
/// What may wait for the client to take it, of one answer.
const SEND_BUFFER_BYTES: usize = 64 << 10;
/// Streams that were reset before they were looked at; with one more the connection ends.
const MAX_RESET_UNSEEN: usize = 20;
/// Streams that had to be reset for what was wrong in them; likewise.
const MAX_WRONG_STREAMS: usize = 128;
const PING_EVERY: Duration = Duration::from_secs(20);
const PONG_WITHIN: Duration = Duration::from_secs(10);

/// Serves one connection to its end. It is asked to end when `draining` says so, and when nobody
/// uses it: one that only answers pings would be held for ever.
pub(crate) async fn talk<S>(shared: &Arc<Shared>, stream: S, mut draining: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limits = shared.settings.limits;
    let usage = Arc::new(Usage::default());
    let service = {
        let (shared, usage) = (shared.clone(), usage.clone());
        service_fn(move |request| {
            let (shared, running) = (shared.clone(), Running::of(&usage));
            async move {
                let answer = http::answer(shared, request).await?;
                Ok::<_, Infallible>(answer.map(|reply| Counted {
                    reply,
                    _running: running,
                }))
            }
        })
    };
    let builder = builder();
    let socket = TokioIo::new(Socket::new(stream, limits, usage.clone()));
    let mut connection = pin!(builder.serve_connection(socket, service));
    let mut idle = pin!(usage.idle(limits.idle));
    let mut leaving = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::trace!(%error, "a client's connection ended early");
                }
                return;
            }
            () = asked(&mut draining), if !leaving => {}
            () = idle.as_mut() => {
                if leaving && usage.running() == 0 {
                    // It was asked to end, and has not.
                    return;
                }
                idle.set(usage.idle(PONG_WITHIN));
            }
        }
        if !leaving {
            leaving = true;
            connection.as_mut().graceful_shutdown();
        }
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // It would count the pause between two requests too: the socket keeps this deadline.
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD_BYTES as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PONG_WITHIN)
        .max_concurrent_streams(MAX_STREAMS)
        .max_pending_accept_reset_streams(MAX_RESET_UNSEEN)
        .max_local_error_reset_streams(MAX_WRONG_STREAMS)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(MAX_HEAD_BYTES);
    builder
}

/// The balancer is about to stop.
async fn asked(draining: &mut watch::Receiver<bool>) {
    // An error means the same: nobody is left to say so.
    drop(draining.wait_for(|draining| *draining).await);
}

/// How a connection is used.
#[derive(Default)]
pub(crate) struct Usage {
    running: AtomicUsize,
    begun: AtomicU64,
}

impl Usage {
    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    /// Requests whose heads are whole, since the connection's beginning.
    pub(crate) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// Ends when there was no request for `patience`, at the latest after twice as long.
    async fn idle(&self, patience: Duration) {
        loop {
            let (before, idle) = (self.begun(), self.running() == 0);
            sleep(patience).await;
            if idle && self.begun() == before {
                return;
            }
        }
    }
}

/// A request that runs until its answer's last byte, or its end.
struct Running(Arc<Usage>);

impl Running {
    fn of(usage: &Arc<Usage>) -> Self {
        usage.begun.fetch_add(1, Ordering::Relaxed);
        usage.running.fetch_add(1, Ordering::Relaxed);
        Self(usage.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An answer that keeps its request counted.
struct Counted {
    reply: Reply,
    _running: Running,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = BrokeOff;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokeOff>>> {
        Pin::new(&mut self.get_mut().reply).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.reply.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.reply.size_hint()
    }
}
