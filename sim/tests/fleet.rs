//! The fleet in virtual time: its bound, that runs repeat, what becomes of requests, and who does better.

#![allow(clippy::unwrap_used, clippy::print_stderr)] // helpers of a test fail as its assertions do

use std::path::PathBuf;
use std::time::Duration;

use forebay_scheduler::policy;
use forebay_sim::fleet::{Check, Order, Outcome, Reports, Setup, Spread, Workload, fluid, run};
use forebay_sim::trace::{Options, SAMPLES, Sample, Trace};

/// Shares of the fluid bound: an engine has room left, or has hardly any.
const CALM: f64 = 0.4;
const FULL: f64 = 0.9;

/// The head of the shipped sample.
fn sample() -> Workload {
    Workload::new(&Trace::sample(Some(200)).unwrap())
}

/// A thousand requests of a sample's lengths that have nothing in common.
fn thousand() -> Workload {
    use std::fmt::Write as _;
    let sample = Sample::named("azure-2023-conv")
        .unwrap()
        .read(None)
        .unwrap();
    let mut lines = String::new();
    for request in sample.requests.iter().cycle().take(1_000) {
        let (input, output) = (request.input_tokens, request.output_tokens);
        writeln!(
            lines,
            r#"{{"timestamp": 0, "input_length": {input}, "output_length": {output}, "hash_ids": []}}"#
        )
        .unwrap();
    }
    Workload::new(&Trace::from_bytes(lines.as_bytes(), Options::default()).unwrap())
}

/// A small fleet with a policy and the order that belongs to it, in which these faults happen.
fn fleet(name: &str, faults: &[&str]) -> Setup {
    let policy = policy::named(name).unwrap();
    let ours = policy.name() == policy::default().name();
    Setup {
        policy,
        order: if ours { Order::Slack } else { Order::Fcfs },
        workers: 4,
        faults: faults.iter().map(|text| text.parse().unwrap()).collect(),
        ..Setup::default()
    }
}

/// Runs at a share of the fluid bound. Whatever happens, every request is met, late or failed.
fn at(load: &Workload, setup: &Setup, share: f64, seed: u64) -> Outcome {
    let outcome = run(load, setup, share * fluid(load, setup).bound, seed);
    assert_eq!(outcome.offered, load.len());
    assert_eq!(outcome.ttft_ms.len() + outcome.failed, outcome.offered);
    assert!(outcome.met <= outcome.ttft_ms.len());
    outcome
}

/// For how long the least busy of two workers worked.
fn least_busy(outcome: &Outcome) -> Duration {
    let mean = outcome.busy * outcome.lasted.as_secs_f64();
    Duration::from_secs_f64((mean * (2.0 - outcome.max_over_mean)).max(0.0))
}

#[test]
fn the_fluid_bound_of_a_published_trace_is_the_one_worked_out_by_hand() {
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/traces");
    let folder = std::env::var_os("FOREBAY_TRACES").map_or_else(|| beside.into(), PathBuf::from);
    let file = folder.join("mooncake-conversation-1of2.jsonl.gz");
    if !file.exists() {
        eprintln!("skipped: {} is not there", file.display());
        return;
    }
    let load = Workload::new(&Trace::open(&file, Options::default()).unwrap());
    let setup = Setup {
        workers: 8,
        kv_tokens: 6_000 * 512,
        ..Setup::default()
    };
    let bound = fluid(&load, &setup).bound;
    assert!((bound / 6.42 - 1.0).abs() < 0.01, "{bound}");
}

#[test]
fn equal_arguments_give_equal_outcomes_to_the_bit() {
    let load = sample();
    for name in ["forebay", "power-of-two"] {
        let calm = fleet(name, &[]);
        let faults = fleet(name, &["crash:1@20+15", "slow:2@10*0.5", "drain:3@30+20"]);
        let stale = Setup {
            balancers: 8,
            reports: Reports::Every(Duration::from_millis(250)),
            report_loss: 0.1,
            speed_spread: 0.2,
            ..faults.clone()
        };
        for setup in [calm, faults, stale] {
            let [first, second] = [(), ()].map(|()| at(&load, &setup, FULL, 1));
            assert_eq!(first, second, "{name}");
            assert_ne!(first, at(&load, &setup, FULL, 2), "{name}");
        }
    }
}

#[test]
fn without_faults_every_request_of_every_sample_is_answered() {
    for sample in &SAMPLES {
        let load = Workload::new(&sample.read(Some(150)).unwrap());
        for name in ["forebay", "least-requests"] {
            for share in [CALM, 2.0] {
                let outcome = at(&load, &fleet(name, &[]), share, 1);
                assert_eq!(outcome.failed, 0, "{} {name} {share}", sample.name);
            }
        }
    }
}

#[test]
fn a_crash_fails_none_that_had_not_begun() {
    let load = sample();
    for name in ["forebay", "least-requests"] {
        // Many times more wait than run.
        let setup = |faults: &[&str]| Setup {
            max_seqs: 4,
            ..fleet(name, faults)
        };
        let mut failed = 0;
        for fault in ["crash:1@20", "crash:2@35+10", "crash:3@50", "crash:4@65+1"] {
            let outcome = at(&load, &setup(&[fault]), 2.0, 1);
            assert!(outcome.failed <= 4, "{name} {fault}: {}", outcome.failed);
            failed += outcome.failed;
        }
        assert!(failed > 0, "{name}: streams break with their engine");
        // Nobody has a token yet: all of it goes elsewhere.
        let burst = Setup {
            spread: Spread::Burst,
            ..setup(&["crash:1@0.02"])
        };
        assert_eq!(at(&load, &burst, 2.0, 1).failed, 0, "{name}");
    }
}

#[test]
fn a_drained_worker_gets_nothing_new() {
    let load = sample();
    for name in ["forebay", "least-requests"] {
        let run = |faults: &[&str]| {
            let setup = Setup {
                workers: 2,
                ..fleet(name, faults)
            };
            let outcome = at(&load, &setup, CALM, 1);
            assert_eq!(outcome.failed, 0, "{name}");
            outcome
        };
        assert_eq!(least_busy(&run(&["drain:1@0"])), Duration::ZERO, "{name}");
        let whole = least_busy(&run(&[]));
        let early = least_busy(&run(&["drain:1@20"]));
        // It ends what it has, and no more.
        let most = Duration::from_secs(20 + 30);
        assert!(
            early <= most && most < whole / 2,
            "{name}: {early:?} of {whole:?}"
        );
        let back = least_busy(&run(&["drain:1@20+60"]));
        assert!(back > early, "{name}: what is undrained works again");
    }
}

#[test]
fn at_a_high_load_forebay_keeps_targets_that_the_usual_rules_miss() {
    let load = Workload::new(&Trace::sample(None).unwrap());
    for share in [0.8, FULL] {
        let [ours, least, turns] = ["forebay", "least-requests", "round-robin"]
            .map(|name| at(&load, &fleet(name, &[]), share, 1).attainment());
        eprintln!("{share}: {ours:.3}, {least:.3} and {turns:.3} in time");
        assert!(ours > 0.9, "{ours} at {share}");
        assert!(
            ours > least + 0.15 && ours > turns + 0.15,
            "{share}: {ours}, {least}, {turns}"
        );
    }
}

#[test]
fn a_thousand_requests_at_one_instant_are_spread_by_eight_balancers_that_know_nothing_of_each_other()
 {
    let load = thousand();
    for reports in [
        Reports::Every(Duration::from_millis(250)),
        Reports::Deployed,
    ] {
        let setup = Setup {
            workers: 8,
            balancers: 8,
            reports,
            ..fleet("forebay", &[])
        };
        let outcome = run(&load, &setup, 1e9, 1);
        assert_eq!(outcome.failed, 0);
        let busiest = outcome.max_over_mean;
        assert!(busiest <= 1.3, "{busiest} with {reports:?}");
    }
}

#[test]
fn eight_balancers_with_old_reports_place_nearly_as_well_as_one_that_sees_all() {
    let load = sample();
    let with = |balancers, reports, check| {
        let setup = Setup {
            balancers,
            reports,
            check,
            ..fleet("forebay", &[])
        };
        let seeds = 1..=3;
        let kept = seeds.map(|seed| at(&load, &setup, FULL, seed).attainment());
        kept.sum::<f64>() / 3.0
    };
    let fresh = with(1, Reports::Fresh, Check::Ask);
    let old = Reports::Every(Duration::from_millis(250));
    for (reports, check) in [
        (old, Check::Veto),
        (old, Check::Ask),
        (old, Check::AskFirst),
        (old, Check::Reserve),
        (Reports::Deployed, Check::Ask),
    ] {
        let kept = with(8, reports, check);
        assert!(kept > fresh - 0.02, "{kept}, not {fresh}: {check:?}");
    }
}

#[test]
fn reports_that_are_rare_or_lost_make_nobody_suspect_and_cost_little() {
    let load = sample();
    let with = |reports, report_loss| {
        let setup = Setup {
            balancers: 8,
            reports,
            report_loss,
            ..fleet("forebay", &[])
        };
        let runs = (1..=2).map(|seed| at(&load, &setup, FULL, seed));
        let (kept, hits): (Vec<f64>, Vec<f64>) =
            runs.map(|run| (run.attainment(), run.hit_ratio)).unzip();
        (
            kept.iter().sum::<f64>() / 2.0,
            hits.iter().sum::<f64>() / 2.0,
        )
    };
    let every = |ms| Reports::Every(Duration::from_millis(ms));
    let (fresh, fresh_hits) = with(Reports::Fresh, 0.0);
    for (reports, lost) in [(every(1_000), 0.0), (every(250), 0.3)] {
        let (kept, hits) = with(reports, lost);
        assert!(kept > fresh - 0.05, "{kept}, not {fresh}: {reports:?}");
        assert!(hits > fresh_hits * 0.95, "{hits}, not {fresh_hits}");
    }
}
