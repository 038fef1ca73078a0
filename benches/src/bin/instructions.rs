//! Do those steps that every request takes still take as few instructions as they did?
//!
//! Times differ from run to run and machine to machine by more than a regression does; instructions hardly
//! do. Each workload is deterministic and runs in a process of its own under callgrind, which counts between
//! entering and leaving one function, so that what prepares it is not counted. The figures are compared with
//! those that are committed in `benches/instructions.toml`: a tenth more, or a third less, fails.
//!
//! `cargo run --release -p forebay-benches --bin instructions [-- --accept]`

#![allow(clippy::print_stdout, clippy::print_stderr)] // its result

use std::collections::BTreeMap;
use std::hint::black_box;
use std::process::{Command, ExitCode};
use std::time::Duration;

use forebay_benches::bodies;
use forebay_benches::fleets::{Fleet, held_by_a_tenth, world};
use forebay_proto::{FingerprintKey, Now, WorkerId};
use forebay_scheduler::fingerprint::{Endpoint, RenderProfile, Root, Settings, read};
use forebay_scheduler::index::{IndexWriter, PrefixIndex};
use forebay_scheduler::model::Targets;
use forebay_scheduler::policy::{self, Request};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// A step of every request.
enum Step {
    Fingerprint(fn() -> String),
    Lookup,
    LookupInVain,
    /// Among so many workers.
    Decision(u32),
}

impl Step {
    fn run(&self, times: u32) {
        match self {
            Self::Fingerprint(body) => fingerprint(&body(), times),
            Self::Lookup => lookup(times),
            Self::LookupInVain => lookup_in_vain(times),
            Self::Decision(workers) => decision(*workers, times),
        }
    }
}

/// What is counted: its name, how often it is done, and what it is.
const WORKLOADS: [(&str, u32, Step); 6] = [
    (
        "fingerprint of an agent's turn of 415 KB",
        2,
        Step::Fingerprint(bodies::agents_turn),
    ),
    (
        "fingerprint of 408 KB of escaped Chinese",
        2,
        Step::Fingerprint(bodies::escaped_chinese),
    ),
    (
        "lookup of 128 chunks, held in part by 40 of 200 workers",
        200,
        Step::Lookup,
    ),
    (
        "lookup of 128 chunks that nobody holds",
        1_000,
        Step::LookupInVain,
    ),
    ("decision among 100 workers", 500, Step::Decision(100)),
    ("decision among 1,000 workers", 200, Step::Decision(1_000)),
];

/// Where the figures are committed, seen from the directory of this package.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.toml");
/// More than this, relative to the committed figure, is a regression.
const MORE: f64 = 1.10;
/// Less than this should be kept: accept it.
const LESS: f64 = 0.67;
const HOW: &str = "\
# Instructions of one operation, counted by callgrind; the x86-64 release build.
# Made by: cargo run --release -p forebay-benches --bin instructions -- --accept
";

#[derive(Default, Serialize, Deserialize)]
struct Figures {
    instructions: BTreeMap<String, u64>,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--count", at] => {
            let number: usize = at.parse().expect("a workload's number");
            let (_, times, step) = &WORKLOADS[number];
            step.run(*times);
            ExitCode::SUCCESS
        }
        [] => compare(&count(), &committed()),
        ["--accept"] => {
            let figures = toml::to_string(&count()).expect("plain data serialises");
            std::fs::write(FILE, format!("{HOW}\n{figures}")).expect("the file can be written");
            println!("{FILE} is written");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: instructions [--accept]");
            ExitCode::from(2)
        }
    }
}

fn committed() -> Figures {
    let text = std::fs::read_to_string(FILE).unwrap_or_default();
    toml::from_str(&text).expect("benches/instructions.toml is TOML")
}

fn compare(counted: &Figures, committed: &Figures) -> ExitCode {
    let (mut more, mut less) = (false, false);
    println!("{:>12} {:>12} {:>8}", "instructions", "committed", "ratio");
    for (name, now) in &counted.instructions {
        let before = committed.instructions.get(name).copied().unwrap_or(0);
        let ratio = *now as f64 / before as f64;
        more |= ratio > MORE;
        less |= ratio < LESS;
        println!("{now:>12} {before:>12} {ratio:>8.3}  {name}");
    }
    let gone = committed
        .instructions
        .keys()
        .any(|name| !counted.instructions.contains_key(name));
    if !(more || less || gone) {
        return ExitCode::SUCCESS;
    }
    let why = if more {
        "a step of every request takes more than a tenth more instructions than committed"
    } else {
        "figures are out of date, which would hide a regression"
    };
    eprintln!(
        "{why}. If that is meant, or the compiler is another one, accept the new figures and commit them:\n  \
         cargo run --release -p forebay-benches --bin instructions -- --accept"
    );
    ExitCode::FAILURE
}

/// Runs every workload under callgrind.
fn count() -> Figures {
    let myself = std::env::current_exe().expect("this program has a path");
    let mut figures = Figures::default();
    for (at, (name, times, _)) in WORKLOADS.iter().enumerate() {
        let run = Command::new("valgrind")
            .args([
                "--tool=callgrind",
                "--callgrind-out-file=/dev/null",
                "--collect-atstart=no",
            ])
            .arg("--toggle-collect=*measured*")
            .arg(&myself)
            .args(["--count", &at.to_string()])
            .output()
            .expect("valgrind is installed");
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "{name}: {said}");
        let collected = said
            .lines()
            .find_map(|line| line.split_once("Collected : "));
        let collected = collected.and_then(|(_, number)| number.trim().parse::<u64>().ok());
        let collected = collected.unwrap_or_else(|| unreadable(&said));
        assert!(collected > 0, "{name}: nothing was counted");
        figures
            .instructions
            .insert((*name).into(), collected / u64::from(*times));
    }
    figures
}

#[allow(clippy::panic)] // there is nothing to compare
fn unreadable(said: &str) -> u64 {
    panic!("valgrind says no \"Collected : NUMBER\": {said}")
}

/// What callgrind counts: by this name it is told where to begin and where to end.
#[inline(never)]
fn measured(work: &mut dyn FnMut()) {
    work();
}

fn repeat(times: u32, mut once: impl FnMut()) {
    // What is allocated once stays out.
    once();
    measured(&mut || (0..times).for_each(|_| once()));
}

fn fingerprint(body: &str, times: u32) {
    let key = FingerprintKey {
        epoch: 1,
        bytes: [7; 16],
    };
    let settings = Settings {
        key: &key,
        root: Root {
            pool: "default",
            model: "m",
            adapter: None,
            scope: "tenant",
        },
        profile: &RenderProfile::default(),
        chunk_bytes: 256,
    };
    repeat(times, || {
        black_box(read(Endpoint::Chat, black_box(body.as_bytes()), &settings))
            .expect("it is a chat");
    });
}

const CHUNKS: usize = 128;

/// 200 workers and 100 families of prompts, each held by 40 of them up to a random depth.
fn families() -> (PrefixIndex, Vec<Vec<u64>>) {
    let mut rng = StdRng::seed_from_u64(1);
    let mut index = IndexWriter::default();
    let families: Vec<Vec<u64>> = (0..100)
        .map(|_| (0..CHUNKS).map(|_| rng.random()).collect())
        .collect();
    for (family, chunks) in (0_u32..).zip(&families) {
        for holder in 0..40 {
            let worker = WorkerId(1 + (family * 7 + holder * 5) % 200);
            let depth = rng.random_range(1..=CHUNKS);
            for (tokens, chunk) in (75_u32..).step_by(75).zip(&chunks[..depth]) {
                index.store(worker, *chunk, tokens);
            }
        }
    }
    (index.index().clone(), families)
}

fn lookup(times: u32) {
    let (index, families) = families();
    let mut hits = Vec::new();
    let mut turn = 0;
    repeat(times, || {
        turn += 1;
        index.hits(black_box(&families[turn % families.len()]), &mut hits);
        black_box(&hits);
    });
}

fn lookup_in_vain(times: u32) {
    let (index, families) = families();
    let strange: Vec<u64> = families[0].iter().map(|chunk| chunk ^ 1).collect();
    let mut hits = Vec::new();
    repeat(times, || {
        index.hits(black_box(&strange), &mut hits);
        black_box(&hits);
    });
}

/// A busy fleet, a tenth of which holds a part of the prompt.
fn decision(workers: u32, times: u32) {
    let mut rng = StdRng::seed_from_u64(1);
    let mut view = world(workers, Fleet::Busy, &mut rng);
    let hits = held_by_a_tenth(workers, &mut rng);
    let (now, policy) = (Now::at(Duration::from_millis(100)), policy::default());
    let mut turn = 0;
    repeat(times, || {
        turn += 1;
        let conversation = rng.random();
        let request = Request {
            prompt_tokens: rng.random_range(1.0..16_000.0),
            targets: Targets {
                ttft_ms: 1_500.0,
                tpot_ms: 100.0,
            },
            hits: &hits,
            conversation: Some(conversation),
            head: conversation,
            turn,
            ..Request::of("m")
        };
        black_box(view.pick(now, &request, policy, &mut rng)).expect("all are open");
    });
}
