//! Tables of homes that follow from what workers say.

use super::*;

const POOL: &str = "p";

fn heat(takes: u32, families: Vec<FamilyHeat>) -> Heat {
    Heat {
        families,
        takes,
        ..Heat::default()
    }
}

/// A family of `chunks` chunks of 64 tokens that is asked for so often, in thousandths a second.
fn asked(chunk: u64, parent: u64, chunks: u32, arrivals: u32, takes: u32) -> FamilyHeat {
    FamilyHeat {
        chunk,
        chunks,
        tokens: chunks * 64,
        parent,
        arrivals,
        takes,
        held: true,
        key_epoch: 1,
        pool: POOL.into(),
    }
}

fn said(worker: u32, heat: Option<Heat>) -> Said {
    Said {
        worker: WorkerId(worker),
        pool: POOL.into(),
        ready: true,
        heat,
    }
}

fn table(changes: &Changes) -> BTreeMap<u64, Family> {
    let put = changes.put.iter();
    put.map(|family| (family.chunk, family.clone())).collect()
}

fn homes(changes: &Changes, chunk: u64) -> Vec<u32> {
    let family = changes.put.iter().find(|family| family.chunk == chunk);
    let homes = family.map_or(&[][..], |family| &family.homes);
    homes.iter().map(|home| home.0).collect()
}

fn idle(worker: u32) -> Said {
    said(worker, Some(heat(0, vec![])))
}

#[test]
fn a_hot_family_is_at_home_where_it_is_held_and_asked_most() {
    let some = asked(7, 0, 16, 500, 100);
    let more = asked(7, 0, 16, 900, 200);
    let workers = [
        said(1, Some(heat(300, vec![some]))),
        said(2, Some(heat(900, vec![more]))),
        idle(3),
    ];
    let changes = assign(&BTreeMap::new(), &workers);
    assert_eq!(homes(&changes, 7), [2]);
    // Agreed, it stays.
    assert_eq!(assign(&table(&changes), &workers), Changes::default());
}

#[test]
fn a_family_gets_as_many_homes_as_its_load_needs_the_least_loaded_first() {
    let hot = asked(7, 0, 16, 9_000, 1_500);
    let workers = [
        said(1, Some(heat(1_500, vec![hot]))),
        said(2, Some(heat(700, vec![]))),
        said(3, Some(heat(100, vec![]))),
        idle(4),
    ];
    let changes = assign(&BTreeMap::new(), &workers);
    assert_eq!(homes(&changes, 7), [1, 3, 4]);
}

#[test]
fn a_home_too_many_stays_until_the_load_is_clearly_smaller() {
    let world = |takes| {
        [
            said(1, Some(heat(takes, vec![asked(7, 0, 16, 9_000, takes)]))),
            idle(2),
            idle(3),
        ]
    };
    let held = table(&assign(&BTreeMap::new(), &world(1_000)));
    assert_eq!(held[&7].homes.len(), 2);
    assert!(assign(&held, &world(500)).is_empty());
    assert_eq!(homes(&assign(&held, &world(300)), 7), [1]);
    let mut pinned = held;
    pinned.get_mut(&7).unwrap().pinned = true;
    assert!(assign(&pinned, &world(300)).is_empty());
}

#[test]
fn what_saves_little_is_no_family() {
    let world = |arrivals| [said(1, Some(heat(10, vec![asked(7, 0, 16, arrivals, 10)])))];
    let nothing = BTreeMap::new();
    // 1,024 tokens, 200 a second.
    assert!(assign(&nothing, &world(190)).is_empty());
    let held = table(&assign(&nothing, &world(200)));
    assert_eq!(held[&7].saves, 205);
    assert!(assign(&held, &world(110)).is_empty(), "it stays one");
    assert_eq!(assign(&held, &world(90)).remove, [7]);
}

#[test]
fn requests_belong_to_the_longest_family_that_is_hot() {
    // A system prompt of 4 chunks; half of those who have it share a document of 40 chunks, too.
    let system = asked(1, 0, 4, 4_000, 400);
    let document = asked(2, 1, 44, 2_000, 200);
    let one = |families| [said(1, Some(heat(400, families)))];
    let both = assign(
        &BTreeMap::new(),
        &one(vec![system.clone(), document.clone()]),
    );
    assert_eq!(both.put.len(), 2);
    assert_eq!(table(&both)[&1].takes, 200);
    // All of them share it: the system prompt alone names no family.
    let all = FamilyHeat {
        arrivals: 3_900,
        ..document.clone()
    };
    let longest = assign(&BTreeMap::new(), &one(vec![system.clone(), all]));
    assert_eq!(table(&longest).keys().copied().collect::<Vec<_>>(), [2]);
    // One that is not hot leaves its requests to the family above.
    let rare = FamilyHeat {
        arrivals: 10,
        ..document
    };
    let above = assign(&BTreeMap::new(), &one(vec![system, rare]));
    assert_eq!(table(&above).keys().copied().collect::<Vec<_>>(), [1]);
    assert_eq!(table(&above)[&1].takes, 400);
}

#[test]
fn homes_on_workers_that_leave_go_to_others() {
    let hot = asked(7, 0, 16, 900, 200);
    let mut workers = [said(1, Some(heat(200, vec![hot]))), idle(2), idle(3)];
    let held = table(&assign(&BTreeMap::new(), &workers));
    assert_eq!(held[&7].homes, [WorkerId(1)]);
    workers[0].ready = false;
    let after = assign(&held, &workers);
    assert_eq!(homes(&after, 7), [2]);
}

#[test]
fn nothing_is_concluded_from_silence() {
    let hot = asked(7, 0, 16, 900, 200);
    let held = table(&assign(
        &BTreeMap::new(),
        &[said(1, Some(heat(200, vec![hot]))), idle(2)],
    ));
    let silent = [said(1, None), said(2, None), said(3, None)];
    assert!(assign(&held, &silent).is_empty());
    // A home that is gone is replaced all the same.
    assert_eq!(homes(&assign(&held, &silent[1..]), 7), [2]);
    assert_eq!(assign(&held, &[]).remove, [7], "its pool is gone");
}

#[test]
fn a_step_is_bounded_and_so_is_the_table() {
    let families: Vec<_> = (1..=400)
        .map(|chunk| asked(chunk, 0, 16, 1_000 + u32::try_from(chunk).unwrap(), 10))
        .collect();
    let world = [said(1, Some(heat(500, families)))];
    let mut held = BTreeMap::new();
    for step in 1.. {
        let changes = assign(&held, &world);
        assert!(changes.put.len() <= MAX_CHANGES && changes.remove.is_empty());
        if changes.is_empty() {
            assert_eq!(step - 1, MAX_FAMILIES.div_ceil(MAX_CHANGES));
            break;
        }
        held.extend(table(&changes));
    }
    assert_eq!(held.len(), MAX_FAMILIES);
    let coldest = held.keys().min();
    assert_eq!(coldest, Some(&(400 - 256 + 1)));
}

proptest::proptest! {
    /// Whatever workers say: homes are ready workers of the pool, in order, once each and not too many.
    #[test]
    fn homes_are_ready_workers(
        heats in proptest::collection::vec(
            proptest::option::of(proptest::collection::vec(
                (0..6_u64, 0..6_u64, 0..50_u32, 0..5_000_u32, 0..u32::MAX), 0..8,
            )), 0..8),
        ready in proptest::collection::vec(proptest::bool::ANY, 8),
    ) {
        let workers: Vec<Said> = heats.into_iter().enumerate().map(|(at, families)| {
            let families = families.map(|families| families.into_iter()
                .map(|(chunk, parent, chunks, arrivals, takes)| {
                    asked(chunk, parent, chunks, arrivals, takes)
                }).collect());
            Said {
                ready: ready[at],
                ..said(u32::try_from(at).unwrap() + 1, families.map(|families| heat(5, families)))
            }
        }).collect();
        let mut held = BTreeMap::new();
        for _ in 0..3 {
            let changes = assign(&held, &workers);
            for family in &changes.put {
                proptest::prop_assert!(family.homes.is_sorted_by(|one, other| one < other));
                proptest::prop_assert!(family.homes.len() <= MAX_HOMES);
                for home in &family.homes {
                    let worker = workers.iter().find(|worker| worker.worker == *home);
                    proptest::prop_assert!(worker.is_some_and(|worker| worker.ready));
                }
            }
            held.extend(table(&changes));
            for chunk in changes.remove {
                held.remove(&chunk);
            }
        }
        proptest::prop_assert!(assign(&held, &workers).is_empty());
    }
}
