//! Receipts of real balancers, made again offline.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use forebay_scheduler::{Outcome, Receipt};
use forebay_sim::replay;
use forebay_sim::trace::Trace;
use serde::Deserialize;

use crate::harness::{Fleet, get, post};

const REQUESTS: usize = 320;

/// A line of `/debug/receipts`.
#[derive(Deserialize)]
struct Line {
    number: u64,
    request_id: String,
    receipt: Receipt,
}

fn receipts(fleet: &Fleet, balancer: &str) -> Vec<Line> {
    let (status, page) = get(&format!("{}/debug/receipts", fleet.admin(balancer)));
    assert_eq!(status, 200, "{page}");
    let line = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    page.lines().map(line).collect()
}

/// The shipped sample, faster than recorded, with short answers: it is the placements that count.
fn load(fleet: &Fleet) -> replay::Config {
    let mut trace = Trace::sample(Some(REQUESTS)).unwrap();
    for request in &mut trace.requests {
        request.output_tokens = request.output_tokens.min(40);
    }
    let balancers = fleet.of_role("balancer").into_iter();
    let targets = balancers.map(|balancer| format!("http://{}", balancer.addresses["http"]));
    replay::Config {
        targets: targets.collect(),
        speed: 8.0,
        jitter: Some(1),
        ..replay::Config::new(trace, fleet.url.clone())
    }
}

#[tokio::test]
async fn every_receipt_of_a_real_balancer_gives_its_choice_again() {
    let fleet = ["--balancers", "2", "--workers", "4", "--receipts", "1000"];
    let fleet = Fleet::start(&[&fleet[..], &["--engine-speed", "20"]].concat());
    let report = replay::run(load(&fleet), |_| {}).await.unwrap();
    assert_eq!(report.errors, 0, "{:?}", report.errors_by);

    let (mut requests, mut decisions, mut several, mut warm) = (BTreeSet::new(), 0, 0, 0);
    for balancer in ["b1", "b2"] {
        let mut last = 0;
        for line in receipts(&fleet, balancer) {
            let Line {
                number,
                request_id,
                receipt,
            } = line;
            assert_eq!(number, last + 1, "newest last, and none is missing");
            last = number;
            assert!(matches!(receipt.outcome, Outcome::Chosen(_)));
            assert_eq!(receipt.replay(), Some(receipt.outcome), "{request_id}");
            assert!(receipt.versions.facts_revision.0 > 0);
            several += usize::from(receipt.considered.len() > 1);
            let mut held = receipt.considered.iter();
            warm += usize::from(held.any(|one| one.candidate.cached_tokens > 0.0));
            decisions += 1;
            requests.insert(request_id);
        }
    }
    eprintln!(
        "{decisions} decisions on {} requests made again: {several} among several workers, {warm} \
         with a prefix that one of them holds",
        requests.len()
    );
    assert_eq!(requests.len(), REQUESTS, "every request left one");
    assert!(several >= 200 && warm > 0, "{several}, {warm}");
}

#[test]
fn a_ring_keeps_the_last_and_no_text() {
    let fleet = Fleet::start(&["--receipts", "3", "--engine-speed", "50"]);
    for n in 0..5 {
        let text = "xyzzy ".repeat(200);
        let mut body = String::new();
        write!(
            body,
            r#"{{"model":"emulated","max_tokens":2,"messages":[{{"role":"user","content":"{n} {text}"}}]}}"#
        )
        .unwrap();
        let (status, answer) = post(&format!("{}/v1/chat/completions", fleet.url), &body);
        assert_eq!(status, 200, "{answer}");
    }
    let (_, page) = get(&format!("{}/debug/receipts", fleet.admin("b1")));
    assert!(
        !page.contains("xyzzy") && !page.contains("Bearer"),
        "{page}"
    );
    let numbers: Vec<_> = receipts(&fleet, "b1")
        .iter()
        .map(|one| one.number)
        .collect();
    assert_eq!(numbers, [3, 4, 5]);
}
