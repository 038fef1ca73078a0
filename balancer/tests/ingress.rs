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
    assert!(third.head.has("retry-after: 30") || third.head.has("retry-after: 29"));
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
