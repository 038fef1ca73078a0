//! The audit of a real cell: shown, followed, kept in a file, and a file that was touched.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Stdio;

use crate::harness::{FAST_ENGINE, Fleet, forebay};

/// Exit code, stdout and stderr.
fn ran(fleet: &Fleet, args: &[&str]) -> (i32, String, String) {
    let output = fleet.run(args);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// Makes this many entries, one of them refused.
fn change(fleet: &Fleet, file: &Path, times: usize) {
    let shown = fleet.run(&["config", "show"]);
    let document = String::from_utf8(shown.stdout).unwrap();
    let name = file.to_str().unwrap();
    for n in 0..times {
        let limit = format!(
            "queue_limit = {}",
            100 + n + usize::from(document.contains("= 100\n"))
        );
        let text = document.replace("queue_limit = 1024", &limit);
        std::fs::write(file, text).unwrap();
        let reason = format!("change {n}");
        let apply = ["config", "apply", name, "--reason", &reason];
        assert_eq!(ran(fleet, &apply).0, 0);
    }
    let old = [
        "config",
        "apply",
        name,
        "--reason",
        "too late",
        "--expected-revision",
        "1",
    ];
    assert_eq!(ran(fleet, &old).0, 8);
}

#[test]
fn who_changed_what_is_shown_followed_kept_and_checked() {
    let fleet = Fleet::start(&FAST_ENGINE);
    let document = fleet.dir.path().join("pools.toml");
    let mut following = forebay()
        .args(["audit", "tail", "-n", "1", "--follow", "--output", "jsonl"])
        .env("FOREBAY_CONTEXT", fleet.data().join("context.toml"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(following.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    change(&fleet, &document, 5);

    // Shown: who, from where, what, why, and what came of it.
    let shown = fleet.json(&["audit", "tail", "-n", "6"]);
    assert_eq!(
        (&shown["schema_version"], &shown["begins"]),
        (&1.into(), &1.into())
    );
    let entries = shown["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 6);
    let last = &entries[5];
    assert_eq!(last["actor"], "operator/admin/admin");
    assert!(last["address"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert_eq!(last["action"], "apply-config");
    assert_eq!(last["reason"], "too late");
    assert_eq!(last["result"], "revision-conflict");
    assert_eq!(entries[4]["reason"], "change 4");
    assert_eq!(entries[4]["result"], "done");
    assert_eq!(shown["head"], last["hash"]);
    let (code, table, _) = ran(&fleet, &["audit", "tail"]);
    assert!(code == 0 && table.starts_with("ENTRY  TIME"), "{table}");
    assert!(
        table.contains("operator/admin/admin") && table.contains("too late"),
        "{table}"
    );
    let follow_json = ["audit", "tail", "--follow", "--output", "json"];
    let (code, _, said) = ran(&fleet, &follow_json);
    assert!(code == 2 && said.contains("jsonl"), "{said}");

    // Followed: the same lines, in order.
    let mut seen = vec![first];
    while !seen.last().unwrap().contains("too late") {
        seen.push(lines.next().unwrap().unwrap());
    }
    following.kill().unwrap();
    following.wait().unwrap();
    let numbers: Vec<u64> = seen
        .iter()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["number"]
                .as_u64()
                .unwrap()
        })
        .collect();
    assert!(
        numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]),
        "{numbers:?}"
    );

    // Kept: a second export adds what came since.
    let file = fleet.dir.path().join("audit.jsonl");
    let name = file.to_str().unwrap();
    let exported = fleet.json(&["audit", "export", name]);
    let kept = exported["last"].as_u64().unwrap();
    assert_eq!(exported["added"].as_u64(), Some(kept));
    change(&fleet, &document, 1);
    let checked = fleet.json(&["audit", "verify", name]);
    assert_eq!(checked["cluster"]["shared"].as_u64(), Some(kept));
    assert_eq!(checked["cluster"]["newer"], 2);
    let (code, _, said) = ran(&fleet, &["audit", "verify", name, "--complete"]);
    assert!(
        code == 1 && said.contains(&format!("record {}", kept + 1)),
        "{said}"
    );
    assert_eq!(fleet.json(&["audit", "export", name])["added"], 2);
    let (code, text, _) = ran(&fleet, &["audit", "verify", name, "--complete"]);
    assert!(code == 0 && text.contains("0 came later"), "{text}");
    let (code, text, _) = ran(&fleet, &["audit", "verify"]);
    assert!(
        code == 0 && text.contains(&format!("entries 1 to {}", kept + 2)),
        "{text}"
    );

    // Checked: whatever is done to the file, the record is named, also by those who ask nobody.
    let whole = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    let touched = |lines: &[&str], says: &str| {
        std::fs::write(&file, lines.join("\n") + "\n").unwrap();
        let (code, text, said) = ran(&fleet, &["audit", "verify", name, "--offline"]);
        assert!(
            code == 1 && text.is_empty() && said.contains(says),
            "{says}: {said}"
        );
    };
    let changed = lines[2].replace("\"at_ms\":1", "\"at_ms\":2");
    assert_ne!(changed, lines[2]);
    touched(
        &[&lines[..2], &[&*changed], &lines[3..]].concat(),
        "record 3 (line 3) was changed",
    );
    touched(&[&lines[..2], &lines[3..]].concat(), "record 3 is missing");
    touched(&[&lines[..2], &[lines[0]], &lines[2..]].concat(), "line 3");
    touched(&lines[..3], "the file was cut off: record 4");
    // Nor is such a file added to.
    let (code, _, said) = ran(&fleet, &["audit", "export", name]);
    assert!(code == 1 && said.contains("cut off"), "{said}");
    let (code, _, said) = ran(&fleet, &["audit", "verify", "/nonexistent.jsonl"]);
    assert!(code == 5 && said.contains("/nonexistent.jsonl"), "{said}");

    // Who may not read it is told so.
    let certs = fleet.data().join("certs");
    let (cert, key) = (certs.join("w1.pem"), certs.join("w1-key.pem"));
    let as_agent = [
        "--cert",
        cert.to_str().unwrap(),
        "--key",
        key.to_str().unwrap(),
    ];
    let (code, _, said) = ran(&fleet, &[&["audit", "tail"], &as_agent[..]].concat());
    assert!(code == 6 && said.contains("agent"), "{said}");
}
