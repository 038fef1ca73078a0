//! The emulated engine and the replay, through real sockets.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // a test of the rims: sockets and clocks

use forebay_sim::engine::text::{Prompt, verify};
use forebay_sim::engine::{self, Config, EngineError};
use forebay_sim::replay::{self, ReplayError};
use forebay_sim::trace::{Options, Trace};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// An engine on a free port that stops with the test.
struct Engine {
    address: SocketAddr,
    task: JoinHandle<Result<(), EngineError>>,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn engine(change: impl FnOnce(&mut Config)) -> Engine {
    let mut config = Config {
        models: vec!["m".to_owned()],
        speed: 100.0,
        ..Config::default()
    };
    change(&mut config);
    let (sender, ready) = oneshot::channel();
    let serve = engine::serve(
        config,
        |address| sender.send(address).unwrap(),
        std::future::pending(),
    );
    let task = tokio::spawn(serve);
    Engine {
        address: ready.await.unwrap(),
        task,
    }
}

impl Engine {
    /// Sends a request and returns the open connection.
    async fn open(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body.as_bytes()).await.unwrap();
        stream
    }

    /// Sends a request and returns the status, the head and the body (its chunks joined).
    async fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> (u16, String, String) {
        let mut stream = self.open(method, path, headers, body).await;
        let mut answer = String::new();
        timeout(Duration::from_secs(20), stream.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head
            .to_ascii_lowercase()
            .contains("transfer-encoding: chunked");
        let body = if chunked {
            dechunked(body)
        } else {
            body.to_owned()
        };
        (status, head.to_owned(), body)
    }

    async fn chat(&self, body: &Value) -> (u16, Value) {
        let (status, _, body) = self
            .ask("POST", "/v1/chat/completions", "", &body.to_string())
            .await;
        (status, serde_json::from_str(&body).unwrap())
    }

    /// `vllm:NAME` on the metrics page.
    async fn metric(&self, name: &str) -> f64 {
        let (_, _, page) = self.ask("GET", "/metrics", "", "").await;
        let line = page
            .lines()
            .find(|line| line.starts_with(&format!("vllm:{name}{{")))
            .unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    async fn open_requests(&self) -> f64 {
        self.metric("num_requests_running").await + self.metric("num_requests_waiting").await
    }

    async fn until_open(&self, count: f64, within: Duration) {
        let start = Instant::now();
        while self.open_requests().await != count {
            assert!(
                start.elapsed() < within,
                "not {count} open requests within {within:?}"
            );
        }
    }
}

fn dechunked(mut body: &str) -> String {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return whole;
        }
        whole.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
}

/// A chat with some more fields.
#[allow(clippy::needless_pass_by_value)] // reads better at its many callers
fn hello(more: Value) -> Value {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]});
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

fn hello_prompt() -> Prompt {
    Prompt::chat([("user", "hello")])
}

#[tokio::test]
async fn a_chat_is_answered_in_one_piece() {
    let engine = engine(|_| {}).await;
    let (status, answer) = engine.chat(&hello(json!({"max_tokens": 9}))).await;
    assert_eq!(status, 200);
    assert_eq!(answer["object"], "chat.completion");
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(
        verify(
            &hello_prompt(),
            choice["message"]["content"].as_str().unwrap()
        ),
        Ok(9)
    );
    let usage = json!({"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(answer["usage"], usage);
    assert_eq!(engine.metric("generation_tokens_total").await, 9.0);
}

#[tokio::test]
async fn a_stream_has_a_role_tokens_usage_and_an_end() {
    let engine = engine(|_| {}).await;
    let body =
        hello(json!({"stream": true, "max_tokens": 5, "stream_options": {"include_usage": true}}));
    let id = "x-request-id: r-7.a\r\n";
    let (status, head, body) = engine
        .ask("POST", "/v1/chat/completions", id, &body.to_string())
        .await;
    assert_eq!(status, 200);
    assert!(
        head.contains("text/event-stream") && head.contains("x-request-id: r-7.a"),
        "{head}"
    );
    let events: Vec<&str> = body
        .split("\n\n")
        .map(|e| e.strip_prefix("data: ").unwrap_or(e))
        .collect();
    assert_eq!(events[events.len() - 2..], ["[DONE]", ""]);
    let chunks: Vec<Value> = events[..events.len() - 2]
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    assert_eq!(chunks.len(), 1 + 5 + 1);
    assert!(chunks.iter().all(|chunk| chunk["id"] == "chatcmpl-r-7.a"));
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let said: String = chunks[1..6]
        .iter()
        .map(|c| c["choices"][0]["delta"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(verify(&hello_prompt(), &said), Ok(5));
    assert!(chunks[4]["choices"][0]["finish_reason"].is_null());
    assert_eq!(chunks[5]["choices"][0]["finish_reason"], "length");
    assert_eq!(chunks[6]["usage"]["completion_tokens"], 5);
}

#[tokio::test]
async fn a_completion_streams_text() {
    let engine = engine(|_| {}).await;
    let body = json!({"prompt": "once", "stream": true}).to_string();
    let (_, _, body) = engine.ask("POST", "/v1/completions", "", &body).await;
    let said: String = body
        .split("\n\n")
        .filter_map(|event| serde_json::from_str::<Value>(event.strip_prefix("data: ")?).ok())
        .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(verify(&Prompt::completion("once"), &said), Ok(16));
}

#[tokio::test]
async fn tokens_come_at_their_pace() {
    let engine = engine(|config| {
        config.speed = 10.0;
        config.ttft_ms = 500.0;
        config.tpot_ms = 100.0;
    })
    .await;
    let start = Instant::now();
    engine.chat(&hello(json!({"max_tokens": 6}))).await;
    let took = start.elapsed();
    assert!(
        (100..200).contains(&took.as_millis()),
        "50 ms and 5 times 10 ms, not {took:?}"
    );
}

#[tokio::test]
async fn errors_are_typed() {
    let engine = engine(|config| config.max_context_tokens = 50).await;
    let chat = "/v1/chat/completions";
    for (method, path, body, status) in [
        ("POST", chat, "{not json".to_owned(), 400),
        (
            "POST",
            chat,
            hello(json!({"model": "other"})).to_string(),
            404,
        ),
        (
            "POST",
            chat,
            hello(json!({"max_tokens": 49})).to_string(),
            400,
        ),
        (
            "POST",
            chat,
            hello(json!({"max_tokens": "many"})).to_string(),
            400,
        ),
        ("POST", "/v1/completions", "{}".to_owned(), 400),
        ("GET", chat, String::new(), 405),
        ("GET", "/nope", String::new(), 404),
    ] {
        let (got, _, answer) = engine.ask(method, path, "", &body).await;
        let error = &serde_json::from_str::<Value>(&answer).unwrap()["error"];
        assert_eq!(
            (got, &error["code"]),
            (status, &json!(status)),
            "{method} {path} {answer}"
        );
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|message| !message.is_empty())
        );
        assert!(!answer.contains("hello"), "an error repeats no prompt");
    }
    let mut stream = TcpStream::connect(engine.address).await.unwrap();
    let head = format!("POST {chat} HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut start = [0; 12];
    stream.read_exact(&mut start).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 413");
}

#[tokio::test]
async fn models_and_health_are_told() {
    let engine = engine(|config| config.models.push("n".to_owned())).await;
    let (status, _, body) = engine.ask("GET", "/health", "", "").await;
    assert_eq!((status, &*body), (200, ""));
    let (_, _, body) = engine.ask("GET", "/v1/models", "", "").await;
    let list: Value = serde_json::from_str(&body).unwrap();
    assert_eq!([&list["data"][0]["id"], &list["data"][1]["id"]], ["m", "n"]);
}

#[tokio::test]
async fn a_client_that_leaves_aborts_its_request() {
    let engine = engine(|config| {
        config.slots = 2;
        config.speed = 1.0;
        config.ttft_ms = 0.0;
    })
    .await;
    let long = |stream: bool| hello(json!({"stream": stream, "max_tokens": 100_000})).to_string();
    let chat = "/v1/chat/completions";
    let mut streaming = engine.open("POST", chat, "", &long(true)).await;
    let whole = engine.open("POST", chat, "", &long(false)).await;
    engine.until_open(2.0, Duration::from_secs(5)).await;
    let waiting_whole = engine.open("POST", chat, "", &long(false)).await;
    let waiting_stream = engine.open("POST", chat, "", &long(true)).await;
    engine.until_open(4.0, Duration::from_secs(5)).await;
    let mut some = vec![0; 2000];
    streaming.read_exact(&mut some).await.unwrap();

    for (left, gone) in [waiting_stream, whole, waiting_whole, streaming]
        .into_iter()
        .enumerate()
    {
        drop(gone);
        engine
            .until_open(3.0 - left as f64, Duration::from_millis(100))
            .await;
    }
    assert_eq!(engine.metric("num_requests_running").await, 0.0);
}

#[tokio::test]
async fn beyond_the_queue_requests_are_refused() {
    let engine = engine(|config| (config.slots, config.queue, config.speed) = (1, 1, 1.0)).await;
    let long = hello(json!({"max_tokens": 100_000})).to_string();
    let first = engine.open("POST", "/v1/chat/completions", "", &long).await;
    engine.until_open(1.0, Duration::from_secs(5)).await;
    let second = engine
        .open(
            "POST",
            "/v1/chat/completions",
            "",
            &hello(json!({})).to_string(),
        )
        .await;
    engine.until_open(2.0, Duration::from_secs(5)).await;
    let (status, error) = engine.chat(&hello(json!({}))).await;
    assert_eq!(
        (status, &error["error"]["type"]),
        (503, &json!("Service Unavailable"))
    );
    drop(first);
    let mut answer = String::new();
    let mut second = second;
    second.read_to_string(&mut answer).await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200"),
        "who waited runs: {answer}"
    );
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let engine = engine(|_| {}).await;
    let config = Config {
        listen: engine.address,
        ..Config::default()
    };
    let error = engine::serve(config, |_| panic!("ready"), std::future::pending())
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::Listen { address, .. } if address == engine.address));
    assert!(
        error
            .to_string()
            .contains("give the engine another address")
    );
}

#[tokio::test]
async fn a_shutdown_ends_the_engine() {
    let (address_sender, address) = oneshot::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let ready = |address| address_sender.send(address).unwrap();
    let task = tokio::spawn(engine::serve(Config::default(), ready, async {
        let _ = stopped.await;
    }));
    let address: SocketAddr = address.await.unwrap();
    stop.send(()).unwrap();
    task.await.unwrap().unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}

fn replay_of(trace: Trace, engine: &Engine) -> replay::Config {
    replay::Config {
        speed: 200.0,
        ..replay::Config::new(trace, format!("http://{}", engine.address))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_of_the_sample_has_no_errors() {
    let engine = engine(|config| config.speed = 200.0).await;
    let trace = Trace::sample(Some(50)).unwrap();
    let output: u64 = trace
        .requests
        .iter()
        .map(|request| u64::from(request.output_tokens))
        .sum();
    let input: u64 = trace
        .requests
        .iter()
        .map(|request| u64::from(request.input_tokens))
        .sum();
    let config = replay::Config {
        verify: true,
        ..replay_of(trace, &engine)
    };
    let mut last = None;
    let report = replay::run(config, |progress| last = Some(progress))
        .await
        .unwrap();
    assert_eq!(
        (report.requests, report.errors),
        (50, 0),
        "{:?}",
        report.errors_by
    );
    assert_eq!((report.input_tokens, report.output_tokens), (input, output));
    assert_eq!(report.cached_token_ratio, Some(0.0));
    assert!(report.ttft_ms.p50.unwrap() > 0.0 && report.tpot_ms.p50.unwrap() > 0.0);
    assert!(report.e2e_ms.p50.unwrap() > report.ttft_ms.p50.unwrap());
    let last = last.unwrap();
    assert_eq!(
        (last.total, last.done, last.in_flight, last.errors),
        (50, 50, 0, 0)
    );
    assert_eq!(
        engine.metric("generation_tokens_total").await,
        output as f64
    );
    assert_eq!(engine.open_requests().await, 0.0);
}

fn small_trace(requests: usize, output: u32) -> Trace {
    let line = format!(r#"{{"timestamp":0,"input_length":40,"output_length":{output}}}"#);
    Trace::from_bytes(
        vec![line; requests].join("\n").as_bytes(),
        Options::default(),
    )
    .unwrap()
}

#[tokio::test]
async fn errors_are_counted_by_status_and_code() {
    let engine = engine(|config| (config.slots, config.queue, config.speed) = (1, 1, 1.0)).await;
    let errors = |config: replay::Config| async {
        let report = replay::run(config, |_| {}).await.unwrap();
        let errors = report
            .errors_by
            .into_iter()
            .map(|e| (e.status, e.code, e.count));
        (report.requests, errors.collect::<Vec<_>>())
    };
    let config = replay_of(small_trace(5, 2), &engine);
    let busy = (Some(503), "Service Unavailable".to_owned(), 3);
    assert_eq!(errors(config.clone()).await, (5, vec![busy]));

    let other = replay::Config {
        model: Some("other".to_owned()),
        ..config.clone()
    };
    assert_eq!(
        errors(other).await,
        (5, vec![(Some(404), "NotFoundError".to_owned(), 5)])
    );

    let bounded = replay::Config {
        max_in_flight: 1,
        ..config.clone()
    };
    assert_eq!(
        errors(bounded).await,
        (5, vec![(None, "in_flight_limit".to_owned(), 4)])
    );

    let hurried = replay::Config {
        timeout: Duration::from_millis(30),
        trace: small_trace(1, 10_000),
        ..config.clone()
    };
    assert_eq!(
        errors(hurried).await,
        (1, vec![(Some(200), "timeout".to_owned(), 1)])
    );
    engine.until_open(0.0, Duration::from_millis(200)).await;

    let (target, model) = ("http://127.0.0.1:1".to_owned(), Some("m".to_owned()));
    let nobody = replay::Config {
        targets: vec![target],
        model,
        ..config.clone()
    };
    assert_eq!(
        errors(nobody.clone()).await,
        (5, vec![(None, "connect".to_owned(), 5)])
    );
    let nobody = replay::Config {
        model: None,
        ..nobody
    };
    let error = replay::run(nobody, |_| {}).await.unwrap_err();
    assert!(matches!(error, ReplayError::Model { .. }), "{error}");
}

/// Answers every request with the same bytes.
async fn liar(answer: String) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 65_536];
            let _ = stream.read(&mut request).await;
            stream.write_all(answer.as_bytes()).await.unwrap();
            let _ = stream.shutdown().await;
        }
    });
    target
}

#[tokio::test]
async fn a_stream_that_lies_is_an_error_and_names_its_worker() {
    let head = "HTTP/1.1 200 OK\r\nx-forebay-worker: w7\r\ncontent-type: text/event-stream\r\n";
    let token = r#"data: {"choices":[{"delta":{"content":"a"},"finish_reason":"length"}]}"#;
    let error = r#"data: {"error":{"message":"m","type":"api_error","code":"upstream_error"}}"#;
    for (body, code) in [
        (format!("{token}\n\n"), "no_done"),
        ("data: [DONE]\n\n".to_owned(), "no_finish_reason"),
        (format!("{error}\n\n"), "upstream_error"),
        (format!(": ping\n\n{token}\n\ndata: [DONE]\n\n"), "no_usage"),
    ] {
        let target = liar(format!("{head}connection: close\r\n\r\n{body}")).await;
        let config = replay::Config::new(small_trace(1, 1), target);
        let config = replay::Config {
            model: Some("m".to_owned()),
            ..config
        };
        let report = replay::run(config, |_| {}).await.unwrap();
        assert_eq!(report.errors_by[0].code, code);
        assert_eq!(report.workers["w7"], 1);
    }
    let cut = liar(format!("{head}content-length: 999\r\n\r\n{token}\n\n")).await;
    let config = replay::Config::new(small_trace(1, 1), cut);
    let config = replay::Config {
        model: Some("m".to_owned()),
        ..config
    };
    let report = replay::run(config, |_| {}).await.unwrap();
    assert_eq!(report.errors_by[0].code, "transport");
}

#[tokio::test]
async fn a_replay_that_makes_no_sense_does_not_start() {
    let config = replay::Config::new(small_trace(1, 1), "http://127.0.0.1:1".to_owned());
    let check = |change: fn(&mut replay::Config)| {
        let mut config = replay::Config {
            model: Some("m".to_owned()),
            ..config.clone()
        };
        change(&mut config);
        async { replay::run(config, |_| {}).await.unwrap_err().to_string() }
    };
    assert!(check(|c| c.targets.clear()).await.starts_with("no target"));
    assert!(
        check(|c| c.targets[0] = "x".to_owned())
            .await
            .contains("http://HOST:PORT")
    );
    assert!(check(|c| c.speed = 0.0).await.starts_with("the speed is 0"));
    assert!(
        check(|c| c.limit = Some(0))
            .await
            .starts_with("there are no requests")
    );
    assert!(
        check(|c| c.max_in_flight = 0)
            .await
            .starts_with("max_in_flight")
    );
    let key = |c: &mut replay::Config| c.api_key = Some(replay::ApiKey("a\nb".to_owned()));
    assert!(check(key).await.starts_with("the API key"));
}
