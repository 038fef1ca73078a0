//! What is kept, for how long, and how it is found.

use std::time::{Duration, Instant};

use forebay_proto::{Now, Revision, WorkerId};
use forebay_scheduler::policy::{self, Request};
use forebay_scheduler::{Acceptance, Known, Load, MOST_CONSIDERED, Versions, View};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;

/// Receipts of a fleet of this many workers that report what fleets report.
fn receipts_of(workers: u32) -> impl FnMut() -> Receipt {
    let mut view = View::default();
    let (mut rng, now) = (StdRng::seed_from_u64(7), Now::at(Duration::from_secs(9)));
    let known = |id: u32| Known {
        name: format!("w{id}"),
        incarnation: incarnation(id),
        spec: forebay_proto::fleet::WorkerSpec {
            pool: "default".into(),
            advertise: "127.0.0.1:1".into(),
            engine: String::new(),
            models: vec!["meta-llama/Llama-3.1-70B-Instruct".into()],
            revision: String::new(),
            gpu_type: String::new(),
            gpu_count: 0,
            kv_tokens: 400_000,
            max_context_tokens: 131_072,
            adapters: Vec::new(),
            zone: String::new(),
            labels: Default::default(),
            slots: 64,
        },
        desired: forebay_proto::wire::fleet::Desired::Ready,
        departed: false,
    };
    view.set_known((1..=workers).map(known));
    for id in 1..=workers {
        view.connected(now, incarnation(id));
        // Nearly alike, so that nobody is ruled out and each receipt is as large as it gets.
        let part = 1.0 + f64::from(id) / 7e4;
        let mut backlog = forebay_scheduler::model::Backlog {
            pending_tokens: part * 1_000.0,
            pending_pairs: part * 1e6,
            decodes: (20.0 * part).round(),
            context_tokens: (part * 90_000.0).round(),
            ..Default::default()
        };
        backlog.lineup.add(part * 100.0, part * 130.0);
        view.report(
            now,
            Load {
                incarnation: incarnation(id),
                seq: 1,
                acceptance: Acceptance::Open,
                running: 20,
                queued: 0,
                slots: 64,
                queue_limit: 8,
                service: Duration::from_millis(4_321),
                facts_revision: Revision(1),
                interval: Duration::from_millis(250),
                backlog,
                model: None,
                residuals: Default::default(),
            },
        );
    }
    let mut conversation = 0x1234_5678_9abc_def0_u64;
    move || {
        conversation = conversation.wrapping_mul(0x5851_f42d_4c95_7f2d) + 1;
        let request = Request {
            prompt_tokens: 4_321.7,
            longer_tokens: 83.3,
            conversation: Some(conversation),
            head: 0xfeed_dead_beef_cafe,
            ..Request::of("meta-llama/Llama-3.1-70B-Instruct")
        };
        let versions = Versions {
            facts_revision: Revision(81_234),
            index_version: 123_456_789,
        };
        let later = Now::at(Duration::from_millis(9_217));
        let (_, receipt) = view.explain(later, &request, policy::default(), &mut rng, versions);
        receipt
    }
}

fn incarnation(id: u32) -> Incarnation {
    Incarnation {
        worker: WorkerId(id),
        grant: 81_000,
        start: 2,
    }
}

fn keep(receipts: &mut Receipts, id: &str, receipt: &Receipt) -> Option<Arc<Kept>> {
    let packed = (receipt.outcome, receipt.packed());
    receipts.keep(&id.into(), Millis(1_700_000_000_000), packed)
}

fn found(receipts: &Receipts, query: &str) -> Vec<u64> {
    let wanted = Wanted::parse(query).unwrap();
    let named = wanted.worker.clone();
    let is = |of: Incarnation| Some(format!("w{}", of.worker.0)) == named;
    let kept = wanted.find(|look| look(receipts), is);
    kept.iter().map(|kept| kept.number).collect()
}

#[test]
fn the_last_are_kept_and_found_by_request_and_by_worker() {
    let (mut next, mut receipts) = (receipts_of(3), Receipts::new(4, MOST_BYTES));
    let mut workers = Vec::new();
    for id in ["a", "b", "b", "c", "d"] {
        let receipt = next();
        let kept = keep(&mut receipts, id, &receipt).unwrap();
        assert_eq!(kept.packed.receipt(), Some(receipt));
        workers.push(kept.chosen.unwrap().worker.0);
    }
    assert_eq!(found(&receipts, ""), [2, 3, 4, 5]);
    assert_eq!(found(&receipts, "last=2"), [4, 5]);
    assert_eq!(found(&receipts, "request=b"), [2, 3]);
    assert_eq!(found(&receipts, "request=a"), [0; 0], "it had to make room");
    for worker in 1..=3 {
        let on = (1..).zip(&workers).skip(1).filter(|(_, on)| **on == worker);
        let on: Vec<u64> = on.map(|(number, _)| number).collect();
        assert_eq!(found(&receipts, &format!("worker=w{worker}")), on);
    }
    let kept = receipts.block(u64::MAX);
    assert_eq!(kept[0].ended(), None);
    kept[0].end("refused: full");
    kept[0].end("complete");
    assert_eq!(
        kept[0].ended(),
        Some("refused: full"),
        "what is said first holds"
    );
    assert!(keep(&mut Receipts::new(0, MOST_BYTES), "x", &next()).is_none());
}

#[test]
fn what_is_asked_for_in_another_way_is_refused() {
    for (query, says) in [
        ("last=0", "from 1 to 1000"),
        ("last=1001", "from 1 to 1000"),
        ("last=x", "from 1 to 1000"),
        ("request=", "request has no value"),
        ("request=a%20b", "request has no value"),
        ("worker", "worker has no value"),
        ("since=3", "there are request, worker and last"),
    ] {
        let problem = Wanted::parse(query).unwrap_err();
        assert!(problem.contains(says), "{query}: {problem}");
    }
}

#[test]
fn memory_is_bounded_by_bytes_as_well() {
    let (mut next, mut receipts) = (receipts_of(8), Receipts::new(1_000, 64 << 10));
    for n in 0..1_000 {
        keep(&mut receipts, &format!("r{n}"), &next());
        assert!(receipts.size().1 <= 64 << 10);
    }
    let (count, _) = receipts.size();
    assert!((20..200).contains(&count), "{count}");
    let numbers: Vec<u64> = (1_001 - count as u64..=1_000).collect();
    assert_eq!(found(&receipts, ""), numbers);
}

/// The promise of `forebay explain`: the last hundred thousand placements, in bounded memory, in time.
#[test]
#[allow(clippy::disallowed_methods)] // it is the time that is claimed
fn a_hundred_thousand_of_a_large_fleet_fit_and_are_found() {
    let (mut next, mut receipts) = (receipts_of(200), Receipts::new(100_000, MOST_BYTES));
    // Distinct ones are slow to make in a debug build.
    let some: Vec<Receipt> = (0..500).map(|_| next()).collect();
    let candidates: usize = some.iter().map(|receipt| receipt.considered.len()).sum();
    assert!(candidates >= 500 * MOST_CONSIDERED * 9 / 10, "{candidates}");
    for n in 0..100_000 {
        keep(&mut receipts, &format!("request-{n:026}"), &some[n % 500]);
    }
    let (count, bytes) = receipts.size();
    assert_eq!(count, 100_000, "none had to go for want of room");
    let timed = |query: &str| {
        let began = Instant::now();
        let count = found(&receipts, query).len();
        (count, began.elapsed())
    };
    let (first, oldest) = timed(&format!("request=request-{:026}", 0));
    let (absent, nowhere) = timed("request=nobody");
    let (many, worker) = timed("worker=w3&last=1000");
    eprintln!(
        "100,000 receipts of {} candidates: {} MiB, {} bytes each; the oldest found in {oldest:.1?}, none in {nowhere:.1?}, {many} of a worker in {worker:.1?}",
        candidates / 500,
        bytes >> 20,
        bytes / 100_000
    );
    assert_eq!((first, absent), (1, 0));
    for took in [oldest, nowhere, worker] {
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
}
