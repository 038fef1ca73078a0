//! Plans of made-up records: what moves, what is predicted of it, and what stays as it is.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

const HOT: u64 = 7;
const FAMILY_TOKENS: u32 = 8_192;
const WINDOW: Millis = Millis(300_000);

/// Requests of this family, so many a second, each of another conversation, as they come at one worker
/// that holds it.
fn arrivals(seed: u64, family: u64, a_second: f64, question: u32) -> Vec<Arrival> {
    let mut rng = StdRng::seed_from_u64(seed);
    let count = whole(a_second * WINDOW.0 as f64 / 1e3);
    let one = |_| Arrival {
        ms_ago: rng.random_range(0..WINDOW.0),
        family,
        family_tokens: FAMILY_TOKENS,
        conversation: rng.random(),
        prompt_tokens: FAMILY_TOKENS + question,
        cached_tokens: FAMILY_TOKENS,
        output_tokens: 200,
        ttft_target_ms: 3_000,
    };
    (0..count).map(one).collect()
}

fn record(worker: u32, arrivals: Vec<Arrival>) -> Record {
    Record {
        worker: WorkerId(worker),
        profile: Profile::default(),
        one_in: 1,
        arrivals,
    }
}

fn family(chunk: u64, home: u32) -> (u64, Family) {
    let family = Family {
        pool: "p".into(),
        chunk,
        key_epoch: 1,
        chunks: 128,
        tokens: FAMILY_TOKENS,
        homes: vec![WorkerId(home)],
        saves: 1,
        takes: 1,
        pinned: false,
    };
    (chunk, family)
}

/// A plan for families that are each held by their home alone.
fn planned(families: &BTreeMap<u64, Family>, records: &[Record]) -> Planned {
    let holders = families.iter();
    let holders = holders.map(|(chunk, family)| (*chunk, family.homes.iter().copied().collect()));
    let situation = Situation {
        families,
        holders: &holders.collect(),
        records,
        window: WINDOW,
    };
    plan(&situation, 8)
}

fn loads(forecast: &Forecast) -> Vec<u32> {
    forecast.workers.iter().map(|one| one.load).collect()
}

/// All that is asked for is asked of the first of four workers, which could just do it.
fn skewed(one_in: u32) -> (BTreeMap<u64, Family>, Vec<Record>) {
    let mut hot = arrivals(1, HOT, 2.0, 1_500);
    hot.retain(|one| one.conversation % u64::from(one_in) == 0);
    let mut records = vec![record(1, hot)];
    records[0].one_in = one_in;
    records.extend((2..=4).map(|worker| record(worker, vec![])));
    ([family(HOT, 1)].into(), records)
}

#[test]
fn one_hot_family_gets_homes_on_the_others() {
    let (families, records) = skewed(1);
    let planned = planned(&families, &records);
    println!(
        "{:?} -> {:?}",
        loads(&planned.before),
        loads(&planned.after)
    );
    assert!(!planned.moves.is_empty() && planned.moves.len() <= 3);
    for one in &planned.moves {
        assert!(one.chunk == HOT && one.to.is_some_and(|to| to.0 > 1));
    }
    let (before, after) = (imbalance(&planned.before), imbalance(&planned.after));
    assert!(after < 0.5 * before, "{before} {after}");
    // Each new home prefills the family once.
    assert!(planned.after.hit_ratio + 10 >= planned.before.hit_ratio);
    assert!(planned.after.in_time >= planned.before.in_time);
}

#[test]
fn the_replay_of_what_was_is_what_was_recorded() {
    let (families, records) = skewed(1);
    let planned = planned(&families, &records);
    let (measured, before) = (&planned.measured, &planned.before);
    assert_eq!(measured.arrivals, before.arrivals);
    let sum = |forecast: &Forecast| loads(forecast).iter().sum::<u32>();
    let (measured_sum, before_sum) = (f64::from(sum(measured)), f64::from(sum(before)));
    assert!((before_sum / measured_sum - 1.0).abs() < 0.1);
    assert!(measured.hit_ratio.abs_diff(before.hit_ratio) <= 20);
}

#[test]
fn who_is_balanced_stays_as_it_is() {
    let families: BTreeMap<u64, Family> = (1..=4).map(|at| family(u64::from(at), at)).collect();
    let records: Vec<Record> = (1..=4)
        .map(|worker| record(worker, arrivals(u64::from(worker), worker.into(), 1.0, 400)))
        .collect();
    let planned = planned(&families, &records);
    assert_eq!(planned.moves, []);
    assert_eq!(planned.before, planned.after);
}

#[test]
fn nothing_recorded_is_nothing_to_move() {
    let (families, mut records) = skewed(1);
    records[0].arrivals.clear();
    let planned = planned(&families, &records);
    assert_eq!(planned.moves, []);
    assert_eq!(loads(&planned.before), [0, 0, 0, 0]);
}

#[test]
fn a_sample_of_the_conversations_says_much_the_same() {
    let forecast = |one_in| {
        let (families, records) = skewed(one_in);
        planned(&families, &records)
    };
    let (whole, sample) = (forecast(1), forecast(4));
    let busiest = |planned: &Planned| f64::from(loads(&planned.before).into_iter().max().unwrap());
    let ratio = busiest(&sample) / busiest(&whole);
    println!("a fourth of the conversations: {ratio:.2} of the busiest load");
    assert!((0.8..1.25).contains(&ratio), "{ratio}");
    assert!(sample.before.hit_ratio.abs_diff(whole.before.hit_ratio) <= 20);
}

#[test]
fn of_a_large_pool_the_busiest_and_the_least_busy_are_looked_at() {
    let (mut families, mut records) = skewed(1);
    for worker in 5..=1_000 {
        let chunk = 100 + u64::from(worker);
        families.extend([family(chunk, worker)]);
        let some = arrivals(chunk, chunk, 0.05, 400);
        records.push(record(worker, some));
    }
    let planned = planned(&families, &records);
    assert_eq!(planned.before.workers.len(), 64);
    let busiest = planned.before.workers.iter().max_by_key(|one| one.load);
    assert_eq!(busiest.map(|one| one.worker), Some(WorkerId(1)));
    let first = planned.moves.first().map(|one| one.chunk);
    assert_eq!(first, Some(HOT));
    assert!(imbalance(&planned.after) < imbalance(&planned.before));
}

#[test]
fn a_plan_is_the_same_each_time() {
    let (families, records) = skewed(1);
    assert_eq!(planned(&families, &records), planned(&families, &records));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    /// Whatever agents send: a plan's moves are possible, one after the other.
    #[test]
    fn moves_are_possible(
        sent in proptest::collection::vec((
            1..5_u32, 0..400_000_u64, 0..4_u64, 0..20_000_u32, 0..6_u64, 0..20_000_u32,
            0..20_000_u32, 0..2_000_u32, 0..5_000_u32,
        ), 0..60),
        one_in in 0..9_u32,
    ) {
        let mut records: Vec<Record> = (1..5).map(|worker| record(worker, vec![])).collect();
        for (worker, ms_ago, family, family_tokens, conversation, prompt, cached, output, target) in sent {
            records[worker as usize - 1].one_in = one_in;
            records[worker as usize - 1].arrivals.push(Arrival {
                ms_ago, family, family_tokens, conversation,
                prompt_tokens: prompt, cached_tokens: cached, output_tokens: output,
                ttft_target_ms: target,
            });
        }
        let mut table: BTreeMap<u64, Family> = (1..3).map(|at| family(at, 1)).collect();
        let planned = planned(&table, &records);
        for one in planned.moves {
            let family = table.get_mut(&one.chunk).unwrap();
            if let Some(from) = one.from {
                proptest::prop_assert!(family.homes.contains(&from));
                family.homes.retain(|home| *home != from);
            }
            let to = one.to.unwrap();
            proptest::prop_assert!(!family.homes.contains(&to) && (1..5).contains(&to.0));
            family.homes.push(to);
        }
    }
}
