//! The shadow, the stream and its follower, against plain sets.

use std::collections::BTreeMap;

use forebay_proto::{Incarnation, WorkerId};
use proptest::prelude::*;

use super::*;

const WORKER: Incarnation = Incarnation {
    worker: WorkerId(1),
    grant: 1,
    start: 1,
};

/// Chunks of 100 tokens each.
fn spread(chunks: usize) -> Spread {
    Spread {
        prompt_tokens: chunks as u32 * 100 + 1,
        prompt_bytes: chunks as u64 * 256 + 1,
        chunk_bytes: 256,
    }
}

fn run(shadow: &mut Shadow, chunks: &[u64]) {
    let held = shadow.taken(chunks, &spread(chunks.len()));
    shadow.prefilled(chunks);
    shadow.finished(chunks, held, 0);
}

#[test]
fn tokens_lie_evenly_on_chunks_and_the_last_is_never_cached() {
    let spread = Spread {
        prompt_tokens: 10,
        prompt_bytes: 512,
        chunk_bytes: 256,
    };
    assert_eq!(
        (spread.tokens_at(0, (0, 0)), spread.tokens_at(1, (0, 0))),
        (5, 9)
    );
    assert_eq!(
        spread.tokens_at(1, (1, 2)),
        9,
        "what is known is not spread again"
    );
}

#[test]
fn what_was_prefilled_is_resident_until_others_need_the_room() {
    let mut shadow = Shadow::new(500);
    run(&mut shadow, &[1, 2, 3]);
    assert_eq!(shadow.hit(&[1, 2, 3, 4]), (3, 300));
    run(&mut shadow, &[10, 11, 12]);
    // The oldest goes first, from its path's end.
    assert_eq!(shadow.hit(&[1, 2, 3]), (2, 200));
    assert_eq!(shadow.hit(&[10, 11, 12]), (3, 300));
    run(&mut shadow, &[1, 2]);
    run(&mut shadow, &[20]);
    assert_eq!(shadow.hit(&[10, 11, 12]), (2, 200));
    assert_eq!(shadow.hit(&[1, 2]), (2, 200));
}

#[test]
fn what_is_in_use_stays_and_answers_take_room() {
    let mut shadow = Shadow::new(500);
    assert_eq!(shadow.taken(&[1, 2, 3], &spread(3)), 3);
    shadow.prefilled(&[1, 2, 3]);
    run(&mut shadow, &[10, 11, 12]);
    assert_eq!(shadow.hit(&[1, 2, 3]), (3, 300));
    assert_eq!(shadow.hit(&[10, 11, 12]), (2, 200));
    shadow.finished(&[1, 2, 3], 3, 100);
    assert_eq!(shadow.hit(&[10, 11]), (1, 100));
}

#[test]
fn what_was_taken_counts_and_is_gone_if_it_was_never_prefilled() {
    let mut shadow = Shadow::new(1_000);
    run(&mut shadow, &[1]);
    shadow.taken(&[1, 2, 3], &spread(3));
    assert_eq!(shadow.hit(&[1, 2, 3]), (3, 300));
    shadow.taken(&[1, 2, 4], &spread(3));
    shadow.abandoned(&[1, 2, 3], 3);
    assert_eq!(
        shadow.hit(&[1, 2, 3]),
        (2, 200),
        "another has begun the second"
    );
    shadow.abandoned(&[1, 2, 4], 3);
    assert_eq!(shadow.hit(&[1, 2, 3]), (1, 100));
    assert_eq!(shadow.tokens().0, 100);
}

#[test]
fn an_engines_count_takes_the_place_of_an_estimate() {
    let mut shadow = Shadow::new(1_000);
    let held = shadow.taken(&[1, 2], &spread(2));
    shadow.prefilled(&[1, 2]);
    let counted = Spread {
        prompt_tokens: 401,
        ..spread(2)
    };
    shadow.counted(&[1, 2], &counted);
    shadow.finished(&[1, 2], held, 0);
    assert_eq!(shadow.hit(&[1]), (1, 200));
    assert_eq!(shadow.tokens().0, 400);
}

#[test]
fn the_size_follows_what_the_engine_says() {
    let mut shadow = Shadow::new(1_000);
    for _ in 0..20 {
        shadow.correct(500, 100, 200);
    }
    let (_, shrunk) = shadow.tokens();
    assert!((600..700).contains(&shrunk), "{shrunk}");
    (0..1_000).for_each(|_| shadow.correct(500, 100, 200));
    assert_eq!(shadow.tokens().1, 250);
    shadow.correct(0, 500, 200);
    assert_eq!(
        shadow.tokens().1,
        250,
        "it has room: its size is not to blame"
    );
    for n in 0..2_000 {
        shadow.finished(&[], 0, 10);
        if n > 100 {
            shadow.correct(0, 500, 200);
        }
    }
    assert_eq!(shadow.tokens().1, 1_250);
    shadow.correct(300, 200, 200);
    assert_eq!(shadow.tokens().1, 1_250, "within the grain");
}

#[test]
fn a_grade_is_lost_by_predicting_too_much_or_by_an_engine_that_is_silent() {
    let mut check = SelfCheck::default();
    for at in 0..100 {
        let reported = if at % 10 == 0 { 0 } else { 1_000 };
        let verdict = check.observe(1_000, Some(reported), 200);
        let expected = if at == 99 {
            Verdict::Overpredicted
        } else {
            Verdict::Same
        };
        assert_eq!(verdict, expected, "{at}");
    }
    assert_eq!(check.grade(), Grade::Blind);
    let restored =
        (0..100).position(|_| check.observe(1_000, Some(1_000), 200) == Verdict::Restored);
    assert!(restored.is_some_and(|at| at > 50), "{restored:?}");
    let silent = (0..100).position(|_| check.observe(1_000, None, 200) == Verdict::Silent);
    assert_eq!(silent, Some(19));
}

#[test]
fn a_cursor_that_is_too_far_behind_gets_a_snapshot() {
    let mut publisher = Publisher::new(WORKER, 7, Grade::Inferred);
    let snapshot = |next: &Next| matches!(next, Next::Snapshot(_));
    assert!(snapshot(&publisher.since(None)));
    let start = publisher.newest();
    assert!(matches!(publisher.since(Some(start)), Next::Nothing));
    for chunk in 0..2_000 {
        publisher.note([Change::Stored { chunk, tokens: 1 }]);
        assert!(publisher.flush());
    }
    assert!(snapshot(&publisher.since(Some(start))));
    let near = Cursor {
        cache: 7,
        seq: 1_990,
    };
    assert!(matches!(publisher.since(Some(near)), Next::Deltas(deltas) if deltas.len() == 10));
    assert!(snapshot(&publisher.since(Some(Cursor {
        cache: 8,
        seq: 1_990
    }))));
    assert!(snapshot(&publisher.since(Some(Cursor {
        cache: 7,
        seq: 9_999
    }))));
    publisher.note([
        Change::Stored {
            chunk: 5,
            tokens: 1,
        },
        Change::Removed { chunk: 9_000 },
    ]);
    assert!(!publisher.flush(), "nothing changed");
    publisher.set_grade(Grade::Blind);
    assert!(publisher.flush(), "the grade did");
}

#[test]
fn a_cache_that_nobody_follows_is_not_written_down_for_ever() {
    let mut publisher = Publisher::new(WORKER, 7, Grade::Inferred);
    let mut balancer = Balancer {
        follower: Follower::new(WORKER),
        index: BTreeMap::new(),
    };
    publisher.flush();
    tell(&publisher, &mut balancer, &mut std::iter::empty());
    // Ten chunks that come and go, each another one.
    let last = 3 * publish::MAX_TOUCHED as u64;
    for chunk in 0..last {
        publisher.note([Change::Stored { chunk, tokens: 1 }]);
        if let Some(chunk) = chunk.checked_sub(10) {
            publisher.note([Change::Removed { chunk }]);
        }
        assert!(publisher.touched() <= publish::MAX_TOUCHED);
        assert!(publisher.is_pending(), "whoever follows is to be told");
    }
    assert!(publisher.flush());
    assert!(!publisher.is_pending());
    tell(&publisher, &mut balancer, &mut std::iter::empty());
    let held: Vec<u64> = balancer.index.into_keys().collect();
    assert_eq!(held, (last - 10..last).collect::<Vec<_>>());
}

#[test]
fn what_is_in_a_shadow_without_a_chunk_is_bounded_too() {
    let mut shadow = Shadow::new(u64::MAX);
    for _ in 0..shadow::MAX_UNUSED + 10 {
        shadow.finished(&[], 0, 1);
    }
    assert_eq!(shadow.tokens().0, shadow::MAX_UNUSED as u64);
}

/// What may happen to one message.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Arrives,
    Lost,
    Doubled,
    /// After the one behind it.
    Late,
    Damaged(u8),
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        16 => Just(Fate::Arrives),
        1 => Just(Fate::Lost),
        1 => Just(Fate::Doubled),
        1 => Just(Fate::Late),
        1 => any::<u8>().prop_map(Fate::Damaged),
    ]
}

/// What arrives of these messages.
fn arriving<T: Clone>(
    sent: &[T],
    fates: &mut impl Iterator<Item = Fate>,
    damage: impl Fn(&mut T, u8),
) -> Vec<T> {
    let mut arrived = Vec::new();
    let mut late = None;
    for message in sent {
        let mut message = message.clone();
        match fates.next().unwrap_or(Fate::Arrives) {
            Fate::Arrives => arrived.push(message),
            Fate::Lost => {}
            Fate::Doubled => arrived.extend([message.clone(), message]),
            Fate::Late => {
                arrived.extend(late.replace(message));
                continue;
            }
            Fate::Damaged(with) => {
                damage(&mut message, with);
                arrived.push(message);
            }
        }
        arrived.extend(late.take());
    }
    arrived.extend(late);
    arrived
}

/// Sends a balancer what it needs, as far as fate lets it through.
fn tell(publisher: &Publisher, balancer: &mut Balancer, fates: &mut impl Iterator<Item = Fate>) {
    match publisher.since(balancer.follower.cursor()) {
        Next::Nothing => {}
        Next::Snapshot(pieces) => {
            // Its sequence number is covered by QUIC alone: the checksum is of what is resident.
            let arrived = arriving(&pieces, fates, |piece, with| match with % 4 {
                0 => piece.checksum ^= 1,
                _ => piece.stored = damaged(&piece.stored, with),
            });
            for piece in arrived {
                let ops = balancer.follower.snapshot(&piece);
                balancer.take(ops);
            }
        }
        Next::Deltas(deltas) => {
            let deltas: Vec<_> = deltas.iter().map(|delta| (**delta).clone()).collect();
            let arrived = arriving(&deltas, fates, |delta, with| match with % 4 {
                0 => delta.checksum ^= 1,
                1 => delta.seq += 1,
                2 => delta.removed = damaged(&delta.removed, with),
                _ => delta.stored = damaged(&delta.stored, with),
            });
            for delta in arrived {
                let ops = balancer.follower.delta(&delta);
                balancer.take(ops);
            }
        }
    }
}

/// Applies what arrives to a follower and to the plain set that its operations describe.
struct Balancer {
    follower: Follower,
    index: BTreeMap<u64, u32>,
}

impl Balancer {
    fn take(&mut self, ops: Result<Vec<Op>, Resync>) {
        match ops {
            Err(_) => self.index.clear(),
            Ok(ops) => {
                for op in ops {
                    match op {
                        Op::Clear => self.index.clear(),
                        Op::Store(chunk, tokens) => drop(self.index.insert(chunk, tokens)),
                        Op::Remove(chunk) => drop(self.index.remove(&chunk)),
                    }
                }
            }
        }
    }
}

fn damaged(bytes: &bytes::Bytes, with: u8) -> bytes::Bytes {
    let mut bytes = bytes.to_vec();
    let at = usize::from(with) % bytes.len().max(1);
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= with | 1;
    }
    bytes.into()
}

proptest! {
    #[test]
    fn who_believes_to_be_up_to_date_is(
        steps in proptest::collection::vec((proptest::collection::vec((0..30_u64, any::<bool>()), 0..6), any::<bool>(), 0..4_u8), 1..80),
        fates in proptest::collection::vec(fate(), 0..120),
    ) {
        let mut publisher = Publisher::new(WORKER, 7, Grade::Inferred);
        let mut plain: BTreeMap<u64, u32> = BTreeMap::new();
        let mut balancer = Balancer { follower: Follower::new(WORKER), index: BTreeMap::new() };
        let mut fates = fates.into_iter();
        for (changes, flushed, away) in steps {
            for (chunk, stored) in changes {
                if stored {
                    publisher.note([Change::Stored { chunk, tokens: chunk as u32 }]);
                    plain.insert(chunk, chunk as u32);
                } else {
                    publisher.note([Change::Removed { chunk }]);
                    plain.remove(&chunk);
                }
            }
            if flushed {
                publisher.flush();
                prop_assert!(!publisher.is_pending());
            }
            // After a while without a look, several deltas come together.
            if away == 0 {
                tell(&publisher, &mut balancer, &mut fates);
                if !publisher.is_pending() && balancer.follower.cursor() == Some(publisher.newest()) {
                    prop_assert_eq!(&balancer.index, &plain);
                }
            }
        }
        publisher.flush();
        // When nothing is lost any more, once is enough, or twice after a message that was no use.
        for _ in 0..2 {
            tell(&publisher, &mut balancer, &mut std::iter::empty());
        }
        prop_assert_eq!(balancer.follower.cursor(), Some(publisher.newest()));
        prop_assert_eq!(&balancer.index, &plain);
    }

    #[test]
    fn a_shadow_goes_on_from_what_was_kept_of_it(
        paths in proptest::collection::vec((0..6_u64, 1..8_usize, 0..300_u32), 1..40),
        running in 0..3_usize,
    ) {
        let mut shadow = Shadow::new(1_500);
        let last = paths.len().saturating_sub(running);
        for (at, (family, length, answer)) in paths.into_iter().enumerate() {
            let chunks: Vec<u64> = (0..length as u64).map(|at| family * 100 + at).collect();
            let held = shadow.taken(&chunks, &spread(length));
            shadow.prefilled(&chunks);
            if at < last {
                shadow.finished(&chunks, held, answer);
            }
        }
        let kept = shadow.kept();
        let mut after = Shadow::restored(1_500, &kept);
        prop_assert!(after.tokens().0 <= after.tokens().1);
        prop_assert_eq!(after.tokens().1, shadow.tokens().1);
        let mut mirror = BTreeMap::new();
        for change in after.take_changes() {
            match change {
                Change::Stored { chunk, tokens } => drop(mirror.insert(chunk, tokens)),
                Change::Removed { chunk } => drop(mirror.remove(&chunk)),
            }
        }
        prop_assert_eq!(mirror.len(), after.len());
        for chunk in mirror.keys() {
            prop_assert!(chunk % 100 == 0 || mirror.contains_key(&(chunk - 1)));
        }
        if running == 0 {
            prop_assert_eq!(after.kept(), kept, "nothing was in use: nothing is lost");
        }
    }

    #[test]
    fn a_shadow_never_holds_more_than_fits_but_for_what_is_in_use(
        paths in proptest::collection::vec((0..6_u64, 1..8_usize, 0..300_u32), 1..60)
    ) {
        let mut shadow = Shadow::new(1_500);
        let mut mirror: BTreeMap<u64, u32> = BTreeMap::new();
        for (family, length, answer) in paths {
            let chunks: Vec<u64> = (0..length as u64).map(|at| family * 100 + at).collect();
            let held = shadow.taken(&chunks, &spread(length));
            prop_assert_eq!(shadow.hit(&chunks).0, length);
            if answer % 3 == 0 {
                shadow.abandoned(&chunks, held);
            } else {
                shadow.prefilled(&chunks);
                shadow.counted(&chunks, &spread(length));
                shadow.finished(&chunks, held, answer);
            }
            let (used, capacity) = shadow.tokens();
            prop_assert!(used <= capacity, "{} of {}", used, capacity);
            for change in shadow.take_changes() {
                match change {
                    Change::Stored { chunk, tokens } => drop(mirror.insert(chunk, tokens)),
                    Change::Removed { chunk } => drop(mirror.remove(&chunk)),
                }
            }
            prop_assert_eq!(mirror.len(), shadow.len());
            // No chunk stays whose predecessor went.
            for chunk in mirror.keys() {
                prop_assert!(chunk % 100 == 0 || mirror.contains_key(&(chunk - 1)));
            }
        }
    }
}
