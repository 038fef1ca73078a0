//! Homes of hot families in a fleet in virtual time: that they come about and do no harm; and, ignored, the
//! measurements of `docs/evidence/homes.md`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // helpers of a test fail as its assertions do

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use forebay_sim::fleet::{
    Outcome, Reports, Served, Setup, Workload, fluid, quantile, run, run_in_detail,
};
use forebay_sim::trace::{Options, Trace};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Conversations of three turns; `hot` of a hundred share a beginning of 12,288 tokens, the others one of 1,024
/// each with every thirtieth.
fn skewed(conversations: u64, hot: u64, seed: u64) -> Workload {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut requests: Vec<(u64, String)> = Vec::new();
    for conversation in 0..conversations {
        let (family, shared) = if rng.random_range(0..100) < hot {
            (0, 24)
        } else {
            (1 + conversation % 30, 2)
        };
        let (mut at, mut own) = (rng.random_range(0..conversations * 300), 0);
        for _ in 0..3 {
            own += rng.random_range(1..4_u32);
            let (head, tail) = (family * 1_000, 1_000_000 + conversation * 1_000);
            let input = (shared + own) * 512 + rng.random_range(1..500);
            let output = rng.random_range(30..400);
            let line = format!(
                r#"{{"timestamp": {at}, "input_length": {input}, "output_length": {output}, "hash_ids": [[{head}, {shared}], [{tail}, {own}]]}}"#
            );
            requests.push((at, line));
            at += rng.random_range(15_000..60_000);
        }
    }
    requests.sort();
    let mut lines = String::new();
    for (_, line) in requests {
        writeln!(lines, "{line}").unwrap();
    }
    let options = Options {
        block_tokens: Some(512),
        ..Options::default()
    };
    Workload::new(&Trace::from_bytes(lines.as_bytes(), options).unwrap())
}

fn fleet(homes: bool) -> Setup {
    Setup {
        homes,
        ..Setup::default()
    }
}

fn at(load: &Workload, setup: &Setup, share: f64, seed: u64) -> Outcome {
    run(load, setup, share * fluid(load, setup).bound, seed)
}

#[test]
fn a_hot_family_gets_homes_and_nobody_fares_worse_for_it() {
    let load = skewed(400, 60, 1);
    let (without, with) = (
        at(&load, &fleet(false), 0.4, 1),
        at(&load, &fleet(true), 0.4, 1),
    );
    assert_eq!((without.families, without.copies), (0, 0));
    assert!(with.families >= 1);
    assert_eq!((with.offered, with.failed), (1_200, 0));
    let [kept_without, kept_with] = [&without, &with].map(Outcome::attainment);
    assert!(
        kept_with >= kept_without - 0.02,
        "{kept_with} {kept_without}"
    );
    let [cached_without, cached_with] = [&without, &with].map(|one| one.hit_ratio);
    assert!(
        cached_with >= cached_without - 0.02,
        "{cached_with} {cached_without}"
    );
    // Copies are few: each is one prefill on one home.
    assert!(with.copies < 200, "{}", with.copies);
    assert_eq!(at(&load, &fleet(true), 0.4, 1), with, "runs repeat");
}

fn trace(name: &str, limit: usize) -> Option<Workload> {
    let directory = PathBuf::from(std::env::var_os("FOREBAY_TRACES")?);
    let options = Options {
        limit: Some(limit),
        ..Options::default()
    };
    let trace = Trace::open(&directory.join(format!("{name}.jsonl.gz")), options).ok()?;
    Some(Workload::new(&trace))
}

fn mean(runs: &[Outcome], of: impl Fn(&Outcome) -> f64) -> f64 {
    runs.iter().map(of).sum::<f64>() / runs.len() as f64
}

fn row(what: &str, runs: &[Outcome]) {
    let goodput = |one: &Outcome| one.met as f64 / one.lasted.as_secs_f64();
    let kept = |pick: fn(f64, f64) -> f64, from| {
        100.0 * runs.iter().map(Outcome::attainment).fold(from, pick)
    };
    println!(
        "{what} | {:.1} ({:.1} to {:.1}) % | {:.2}/s | {:.1} % | {:.0} | {:.0} | {:.2} | {:.0} | {:.0}",
        100.0 * mean(runs, Outcome::attainment),
        kept(f64::min, 1.0),
        kept(f64::max, 0.0),
        mean(runs, goodput),
        100.0 * mean(runs, |one| one.hit_ratio),
        mean(runs, |one| quantile(&one.ttft_ms, 0.5)),
        mean(runs, |one| quantile(&one.ttft_ms, 0.99)),
        mean(runs, |one| one.max_over_mean),
        mean(runs, |one| one.families as f64),
        mean(runs, |one| one.copies as f64),
    );
}

/// Where `FOREBAY_TRACES` has the traces: `cargo test --release -p forebay-sim --test homes -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn homes_on_traces_and_on_a_skewed_load() {
    let mut loads = vec![
        ("one hot family, 60 %", skewed(1_500, 60, 1), [0.45, 0.55]),
        ("one hot family, 90 %", skewed(1_500, 90, 2), [0.45, 0.55]),
    ];
    for (name, limit, shares) in [
        ("mooncake-conversation-1of2", 5_606, [0.8, 0.95]),
        ("lmcache-agents-dev", 1_148, [0.4, 0.6]),
        ("agentic-coding-dev", 3_000, [0.4, 0.6]),
    ] {
        loads.extend(trace(name, limit).map(|load| (name, load, shares)));
    }
    println!(
        "load | balancers | of the bound | homes | kept | goodput | cached | p50 | p99 | max/mean | families | copies"
    );
    for (name, load, shares) in &loads {
        for (balancers, reports) in [(1, Reports::Fresh), (8, Reports::Deployed)] {
            for share in *shares {
                for homes in [false, true] {
                    let setup = Setup {
                        balancers,
                        reports,
                        ..fleet(homes)
                    };
                    let runs: Vec<_> = (1..=5).map(|seed| at(load, &setup, share, seed)).collect();
                    let word = if homes { "yes" } else { "no" };
                    row(&format!("{name} | {balancers} | {share} | {word}"), &runs);
                }
            }
        }
    }
}

/// First tokens of the last worker and of the others, by when their requests came.
fn phases(served: &[Served], joined: Duration, last: u32) {
    for (from, to) in [(0, 10), (10, 30), (30, 60), (60, 120), (120, 300)] {
        let span = |one: &&Served| {
            let since = one.arrived.saturating_sub(joined);
            one.arrived >= joined
                && since >= Duration::from_secs(from)
                && since < Duration::from_secs(to)
        };
        let mut parts = [Vec::new(), Vec::new()];
        let mut kept = [0, 0];
        for one in served.iter().filter(span) {
            let part = usize::from(one.worker == last);
            #[allow(clippy::cast_possible_truncation)] // seven digits are enough
            parts[part].push(one.ttft_ms.unwrap_or(f64::INFINITY) as f32);
            kept[part] += usize::from(one.in_time);
        }
        for part in &mut parts {
            part.sort_by(f32::total_cmp);
        }
        let share = |part: usize| 100.0 * kept[part] as f64 / parts[part].len().max(1) as f64;
        println!(
            "  {from}-{to} s | joined: {} requests, {:.1} % in time, p50 {:.0}, p99 {:.0} ms | others: {}, {:.1} %, {:.0}, {:.0} ms",
            parts[1].len(),
            share(1),
            quantile(&parts[1], 0.5),
            quantile(&parts[1], 0.99),
            parts[0].len(),
            share(0),
            quantile(&parts[0], 0.5),
            quantile(&parts[0], 0.99),
        );
    }
}

#[test]
#[ignore = "a measurement"]
fn a_cold_worker_that_joins_a_busy_fleet() {
    let mut loads = vec![("one hot family, 60 %", skewed(1_500, 60, 1))];
    loads.extend(trace("mooncake-conversation-1of2", 5_606).map(|load| ("mooncake", load)));
    for (name, load) in &loads {
        for (balancers, reports) in [
            (1, Reports::Fresh),
            (8, Reports::Deployed),
            (32, Reports::Deployed),
        ] {
            for share in [0.7, 0.9] {
                // Seven are as busy as that, then the eighth comes.
                let mut setup = Setup {
                    workers: 7,
                    balancers,
                    reports,
                    ..fleet(false)
                };
                let rate = share * fluid(load, &setup).bound;
                let half = Duration::from_secs_f64(load.len() as f64 / rate / 2.0);
                setup.workers = 8;
                for fault in ["crash", "drain"] {
                    let text = format!("{fault}:8@0+{}", half.as_secs());
                    setup.faults = vec![text.parse().unwrap()];
                    let (outcome, served) = run_in_detail(load, &setup, rate, 1);
                    println!(
                        "{name}, {balancers} balancers, {share} of seven workers' bound, {fault}: {:.1} % kept, {:.1} % cached",
                        100.0 * outcome.attainment(),
                        100.0 * outcome.hit_ratio
                    );
                    let before: Vec<Served> = served
                        .iter()
                        .filter(|one| {
                            one.arrived + Duration::from_secs(120) >= half && one.arrived < half
                        })
                        .copied()
                        .collect();
                    let in_time = before.iter().filter(|one| one.in_time).count();
                    println!(
                        "  the 120 s before: {} requests, {:.1} % in time",
                        before.len(),
                        100.0 * in_time as f64 / before.len().max(1) as f64
                    );
                    phases(&served, Duration::from_secs(half.as_secs()), 7);
                }
            }
        }
    }
}
