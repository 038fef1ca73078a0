//! The pages: `/livez`, `/readyz`, `/metrics`, and what a role adds.
//!
//! A scrape cannot hold the process up: connections, header time and connection time are bounded,
//! and request bodies are never read.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// What a role shows of itself.
pub struct Admin {
    /// The role and its name, for the index page: `balancer b1`.
    pub title: String,
    /// The role's metrics.
    pub registry: Registry,
    /// Whether the process works at all; false asks for a restart.
    pub live: Box<dyn Fn() -> bool + Send + Sync>,
    /// Whether it should get traffic, else every reason why not, each a sentence.
    pub ready: Box<dyn Fn() -> Result<(), Vec<String>> + Send + Sync>,
    /// More pages.
    pub pages: Vec<Page>,
    /// Pages that show what is asked for in their address, after a `?`.
    pub searches: Vec<Search>,
}

/// A page that a role adds, of which a part is asked for.
pub struct Search {
    /// Where it is: `/debug/receipts`.
    pub path: &'static str,
    /// What it shows, in a sentence, and how to ask.
    pub about: &'static str,
    /// What was found, given what stands after the `?`; called once a request.
    pub find: Box<Find>,
}

/// What a search does.
pub type Find = dyn Fn(&str) -> Result<Content, NotFound> + Send + Sync;

/// Why a search shows nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotFound {
    /// The question is not understood; says why.
    Question(String),
    /// There is no such thing; says what.
    Nothing(String),
}

/// A page that a role adds.
pub struct Page {
    /// Where it is: `/debug/workers`.
    pub path: &'static str,
    /// What it shows, in a sentence.
    pub about: &'static str,
    /// Its content; called once a request.
    pub render: Box<dyn Fn() -> Content + Send + Sync>,
}

/// What a page shows.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// One value.
    Json(serde_json::Value),
    /// JSON lines: any number of values, each ended by a line feed.
    Lines(String),
}

impl Admin {
    /// A role that is always alive and ready, with `registry` and no further pages.
    #[must_use]
    pub fn new(title: impl Into<String>, registry: Registry) -> Self {
        Self {
            title: title.into(),
            registry,
            live: Box::new(|| true),
            ready: Box::new(|| Ok(())),
            pages: Vec::new(),
            searches: Vec::new(),
        }
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin")
            .field("title", &self.title)
            .finish_non_exhaustive()
    }
}

/// The admin pages cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Someone else listens there.
    #[error(
        "the admin address {0} is taken: stop what listens there, or give another address by --admin"
    )]
    Taken(SocketAddr),
    /// The system refused the address.
    #[error("cannot listen on the admin address {address}: {source}; give another one by --admin")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
}

/// Listens on `address` and serves the pages in the background until the runtime ends.
///
/// Returns the address bound, which differs from `address` when its port is 0. The caller decides
/// whether it is loopback; every role's default is.
///
/// # Errors
///
/// When `address` cannot be bound.
pub async fn serve(address: SocketAddr, admin: Admin) -> Result<SocketAddr, ServeError> {
    let bind = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::AddrInUse => ServeError::Taken(address),
        _ => ServeError::Bind { address, source },
    };
    let listener = TcpListener::bind(address).await.map_err(bind)?;
    let bound = listener.local_addr().map_err(bind)?;
    tokio::spawn(accept(listener, Arc::new(admin)));
    Ok(bound)
}

async fn accept(listener: TcpListener, admin: Arc<Admin>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Beyond the bound a connection is closed at once.
                if let Ok(place) = Arc::clone(&room).try_acquire_owned() {
                    let admin = Arc::clone(&admin);
                    tokio::spawn(async move {
                        let _ = tokio::time::timeout(CONNECTION_TIME, talk(stream, admin)).await;
                        drop(place);
                    });
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the admin port cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn talk(stream: TcpStream, admin: Arc<Admin>) {
    let service = service_fn(move |request| {
        let answer = answer(&admin, &request);
        async move { Ok::<_, Infallible>(answer) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::trace!(%error, "an admin connection ended early");
    }
}

fn answer(admin: &Admin, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let uri = request.uri();
    page(
        admin,
        request.method(),
        uri.path(),
        uri.query().unwrap_or(""),
    )
}

fn page(admin: &Admin, method: &Method, path: &str, query: &str) -> Response<Full<Bytes>> {
    if method != Method::GET && method != Method::HEAD {
        let mut refused = json(
            StatusCode::METHOD_NOT_ALLOWED,
            &serde_json::json!({"error": "the admin pages are read only: use GET"}),
        );
        refused
            .headers_mut()
            .insert(ALLOW, "GET, HEAD".parse().expect("a plain header value"));
        return refused;
    }
    match path {
        "/" => text(StatusCode::OK, TEXT, index(admin)),
        "/livez" if (admin.live)() => json(StatusCode::OK, &serde_json::json!({"live": true})),
        "/livez" => json(
            StatusCode::SERVICE_UNAVAILABLE,
            &serde_json::json!({"live": false}),
        ),
        "/readyz" => match (admin.ready)() {
            Ok(()) => json(
                StatusCode::OK,
                &serde_json::json!({"ready": true, "reasons": []}),
            ),
            Err(reasons) => json(
                StatusCode::SERVICE_UNAVAILABLE,
                &serde_json::json!({"ready": false, "reasons": reasons}),
            ),
        },
        "/metrics" => metrics(&admin.registry),
        _ => match admin.pages.iter().find(|page| page.path == path) {
            Some(page) => content((page.render)()),
            None => match admin.searches.iter().find(|search| search.path == path) {
                Some(search) => searched((search.find)(query)),
                None => json(
                    StatusCode::NOT_FOUND,
                    &serde_json::json!({"error": "no such page: GET / lists the pages"}),
                ),
            },
        },
    }
}

fn content(content: Content) -> Response<Full<Bytes>> {
    match content {
        Content::Json(value) => json(StatusCode::OK, &value),
        Content::Lines(lines) => text(StatusCode::OK, JSON_LINES, lines),
    }
}

fn searched(found: Result<Content, NotFound>) -> Response<Full<Bytes>> {
    let (status, problem) = match found {
        Ok(found) => return content(found),
        Err(NotFound::Question(problem)) => (StatusCode::BAD_REQUEST, problem),
        Err(NotFound::Nothing(problem)) => (StatusCode::NOT_FOUND, problem),
    };
    json(status, &serde_json::json!({"error": problem}))
}

fn index(admin: &Admin) -> String {
    let mut text = format!(
        "forebay {}\n\n/livez    whether the process works\n/readyz   whether it should get traffic\n/metrics  OpenMetrics\n",
        admin.title
    );
    let pages = admin.pages.iter().map(|page| (page.path, page.about));
    let searches = admin.searches.iter();
    for (path, about) in pages.chain(searches.map(|search| (search.path, search.about))) {
        text.push_str(&format!("{path}  {about}\n"));
    }
    text
}

fn metrics(registry: &Registry) -> Response<Full<Bytes>> {
    let mut body = String::new();
    match prometheus_client::encoding::text::encode(&mut body, registry) {
        Ok(()) => text(StatusCode::OK, OPEN_METRICS, body),
        Err(fmt::Error) => json(
            StatusCode::INTERNAL_SERVER_ERROR,
            &serde_json::json!({"error": "a metric could not be written"}),
        ),
    }
}

fn json(status: StatusCode, value: &serde_json::Value) -> Response<Full<Bytes>> {
    text(status, "application/json", format!("{value}\n"))
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    Response::builder()
        .status(status)
        .header(CONTENT_TYPE, kind)
        .header(CACHE_CONTROL, "no-store")
        .body(Full::new(Bytes::from(body)))
        .expect("the status and headers are constants")
}

const TEXT: &str = "text/plain; charset=utf-8";
const JSON_LINES: &str = "application/jsonl";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Scrapers and probes are few; more is a mistake or an attack.
const MAX_CONNECTIONS: usize = 64;
const MAX_HEAD_BYTES: usize = 16 * 1024;
const HEADER_TIME: Duration = Duration::from_secs(5);
/// Longer than a scraper's interval, so that a kept connection lives.
const CONNECTION_TIME: Duration = Duration::from_secs(300);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    fn admin() -> Admin {
        let mut admin = Admin::new("balancer b1", Registry::default());
        admin.pages.push(Page {
            path: "/debug/three",
            about: "three",
            render: Box::new(|| Content::Json(serde_json::json!(3))),
        });
        admin.pages.push(Page {
            path: "/debug/lines",
            about: "two lines",
            render: Box::new(|| Content::Lines("1\n2\n".to_owned())),
        });
        admin.searches.push(Search {
            path: "/debug/find",
            about: "what is asked for",
            find: Box::new(|query| match query {
                "a=1" => Ok(Content::Lines("found\n".to_owned())),
                "a=2" => Err(NotFound::Nothing("there is no 2".to_owned())),
                _ => Err(NotFound::Question("ask for a".to_owned())),
            }),
        });
        admin
    }

    async fn check(admin: &Admin, method: Method, path: &str, status: u16, has: &str) {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let answer = page(admin, &method, path, query);
        assert_eq!(answer.status().as_u16(), status, "{path}");
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8(body.to_vec()).unwrap();
        assert!(body.contains(has), "{path}: {body}");
    }

    #[tokio::test]
    async fn every_page_answers_and_the_rest_is_json_404() {
        let admin = admin();
        check(&admin, Method::GET, "/", 200, "/debug/three  three").await;
        check(&admin, Method::GET, "/livez", 200, "true").await;
        check(&admin, Method::GET, "/readyz", 200, "true").await;
        check(&admin, Method::GET, "/metrics", 200, "# EOF").await;
        check(&admin, Method::GET, "/debug/three", 200, "3").await;
        check(&admin, Method::GET, "/debug/lines", 200, "1\n2\n").await;
        check(&admin, Method::GET, "/", 200, "/debug/find  what").await;
        check(&admin, Method::GET, "/debug/find?a=1", 200, "found\n").await;
        check(&admin, Method::GET, "/debug/find?a=2", 404, "no 2").await;
        check(&admin, Method::GET, "/debug/find", 400, "ask for a").await;
        check(&admin, Method::GET, "/nope", 404, "GET /").await;
        check(&admin, Method::POST, "/livez", 405, "use GET").await;
    }

    #[tokio::test]
    async fn a_role_that_is_not_ready_says_why() {
        let mut admin = admin();
        admin.ready = Box::new(|| Err(vec!["no facts yet".to_owned()]));
        admin.live = Box::new(|| false);
        check(&admin, Method::GET, "/readyz", 503, "no facts yet").await;
        check(&admin, Method::GET, "/livez", 503, "false").await;
    }

    #[tokio::test]
    async fn a_taken_address_says_what_to_do() {
        let bound = serve("127.0.0.1:0".parse().unwrap(), admin())
            .await
            .unwrap();
        let error = serve(bound, admin()).await.unwrap_err();
        assert!(error.to_string().contains("--admin"), "{error}");
    }
}
