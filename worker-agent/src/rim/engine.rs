//! The engine's client: OpenAI's HTTP API on the same host.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, Uri};

use super::lifecycle::Lifecycle;
use super::pool::{CallError, Connection, Pool, Text};

/// Larger documents are none of an engine's.
const MAX_DOCUMENT_BYTES: usize = 1 << 20;
const REQUEST_ID: &str = "x-request-id";
/// Of the agent's own questions.
const PROBE_ID: &str = "forebay-probe";

/// Where an engine answers: `http://host:port` and perhaps a path in front of its API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineAddress {
    authority: String,
    prefix: String,
}

/// What was given is no address of an engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not the address of an engine: give it as http://host:port, such as http://127.0.0.1:8000"
)]
pub struct EngineAddressError(String);

impl FromStr for EngineAddress {
    type Err = EngineAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || EngineAddressError(text.chars().take(200).collect());
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        let plain = uri.scheme_str() == Some("http")
            && uri.query().is_none()
            && !authority.as_str().contains('@')
            && !authority.host().is_empty();
        if !plain {
            return Err(wrong());
        }
        let port = authority.port_u16().unwrap_or(80);
        let path = uri.path().trim_end_matches('/');
        Ok(Self {
            authority: format!("{}:{port}", authority.host()),
            prefix: path.strip_suffix("/v1").unwrap_or(path).to_owned(),
        })
    }
}

impl EngineAddress {
    /// Whether it is on this host for sure.
    pub(super) fn is_loopback(&self) -> bool {
        let host = self.authority.rsplit_once(':').map_or("", |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let address = host.parse::<std::net::IpAddr>();
        host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }
}

impl std::fmt::Display for EngineAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "http://{}{}", self.authority, self.prefix)
    }
}

/// One engine.
pub(super) struct Engine {
    address: EngineAddress,
    pool: Pool,
    /// Its process, where the agent runs it.
    process: Option<Arc<Lifecycle>>,
}

/// What one look at a page gave.
pub(super) struct Document {
    pub(super) status: u16,
    pub(super) body: Bytes,
}

/// An answer that began.
pub(super) struct Answer {
    response: Response<Incoming>,
    connection: Connection,
}

impl Engine {
    /// A client that keeps at most so many connections.
    pub(super) fn new(
        address: EngineAddress,
        connections: usize,
        process: Option<Arc<Lifecycle>>,
    ) -> Self {
        let pool = Pool::new(address.authority.clone(), connections);
        Self {
            address,
            pool,
            process,
        }
    }

    /// Its process, where the agent runs it.
    pub(super) fn process(&self) -> Option<&Lifecycle> {
        self.process.as_deref()
    }

    /// Where it is.
    pub(super) const fn address(&self) -> &EngineAddress {
        &self.address
    }

    /// Asks for an answer; returns when it begins. Dropped, it closes the connection.
    pub(super) async fn post(
        &self,
        path: &str,
        request_id: &str,
        body: Text,
    ) -> Result<Answer, CallError> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}{path}", self.address.prefix))
            .header(HOST, &self.address.authority)
            .header(CONTENT_TYPE, "application/json")
            .header(REQUEST_ID, request_id)
            .body(body)
            .map_err(|error| CallError::NotStarted(error.to_string()))?;
        let (response, connection) = self.pool.send(request).await?;
        Ok(Answer {
            response,
            connection,
        })
    }

    /// Sends a document and reads the answer, which is small.
    pub(super) async fn ask(
        &self,
        path: &str,
        body: Bytes,
        patience: Duration,
    ) -> Result<Document, CallError> {
        let reading = async {
            let answer = self.post(path, PROBE_ID, Text::of(body)).await?;
            self.read(path, answer).await
        };
        in_time(path, reading, patience).await
    }

    /// Keeps the connection of an answer that was read to its end.
    pub(super) async fn keep(&self, answer: Answer) {
        self.pool.keep(answer.connection).await;
    }

    /// Reads a small page.
    pub(super) async fn get(&self, path: &str, patience: Duration) -> Result<Document, CallError> {
        let request = Request::builder()
            .uri(format!("{}{path}", self.address.prefix))
            .header(HOST, &self.address.authority)
            .body(Text::default())
            .map_err(|error| CallError::NotStarted(error.to_string()))?;
        let reading = async {
            let (response, connection) = self.pool.send(request).await?;
            let answer = Answer {
                response,
                connection,
            };
            self.read(path, answer).await
        };
        in_time(path, reading, patience).await
    }

    /// The whole of a small answer.
    async fn read(&self, path: &str, mut answer: Answer) -> Result<Document, CallError> {
        let status = answer.status();
        let mut body = BytesMut::new();
        while let Some(piece) = answer.next().await.map_err(CallError::Failed)? {
            body.extend_from_slice(&piece);
            if body.len() > MAX_DOCUMENT_BYTES {
                let problem = format!("{path} is larger than {MAX_DOCUMENT_BYTES} bytes");
                return Err(CallError::Failed(problem));
            }
        }
        self.keep(answer).await;
        let body = body.freeze();
        Ok(Document { status, body })
    }
}

async fn in_time(
    path: &str,
    reading: impl Future<Output = Result<Document, CallError>>,
    patience: Duration,
) -> Result<Document, CallError> {
    tokio::time::timeout(patience, reading)
        .await
        .unwrap_or_else(|_| Err(CallError::Failed(format!("{path} does not answer in time"))))
}

impl Answer {
    pub(super) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub(super) fn content_type(&self) -> Option<&str> {
        self.response.headers().get(CONTENT_TYPE)?.to_str().ok()
    }

    /// The next piece as it came, `None` at the end. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, String> {
        loop {
            match self.response.body_mut().frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(error.to_string()),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) if piece.is_empty() => {}
                    Ok(piece) => return Ok(Some(piece)),
                    // Trailers are not relayed.
                    Err(_) => {}
                },
            }
        }
    }
}

/// The directory that the first model was read from, in an answer of vLLM's `/v1/models`.
pub(super) fn model_directory(document: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct List {
        data: Vec<Model>,
    }
    #[derive(serde::Deserialize)]
    struct Model {
        root: Option<String>,
    }
    let list: List = serde_json::from_slice(document).ok()?;
    list.data.into_iter().next()?.root
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<(&str, &str)>) {
        let parsed = text.parse::<EngineAddress>().ok();
        let parts = parsed.as_ref();
        let parts = parts.map(|a| (a.authority.as_str(), a.prefix.as_str()));
        assert_eq!(parts, expected, "{text}");
    }

    #[test]
    fn an_engine_answers_at_plain_http() {
        check("http://127.0.0.1:8000", Some(("127.0.0.1:8000", "")));
        check("http://127.0.0.1:8000/v1/", Some(("127.0.0.1:8000", "")));
        check("http://engine", Some(("engine:80", "")));
        check("http://[::1]:8000/a/b/", Some(("[::1]:8000", "/a/b")));
        for bad in [
            "",
            "127.0.0.1:8000",
            "https://e:1",
            "http://",
            "http://u:p@e",
            "http://e?x",
        ] {
            check(bad, None);
        }
    }

    #[test]
    fn an_engine_is_on_this_host_or_not() {
        let check = |text: &str| text.parse::<EngineAddress>().unwrap().is_loopback();
        assert!(
            check("http://127.0.0.1:8000") && check("http://[::1]:1") && check("http://localhost")
        );
        assert!(!check("http://10.0.0.1:8000") && !check("http://gpu7:8000"));
    }
}
