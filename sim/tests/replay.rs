//! The replay through real sockets, against the emulated engine and against servers that lie.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, unreachable_pub)] // a test of the rims: sockets and clocks

mod common;

use common::{Engine, engine};
use forebay_sim::replay::{self, ReplayError};
use forebay_sim::trace::{Options, Trace};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

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
    assert!(
        report.cached_token_ratio > Some(0.0),
        "its first block is everybody's"
    );
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
    // Long enough that all have come before the first is over.
    let config = replay_of(small_trace(5, 40), &engine);
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
        timeout: Duration::from_secs(1),
        trace: small_trace(1, 10_000),
        ..config.clone()
    };
    assert_eq!(
        errors(hurried).await,
        (1, vec![(Some(200), "timeout".to_owned(), 1)])
    );
    engine.until_open(0.0, Duration::from_secs(5)).await;

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
