//! The engine's HTTP server.
//!
//! A client that goes away takes its connection's task with it, and with that the request's place:
//! this is how an abort works, streaming or not. Stopping cuts running requests, as a vLLM does
//! that is told to stop without a timeout.
#![allow(clippy::disallowed_methods)] // a rim: sockets and clocks

use super::answer::{Form, embedding};
use super::error::ApiError;
use super::events::Batch;
use super::publisher::{self, Publisher};
use super::request::{Api, Served};
use super::service::Service;
use super::{Config, EngineError};
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinSet;

/// Serves until `shutdown` ends; `ready` is told the address once requests are answered.
///
/// # Errors
///
/// A bad setting, or an address that cannot be listened on. Once ready it fails of nothing but what it was told to die
/// of.
pub async fn serve(
    config: Config,
    ready: impl FnOnce(SocketAddr),
    shutdown: impl Future<Output = ()>,
) -> Result<(), EngineError> {
    config.check()?;
    let address = config.listen;
    let listen = |source| EngineError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(listen)?;
    let bound = listener.local_addr().map_err(listen)?;
    let (publish, publishing) = match &config.kv_events {
        None => (None, None),
        Some(settings) => {
            let (publish, batches) = mpsc::channel(publisher::QUEUE);
            let publisher = Publisher::bind(settings).await?;
            (Some(publish), Some(publisher.run(batches)))
        }
    };
    let publishing = async {
        match publishing {
            Some(publishing) => publishing.await,
            None => std::future::pending().await,
        }
    };
    let engine = Engine::new(config, publish);
    let (service, dead) = (engine.service.clone(), engine.clone());
    let router = router(engine);
    ready(bound);
    tokio::select! {
        never = accept(listener, router) => match never {},
        never = service.run() => match never {},
        () = publishing => Ok(()),
        () = dead.died.notified() => Err(EngineError::Died),
        () = shutdown => Ok(()),
    }
}

async fn accept(listener: TcpListener, router: Router) -> std::convert::Infallible {
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= MAX_CONNECTIONS {
            connections.join_next().await;
        }
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, router.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(stream: TcpStream, router: Router) {
    // Without it small events wait for the acknowledgement of earlier ones; failing is harmless.
    let _ = stream.set_nodelay(true);
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS);
    let served = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = served.await {
        tracing::trace!(%error, "a connection ended");
    }
}

struct Engine {
    config: Config,
    service: Arc<Service>,
    /// KiB of bodies that may be in memory at once.
    body_budget: Semaphore,
    started: u64,
    next_id: AtomicU64,
    /// A request killed it.
    died: Notify,
}

impl Engine {
    fn new(config: Config, publish: Option<mpsc::Sender<Batch>>) -> Arc<Engine> {
        Arc::new(Engine {
            service: Service::new(config.settings(), publish),
            body_budget: Semaphore::new(BODY_BUDGET_KIB as usize),
            started: unix_ms(),
            next_id: AtomicU64::new(0),
            died: Notify::new(),
            config,
        })
    }

    /// The client's request id if it is one, else a new one.
    fn request_id(&self, headers: &HeaderMap) -> String {
        let good = |id: &&str| {
            (1..=128).contains(&id.len())
                && id
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        let given = headers
            .get(&REQUEST_ID)
            .and_then(|value| value.to_str().ok())
            .filter(good);
        given.map(str::to_owned).unwrap_or_else(|| {
            let number = self.next_id.fetch_add(1, Ordering::Relaxed);
            format!("{:x}-{number:x}", self.started)
        })
    }

    async fn body(&self, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
        let too_large = || {
            ApiError::of(
                413,
                format!("the body is larger than {MAX_BODY_BYTES} bytes"),
            )
        };
        let declared = headers
            .get(CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok());
        let bytes = declared
            .and_then(|text| text.parse().ok())
            .unwrap_or(MAX_BODY_BYTES);
        if bytes > MAX_BODY_BYTES {
            return Err(too_large());
        }
        let kib = u32::try_from(bytes.div_ceil(1024)).expect("bounded by MAX_BODY_BYTES");
        let read = async {
            let _held = self.body_budget.acquire_many(kib).await;
            Limited::new(body, MAX_BODY_BYTES).collect().await
        };
        match tokio::time::timeout(BODY_TIMEOUT, read).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(too_large()),
            Ok(Err(_)) => Err(ApiError::bad(None, "the body broke off")),
            Err(_) => Err(ApiError::of(408, "the body took longer than 30 s")),
        }
    }

    async fn answer(
        &self,
        api: Api,
        headers: &HeaderMap,
        body: Body,
        id: &str,
    ) -> Result<Response, ApiError> {
        let body = self.body(headers, body).await?;
        let Config {
            models,
            max_context_tokens,
            block_tokens,
            kv_events,
            ..
        } = &self.config;
        let job = Served {
            models,
            max_context_tokens: *max_context_tokens,
            block_tokens: *block_tokens,
            keeps_ids: kv_events.is_some(),
        }
        .job(api, &body)?;
        let kills = self.config.dies_of_seed && has_seed(&body);
        drop(body);
        let place = self.service.enter(&job)?;
        if kills {
            self.service.prefill(place).await;
            self.died.notify_one();
            return std::future::pending().await;
        }
        if api == Api::Embedding {
            self.service.prefill(place).await;
            return Ok(json_response(StatusCode::OK, embedding(&job)));
        }
        let form = Form::new(&job, id, unix_ms() / 1000);
        if job.stream {
            let events = Body::from_stream(self.service.stream(&job, form, place));
            let headers = [
                (
                    CONTENT_TYPE,
                    HeaderValue::from_static("text/event-stream; charset=utf-8"),
                ),
                (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            ];
            Ok((headers, events).into_response())
        } else {
            Ok(json_response(
                StatusCode::OK,
                self.service.whole(job, form, place).await,
            ))
        }
    }
}

fn router(engine: Arc<Engine>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/models", get(models))
        .route("/health", get(|| async { StatusCode::OK }))
        .route("/metrics", get(metrics))
        .route("/kv_event_sources", get(kv_event_sources))
        .fallback(|| async { error_response(&ApiError::of(404, "Not Found")) })
        .method_not_allowed_fallback(|| async {
            error_response(&ApiError::of(405, "Method Not Allowed"))
        })
        .with_state(engine)
}

async fn chat(engine: State<Arc<Engine>>, headers: HeaderMap, body: Body) -> Response {
    complete(&engine, Api::Chat, &headers, body).await
}

async fn completion(engine: State<Arc<Engine>>, headers: HeaderMap, body: Body) -> Response {
    complete(&engine, Api::Completion, &headers, body).await
}

async fn embeddings(engine: State<Arc<Engine>>, headers: HeaderMap, body: Body) -> Response {
    complete(&engine, Api::Embedding, &headers, body).await
}

async fn complete(engine: &Engine, api: Api, headers: &HeaderMap, body: Body) -> Response {
    let id = engine.request_id(headers);
    let answer = engine.answer(api, headers, body, &id).await;
    let mut response = answer.unwrap_or_else(|error| error_response(&error));
    let id = HeaderValue::from_str(&id).expect("an id is made of header characters");
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

async fn models(State(engine): State<Arc<Engine>>) -> Response {
    let entry = |name: &String| {
        json!({
            "id": name, "object": "model", "created": engine.started / 1000,
            "owned_by": "forebay-emulated", "root": name, "parent": null,
            "max_model_len": engine.config.max_context_tokens,
        })
    };
    let entries: Vec<_> = engine.config.models.iter().map(entry).collect();
    let list = json!({"object": "list", "data": entries});
    json_response(StatusCode::OK, Bytes::from(list.to_string()))
}

/// Where the cache's events are, as vLLM says it.
async fn kv_event_sources(State(engine): State<Arc<Engine>>) -> Response {
    let sources = match &engine.config.kv_events {
        None => json!({}),
        Some(settings) => json!({"0": {
            "enable_kv_cache_events": true, "publisher": "zmq", "endpoint": settings.endpoint,
            "replay_endpoint": settings.replay, "buffer_steps": settings.buffer, "topic": "",
        }}),
    };
    json_response(StatusCode::OK, Bytes::from(sources.to_string()))
}

async fn metrics(State(engine): State<Arc<Engine>>) -> Response {
    let page = engine.service.reading();
    let page = page.page(&engine.config.models[0], engine.started);
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(CONTENT_TYPE, kind)], page).into_response()
}

/// Whether a body that was read before says what to draw from.
fn has_seed(body: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Seeded {
        seed: Option<serde::de::IgnoredAny>,
    }
    serde_json::from_slice::<Seeded>(body).is_ok_and(|body| body.seed.is_some())
}

fn error_response(error: &ApiError) -> Response {
    let status = StatusCode::from_u16(error.status).expect("every ApiError has a real status");
    json_response(status, Bytes::from(error.body()))
}

fn json_response(status: StatusCode, body: Bytes) -> Response {
    let kind = HeaderValue::from_static("application/json");
    (status, [(CONTENT_TYPE, kind)], body).into_response()
}

fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_CONNECTIONS: usize = 8192;
const MAX_STREAMS: u32 = 1024;
/// 32 MiB, the most that a balancer takes from a client, and what it may add.
const MAX_BODY_BYTES: usize = 33 << 20;
const BODY_BUDGET_KIB: u32 = 256 << 10;
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// A keep-alive connection on which nothing comes for so long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
