//! Backlogs in tokens, warm caches and ties, as claims about whom the view picks.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of a test fail as its assertions do

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Incarnation, Now, Revision, WorkerId};
use forebay_scheduler::index::Hit;
use forebay_scheduler::model::{Backlog, Profile};
use forebay_scheduler::policy::{self, Request};
use forebay_scheduler::{Acceptance, Choice, Known, Load, View, Work};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Long enough that a worker is not suspect while time passes in a test.
const INTERVAL: Duration = Duration::from_secs(60);
/// Tokens of each prompt.
const PROMPT: f64 = 4_000.0;

fn at(ms: u64) -> Now {
    Now::at(Duration::from_millis(1_000 + ms))
}

fn incarnation(worker: u32) -> Incarnation {
    Incarnation {
        worker: WorkerId(worker),
        grant: 1,
        start: 1,
    }
}

fn known(worker: u32) -> Known {
    let spec = WorkerSpec {
        pool: "default".into(),
        advertise: "127.0.0.1:7420".into(),
        engine: "openai".into(),
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
    };
    Known {
        name: format!("w{worker}"),
        incarnation: incarnation(worker),
        spec,
        desired: Desired::Ready,
        departed: false,
    }
}

/// A worker with so many prompt tokens before it, and so many requests that decode.
fn load(worker: u32, seq: u64, pending: f64, decodes: u32) -> Load {
    Load {
        incarnation: incarnation(worker),
        seq,
        acceptance: Acceptance::Open,
        running: decodes,
        queued: 0,
        slots: 64,
        queue_limit: 64,
        service: Duration::from_secs(1),
        facts_revision: Revision(1),
        interval: INTERVAL,
        backlog: Backlog {
            pending_tokens: pending,
            pending_pairs: pending * pending / 2.0,
            decodes: decodes.into(),
            context_tokens: f64::from(decodes) * 1_000.0,
            ..Backlog::default()
        },
        model: Some(Profile::default()),
        residuals: forebay_scheduler::model::Residuals::default(),
    }
}

fn view(loads: &[(f64, u32)]) -> View {
    let mut view = View::default();
    view.set_known((0..).take(loads.len()).map(known));
    for (id, (pending, decodes)) in (0..).zip(loads) {
        assert!(view.connected(at(0), incarnation(id)));
        assert!(view.report(at(0), load(id, 1, *pending, *decodes)));
    }
    view
}

fn request() -> Request<'static> {
    Request {
        prompt_tokens: PROMPT,
        ..Request::of("m")
    }
}

fn pick(view: &mut View, now: Now, request: &Request<'_>, policy: &str, seed: u64) -> Choice {
    let policy = policy::named(policy).unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    view.pick(now, request, policy, &mut rng).unwrap()
}

/// Predicted time to the first token on the only worker, in milliseconds.
fn ttft_ms(view: &mut View, now: Now) -> f64 {
    let choice = pick(view, now, &request(), "forebay", 1);
    choice.ttft.as_secs_f64() * 1e3
}

fn work(tokens: f64) -> Work {
    Work {
        uncached_tokens: tokens,
        pairs: tokens * tokens / 2.0,
        context_tokens: tokens,
        makes_copy: false,
    }
}

fn close(value: f64, expected: f64) {
    let off = (value - expected).abs();
    assert!(off < 1e-3 * expected.max(1.0), "{value} is not {expected}");
}

#[test]
fn a_bookings_tokens_count_at_once_and_never_twice() {
    let mut view = view(&[(0.0, 0)]);
    let idle = ttft_ms(&mut view, at(0));
    let booking = view.book(WorkerId(0), work(10_000.0));
    let busy = ttft_ms(&mut view, at(0));
    let profile = Profile::default();
    let backlog = load(0, 1, 10_000.0, 0).backlog;
    close(busy, profile.ttft_ms(&backlog, 0.0, PROMPT));
    assert!(busy > 3.0 * idle);

    view.accepted(booking, 2);
    close(ttft_ms(&mut view, at(0)), busy);
    assert!(view.report(at(0), load(0, 2, 10_000.0, 0)));
    close(ttft_ms(&mut view, at(0)), busy);
}

#[test]
fn what_was_refused_takes_its_tokens_along() {
    let mut view = view(&[(0.0, 0)]);
    let idle = ttft_ms(&mut view, at(0));
    let booking = view.book(WorkerId(0), work(10_000.0));
    view.released(booking, None);
    close(ttft_ms(&mut view, at(0)), idle);
}

#[test]
fn between_reports_a_backlog_drains_as_fast_as_the_model_says_attention_included() {
    let (tokens, pairs) = (20_000.0, 20_000.0 * 20_000.0 / 2.0);
    let mut view = view(&[(tokens, 0)]);
    let profile = Profile::default();
    let whole_ms = profile.prefill_ms(&Backlog::default(), tokens, pairs);
    let left = 1.0 - 500.0 / whole_ms;
    let backlog = Backlog {
        pending_tokens: tokens * left,
        pending_pairs: pairs * left,
        ..Backlog::default()
    };
    close(
        ttft_ms(&mut view, at(500)),
        profile.ttft_ms(&backlog, 0.0, PROMPT),
    );
    let idle = profile.ttft_ms(&Backlog::default(), 0.0, PROMPT);
    close(ttft_ms(&mut view, at(60_000)), idle);
}

#[test]
fn own_bookings_do_not_drain_before_a_report_has_them() {
    let mut view = view(&[(20_000.0, 0)]);
    view.book(WorkerId(0), work(10_000.0));
    let backlog = load(0, 1, 10_000.0, 0).backlog;
    let booked = Profile::default().ttft_ms(&backlog, 0.0, PROMPT);
    close(ttft_ms(&mut view, at(60_000)), booked);
}

#[test]
fn what_is_over_does_not_decode_any_more() {
    let mut view = view(&[(0.0, 0)]);
    let idle = ttft_ms(&mut view, at(0));
    let booking = view.book(WorkerId(0), work(1_000.0));
    view.accepted(booking, 2);
    assert!(view.report(at(0), load(0, 2, 0.0, 1)));
    assert!(ttft_ms(&mut view, at(0)) > idle);
    view.released(booking, Some(3));
    close(ttft_ms(&mut view, at(0)), idle);
    assert!(view.report(at(0), load(0, 3, 0.0, 0)));
    close(ttft_ms(&mut view, at(0)), idle);
}

/// Who gets a prompt; none: it depends on luck. Workers are `(pending, decodes, cached)`.
fn check(policy: &str, workers: &[(f64, u32, u32)], expected: Option<u32>) {
    let loads: Vec<_> = workers
        .iter()
        .map(|(pending, decodes, _)| (*pending, *decodes))
        .collect();
    let hits: Vec<Hit> = (0..)
        .zip(workers)
        .filter(|(_, (.., cached))| *cached > 0)
        .map(|(id, (.., cached))| Hit {
            worker: WorkerId(id),
            chunks: cached / 64,
            tokens: *cached,
        })
        .collect();
    let mut view = view(&loads);
    let mut chosen: Vec<u32> = (0..20)
        .map(|seed| {
            let request = Request {
                hits: &hits,
                ..request()
            };
            pick(&mut view, at(0), &request, policy, seed)
                .incarnation
                .worker
                .0
        })
        .collect();
    chosen.sort_unstable();
    chosen.dedup();
    let got = match chosen[..] {
        [only] => Some(only),
        _ => None,
    };
    assert_eq!(got, expected, "{policy} {workers:?}: {chosen:?}");
}

#[test]
fn a_warm_worker_wins_while_its_queue_is_shorter_than_what_it_saves() {
    check("forebay", &[(0.0, 9, 3_900), (0.0, 0, 0)], Some(0));
    check("forebay", &[(3_000.0, 3, 3_900), (0.0, 0, 0)], Some(0));
    check("forebay", &[(9_000.0, 3, 3_900), (0.0, 0, 0)], Some(1));
    check(
        "longest-prefix",
        &[(90_000.0, 30, 64), (0.0, 0, 0)],
        Some(0),
    );
    check("longest-prefix", &[(0.0, 3, 64), (0.0, 2, 64)], Some(1));
}

#[test]
fn who_counts_requests_does_not_see_what_is_warm() {
    for policy in ["least-requests", "power-of-two"] {
        check(policy, &[(0.0, 1, 3_900), (0.0, 0, 0)], Some(1));
        check(policy, &[(50_000.0, 1, 0), (0.0, 2, 3_900)], Some(0));
    }
    for policy in ["least-requests", "power-of-two", "random"] {
        check(policy, &[(0.0, 1, 3_900), (0.0, 1, 0)], None);
    }
}

#[test]
fn no_policy_sends_equals_to_one_worker() {
    for policy in policy::ALL {
        for now in [at(0), at(250)] {
            let mut view = view(&[(0.0, 0); 4]);
            let mut rng = StdRng::seed_from_u64(7);
            let mut counts = [0; 4];
            for turn in 0..2_000 {
                // Cold prompts of which nothing is alike, every other one without a fingerprint.
                let request = Request {
                    turn,
                    head: rng.random(),
                    conversation: (turn % 2 == 0).then(|| rng.random()),
                    ..request()
                };
                let choice = view.pick(now, &request, policy, &mut rng).unwrap();
                counts[choice.incarnation.worker.0 as usize] += 1;
            }
            let fair = counts.iter().all(|count| (400..600).contains(count));
            assert!(fair, "{}: {counts:?}", policy.name());
        }
    }
}

/// Which workers one conversation goes to, of four with these backlogs, looked at this late.
fn places(pending: [f64; 4], now: Now, conversation: u64) -> Vec<u32> {
    let mut view = view(&pending.map(|pending| (pending, 0)));
    let request = Request {
        conversation: Some(conversation),
        ..request()
    };
    let mut places: Vec<u32> = (0..40)
        .map(|seed| {
            pick(&mut view, now, &request, "forebay", seed)
                .incarnation
                .worker
                .0
        })
        .collect();
    places.sort_unstable();
    places.dedup();
    places
}

#[test]
fn a_conversation_stays_together_where_an_old_view_tells_no_difference() {
    let mut homes = [0; 4];
    for conversation in 0..400 {
        let [home] = places([0.0; 4], at(250), conversation)[..] else {
            panic!("it goes to several")
        };
        // What differs by less than the view's age explains changes nothing.
        assert_eq!(
            places([30.0, 0.0, 60.0, 10.0], at(250), conversation),
            [home]
        );
        homes[home as usize] += 1;
    }
    assert!(homes.iter().all(|n| (60..140).contains(n)), "{homes:?}");
}

#[test]
fn real_differences_and_fresh_views_are_stronger_than_a_conversation() {
    for conversation in 0..50 {
        let behind = [60_000.0, 60_000.0, 0.0, 60_000.0];
        assert_eq!(places(behind, at(250), conversation), [2]);
        assert_eq!(places([60.0, 60.0, 60.0, 0.0], at(0), conversation), [3]);
    }
}

#[test]
fn only_who_predicts_a_wait_names_one() {
    let mut view = view(&[(0.0, 0); 2]);
    let silent = at(1_000_000);
    for policy in policy::ALL {
        for now in [at(0), silent] {
            let choice = pick(&mut view, now, &request(), policy.name(), 1);
            let predicts = policy.name() == "forebay";
            assert_eq!(choice.wait.is_some(), predicts, "{}", policy.name());
        }
    }
}

#[test]
fn the_last_token_of_a_prompt_is_always_computed() {
    let mut view = view(&[(0.0, 0)]);
    let hits = [Hit {
        worker: WorkerId(0),
        chunks: 100,
        tokens: 9_000,
    }];
    let request = Request {
        hits: &hits,
        ..request()
    };
    let choice = pick(&mut view, at(0), &request, "forebay", 1);
    assert_eq!(choice.cached_tokens, 3_999);
    assert_eq!(choice.prompt_tokens(), 4_000);
    close(choice.work.uncached_tokens, 1.0);
}

#[test]
fn of_silent_workers_the_one_with_fewer_own_bookings_is_taken() {
    // The reports say the contrary, and are too old to be believed.
    let mut view = view(&[(0.0, 60), (0.0, 0)]);
    for _ in 0..5 {
        view.book(WorkerId(1), work(100.0));
    }
    let silent = at(1_000_000);
    let mut counts = [0; 2];
    for seed in 0..400 {
        let choice = pick(&mut view, silent, &request(), "forebay", seed);
        counts[choice.incarnation.worker.0 as usize] += 1;
    }
    // The other one is taken only where it is drawn twice.
    assert!((60..140).contains(&counts[1]), "{counts:?}");
}
