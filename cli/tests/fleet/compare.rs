//! `forebay compare`, with its hit ratio recomputed by somebody who knows none of its code.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::{alone, forebay, within};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// Compares policies on the beginning of a sample and checks what is said of each, its hit ratio by
/// an exact LRU over the trace's own blocks.
fn compared(endpoint: &str, policies: &str, trace: &str, block_size: &str) -> Value {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut command = forebay();
    command.args([
        "compare",
        trace,
        "--policies",
        policies,
        "--limit",
        "60",
        "--jitter",
    ]);
    command.args(["--workers", "3", "--balancers", "2", "--speed", "10"]);
    command.args(["--endpoint", endpoint, "--output", "json"]);
    command.arg("--per-request").arg(dir.path());
    let done = command.output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    let result: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(result["schema_version"], 1);
    for policy in policies.split(',') {
        let of = &result["policies"][policy];
        assert_eq!(
            (&of["requests"], &of["errors"]),
            (&60.into(), &0.into()),
            "{of}"
        );
        assert!(
            of["ttft_ms"]["p99"].as_f64() >= of["ttft_ms"]["p50"].as_f64(),
            "{of}"
        );
        assert!(
            of["tpot_ms"]["p50"].as_f64() > Some(20.0),
            "in the trace's time: {of}"
        );
        assert!(of["send_lag_ms"]["p99"].is_f64(), "{of}");
        assert!(of["workers"].as_object().unwrap().len() > 1, "{of}");
        let lines = dir.path().join(format!("{policy}.jsonl"));
        let checked = Command::new("python3")
            .arg(root().join("docs/evidence/recompute_hits.py"))
            .arg(root().join(format!("sim/data/{trace}-sample.jsonl.gz")))
            .arg(lines)
            .args(["--block-size", block_size])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&checked.stdout);
        assert!(checked.status.success(), "{policy}: {said}");
    }
    result
}

#[test]
fn policies_are_compared_on_fleets_of_their_own_and_the_hit_ratio_holds() {
    // Conversations come back within seconds here; in the default sample, hardly one does so soon.
    let result = compared("chat", "forebay,round-robin", "lmcache-agents", "16");
    let ratio = |policy: &str| result["policies"][policy]["cached_token_ratio"].as_f64();
    let [warm, cold] = ["forebay", "round-robin"].map(|policy| ratio(policy).unwrap());
    assert!(warm > cold + 0.1, "{result}");
}

#[test]
fn completions_are_compared_alike() {
    compared("completions", "forebay", "mooncake-conversation", "512");
}

#[test]
fn a_comparison_that_is_stopped_leaves_nothing_behind() {
    let _alone = alone();
    let temporary = tempfile::tempdir().unwrap();
    let mut comparing = forebay()
        .args(["compare", "--workers", "2", "--policies", "random"])
        .env("TMPDIR", temporary.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pids = within(Duration::from_secs(30), "a fleet runs", || {
        let dir = std::fs::read_dir(temporary.path()).unwrap().next()?;
        let run = std::fs::read_to_string(dir.unwrap().path().join("fleet/run.json")).ok()?;
        let run: Value = serde_json::from_str(&run).ok()?;
        let pids = run["processes"].as_array()?.iter();
        let pids: Vec<u64> = pids.filter_map(|process| process["pid"].as_u64()).collect();
        (pids.len() >= 3).then_some(pids)
    });
    kill_process(Pid::from_child(&comparing), Signal::INT).unwrap();
    assert_eq!(comparing.wait().unwrap().code(), Some(1));
    assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 0);
    for pid in pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid}");
    }
}
