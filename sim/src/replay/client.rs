//! The HTTP side of a replay: one request out, one outcome back.
#![allow(clippy::disallowed_methods)] // a rim: it measures with tokio's clock

use super::plan::{Endpoint, Planned};
use super::reply::{Fault, Reply, Served};
use super::report::Outcome;
use super::sse::Splitter;
use super::{ApiKey, ReplayError};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::http::uri::Scheme;
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::Deserialize;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// A base URL that requests can be sent to.
#[derive(Clone, Debug)]
pub(super) struct Target {
    base: String,
    requests: Uri,
}

impl Target {
    pub(super) fn parse(text: &str, endpoint: Endpoint) -> Result<Target, ReplayError> {
        let bad = || ReplayError::Target(text.to_owned());
        let base = text
            .trim_end_matches('/')
            .trim_end_matches("/v1")
            .to_owned();
        let uri: Uri = base.parse().map_err(|_| bad())?;
        if uri.scheme() == Some(&Scheme::HTTPS) {
            return Err(ReplayError::Tls(text.to_owned()));
        }
        let http = uri.scheme() == Some(&Scheme::HTTP) && uri.authority().is_some();
        if !http || !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(bad());
        }
        let requests = format!("{base}{}", endpoint.path())
            .parse()
            .map_err(|_| bad())?;
        Ok(Target { base, requests })
    }
}

/// Keep-alive connections to all targets, and what every request carries.
#[derive(Clone)]
pub(super) struct Client {
    http: legacy::Client<HttpConnector, Full<Bytes>>,
    headers: HeaderMap,
    timeout: Duration,
}

impl Client {
    pub(super) fn new(api_key: Option<&ApiKey>, timeout: Duration) -> Result<Client, ReplayError> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(
            ACCEPT,
            HeaderValue::from_static("text/event-stream, application/json"),
        );
        if let Some(ApiKey(key)) = api_key {
            let value = HeaderValue::from_str(&format!("Bearer {key}"));
            let mut value = value.map_err(|_| ReplayError::ApiKey)?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let http = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .build(connector);
        Ok(Client {
            http,
            headers,
            timeout,
        })
    }

    /// The first model that a target lists.
    pub(super) async fn first_model(&self, target: &Target) -> Result<String, ReplayError> {
        let failed = |reason: String| ReplayError::Model {
            target: target.base.clone(),
            reason,
        };
        let uri: Uri = format!("{}/v1/models", target.base)
            .parse()
            .map_err(|_| ReplayError::Target(target.base.clone()))?;
        let read = async {
            let response = self
                .http
                .request(self.request(Method::GET, uri, Bytes::new()))
                .await
                .map_err(|error| deepest(&error))?;
            if response.status() != 200 {
                return Err(format!("it answered {}", response.status()));
            }
            let body = Limited::new(response.into_body(), MAX_MODELS_BYTES)
                .collect()
                .await;
            let body = body.map_err(|error| error.to_string())?.to_bytes();
            let list: Models = serde_json::from_slice(&body)
                .map_err(|_| "it did not answer with a list of models".to_owned())?;
            let first = list.data.into_iter().next();
            first
                .map(|model| model.id)
                .ok_or_else(|| "it lists no model".to_owned())
        };
        match timeout(MODELS_TIMEOUT, read).await {
            Ok(model) => model.map_err(failed),
            Err(_) => Err(failed("no answer within 10 s".to_owned())),
        }
    }

    /// Sends a request that was due at `intended`, and reads its answer to the end.
    pub(super) async fn send(self, target: Target, planned: Planned, intended: Instant) -> Outcome {
        let sent = Instant::now();
        let deadline = sent + self.timeout;
        let request = self.request(Method::POST, target.requests, planned.body);
        let mut outcome = Outcome {
            index: planned.index,
            intended: planned.start,
            lag: Some(sent.saturating_duration_since(intended)),
            worker: None,
            attempts: None,
            result: Err(Fault::ours(None, "timeout")),
        };
        match timeout_at(deadline, self.http.request(request)).await {
            Err(_) => {}
            Ok(Err(error)) => {
                let code = if error.is_connect() {
                    "connect"
                } else {
                    "transport"
                };
                outcome.result = Err(Fault::ours(None, code));
            }
            Ok(Ok(response)) => {
                outcome.worker = worker(response.headers());
                outcome.attempts = attempts(response.headers());
                let reply = Reply::new(&planned.expected);
                outcome.result = if response.status() == 200 {
                    streamed(response, reply, intended, deadline).await
                } else {
                    Err(refused(response, deadline).await)
                };
            }
        }
        outcome
    }

    fn request(&self, method: Method, uri: Uri, body: Bytes) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        *request.headers_mut() = self.headers.clone();
        request
    }
}

async fn streamed(
    response: Response<Incoming>,
    mut reply: Reply,
    intended: Instant,
    deadline: Instant,
) -> Result<Served, Fault> {
    let mut body = response.into_body();
    let mut splitter = Splitter::default();
    let mut bytes = 0;
    loop {
        let frame = match timeout_at(deadline, body.frame()).await {
            Err(_) => return Err(reply.broken("timeout")),
            Ok(Some(Err(_))) => return Err(reply.broken("transport")),
            Ok(None) => return reply.end(intended.elapsed()),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else {
            continue;
        };
        let now = intended.elapsed();
        bytes += data.len();
        let split = splitter.push(&data, |event| reply.event(event, now));
        if split.is_err() || bytes > MAX_ANSWER_BYTES {
            return Err(reply.broken("bad_stream"));
        }
    }
}

async fn refused(response: Response<Incoming>, deadline: Instant) -> Fault {
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), MAX_ERROR_BYTES).collect();
    match timeout_at(deadline, body).await {
        Ok(Ok(body)) => Fault::of_answer(status, &body.to_bytes()),
        Ok(Err(_)) => Fault::ours(Some(status), "no_error_object"),
        Err(_) => Fault::ours(Some(status), "timeout"),
    }
}

fn worker(headers: &HeaderMap) -> Option<String> {
    let name = headers.get(&WORKER)?.to_str().ok()?;
    (1..=MAX_WORKER_NAME)
        .contains(&name.len())
        .then(|| name.to_owned())
}

fn attempts(headers: &HeaderMap) -> Option<u32> {
    headers.get(&ATTEMPTS)?.to_str().ok()?.parse().ok()
}

/// The cause at the bottom, which is what a reader can act on.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

const WORKER: HeaderName = HeaderName::from_static("x-forebay-worker");
const ATTEMPTS: HeaderName = HeaderName::from_static("x-forebay-attempts");
const MAX_WORKER_NAME: usize = 128;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
const MODELS_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_MODELS_BYTES: usize = 4 << 20;
const MAX_ERROR_BYTES: usize = 64 << 10;
/// A million tokens at half a KiB of event each.
const MAX_ANSWER_BYTES: usize = 512 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_base_url() {
        let base = |text: &str| {
            Target::parse(text, Endpoint::Chat).map(|target| target.requests.to_string())
        };
        let chat = "http://h:1/v1/chat/completions";
        for good in [
            "http://h:1",
            "http://h:1/",
            "http://h:1/v1",
            "http://h:1/v1/",
        ] {
            assert_eq!(base(good).unwrap(), chat);
        }
        assert!(base("http://[::1]:8080").is_ok());
        for bad in [
            "",
            "h:1",
            "http://h:1/x",
            "http://h:1/?a=b",
            "http://",
            "\n",
        ] {
            assert!(matches!(base(bad), Err(ReplayError::Target(_))), "{bad:?}");
        }
        for tls in ["https://h", "HTTPS://h:1/v1"] {
            assert!(matches!(base(tls), Err(ReplayError::Tls(_))), "{tls:?}");
        }
    }
}
