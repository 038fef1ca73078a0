//! Claims about who is given to the engine, and when.

use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Now, Revision};
use forebay_scheduler::model::{Profile, Targets};

use super::tests::{FAST, at, ms, offer, open_with};
use super::*;

const ROOMY: Settings = Settings {
    slots: 16,
    queue_limit: 16,
    kv_tokens: 0,
    ..FAST
};

/// A request with so many tokens that was promised its first token in so many milliseconds.
fn asked(tokens: u32, ttft_ms: f64) -> Offer {
    let mut offer = offer();
    offer.prompt.tokens = tokens;
    offer.targets.ttft_ms = ttft_ms;
    offer
}

fn placed(core: &mut Core, now: u64, offer: &Offer) -> Admitted {
    core.place(at(now), offer).unwrap()
}

/// What starts now.
fn starts(core: &mut Core) -> Vec<PlacementId> {
    let effects = std::iter::from_fn(|| core.poll_effect());
    let start = |effect| match effect {
        Effect::Start(id) => id,
        Effect::Over(..) => panic!("nothing is over"),
    };
    effects.map(start).collect()
}

/// The order in which these start, each when the one before has its first token, while one runs that
/// came before them; by their places.
fn order(offers: &[Offer], began: u64) -> Vec<usize> {
    let mut core = open_with(ROOMY);
    let mut last = placed(&mut core, 0, &asked(50_000, 1e6)).id;
    let ids: Vec<_> = offers
        .iter()
        .map(|offer| placed(&mut core, 1, offer))
        .map(|admitted| {
            assert!(!admitted.starts);
            admitted.id
        })
        .collect();
    let mut order = Vec::new();
    for now in began..=began + offers.len() as u64 {
        core.first_byte(at(now), last);
        let Some(id) = starts(&mut core).first().copied() else {
            break;
        };
        order.push(ids.iter().position(|own| *own == id).unwrap());
        last = id;
    }
    order
}

#[test]
fn least_slack_goes_first_and_a_long_prefill_is_less_slack() {
    // Each is more than a chunk: one at a time. 10,000 tokens take about 0.8 s.
    let all = [
        asked(2_000, 3_000.0),
        asked(2_000, 2_000.0),
        asked(10_000, 2_500.0),
        asked(2_000, f64::INFINITY),
    ];
    assert_eq!(order(&all, 100), [2, 1, 0, 3]);
}

#[test]
fn without_targets_the_first_to_come_is_first() {
    let all = [9_000, 2_000, 5_000].map(|tokens| asked(tokens, f64::INFINITY));
    assert_eq!(order(&all, 100), [0, 1, 2]);
}

#[test]
fn what_is_late_lets_those_pass_that_are_not_until_its_second_target() {
    let all = [
        asked(2_000, 2_000.0),
        asked(2_000, 3_000.0),
        asked(2_000, 9_000.0),
    ];
    assert_eq!(order(&all, 100), [0, 1, 2], "in time");
    assert_eq!(order(&all, 2_500), [1, 0, 2], "its second is 7 s");
    assert_eq!(order(&all, 5_000), [0, 2, 1], "the other's is 10.5 s");
    assert_eq!(order(&all, 20_000), [0, 1, 2], "all late: by their second");
}

#[test]
fn the_engine_is_given_the_next_as_it_runs_dry() {
    let mut core = open_with(ROOMY);
    let first = placed(&mut core, 0, &asked(4_096, 1e6));
    assert!(first.starts);
    let next = placed(&mut core, 0, &asked(4_096, 1e6));
    assert!(!next.starts);
    // Four chunks of about 78 ms and their attention: the next is due when one is left.
    let (mut now, mut looks) = (Now::default(), 0);
    while starts(&mut core).is_empty() {
        let due = core.next_deadline().expect("the next is due");
        assert!(due > now, "time passes");
        now = due;
        looks += 1;
        core.expire(now);
    }
    let took = now.since(at(0));
    assert!((ms(230)..ms(245)).contains(&took), "{took:?}");
    assert!(looks < 30, "{looks}");
    // Behind it no other, however long it takes: no sign has come.
    let third = placed(&mut core, 250, &asked(100, 1e6));
    core.expire(at(3_000));
    assert!(!third.starts && starts(&mut core).is_empty());
    core.first_byte(at(3_001), first.id);
    core.expire(at(3_001 + 4 * 85));
    assert_eq!(starts(&mut core), [third.id]);
}

#[test]
fn what_waits_for_the_engine_to_run_dry_is_sent_back_by_a_drain_and_a_dead_engine() {
    let sent_back = |act: fn(&mut Core)| {
        let mut core = open_with(ROOMY);
        for _ in 0..4 {
            placed(&mut core, 0, &asked(3_000, 1e6));
        }
        assert_eq!((core.running(), core.queued()), (1, 3));
        act(&mut core);
        let over = std::iter::from_fn(|| core.poll_effect());
        assert_eq!(over.filter(|e| matches!(e, Effect::Over(..))).count(), 3);
        assert_eq!((core.running(), core.queued()), (1, 0));
    };
    sent_back(|core| core.facts(at(900), Desired::Draining, Revision(21)));
    sent_back(|core| core.stop(at(900)));
    sent_back(|core| core.engine_down(at(900)));
}

#[test]
fn short_prompts_share_a_chunk() {
    let mut core = open_with(ROOMY);
    let given = |core: &mut Core| placed(core, 0, &asked(300, 1e6)).starts;
    let starts: Vec<_> = (0..6).map(|_| given(&mut core)).collect();
    assert_eq!(starts, [true, true, true, true, false, false]);
}

#[test]
fn no_more_run_than_hold_the_pace_that_was_promised_to_the_tightest() {
    // Their prefills are next to nothing; each adds 0.94 ms of context to 22 ms.
    let decode = |pace: f64| {
        let mut offer = asked(10_000, 1e6);
        offer.targets.tpot_ms = pace;
        offer.prompt.chunks = (0..100).collect();
        offer.prompt.bytes = 25_601;
        offer.prompt.chunk_bytes = 256;
        offer.max_tokens = 10_000;
        offer
    };
    let run = |first: f64, others: f64| {
        let mut core = open_with(ROOMY);
        let one = placed(&mut core, 0, &decode(first));
        core.first_byte(at(840), one.id);
        for _ in 1..16 {
            placed(&mut core, 1_000, &decode(others));
        }
        core.running()
    };
    assert_eq!(run(f64::INFINITY, f64::INFINITY), 16);
    let limited = run(30.0, f64::INFINITY);
    assert!((4..9).contains(&limited), "{limited}");
    let beyond_reach = run(1.0, 1.0);
    assert!((8..16).contains(&beyond_reach), "{beyond_reach}");
}

#[test]
fn no_more_run_than_fit_into_the_cache() {
    let run = |kv_tokens, max_tokens| {
        let mut core = open_with(Settings { kv_tokens, ..ROOMY });
        let mut offer = asked(100, 1e6);
        offer.max_tokens = max_tokens;
        for _ in 0..10 {
            placed(&mut core, 0, &offer);
        }
        core.running()
    };
    assert_eq!(run(0, 400), 10, "not told");
    assert_eq!(run(2_100, 400), 4);
    assert_eq!(run(10, 400), 1, "alone whatever it needs");
    assert_eq!(run(2_100, 0), 5, "a nominal answer");
}

#[test]
fn a_first_token_much_later_than_expected_is_refused() {
    let mut core = open_with(ROOMY);
    placed(&mut core, 0, &asked(20_000, 1e6));
    let mut offer = asked(1_000, 1e6);
    let expects = |offer: &mut Offer, expected| offer.expected_ttft = Some(ms(expected));
    expects(&mut offer, 500);
    let refused = core.place(at(1), &offer).unwrap_err();
    assert_eq!(refused.reason, RefusalReason::StaleView);
    expects(&mut offer, 1_500);
    placed(&mut core, 1, &offer);
    expects(&mut offer, 0);
    offer.must_queue = true;
    placed(&mut core, 1, &offer);
    offer.must_queue = false;
    offer.expected_ttft = None;
    placed(&mut core, 1, &offer);
}

#[test]
fn a_promise_of_nothing_is_none() {
    let none = Targets::NONE;
    assert!(none.ttft_ms.is_infinite() && none.tpot_ms.is_infinite());
    let mut core = open_with(Settings {
        profile: Some(Profile::named("llama-70b-a100-tp2").unwrap()),
        ..ROOMY
    });
    let started = (0..4).filter(|_| placed(&mut core, 0, &asked(100, f64::INFINITY)).starts);
    assert_eq!(started.count(), 4);
}
