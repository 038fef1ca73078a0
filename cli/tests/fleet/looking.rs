//! What operators see live: the limit in `status`, a frame of `top`; and what follows from the code.

use crate::harness::{FAST_ENGINE, Fleet, forebay, post, within};
use std::time::Duration;

#[test]
fn a_frame_of_top_shows_workers_balancers_and_nodes_and_status_says_what_limits() {
    let slots = [
        "--workers",
        "2",
        "--engine-slots",
        "2",
        "--engine-speed",
        "1",
    ];
    let fleet = Fleet::start(&slots);
    for _ in 0..3 {
        let body =
            r#"{"model":"emulated","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}"#;
        let (status, answer) = post(&format!("{}/v1/chat/completions", fleet.url), body);
        assert_eq!(status, 200, "{answer}");
    }
    let output = fleet.run(&["top", "--once"]);
    let frame = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{frame}");
    for part in [
        "control 1/1, facts r",
        "balancers 1/1 ready",
        "limited by nothing: 0 of 4 slots are taken",
        "WORKER*",
        "w1 ",
        "w2 ",
        "b1           ready",
        "c1               leader",
    ] {
        assert!(frame.contains(part), "{part}\n{frame}");
    }
    assert!(
        frame.lines().all(|line| line.chars().count() <= 80),
        "{frame}"
    );
    let live = fleet.run(&["top"]);
    assert_eq!(live.status.code(), Some(2), "no terminal");
    assert!(String::from_utf8_lossy(&live.stderr).contains("--once"));

    let status = fleet.json(&["status"]);
    assert_eq!(status["limited_by"], "nothing", "{status}");
    // As many as there are slots, for as long as it takes to look.
    let load: Vec<_> = (0..12)
        .map(|n| {
            let url = format!("{}/v1/chat/completions", fleet.url);
            std::thread::spawn(move || {
                let body = format!(
                    r#"{{"model":"emulated","max_tokens":400,"messages":[{{"role":"user","content":"{n}"}}]}}"#
                );
                post(&url, &body).0
            })
        })
        .collect();
    within(Duration::from_secs(10), "limited by capacity", || {
        let status = fleet.json(&["status"]);
        let because = status["limited_because"].as_str()?;
        (status["limited_by"] == "capacity" && because.contains("4 of 4 slots")).then_some(())
    });
    let page = fleet.run(&["status"]);
    let page = String::from_utf8(page.stdout).unwrap();
    assert!(page.contains("\nlimit     "), "{page}");
    for one in load {
        assert_eq!(one.join().unwrap(), 200);
    }

    fleet.kill("c1");
    let status = fleet.run(&["status", "--output", "json", "--timeout", "2"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["limited_by"], "control");
    let output = fleet.run(&["top", "--once"]);
    let frame = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "the balancer still answers: {frame}"
    );
    assert!(
        frame.contains("facts not readable") && frame.contains("no answer"),
        "{frame}"
    );
    fleet.kill("b1");
    let output = fleet.run(&["top", "--once"]);
    let frame = String::from_utf8(output.stdout).unwrap();
    assert!(frame.contains("nothing answers"), "{frame}");
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn without_the_tables_of_a_context_less_is_seen_and_it_says_so() {
    let fleet = Fleet::start(&FAST_ENGINE);
    let text = std::fs::read_to_string(fleet.data().join("context.toml")).unwrap();
    let short: Vec<&str> = text
        .lines()
        .take_while(|line| !line.starts_with('['))
        .collect();
    let file = fleet.dir.path().join("short.toml");
    std::fs::write(&file, short.join("\n")).unwrap();
    let run = |args: &[&str]| {
        let output = forebay()
            .args(args)
            .arg("--context")
            .arg(&file)
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap(),
            String::from_utf8(text).unwrap(),
        )
    };
    let (code, said) = run(&["status"]);
    assert!(
        code == 0 && said.contains("limit     unknown: no balancer is known"),
        "{said}"
    );
    let (code, said) = run(&["check", "--all"]);
    assert!(
        code == 0 && said.contains("the context has no table [agents]"),
        "{said}"
    );
    let (code, said) = run(&["explain", "x"]);
    assert!(code == 2 && said.contains("[balancers]"), "{said}");
    let (code, said) = run(&["top", "--once"]);
    assert!(code == 0 && said.contains("balancers 0/0 ready"), "{said}");
}
