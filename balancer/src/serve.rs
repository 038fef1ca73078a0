//! The client port: accepting, bounding and draining connections.
#![allow(clippy::disallowed_methods)] // the rim: this is where connections are served

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use rand::Rng;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;

use crate::core::error::{ApiError, Code};
use crate::core::request_id;
use crate::fleet::Fleet;
use crate::http;
use crate::links::{self, Links, Task};
use crate::shared::Shared;
use crate::socket::Socket;

/// Connections beyond those that are told so, at once.
const MAX_TURNED_AWAY: usize = 256;
const MAX_HEAD_BYTES: usize = 64 << 10;
const MAX_STREAMS: u32 = 256;
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Keeps links to the workers of the newest facts for as long as facts may come.
pub(crate) async fn follow(mut links: Links, mut facts: watch::Receiver<Option<Arc<Fleet>>>) {
    loop {
        let newest = facts.borrow_and_update().clone();
        if let Some(fleet) = newest {
            links.follow(&fleet);
        }
        if facts.changed().await.is_err() {
            // Nobody will bring newer facts: those at hand stay in use.
            std::future::pending::<()>().await;
        }
    }
}

/// Serves clients until `shutdown`, then finishes what is under way.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    links: Links,
    facts: watch::Receiver<Option<Arc<Fleet>>>,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) {
    let mut followers = vec![
        Task::spawn(follow(links, facts)),
        Task::spawn(links::watch(shared.clone())),
    ];
    followers.extend(shared.tls.clone().map(|tls| Task::spawn(tls.watch())));
    let graceful = GracefulShutdown::new();
    tokio::select! {
        () = accept(&shared, &listener, &graceful) => {}
        () = shutdown => {}
    }
    shared.draining.store(true, Ordering::Relaxed);
    drop(listener);
    let left = shared.inflight();
    tracing::info!(requests = left, "stopping: finishing what is under way");
    let patience = Duration::from_millis(shared.settings.drain_timeout_ms);
    if timeout(patience, graceful.shutdown()).await.is_err() {
        let cut = shared.inflight();
        tracing::warn!(requests = cut, "stopping: the rest is cut off");
    }
}

async fn accept(shared: &Arc<Shared>, listener: &TcpListener, graceful: &GracefulShutdown) {
    let room = Arc::new(Semaphore::new(shared.settings.limits.connections));
    let turned_away = Arc::new(Semaphore::new(MAX_TURNED_AWAY));
    loop {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Each event is one small write: none may wait for the next.
        let _ = stream.set_nodelay(true);
        match room.clone().try_acquire_owned() {
            Ok(place) => {
                let graceful = graceful.watcher();
                let shared = shared.clone();
                tokio::spawn(async move {
                    let _open = Open::new(&shared, place);
                    match &shared.tls {
                        None => talk(&shared, stream, graceful).await,
                        Some(tls) => {
                            if let Some(stream) = tls.accept(stream).await {
                                talk(&shared, stream, graceful).await;
                            }
                        }
                    }
                });
            }
            Err(_) => {
                if let Ok(place) = turned_away.clone().try_acquire_owned() {
                    tokio::spawn(async move {
                        let _place = place;
                        turn_away(stream).await;
                    });
                }
            }
        }
    }
}

/// A connection that is open, given back when dropped.
struct Open<'a> {
    shared: &'a Shared,
    _place: OwnedSemaphorePermit,
}

impl<'a> Open<'a> {
    fn new(shared: &'a Shared, place: OwnedSemaphorePermit) -> Self {
        shared.metrics.connections.inc();
        let _place = place;
        Self { shared, _place }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.shared.metrics.connections.dec();
    }
}

async fn talk<S>(shared: &Arc<Shared>, stream: S, graceful: Watcher)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(shared.settings.limits.header)
        .max_buf_size(MAX_HEAD_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10))
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(u32::try_from(MAX_HEAD_BYTES).expect("64 KiB fit"));
    let service = {
        let shared = shared.clone();
        service_fn(move |request| http::answer(shared.clone(), request))
    };
    let connection = builder
        .serve_connection(
            TokioIo::new(Socket::new(stream, shared.settings.limits)),
            service,
        )
        .into_owned();
    if let Err(error) = graceful.watch(connection).await {
        tracing::trace!(%error, "a client's connection ended early");
    }
}

/// Says that there are too many connections, without reading what the client wants.
async fn turn_away(mut stream: TcpStream) {
    let error = ApiError::new(
        Code::NoCapacity,
        "this balancer has as many connections as it can serve: try again soon",
    );
    let row = error.code.row();
    let after = row.retry_after.unwrap_or_default();
    let (seconds, millis) = (after.as_secs(), after.as_millis());
    let id = request_id::choose(None, rand::rng().random());
    let body = error.object().to_string();
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 {} Service Unavailable\r\ncontent-type: application/json\r\n\
         x-request-id: {id}\r\nretry-after: {seconds}\r\nretry-after-ms: {millis}\r\n\
         connection: close\r\ncontent-length: {length}\r\n\r\n{body}",
        row.status
    );
    let telling = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    };
    // A client that does not listen is closed on.
    let _ = timeout(Duration::from_secs(1), telling).await;
}

/// Listens for clients.
pub(crate) async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}
