//! Claims about the core, each through [`World`].

use std::time::Duration;

use forebay_proto::wire::fleet::{Desired, Observed};
use forebay_proto::{Incarnation, Now, Revision, WorkerId};
use forebay_scheduler::Acceptance;
use forebay_scheduler::model::Targets;

use super::*;

pub(super) const OWN: Incarnation = Incarnation {
    worker: WorkerId(7),
    grant: 10,
    start: 3,
};

pub(super) const SETTINGS: Settings = Settings {
    at_once: false,
    slots: 2,
    queue_limit: 2,
    body_budget_bytes: 1_000,
    kv_tokens: 10_000,
    profile: None,
};

pub(super) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub(super) fn at(since: u64) -> Now {
    Now::at(ms(since))
}

pub(super) fn offer() -> Offer {
    Offer {
        request_id: "r".into(),
        incarnation: OWN,
        model: "m".into(),
        path: "/v1/chat/completions".into(),
        body_bytes: 10,
        deadline: ms(10_000),
        targets: Targets::NONE,
        expected_ttft: Some(ms(60_000)),
        must_queue: false,
        prompt: Prompt::default(),
        max_tokens: 0,
        stream: true,
        cache_salt: None,
        zone: None,
        key_epoch: 0,
        shadow: false,
        tenant: "t".into(),
        named: None,
    }
}

/// A core that is open.
pub(super) fn open() -> Core {
    open_with(SETTINGS)
}

fn taken(core: &mut Core, now: u64) -> PlacementId {
    core.place(at(now), &offer()).unwrap().id
}

/// What the core says to an offer after `prepare`.
fn check(
    prepare: impl FnOnce(&mut Core, &mut Offer),
    expected: Option<RefusalReason>,
) -> Option<Refused> {
    let (mut core, mut offer) = (open(), offer());
    prepare(&mut core, &mut offer);
    let before = core.in_flight();
    let refused = core.place(at(1), &offer).err();
    assert_eq!(refused.map(|refused| refused.reason), expected);
    assert_eq!(core.in_flight(), before + usize::from(refused.is_none()));
    refused
}

#[test]
fn each_reason_to_refuse_is_told_with_the_state() {
    use RefusalReason as R;
    check(|_, _| {}, None);
    let other = Incarnation { start: 2, ..OWN };
    let fenced = check(|_, o| o.incarnation = other, Some(R::Fenced)).unwrap();
    assert_eq!(fenced.load.incarnation, OWN);
    let cordoned = check(
        |c, _| c.facts(at(0), Desired::Cordoned, Revision(21)),
        Some(R::Cordoned),
    );
    let load = cordoned.unwrap().load;
    assert_eq!(
        (load.acceptance, load.facts_revision),
        (Acceptance::Cordoned, Revision(21))
    );
    check(
        |c, _| c.facts(at(0), Desired::Draining, Revision(21)),
        Some(R::Draining),
    );
    check(|c, _| c.stop(at(0)), Some(R::Draining));
    check(|c, _| c.engine_down(at(0)), Some(R::EngineDown));
    check(|c, _| *c = Core::new(SETTINGS, OWN, 1), Some(R::EngineDown));
    check(|_, o| o.model = "n".into(), Some(R::WrongModel));
    check(|_, o| o.deadline = Duration::ZERO, Some(R::Deadline));
    check(|_, o| o.body_bytes = 1_001, Some(R::BodyBudget));
    check(|_, o| o.body_bytes = 1_000, None);
    let fill = |core: &mut Core, count| {
        for _ in 0..count {
            taken(core, 0);
        }
    };
    check(|c, _| fill(c, 3), None);
    check(|c, _| fill(c, 4), Some(R::Full));
    check(
        |c, o| {
            fill(c, 4);
            o.must_queue = true;
        },
        Some(R::Full),
    );
}

#[test]
fn a_wait_that_the_balancer_did_not_expect_is_refused_unless_it_insists() {
    let crowded = |core: &mut Core, offer: &mut Offer| {
        // Two slots, one waits: the next waits for two of 1 s each, that is 1 s.
        for _ in 0..3 {
            taken(core, 0);
        }
        offer.expected_ttft = Some(ms(700));
    };
    check(crowded, Some(RefusalReason::StaleView));
    let insisting = |core: &mut Core, offer: &mut Offer| {
        crowded(core, offer);
        offer.must_queue = true;
    };
    check(insisting, None);
    let expecting = |core: &mut Core, offer: &mut Offer| {
        crowded(core, offer);
        offer.expected_ttft = Some(ms(900));
    };
    check(expecting, None);
}

#[test]
fn who_waits_starts_in_order_when_a_slot_is_free() {
    let mut core = open();
    let ids: Vec<_> = (0..4).map(|i| taken(&mut core, i)).collect();
    assert_eq!((core.running(), core.queued()), (2, 2));
    let ending = core.end(at(100), ids[1], End::Complete).unwrap();
    assert_eq!(ending.service, ms(99));
    assert_eq!((ending.load.running, ending.load.queued), (2, 1));
    assert_eq!(core.poll_effect(), Some(Effect::Start(ids[2])));
    core.first_byte(at(150), ids[2]);
    let ending = core.end(at(180), ids[2], End::Complete).unwrap();
    let times = (ending.queue, ending.first_byte, ending.service);
    assert_eq!(times, (ms(98), ms(50), ms(80)));
    assert_eq!(core.end(at(190), ids[2], End::Cancelled), None, "only once");
}

#[test]
fn slots_are_those_of_the_engine_that_is_there_and_no_more_than_were_set_up() {
    let mut core = open();
    let asked = core.slots();
    for (engine, slots) in [(1, 1), (asked, asked), (asked + 7, asked), (0, 1)] {
        core.engine_runs(engine);
        assert_eq!(core.slots(), slots, "an engine that runs {engine}");
    }
}

#[test]
fn the_report_that_contains_a_change_is_told_with_it() {
    let mut core = open();
    let admitted = core.place(at(0), &offer()).unwrap();
    assert_eq!(
        (admitted.load.seq, admitted.load.running),
        (admitted.report_seq, 1)
    );
    let ending = core.end(at(1), admitted.id, End::Cancelled).unwrap();
    assert!(ending.report_seq > admitted.report_seq);
    assert_eq!(
        (ending.load.seq, ending.load.running),
        (ending.report_seq, 0)
    );
}

#[test]
fn a_deadline_that_passes_in_the_queue_is_told() {
    let mut core = open();
    taken(&mut core, 0);
    taken(&mut core, 0);
    let mut late = offer();
    late.deadline = ms(50);
    let late = core.place(at(0), &late).unwrap().id;
    assert_eq!(core.next_deadline(), Some(at(50)));
    core.expire(at(49));
    assert_eq!(core.poll_effect(), None);
    core.expire(at(50));
    let Some(Effect::Over(id, Unstarted::Deadline, ending)) = core.poll_effect() else {
        panic!("it is over")
    };
    assert_eq!((id, ending.queue, ending.service), (late, ms(50), ms(0)));
    assert_eq!(core.queued(), 0);
}

#[test]
fn what_waits_is_sent_back_by_a_drain_a_stop_and_a_dead_engine_and_kept_by_a_cordon() {
    let sent_back = |act: fn(&mut Core)| {
        let mut core = open();
        let ids: Vec<_> = (0..4).map(|_| taken(&mut core, 0)).collect();
        act(&mut core);
        let mut over = vec![];
        while let Some(Effect::Over(id, why, _)) = core.poll_effect() {
            assert!(ids[2..].contains(&id));
            over.push(why);
        }
        assert_eq!(core.running(), 2, "what runs goes on");
        over
    };
    let drain = |core: &mut Core| core.facts(at(1), Desired::Draining, Revision(21));
    assert_eq!(sent_back(drain), [Unstarted::Draining; 2]);
    assert_eq!(sent_back(|core| core.stop(at(1))), [Unstarted::Draining; 2]);
    assert_eq!(
        sent_back(|core| core.engine_down(at(1))),
        [Unstarted::EngineDown; 2]
    );
    let cordon = |core: &mut Core| core.facts(at(1), Desired::Cordoned, Revision(21));
    assert_eq!(sent_back(cordon), []);
}

#[test]
fn a_drain_is_over_when_nothing_is_in_flight() {
    let mut core = open();
    let id = taken(&mut core, 0);
    core.facts(at(1), Desired::Draining, Revision(21));
    assert_eq!(core.observed(), Observed::Draining);
    core.end(at(2), id, End::Complete);
    assert_eq!(core.observed(), Observed::Drained);
    core.facts(at(3), Desired::Ready, Revision(22));
    assert_eq!(core.observed(), Observed::Ready);
    assert_eq!(core.applied_revision(), Revision(22));
}

#[test]
fn what_is_under_way_is_told_with_the_oldest_by_name() {
    let mut core = open();
    assert_eq!(core.work(at(0)), Work::default());
    let mut ids = vec![];
    for (n, max_tokens) in [(0, 100), (1, 40), (2, 10)] {
        let one = Offer {
            request_id: format!("r{n}"),
            max_tokens,
            ..offer()
        };
        ids.push(core.place(at(n * 100), &one).unwrap().id);
    }
    let work = core.work(at(1_000));
    assert_eq!((work.in_flight, work.queued), (3, 1));
    assert_eq!(work.oldest, ms(1_000));
    assert_eq!(work.tokens_left, 150, "nothing was answered so far");
    assert_eq!(work.oldest_ids, ["r0", "r1", "r2"]);
    assert_eq!(work.eta, ms(0), "nobody knows how long one takes");
    core.first_byte(at(1_100), ids[0]);
    core.end(at(1_200), ids[0], End::Complete);
    let work = core.work(at(1_300));
    assert_eq!((work.in_flight, work.oldest), (2, ms(1_200)));
    assert_eq!(
        work.eta,
        ms(1_100),
        "one took 1.2 s, the newest began 0.1 s ago"
    );
}

#[test]
fn tokens_that_the_model_expects_to_be_made_are_not_left() {
    let profile = forebay_scheduler::model::PROFILES[0].1;
    let mut core = open_with(Settings {
        profile: Some(profile),
        ..SETTINGS
    });
    let one = Offer {
        max_tokens: 1_000,
        prompt: Prompt {
            tokens: 100,
            ..Prompt::default()
        },
        ..offer()
    };
    let id = core.place(at(0), &one).unwrap().id;
    let before = core.work(at(1));
    assert_eq!(before.tokens_left, 1_000);
    core.first_byte(at(100), id);
    let (early, late) = (core.work(at(200)), core.work(at(1_200)));
    assert!(late.tokens_left < early.tokens_left && early.tokens_left < 1_000);
    assert!(late.eta < early.eta && late.eta > ms(0));
    let whole = core.work(at(1_000_000));
    assert_eq!(whole.tokens_left, 1, "it has not ended");
}

#[test]
fn a_desired_state_of_a_later_version_is_not_acknowledged() {
    let mut core = open();
    core.facts(at(1), Desired::Unspecified, Revision(21));
    assert_eq!(core.acceptance(), Acceptance::Open);
    assert_eq!(core.applied_revision(), Revision(20));
}

#[test]
fn reports_follow_changes_closely_and_never_stay_away() {
    let (mut core, mut to) = (open(), Cadence::default());
    assert_eq!(core.report(at(0), &mut to).unwrap().interval, ms(250));
    assert_eq!(core.report(at(249), &mut to), None);
    assert!(core.report(at(250), &mut to).is_some());
    taken(&mut core, 255);
    assert_eq!(core.report(at(270), &mut to), None, "it was another's");
    to.used(at(260));
    assert!(core.report(at(500), &mut to).is_some());
    to.used(at(510));
    taken(&mut core, 510);
    taken(&mut core, 515);
    assert_eq!(core.report(at(519), &mut to), None);
    let load = core.report(at(520), &mut to).unwrap();
    assert_eq!((load.running, load.interval), (2, ms(100)), "both together");
    assert_eq!(to.due(load.seq), at(620));
}

#[test]
fn a_question_is_answered_with_what_is_known_and_binds_nobody() {
    let mut core = open();
    let mut asked = offer();
    asked.prompt.chunks = vec![1, 2, 3, 4];
    asked.prompt.bytes = 1_024;
    asked.prompt.chunk_bytes = 256;
    asked.prompt.tokens = 400;
    core.place(at(0), &asked).unwrap();
    let question = |chunks: &[u64]| Question {
        chunks: chunks.to_vec(),
        prompt_tokens: 500,
    };
    let before = core.seq();
    let quote = core.quote(at(1), &question(&[2, 3, 9]));
    assert_eq!((quote.cached_tokens, quote.load.running), (300, 1));
    assert_eq!(core.quote(at(1), &question(&[8, 9])).cached_tokens, 0);
    assert_eq!((core.seq(), core.in_flight()), (before, 1));
}

#[test]
fn a_body_counts_until_it_is_with_the_engine() {
    let mut core = open();
    let mut large = offer();
    large.body_bytes = 900;
    let first = core.place(at(0), &large).unwrap().id;
    let refused = core.place(at(0), &large).unwrap_err();
    assert_eq!(refused.reason, RefusalReason::BodyBudget);
    core.first_byte(at(1), first);
    assert_eq!(core.body_bytes(), 0);
    core.place(at(1), &large).unwrap();
}

#[test]
fn an_engine_that_fails_fast_does_not_look_fast() {
    let mut core = open();
    for (start, end, service) in [(0, End::EngineFailed, 0), (400, End::Complete, 400)] {
        let id = taken(&mut core, start);
        core.end(at(start + 400), id, end);
        assert_eq!(core.load().service, ms(service));
    }
}

/// A prompt of `chunks` chunks with 100 tokens each.
fn prompt(chunks: std::ops::Range<u64>) -> Prompt {
    let count = chunks.end - chunks.start;
    Prompt {
        chunks: chunks.collect(),
        bytes: count * 256 + 1,
        chunk_bytes: 256,
        tokens: count as u32 * 100 + 1,
    }
}

fn with_prompt(core: &mut Core, now: u64, prompt: Prompt) -> Admitted {
    let offer = Offer { prompt, ..offer() };
    core.place(at(now), &offer).unwrap()
}

pub(super) const FAST: Settings = Settings {
    at_once: false,
    slots: 2,
    queue_limit: 2,
    body_budget_bytes: 1_000,
    kv_tokens: 10_000,
    profile: Some(forebay_scheduler::model::PROFILES[0].1),
};

pub(super) fn open_with(settings: Settings) -> Core {
    let mut core = Core::new(settings, OWN, 1);
    core.facts(at(0), Desired::Ready, Revision(20));
    core.engine_up(&["m".into()]);
    core
}

#[test]
fn what_was_prefilled_is_expected_to_be_cached_for_the_next() {
    let mut core = open();
    let first = with_prompt(&mut core, 1, prompt(0..10)).id;
    assert_eq!(core.load().backlog.pending_tokens, 1_001.0);
    core.first_byte(at(2), first);
    assert_eq!(core.load().backlog.pending_tokens, 0.0);
    assert_eq!(core.load().backlog.decodes, 1.0);
    core.end(at(3), first, End::Complete);
    with_prompt(&mut core, 4, prompt(0..10));
    assert_eq!(core.load().backlog.pending_tokens, 1.0);
    with_prompt(&mut core, 5, prompt(20..30));
    assert_eq!(core.load().backlog.pending_tokens, 1_002.0);
}

#[test]
fn a_prefill_under_way_shrinks_as_time_passes() {
    let mut core = open_with(FAST);
    with_prompt(&mut core, 0, prompt(0..100));
    let pending = |core: &mut Core, now| {
        core.expire(at(now));
        core.load().backlog.pending_tokens
    };
    let (start, middle, end) = (
        pending(&mut core, 0),
        pending(&mut core, 300),
        pending(&mut core, 9_000),
    );
    assert_eq!(start, 10_001.0);
    assert!((4_000.0..8_000.0).contains(&middle), "{middle}");
    assert_eq!(end, 0.0);
}

#[test]
fn a_first_token_is_news() {
    let mut core = open();
    let id = taken(&mut core, 1);
    let before = core.seq();
    core.first_byte(at(2), id);
    assert_eq!(core.seq(), before + 1);
}

#[test]
fn an_engine_that_went_away_has_lost_its_cache() {
    use forebay_scheduler::residency::Next;
    let mut core = open();
    let id = with_prompt(&mut core, 1, prompt(0..10)).id;
    core.first_byte(at(2), id);
    core.end(at(3), id, End::Complete);
    core.publisher().flush();
    let cursor = core.publisher().newest();
    assert_eq!(core.resident_chunks(), 10);
    core.engine_down(at(4));
    core.engine_up(&["m".into()]);
    assert_eq!(core.resident_chunks(), 0);
    let next = core.publisher().since(Some(cursor));
    assert!(matches!(next, Next::Snapshot(pieces) if pieces[0].stored.is_empty()));
}

#[test]
fn an_engine_that_does_not_count_is_believed_for_two_minutes_at_most() {
    let mut core = open();
    let counted = |cached| Usage {
        prompt_tokens: Some(1_001),
        cached_tokens: cached,
        completion_tokens: Some(5),
    };
    let serve = |core: &mut Core, now, cached| {
        let id = with_prompt(core, now, prompt(0..10)).id;
        core.first_byte(at(now), id);
        core.usage(id, counted(cached));
        let ending = core.end(at(now), id, End::Complete).unwrap();
        assert_eq!(ending.usage, counted(cached));
    };
    (1..20).for_each(|now| serve(&mut core, now, None));
    assert_eq!(core.take_grade_change(), None);
    serve(&mut core, 20, None);
    assert_eq!(core.take_grade_change(), Some(GradeChange::Silent));
    assert_eq!(core.resident_chunks(), 10);
    core.expire(at(61_000));
    core.expire(at(122_000));
    assert_eq!(core.resident_chunks(), 0);
    (0..30).for_each(|now| serve(&mut core, 123_000 + now, Some(1_000)));
    assert_eq!(core.take_grade_change(), Some(GradeChange::Restored));
}

#[test]
fn an_engine_that_counts_nothing_at_all_is_not_trusted_and_a_refusal_is_no_silence() {
    let serve = |core: &mut Core, now, usage| {
        let id = with_prompt(core, now, prompt(0..10)).id;
        core.first_byte(at(now), id);
        core.usage(id, usage);
        core.end(at(now), id, End::Complete);
    };
    let mut core = open();
    (1..=20).for_each(|now| serve(&mut core, now, Usage::default()));
    assert_eq!(core.take_grade_change(), Some(GradeChange::Silent));

    let mut core = open();
    let counted = Usage {
        prompt_tokens: Some(1_001),
        cached_tokens: Some(0),
        completion_tokens: Some(1),
    };
    serve(&mut core, 1, counted);
    (2..=40).for_each(|now| serve(&mut core, now, Usage::default()));
    assert_eq!(core.take_grade_change(), None);
}

#[test]
fn what_was_placed_before_the_engine_went_away_says_nothing_of_its_new_cache() {
    let mut core = open();
    let id = with_prompt(&mut core, 1, prompt(0..10)).id;
    core.first_byte(at(2), id);
    core.engine_down(at(3));
    core.engine_up(&["m".into()]);
    let (life, _) = core.residency_news();
    core.usage(
        id,
        Usage {
            prompt_tokens: Some(1_001),
            cached_tokens: Some(900),
            completion_tokens: Some(5),
        },
    );
    core.end(at(4), id, End::Complete);
    assert_eq!(core.resident_chunks(), 0);
    assert_eq!(core.cached_tokens(), (0, 0));
    assert_eq!(core.residency_news(), (life, false));
}

#[test]
fn forgetting_is_news_without_a_report() {
    let mut core = open();
    for now in 1..=20 {
        let id = with_prompt(&mut core, now, prompt(0..10)).id;
        core.first_byte(at(now), id);
        core.end(at(now), id, End::Complete);
    }
    core.expire(at(61_000));
    core.publisher().flush();
    let before = core.seq();
    core.expire(at(122_000));
    assert_eq!((core.seq(), core.residency_news().1), (before, true));
}

#[test]
fn tokens_are_as_the_engine_counts_them_and_a_wrong_estimate_is_no_wrong_belief() {
    let mut core = open();
    // The balancer takes prompts for twice as long as they are; the engine has what is predicted.
    let mut serve = |now: u64, chunks, cached| {
        let mut long = prompt(chunks);
        let tokens = long.tokens;
        long.tokens *= 2;
        let id = with_prompt(&mut core, now, long).id;
        core.first_byte(at(now), id);
        let usage = Usage {
            prompt_tokens: Some(tokens),
            cached_tokens: Some(cached),
            completion_tokens: Some(1),
        };
        core.usage(id, usage);
        core.end(at(now), id, End::Complete);
        core.publisher().flush();
        core.cached_tokens()
    };
    assert_eq!(serve(1, 0..10, 0), (0, 0));
    assert_eq!(serve(2, 0..10, 1_000), (1_000, 1_000));
    for now in 3..120 {
        serve(now, 0..10, 992);
    }
    assert_eq!(core.take_grade_change(), None);
}
