//! The emulated engine through real sockets.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, unreachable_pub)] // a test of the rims: sockets and clocks

mod common;

use common::{Engine, engine};
use forebay_sim::engine::text::{Prompt, verify};
use forebay_sim::engine::{self, Config, EngineError};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::Instant;

#[tokio::test]
async fn a_chat_is_answered_in_one_piece() {
    let engine = engine(|_| {}).await;
    let (status, answer) = chat(&engine, &hello(json!({"max_tokens": 9}))).await;
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
        config.profile.floor_ms = 100.0;
        config.profile.base_ms = 500.0;
    })
    .await;
    let start = Instant::now();
    chat(&engine, &hello(json!({"max_tokens": 6}))).await;
    let took = start.elapsed();
    assert!(
        (100..900).contains(&took.as_millis()),
        "50 ms, 5 times 10 ms and scheduling, not {took:?}"
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
async fn a_client_that_leaves_aborts_its_request_within_100_ms() {
    let mut took = Vec::new();
    // A machine that is busy with something else for a moment says nothing of the engine.
    while took.len() < 3 {
        let slowest = slowest_abort().await;
        if slowest < Duration::from_millis(100) {
            return;
        }
        took.push(slowest);
    }
    panic!("{took:?}");
}

/// Of clients that leave, streaming or not, running or waiting.
async fn slowest_abort() -> Duration {
    let engine = engine(|config| {
        config.slots = 2;
        config.speed = 1.0;
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

    let mut slowest = Duration::ZERO;
    for (left, gone) in [waiting_stream, whole, waiting_whole, streaming]
        .into_iter()
        .enumerate()
    {
        drop(gone);
        let took = engine.until_open(3.0 - left as f64, Duration::from_secs(5));
        slowest = slowest.max(took.await);
    }
    assert_eq!(engine.metric("num_requests_running").await, 0.0);
    slowest
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
    let (status, error) = chat(&engine, &hello(json!({}))).await;
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

async fn chat(engine: &Engine, body: &Value) -> (u16, Value) {
    let (status, _, body) = engine
        .ask("POST", "/v1/chat/completions", "", &body.to_string())
        .await;
    (status, serde_json::from_str(&body).unwrap())
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
