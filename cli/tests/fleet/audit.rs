//! The audit of a real cell: shown, followed, kept in a file, and a file that was touched.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use forebay_control_client::ControlClient;
use forebay_link::{CredentialPaths, Credentials, Endpoint};
use forebay_proto::ClientId;
use forebay_proto::wire::fleet::RemoveWorker;
use forebay_proto::wire::fleet::command::Action;

use crate::harness::{FAST_ENGINE, Fleet, forebay};

const PATIENCE: Duration = Duration::from_secs(20);

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

/// Has so many commands refused, each of which is an entry.
fn refused(fleet: &Fleet, times: usize) {
    let data = fleet.data();
    let context = std::fs::read_to_string(data.join("context.toml")).unwrap();
    let context: toml::Table = toml::from_str(&context).unwrap();
    let path = |name: &str| data.join(context[name].as_str().unwrap());
    let paths = CredentialPaths {
        ca: path("ca"),
        cert: path("cert"),
        key: path("key"),
    };
    let control = context["control"].as_array().unwrap().iter();
    let control = control
        .map(|one| one.as_str().unwrap().to_owned())
        .collect();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let endpoint = Endpoint::client(&Credentials::load(&paths).unwrap()).unwrap();
        let client = ControlClient::new(endpoint, control, ClientId(rand::random()), 7);
        for _ in 0..times {
            let action = Action::Remove(RemoveWorker {
                name: "nobody".into(),
                override_guard: false,
            });
            let refused = client.propose(action, "", PATIENCE).await;
            assert!(refused.is_err(), "{refused:?}");
        }
    });
}

#[test]
fn what_the_cluster_keeps_no_more_is_in_its_nodes_files() {
    let fleet = Fleet::start(&[&FAST_ENGINE[..], &["--control", "3"]].concat());
    let file = fleet.dir.path().join("audit.jsonl");
    let name = file.to_str().unwrap();
    let early = fleet.json(&["audit", "export", name])["last"]
        .as_u64()
        .unwrap();
    refused(&fleet, 700);
    // A node that was away, and one that lost its files: the third has what they miss.
    fleet.kill("c1");
    refused(&fleet, 700);
    fleet.start_again(&["c1"]);
    fleet.kill("c2");
    std::fs::remove_dir_all(fleet.data().join("c2/audit")).unwrap();
    fleet.start_again(&["c2"]);
    fleet.wait_for_control(3);

    let shown = fleet.json(&["audit", "tail", "-n", "1300"]);
    assert_eq!(shown["begins"], 1);
    let entries = shown["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 1_300);
    let number = |entry: &serde_json::Value| entry["number"].as_u64().unwrap();
    let follows = |pair: &[serde_json::Value]| number(&pair[0]) + 1 == number(&pair[1]);
    assert!(entries.windows(2).all(follows));
    let (code, text, said) = ran(&fleet, &["audit", "verify"]);
    assert!(code == 0 && text.contains("entries 1 to"), "{text}{said}");
    // The file's end is long gone from the state, and yet seen to lead into it.
    let checked = fleet.json(&["audit", "verify", name]);
    assert_eq!(checked["cluster"]["linked"], true);
    let exported = fleet.json(&["audit", "export", name]);
    let last = exported["last"].as_u64().unwrap();
    assert!(last >= early + 1_400, "{exported}");
    assert_eq!(exported["added"].as_u64(), Some(last - early));
    let (code, text, said) = ran(&fleet, &["audit", "verify", name, "--offline"]);
    assert!(
        code == 0 && text.contains(&format!("entries 1 to {last}")),
        "{text}{said}"
    );

    // A record that somebody changed in the only file that has it is named.
    let kept = std::fs::read_dir(fleet.data().join("c3/audit")).unwrap();
    let kept = kept.map(|one| one.unwrap().path()).min().unwrap();
    let whole = std::fs::read_to_string(&kept).unwrap();
    let line = whole.lines().nth(4).unwrap();
    let other = line.replace("\"at_ms\":1", "\"at_ms\":2");
    assert_ne!(line, other);
    for node in ["c1", "c3"] {
        let kept = fleet
            .data()
            .join(node)
            .join("audit")
            .join(kept.file_name().unwrap());
        let whole = std::fs::read_to_string(&kept).unwrap();
        std::fs::write(&kept, whole.replace(line, &other)).unwrap();
    }
    let (code, _, said) = ran(&fleet, &["audit", "verify"]);
    assert!(code == 1 && said.contains("record 5"), "{said}");
}
