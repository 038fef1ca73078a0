//! What do balancer and agent cost between a client and its engine, beside plain proxies?
//!
//! One engine that does nothing but answer (a process of this program): directly, behind nginx, behind
//! Envoy, and behind a balancer and an agent of Forebay, all release builds on loopback. The proxies pass
//! bytes on; Forebay fingerprints the prompt, decides, books, carries it over QUIC with mutual TLS, splices
//! the body and counts tokens. Each of them has its turn in each round, in another order; figures are medians
//! over the rounds.
//!
//! * CPU: of the processes between (Forebay: both), for 1,000 requests on `--connections` connections, each
//!   waiting for its answer before it asks again.
//! * Latency: on two connections, so that nobody waits for a core: time to the first byte of the body beyond
//!   the direct one's, the median and the 0.99 quantile.
//!
//! A streamed answer is `--chunks` events, one at the end of each of the engine's iterations, which are
//! `--pace-ms` apart and common to all that run; one that is not streamed is one body of as many words.
//!
//! ```text
//! cargo build --release -p forebay
//! cargo bench -p forebay-benches --bench overhead -- --nginx nginx --envoy envoy
//! ```
//!
//! With `--before PATH` another build of `forebay` takes part in the same rounds, which is how a change is judged.

// Its result; and a run that cannot go on says so.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::panic)]

mod engine;
mod forebay;
mod load;
mod proxies;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use forebay_benches::servers::Servers;

use crate::load::{Load, Seen};

/// CPU and latency that balancer and agent add, beside nginx and Envoy.
#[derive(Parser, Clone)]
struct Args {
    /// Bytes of the prompts.
    #[arg(long, value_delimiter = ',', default_value = "1024,32768,409600")]
    prompts: Vec<usize>,
    /// Connections at once where CPU is measured.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// How often each is measured.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of one measurement.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Events of a streamed answer.
    #[arg(long, default_value_t = 16)]
    chunks: u32,
    /// Milliseconds between two of them.
    #[arg(long, default_value_t = 5)]
    pace_ms: u64,
    /// Measures only those whose names are given: direct, nginx, envoy, before, forebay.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// What runs balancer and agent. Default: `forebay` in the folder above this program's.
    #[arg(long)]
    forebay: Option<PathBuf>,
    /// Another build of it, which has its own turns in the same rounds: `before` in the result.
    #[arg(long)]
    before: Option<PathBuf>,
    /// Measures CPU only.
    #[arg(long)]
    cpu_only: bool,
    /// nginx; left out where there is none.
    #[arg(long, default_value = "nginx")]
    nginx: PathBuf,
    /// Envoy; left out where there is none.
    #[arg(long, default_value = "envoy")]
    envoy: PathBuf,
    /// Prints the process ids of balancer and agent, and loads them alone for so many seconds: for a profiler.
    #[arg(long)]
    profile: Option<u64>,
    /// Is the engine, at this address.
    #[arg(long, hide = true)]
    engine: Option<SocketAddr>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One way from a client to the engine.
struct Way {
    name: &'static str,
    address: SocketAddr,
    /// What is between; nothing of the direct one.
    servers: Servers,
    /// What has nothing to do with requests.
    _beside: Option<Servers>,
}

fn main() {
    let args = Args::parse();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(address) = args.engine {
        return runtime.block_on(engine::serve(address, args.chunks, args.pace_ms));
    }
    let beside = std::env::current_exe().unwrap();
    let beside = beside.parent().unwrap().to_owned();
    let program = args.forebay.clone();
    let program = program.unwrap_or_else(|| beside.join("../forebay"));
    if !program.exists() {
        return println!(
            "skipped: no {}; cargo build --release -p forebay",
            program.display()
        );
    }
    let dir = tempfile::tempdir_in(&beside).unwrap();
    runtime.block_on(compare(&args, &program, dir.path()));
}

async fn compare(args: &Args, program: &Path, dir: &Path) {
    let (_engine, engine) = start_engine(args).await;
    let mut ways = vec![Way {
        name: "direct",
        address: engine,
        servers: Servers::start([]),
        _beside: None,
    }];
    ways.extend(proxies::nginx(&args.nginx, dir, engine).await);
    ways.extend(proxies::envoy(&args.envoy, dir, engine).await);
    if let Some(before) = &args.before {
        ways.push(forebay::start("before", before, dir, engine).await);
    }
    ways.push(forebay::start("forebay", program, dir, engine).await);
    if let Some(seconds) = args.profile {
        return profile(args, ways.last_mut().unwrap(), seconds).await;
    }
    if !args.only.is_empty() {
        ways.retain(|way| args.only.iter().any(|name| name == way.name));
    }
    println!(
        "{} connections; streams of {} events {} ms apart; medians of {} rounds of {} s",
        args.connections, args.chunks, args.pace_ms, args.rounds, args.seconds
    );
    println!(
        "prompt   answer    way       requests/s  CPU s/1,000   first byte p50 ms (beyond direct)   p99 ms (beyond direct)"
    );
    for prompt in &args.prompts {
        for stream in [true, false] {
            let load = Load::new(*prompt, stream);
            let mut rounds: Vec<Vec<(Seen, Seen)>> = vec![vec![]; ways.len()];
            for round in 0..args.rounds {
                for turn in 0..ways.len() {
                    let at = (turn + round) % ways.len();
                    let way = &ways[at];
                    let busy = load
                        .run(way.address, &way.servers, args.connections, args.seconds)
                        .await;
                    let gentle = if args.cpu_only {
                        busy
                    } else {
                        load.run(way.address, &way.servers, 2, args.seconds).await
                    };
                    rounds[at].push((busy, gentle));
                }
            }
            report(*prompt, stream, &ways, &rounds);
        }
    }
}

async fn profile(args: &Args, way: &mut Way, seconds: u64) {
    println!("process ids: {:?}", way.servers.pids().collect::<Vec<_>>());
    let load = Load::new(args.prompts[0], true);
    let seen = load
        .run(way.address, &way.servers, args.connections, seconds)
        .await;
    println!(
        "{:.0} requests/s, {:.3} CPU s/1,000",
        seen.rate, seen.cpu_a_thousand
    );
}

async fn start_engine(args: &Args) -> (Servers, SocketAddr) {
    let [port] = forebay_benches::servers::free_ports::<1>();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut engine = Command::new(std::env::current_exe().unwrap());
    engine.args(["--engine", &address.to_string()]);
    engine.args(["--chunks", &args.chunks.to_string()]);
    engine.args(["--pace-ms", &args.pace_ms.to_string()]);
    let engine = Servers::start([engine]);
    load::wait_for(address, "/health").await;
    (engine, address)
}

fn report(prompt: usize, stream: bool, ways: &[Way], rounds: &[Vec<(Seen, Seen)>]) {
    let middle = |at: usize, of: &dyn Fn(&(Seen, Seen)) -> f64| median(rounds[at].iter().map(of));
    let direct = ways.iter().position(|way| way.name == "direct");
    let p50 = |at| middle(at, &|(_, gentle)| gentle.p50_ms);
    let p99 = |at| middle(at, &|(_, gentle)| gentle.p99_ms);
    let beyond = |value: f64, of: &dyn Fn(usize) -> f64| {
        direct.map_or(String::new(), |direct| {
            format!("({:+.2})", value - of(direct))
        })
    };
    for (at, way) in ways.iter().enumerate() {
        println!(
            "{:>6}   {}  {:<8} {:>10.0} {:>12.3} {:>14.2} {:<18} {:>10.2} {}",
            prompt,
            if stream { "stream" } else { "whole " },
            way.name,
            middle(at, &|(busy, _)| busy.rate),
            middle(at, &|(busy, _)| busy.cpu_a_thousand),
            p50(at),
            beyond(p50(at), &p50),
            p99(at),
            beyond(p99(at), &p99),
        );
    }
    let named = |name| ways.iter().position(|way| way.name == name);
    let Some(forebay) = named("forebay") else {
        return;
    };
    for other in ["nginx", "envoy", "before"] {
        if let Some(other_at) = named(other) {
            let ratios = rounds[forebay].iter().zip(&rounds[other_at]);
            let ratios: Vec<f64> = ratios
                .map(|(ours, theirs)| ours.0.cpu_a_thousand / theirs.0.cpu_a_thousand)
                .collect();
            let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
            let most = ratios.iter().copied().fold(0.0, f64::max);
            println!(
                "                   CPU of forebay / {other}: {:.2} ({least:.2} to {most:.2} in the rounds)",
                median(ratios)
            );
        }
    }
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
