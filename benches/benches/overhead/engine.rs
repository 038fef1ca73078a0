//! An engine that computes nothing: it answers as vLLM does, with words that are always the same.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

pub(crate) const MODEL: &str = "null";
const METRICS: &str = "process_start_time_seconds 1.7e9\n";

type Body = BoxBody<Bytes, Infallible>;

pub(crate) async fn serve(address: SocketAddr, chunks: u32, pace_ms: u64) {
    let listener = TcpListener::bind(address).await.unwrap();
    // All that run get their tokens at the end of the same iteration.
    let (ticker, iteration) = watch::channel(());
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(pace_ms.max(1)));
        loop {
            ticks.tick().await;
            ticker.send_replace(());
        }
    });
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        socket.set_nodelay(true).unwrap();
        let iteration = iteration.clone();
        tokio::spawn(async move {
            let answer = service_fn(move |request| answer(request, chunks, iteration.clone()));
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(socket), answer)
                .await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    chunks: u32,
    iteration: watch::Receiver<()>,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    match path.as_str() {
        "/health" => Ok(whole("text/plain", String::new())),
        "/metrics" => Ok(whole("text/plain", METRICS.into())),
        "/v1/models" => Ok(whole(
            "application/json",
            format!(r#"{{"object":"list","data":[{{"id":"{MODEL}","object":"model"}}]}}"#),
        )),
        _ => {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            // Members that are added stand at the ends.
            let ends = [
                &body[..body.len().min(512)],
                &body[body.len().saturating_sub(512)..],
            ];
            let says = |word: &str| {
                let has = |end: &&[u8]| end.windows(word.len()).any(|at| at == word.as_bytes());
                ends.iter().any(has)
            };
            if says(r#""stream":true"#) {
                Ok(stream(body.len(), says("include_usage"), chunks, iteration))
            } else {
                Ok(whole("application/json", document(body.len(), chunks)))
            }
        }
    }
}

fn usage(prompt: usize, chunks: u32) -> String {
    format!(
        r#"{{"prompt_tokens":{},"completion_tokens":{chunks},"total_tokens":{},"prompt_tokens_details":{{"cached_tokens":0}}}}"#,
        prompt / 4,
        prompt / 4 + chunks as usize,
    )
}

fn document(prompt: usize, chunks: u32) -> String {
    format!(
        r#"{{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"{MODEL}","choices":[{{"index":0,"message":{{"role":"assistant","content":"{}"}},"finish_reason":"stop"}}],"usage":{}}}"#,
        " word".repeat(chunks as usize),
        usage(prompt, chunks),
    )
}

fn event(choices: &str, rest: &str) -> Bytes {
    let head = r#""id":"chatcmpl-1","object":"chat.completion.chunk","created":1"#;
    format!("data: {{{head},\"model\":\"{MODEL}\",\"choices\":[{choices}]{rest}}}\n\n").into()
}

fn stream(
    prompt: usize,
    with_usage: bool,
    chunks: u32,
    mut iteration: watch::Receiver<()>,
) -> Response<Body> {
    let (sender, receiver) = mpsc::channel::<Bytes>(4);
    tokio::spawn(async move {
        let word = event(
            r#"{"index":0,"delta":{"content":" word"},"finish_reason":null}"#,
            "",
        );
        for _ in 0..chunks {
            iteration.mark_unchanged();
            if iteration.changed().await.is_err() || sender.send(word.clone()).await.is_err() {
                return;
            }
        }
        let end = event(r#"{"index":0,"delta":{},"finish_reason":"stop"}"#, "");
        let _ = sender.send(end).await;
        if with_usage {
            let usage = format!(r#","usage":{}"#, usage(prompt, chunks));
            let _ = sender.send(event("", &usage)).await;
        }
        let _ = sender.send(Bytes::from_static(b"data: [DONE]\n\n")).await;
    });
    Response::builder()
        .header("content-type", "text/event-stream")
        .body(BodyExt::boxed(Events(receiver)))
        .unwrap()
}

/// A body of what comes through a channel.
struct Events(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let next = self.0.poll_recv(context);
        next.map(|event| event.map(|event| Ok(Frame::data(event))))
    }
}

fn whole(kind: &str, text: String) -> Response<Body> {
    Response::builder()
        .header("content-type", kind)
        .body(BodyExt::boxed(Full::new(Bytes::from(text))))
        .unwrap()
}
