//! What is told of a cache whose events are followed, and what is told when they cannot be believed.

use std::time::Duration;

use forebay_proto::{Incarnation, Now, WorkerId};
use forebay_scheduler::residency::Grade;

use super::cache::{Cache, Continuity, GradeChange, Prompt};
use super::kv::{Aligned, Batch, Event, News, Place, Stored};
use super::placement::Usage;

const OWN: Incarnation = Incarnation {
    worker: WorkerId(1),
    grant: 1,
    start: 1,
};
const KV_TOKENS: u64 = 1_000;

fn prompt() -> Prompt {
    Prompt {
        chunks: vec![1, 2, 3],
        bytes: 768,
        chunk_bytes: 256,
        tokens: 65,
    }
}

fn ids() -> Vec<u32> {
    (0..65).collect()
}

/// An engine whose events are followed from its first on.
fn followed() -> Cache {
    let mut cache = Cache::new(OWN, 1, KV_TOKENS);
    cache.follow_events([7; 16], true);
    assert_eq!(cache.engine_is(Some("e1".into())), Continuity::Same);
    assert_eq!(cache.grade(), Grade::Inferred, "nothing was told yet");
    caught_up(&mut cache);
    assert_eq!(cache.take_grade_change(), Some(GradeChange::Events));
    cache
}

/// The engine has nothing to tell again.
fn caught_up(cache: &mut Cache) {
    cache.events(|exact| {
        assert!(exact.ask(Now::default()).is_some());
        exact.replay_end();
    });
}

fn told(cache: &mut Cache, seq: u64, events: Vec<Event>) {
    let batch = Batch { at: 0.0, events };
    cache.events(|exact| exact.live(seq, batch));
}

/// The four blocks of the prompt are stored.
fn stored() -> Vec<Event> {
    vec![Event::Stored(Stored {
        hashes: vec![11, 12, 13, 14],
        parent: None,
        tokens: ids()[..64].to_vec(),
        block_tokens: 16,
        extras: Vec::new(),
        adapter: None,
        place: Place {
            gpu: true,
            group: 0,
        },
    })]
}

/// A request runs from its beginning to its end, by which the engine told its blocks and its tokens.
fn served(cache: &mut Cache, seq: u64, cached: u32) {
    let prompt = prompt();
    let mut held = cache.taken(&prompt);
    let foreseen = cache.begun(&prompt, &mut held);
    told(cache, seq, if seq == 0 { stored() } else { Vec::new() });
    let news = News {
        chunks: prompt.chunks.clone(),
        aligned: Aligned {
            ends: vec![20, 40, 60],
            ..Aligned::default()
        },
        ids: ids(),
        ..News::default()
    };
    cache.events(|exact| exact.aligned(news));
    cache.prefilled(&prompt, held);
    let usage = Usage {
        prompt_tokens: Some(65),
        cached_tokens: Some(cached),
        completion_tokens: Some(1),
    };
    cache.finished(Now::default(), &prompt, held, usage);
    cache.observe(&prompt, held, foreseen, usage);
    cache.pass(Now::at(Duration::from_secs(1 + seq)));
}

#[test]
fn what_events_say_is_told() {
    let mut cache = followed();
    assert_eq!(cache.grade(), Grade::Exact);
    served(&mut cache, 0, 0);
    assert_eq!((cache.resident_chunks(), cache.publisher().len()), (3, 3));
    assert_eq!(cache.hit(&prompt()), 48, "whole blocks");
    // Its third block goes, and both chunks that touch it.
    let removed = |hash| Event::Removed {
        hashes: vec![hash],
        place: Place {
            gpu: true,
            group: 0,
        },
    };
    told(&mut cache, 1, vec![removed(14), removed(13)]);
    assert_eq!((cache.resident_chunks(), cache.publisher().len()), (1, 1));
    assert_eq!(cache.hit(&prompt()), 16);
}

#[test]
fn while_something_is_missing_it_is_not_exact_and_when_it_is_lost_the_shadow_is_told() {
    let mut cache = followed();
    served(&mut cache, 0, 0);
    told(&mut cache, 5, Vec::new());
    assert_eq!(cache.grade(), Grade::Inferred);
    assert_eq!(cache.publisher().len(), 3, "the map stands");
    cache.events(|exact| {
        assert_eq!(exact.ask(Now::default()), Some(1));
        exact.replayed(Now::default(), 4, Batch::default());
        exact.replay_end();
    });
    assert_eq!(cache.take_grade_change(), Some(GradeChange::EventsLost));
    assert_eq!(cache.grade(), Grade::Inferred);
    assert_eq!(
        cache.publisher().len(),
        3,
        "by the shadow, which has them too"
    );
    // An emptied cache is known whole again.
    told(&mut cache, 6, vec![Event::Cleared]);
    assert_eq!((cache.grade(), cache.publisher().len()), (Grade::Exact, 0));
}

#[test]
fn what_does_not_come_true_is_not_told_any_more() {
    let mut cache = followed();
    for seq in 0..=100 {
        served(&mut cache, seq, 0);
    }
    assert_eq!(cache.take_grade_change(), Some(GradeChange::EventsWrong));
    assert_ne!(cache.grade(), Grade::Exact);
    // Until another process begins.
    assert_eq!(cache.engine_is(Some("e2".into())), Continuity::Restarted);
    assert_eq!(cache.publisher().len(), 0);
    caught_up(&mut cache);
    assert_eq!(cache.grade(), Grade::Exact);
}

#[test]
fn a_map_by_events_outlives_its_agent_and_is_exact_when_all_is_told() {
    let mut before = followed();
    served(&mut before, 0, 0);
    let map = before.map().unwrap();
    let bytes = map.encode().unwrap();
    let check = |process: &str, continuity, chunks| {
        let mut cache = Cache::new(OWN, 9, KV_TOKENS);
        cache.recall(super::Map::decode(&bytes).unwrap());
        cache.follow_events([8; 16], true);
        assert_eq!(cache.engine_is(Some(process.into())), continuity);
        assert_eq!(cache.publisher().len(), chunks);
        assert_eq!(
            cache.grade(),
            Grade::Inferred,
            "something may have come meanwhile"
        );
        caught_up(&mut cache);
        assert_eq!(
            (cache.grade(), cache.publisher().len()),
            (Grade::Exact, chunks)
        );
    };
    check("e1", Continuity::Continued(3), 3);
    check("e2", Continuity::Restarted, 0);
}
