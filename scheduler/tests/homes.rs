//! Homes in the choice of a worker: the copy is made there, once, and where promises allow it.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of a test fail as its assertions do
#![allow(clippy::disallowed_methods)] // one of them measures

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Family, Incarnation, Now, Revision, WorkerId};
use forebay_scheduler::homes::table::{Homes, Table};
use forebay_scheduler::index::Hit;
use forebay_scheduler::model::{Backlog, Profile, Residuals, Targets};
use forebay_scheduler::policy::{self, Request};
use forebay_scheduler::{Acceptance, BookingId, Choice, Known, Load, View};
use rand::SeedableRng;
use rand::rngs::StdRng;

const HOME: [WorkerId; 1] = [WorkerId(3)];
/// Of the family, and of the request.
const SHARED: u32 = 4_000;
const PROMPT: f64 = 5_000.0;

fn at(ms: u64) -> Now {
    Now::at(Duration::from_secs(100) + Duration::from_millis(ms))
}

fn incarnation(id: u32) -> Incarnation {
    Incarnation {
        worker: WorkerId(id),
        grant: 1,
        start: 1,
    }
}

fn known(id: u32) -> Known {
    Known {
        name: format!("w{id}"),
        incarnation: incarnation(id),
        spec: WorkerSpec {
            pool: "p".into(),
            advertise: "127.0.0.1:1".into(),
            engine: String::new(),
            models: vec!["m".into()],
            revision: String::new(),
            gpu_type: String::new(),
            gpu_count: 0,
            kv_tokens: 0,
            max_context_tokens: 0,
            adapters: vec![],
            zone: String::new(),
            labels: BTreeMap::new(),
            slots: 64,
        },
        desired: Desired::Ready,
        departed: false,
    }
}

/// A report: so many requests run, so many tokens wait.
fn report(view: &mut View, now: Now, id: u32, seq: u64, (running, pending): (u32, f64)) {
    let load = Load {
        incarnation: incarnation(id),
        seq,
        acceptance: Acceptance::Open,
        running,
        queued: 0,
        slots: 64,
        queue_limit: 64,
        service: Duration::from_secs(1),
        facts_revision: Revision(1),
        interval: Duration::from_secs(60),
        backlog: Backlog {
            pending_tokens: pending,
            decodes: running.into(),
            ..Backlog::default()
        },
        model: Some(Profile::default()),
        residuals: Residuals::default(),
    };
    view.connected(now, incarnation(id));
    view.report(now, load);
}

/// Workers 1 to 4; 1 holds the family and has some 240 ms before it, 3 is its home and idle.
fn fleet() -> View {
    let mut view = View::default();
    view.set_known((1..=4).map(known));
    for id in 1..=4 {
        let load = if id == 1 { (2, 3_000.0) } else { (1, 0.0) };
        report(&mut view, at(0), id, 1, load);
    }
    view
}

fn request<'a>(hits: &'a [Hit], homes: &'a [WorkerId], ttft_ms: f64) -> Request<'a> {
    Request {
        prompt_tokens: PROMPT,
        targets: Targets {
            ttft_ms,
            tpot_ms: f64::INFINITY,
        },
        hits,
        homes: (!homes.is_empty()).then_some(Homes {
            chunk: 9,
            tokens: SHARED,
            workers: homes,
        }),
        conversation: Some(5),
        ..Request::of("m")
    }
}

fn held_by(ids: &[u32]) -> Vec<Hit> {
    let hit = |id: &u32| Hit {
        worker: WorkerId(*id),
        chunks: 1,
        tokens: SHARED,
    };
    ids.iter().map(hit).collect()
}

/// Where a request goes at a moment, and its booking.
fn place(
    view: &mut View,
    ms: u64,
    hits: &[u32],
    homes: &[WorkerId],
    ttft_ms: f64,
) -> (Choice, BookingId) {
    let hits = held_by(hits);
    let mut rng = StdRng::seed_from_u64(7);
    let request = request(&hits, homes, ttft_ms);
    let choice = view
        .pick(at(ms), &request, policy::default(), &mut rng)
        .unwrap();
    let booking = view.book(choice.incarnation.worker, choice.work);
    (choice, booking)
}

#[test]
fn a_home_that_does_not_hold_its_family_gets_the_copy() {
    // Without homes the holder is worth its wait.
    let (choice, _) = place(&mut fleet(), 1, &[1], &[], 5_000.0);
    assert_eq!(choice.incarnation.worker, WorkerId(1));
    let (choice, _) = place(&mut fleet(), 1, &[1], &HOME, 5_000.0);
    assert_eq!(choice.incarnation.worker, HOME[0]);
    // What is booked and told is the truth: it holds nothing of it.
    assert!(choice.work.makes_copy);
    assert_eq!(
        (choice.cached_tokens, choice.work.uncached_tokens),
        (0, PROMPT)
    );
    let alone = Profile::default().ttft_ms(
        &Backlog {
            decodes: 1.0,
            ..Backlog::default()
        },
        0.0,
        PROMPT,
    );
    let ratio = choice.ttft.as_secs_f64() * 1e3 / alone;
    assert!((0.95..1.05).contains(&ratio), "{ratio}");
}

#[test]
fn a_promise_is_not_broken_to_make_a_copy() {
    // The home would take some 380 ms; its 0.95 quantile is above this.
    let (choice, _) = place(&mut fleet(), 1, &[1], &HOME, 450.0);
    assert_eq!(choice.incarnation.worker, WorkerId(1));
    assert!(choice.feasible && !choice.work.makes_copy);
}

#[test]
fn a_home_is_counted_for_one_booking_at_a_time_and_not_soon_again() {
    let mut view = fleet();
    let (first, booking) = place(&mut view, 1, &[1], &HOME, 5_000.0);
    assert!(first.work.makes_copy);
    view.accepted(booking, 2);
    let (second, other) = place(&mut view, 2, &[1], &HOME, 5_000.0);
    assert!(!second.work.makes_copy, "its copy is being made");
    view.released(other, None);
    // It ended without a copy: ten seconds pass before the next try.
    report(&mut view, at(1_000), 3, 9, (1, 0.0));
    report(&mut view, at(1_000), 1, 9, (2, 3_000.0));
    view.released(booking, Some(9));
    let counts = |view: &View, ms: u64| {
        let mut view = view.clone();
        for id in 1..=4 {
            let load = if id == 1 { (2, 3_000.0) } else { (1, 0.0) };
            report(&mut view, at(ms), id, 100, load);
        }
        place(&mut view, ms, &[1], &HOME, 5_000.0).0.work.makes_copy
    };
    assert!(!counts(&view, 9_000));
    assert!(counts(&view, 11_100));
}

#[test]
fn a_home_that_holds_its_family_is_as_any_other_holder() {
    let (choice, _) = place(&mut fleet(), 1, &[1, 3], &HOME, 5_000.0);
    assert_eq!(choice.incarnation.worker, HOME[0]);
    assert_eq!(choice.cached_tokens, SHARED);
    assert!(!choice.work.makes_copy);
}

#[test]
fn published_rules_know_no_homes() {
    let hits = held_by(&[1]);
    for policy in policy::ALL
        .into_iter()
        .filter(|policy| policy.name() != "forebay")
    {
        let pick = |homes: &[WorkerId]| {
            let mut rng = StdRng::seed_from_u64(3);
            let request = request(&hits, homes, 5_000.0);
            fleet().pick(at(1), &request, policy, &mut rng).unwrap()
        };
        assert_eq!(pick(&HOME), pick(&[]), "{}", policy.name());
    }
}

#[test]
fn a_lookup_among_256_families_is_quick() {
    let mix = |path: u64, chunk: u64| {
        let z =
            path.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ chunk.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 29)
    };
    // Each of another length: the most that have to be looked at.
    let family = |n: u64| Family {
        pool: "p".into(),
        chunk: mix(n, n),
        key_epoch: 1,
        chunks: n as u32 + 1,
        tokens: 64 * (n as u32 + 1),
        homes: vec![WorkerId(1)],
        saves: 0,
        takes: 0,
        pinned: false,
    };
    let families: Vec<Family> = (0..256).map(family).collect();
    let (worst, table) = (Table::new(&families), |lengths: u64| {
        let families = families.iter().cloned().map(|family| Family {
            chunks: family.chunks % lengths as u32 + 1,
            ..family
        });
        Table::new(&families.collect::<Vec<_>>())
    });
    let path: Vec<u64> = (0..400).map(|chunk| mix(1_000, chunk)).collect();
    for (name, table) in [("256 lengths", worst), ("16 lengths", table(16))] {
        let began = Instant::now();
        let mut found = 0;
        for _ in 0..20_000 {
            found += usize::from(table.of(std::hint::black_box(&path)).is_some());
        }
        let each = began.elapsed().as_secs_f64() * 1e9 / 2e4;
        println!("{name}: {each:.0} ns a lookup");
        assert_eq!(found, 0);
        // 0.5 us and 16 ns in release; 20 times that without optimisation.
        assert!(each < 100_000.0, "{each} ns");
    }
}
