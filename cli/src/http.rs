//! Asking a process over HTTP: bounded in time and in size, without TLS.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HttpError {
    /// The address is not one.
    #[error("{0} is not a URL such as http://HOST:PORT (TLS is not spoken here)")]
    Url(String),
    /// Nobody is there, or somebody else.
    #[error("{url} does not answer: {problem}")]
    Unreachable {
        /// Who was asked.
        url: String,
        /// What happened.
        problem: String,
    },
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The status.
    pub(crate) status: u16,
    /// The body.
    pub(crate) body: Bytes,
}

impl Answer {
    /// What went wrong by the answer's own word, else the status.
    pub(crate) fn problem(&self) -> String {
        let value = serde_json::from_slice::<serde_json::Value>(&self.body).unwrap_or_default();
        let error = &value["error"];
        let said = error.as_str().or_else(|| error["message"].as_str());
        said.map_or_else(|| format!("HTTP status {}", self.status), str::to_owned)
    }
}

/// What is sent with a question.
#[derive(Debug, Default)]
pub(crate) struct Sent<'a> {
    /// A JSON body; none: it is a GET.
    pub(crate) body: Option<Bytes>,
    /// The bearer token.
    pub(crate) key: Option<&'a str>,
    /// One more header.
    pub(crate) header: Option<(&'static str, &'static str)>,
}

/// Checks a base URL.
///
/// # Errors
///
/// Says what one looks like.
pub(crate) fn check(base: &str) -> Result<(), HttpError> {
    authority(base).map(drop)
}

/// Asks for a page.
///
/// # Errors
///
/// When nobody answers within `patience`, or with more than [`MAX_ANSWER`].
pub(crate) async fn get(base: &str, path: &str, patience: Duration) -> Result<Answer, HttpError> {
    ask(base, path, Sent::default(), patience).await
}

/// Asks, with a body if there is one.
///
/// # Errors
///
/// As [`get`].
pub(crate) async fn ask(
    base: &str,
    path: &str,
    sent: Sent<'_>,
    patience: Duration,
) -> Result<Answer, HttpError> {
    let authority = authority(base)?;
    let unreachable = |problem: String| HttpError::Unreachable {
        url: base.into(),
        problem,
    };
    let asking = async {
        let stream = TcpStream::connect(&authority)
            .await
            .map_err(|error| error.to_string())?;
        exchange(stream, &authority, path, sent).await
    };
    match tokio::time::timeout(patience, asking).await {
        Ok(answer) => answer.map_err(unreachable),
        Err(_) => Err(unreachable(format!("nothing came within {patience:?}"))),
    }
}

async fn exchange(
    stream: TcpStream,
    authority: &str,
    path: &str,
    sent: Sent<'_>,
) -> Result<Answer, String> {
    let failed = |error: &dyn std::error::Error| {
        // Hyper's own sentence does not say what the system said.
        error
            .source()
            .map_or_else(|| error.to_string(), ToString::to_string)
    };
    let io = TokioIo::new(stream);
    let shaken = hyper::client::conn::http1::handshake(io).await;
    let (mut sender, connection) = shaken.map_err(|error| failed(&error))?;
    let method = sent.body.as_ref().map_or(Method::GET, |_| Method::POST);
    let mut request = Request::builder().method(method).uri(path);
    request = request.header(HOST, authority);
    if sent.body.is_some() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    if let Some(key) = sent.key {
        request = request.header(AUTHORIZATION, format!("Bearer {key}"));
    }
    if let Some((name, value)) = sent.header {
        request = request.header(name, value);
    }
    let request = request.body(Full::new(sent.body.unwrap_or_default()));
    let request = request.map_err(|error| error.to_string())?;
    let answer = async {
        let response = sender.send_request(request).await;
        let response = response.map_err(|error| failed(&error))?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        Ok(Answer { status, body })
    };
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        // It ends before the answer only if there is none, which the answer then says.
        _ = connection => answer.await,
    }
}

/// `HOST:PORT` of a base URL.
fn authority(base: &str) -> Result<String, HttpError> {
    let wrong = || HttpError::Url(base.into());
    let uri: Uri = base.parse().map_err(|_| wrong())?;
    let plain = uri.scheme_str() == Some("http") && uri.path() == "/" && uri.query().is_none();
    let authority = uri.authority().filter(|_| plain).ok_or_else(wrong)?;
    let port = authority.port_u16().unwrap_or(80);
    Ok(format!("{}:{port}", authority.host()))
}

/// The longest answer that is read, in bytes: a thousand receipts of a large fleet.
const MAX_ANSWER: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_is_a_host_and_a_port() {
        let check = |base: &str, is: Option<&str>| {
            assert_eq!(authority(base).ok().as_deref(), is, "{base}");
        };
        check("http://h:7411", Some("h:7411"));
        check("http://h:7411/", Some("h:7411"));
        check("http://h", Some("h:80"));
        check("http://[::1]:7411", Some("[::1]:7411"));
        for wrong in [
            "https://h:1",
            "h:1",
            "h",
            "",
            "http://h:1/path",
            "http://h:1?q",
        ] {
            check(wrong, None);
        }
    }
}
