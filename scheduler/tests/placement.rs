//! What a balancer believes and whom it picks, as claims.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of a test fail as its assertions do

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Incarnation, Now, Revision, WorkerId};
use forebay_scheduler::policy::{self, Request};
use forebay_scheduler::{Acceptance, Known, Load, NoChoice, View, Work};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

const INTERVAL: Duration = Duration::from_millis(100);

fn at(ms: u64) -> Now {
    Now::at(Duration::from_millis(1_000 + ms))
}

fn incarnation(worker: u32, start: u32) -> Incarnation {
    Incarnation {
        worker: WorkerId(worker),
        grant: 10,
        start,
    }
}

fn known(worker: u32, model: &str, slots: u32) -> Known {
    let spec = WorkerSpec {
        pool: "default".into(),
        advertise: "127.0.0.1:7420".into(),
        engine: "openai".into(),
        models: vec![model.into()],
        revision: String::new(),
        gpu_type: String::new(),
        gpu_count: 0,
        kv_tokens: 0,
        max_context_tokens: 0,
        adapters: vec![],
        zone: String::new(),
        labels: BTreeMap::new(),
        slots,
    };
    let name = format!("w{worker}");
    Known {
        name,
        incarnation: incarnation(worker, 1),
        spec,
        desired: Desired::Ready,
        departed: false,
    }
}

fn load(worker: u32, seq: u64, running: u32, queued: u32, slots: u32) -> Load {
    Load {
        incarnation: incarnation(worker, 1),
        seq,
        acceptance: Acceptance::Open,
        running,
        queued,
        slots,
        queue_limit: 4,
        service: Duration::from_millis(400),
        facts_revision: Revision(1),
        interval: INTERVAL,
        backlog: Default::default(),
        model: None,
        residuals: forebay_scheduler::model::Residuals::default(),
    }
}

/// Workers named by their number: `"running+queued/slots"`, `-` cut off, with a mark in front:
/// `c` cordoned by facts, `x` closed by its own word, `s` silent for long, `d` departed.
fn world(workers: &[&str]) -> View {
    let mut view = View::default();
    let parsed: Vec<_> = workers
        .iter()
        .map(|text| {
            let (mark, rest) = text.split_at(
                text.find(|c: char| c.is_ascii_digit())
                    .unwrap_or(text.len()),
            );
            let numbers: Vec<u32> = rest
                .split(['+', '/'])
                .filter_map(|n| n.parse().ok())
                .collect();
            (mark.to_owned(), numbers)
        })
        .collect();
    view.set_known(parsed.iter().enumerate().map(|(i, (mark, _))| {
        let mut known = known(u32::try_from(i).unwrap(), "m", 4);
        if mark == "c" {
            known.desired = Desired::Cordoned;
        }
        known.departed = mark == "d";
        known
    }));
    for (i, (mark, numbers)) in parsed.iter().enumerate() {
        let id = u32::try_from(i).unwrap();
        if mark == "-" {
            continue;
        }
        let heard = if mark == "s" { Now::default() } else { at(0) };
        assert!(view.connected(heard, incarnation(id, 1)));
        if let [running, queued, slots] = numbers[..] {
            let mut load = load(id, 1, running, queued, slots);
            if mark == "x" {
                load.acceptance = Acceptance::EngineDown;
            }
            assert!(view.report(heard, load));
        }
    }
    view
}

fn picks(view: &mut View, now: Now) -> Result<u32, NoChoice> {
    view.pick(
        now,
        &Request::of("m"),
        policy::default(),
        &mut StdRng::seed_from_u64(1),
    )
    .map(|choice| choice.incarnation.worker.0)
}

fn check(workers: &[&str], expected: Result<u32, NoChoice>) {
    assert_eq!(picks(&mut world(workers), at(1)), expected, "{workers:?}");
}

#[test]
fn the_shortest_predicted_wait_wins() {
    check(&["4+2/4", "4+0/4"], Ok(1));
    check(&["4+0/4", "3+0/4"], Ok(1));
    check(&["8+0/8", "2+0/2"], Ok(0));
}

#[test]
fn with_free_slots_on_both_the_emptier_one_wins() {
    check(&["3+0/4", "3+0/16"], Ok(1));
}

#[test]
fn who_may_not_serve_is_never_picked() {
    check(&["c0+0/4", "4+3/4"], Ok(1));
    check(&["x0+0/4", "4+3/4"], Ok(1));
    check(&["d0+0/4", "4+3/4"], Ok(1));
    check(&["-", "4+3/4"], Ok(1));
    check(&["s0+0/4", "4+3/4"], Ok(1));
}

#[test]
fn why_there_is_no_choice_is_said() {
    check(&["4+4/4", "4+4/4"], Err(NoChoice::Busy));
    check(&["-", "c0+0/4"], Err(NoChoice::NoCapacity));
    let mut view = world(&["0+0/4"]);
    let none = view.pick(
        at(1),
        &Request::of("other"),
        policy::default(),
        &mut StdRng::seed_from_u64(1),
    );
    assert_eq!(none, Err(NoChoice::UnknownModel));
    let tried = view.pick(
        at(1),
        &Request {
            tried: &[WorkerId(0)],
            ..Request::of("m")
        },
        policy::default(),
        &mut StdRng::seed_from_u64(1),
    );
    assert_eq!(tried, Err(NoChoice::NoCapacity));
}

#[test]
fn a_pool_is_never_stopped_by_silence_alone() {
    check(&["s0+0/4"], Ok(0));
}

#[test]
fn equal_workers_share_evenly() {
    let mut view = world(&["0+0/4"; 4]);
    let mut rng = StdRng::seed_from_u64(7);
    let mut counts = [0; 4];
    for _ in 0..4_000 {
        counts[view
            .pick(at(1), &Request::of("m"), policy::default(), &mut rng)
            .unwrap()
            .incarnation
            .worker
            .0 as usize] += 1;
    }
    assert!(
        counts.iter().all(|count| (850..1_150).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn a_booking_counts_at_once_and_never_twice() {
    let mut view = world(&["0+0/1", "0+0/1"]);
    let first = picks(&mut view, at(1)).unwrap();
    let booking = view.book(WorkerId(first), Work::default());
    assert_ne!(picks(&mut view, at(1)).unwrap(), first);

    view.accepted(booking, 2);
    view.report(at(2), load(first, 2, 1, 0, 1));
    assert_ne!(
        picks(&mut view, at(2)).unwrap(),
        first,
        "the report contains it"
    );

    view.released(booking, Some(3));
    assert_eq!(view.open_bookings(None), 0);
    let mut free = vec![picks(&mut view, at(2)).unwrap()];
    free.extend((0..20).map(|seed| {
        let choice = view
            .pick(
                at(2),
                &Request::of("m"),
                policy::default(),
                &mut StdRng::seed_from_u64(seed),
            )
            .unwrap();
        choice.incarnation.worker.0
    }));
    assert!(
        free.contains(&first),
        "the release counts before a report says so"
    );
    view.report(at(3), load(first, 3, 0, 0, 1));
    assert_eq!(view.open_bookings(None), 0);
}

#[test]
fn a_later_start_voids_what_was_known_of_an_earlier_one() {
    let mut view = world(&["4+4/4"]);
    assert!(view.connected(at(1), incarnation(0, 2)));
    assert!(
        !view.connected(at(1), incarnation(0, 1)),
        "the dead do not come back"
    );
    assert!(!view.report(at(1), load(0, 9, 0, 0, 4)), "nor report");
    assert_eq!(picks(&mut view, at(2)), Ok(0));
}

#[test]
fn an_old_report_never_replaces_a_newer_one() {
    let mut view = world(&["0+0/4"]);
    assert!(view.report(at(1), load(0, 5, 4, 4, 4)));
    assert!(!view.report(at(2), load(0, 4, 0, 0, 4)));
    assert_eq!(picks(&mut view, at(2)), Err(NoChoice::Busy));
}

proptest! {
    /// An agent that counts truly, reports that are lost, late and repeated: at the end of every
    /// run the view agrees with the agent and nothing stays booked.
    #[test]
    fn after_any_history_the_view_agrees_with_the_agent(steps in proptest::collection::vec((0..5u8, any::<prop::sample::Index>()), 0..200)) {
        let mut view = world(&["0+0/64"]);
        let (mut seq, mut running, mut open, mut mail) = (1u64, 0u32, Vec::new(), Vec::new());
        for (step, which) in steps {
            match step {
                0 => {
                    let booking = view.book(WorkerId(0), Work::default());
                    running += 1;
                    seq += 1;
                    view.accepted(booking, seq);
                    open.push(booking);
                }
                1 => {
                    let refused = view.book(WorkerId(0), Work::default());
                    view.released(refused, None);
                }
                2 if !open.is_empty() => {
                    let booking = open.swap_remove(which.index(open.len()));
                    running -= 1;
                    seq += 1;
                    view.released(booking, Some(seq));
                }
                3 => mail.push(load(0, seq, running, 0, 64)),
                4 if !mail.is_empty() => {
                    view.report(at(1), mail[which.index(mail.len())]);
                }
                _ => {}
            }
            prop_assert_eq!(view.open_bookings(None), open.len());
            let policy = policy::named("least-requests").unwrap();
            let chosen = view.pick(at(1), &Request::of("m"), policy, &mut StdRng::seed_from_u64(1));
            prop_assert_eq!(chosen.map(|choice| choice.score.first), Ok(f64::from(running)));
        }
    }
}

#[test]
fn an_adapter_is_served_by_the_workers_that_have_it_and_by_no_other() {
    let mut view = View::default();
    let with_adapter = {
        let mut known = known(2, "m", 4);
        known.spec.adapters = vec!["m-tuned".into()];
        known
    };
    view.set_known([known(1, "m", 4), with_adapter]);
    for worker in [1, 2] {
        assert!(view.connected(at(0), incarnation(worker, 1)));
        assert!(view.report(at(0), load(worker, 1, 0, 0, 4)));
    }
    let mut rng = StdRng::seed_from_u64(7);
    for _ in 0..20 {
        let choice = view
            .pick(at(0), &Request::of("m-tuned"), policy::default(), &mut rng)
            .unwrap();
        assert_eq!(choice.incarnation.worker, WorkerId(2));
    }
    assert!(view.models().contains_key("m-tuned"));
    let mut request = Request::of("m-tuned");
    assert!(view.has_capacity(&request));
    request.tried = &[WorkerId(2)];
    assert!(!view.has_capacity(&request));
    let unknown = view.pick(at(0), &Request::of("m-other"), policy::default(), &mut rng);
    assert_eq!(unknown.unwrap_err(), NoChoice::UnknownModel);
}

#[test]
fn a_request_that_must_stay_in_a_zone_goes_nowhere_else() {
    let mut view = View::default();
    let zones = ["a", "b", ""];
    let workers = (1..).zip(zones).map(|(id, zone)| {
        let mut known = known(id, "m", 4);
        known.spec.zone = zone.into();
        known
    });
    view.set_known(workers);
    for worker in [1, 2, 3] {
        assert!(view.connected(at(0), incarnation(worker, 1)));
        assert!(view.report(at(0), load(worker, 1, 0, 0, 4)));
    }
    let mut rng = StdRng::seed_from_u64(7);
    for policy in policy::ALL {
        for (zone, worker) in [("a", 1), ("b", 2)] {
            let request = Request {
                zone: Some(zone),
                ..Request::of("m")
            };
            let choice = view.pick(at(0), &request, policy, &mut rng).unwrap();
            assert_eq!(
                choice.incarnation.worker,
                WorkerId(worker),
                "{}",
                policy.name()
            );
        }
        // No zone is none of them, and nobody is in c.
        for zone in ["", "c"] {
            let request = Request {
                zone: Some(zone),
                ..Request::of("m")
            };
            assert!(!view.has_capacity(&request));
            let nobody = view.pick(at(0), &request, policy, &mut rng);
            assert_eq!(nobody.unwrap_err(), NoChoice::NoCapacity);
        }
    }
}

#[test]
fn a_prompt_goes_to_workers_that_take_so_long_a_context_and_else_to_whoever_says_so() {
    let mut view = View::default();
    let contexts = [8_000, 32_000, 0];
    let workers = |contexts: &[u32]| {
        let workers = (1..).zip(contexts).map(|(id, tokens)| {
            let mut known = known(id, "m", 4);
            known.spec.max_context_tokens = *tokens;
            known
        });
        workers.collect::<Vec<_>>()
    };
    view.set_known(workers(&contexts));
    for worker in [1, 2, 3] {
        assert!(view.connected(at(0), incarnation(worker, 1)));
        assert!(view.report(at(0), load(worker, 1, 0, 0, 4)));
    }
    let mut rng = StdRng::seed_from_u64(7);
    let mut went = |view: &mut View, prompt_tokens: f64| {
        let mut went = std::collections::BTreeSet::new();
        for policy in [policy::default(), policy::named("random").unwrap()] {
            for _ in 0..40 {
                let request = Request {
                    prompt_tokens,
                    ..Request::of("m")
                };
                let choice = view.pick(at(0), &request, policy, &mut rng).unwrap();
                went.insert(choice.incarnation.worker.0);
            }
        }
        went.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(went(&mut view, 8_000.0), [1, 2, 3]);
    assert_eq!(went(&mut view, 9_000.0), [2, 3]);
    assert_eq!(went(&mut view, 40_000.0), [3]);
    view.set_known(workers(&contexts[..2]));
    assert_eq!(went(&mut view, 40_000.0), [1, 2], "an engine has to say it");
}
