//! The client port's contract: TLS, limits of keys, what a body may ask.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of a test fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use forebay_balancer::TlsPaths;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Writes a new certificate of its own authority; returns it.
fn certificate(paths: &TlsPaths) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(&paths.key, made.signing_key.serialize_pem()).unwrap();
    std::fs::write(&paths.cert, made.cert.pem()).unwrap();
    made.cert.der().clone()
}

async fn greeted(
    world: &World,
    trusted: &CertificateDer<'static>,
    alpn: &[&[u8]],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let stream = TcpStream::connect(world.bound.listen).await?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
}

async fn health(stream: &mut TlsStream<TcpStream>) -> String {
    let ask = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stream.write_all(ask).await.unwrap();
    let mut answer = String::new();
    // Some clients see the end of a connection without a close_notify.
    let _ = stream.read_to_string(&mut answer).await;
    answer
}

#[tokio::test]
async fn clients_may_speak_tls_and_its_certificate_is_read_again_when_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let paths = TlsPaths {
        cert: dir.path().join("cert.pem"),
        key: dir.path().join("key.pem"),
    };
    let first = certificate(&paths);
    let mut setup = Setup::default();
    setup.settings.tls = Some(paths.clone());
    let world = World::new(setup).await;

    let mut standing = greeted(&world, &first, &[b"http/1.1"]).await.unwrap();
    let h2 = greeted(&world, &first, &[b"h2", b"http/1.1"])
        .await
        .unwrap();
    assert_eq!(h2.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let mut plain = world.client().await;
    plain
        .try_send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        .await;
    let said = plain.next_bytes().await;
    assert!(!said.starts_with(b"HTTP"), "no HTTP where TLS is spoken");

    // A bad pair changes nothing.
    std::fs::write(&paths.cert, "nonsense").unwrap();
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert!(greeted(&world, &first, &[]).await.is_ok());
    let second = certificate(&paths);
    let began = Instant::now();
    while greeted(&world, &second, &[]).await.is_err() {
        assert!(
            began.elapsed() < PATIENCE,
            "the new certificate is not in use"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(greeted(&world, &first, &[]).await.is_err());
    let answer = health(&mut standing).await;
    assert!(
        answer.starts_with("HTTP/1.1 200"),
        "what stood goes on: {answer}"
    );
}

#[test]
fn a_pair_that_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let paths = TlsPaths {
        cert: dir.path().join("cert.pem"),
        key: dir.path().join("key.pem"),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let start = |paths: &TlsPaths| {
        let mut setup = Setup::default();
        setup.settings.tls = Some(paths.clone());
        runtime.block_on(World::refused(setup))
    };
    assert!(start(&paths).contains("cert.pem"));
    certificate(&paths);
    let other = TlsPaths {
        cert: dir.path().join("other.pem"),
        key: dir.path().join("other-key.pem"),
    };
    certificate(&other);
    let mixed = TlsPaths {
        cert: paths.cert,
        key: other.key,
    };
    assert!(start(&mixed).contains("cannot be used together"));
}

fn keys(dir: &Path, more: &str) -> std::path::PathBuf {
    let path = dir.join("keys.toml");
    let hash: String = Sha256::digest(b"k")
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let text = format!("[[keys]]\nsha256 = \"{hash}\"\ntenant = \"t\"\n{more}");
    std::fs::write(&path, text).unwrap();
    path
}

async fn with_keys(more: &str) -> (World, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut setup = Setup::default();
    setup.settings.any_key_tenant = None;
    setup.settings.keys = Some(keys(dir.path(), more));
    (World::new(setup).await, dir)
}

async fn ask(world: &World, more: &str) -> Answer {
    let mut client = world.client().await;
    let body = format!("{{\"model\":\"m\",\"messages\":[]{more}}}");
    client
        .post("/v1/chat/completions", "authorization: Bearer k\r\n", &body)
        .await;
    client.answer().await
}

#[tokio::test]
async fn a_key_may_ask_so_often_in_a_minute_and_learns_what_is_left() {
    let (world, _dir) = with_keys("requests_per_minute = 2\n").await;
    let first = ask(&world, "").await;
    assert_eq!(first.status, 200);
    assert!(
        first.head.has("x-ratelimit-limit-requests: 2"),
        "{}",
        first.head.text
    );
    assert!(first.head.has("x-ratelimit-remaining-requests: 1"));
    assert!(first.head.has("x-ratelimit-reset-requests: "));
    assert_eq!(ask(&world, "").await.status, 200);
    let third = ask(&world, "").await;
    assert_eq!(third.code(), (429, "rate_limit_exceeded".into()));
    // Half a minute after the first, however long the three took.
    let after = third.head.text.split("retry-after: ").nth(1);
    let after: u32 = after.unwrap().lines().next().unwrap().parse().unwrap();
    assert!((20..=30).contains(&after), "{}", third.head.text);
    assert!(third.head.has("x-ratelimit-remaining-requests: 0"));
}

#[tokio::test]
async fn a_key_may_have_so_many_requests_under_way() {
    let (mut world, _dir) = with_keys("max_parallel = 1\n").await;
    world.agents[0].will(&[Act::Hang]);
    let mut hanging = world.client().await;
    let body = "{\"model\":\"m\",\"messages\":[]}";
    hanging
        .post("/v1/chat/completions", "authorization: Bearer k\r\n", body)
        .await;
    world.agents[0].is_placed().await;
    assert_eq!(
        ask(&world, "").await.code(),
        (429, "rate_limit_exceeded".into())
    );
    drop(hanging);
    world.settles().await;
    assert_eq!(ask(&world, "").await.status, 200);
}

#[tokio::test]
async fn a_key_may_be_for_some_models_only() {
    let (world, _dir) = with_keys("models = [\"other\"]\n").await;
    assert_eq!(
        ask(&world, "").await.code(),
        (403, "model_not_allowed".into())
    );
    let mut client = world.client().await;
    client
        .send("GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\n\r\n")
        .await;
    assert!(client.answer().await.body.contains("\"data\":[]"));
}

#[tokio::test]
async fn only_a_key_for_looking_is_told_where_its_request_would_go_and_nothing_is_sent() {
    let what_if = async |world: &World| {
        let mut client = world.client().await;
        let headers = "authorization: Bearer k\r\nx-forebay-what-if: 1\r\n";
        let body = "{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"xyzzy\"}]}";
        client.post("/v1/chat/completions", headers, body).await;
        client.answer().await
    };
    let (world, _dir) = with_keys("").await;
    assert_eq!(
        what_if(&world).await.code(),
        (403, "debug_key_required".into())
    );
    let (world, _dir) = with_keys("debug = true\n").await;
    let answer = what_if(&world).await;
    assert_eq!(answer.status, 200);
    for part in [
        "\"schema_version\":1",
        "\"chosen\":{",
        "\"workers\":{\"1\":\"w1\"}",
    ] {
        assert!(answer.body.contains(part), "{part}: {}", answer.body);
    }
    assert!(!answer.body.contains("xyzzy"));
    world.settles().await;
    assert!(world.agents[0].placed.lock().is_empty());
}

#[tokio::test]
async fn a_key_with_a_zone_is_served_there_and_nowhere_else_whatever_fails() {
    let dir = tempfile::tempdir().unwrap();
    let mut setup = Setup {
        agents: 3,
        zones: ["a", "b", "b"].map(String::from).to_vec(),
        ..Setup::default()
    };
    setup.settings.any_key_tenant = None;
    setup.settings.keys = Some(keys(dir.path(), "zone = \"a\"\n"));
    let mut world = World::new(setup).await;
    for _ in 0..10 {
        assert_eq!(ask(&world, "").await.status, 200);
    }
    let placed = |agent: usize| world.agents[agent].placed.lock().clone();
    assert_eq!(
        (placed(0).len(), placed(1).len(), placed(2).len()),
        (10, 0, 0)
    );
    assert!(placed(0).iter().all(|place| place.zone == "a"));
    world.agents[0].closes();
    let began = Instant::now();
    while ask(&world, "").await.code() != (503, "no_capacity".into()) {
        assert!(began.elapsed() < PATIENCE);
    }
    assert!(world.agents[1].placed.lock().is_empty());
}

#[tokio::test]
async fn an_answer_that_fits_no_context_is_refused_before_a_worker_is_asked() {
    let world = World::with(1).await;
    let mut fleet = (*world.fleet.borrow().clone().unwrap()).clone();
    fleet.workers[0].spec.max_context_tokens = 1_000;
    world.fleet.send_replace(Some(Arc::new(fleet)));
    let began = Instant::now();
    loop {
        let answer = ask(&world, ",\"max_tokens\":1000").await;
        if answer.status == 400 {
            assert_eq!(answer.code().1, "context_length_exceeded");
            assert!(
                answer.body.contains("\"param\":\"messages\""),
                "{}",
                answer.body
            );
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{}", answer.body);
    }
    assert_eq!(ask(&world, ",\"max_tokens\":999").await.status, 200);
}

#[tokio::test]
async fn the_keys_file_is_read_again_when_it_changes() {
    let (world, dir) = with_keys("models = [\"other\"]\n").await;
    assert_eq!(ask(&world, "").await.status, 403);
    // What is no keys file changes nothing; a key that is gone may ask nothing.
    std::fs::write(dir.path().join("keys.toml"), "nonsense").unwrap();
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(ask(&world, "").await.status, 403);
    keys(dir.path(), "");
    becomes(&world, 200).await;
    let other = "0".repeat(64);
    let text = format!("[[keys]]\nsha256 = \"{other}\"\ntenant = \"t\"\n");
    std::fs::write(dir.path().join("keys.toml"), text).unwrap();
    becomes(&world, 401).await;
}

async fn becomes(world: &World, status: u16) {
    let began = Instant::now();
    while ask(world, "").await.status != status {
        assert!(began.elapsed() < PATIENCE, "it does not become {status}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn no_header_makes_a_client_somebody_else() {
    let (world, _dir) = with_keys("").await;
    let mut client = world.client().await;
    let forged = "authorization: Bearer k\r\n\
        x-request-id: bad id\r\n\
        x-forebay-tenant: other\r\n\
        x-forebay-worker: w9\r\n\
        x-forebay-attempts: 7\r\n\
        x-tenant: other\r\n\
        x-user: other\r\n\
        x-forwarded-for: 9.9.9.9\r\n\
        x-priority: 0\r\n\
        x-gateway-inference-objective: high\r\n\
        openai-organization: other\r\n";
    let body = "{\"model\":\"m\",\"messages\":[]}";
    client.post("/v1/chat/completions", forged, body).await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 200);
    assert!(
        answer.head.has("x-request-id: req-"),
        "{}",
        answer.head.text
    );
    for hidden in ["x-forebay-worker", "x-forebay-attempts"] {
        assert!(!answer.head.has(hidden), "{}", answer.head.text);
    }
    let placed = world.agents[0].placed.lock().clone();
    let [place] = &placed[..] else {
        panic!("{} placements", placed.len());
    };
    assert_eq!(place.tenant, "t");
    assert_eq!(place.attempt, 0);
    assert!(place.request_id.starts_with("req-"));
    // All that a worker is told: nothing of the headers is in any field of it.
    let told = format!("{place:?}");
    for forged in ["other", "w9", "9.9.9.9", "high", "bad id"] {
        assert!(!told.contains(forged), "{forged} in {told}");
    }

    // Two keys: whoever stands in front might have checked the other one.
    let mut client = world.client().await;
    let two = "authorization: Bearer k\r\nauthorization: Bearer k\r\n";
    client.post("/v1/chat/completions", two, body).await;
    assert_eq!(
        client.answer().await.code(),
        (401, "invalid_api_key".into())
    );
}

#[tokio::test]
async fn a_client_that_asks_whether_to_go_on_is_told_so() {
    let world = World::with(1).await;
    let body = "{\"model\":\"m\",\"messages\":[]}";
    let head = |length: u64| {
        format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n"
        )
    };
    let mut client = world.client().await;
    client.send(&head(body.len() as u64)).await;
    assert_eq!(client.head().await.status, 100);
    client.send(body).await;
    assert_eq!(client.answer().await.body, WHOLE);
    // A body that is not wanted is refused before it is sent.
    let mut client = world.client().await;
    client.send(&head(33 << 20)).await;
    assert_eq!(
        client.answer().await.code(),
        (413, "request_too_large".into())
    );
}

#[tokio::test]
async fn there_is_no_cors_and_head_is_get_without_its_body() {
    let world = World::with(1).await;
    let mut client = world.client().await;
    client
        .send("OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: x\r\norigin: http://evil.example\r\naccess-control-request-method: POST\r\n\r\n")
        .await;
    let answer = client.answer().await;
    assert_eq!(answer.code(), (405, "method_not_allowed".into()));
    assert!(answer.head.has("allow: POST\r\n"), "{}", answer.head.text);
    assert!(!answer.head.has("access-control-"), "{}", answer.head.text);
    let mut client = world.client().await;
    client
        .send("HEAD /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await;
    let head = client.head().await;
    assert_eq!(head.status, 200);
    assert!(head.has("content-length: ") && client.is_closed().await);
}

#[tokio::test]
async fn what_is_no_tls_or_never_gets_through_a_handshake_is_closed_on() {
    let dir = tempfile::tempdir().unwrap();
    let paths = TlsPaths {
        cert: dir.path().join("cert.pem"),
        key: dir.path().join("key.pem"),
    };
    let trusted = certificate(&paths);
    let mut setup = Setup::default();
    setup.settings.tls = Some(paths);
    setup.settings.limits.first_bytes = Duration::from_millis(1_000);
    let world = World::new(setup).await;
    let hello = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".as_slice(),
        &[0; 40],
    ]
    .concat();
    let inputs: [&[u8]; 8] = [
        b"",
        b"\x16",
        b"\x16\x03\x01",
        &hello,
        b"\x16\x03\x01\xff\xff",
        b"\x80\x2e\x01\x00\x02",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0xff; 70_000],
    ];
    let address = world.bound.listen;
    let closed_on = inputs.map(<[u8]>::to_vec).map(|input| {
        tokio::spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let _ = stream.write_all(&input).await;
            let mut said = Vec::new();
            let ends = stream.read_to_end(&mut said);
            let ended = tokio::time::timeout(PATIENCE, ends).await;
            let shown = &input[..input.len().min(16)];
            assert!(ended.is_ok(), "{shown:?} is kept");
            assert!(!said.starts_with(b"HTTP"), "{shown:?}");
        })
    });
    for closed in closed_on {
        closed.await.unwrap();
    }
    // Through the handshake, then silent.
    let mut silent = greeted(&world, &trusted, &[]).await.unwrap();
    let mut byte = [0; 1];
    let ends = silent.read(&mut byte);
    assert!(tokio::time::timeout(PATIENCE, ends).await.is_ok());
    let mut good = greeted(&world, &trusted, &[]).await.unwrap();
    assert!(health(&mut good).await.starts_with("HTTP/1.1 200"));
}
