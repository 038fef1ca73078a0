//! What is said of what was asked for, beside a plain count of it.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_proto::Now;
use proptest::prelude::*;

use super::record::{MOST, WINDOW};
use super::tree::{MAX_CHUNKS, MAX_NODES};
use super::*;

fn at_ms(ms: u64) -> Now {
    Now::at(Duration::from_secs(1_000) + Duration::from_millis(ms))
}

/// Fingerprints of a path, as a chain makes them: each stands for all before it.
fn path(parts: &[u64]) -> Vec<u64> {
    let chain = parts.iter().scan(7_u64, |before, part| {
        *before = before
            .rotate_left(9)
            .wrapping_add(part.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            | 1;
        Some(*before)
    });
    chain.collect()
}

/// A prompt of so many chunks of a kind, then so many of another.
fn prompt(parts: &[(u64, usize)]) -> Vec<u64> {
    let parts = parts
        .iter()
        .flat_map(|(part, count)| std::iter::repeat_n(*part, *count));
    path(&parts.collect::<Vec<_>>())
}

fn ask(heat: &mut Heat, now: Now, chunks: &[u64]) -> Ticket {
    let tokens = chunks.len() as u32 * 64 + 10;
    heat.arrived(
        now,
        &Arrived {
            chunks,
            key_epoch: 3,
            spread: Spread {
                prompt_tokens: tokens,
                prompt_bytes: chunks.len() as u64 * 256 + 40,
                chunk_bytes: 256,
            },
            cached_tokens: 64,
            output_tokens: 100,
            ttft_target_ms: 500.0,
        },
    )
}

/// What is told of these prompts, one a second: chunks of each family, and thousandths of a request a second.
fn told(prompts: &[Vec<u64>]) -> Vec<(u32, u32)> {
    let mut heat = Heat::default();
    for (second, chunks) in prompts.iter().enumerate() {
        ask(&mut heat, at_ms(second as u64 * 1_000), chunks);
    }
    let told = heat.told(at_ms(prompts.len() as u64 * 1_000), |_| None);
    let mut families: Vec<_> = told
        .families
        .iter()
        .map(|family| (family.chunks, family.arrivals))
        .collect();
    families.sort_unstable();
    families
}

#[test]
fn turns_of_one_conversation_make_no_family() {
    let turns: Vec<_> = (1..12).map(|turn| prompt(&[(1, 3 * turn)])).collect();
    assert_eq!(told(&turns), []);
    // Not in another order either, nor when one is asked for twice.
    let mut again = turns.clone();
    again.reverse();
    again.extend(turns);
    assert_eq!(told(&again), []);
}

#[test]
fn conversations_with_a_shared_beginning_make_one_family_where_they_part() {
    let one = prompt(&[(1, 5), (2, 4)]);
    let other = prompt(&[(1, 5), (3, 9)]);
    let families = told(&[one.clone(), other.clone()]);
    assert!(
        matches!(families[..], [(5, rate)] if rate > 0),
        "{families:?}"
    );
    // Their own turns change nothing of that, and a prompt that is the beginning alone belongs to it.
    let next = prompt(&[(1, 5), (2, 8)]);
    let beginning = prompt(&[(1, 5)]);
    let shorter = prompt(&[(1, 4)]);
    let families = told(&[one, other, next, beginning.clone(), shorter]);
    assert!(matches!(families[..], [(5, _)]), "{families:?}");
    let mut heat = Heat::default();
    for chunks in [&prompt(&[(1, 5), (2, 4)]), &prompt(&[(1, 5), (3, 9)])] {
        ask(&mut heat, at_ms(0), chunks);
    }
    let told = heat.told(at_ms(0), |chunk| (chunk == beginning[4]).then_some(333));
    let [family] = &told.families[..] else {
        panic!("one family")
    };
    assert_eq!(
        (family.chunk, family.tokens, family.held),
        (beginning[4], 333, true)
    );
    assert_eq!((family.key_epoch, family.parent), (3, 0));
}

#[test]
fn a_family_within_a_family_names_it_and_is_contained_in_it() {
    let mut heat = Heat::default();
    for (second, last) in (0..40).enumerate() {
        let inner = [(1, 6), (2, 5), (100 + last, 2)];
        let outer = [(1, 6), (50 + last, 3)];
        ask(&mut heat, at_ms(second as u64 * 1_000), &prompt(&inner));
        ask(&mut heat, at_ms(second as u64 * 1_000), &prompt(&outer));
    }
    let told = heat.told(at_ms(40_000), |_| None);
    let mut families = told.families.clone();
    families.sort_by_key(|family| family.chunks);
    let [outer, inner] = &families[..] else {
        panic!("two families, not {families:?}")
    };
    assert_eq!((outer.chunks, inner.chunks), (6, 11));
    assert_eq!((outer.parent, inner.parent), (0, outer.chunk));
    assert!(inner.arrivals.abs_diff(1_000) < 60, "{}", inner.arrivals);
    assert!(outer.arrivals.abs_diff(2_000) < 120, "{}", outer.arrivals);
    assert_eq!(told.arrivals, outer.arrivals);
    // Estimated from the prompts' own lengths.
    assert!(inner.tokens.abs_diff(11 * 64) < 40, "{}", inner.tokens);
}

#[test]
fn time_goes_to_the_families_of_the_request_that_took_it() {
    let mut heat = Heat::default();
    for n in 0..60 {
        let now = at_ms(n * 1_000);
        let mut ticket = ask(&mut heat, now, &prompt(&[(1, 4), (n + 9, 4)]));
        ask(&mut heat, now, &prompt(&[(n + 900, 8)]));
        heat.took(now, &mut ticket, 200.0);
        heat.took(now, &mut ticket, 60.0);
        heat.took(now, &mut ticket, -10.0);
    }
    let told = heat.told(at_ms(60_000), |_| None);
    let [family] = &told.families[..] else {
        panic!("one family")
    };
    assert!(family.takes.abs_diff(250) < 15, "{}", family.takes);
    assert_eq!(told.takes, family.takes);
    // The last correction is made up for by what comes next.
    assert!((heat.took_ms() - 60.0 * 250.0 - 10.0).abs() < 1e-6);
}

#[test]
fn what_is_sent_back_unserved_never_came_and_first_tokens_are_counted_where_they_were_promised() {
    let mut heat = Heat::default();
    let (one, other) = (prompt(&[(1, 4), (2, 4)]), prompt(&[(1, 4), (3, 4)]));
    ask(&mut heat, at_ms(0), &one);
    let sent_back = ask(&mut heat, at_ms(0), &other);
    heat.first_token(at_ms(100), true);
    heat.first_token(at_ms(100), false);
    heat.first_token(at_ms(100), true);
    let before = heat.told(at_ms(1_000), |_| None);
    heat.unserved(at_ms(1_000), &sent_back);
    let after = heat.told(at_ms(1_000), |_| None);
    assert!((after.arrivals * 2).abs_diff(before.arrivals) <= 1);
    let [before_it, after_it] = [&before, &after].map(|told| told.families[0].arrivals);
    assert!((after_it * 2).abs_diff(before_it) <= 1);
    assert_eq!(heat.arrivals(at_ms(1_000), 60_000, 10).0.len(), 1);
    assert!(before.first_tokens > 0);
    assert!((after.in_time * 3).abs_diff(after.first_tokens * 2) <= 3);
}

#[test]
fn the_record_has_what_the_engine_counted_by_the_family_and_the_conversation() {
    let mut heat = Heat::default();
    let conversations: Vec<_> = (0..3).map(|n| prompt(&[(1, 5), (n + 2, 3)])).collect();
    let turn = prompt(&[(1, 5), (2, 6)]);
    for chunks in conversations.iter().chain([&turn]) {
        let ticket = ask(&mut heat, at_ms(0), chunks);
        let finished = Finished {
            prompt_tokens: 700,
            cached_tokens: 320,
            output_tokens: 41,
        };
        heat.finished(at_ms(500), &ticket, &finished);
    }
    let (arrivals, one_in) = heat.arrivals(at_ms(2_000), 600_000, 100);
    assert_eq!((arrivals.len(), one_in), (4, 1));
    // The first came before anybody knew of a family: it belongs to it all the same.
    for (arrival, chunks) in arrivals.iter().zip(conversations.iter().chain([&turn])) {
        assert_eq!(
            (arrival.family, arrival.conversation),
            (chunks[4], chunks[5])
        );
        assert_eq!((arrival.prompt_tokens, arrival.cached_tokens), (700, 320));
        assert_eq!((arrival.output_tokens, arrival.ms_ago), (41, 2_000));
        assert_eq!(arrival.ttft_target_ms, 500);
    }
    assert_eq!(arrivals[0].conversation, arrivals[3].conversation);
    assert!(
        heat.arrivals(at_ms(2_000), 1_000, 100).0.is_empty(),
        "older"
    );
    let later = at_ms(2_000) + WINDOW;
    assert!(heat.arrivals(later, u64::MAX, 100).0.is_empty(), "too old");
}

#[test]
fn too_many_requests_are_recorded_by_whole_conversations_until_there_are_fewer_again() {
    let mut heat = Heat::default();
    let mut sent: BTreeMap<u64, u32> = BTreeMap::new();
    let conversations = 6_000;
    for turn in 0..4 {
        for n in 0..conversations {
            let chunks = prompt(&[(1, 2), (n + 10, 1)]);
            ask(&mut heat, at_ms(turn * 10_000 + n), &chunks);
            *sent.entry(chunks[2]).or_default() += 1;
        }
    }
    assert!(heat.size()[2] <= MOST);
    let now = at_ms(40_000);
    let (arrivals, one_in) = heat.arrivals(now, 600_000, 100_000);
    assert!(one_in > 1, "24,000 requests do not fit");
    let mut kept: BTreeMap<u64, u32> = BTreeMap::new();
    for arrival in &arrivals {
        *kept.entry(arrival.conversation).or_default() += 1;
    }
    // But for the first few, which came before there was a family.
    let whole = kept.iter().filter(|(chunk, count)| sent[chunk] == **count);
    assert!(whole.count() + 3 >= kept.len());
    let estimate = f64::from(one_in) * arrivals.len() as f64;
    assert!((estimate / 24_000.0 - 1.0).abs() < 0.1, "{estimate}");
    // Who has less room gets fewer conversations, not parts of them.
    let (fewer, rarer) = heat.arrivals(now, 600_000, 1_000);
    assert!(fewer.len() <= 1_000 && rarer > one_in);
    // An hour with little to do, and everything is kept again.
    let mut last = now;
    for n in 0..3_600 {
        last = at_ms(50_000 + n * 1_000);
        ask(&mut heat, last, &prompt(&[(1, 2), (n % 300 + 9_000, 1)]));
    }
    let (arrivals, one_in) = heat.arrivals(last, 600_000, 100_000);
    assert_eq!((arrivals.len(), one_in), (601, 1));
}

#[test]
fn nothing_grows_without_end() {
    let mut heat = Heat::default();
    for n in 0..40_000_u64 {
        let long = prompt(&[(1, 3), (n + 10, 40)]);
        ask(&mut heat, at_ms(n * 20), &long);
        let [nodes, chunks, requests] = heat.size();
        assert!(nodes <= MAX_NODES && chunks <= MAX_CHUNKS && requests <= MOST);
    }
    let [nodes, chunks, _] = heat.size();
    assert!(chunks > MAX_CHUNKS / 2 && nodes > 1_000, "it is used");
    // What all of them share was asked for last, so it is there, with all that was counted.
    let told = heat.told(at_ms(800_000), |_| None);
    assert_eq!(told.families.len(), 1);
    assert_eq!(told.families[0].chunks, 3);
    assert!(told.families[0].arrivals.abs_diff(50_000) < 1_000);
    assert_eq!(heat.families(), 1);
    // Nor by what is no fingerprint of anything.
    for n in 0..2_000_u64 {
        ask(&mut heat, at_ms(900_000 + n), &[1, 1, n % 3, 2, 1, n % 2]);
    }
}

/// Requests of conversations in a few families, some of which have families within.
fn requests() -> impl Strategy<Value = Vec<(u64, Vec<u64>)>> {
    let one = (0..3_u64, 0..3_u64, 0..6_u64, 1..9_usize, 0..900_u64);
    proptest::collection::vec(one, 1..120).prop_map(|drawn| {
        let mut now = 0;
        let requests = drawn
            .into_iter()
            .map(|(family, inner, conversation, length, gap)| {
                now += gap;
                let parts = [
                    (family + 1, 4),
                    (10 * (inner + 1), 3),
                    (100 * (conversation + 1), 8),
                ];
                let mut chunks = prompt(&parts);
                // As long as its turn: it may end before its conversation begins.
                chunks.truncate(2 * length);
                (now, chunks)
            });
        requests.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// A family is where two different next chunks were seen, and its arrivals are those whose paths have it.
    #[test]
    fn what_is_told_agrees_with_a_plain_count(requests in requests()) {
        let mut heat = Heat::default();
        let mut next: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for (ms, chunks) in &requests {
            ask(&mut heat, at_ms(*ms), chunks);
            for pair in chunks.windows(2) {
                let seen = next.entry(pair[0]).or_default();
                if !seen.contains(&pair[1]) {
                    seen.push(pair[1]);
                }
            }
        }
        let (first, last) = (requests[0].0, requests[requests.len() - 1].0);
        let (now, lasted) = (at_ms(last), Duration::from_millis(last - first));
        let told = heat.told(now, |_| None);
        let mut forks: Vec<u64> = next.iter().filter(|(_, seen)| seen.len() > 1).map(|(c, _)| *c).collect();
        let mut families: Vec<u64> = told.families.iter().map(|family| family.chunk).collect();
        forks.sort_unstable();
        families.sort_unstable();
        prop_assert_eq!(&families, &forks);
        let plain = |chunk: Option<u64>| {
            let mut count = Fading::<1>::default();
            for (ms, chunks) in &requests {
                if chunk.is_none_or(|chunk| chunks.contains(&chunk)) {
                    count.add(at_ms(*ms), [1.0]);
                }
            }
            count.a_second(now, lasted)[0] * 1e3
        };
        for family in &told.families {
            let counted = plain(Some(family.chunk));
            prop_assert!((f64::from(family.arrivals) - counted).abs() <= 0.51, "{family:?}: {counted}");
            let parent = requests.iter().find_map(|(_, chunks)| {
                let at = chunks.iter().position(|chunk| *chunk == family.chunk)?;
                Some(chunks[..at].iter().rev().find(|chunk| forks.contains(chunk)).copied())
            });
            prop_assert_eq!(family.parent, parent.flatten().unwrap_or(0));
        }
        prop_assert!((f64::from(told.arrivals) - plain(None)).abs() <= 0.51);
        let (arrivals, one_in) = heat.arrivals(now, 600_000, 1_000);
        prop_assert_eq!((arrivals.len(), one_in), (requests.len(), 1));
        for (arrival, (_, chunks)) in arrivals.iter().zip(&requests) {
            let family = chunks.iter().rposition(|chunk| forks.contains(chunk));
            let conversation = family.map_or(chunks.first(), |at| chunks.get(at + 1));
            prop_assert_eq!(arrival.family, family.map_or(0, |at| chunks[at]));
            prop_assert_eq!(arrival.conversation, conversation.copied().unwrap_or(0));
        }
    }
}
