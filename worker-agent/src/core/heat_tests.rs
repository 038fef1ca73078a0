//! What an agent says of its requests, and how it keeps copies of others' from being any.

use forebay_scheduler::model::Profile;

use super::tests::{FAST, at, offer, open_with};
use super::{Admitted, Core, Effect, End, Offer, Prompt, RefusalReason, Settings, Usage};

const ROOMY: Settings = Settings {
    slots: 8,
    queue_limit: 8,
    body_budget_bytes: 1 << 20,
    kv_tokens: 0,
    ..FAST
};

/// A prompt of these chunks, with 64 tokens each and a few behind them.
fn prompt(chunks: &[u64]) -> Prompt {
    Prompt {
        chunks: chunks.to_vec(),
        bytes: chunks.len() as u64 * 256 + 40,
        chunk_bytes: 256,
        tokens: chunks.len() as u32 * 64 + 10,
    }
}

fn asked(chunks: &[u64]) -> Offer {
    let mut offer = offer();
    offer.prompt = prompt(chunks);
    offer.targets.ttft_ms = 300.0;
    offer.key_epoch = 7;
    offer
}

fn shadow(chunks: &[u64]) -> Offer {
    Offer {
        shadow: true,
        stream: false,
        max_tokens: 1,
        must_queue: true,
        expected_ttft: None,
        ..asked(chunks)
    }
}

/// Serves one request: its first byte after so many milliseconds, and then its end.
fn serve(core: &mut Core, now: u64, offer: &Offer, first_byte: u64, end: End) -> Admitted {
    let admitted = core.place(at(now), offer).unwrap();
    while core.poll_effect().is_some() {}
    core.first_byte(at(now + first_byte), admitted.id);
    core.usage(
        admitted.id,
        Usage {
            prompt_tokens: Some(offer.prompt.tokens),
            cached_tokens: Some(64),
            completion_tokens: Some(50),
        },
    );
    core.end(at(now + first_byte + 1_000), admitted.id, end);
    admitted
}

#[test]
fn families_are_told_with_what_their_requests_took_and_whether_they_are_held() {
    let mut core = open_with(ROOMY);
    let chunks = [[1, 2, 10, 11], [1, 2, 20, 21]];
    for (n, chunks) in chunks.iter().enumerate() {
        let mut offer = asked(chunks);
        offer.targets.ttft_ms = if n == 0 { 300.0 } else { 10.0 };
        serve(&mut core, n as u64 * 2_000, &offer, 21, End::Complete);
    }
    let heat = core.heat(at(10_000));
    let [family] = &heat.families[..] else {
        panic!("one family, not {heat:?}")
    };
    assert_eq!((family.chunk, family.chunks), (2, 2));
    assert_eq!((family.held, family.key_epoch), (true, 7));
    assert!((120..=128).contains(&family.tokens), "{}", family.tokens);
    assert_eq!(heat.arrivals, family.arrivals);
    // One first token was in time, one was not.
    assert!(heat.first_tokens > 0);
    assert!(
        (heat.in_time * 2).abs_diff(heat.first_tokens) <= 60,
        "{heat:?}"
    );
    // The engine is learnt meanwhile: it is not quite what was said of it.
    let work_ms = 2.0 * Profile::default().work_ms(64.0, 202.0, 50.0);
    assert!(
        (0.6..1.6).contains(&(core.took_ms() / work_ms)),
        "{}",
        core.took_ms()
    );
    let recorded = core.recorded(at(10_000), 60_000, 10);
    let (arrivals, one_in) = (recorded.arrivals, recorded.one_in);
    assert_eq!((arrivals.len(), one_in), (2, 1));
    assert_eq!((arrivals[0].family, arrivals[0].conversation), (2, 10));
    assert_eq!(
        (arrivals[1].cached_tokens, arrivals[1].output_tokens),
        (64, 50)
    );
}

#[test]
fn what_is_sent_back_unstarted_was_not_asked_here() {
    let mut core = open_with(ROOMY);
    // While the first is prefilled the others wait.
    let first = core
        .place(at(0), &asked(&(100..400).collect::<Vec<_>>()))
        .unwrap();
    let waits = core.place(at(1), &asked(&[1, 2, 3])).unwrap();
    assert!(first.starts && !waits.starts);
    let before = core.heat(at(1_000)).arrivals;
    core.stop(at(1_000));
    assert!(matches!(core.poll_effect(), Some(Effect::Over(id, ..)) if id == waits.id));
    let after = core.heat(at(1_000));
    assert!(
        after.arrivals.abs_diff(before / 2) <= 1,
        "{before} {after:?}"
    );
    assert_eq!(core.recorded(at(1_000), 60_000, 10).arrivals.len(), 1);
}

#[test]
fn a_copy_warms_the_cache_and_is_nobodys_request() {
    let mut core = open_with(ROOMY);
    let chunks: Vec<u64> = (1..=20).collect();
    serve(&mut core, 0, &shadow(&chunks), 100, End::Complete);
    let heat = core.heat(at(5_000));
    assert_eq!((heat.arrivals, heat.takes, heat.first_tokens), (0, 0, 0));
    assert_eq!((core.recordings(), core.took_ms()), (0, 0.0));
    assert!(core.load().service.is_zero(), "nothing is learnt of it");
    let offer = asked(&chunks);
    core.place(at(6_000), &offer).unwrap();
    let arrivals = core.recorded(at(6_000), 60_000, 10).arrivals;
    assert!(arrivals[0].cached_tokens > 1_200, "{arrivals:?}");
}

#[test]
fn copies_come_one_at_a_time_and_take_no_more_than_their_part() {
    let refused = |core: &mut Core, now, offer: &Offer| {
        core.place(at(now), offer)
            .err()
            .map(|refused| refused.reason)
    };
    let mut core = open_with(ROOMY);
    let long = |n: u64| shadow(&(n * 1_000..n * 1_000 + 400).collect::<Vec<_>>());
    let first = core.place(at(0), &long(1)).unwrap();
    let full = Some(RefusalReason::Full);
    assert_eq!(refused(&mut core, 10, &long(2)), full, "one is here");
    core.first_byte(at(2_000), first.id);
    core.end(at(2_010), first.id, End::Complete);
    // 25,600 tokens take some 2.2 s; two seconds were left over from before.
    assert_eq!(
        refused(&mut core, 2_020, &long(2)),
        full,
        "its part is used up"
    );
    let later = 2_020 + 20_000;
    assert_eq!(
        refused(&mut core, later, &long(2)),
        None,
        "a second was earned"
    );
    // What is held already needs no copy, and a request of a client is never refused for one.
    core.place(at(later), &asked(&[5, 6])).unwrap();
    // Of one that is given up before it ran nothing was taken.
    let mut core = open_with(ROOMY);
    core.place(at(0), &asked(&(9_000..9_900).collect::<Vec<_>>()))
        .unwrap();
    for n in 0..5 {
        let waits = core.place(at(10 + n), &long(n + 1)).unwrap();
        assert!(!waits.starts);
        core.end(at(10 + n), waits.id, End::Cancelled);
    }
}

#[test]
fn a_copy_waits_behind_everything_that_came_before_it_starts() {
    let mut core = open_with(ROOMY);
    let busy = core
        .place(at(0), &asked(&(9_000..9_300).collect::<Vec<_>>()))
        .unwrap();
    let copy = core.place(at(1), &shadow(&[1, 2, 3])).unwrap();
    let mut never = asked(&[4, 5, 6]);
    never.targets.ttft_ms = f64::INFINITY;
    let promised_nothing = core.place(at(2), &never).unwrap();
    assert!(!copy.starts && !promised_nothing.starts);
    // The copy is before nobody, in what is told to balancers too.
    core.first_byte(at(1_900), busy.id);
    let started = std::iter::from_fn(|| core.poll_effect());
    let started: Vec<_> = started.collect();
    assert_eq!(started.first(), Some(&Effect::Start(promised_nothing.id)));
}
