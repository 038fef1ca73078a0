use std::collections::BTreeMap;

use forebay_proto::config::POLICIES;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::model::Residuals;

/// A worker: requests it has, pending tokens, decodes, cached tokens.
fn worker(present: u32, pending: f64, decodes: f64, cached: f64) -> Candidate {
    Candidate {
        worker: WorkerId(0),
        place: 0,
        cached_tokens: cached,
        backlog: Backlog {
            pending_tokens: pending,
            decodes,
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
    }
}

/// Who gets a prompt of 4,000 tokens, by the scores alone; none: a tie for the first place.
fn check(policy: &str, workers: &[Candidate], expected: Option<usize>) {
    let policy = named(policy).unwrap();
    let request = Request {
        prompt_tokens: 4_000.0,
        ..Request::of("m")
    };
    let field = Field {
        candidates: workers.len(),
        in_flight: workers.iter().map(|w| u64::from(w.queueing.present)).sum(),
        draws: [0, 0],
    };
    let scores: Vec<Score> = (0..)
        .zip(workers)
        .map(|(place, worker)| {
            let candidate = Candidate {
                worker: WorkerId(place as u32),
                place,
                ..*worker
            };
            policy.score(&request, &candidate, &field)
        })
        .collect();
    let least = scores
        .iter()
        .copied()
        .reduce(|a, b| if b < a { b } else { a })
        .unwrap();
    let best: Vec<usize> = (0..)
        .zip(&scores)
        .filter(|(_, s)| **s == least)
        .map(|(at, _)| at)
        .collect();
    let got = match best[..] {
        [only] => Some(only),
        _ => None,
    };
    assert_eq!(got, expected, "{}: {scores:?}", policy.name());
}

#[test]
fn configurations_may_name_exactly_these() {
    assert_eq!(ALL.map(Policy::name), POLICIES);
    assert_eq!(default().name(), POLICIES[0]);
}

#[test]
fn forebay_goes_to_the_warm_worker_while_that_is_sooner() {
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
        Some(1),
    );
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
    let policy = named("round-robin").unwrap();
    let chosen: Vec<usize> = (0..6)
        .map(|turn| {
            let request = Request {
                turn,
                ..Request::of("m")
            };
            let field = Field {
                candidates: 3,
                in_flight: 0,
                draws: [0, 0],
            };
            let score = |place| {
                let candidate = Candidate {
                    place,
                    ..worker(0, 0.0, 0.0, 0.0)
                };
                policy.score(&request, &candidate, &field).first
            };
            (0..3)
                .min_by(|a, b| score(*a).total_cmp(&score(*b)))
                .unwrap()
        })
        .collect();
    assert_eq!(chosen, [0, 1, 2, 0, 1, 2]);
}

#[test]
fn power_of_two_takes_the_emptier_of_two_and_never_a_third() {
    let policy = named("power-of-two").unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let mut chosen: BTreeMap<usize, u32> = BTreeMap::new();
    for _ in 0..3_000 {
        let field = Field {
            candidates: 4,
            in_flight: 0,
            draws: rng.random(),
        };
        let score = |place: usize| {
            let candidate = Candidate {
                place,
                ..worker(place as u32, 0.0, 0.0, 0.0)
            };
            policy.score(&Request::of("m"), &candidate, &field)
        };
        let drawn = (0..4).filter(|place| score(*place).first == 0.0).count();
        assert_eq!(drawn, 2);
        let best = (0..4)
            .min_by(|a, b| score(*a).partial_cmp(&score(*b)).unwrap())
            .unwrap();
        *chosen.entry(best).or_default() += 1;
    }
    // The emptiest of four is one of two in half of the draws, the fullest never wins.
    assert!((1_400..1_600).contains(&chosen[&0]), "{chosen:?}");
    assert!(!chosen.contains_key(&3));
}

#[test]
fn bounded_hash_keeps_a_beginning_together_until_its_worker_is_full() {
    let policy = named("bounded-hash").unwrap();
    let first = |head: u64, present: &[u32]| {
        let request = Request {
            head,
            ..Request::of("m")
        };
        let field = Field {
            candidates: present.len(),
            in_flight: present.iter().map(|n| u64::from(*n)).sum(),
            draws: [0, 0],
        };
        let score = |place: usize| {
            let candidate = Candidate {
                worker: WorkerId(place as u32),
                place,
                ..worker(present[place], 0.0, 0.0, 0.0)
            };
            policy.score(&request, &candidate, &field)
        };
        (0..present.len())
            .min_by(|a, b| score(*a).partial_cmp(&score(*b)).unwrap())
            .unwrap()
    };
    let home = first(7, &[0; 8]);
    assert_eq!(first(7, &[0; 8]), home);
    let mut loads = [4; 8];
    loads[home] = 9;
    assert_ne!(first(7, &loads), home);
    let mut homes: BTreeMap<usize, u32> = BTreeMap::new();
    for head in 0..8_000 {
        *homes.entry(first(mix(head), &[4; 8])).or_default() += 1;
    }
    assert!(
        homes.values().all(|n| (700..1_300).contains(n)),
        "{homes:?}"
    );
}
