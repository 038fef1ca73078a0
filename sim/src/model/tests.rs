//! The engine's model against queueing theory, an exact LRU and conservation of tokens.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use forebay_proto::Now;
use forebay_scheduler::model::Profile;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

/// 10 ms and 1 ms a token, 100 tokens at once.
const PLAIN: Profile = Profile {
    floor_ms: 0.0,
    base_ms: 10.0,
    token_ms: 1.0,
    context_ms: 0.0,
    pair_ms: 0.0,
    chunk_tokens: 100,
};

fn settings(kv_tokens: u64, profile: Profile) -> Settings {
    Settings {
        profile,
        kv_tokens,
        block_tokens: 10,
        max_seqs: 8,
        queue: 1_000,
    }
}

fn at(ms: f64) -> Now {
    Now::at(Duration::from_secs_f64(ms / 1e3))
}

fn ms(now: Now) -> f64 {
    now.since(Now::default()).as_secs_f64() * 1e3
}

/// A prompt of a family: two of one family share their blocks as far as both go.
fn arrival(id: u64, family: u64, prompt_tokens: u32, output_tokens: u32) -> Arrival {
    let blocks = (0..u64::from(prompt_tokens / 10)).map(|block| family * 1_000 + block);
    Arrival {
        id,
        prompt_tokens,
        blocks: blocks.collect(),
        output_tokens,
    }
}

fn run(engine: &mut Engine, arrivals: &[(f64, Arrival)]) -> Vec<Event> {
    let mut events = Vec::new();
    for (when, arrival) in arrivals {
        engine.advance(at(*when), &mut events);
        assert!(engine.arrive(at(*when), arrival.clone()));
    }
    while let Some(next) = engine.next_deadline() {
        engine.advance(next, &mut events);
    }
    events
}

fn shown(events: &[Event]) -> Vec<String> {
    let shown = |event: &Event| match *event {
        Event::First {
            id,
            at,
            cached_tokens,
        } => format!("{id} first {:.0} cached {cached_tokens}", ms(at)),
        Event::Token { id, at } => format!("{id} token {:.0}", ms(at)),
        Event::Finished { id, at } => format!("{id} end {:.0}", ms(at)),
    };
    events.iter().map(shown).collect()
}

#[test]
fn a_prompt_is_prefilled_in_chunks_and_then_decodes() {
    let mut engine = Engine::new(settings(1_000, PLAIN));
    let events = run(&mut engine, &[(0.0, arrival(1, 1, 250, 3))]);
    // 110 + 110 + 60, then 11 each.
    assert_eq!(
        shown(&events),
        [
            "1 first 280 cached 0",
            "1 token 291",
            "1 token 302",
            "1 end 302"
        ]
    );
}

#[test]
fn what_arrives_during_an_iteration_waits_for_its_end_and_joins_the_next() {
    let mut engine = Engine::new(settings(1_000, PLAIN));
    let events = run(
        &mut engine,
        &[(0.0, arrival(1, 1, 50, 2)), (5.0, arrival(2, 2, 30, 1))],
    );
    // 60, then a decode beside 30 tokens: 41.
    assert_eq!(
        shown(&events),
        [
            "1 first 60 cached 0",
            "1 token 101",
            "1 end 101",
            "2 first 101 cached 0",
            "2 end 101"
        ]
    );
}

#[test]
fn a_prefix_that_is_there_is_not_computed_again_but_for_the_last_token() {
    let mut engine = Engine::new(settings(1_000, PLAIN));
    let events = run(
        &mut engine,
        &[
            (0.0, arrival(1, 1, 100, 1)),
            (200.0, arrival(2, 1, 100, 1)),
            (400.0, arrival(3, 1, 95, 1)),
        ],
    );
    assert_eq!(
        shown(&events),
        [
            "1 first 110 cached 0",
            "1 end 110",
            "2 first 220 cached 90",
            "2 end 220",
            "3 first 415 cached 90",
            "3 end 415"
        ]
    );
    let counts = engine.counts();
    assert_eq!(
        counts.prompt_tokens,
        counts.cached_tokens + counts.prefilled_tokens
    );
}

#[test]
fn the_newest_gives_way_when_no_block_is_left_and_is_computed_again() {
    let mut engine = Engine::new(settings(100, PLAIN));
    let events = run(
        &mut engine,
        &[(0.0, arrival(1, 1, 40, 30)), (0.0, arrival(2, 2, 40, 30))],
    );
    let finished: Vec<u64> = events
        .iter()
        .filter_map(|event| match event {
            Event::Finished { id, .. } => Some(*id),
            _ => None,
        })
        .collect();
    assert_eq!(finished, [1, 2]);
    let counts = engine.counts();
    assert!(counts.preemptions > 0 && counts.recomputed_tokens > 0);
    assert_eq!(counts.output_tokens, 60);
    assert_eq!(engine.blocks().in_use(), 0);
}

#[test]
fn late_calls_change_nothing() {
    let arrivals: Vec<(f64, Arrival)> = (0..40)
        .map(|n| {
            (
                n as f64 * 37.0,
                arrival(n, n % 5, 60 + (n as u32 * 13) % 200, 5),
            )
        })
        .collect();
    let prompt = run(&mut Engine::new(settings(2_000, PLAIN)), &arrivals);
    let mut engine = Engine::new(settings(2_000, PLAIN));
    let mut late = Vec::new();
    for (when, arrival) in &arrivals {
        engine.advance(at(*when), &mut late);
        engine.arrive(at(*when), arrival.clone());
    }
    engine.advance(at(1e9), &mut late);
    assert_eq!(prompt, late);
}

#[test]
fn without_decodes_and_with_one_at_a_time_it_is_an_m_g_1_queue() {
    let profile = Profile {
        chunk_tokens: 1_000_000,
        ..PLAIN
    };
    let mut engine = Engine::new(Settings {
        max_seqs: 1,
        queue: 1_000_000,
        ..settings(1 << 30, profile)
    });
    let mut rng = StdRng::seed_from_u64(7);
    let (mut now, mut arrivals) = (0.0, Vec::new());
    let (mut sum, mut squares) = (0.0, 0.0);
    for id in 0..200_000_u64 {
        now += -(1.0 - rng.random::<f64>()).ln() * 200.0;
        // Service of 10 to 210 ms.
        let tokens = rng.random_range(1..=200);
        let service = 10.0 + f64::from(tokens);
        sum += service;
        squares += service * service;
        let blocks = Vec::new();
        arrivals.push((
            now,
            Arrival {
                id,
                prompt_tokens: tokens,
                blocks,
                output_tokens: 1,
            },
        ));
    }
    let count = arrivals.len() as f64;
    let came: BTreeMap<u64, f64> = arrivals.iter().map(|(when, a)| (a.id, *when)).collect();
    let events = run(&mut engine, &arrivals);
    let waited: f64 = events
        .iter()
        .filter_map(|event| match event {
            Event::First { id, at, .. } => Some(ms(*at) - came[id]),
            _ => None,
        })
        .sum::<f64>()
        / count
        - sum / count;
    // Pollaczek and Khinchine: W = λ·E[S²] / 2(1 − ρ).
    let rate = count / now;
    let expected = rate * (squares / count) / (2.0 * (1.0 - rate * sum / count));
    assert!(
        (waited / expected - 1.0).abs() < 0.03,
        "{waited} ms, expected {expected}"
    );
}

/// Which blocks an exact LRU of so many blocks has, by stack distances: a block is there iff fewer
/// than so many others were used since.
fn stack_hits(paths: &[Vec<u64>], capacity: usize) -> u64 {
    let mut stack: Vec<u64> = Vec::new();
    let mut hits = 0;
    for path in paths {
        let present: BTreeSet<u64> = stack.iter().take(capacity).copied().collect();
        let run = path
            .iter()
            .take_while(|block| present.contains(block))
            .count();
        hits += run as u64;
        // Used from the end, so that the root is the newest.
        for block in path.iter().rev() {
            stack.retain(|other| other != block);
            stack.insert(0, *block);
        }
    }
    hits
}

#[test]
fn one_request_at_a_time_hits_what_an_exact_lru_holds() {
    let mut rng = StdRng::seed_from_u64(3);
    let paths: Vec<Vec<u64>> = (0..400)
        .map(|_| {
            let family = rng.random_range(0..12_u64);
            (0..rng.random_range(1..9_u64))
                .map(|block| family * 1_000 + block)
                .collect()
        })
        .collect();
    for capacity in [12_u64, 20, 30, 45, 60, 200] {
        let mut engine = Engine::new(settings(capacity * 10, PLAIN));
        let mut events = Vec::new();
        let mut now = 0.0;
        for (id, path) in (0..).zip(&paths) {
            // One token more than whole blocks, which is the answer's block, too.
            let prompt_tokens = path.len() as u32 * 10 + 1;
            let arrival = Arrival {
                id,
                prompt_tokens,
                blocks: path.clone(),
                output_tokens: 1,
            };
            engine.advance(at(now), &mut events);
            assert!(engine.arrive(at(now), arrival));
            now += 10_000.0;
        }
        engine.advance(at(now), &mut events);
        // The block of the last token is in use while the others are looked up.
        let expected = stack_hits_with_tail(&paths, capacity as usize);
        assert_eq!(
            engine.counts().cached_tokens / 10,
            expected,
            "{capacity} blocks"
        );
        assert!(stack_hits(&paths, capacity as usize) >= expected);
    }
}

/// The same where each request also takes one block that nobody finds again: blank ones first, then
/// the oldest.
fn stack_hits_with_tail(paths: &[Vec<u64>], capacity: usize) -> u64 {
    let mut order: VecDeque<u64> = VecDeque::new();
    let mut hits = 0;
    for path in paths {
        let run = path
            .iter()
            .take_while(|block| order.contains(block))
            .count();
        hits += run as u64;
        order.retain(|block| !path[..run].contains(block));
        let new = path.len() - run + 1;
        let room = capacity - run - order.len();
        for _ in room..new {
            order.pop_front();
        }
        order.retain(|block| !path.contains(block));
        order.extend(path.iter().rev());
    }
    hits
}

proptest! {
    #[test]
    fn tokens_are_conserved_and_blocks_come_back(
        steps in proptest::collection::vec((0..6_u64, 1..120_u32, 1..40_u32, 0..200_u32, any::<bool>()), 1..60)
    ) {
        let mut engine = Engine::new(settings(300, PLAIN));
        let mut events = Vec::new();
        let (mut now, mut asked, mut gone) = (0.0, BTreeMap::new(), BTreeSet::new());
        for (id, (family, prompt, output, gap, abort)) in (0..).zip(steps) {
            now += f64::from(gap);
            engine.advance(at(now), &mut events);
            prop_assert!(engine.arrive(at(now), arrival(id, family, prompt, output)));
            asked.insert(id, output);
            if abort && id > 0 {
                engine.abort(id - 1);
                gone.insert(id - 1);
            }
            prop_assert_eq!(engine.blocks().in_use() + engine.blocks().available(), 30);
        }
        while let Some(next) = engine.next_deadline() {
            engine.advance(next, &mut events);
        }
        let mut said: BTreeMap<u64, u32> = BTreeMap::new();
        let mut last = Now::default();
        for event in &events {
            match *event {
                Event::First { id, at, .. } | Event::Token { id, at } => {
                    prop_assert!(at >= last);
                    last = at;
                    *said.entry(id).or_default() += 1;
                }
                Event::Finished { id, .. } => prop_assert_eq!(said[&id], asked[&id]),
            }
        }
        let finished = events.iter().filter(|event| matches!(event, Event::Finished { .. })).count();
        prop_assert!(finished + gone.len() >= asked.len());
        prop_assert_eq!((engine.running(), engine.waiting()), (0, 0));
        prop_assert_eq!(engine.blocks().in_use(), 0);
        let counts = engine.counts();
        prop_assert_eq!(counts.output_tokens, u64::from(said.values().sum::<u32>()));
        if gone.is_empty() && counts.preemptions == 0 {
            prop_assert_eq!(counts.prompt_tokens, counts.cached_tokens + counts.prefilled_tokens);
        }
    }

    #[test]
    fn blocks_do_what_a_plain_list_does(ops in proptest::collection::vec((0..4_u8, 0..12_u64), 0..200)) {
        let mut blocks = Blocks::new(5);
        // Hash, users; unknown ones have none. The order is that of the last release.
        let mut held: Vec<(u32, Option<u64>)> = Vec::new();
        let mut unused: VecDeque<u64> = VecDeque::new();
        for (op, hash) in ops {
            let known = |held: &[(u32, Option<u64>)], unused: &VecDeque<u64>| {
                held.iter().any(|(_, h)| *h == Some(hash)) || unused.contains(&hash)
            };
            match op {
                0 => {
                    let there = known(&held, &unused);
                    let shared = blocks.share(hash);
                    prop_assert_eq!(shared.is_some(), there);
                    if let Some(at) = shared {
                        unused.retain(|other| *other != hash);
                        held.push((at, Some(hash)));
                    }
                }
                1 => {
                    let distinct: BTreeSet<u32> = held.iter().map(|(at, _)| *at).collect();
                    let taken = blocks.take();
                    prop_assert_eq!(taken.is_some(), distinct.len() < 5);
                    if let Some(at) = taken {
                        if distinct.len() + unused.len() >= 5 {
                            unused.pop_front();
                        }
                        held.push((at, None));
                    }
                }
                2 => if let Some(at) = held.iter().find(|(_, h)| h.is_none()).map(|(at, _)| *at) {
                    let there = known(&held, &unused);
                    blocks.fill(at, hash);
                    if !there {
                        for (other, h) in &mut held {
                            if *other == at { *h = Some(hash); }
                        }
                    }
                },
                _ => if !held.is_empty() {
                    let (at, h) = held.remove(hash as usize % held.len());
                    blocks.release(at);
                    let last = !held.iter().any(|(other, _)| *other == at);
                    if let (true, Some(h)) = (last, h) { unused.push_back(h); }
                }
            }
            let distinct: BTreeSet<u32> = held.iter().map(|(at, _)| *at).collect();
            prop_assert_eq!(blocks.in_use(), distinct.len());
        }
    }
}
