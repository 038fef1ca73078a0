//! Where each policy sends a prompt, and what all of them have in common.

use std::collections::BTreeMap;

use forebay_proto::config::POLICIES;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

pub(super) const PROMPT: f64 = 4_000.0;

/// A worker: requests it has, pending tokens, decodes, cached tokens.
pub(super) fn worker(present: u32, pending: f64, decodes: f64, cached: f64) -> Candidate {
    Candidate {
        worker: WorkerId(0),
        place: 0,
        cached_tokens: cached,
        counted_tokens: 0.0,
        backlog: Backlog {
            pending_tokens: pending,
            decodes,
            context_tokens: decodes * 1_000.0,
            ..Backlog::default()
        },
        profile: Profile::default(),
        residuals: Residuals::default(),
        queueing: Queueing {
            present,
            slots: 256,
            service: Duration::from_secs(1),
        },
        age: Duration::ZERO,
        suspicion: 0.0,
        kv_tokens: 0.0,
        recent_ms: 0.0,
        terms: Terms::default(),
    }
}

pub(super) fn prompt() -> Request<'static> {
    Request {
        prompt_tokens: PROMPT,
        ..Request::of("m")
    }
}

/// The scores of a fleet, numbered in this order. Draws are such that nothing is explored.
pub(super) fn scores(policy: &str, request: &Request<'_>, workers: &[Candidate]) -> Vec<Score> {
    scores_by(policy, request, workers, [1, 1])
}

pub(super) fn scores_by(
    policy: &str,
    request: &Request<'_>,
    workers: &[Candidate],
    draws: [u64; 2],
) -> Vec<Score> {
    let mut candidates = workers.to_vec();
    for (place, candidate) in candidates.iter_mut().enumerate() {
        candidate.worker = WorkerId(place as u32);
        candidate.place = place;
        candidate.predict(request);
    }
    let field = Field {
        candidates: workers.len(),
        in_flight: workers.iter().map(|w| u64::from(w.queueing.present)).sum(),
        draws,
    };
    let mut scores = Vec::new();
    let policy = named(policy).unwrap();
    policy.scores(request, &candidates, &field, &mut scores);
    scores
}

/// The first with the least score, and whether it is the only one.
pub(super) fn least(scores: &[Score]) -> (usize, bool) {
    let least = scores
        .iter()
        .copied()
        .reduce(|a, b| if b < a { b } else { a });
    let mut best = (0..scores.len()).filter(|at| Some(scores[*at]) == least);
    (best.next().unwrap(), best.next().is_none())
}

/// Who gets a prompt of 4,000 tokens, by the scores alone; none: a tie for the first place.
pub(super) fn check(policy: &str, workers: &[Candidate], expected: Option<usize>) {
    check_promised(policy, Targets::NONE, workers, expected);
}

pub(super) fn check_promised(
    policy: &str,
    targets: Targets,
    workers: &[Candidate],
    expected: Option<usize>,
) {
    let request = Request {
        targets,
        ..prompt()
    };
    let scores = scores(policy, &request, workers);
    let (best, only) = least(&scores);
    assert_eq!(only.then_some(best), expected, "{policy}: {scores:?}");
}

#[test]
fn configurations_may_name_exactly_these() {
    assert_eq!(ALL.map(Policy::name), POLICIES);
    assert_eq!(default().name(), POLICIES[0]);
}

#[test]
fn forebay_waits_for_the_warm_worker_as_long_as_the_saved_prefill_is_worth() {
    check(
        "forebay",
        &[worker(1, 0.0, 1.0, 3_900.0), worker(0, 0.0, 0.0, 0.0)],
        Some(0),
    );
    check(
        "forebay",
        &[worker(3, 3_000.0, 1.0, 3_900.0), worker(0, 0.0, 0.0, 0.0)],
        Some(0),
    );
    check(
        "forebay",
        &[worker(3, 5_000.0, 1.0, 3_900.0), worker(0, 0.0, 0.0, 0.0)],
        Some(0),
    );
    check(
        "forebay",
        &[worker(3, 9_000.0, 1.0, 3_900.0), worker(0, 0.0, 0.0, 0.0)],
        Some(1),
    );
}

#[test]
fn a_request_that_will_be_late_waits_where_it_does_the_least_harm() {
    let workers = [worker(3, 12_000.0, 1.0, 3_900.0), worker(0, 0.0, 0.0, 0.0)];
    check("forebay", &workers, Some(1));
    let out_of_reach = Targets {
        ttft_ms: 1.0,
        tpot_ms: f64::INFINITY,
    };
    check_promised("forebay", out_of_reach, &workers, Some(0));
}

#[test]
fn forebay_counts_work_and_not_requests() {
    check(
        "forebay",
        &[worker(9, 100.0, 0.0, 0.0), worker(1, 50_000.0, 0.0, 0.0)],
        Some(0),
    );
    check(
        "least-requests",
        &[worker(9, 100.0, 0.0, 0.0), worker(1, 50_000.0, 0.0, 0.0)],
        Some(1),
    );
}

#[test]
fn forebay_spares_those_who_are_there_already() {
    check(
        "forebay",
        &[worker(60, 0.0, 60.0, 0.0), worker(0, 0.0, 0.0, 0.0)],
        Some(1),
    );
    check(
        "forebay",
        &[worker(0, 0.0, 0.0, 0.0), worker(0, 0.0, 0.0, 0.0)],
        None,
    );
}

#[test]
fn forebay_keeps_a_promise_before_it_saves_anything() {
    let promised = |ttft_ms, tpot_ms| Targets { ttft_ms, tpot_ms };
    // Warm and crowded against cold and idle: the first is sooner, and slower from token to token.
    let warm = worker(200, 0.0, 200.0, 3_999.0);
    let cold = worker(0, 0.0, 0.0, 0.0);
    let check = |targets, workers: &[Candidate], expected| {
        check_promised("forebay", targets, workers, Some(expected));
    };
    check(Targets::NONE, &[warm, cold], 0);
    check(promised(f64::INFINITY, 30.0), &[warm, cold], 1);
    // Nobody keeps it: as if nothing was promised.
    check(promised(f64::INFINITY, 5.0), &[warm, cold], 0);
    check(promised(1.0, f64::INFINITY), &[warm, cold], 0);
}

#[test]
fn forebay_promises_by_the_worse_of_what_was_seen() {
    let (steady, wild) = (worker(2, 3_000.0, 2.0, 0.0), worker(0, 0.0, 0.0, 0.0));
    let wild = Candidate {
        residuals: Residuals {
            ttft_p50: 1.0,
            ttft_p95: 4.0,
        },
        ..wild
    };
    let promised = Targets {
        ttft_ms: 1_000.0,
        ..Targets::NONE
    };
    check("forebay", &[steady, wild], Some(1));
    check_promised("forebay", promised, &[steady, wild], Some(0));
}

#[test]
fn forebay_goes_where_the_kv_cache_suffices() {
    let small = Candidate {
        kv_tokens: 20_000.0,
        ..worker(10, 0.0, 17.0, 3_000.0)
    };
    let large = Candidate {
        kv_tokens: 400_000.0,
        ..worker(10, 0.0, 17.0, 0.0)
    };
    check("forebay", &[small, large], Some(1));
    let unknown = Candidate {
        kv_tokens: 0.0,
        ..small
    };
    check("forebay", &[unknown, large], Some(0));
}

#[test]
fn forebay_avoids_whose_reports_are_late() {
    let late = Candidate {
        suspicion: 0.5,
        ..worker(0, 0.0, 0.0, 0.0)
    };
    check("forebay", &[late, worker(0, 1_000.0, 0.0, 0.0)], Some(1));
    check("forebay", &[late, worker(0, 9_000.0, 0.0, 0.0)], Some(0));
}

#[test]
fn longest_prefix_follows_the_cache_whatever_the_queue() {
    check(
        "longest-prefix",
        &[worker(99, 90_000.0, 9.0, 300.0), worker(0, 0.0, 0.0, 0.0)],
        Some(0),
    );
    check(
        "longest-prefix",
        &[worker(9, 0.0, 0.0, 300.0), worker(1, 0.0, 0.0, 300.0)],
        Some(1),
    );
}

#[test]
fn round_robin_takes_turns() {
    let chosen: Vec<usize> = (0..6)
        .map(|turn| {
            let request = Request { turn, ..prompt() };
            least(&scores(
                "round-robin",
                &request,
                &[worker(0, 0.0, 0.0, 0.0); 3],
            ))
            .0
        })
        .collect();
    assert_eq!(chosen, [0, 1, 2, 0, 1, 2]);
}

#[test]
fn power_of_two_takes_the_emptier_of_two_and_never_a_third() {
    let mut rng = StdRng::seed_from_u64(1);
    let mut chosen: BTreeMap<usize, u32> = BTreeMap::new();
    let workers = [0, 1, 2, 3].map(|present| worker(present, 0.0, 0.0, 0.0));
    for _ in 0..3_000 {
        let scores = scores_by("power-of-two", &prompt(), &workers, rng.random());
        assert_eq!(scores.iter().filter(|score| score.tier == 0).count(), 2);
        *chosen.entry(least(&scores).0).or_default() += 1;
    }
    // The emptiest of four is one of two in half of the draws, the fullest never wins.
    assert!((1_400..1_600).contains(&chosen[&0]), "{chosen:?}");
    assert!(!chosen.contains_key(&3));
}

#[test]
fn bounded_hash_keeps_a_beginning_together_until_its_worker_is_full() {
    let first = |head: u64, present: [u32; 8]| {
        let request = Request { head, ..prompt() };
        let workers = present.map(|present| worker(present, 0.0, 0.0, 0.0));
        least(&scores("bounded-hash", &request, &workers)).0
    };
    let home = first(7, [0; 8]);
    assert_eq!(first(7, [0; 8]), home);
    let mut loads = [4; 8];
    loads[home] = 9;
    assert_ne!(first(7, loads), home);
    let mut homes: BTreeMap<usize, u32> = BTreeMap::new();
    for head in 0..8_000 {
        *homes.entry(first(mix(head), [4; 8])).or_default() += 1;
    }
    let fair = homes.values().all(|n| (700..1_300).contains(n));
    assert!(fair, "{homes:?}");
}
