//! The simulator beside the real binaries: the same requests at the same moments, the same workers.

use std::time::Duration;

use forebay_scheduler::model::Profile;
use forebay_sim::fleet::{self, Reports, Setup, Spread, Workload};
use forebay_sim::replay;
use forebay_sim::trace::Trace;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::figures::{Figures, in_engine_blocks};
use crate::harness::Fleet;

const WORKERS: u32 = 4;
/// Engines are so much faster than their profile, so that a run takes a minute and a half; slow enough
/// that two cores are far from busy, and an iteration is long beside what sockets take.
const ENGINE_SPEED: f64 = 2.0;
const KV_TOKENS: u64 = 3_000_000;
/// Chance alone moves simulated figures by so much; the mean of these is compared.
const SEEDS: u64 = 8;

/// The beginning of the shipped sample, spread inside its quantum once for both, so many seconds long.
fn trace(requests: usize, seconds: f64) -> Trace {
    let mut trace = Trace::sample(Some(requests)).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    for request in &mut trace.requests {
        request.at += trace.quantum.mul_f64(rng.random());
    }
    trace.quantum = Duration::ZERO;
    trace.requests.sort_by_key(|request| request.at);
    let first = trace.requests[0].at;
    let last = trace.requests[trace.requests.len() - 1].at;
    let slower = seconds / (last - first).as_secs_f64();
    for request in &mut trace.requests {
        request.at = (request.at - first).mul_f64(slower);
    }
    trace
}

fn simulated(trace: Trace) -> Figures {
    let load = Workload::new(&in_engine_blocks(trace));
    let setup = Setup {
        workers: WORKERS,
        reports: Reports::Deployed,
        profile: Profile::default().at_speed(ENGINE_SPEED),
        kv_tokens: KV_TOKENS,
        // The arrivals are those of the trace.
        spread: Spread::Burst,
        ..Setup::default()
    };
    let seed = |seed| {
        let outcome = fleet::run(&load, &setup, load.rate(), seed);
        assert_eq!(outcome.failed, 0);
        let figures = Figures::simulated(&outcome);
        figures.print(&format!("seed {seed}"));
        figures
    };
    let all: Vec<Figures> = (1..=SEEDS).map(seed).collect();
    let mean = Figures::mean(&all);
    mean.print("simulated");
    mean
}

async fn measured(trace: Trace) -> Figures {
    let (workers, speed) = (WORKERS.to_string(), ENGINE_SPEED.to_string());
    let kv_tokens = KV_TOKENS.to_string();
    let fleet = Fleet::start(&[
        "--workers",
        &workers,
        "--engine-speed",
        &speed,
        "--engine-kv-tokens",
        &kv_tokens,
    ]);
    let mut lines = Vec::new();
    let config = replay::Config::new(trace, fleet.url.clone());
    let report = replay::run_each(config, |_| {}, |line| lines.push(line))
        .await
        .unwrap();
    assert_eq!(report.errors, 0, "{:?}", report.errors_by);
    eprintln!("sent late, in ms: {:?}", report.send_lag_ms);
    let figures = Figures::measured(&lines);
    figures.print("measured");
    figures
}

async fn differ(requests: usize, seconds: f64) -> (Figures, Figures) {
    let trace = trace(requests, seconds);
    let simulated = simulated(trace.clone());
    (measured(trace).await, simulated)
}

/// By which share the measured figure is more or less than the simulated one.
fn apart(what: &str, measured: f64, simulated: f64) -> f64 {
    let ratio = measured / simulated;
    eprintln!("{what}: {ratio:.3} of the simulated one");
    (ratio - 1.0).abs()
}

/// Takes a quiet machine and two minutes:
/// `cargo test -p forebay --test fleet within_10_percent -- --ignored --nocapture`.
/// `FOREBAY_DIFFERENTIAL_SECONDS` offers the same requests in another time than 90 s.
/// `docs/evidence/differential.md` has the figures of several runs, and what differs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a quiet machine and two minutes"]
async fn the_simulator_says_what_the_real_fleet_does_within_10_percent() {
    let seconds = std::env::var("FOREBAY_DIFFERENTIAL_SECONDS");
    let seconds = seconds.map_or(90.0, |text| text.parse().unwrap());
    let (measured, simulated) = differ(300, seconds).await;
    let apart = [
        apart("ttft p50", measured.ttft_p50, simulated.ttft_p50),
        apart("ttft p99", measured.ttft_p99, simulated.ttft_p99),
    ];
    assert!(apart.iter().all(|share| *share <= 0.1), "{apart:?}");
}

/// Few requests and wide bounds: what is wrong by a factor shows, whatever else the machine does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_simulator_says_roughly_what_a_short_run_of_the_real_fleet_does() {
    let mut tries = Vec::new();
    for _ in 0..3 {
        let (measured, simulated) = differ(80, 24.0).await;
        let apart = [
            apart("ttft p50", measured.ttft_p50, simulated.ttft_p50),
            apart("ttft p90", measured.ttft_p90, simulated.ttft_p90),
            apart("tpot p50", measured.tpot_p50, simulated.tpot_p50),
        ];
        if apart.iter().all(|share| *share <= 0.25) {
            return;
        }
        tries.push(apart);
    }
    panic!("{tries:?}");
}
