//! What operators see and change.

use crate::harness::{FAST_ENGINE, Fleet, get, send};

#[test]
fn the_documents_have_the_shape_that_was_promised() {
    let fleet = Fleet::start(&[&["--control", "3"], &FAST_ENGINE[..]].concat());
    fleet.wait_for_control(3);
    let members = fleet.json(&["members"]);
    assert_eq!(members["schema_version"], 1);
    assert_eq!(members["members"].as_array().unwrap().len(), 3);
    for member in members["members"].as_array().unwrap() {
        for key in [
            "name",
            "id",
            "leader",
            "term",
            "applied",
            "address",
            "reachable",
        ] {
            assert!(!member[key].is_null(), "{key} in {member}");
        }
    }
    let workers = fleet.json(&["workers"]);
    assert_eq!(workers["schema_version"], 1);
    for worker in workers["workers"].as_array().unwrap() {
        for key in [
            "name",
            "id",
            "incarnation",
            "pool",
            "desired",
            "observed",
            "address",
            "models",
        ] {
            assert!(!worker[key].is_null(), "{key} in {worker}");
        }
    }
    let status = fleet.json(&["status"]);
    assert_eq!(status["schema_version"], 1);
    for verb in ["members", "workers", "status"] {
        let table = fleet.run(&[verb]);
        assert!(table.status.success());
        assert!(String::from_utf8_lossy(&table.stdout).contains("c1") || verb == "workers");
    }
    for process in fleet.processes() {
        if let Some(admin) = process.addresses.get("admin") {
            for page in ["/livez", "/readyz", "/metrics"] {
                let (status, text) = get(&format!("http://{admin}{page}"));
                assert_eq!(status, 200, "{} {page}: {text}", process.name);
            }
        }
    }
}

#[test]
fn the_configuration_is_shown_changed_and_guarded() {
    let fleet = Fleet::start(&FAST_ENGINE);
    let shown = fleet.run(&["config", "show"]);
    let toml = String::from_utf8(shown.stdout).unwrap();
    let file = fleet.dir.path().join("config.toml");
    let file = file.to_str().unwrap();
    let apply = |text: &str, more: &[&str]| {
        std::fs::write(file, text).unwrap();
        let output = fleet.run(&[&["config", "apply", file], more].concat());
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap(),
            String::from_utf8(said).unwrap(),
        )
    };
    let (code, said) = apply(&toml.replace("queue_limit = 1024", "queue_limit = 77"), &[]);
    assert_eq!(code, 0, "{said}");
    let shown = fleet.json(&["config", "show"]);
    assert!(shown.to_string().contains("77"), "{shown}");
    let (code, said) = apply(&toml, &["--expected-revision", "1"]);
    assert_eq!(code, 8, "a conflict: {said}");
    let (code, said) = apply("[[pools]]\nname = \"other\"\n", &[]);
    assert_eq!(code, 4, "the pool has workers: {said}");
    let (code, said) = apply("[[pools]]\nname = \"default\"\nqueue_timeout_ms = 0\n", &[]);
    assert_ne!(code, 0);
    assert!(said.contains("pools[0].queue_timeout_ms"), "{said}");
    let (code, _) = apply("not toml [", &[]);
    assert_ne!(code, 0);
}

#[test]
fn bad_requests_get_typed_errors_and_the_next_good_one_works() {
    let fleet = Fleet::start(&FAST_ENGINE);
    let host = fleet.url.strip_prefix("http://").unwrap();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer any\r\nconnection: close\r\n";
    let sized = |body: &str| format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    let cases = [
        (sized("{"), 400, "invalid_json"),
        (sized("[1]"), 400, "invalid_json"),
        (sized("{}"), 400, "model_required"),
        (sized(r#"{"model":"a","model":"b"}"#), 400, "duplicate_key"),
        (
            sized(r#"{"model":"a","\u006dodel":"b"}"#),
            400,
            "duplicate_key",
        ),
        (
            sized(r#"{"model":"nobody-serves-this"}"#),
            404,
            "model_not_found",
        ),
        (
            sized(&format!("{}1", "[".repeat(100_000))),
            400,
            "invalid_json",
        ),
        (
            format!("{head}content-length: 99999999999\r\n\r\n"),
            413,
            "request_too_large",
        ),
        (
            "GET /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".into(),
            405,
            "method_not_allowed",
        ),
        (
            "GET /nothing/here HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".into(),
            404,
            "not_found",
        ),
    ];
    for (request, expected, code) in &cases {
        let (status, answer) = send(host, request.as_bytes());
        assert_eq!(status, *expected, "{answer}");
        assert!(answer.contains(&format!("\"code\":\"{code}\"")), "{answer}");
    }
    let (status, _) = send(host, b"\x16\x03\x01\x02\x00garbage\r\n\r\n");
    assert!(status == 400 || status == 0);
    // Garbage on the QUIC ports, too.
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for process in fleet.processes() {
        if let Some(quic) = process.addresses.get("quic") {
            for first in [0x00_u8, 0x40, 0x80, 0xc0, 0xff] {
                socket.send_to(&[first; 1_200], quic).unwrap();
            }
        }
    }
    let replay = crate::harness::forebay()
        .args([
            "replay", "--target", &fleet.url, "--limit", "10", "--speed", "20", "--verify",
        ])
        .output()
        .unwrap();
    assert!(
        replay.status.success(),
        "{}",
        String::from_utf8_lossy(&replay.stderr)
    );
}
