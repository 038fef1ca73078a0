//! From an HTTP request to its answer: paths, principal, body, exchange.
#![allow(clippy::disallowed_methods)] // the rim: this is where luck is drawn and time passes

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{
    ALLOW, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue,
    RETRY_AFTER,
};
use hyper::{Method, Request, Response, StatusCode, Version};
use rand::Rng;
use serde_json::json;

use crate::body::{self, Unread};
use crate::core::auth::Principal;
use crate::core::error::{ApiError, Code};
use crate::core::limits::{Exceeded, Left, written};
use crate::core::{head, request_id};
use crate::events::{Event, Events, ReplyHead};
use crate::exchange::{Exchange, died, nobody, unknown_model};
use crate::fleet::Fleet;
use crate::metrics::Outcome;
use crate::prompt::Fingerprinted;
use crate::reply::{Relayed, Reply};
use crate::shared::Shared;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
const DROPPED_REASON: HeaderName = HeaderName::from_static("x-forebay-dropped-reason");
const WORKER: HeaderName = HeaderName::from_static("x-forebay-worker");
const ATTEMPTS: HeaderName = HeaderName::from_static("x-forebay-attempts");
const WHAT_IF: HeaderName = HeaderName::from_static("x-forebay-what-if");
const RATE_LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit-requests");
const RATE_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining-requests");
const RATE_RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset-requests");
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Paths that are placed on workers.
const PLACED: [&str; 3] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"];

/// A body up to here is parsed where it was read: that takes less than handing it on.
const AT_ONCE_BYTES: usize = 256 << 10;

/// Answers one request.
pub(crate) async fn answer(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Reply>, Infallible> {
    let given = request.headers().get(REQUEST_ID).map(HeaderValue::as_bytes);
    let id = request_id::choose(given, rand::rng().random());
    let version = request.version();
    let mut left = None;
    let mut response = route(&shared, request, &id, &mut left)
        .await
        .unwrap_or_else(|error| refuse(&error, version));
    if let Some(left) = left {
        show_left(response.headers_mut(), left);
    }
    let id = HeaderValue::from_str(&id).expect("its characters were checked");
    response.headers_mut().insert(REQUEST_ID, id);
    Ok(response)
}

async fn route(
    shared: &Arc<Shared>,
    request: Request<Incoming>,
    id: &str,
    left: &mut Option<Left>,
) -> Result<Response<Reply>, ApiError> {
    check_host(&request)?;
    let path = request.uri().path().to_owned();
    let get = matches!(*request.method(), Method::GET | Method::HEAD);
    if let Some(path) = PLACED.into_iter().find(|placed| *placed == path) {
        if request.method() != Method::POST {
            return Ok(wrong_method("POST", request.version()));
        }
        return place(shared, request, id, path, left).await;
    }
    let model = path.strip_prefix("/v1/models/");
    if !(path == "/health" || path == "/v1/models" || model.is_some()) {
        return Err(ApiError::new(
            Code::NotFound,
            "no such path: see POST /v1/chat/completions and GET /v1/models",
        ));
    }
    if !get {
        return Ok(wrong_method("GET, HEAD", request.version()));
    }
    if path == "/health" {
        return Ok(whole(StatusCode::OK, &json!({"status": "ok"})));
    }
    let principal = principal(shared, &request)?;
    let facts = shared.facts();
    let object =
        |model: &str| json!({"id": model, "object": "model", "created": 0, "owned_by": "forebay"});
    match model {
        None => {
            let models: Vec<_> = facts
                .iter()
                .flat_map(|facts| facts.models())
                .filter(|model| principal.may_ask(model))
                .map(object)
                .collect();
            Ok(whole(
                StatusCode::OK,
                &json!({"object": "list", "data": models}),
            ))
        }
        Some(model) => {
            let model = percent_decoded(model);
            let known = facts.is_some_and(|facts| facts.pool_of(&model).is_some());
            if !known {
                return Err(unknown_model());
            }
            if !principal.may_ask(&model) {
                return Err(not_allowed());
            }
            Ok(whole(StatusCode::OK, &object(&model)))
        }
    }
}

/// One name, or whoever stands in front might have meant another.
fn check_host(request: &Request<Incoming>) -> Result<(), ApiError> {
    let hosts = request.headers().get_all(HOST).iter().count();
    let wanted = request.version() == Version::HTTP_11;
    if hosts > 1 || (wanted && hosts == 0) {
        return Err(ApiError::new(
            Code::BadRequest,
            "send exactly one `host` header",
        ));
    }
    Ok(())
}

fn not_allowed() -> ApiError {
    ApiError::new(
        Code::ModelNotAllowed,
        "this API key may not ask that model: GET /v1/models lists those that it may",
    )
    .about("model")
}

fn exceeded(exceeded: Exceeded) -> ApiError {
    let message = match exceeded.retry_after {
        Some(_) => "this API key has asked as often in a minute as it may: ask again later",
        None => "this API key has as many requests under way as it may: wait for one to end",
    };
    ApiError::new(Code::RateLimitExceeded, message).after(exceeded.retry_after)
}

/// Refuses what no worker could answer in full, where all say how much they can.
fn check_length(fleet: &Fleet, model: &str, max_tokens: Option<u64>) -> Result<(), ApiError> {
    let workers = fleet.workers.iter().filter(|known| known.serves(model));
    let known = workers.map(|known| known.spec.max_context_tokens);
    let most = known.reduce(|most, one| {
        // One that does not say may have any.
        if most == 0 || one == 0 {
            0
        } else {
            most.max(one)
        }
    });
    match (most, max_tokens) {
        (Some(most), Some(asked)) if most > 0 && asked >= most.into() => Err(ApiError::new(
            Code::ContextLengthExceeded,
            format!(
                "the longest context of this model is {most} tokens, prompt included, and the answer alone is to have up to {asked}: ask for fewer"
            ),
        )
        .about("messages")),
        _ => Ok(()),
    }
}

/// What is left to a limited key.
fn show_left(headers: &mut hyper::HeaderMap, left: Left) {
    headers.insert(RATE_LIMIT, left.limit.into());
    headers.insert(RATE_REMAINING, left.remaining.into());
    if let Ok(reset) = HeaderValue::from_str(&written(left.reset)) {
        headers.insert(RATE_RESET, reset);
    }
}

fn principal(shared: &Shared, request: &Request<Incoming>) -> Result<Principal, ApiError> {
    let mut headers = request.headers().get_all(AUTHORIZATION).iter();
    let header = headers.next();
    if headers.next().is_some() {
        // Whoever stands in front might have checked the other one.
        let message = "send exactly one `authorization` header";
        return Err(ApiError::new(Code::InvalidApiKey, message));
    }
    let keys = shared.keys.read();
    keys.principal(header.map(HeaderValue::as_bytes))
}

async fn place(
    shared: &Arc<Shared>,
    request: Request<Incoming>,
    id: &str,
    path: &'static str,
    left: &mut Option<Left>,
) -> Result<Response<Reply>, ApiError> {
    if shared.draining.load(Ordering::Relaxed) {
        return Err(ApiError::new(
            Code::Draining,
            "this balancer is about to stop: connect again to reach another",
        ));
    }
    let principal = principal(shared, &request)?;
    let what_if = request.headers().contains_key(WHAT_IF);
    if what_if && !principal.debug {
        let message =
            "x-forebay-what-if is for keys with `debug = true` in the keys file: leave it out";
        return Err(ApiError::new(Code::DebugKeyRequired, message));
    }
    let version = request.version();
    let asked = principal.meter.ask(shared.now());
    *left = asked.1;
    let running = asked.0.map_err(exceeded)?;
    let mut tracked = shared.track(id, &principal.tenant).ok_or_else(|| {
        ApiError::new(
            Code::Overloaded,
            "this balancer serves as many requests as it can: try again soon",
        )
    })?;
    let prepared = async {
        let body = body::read(shared, request.into_body()).await?;
        let (body, head) = parsed(body).await?;
        let facts = shared.facts().ok_or_else(nobody)?;
        let (model, pool) = facts.pool_of(&head.model).ok_or_else(unknown_model)?;
        if !principal.may_ask(&model) {
            return Err(not_allowed().into());
        }
        check_length(&facts.fleet, &model, head.max_tokens)?;
        Ok((body, head, facts, model, pool))
    };
    let (body, head, facts, model, pool_name) = match prepared.await {
        Ok(prepared) => prepared,
        Err(unread) => {
            let unread: Unread = unread;
            // Who left in the middle has given no wrong body.
            if let Unread::Refused(error) = &unread {
                tracked.ended(Outcome::Error(error.code.row().code));
            }
            return Err(unread.error());
        }
    };
    tracked.asks_for(&model);
    let exchange = Exchange {
        _running: running,
        shared: shared.clone(),
        tracked,
        request_id: id.into(),
        tenant: principal.tenant.clone(),
        zone: principal.zone.clone(),
        path,
        model,
        pool: facts.fleet.pool(&pool_name),
        pool_name,
        body,
        revision: facts.fleet.revision.0,
        head,
        prompt: Fingerprinted::default(),
    };
    if what_if {
        return Ok(whole(StatusCode::OK, &exchange.what_if()));
    }
    let streaming = exchange.head.stream;
    let mut events = if version < Version::HTTP_2 {
        Events::here(exchange)
    } else {
        Events::aside(exchange)
    };
    let hold = Duration::from_millis(shared.settings.hold_headers_ms);
    let first = if streaming {
        match tokio::time::timeout(hold, events.next()).await {
            Ok(first) => first,
            Err(_) => return Ok(early(events)),
        }
    } else {
        events.next().await
    };
    match first {
        Some(Event::Head(head)) => Ok(relay(head, principal.debug, events)),
        Some(Event::Failed(error)) => Err(error),
        Some(Event::Data(_) | Event::End) | None => Err(died()),
    }
}

/// A long body is read aside, so that no stream of another client waits for it.
async fn parsed(body: body::Read) -> Result<(body::Read, head::Head), ApiError> {
    let parse = |body: body::Read| {
        let head = head::parse(body.text.expose());
        (body, head)
    };
    let (body, head) = if body.text.expose().len() > AT_ONCE_BYTES {
        let aside = tokio::task::spawn_blocking(move || parse(body));
        // It ends early only with the process.
        aside.await.map_err(|_| died())?
    } else {
        parse(body)
    };
    Ok((body, head?))
}

/// The answer once the engine's first byte is there.
fn relay(head: ReplyHead, debug: bool, events: Events) -> Response<Reply> {
    let mut response = Response::new(match head.whole {
        Some(whole) => Reply::Whole(Some(whole)),
        None => {
            let relayed = Relayed::new(events, head.streaming, false);
            Reply::Relayed(Box::new(relayed))
        }
    });
    *response.status_mut() = StatusCode::from_u16(head.status).unwrap_or(StatusCode::BAD_GATEWAY);
    let headers = response.headers_mut();
    if head.streaming {
        stream_headers(headers);
    }
    if let Ok(kind) = HeaderValue::from_str(&head.content_type) {
        headers.insert(CONTENT_TYPE, kind);
    }
    if let Some(Ok(after)) = head.retry_after.map(|after| HeaderValue::from_str(&after)) {
        headers.insert(RETRY_AFTER, after);
    }
    if debug {
        let worker = HeaderValue::from_str(&head.worker);
        headers.insert(WORKER, worker.expect("a name has no control characters"));
        headers.insert(ATTEMPTS, head.attempts.into());
    }
    response
}

/// The answer when the first byte takes too long to hold the status line back.
fn early(events: Events) -> Response<Reply> {
    let relayed = Relayed::new(events, true, true);
    let mut response = Response::new(Reply::Relayed(Box::new(relayed)));
    stream_headers(response.headers_mut());
    response
}

fn stream_headers(headers: &mut hyper::HeaderMap) {
    let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(CONTENT_TYPE, kind);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(ACCEL_BUFFERING, HeaderValue::from_static("no"));
}

/// An error as an answer.
fn refuse(error: &ApiError, version: Version) -> Response<Reply> {
    let row = error.code.row();
    let status = StatusCode::from_u16(row.status).expect("the table has valid statuses");
    let mut response = whole(status, &error.object());
    let headers = response.headers_mut();
    if let Some(after) = error.ask_again() {
        let millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        // Whole seconds, never too early.
        headers.insert(RETRY_AFTER, millis.div_ceil(1_000).into());
        headers.insert(RETRY_AFTER_MS, millis.into());
    }
    if let Some(reason) = row.dropped {
        headers.insert(DROPPED_REASON, HeaderValue::from_static(reason));
    }
    // h2 has no such header; a stream ends by itself.
    if row.close && version <= Version::HTTP_11 {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn wrong_method(allowed: &'static str, version: Version) -> Response<Reply> {
    let error = ApiError::new(
        Code::MethodNotAllowed,
        format!("this path takes {allowed} only"),
    );
    let mut response = refuse(&error, version);
    let allowed = HeaderValue::from_static(allowed);
    response.headers_mut().insert(ALLOW, allowed);
    response
}

fn whole(status: StatusCode, value: &serde_json::Value) -> Response<Reply> {
    let mut response = Response::new(Reply::Whole(Some(Bytes::from(value.to_string()))));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// Names of models contain `/`, which clients may escape.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, more)) = rest.split_first() {
        let escaped = (first == b'%')
            .then(|| more.get(..2))
            .flatten()
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match escaped {
            Some(byte) => {
                bytes.push(byte);
                rest = &more[2..];
            }
            None => {
                bytes.push(first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
