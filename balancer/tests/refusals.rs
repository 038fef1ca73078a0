//! What is refused before any worker is asked, and how the process starts and stops.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::time::Duration;

use common::{Act, Client, Setup, World, credentials, loopback};
use forebay_balancer::{BalancerError, Config, run};
use forebay_link::Authority;
use forebay_proto::Role;

async fn check(world: &World, request: &str, status: u16, code: &str) {
    let mut client = world.client().await;
    client.send(request).await;
    let answer = client.answer().await;
    assert_eq!(answer.code(), (status, code.to_owned()), "{request}");
    assert!(answer.head.has("content-type: application/json"));
}

fn post(body: &str) -> String {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn bad_requests_get_their_row_of_the_table() {
    let world = World::with(1).await;
    check(&world, &post("{"), 400, "invalid_json").await;
    check(&world, &post("{}"), 400, "model_required").await;
    let twice = r#"{"model":"m","model":"m"}"#;
    check(&world, &post(twice), 400, "duplicate_key").await;
    check(&world, &post(r#"{"model":"n"}"#), 404, "model_not_found").await;
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    check(&world, &get("/v1/nothing"), 404, "not_found").await;
    check(&world, &get("/v1/models/n"), 404, "model_not_found").await;
    check(
        &world,
        &get("/v1/chat/completions"),
        405,
        "method_not_allowed",
    )
    .await;
    let delete = "DELETE /v1/models HTTP/1.1\r\nhost: x\r\n\r\n";
    check(&world, delete, 405, "method_not_allowed").await;
    world.settles().await;
}

#[tokio::test]
async fn models_and_health_are_told() {
    let world = World::with(1).await;
    for (path, has) in [
        ("/v1/models", "\"object\":\"list\""),
        ("/v1/models", "\"id\":\"m\""),
        ("/v1/models/m", "\"id\":\"m\""),
        ("/v1/models/%6d", "\"id\":\"m\""),
        ("/health", "ok"),
    ] {
        let mut client = world.client().await;
        client
            .send(&format!(
                "GET {path} HTTP/1.1\r\nhost: x\r\nx-request-id: my.id\r\n\r\n"
            ))
            .await;
        let answer = client.answer().await;
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.body.contains(has), "{path}: {}", answer.body);
        assert!(answer.head.has("x-request-id: my.id\r\n"));
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_not_read_on() {
    let mut setup = Setup::default();
    setup.settings.max_body_bytes = 1_000;
    let world = World::new(setup).await;
    // Announced: refused from the head alone, although nothing was sent.
    let announced = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1001\r\n\r\n";
    let mut client = world.client().await;
    client.send(announced).await;
    let answer = client.answer().await;
    assert_eq!(answer.code(), (413, "request_too_large".into()));
    assert!(answer.head.has("connection: close"));
    // Not announced: refused when it grows over the limit, and the answer can be read although the
    // client goes on sending.
    let mut client = world.client().await;
    client
        .send("POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        .await;
    let chunk = format!("400\r\n{}\r\n", "x".repeat(0x400));
    for _ in 0..200 {
        if !client.try_send(&chunk).await {
            break;
        }
    }
    let answer = client.answer().await;
    assert_eq!(answer.code(), (413, "request_too_large".into()));
    assert!(client.is_closed().await);
    world.settles().await;
}

#[tokio::test]
async fn a_body_that_stops_coming_is_refused_and_holds_no_memory() {
    let mut setup = Setup::default();
    setup.settings.limits.body_pause = Duration::from_millis(300);
    let world = World::new(setup).await;
    let mut client = world.client().await;
    client
        .send("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"model\":")
        .await;
    let answer = client.answer().await;
    assert_eq!(answer.code(), (408, "request_timeout".into()));
    assert!(client.is_closed().await);
    world.settles().await;
}

#[tokio::test]
async fn bodies_share_a_bounded_memory() {
    let world = World::with(1).await;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        32 << 20
    );
    let mut held = Vec::new();
    for _ in 0..16 {
        let mut client = world.client().await;
        client.send(&head).await;
        held.push(client);
    }
    world
        .until("/metrics", |_, text| {
            text.contains("forebay_balancer_body_bytes 536870912\n")
        })
        .await;
    check(&world, &head, 429, "overloaded").await;
    drop(held);
    world.settles().await;
}

#[tokio::test]
async fn only_known_keys_may_ask() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys.toml");
    // The SHA-256 of "secret".
    let hash = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";
    std::fs::write(
        &file,
        format!("[[keys]]\nsha256 = \"{hash}\"\ntenant = \"acme\"\n"),
    )
    .unwrap();
    let mut setup = Setup::default();
    setup.settings.any_key_tenant = None;
    setup.settings.keys = Some(file);
    let world = World::new(setup).await;
    check(&world, &post("{"), 401, "invalid_api_key").await;
    let mut client = world.client().await;
    let body = r#"{"model":"m"}"#;
    let key = "authorization: Bearer secret\r\n";
    client.post("/v1/chat/completions", key, body).await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 200);
    assert!(
        !answer.head.has("x-forebay-worker"),
        "only debug keys see it"
    );
}

#[tokio::test]
async fn without_a_reachable_worker_there_is_no_capacity() {
    let mut world = World::with(1).await;
    world.agents[0].closes();
    world
        .until("/debug/workers", |_, text| {
            text.contains("\"connected\":null")
        })
        .await;
    let answer = world.chat(false).await;
    assert_eq!(answer.code(), (503, "no_capacity".into()));
    assert!(answer.head.has("retry-after: 2\r\n"));
    world
        .until("/readyz", |status, text| {
            status == 503 && text.contains("no worker is connected")
        })
        .await;
    world.settles().await;
}

#[tokio::test]
async fn a_stop_finishes_what_is_under_way_and_takes_nothing_new() {
    let mut world = World::with(1).await;
    world.agents[0].will(&[Act::Slow(Duration::from_millis(1_500))]);
    let mut client = world.client().await;
    client.chat(false).await;
    world.agents[0].is_placed().await;
    world.stop.take().unwrap().send(()).unwrap();
    world
        .until("/readyz", |status, text| {
            status == 503 && text.contains("stop")
        })
        .await;
    assert!(
        tokio::net::TcpStream::connect(world.bound.listen)
            .await
            .is_err()
    );
    let answer = client.answer().await;
    assert_eq!(answer.status, 200);
    assert!(answer.head.has("connection: close"), "{}", answer.head.text);
    let stopped = tokio::time::timeout(Duration::from_secs(3), world.task.take().unwrap());
    stopped.await.unwrap().unwrap();
}

#[tokio::test]
async fn who_asks_while_a_stop_waits_is_sent_elsewhere() {
    let mut world = World::with(1).await;
    world.agents[0].will(&[Act::Slow(Duration::from_millis(1_500))]);
    let mut client = world.client().await;
    client.chat(false).await;
    world.agents[0].is_placed().await;
    // Asking already, as far as the balancer can see.
    let mut late = world.client().await;
    late.send("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
        .await;
    world
        .until("/metrics", |_, text| {
            text.contains("forebay_balancer_connections 2\n")
        })
        .await;
    world.stop.take().unwrap().send(()).unwrap();
    world
        .until("/readyz", |status, text| {
            status == 503 && text.contains("stop")
        })
        .await;
    late.send("content-length: 13\r\n\r\n{\"model\":\"m\"}")
        .await;
    let answer = late.answer().await;
    assert_eq!(answer.code(), (503, "draining".into()));
    for header in ["retry-after: 1\r\n", "connection: close\r\n"] {
        assert!(answer.head.has(header), "{}", answer.head.text);
    }
    assert!(late.is_closed().await);
    assert_eq!(client.answer().await.status, 200);
}

#[tokio::test]
async fn a_stop_waits_no_longer_than_it_may() {
    let mut setup = Setup::default();
    setup.settings.drain_timeout_ms = 200;
    let mut world = World::new(setup).await;
    world.agents[0].will(&[Act::Hang]);
    let mut client = world.client().await;
    client.chat(true).await;
    world.agents[0].is_placed().await;
    world.stop.take().unwrap().send(()).unwrap();
    let stopped = tokio::time::timeout(Duration::from_secs(3), world.task.take().unwrap());
    stopped.await.unwrap().unwrap();
}

fn config(dir: &std::path::Path, role: Role) -> Config {
    let authority = Authority::create("test", 1).unwrap();
    Config {
        listen: loopback(),
        admin: None,
        control: vec!["127.0.0.1:1".into()],
        data_dir: dir.join("data"),
        credentials: credentials(dir, &authority, role, "x1"),
        keys: None,
        any_key_tenant: Some("dev".into()),
        tls: None,
        max_body_bytes: 32 << 20,
        hold_headers_ms: 15_000,
        drain_timeout_ms: 1_000,
        receipts: 0,
    }
}

#[tokio::test]
async fn a_bad_start_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(dir.path(), Role::Balancer);
    let never = std::future::pending::<()>;

    let taken = std::net::TcpListener::bind(loopback()).unwrap();
    let mut other = good.clone();
    other.listen = taken.local_addr().unwrap();
    let error = run(other, never()).await.unwrap_err();
    assert!(matches!(error, BalancerError::Taken(_)), "{error}");
    assert!(error.to_string().contains("--listen"));

    let mut other = good.clone();
    other.keys = Some(dir.path().join("none.toml"));
    let error = run(other, never()).await.unwrap_err();
    assert!(matches!(error, BalancerError::Keys(_)), "{error}");

    let mut other = good;
    other.any_key_tenant = None;
    let error = run(other, never()).await.unwrap_err();
    assert!(matches!(error, BalancerError::NoKeys), "{error}");

    let wrong = tempfile::tempdir().unwrap();
    let error = run(config(wrong.path(), Role::Agent), never())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("agent/x1"), "{error}");
}

#[tokio::test]
async fn without_facts_it_runs_is_not_ready_and_stops_when_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), Role::Balancer);
    let probe = std::net::TcpListener::bind(loopback()).unwrap();
    config.admin = Some(probe.local_addr().unwrap());
    drop(probe);
    let admin = config.admin.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(run(config, async {
        let _ = stopped.await;
    }));
    while tokio::net::TcpStream::connect(admin).await.is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut client = Client::to(admin).await;
    client.send("GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let head = client.head().await;
    assert_eq!(head.status, 503);
    assert!(client.body(&head).await.unwrap().contains("no facts yet"));
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
}
