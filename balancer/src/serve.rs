//! The client port: accepting connections, turning away those beyond the bound, and draining.
#![allow(clippy::disallowed_methods)] // the rim: this is where connections are served

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::Rng;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;

use crate::connection::talk;
use crate::core::error::{ApiError, Code};
use crate::core::request_id;
use crate::fleet::Fleet;
use crate::links::{self, Links, Task};
use crate::reload;
use crate::shared::Shared;

/// Connections beyond those that are told so, at once.
const MAX_TURNED_AWAY: usize = 256;
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
    let _followers = [
        Task::spawn(follow(links, facts)),
        Task::spawn(links::watch(shared.clone())),
        Task::spawn(reload::watch(shared.clone())),
    ];
    let (drain, draining) = watch::channel(false);
    tokio::select! {
        () = accept(&shared, &listener, &draining) => {}
        () = shutdown => {}
    }
    shared.draining.store(true, Ordering::Relaxed);
    drop((listener, draining));
    drain.send_replace(true);
    let left = shared.inflight();
    tracing::info!(requests = left, "stopping: finishing what is under way");
    let patience = Duration::from_millis(shared.settings.drain_timeout_ms);
    if timeout(patience, drain.closed()).await.is_err() {
        let cut = shared.inflight();
        tracing::warn!(requests = cut, "stopping: the rest is cut off");
    }
}

async fn accept(shared: &Arc<Shared>, listener: &TcpListener, draining: &watch::Receiver<bool>) {
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
                let draining = draining.clone();
                let shared = shared.clone();
                tokio::spawn(async move {
                    let _open = Open::new(&shared, place);
                    let Some(tls) = &shared.tls else {
                        return talk(&shared, stream, draining).await;
                    };
                    let patience = shared.settings.limits.first_bytes;
                    if let Some(stream) = tls.accept(stream, patience).await {
                        talk(&shared, stream, draining).await;
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
