//! Question: what does picking a worker cost as the fleet grows, and how much of it is more than
//! looking at every load once?
//!
//! Workload: N workers of 64 slots, random loads in requests and tokens, 8 own bookings on each; one
//! model; a tenth of the workers hold a part of the prompt, whose length is drawn from 1 to 16,000
//! tokens. Every policy is asked. The rule of this project also gets the worlds in which its bound rules
//! least out: an idle fleet of equals, and targets that no worker keeps. Reference: the least of N loads
//! in a plain vector. After warm-up no decision allocates; the benchmark fails if one does.
//! Then what a decision with its receipt costs, which a balancer makes unless it is told to keep none, and
//! what it takes to pack that, which is done after the view's lock is gone.
//! Last, what a booking costs from its making to its end. `cargo bench -p forebay-benches --bench pick`.

#![allow(clippy::print_stdout)] // a benchmark's result

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forebay_benches::fleets::{Fleet, held_by_a_tenth, world};
use forebay_benches::{Timed, on_core};
use forebay_proto::{Now, WorkerId};
use forebay_scheduler::model::Targets;
use forebay_scheduler::policy::{self, Policy, Request};
use forebay_scheduler::{Versions, Work};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const PICKS: usize = 20_000;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, counted.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[allow(unsafe_code)] // it hands everything on
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

/// One row: decisions about prompts of random length.
fn row(name: &str, policy: &dyn Policy, workers: u32, fleet: Fleet, targets: Targets) {
    let mut rng = StdRng::seed_from_u64(1);
    let mut view = world(workers, fleet, &mut rng);
    let hits = held_by_a_tenth(workers, &mut rng);
    let prompts: Vec<f64> = (0..1_024)
        .map(|_| rng.random_range(1.0..16_000.0))
        .collect();
    let now = Now::at(Duration::from_millis(100));
    let mut turn = 0;
    let mut decide = || {
        turn += 1;
        let conversation = rng.random();
        let request = Request {
            prompt_tokens: prompts[turn as usize % prompts.len()],
            targets,
            hits: match fleet {
                Fleet::Busy => &hits,
                Fleet::Idle => &[],
            },
            conversation: Some(conversation),
            head: conversation,
            turn,
            ..Request::of("m")
        };
        black_box(view.pick(now, &request, policy, &mut rng)).expect("all are open");
    };
    let picks = if name == "bounded-hash" {
        PICKS / 20
    } else {
        PICKS
    };
    (0..picks / 10).for_each(|_| decide());
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    (0..picks).for_each(|_| decide());
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    let began = on_core();
    (0..picks).for_each(|_| decide());
    let each = (on_core() - began).as_secs_f64() / picks as f64;
    assert_eq!(allocations, 0, "{name}: a decision allocates");
    let picked = Timed::run(picks, decide);
    let loads: Vec<(u32, u64)> = (0..workers).map(|_| rng.random()).collect();
    let plain = Timed::run(PICKS, || {
        black_box(black_box(&loads).iter().min());
    });
    let (p50, p99) = (picked.quantile(0.5), picked.quantile(0.99));
    let (reference, rate) = (plain.quantile(0.5), 1.0 / each);
    let ratio = p50.as_secs_f64() / reference.as_secs_f64();
    println!(
        "{name:>22} {workers:>8} {p50:>11.2?} {p99:>11.2?} {rate:>12.0} {reference:>11.2?} {ratio:>7.1}"
    );
}

/// The usual times of a decision without its receipt, with it, and of packing it; and how many bytes that is.
fn with_receipt(workers: u32) -> ([Duration; 3], usize) {
    let mut rng = StdRng::seed_from_u64(1);
    let mut view = world(workers, Fleet::Busy, &mut rng);
    let (now, policy) = (Now::at(Duration::from_millis(100)), policy::default());
    let request = Request {
        prompt_tokens: 4_000.0,
        ..Request::of("m")
    };
    let picked = Timed::run(PICKS, || {
        black_box(view.pick(now, &request, policy, &mut rng)).expect("all are open");
    });
    let explained = Timed::run(PICKS, || {
        let told = view.explain(now, &request, policy, &mut rng, Versions::default());
        black_box(told).0.expect("all are open");
    });
    let (_, receipt) = view.explain(now, &request, policy, &mut rng, Versions::default());
    let packed = Timed::run(PICKS, || drop(black_box(black_box(&receipt).packed())));
    let times = [picked, explained, packed].map(|timed| timed.quantile(0.5));
    (times, receipt.packed().len())
}

fn main() {
    // A name's part leaves the others out.
    let only = std::env::args().nth(1).filter(|arg| !arg.starts_with("--"));
    let row = |name: &str, policy, workers, fleet, targets| {
        if only.as_ref().is_none_or(|part| name.contains(part)) {
            row(name, policy, workers, fleet, targets);
        }
    };
    println!(
        "{:>22} {:>8} {:>11} {:>11} {:>12} {:>11} {:>7}",
        "policy", "workers", "p50", "p99", "decisions/s", "plain p50", "ratio"
    );
    let all = policy::ALL.into_iter();
    for (policy, workers) in all.flat_map(|p| [(p, 10), (p, 100), (p, 1_000)]) {
        row(policy.name(), policy, workers, Fleet::Busy, Targets::NONE);
    }
    let ours = policy::default();
    let promised = |ttft_ms, tpot_ms| Targets { ttft_ms, tpot_ms };
    for (name, fleet, targets) in [
        ("forebay, promised", Fleet::Busy, promised(1_500.0, 100.0)),
        ("forebay, all late", Fleet::Busy, promised(1.0, 100.0)),
        ("forebay, slow tokens", Fleet::Busy, promised(1e6, 1.0)),
        ("forebay, idle equals", Fleet::Idle, Targets::NONE),
    ] {
        row(name, ours, 1_000, fleet, targets);
    }
    if only.is_some() {
        return;
    }
    for workers in [10, 100, 1_000] {
        let ([picked, explained, packed], bytes) = with_receipt(workers);
        println!(
            "forebay's receipt, {workers} workers: p50 {explained:.2?}, without {picked:.2?}; packed in {packed:.2?} into {bytes} bytes"
        );
    }
    let mut view = world(1_000, Fleet::Busy, &mut StdRng::seed_from_u64(1));
    let booked = Timed::run(PICKS, || {
        let booking = view.book(WorkerId(500), Work::default());
        view.accepted(booking, 2);
        view.released(booking, None);
    });
    let (p50, p99) = (booked.quantile(0.5), booked.quantile(0.99));
    println!("booked, accepted and released: p50 {p50:.2?}, p99 {p99:.2?}");
}
