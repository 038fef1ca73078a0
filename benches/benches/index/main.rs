//! Question: what does it cost to look up who holds a prompt, to keep that up to date, and to remember
//! it, beside a sharded map of holders and a trie?
//!
//! Workload: see `workload`; 1,000 workers and ten million pairs of a chunk and a worker, prompts of 128
//! chunks that continue a random conversation. All three are filled alike, have to answer a thousand
//! prompts alike, are read by one thread, then read by it while another one changes paths as fast as it
//! can: evicts a conversation from its end, and one time in sixteen its system prompt too, and stores it
//! again. A change is one chunk of one worker. Memory is what was allocated, rounded as glibc does.
//!
//! The goals of the design: p50 1 µs, p99 5 µs, 40 bytes a pair, 1 M changes a second of a core while
//! reading. `cargo bench -p forebay-benches --bench index`; `-- --pairs 1000000` where memory is short.

// Its result; and a run that cannot go on says so.
#![allow(clippy::print_stdout, clippy::panic)]

mod rivals;
mod workload;

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use forebay_benches::{Timed, on_core};
use forebay_proto::WorkerId;
use forebay_scheduler::index::Hit;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::rivals::{Forebay, Rival, Sharded, Trie};
use crate::workload::{PROMPT, Workload};

const CHECKED: usize = 1_000;

static BYTES: AtomicUsize = AtomicUsize::new(0);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What glibc takes for an allocation.
const fn rounded(bytes: usize) -> usize {
    let whole = (bytes + 8).next_multiple_of(16);
    if whole < 32 { 32 } else { whole }
}

#[allow(unsafe_code)] // it hands everything on
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(rounded(layout.size()), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        BYTES.fetch_sub(rounded(layout.size()), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Lookups in the prefix index, beside two other structures.
#[derive(Parser)]
struct Args {
    /// Pairs of a chunk and a worker that holds it.
    #[arg(long, default_value_t = 10_000_000)]
    pairs: usize,
    /// Workers.
    #[arg(long, default_value_t = 1_000)]
    workers: u32,
    /// Lookups that are timed, of each.
    #[arg(long, default_value_t = 200_000)]
    lookups: usize,
    /// Seconds of changes while reading, of each.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one structure costs.
struct Costs {
    name: &'static str,
    bytes_a_pair: f64,
    /// Stores a second of a core into the growing structure.
    filled: f64,
    read: Timed,
    read_while_changed: Timed,
    /// A second of a core, and of time.
    changed: (f64, f64),
}

fn main() {
    let args = Args::parse();
    let workload = Workload::new(args.pairs, args.workers);
    println!(
        "{} pairs, {} workers, {} conversations, prompts of {PROMPT} chunks",
        workload.pairs,
        args.workers,
        workload.len(),
    );
    for breaks in [1, 2, 4, 8, 16, 32, 64, 128] {
        staircase(args.workers, breaks, args.lookups / 100);
    }
    let (forebay, answers) = costs::<Forebay>(&args, &workload, also);
    let (sharded, of_sharded) = costs::<Sharded>(&args, &workload, |_, _, _| {});
    let (trie, of_trie) = costs::<Trie>(&args, &workload, |_, _, _| {});
    assert!(answers == of_sharded && answers == of_trie, "they differ");
    memory(
        (forebay.bytes_a_pair * workload.pairs as f64) as usize,
        args.lookups,
    );
    let all = [forebay, sharded, trie];
    println!(
        "{:>16} {:>8} {:>9} {:>9} {:>11} {:>11} {:>11} {:>11} {:>11}",
        "",
        "B/pair",
        "p50",
        "p99",
        "changed p50",
        "changed p99",
        "M/s a core",
        "M/s",
        "M/s filling"
    );
    for it in &all {
        let [p50, p99] = [0.5, 0.99].map(|at| it.read.quantile(at));
        let [changed_p50, changed_p99] = [0.5, 0.99].map(|at| it.read_while_changed.quantile(at));
        let (core, time) = it.changed;
        println!(
            "{:>16} {:>8.1} {p50:>9.2?} {p99:>9.2?} {changed_p50:>11.2?} {changed_p99:>11.2?} {:>11.2} {:>11.2} {:>11.2}",
            it.name,
            it.bytes_a_pair,
            core / 1e6,
            time / 1e6,
            it.filled / 1e6,
        );
    }
    let [ours, others @ ..] = &all;
    for it in others {
        let ratio = |of: fn(&Costs) -> &Timed, at| {
            let times = [it, ours].map(|costs| of(costs).quantile(at).as_secs_f64());
            times[0] / times[1]
        };
        println!(
            "{} / {}: p50 {:.1}, p99 {:.1}, while changed p50 {:.1}, p99 {:.1}, bytes {:.1}, changes {:.2}",
            it.name,
            ours.name,
            ratio(|it| &it.read, 0.5),
            ratio(|it| &it.read, 0.99),
            ratio(|it| &it.read_while_changed, 0.5),
            ratio(|it| &it.read_while_changed, 0.99),
            it.bytes_a_pair / ours.bytes_a_pair,
            it.changed.0 / ours.changed.0,
        );
    }
}

/// What nobody can do without: fetching from as much memory.
fn memory(bytes: usize, times: usize) {
    let words = vec![1_usize; bytes / 8];
    let mut state = (StdRng::seed_from_u64(4), [0; 16]);
    let prepare = |(rng, places): &mut (StdRng, [usize; 16])| {
        *places = std::array::from_fn(|_| rng.random_range(0..words.len()));
    };
    let one_by_one = Timed::prepared(times, &mut state, prepare, |(_, places)| {
        let mut zero = 0;
        for at in *places {
            zero = words[(at + zero) % words.len()] - 1;
        }
        black_box(zero);
    });
    let at_once = Timed::prepared(times, &mut state, prepare, |(_, places)| {
        black_box(places.map(|at| words[at]));
    });
    let [one_by_one, at_once] = [one_by_one, at_once].map(|it| it.quantile(0.5));
    println!("16 words from as much memory: one by one {one_by_one:.2?}, at once {at_once:.2?}");
}

/// Measures one; returns also what it says of some prompts, and shows `also` to it before it is changed.
fn costs<R: Rival>(
    args: &Args,
    workload: &Workload,
    also: impl FnOnce(&R, &Args, &Workload),
) -> (Costs, Vec<Vec<Hit>>) {
    let before = BYTES.load(Ordering::Relaxed);
    let rival = R::new();
    let began = on_core();
    let stores = fill(&rival, workload);
    let filled = stores as f64 / (on_core() - began).as_secs_f64();
    let bytes = BYTES.load(Ordering::Relaxed) - before;
    let mut asked = Asked::new(workload, args.workers);
    let answers = (0..CHECKED).map(|_| {
        asked.next();
        rival.hits(&asked.chunks, &mut asked.hits);
        asked.hits.sort_unstable_by_key(|hit| hit.worker);
        asked.hits.clone()
    });
    let answers = answers.collect();
    let allocations = ALLOCATIONS.load(Ordering::Relaxed);
    let read = Timed::prepared(args.lookups, &mut asked, Asked::next, |asked| {
        rival.hits(black_box(&asked.chunks), &mut asked.hits);
    });
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - allocations;
    assert!(allocations < 20, "{}: lookups allocate", R::NAME);
    also(&rival, args, workload);
    let (read_while_changed, changed) = while_changed(&rival, args, workload);
    let costs = Costs {
        name: R::NAME,
        bytes_a_pair: bytes as f64 / workload.pairs as f64,
        filled,
        read,
        read_while_changed,
        changed,
    };
    (costs, answers)
}

/// The worst that a prompt can be: all workers hold its first chunk, and after each of `breaks` places some
/// hold no more of it.
fn staircase(workers: u32, breaks: usize, lookups: usize) {
    let rival = Forebay::new();
    let mut rng = StdRng::seed_from_u64(6);
    let path: [u64; PROMPT] = std::array::from_fn(|_| rng.random());
    let step = PROMPT / breaks;
    for worker in 0..workers {
        let holds = step * (1 + worker as usize % breaks);
        rival.store(WorkerId(worker), &path[..holds]);
    }
    let mut hits = Vec::with_capacity(workers as usize);
    let took = Timed::run(lookups, || rival.index.hits(black_box(&path), &mut hits));
    assert_eq!(hits.len(), workers as usize);
    let (p50, p99) = (took.quantile(0.5), took.quantile(0.99));
    println!(
        "{workers} holders that become fewer at {breaks} places: p50 {p50:.2?}, p99 {p99:.2?}"
    );
}

/// Returns how many chunks were stored, those counted that were there.
fn fill(rival: &impl Rival, workload: &Workload) -> usize {
    let mut stores = 0;
    let mut path = [0; PROMPT];
    for conversation in 0..workload.len() {
        workload.prompt(conversation, &mut path);
        for holder in workload.holders(conversation) {
            rival.store(WorkerId(holder.worker), &path[..holder.chunks]);
            stores += holder.chunks;
        }
    }
    stores
}

/// Prompts, one after the other, and room for what is said of them.
struct Asked<'a> {
    workload: &'a Workload,
    rng: StdRng,
    chunks: [u64; PROMPT],
    hits: Vec<Hit>,
}

impl<'a> Asked<'a> {
    fn new(workload: &'a Workload, workers: u32) -> Self {
        Self {
            workload,
            rng: StdRng::seed_from_u64(2),
            chunks: [0; PROMPT],
            hits: Vec::with_capacity(workers as usize),
        }
    }

    fn next(&mut self) {
        let conversation = self.rng.random_range(0..self.workload.len());
        self.workload.prompt(conversation, &mut self.chunks);
    }
}

fn while_changed(rival: &impl Rival, args: &Args, workload: &Workload) -> (Timed, (f64, f64)) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut rng = StdRng::seed_from_u64(3);
            let (core, time) = (on_core(), Instant::now());
            let mut changes = 0;
            while !over.load(Ordering::Relaxed) {
                changes += change(rival, workload, &mut rng);
            }
            let (core, time) = (on_core() - core, time.elapsed());
            [core, time].map(|it| changes as f64 / it.as_secs_f64())
        });
        let until = Instant::now() + Duration::from_secs(args.seconds);
        let mut asked = Asked::new(workload, args.workers);
        let mut timed = Timed::default();
        while Instant::now() < until {
            for _ in 0..100 {
                asked.next();
                let began = Instant::now();
                rival.hits(black_box(&asked.chunks), &mut asked.hits);
                timed.add(began.elapsed());
            }
        }
        over.store(true, Ordering::Relaxed);
        let [core, time] = writer.join().expect("it does not panic");
        (timed, (core, time))
    })
}

/// Evicts what a worker holds of a conversation, and stores it again. Returns the number of changes.
fn change(rival: &impl Rival, workload: &Workload, rng: &mut StdRng) -> usize {
    let conversation = rng.random_range(0..workload.len());
    let mut path = [0; PROMPT];
    let shared = workload.prompt(conversation, &mut path);
    let Some(holder) = workload.holders(conversation).next() else {
        return 0;
    };
    let path = &path[..holder.chunks];
    let from = if rng.random_ratio(1, 16) {
        0
    } else {
        shared.min(path.len())
    };
    rival.remove(WorkerId(holder.worker), path, from);
    rival.store(WorkerId(holder.worker), path);
    path.len() - from + path.len()
}

/// How it depends on the number of hits, and what a balancer asks besides.
fn also(rival: &Forebay, args: &Args, workload: &Workload) {
    let mut asked = Asked::new(workload, args.workers);
    let mut by_hits: [Timed; 4] = std::array::from_fn(|_| Timed::default());
    let bounds = [10, 100, 500, usize::MAX];
    for _ in 0..args.lookups {
        asked.next();
        let began = Instant::now();
        rival.index.hits(black_box(&asked.chunks), &mut asked.hits);
        let took = began.elapsed();
        let which = bounds.iter().position(|most| asked.hits.len() <= *most);
        by_hits[which.unwrap_or(3)].add(took);
    }
    for (timed, most) in by_hits.iter().zip(["<= 10", "<= 100", "<= 500", "more"]) {
        let (p50, p99) = (timed.quantile(0.5), timed.quantile(0.99));
        println!(
            "{most:>8} hits: p50 {p50:>8.2?}, p99 {p99:>8.2?}, {} lookups",
            timed.len()
        );
    }
    let workers = args.workers as usize;
    let both = Timed::prepared(args.lookups, &mut asked, Asked::next, |asked| {
        rival.index.hits(black_box(&asked.chunks), &mut asked.hits);
        black_box(rival.index.conversation(&asked.chunks, workers));
    });
    let (p50, p99) = (both.quantile(0.5), both.quantile(0.99));
    println!("hits, then the conversation: p50 {p50:.2?}, p99 {p99:.2?}");
    let nothing = Timed::prepared(args.lookups, &mut asked, Asked::next, |asked| {
        black_box(&asked.chunks);
    });
    println!("of that, the clock: p50 {:.2?}", nothing.quantile(0.5));
    let began = Instant::now();
    rival.writer.lock().clear(WorkerId(0));
    let cleared = began.elapsed();
    let (mut rng, mut changes, began) = (StdRng::seed_from_u64(5), 0, on_core());
    while changes < args.pairs / 40 {
        changes += change(rival, workload, &mut rng);
    }
    let rate = changes as f64 / (on_core() - began).as_secs_f64() / 1e6;
    println!(
        "a worker cleared in {cleared:.2?}; then, while it is swept out, {rate:.2} M changes/s a core"
    );
}
