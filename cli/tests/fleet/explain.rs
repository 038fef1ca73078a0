//! Why a request went where it went, asked of real balancers.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use crate::harness::{FAST_ENGINE, Fleet, get, metric, send};

fn ran(fleet: &Fleet, args: &[&str]) -> (i32, String, String) {
    let output = fleet.run(args);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let code = output.status.code().unwrap();
    (code, text(output.stdout), text(output.stderr))
}

fn body(text: &str) -> String {
    format!(
        r#"{{"model":"emulated","max_tokens":2,"messages":[{{"role":"user","content":"{text}"}}]}}"#
    )
}

/// Asks a balancer, and returns the worker that answered.
fn ask(fleet: &Fleet, balancer: &str, id: &str, text: &str) -> String {
    let host = &fleet.process(balancer).addresses["http"];
    let body = body(text);
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nx-request-id: {id}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let (status, answer) = send(host, request.as_bytes());
    assert_eq!(status, 200, "{answer}");
    let (_, page) = get(&format!(
        "{}/debug/receipts?request={id}",
        fleet.admin(balancer)
    ));
    let line: serde_json::Value = serde_json::from_str(page.lines().last().unwrap()).unwrap();
    let chosen = line["receipt"]["outcome"]["chosen"]["worker"].to_string();
    line["workers"][chosen].as_str().unwrap().to_owned()
}

#[test]
fn a_placement_is_explained_and_made_again() {
    let fleet = [&["--balancers", "2", "--workers", "3"], &FAST_ENGINE[..]].concat();
    let fleet = Fleet::start(&fleet);
    let mut on = Vec::new();
    for n in 0..12 {
        let balancer = ["b1", "b2"][n % 2];
        on.push(ask(
            &fleet,
            balancer,
            &format!("r-{n}"),
            &format!("xyzzy {n} ").repeat(80),
        ));
    }

    // By request: whichever balancer placed it.
    for (n, worker) in on.iter().enumerate() {
        let explained = fleet.json(&["explain", &format!("r-{n}"), "--replay"]);
        assert_eq!(explained["schema_version"], 1);
        let placements = explained["placements"].as_array().unwrap();
        assert_eq!(placements.len(), 1);
        let one = &placements[0];
        assert_eq!(one["balancer"], ["b1", "b2"][n % 2]);
        assert_eq!(
            (&one["ended"], &one["replayed"]["same"]),
            (&"complete".into(), &true.into())
        );
        let chosen = one["receipt"]["outcome"]["chosen"]["worker"].to_string();
        assert_eq!(one["workers"][chosen], worker.as_str());
    }
    let (code, page, said) = ran(&fleet, &["explain", "r-3", "--replay"]);
    assert_eq!((code, said.as_str()), (0, ""), "{page}");
    for part in [
        "request       r-3",
        "balancer      b2, its placement 2",
        "asked for     emulated, ",
        "among 3; complete",
        "the same choice, made again here",
        "WORKER  COST",
        "chosen: ",
    ] {
        assert!(page.contains(part), "{part}: {page}");
    }
    assert!(!page.contains("xyzzy"));

    // By worker.
    let worker = on.last().unwrap();
    let expected = on.iter().filter(|other| *other == worker).count();
    let all = fleet.json(&["explain", "--worker", worker, "--last", "100"]);
    assert_eq!(all["placements"].as_array().unwrap().len(), expected);
    let one = fleet.json(&["explain", "--worker", worker]);
    assert!(
        (1..=2).contains(&one["placements"].as_array().unwrap().len()),
        "one of each balancer"
    );

    // Made again from a file, and a receipt that says something else.
    let (_, lines) = get(&format!("{}/debug/receipts", fleet.admin("b1")));
    let file = fleet.dir.path().join("receipts.jsonl");
    std::fs::write(&file, &lines).unwrap();
    let from = [
        "explain",
        "r-0",
        "--replay",
        "--from",
        file.to_str().unwrap(),
    ];
    assert_eq!(ran(&fleet, &from).0, 0);
    let first = lines.lines().next().unwrap();
    let mut line: serde_json::Value = serde_json::from_str(first).unwrap();
    line["receipt"]["outcome"]["chosen"]["start"] = 77.into();
    std::fs::write(&file, format!("{line}\n")).unwrap();
    let (code, page, said) = ran(&fleet, &from);
    assert!(
        code == 1 && page.contains("ANOTHER choice") && said.contains("1 decision"),
        "{page}{said}"
    );

    // Where it would go: nothing is booked, sent or counted as placed.
    let what_if = fleet.dir.path().join("body.json");
    std::fs::write(&what_if, body(&"xyzzy 3 ".repeat(80))).unwrap();
    let placed = || metric(&fleet.admin("b1"), "forebay_balancer_placements_total");
    let before = placed();
    let would = fleet.json(&[
        "explain",
        "--what-if",
        what_if.to_str().unwrap(),
        "--replay",
    ]);
    let would = &would["placements"][0];
    assert_eq!(
        (&would["ended"], &would["replayed"]["same"]),
        (&serde_json::Value::Null, &true.into())
    );
    assert!(would["receipt"]["outcome"]["chosen"].is_object(), "{would}");
    assert!((placed() - before).abs() < 0.5);
    let (code, page, _) = ran(&fleet, &["explain", "--what-if", what_if.to_str().unwrap()]);
    assert!(
        code == 0 && page.contains("nothing was sent") && !page.contains("xyzzy"),
        "{page}"
    );

    // Refusals, each with its code and what to do.
    let check = |args: &[&str], code: i32, says: &str| {
        let (exit, page, said) = ran(&fleet, &[&["explain"], args].concat());
        assert_eq!(exit, code, "{args:?}: {said}");
        assert!(said.contains(says) && page.is_empty(), "{args:?}: {said}");
    };
    check(&["r-99"], 5, "no placement of request r-99");
    check(&["r 99"], 2, "neither a request's id");
    check(&["--worker", "w9"], 5, "there is no worker w9");
    check(&["r-1", "--balancer", "https://b1"], 2, "TLS is not spoken");
    check(&["--what-if", "/nonexistent"], 5, "/nonexistent");
    let nobody = ["--target", "http://127.0.0.1:9"];
    check(
        &[&["--what-if", what_if.to_str().unwrap()], &nobody[..]].concat(),
        7,
        "127.0.0.1:9",
    );
    std::fs::write(&what_if, body("x").replace("emulated", "gpt-5")).unwrap();
    check(
        &["--what-if", what_if.to_str().unwrap()],
        5,
        "no worker of this fleet serves",
    );
    std::fs::write(&what_if, "{}").unwrap();
    check(&["--what-if", what_if.to_str().unwrap()], 2, "`messages`");

    // A dead balancer: what the other one has is shown, and what cannot be known is said.
    fleet.kill("b2");
    let (code, page, said) = ran(&fleet, &["explain", "r-0"]);
    assert!(
        code == 0 && page.contains("r-0") && said.contains("balancer b2 was not heard"),
        "{said}"
    );
    check(&["r-1"], 7, "b2: ");
}

#[test]
fn thousands_of_receipts_are_answered_within_a_second() {
    let fleet = Fleet::start(&["--engine-speed", "50"]);
    let mut text = String::new();
    for n in 0..1_500 {
        text.clear();
        write!(text, "n{n}").unwrap();
        let host = &fleet.process("b1").addresses["http"];
        let body = body(&text);
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nx-request-id: r-{n}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        assert_eq!(send(host, request.as_bytes()).0, 200);
    }
    let timed = |path: &str| {
        let began = Instant::now();
        let (status, page) = get(&format!("{}/debug/receipts{path}", fleet.admin("b1")));
        assert_eq!(status, 200);
        (page.lines().count(), page.len(), began.elapsed())
    };
    let (count, bytes, took) = timed("");
    eprintln!(
        "the newest {count} of 1,500 receipts: {} KiB in {took:.1?}",
        bytes >> 10
    );
    assert_eq!(count, 1_000, "an answer is bounded");
    let (one, _, found) = timed("?request=r-3");
    eprintln!("one of them in {found:.1?}");
    assert_eq!(one, 1);
    assert!(took < Duration::from_secs(5) && found < Duration::from_secs(1));
    let (status, said) = get(&format!("{}/debug/receipts?since=3", fleet.admin("b1")));
    assert!(
        status == 400 && said.contains("request, worker and last"),
        "{said}"
    );
}
