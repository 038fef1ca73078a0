//! What a command line gets without a fleet: help, usage errors, files, and exit codes.

#![allow(clippy::unwrap_used)] // helpers of a test fail as its assertions do

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn forebay(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FOREBAY_") {
            command.env_remove(name);
        }
    }
    command.env("XDG_CONFIG_HOME", "/nonexistent");
    command.args(args).stdin(Stdio::null()).output().unwrap()
}

/// Runs, and checks the exit code, what stderr says, and that stdout is for results only.
fn check(args: &[&str], code: i32, says: &[&str]) {
    let output = forebay(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    for text in says {
        assert!(stderr.contains(text), "{args:?}: {text:?} in {stderr}");
    }
    assert!(output.stdout.is_empty() || code == 0, "{args:?}");
}

fn json(args: &[&str]) -> serde_json::Value {
    let output = forebay(&[args, &["--output", "json"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_is_no_command_is_a_usage_error_that_names_it() {
    check(&[], 2, &["Usage:"]);
    check(&["frobnicate"], 2, &["frobnicate", "Usage:"]);
    check(&["status", "--frobnicate"], 2, &["--frobnicate"]);
    check(&["dev", "--control", "2"], 2, &["--control", "1, 3"]);
    check(&["dev", "--workers", "0"], 2, &["--workers"]);
    check(&["dev", "--listen", "nowhere"], 2, &["--listen"]);
    check(&["replay", "--limit", "0"], 2, &["--limit"]);
    check(
        &["ca", "issue", "--role", "root", "--name", "x"],
        2,
        &["operator/viewer"],
    );
    check(&["workers", "--output", "yaml"], 2, &["table, json"]);
    for verb in ["cordon", "uncordon", "drain"] {
        check(&[verb], 2, &["no worker is named", "--pool"]);
    }
    check(&["drain", "w1", "--deadline", "soon"], 2, &["10m"]);
}

#[test]
fn every_verb_has_help_on_stdout() {
    for verb in [
        "dev",
        "control",
        "balancer",
        "agent",
        "engine",
        "ca",
        "keys",
        "init",
        "members",
        "raft",
        "workers",
        "drain",
        "rebalance",
        "homes",
        "status",
        "config",
        "replay",
        "audit",
        "explain",
        "check",
        "top",
        "completions",
        "docs",
    ] {
        let output = forebay(&[verb, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{verb}");
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("Usage: forebay"),
            "{verb}"
        );
    }
}

#[test]
fn the_page_on_the_command_line_is_what_help_says() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md");
    let page = forebay(&["docs", "cli"]).stdout;
    assert!(
        std::fs::read(file).unwrap_or_default() == page,
        "docs/cli.md is not what --help says; write it anew: cargo run -q -- docs cli > docs/cli.md"
    );
}

#[test]
fn shells_get_completions_and_man_gets_a_page_for_each_verb() {
    for (shell, has) in [
        ("bash", "_forebay()"),
        ("zsh", "#compdef forebay"),
        ("fish", "complete -c forebay"),
    ] {
        let script = forebay(&["completions", shell]);
        assert_eq!(script.status.code(), Some(0));
        let script = String::from_utf8(script.stdout).unwrap();
        assert!(
            script.contains(has) && script.contains("--what-if"),
            "{shell}"
        );
    }
    check(&["completions", "cmd"], 2, &["bash"]);
    let dir = tempfile::tempdir().unwrap();
    let man = dir.path().join("man1");
    assert!(forebay(&["docs", "man", text(&man)]).status.success());
    for page in [
        "forebay.1",
        "forebay-status.1",
        "forebay-audit-verify.1",
        "forebay-top.1",
    ] {
        let page = std::fs::read_to_string(man.join(page)).unwrap();
        assert!(
            page.starts_with(".ie") && page.contains(".SH SYNOPSIS"),
            "{page}"
        );
    }
    let taken = dir.path().join("file");
    std::fs::write(&taken, "").unwrap();
    check(&["docs", "man", text(&taken)], 1, &["file"]);
}

#[test]
fn a_check_of_nothing_names_the_context_and_an_exported_file_is_checked_without_one() {
    let output = forebay(&["check", "--output", "json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["checks"][0]["id"], "context.file");
    assert_eq!(report["checks"][0]["status"], "fail");
    assert!(report["checks"].as_array().unwrap().len() >= 25);
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys.toml");
    std::fs::write(&keys, "[[keys]]\nsha256 = 'x'\ntenant = 'a'\n").unwrap();
    let output = forebay(&["check", "--keys", text(&keys)]);
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(
        page.contains("FAIL     keys.file") && page.contains("keys[0].sha256"),
        "{page}"
    );
    let file = dir.path().join("audit.jsonl");
    std::fs::write(&file, "").unwrap();
    check(
        &["audit", "verify", text(&file), "--offline"],
        1,
        &["cut off: record 1"],
    );
    check(&["audit", "verify", "--offline"], 2, &["FILE"]);
    check(&["explain"], 2, &["REQUEST_ID"]);
    check(&["explain", "x", "--worker", "w1"], 2, &["--worker"]);
}

#[test]
fn without_a_context_a_verb_says_how_to_get_one() {
    for verb in [
        &["status"][..],
        &["workers"],
        &["members"],
        &["init"],
        &["config", "show"],
        &["audit", "tail"],
        &["audit", "export", "x"],
        &["audit", "verify"],
        &["top", "--once"],
    ] {
        check(
            verb,
            2,
            &["forebay dev", "export FOREBAY_CONTEXT", "--control"],
        );
    }
    check(
        &["status", "--context", "/nonexistent.toml"],
        2,
        &["/nonexistent.toml"],
    );
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("context.toml");
    std::fs::write(&file, "control = ['h:1']\ncert = 'x'\n").unwrap();
    check(
        &["status", "--context", text(&file)],
        2,
        &["not a context", "ca"],
    );
    std::fs::write(&file, "control = ['h']\nca = 'a'\ncert = 'b'\nkey = 'c'\n").unwrap();
    check(&["status", "--context", text(&file)], 2, &["host:port"]);
}

#[test]
fn a_ca_is_made_once_and_issues_what_a_context_needs() {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca");
    let init = ["ca", "init", "--cell", "test", "--dir", text(&ca)];
    let made = json(&init);
    assert_eq!(made["schema_version"], 1);
    assert!(made["trust_domain"].as_str().unwrap().starts_with("test."));
    check(&init, 8, &["exists"]);
    let issue = [
        "ca",
        "issue",
        "--role",
        "operator/admin",
        "--name",
        "alice",
        "--dir",
        text(&ca),
    ];
    let issued = json(&issue);
    let identity = issued["identity"].as_str().unwrap();
    assert!(identity.ends_with("/operator/admin/alice"), "{identity}");
    for file in ["ca", "cert", "key"] {
        assert!(Path::new(issued[file].as_str().unwrap()).exists(), "{file}");
    }
    check(&issue, 8, &["exists"]);
    check(
        &[&issue[..6], &["b/b", "--dir", text(&ca)]].concat(),
        2,
        &["name"],
    );
    let empty = dir.path().join("none");
    check(
        &[
            "ca",
            "issue",
            "--role",
            "agent",
            "--name",
            "w1",
            "--dir",
            text(&empty),
        ],
        1,
        &["forebay ca init"],
    );
    // With it a verb gets as far as the network.
    let flags = |verb: &'static str| {
        let cert = issued["cert"].as_str().unwrap();
        let key = issued["key"].as_str().unwrap();
        let authority = issued["ca"].as_str().unwrap();
        vec![
            verb,
            "--control",
            "127.0.0.1:9",
            "--ca",
            authority,
            "--cert",
            cert,
            "--key",
            key,
            "--timeout",
            "1",
        ]
    };
    let output = forebay(&flags("members"));
    assert_eq!(output.status.code(), Some(7));
    let output = forebay(&flags("init"));
    assert_eq!(
        output.status.code(),
        Some(7),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    check(
        &flags("workers"),
        7,
        &["(127.0.0.1:9 does not answer)", "context"],
    );
    let output = forebay(&flags("status"));
    assert_eq!(output.status.code(), Some(7));
    assert!(String::from_utf8_lossy(&output.stdout).contains("quorum    no"));
}

#[test]
fn a_roles_options_that_are_wrong_are_named_with_their_source() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("role.toml");
    let with = |role: &str, content: &str, code: i32, says: &[&str]| {
        std::fs::write(&file, content).unwrap();
        check(&[role, "--config", text(&file)], code, says);
    };
    with(
        "control",
        "dir = 'x'\n",
        2,
        &["role.toml", "dir", "forebay control --help"],
    );
    with("control", "listen = 'x'\n", 2, &["role.toml", "listen"]);
    with(
        "control",
        "",
        2,
        &["--data-dir is missing", "FOREBAY_DATA_DIR"],
    );
    with("control", "data-dir = 'x'\n", 2, &["--ca is missing"]);
    with("balancer", "data-dir = 'x'\n", 2, &["--control"]);
    with("agent", "control = ['h']\n", 2, &["host:port"]);
    with("agent", "control = ['h:1']\n", 2, &["--engine is missing"]);
    with("engine", "slots = 0\n", 2, &["slots"]);
    with("engine", "[[broken", 2, &["role.toml", "TOML"]);
    with(
        "control",
        "data-dir = 'x'\nca = 'ca'\ncert = '/no/c.pem'\nkey = 'k'\nadmin = '127.0.0.1:0'\n",
        2,
        &["/no/c.pem"],
    );
    check(
        &["engine", "--config", "/nonexistent.toml"],
        2,
        &["/nonexistent.toml"],
    );
}

#[test]
fn a_key_is_hashed_from_stdin() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_forebay"))
        .args(["keys", "hash", "--tenant", "team-a"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"abc\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let entry = String::from_utf8(output.stdout).unwrap();
    let begins = "[[keys]]\nsha256 = \"ba7816bf8f01cfea414140de5dae2223b00361a3";
    assert!(entry.starts_with(begins), "{entry}");
    assert!(entry.ends_with("\ntenant = \"team-a\"\n"), "{entry}");
    check(&["keys", "hash", "--tenant", "team-a"], 2, &["no key"]);
    check(&["keys", "hash", "--tenant", "a/b"], 2, &["tenant"]);
}

#[test]
fn a_document_that_is_wrong_is_refused_before_anybody_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("fleet.toml");
    check(&["config", "apply", text(&file)], 5, &["config show"]);
    std::fs::write(&file, "[[pools]]\nname = 'a'\nqueue_timeout_ms = 0\n").unwrap();
    check(
        &["config", "apply", text(&file)],
        2,
        &["pools[0].queue_timeout_ms"],
    );
}

#[test]
fn dev_refuses_what_it_cannot_do_before_it_starts_anything() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let data = dir.path().join("data");
    check(
        &["dev", "--listen", &address, "--data-dir", text(&data)],
        1,
        &["taken", "--listen"],
    );
    assert!(!data.join("run.json").exists());
    check(
        &["dev", "start", "c1", "--data-dir", text(&data)],
        5,
        &["no `forebay dev` runs"],
    );
    check(
        &["dev", "--data-dir", "/proc/forebay-data"],
        1,
        &["/proc/forebay-data", "another one by --data-dir"],
    );
    drop(taken);
    std::fs::write(data.join("dev.json"), "{}").unwrap();
    check(
        &["dev", "--listen", &address, "--data-dir", text(&data)],
        1,
        &["dev.json", "another --data-dir"],
    );
}

#[test]
fn a_replay_without_a_server_says_what_it_asked() {
    check(
        &["replay", "--target", "http://127.0.0.1:9", "--limit", "1"],
        7,
        &["127.0.0.1:9"],
    );
    check(
        &["replay", "/nonexistent.jsonl", "--limit", "1"],
        1,
        &["/nonexistent.jsonl"],
    );
    check(&["replay", "/"], 1, &["cannot open the trace /"]);
    let dir = tempfile::tempdir().unwrap();
    let wrong = dir.path().join("wrong.jsonl");
    std::fs::write(&wrong, "nonsense\n").unwrap();
    check(
        &["replay", text(&wrong)],
        1,
        &["wrong.jsonl: line 1: not a request", "input_length"],
    );
    check(
        &["replay", "--target", "https://127.0.0.1:9"],
        2,
        &["TLS", "http://HOST:PORT"],
    );
    check(
        &["replay", "--speed", "0", "--target", "http://127.0.0.1:9"],
        2,
        &["speed"],
    );
}

#[test]
fn an_engine_serves_until_it_is_told_to_stop_and_dies_with_its_parent() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_forebay"))
        .args(["engine", "--listen", "127.0.0.1:0"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
    assert!(
        line.contains("engine ready: emulated on http://127.0.0.1:"),
        "{line}"
    );
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    // A role whose supervisor is another process than its parent does not start.
    check(
        &["engine", "--parent-pid", "1", "--listen", "127.0.0.1:0"],
        1,
        &["supervisor is gone"],
    );
}

#[test]
fn a_report_of_a_fleet_is_one_page_with_its_numbers_inside() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("<b>&\"'.jsonl");
    let mut file = std::fs::File::create(&trace).unwrap();
    for number in 0..40 {
        let (at, session) = (number * 300, number % 8);
        let asked = format!(
            r#"{{"timestamp":{at},"input_length":2048,"output_length":20,"hash_ids":[0,{},{},{}]}}"#,
            1 + session,
            9 + session,
            17 + number
        );
        writeln!(file, "{asked}").unwrap();
    }
    for how in [&["--search", "--steps", "4"][..], &["--rate", "2x"][..]] {
        let out = dir.path().join("out.html");
        let asked = ["sim", "fleet", "--trace", text(&trace), "--workers", "2"];
        let policies = ["--policies", "forebay,least-requests", "--queues", "both"];
        let report = ["--report", text(&out)];
        let printed = json(&[&asked[..], &policies[..], &report[..], how].concat());
        let page = std::fs::read_to_string(&out).unwrap();
        for section in ["goodput", "ttft", "hits", "balance", "staleness", "figures"] {
            assert!(
                page.contains(&format!("<section id=\"{section}\">")),
                "{section}"
            );
        }
        for named in ["forebay", "least-requests", "least-requests, our queue"] {
            assert!(page.contains(&format!("</i>{named}</td>")), "{named}");
        }
        assert_eq!(embedded(&page, "report"), printed);
        let pictures = embedded(&page, "pictures");
        assert_eq!(pictures["curves"].as_array().unwrap().len(), 3);
        assert_eq!(
            page.matches("<svg ").count(),
            page.matches("</svg>").count()
        );
        assert!(page.contains("&lt;b&gt;&amp;") && !page.contains("<b>&"));
        let elsewhere = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
        for reference in ["http://", "https://", "src=", "href=", "url(", "@import"] {
            assert!(!elsewhere.contains(reference), "{reference}");
        }
    }
}

fn embedded(page: &str, id: &str) -> serde_json::Value {
    let start = format!("<script type=\"application/json\" id=\"{id}\">");
    let (_, json) = page.split_once(&start).unwrap();
    serde_json::from_str(json.split_once("</script>").unwrap().0).unwrap()
}

#[test]
fn a_report_that_cannot_be_written_is_refused_before_the_runs() {
    let report = "/nonexistent/out.html";
    // These runs would take hours.
    let long = [
        "sim", "fleet", "--search", "--seeds", "100", "--steps", "20",
    ];
    let says = ["--report /nonexistent/out.html", "No such file"];
    check(&[&long[..], &["--report", report]].concat(), 2, &says);
}
