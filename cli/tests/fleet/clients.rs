//! What clients and newcomers do.

use std::process::Command;

use crate::harness::{FAST_ENGINE, Fleet, forebay};

#[test]
fn the_openai_package_is_served_and_cancels_leave_nothing_behind() {
    let Some(python) = std::env::var_os("FOREBAY_PYTHON") else {
        eprintln!(
            "skipped: FOREBAY_PYTHON names no Python with the openai package; .ci/run sets it"
        );
        return;
    };
    let fleet = Fleet::start(&FAST_ENGINE);
    let engines = fleet
        .of_role("engine")
        .into_iter()
        .map(|engine| format!("http://{}", engine.addresses["http"]));
    let output = Command::new(python)
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/openai_client.py"
        ))
        .arg(format!("{}/v1", fleet.url))
        .arg(fleet.admin("b1"))
        .args(engines)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    eprintln!("{}", String::from_utf8_lossy(&output.stdout).trim());
}

#[test]
fn the_printed_curl_example_works_as_printed() {
    let fleet = Fleet::start(&FAST_ENGINE);
    let log = fleet.dev_log();
    let start = log.find("curl ").expect("dev prints a curl example");
    let mut command = String::new();
    for line in log[start..].lines() {
        command.push_str(line.trim_end_matches('\\'));
        if !line.ends_with('\\') {
            break;
        }
    }
    let output = Command::new("sh").args(["-c", &command]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("finish_reason"), "{command}\n{text}");
}

#[test]
fn the_shipped_trace_replays_without_an_error() {
    let fleet = Fleet::start(&["--workers", "2", "--balancers", "2", "--engine-speed", "10"]);
    let mut command = forebay();
    command.args([
        "replay", "--limit", "100", "--speed", "10", "--verify", "--output", "json",
    ]);
    for balancer in fleet.of_role("balancer") {
        command.args([
            "--target",
            &format!("http://{}", balancer.addresses["http"]),
        ]);
    }
    let output = command.output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(
        (&report["requests"], &report["errors"]),
        (&100.into(), &0.into()),
        "{report}"
    );
    assert!(report["ttft_ms"]["p50"].as_f64() > Some(0.0), "{report}");
    let workers = report["workers"].as_object().unwrap();
    assert_eq!(workers.len(), 2, "{report}");
    assert!(
        workers
            .values()
            .all(|requests| requests.as_u64() > Some(25)),
        "{report}"
    );
}
