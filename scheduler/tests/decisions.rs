//! Two promises about every decision, on random fleets: whom a bound rules out would not have been
//! chosen, and a receipt decides alike.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of a test fail as its assertions do

mod worlds;

use std::time::Duration;

use forebay_proto::Revision;
use forebay_scheduler::policy::{self, Candidate, Field, Policy, Request, Score};
use forebay_scheduler::{Choice, MOST_CONSIDERED, NoChoice, Outcome, Receipt, Versions};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use worlds::World;

/// A policy that has to score everybody.
struct Whole(&'static dyn Policy);

impl Policy for Whole {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn scores(
        &self,
        request: &Request<'_>,
        candidates: &[Candidate],
        field: &Field,
        scores: &mut Vec<Score>,
    ) {
        self.0.scores(request, candidates, field, scores);
    }

    fn tolerance(&self, best: Score, age: Duration) -> f64 {
        self.0.tolerance(best, age)
    }

    fn predicts(&self) -> bool {
        self.0.predicts()
    }

    fn counts_homes(&self) -> bool {
        self.0.counts_homes()
    }
}

fn pick(world: &World, policy: &dyn Policy, seed: u64) -> Result<Choice, NoChoice> {
    let mut view = world.view.clone();
    let mut rng = StdRng::seed_from_u64(seed);
    view.pick(world.now, &world.request(), policy, &mut rng)
}

fn explain(world: &World, policy: &dyn Policy, seed: u64) -> (Result<Choice, NoChoice>, Receipt) {
    let mut view = world.view.clone();
    let mut rng = StdRng::seed_from_u64(seed);
    let versions = Versions {
        facts_revision: Revision(812),
        index_version: 4,
    };
    view.explain(world.now, &world.request(), policy, &mut rng, versions)
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    }
}

proptest! {
    #![proptest_config(config(2_000))]

    #[test]
    fn a_narrowed_choice_is_that_of_the_whole_fleet(seed: u64) {
        let world = World::drawn(seed);
        let narrowed = pick(&world, policy::default(), seed);
        let whole = pick(&world, &Whole(policy::default()), seed);
        prop_assert_eq!(narrowed, whole);
    }
}

proptest! {
    #![proptest_config(config(80))]

    #[test]
    fn who_may_not_serve_is_chosen_by_no_policy(seed: u64) {
        let world = World::drawn(seed);
        for policy in policy::ALL {
            let choice = pick(&world, policy, seed);
            if !world.eligible.is_empty() && let Ok(choice) = choice {
                prop_assert!(world.eligible.contains(&choice.incarnation.worker), "{}", policy.name());
            }
        }
    }

    #[test]
    fn a_receipt_decides_alike_also_after_it_was_written(seed: u64) {
        let world = World::drawn(seed);
        for policy in policy::ALL {
            let chosen = pick(&world, policy, seed);
            let (explained, receipt) = explain(&world, policy, seed);
            prop_assert_eq!(chosen, explained);
            let outcome = match chosen {
                Ok(choice) => Outcome::Chosen(choice.incarnation),
                Err(none) => Outcome::Nobody(none),
            };
            prop_assert_eq!(receipt.outcome, outcome);
            prop_assert_eq!(receipt.replay(), Some(outcome), "{}", policy.name());
            let text = serde_json::to_string(&receipt).unwrap();
            let read: Receipt = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(&read, &receipt);
            prop_assert_eq!(read.replay(), Some(outcome));
            let packed = receipt.packed();
            prop_assert!(packed.len() <= 300 + 170 * receipt.considered.len(), "{}", packed.len());
            prop_assert_eq!(packed.receipt(), Some(receipt), "{}", policy.name());
        }
    }

    #[test]
    fn a_receipt_counts_everybody_once(seed: u64) {
        let world = World::drawn(seed);
        let workers = world.view.iter().count();
        for policy in policy::ALL {
            let (chosen, receipt) = explain(&world, policy, seed);
            let out = receipt.filtered;
            let not_eligible = [
                out.unreachable,
                out.closed,
                out.tried,
                out.apart,
                out.suspect,
                out.full,
            ];
            let not_eligible: usize = not_eligible.iter().sum();
            let scored = receipt.considered.len() + out.dearer + out.not_kept;
            prop_assert!(policy.name() != "forebay" || receipt.considered.len() <= MOST_CONSIDERED);
            if chosen.is_ok() && receipt.drawn.is_empty() {
                prop_assert_eq!(not_eligible + scored, workers, "{}", policy.name());
                prop_assert_eq!(receipt.eligible, scored);
            } else {
                prop_assert_eq!(not_eligible, workers);
            }
        }
    }
}

#[test]
fn a_receipt_shows_who_was_counted_as_a_home_and_only_those_that_keep_the_promise_as_they_are() {
    let (mut counted, mut chosen_as_home, mut not_counted) = (0, 0, 0);
    for seed in 0..2_000 {
        let world = World::drawn(seed);
        let (chosen, receipt) = explain(&world, policy::default(), seed);
        assert_eq!(receipt.asked.family.is_some(), !world.homes.is_empty());
        for one in &receipt.considered {
            let mut truly = one.candidate;
            truly.counted_tokens = 0.0;
            truly.predict(&world.request());
            let home = world.homes.contains(&truly.worker);
            let promises = truly.terms.feasible(&world.request().targets);
            if one.candidate.counted_tokens > 0.0 {
                assert!(home && promises);
                assert!(one.candidate.counted_tokens > one.candidate.cached_tokens);
                assert!(one.candidate.terms.own_ms < truly.terms.own_ms);
                counted += 1;
            }
            not_counted += usize::from(home && !promises);
        }
        let Ok(chosen) = chosen else { continue };
        let of_chosen = receipt
            .considered
            .iter()
            .find(|one| one.incarnation == chosen.incarnation);
        let Some(shown) = of_chosen else { continue };
        let as_home = shown.candidate.counted_tokens > 0.0;
        assert_eq!(chosen.work.makes_copy, as_home);
        if as_home {
            chosen_as_home += 1;
            // What is booked and told to its agent is the truth.
            let held = f64::from(chosen.cached_tokens);
            assert!((held - shown.candidate.cached_tokens).abs() < 1.0);
            assert_eq!(
                chosen.work.uncached_tokens,
                world.prompt_tokens - shown.candidate.cached_tokens
            );
            let expected_ms = chosen.ttft.as_secs_f64() * 1e3;
            assert!(expected_ms >= shown.candidate.terms.ttft_ms);
        }
    }
    assert!(
        counted > 100 && chosen_as_home > 20 && not_counted > 100,
        "{counted} {chosen_as_home} {not_counted}"
    );
}

#[test]
fn a_receipt_shows_who_would_have_kept_the_promise() {
    let mut seen = [0; 2];
    for seed in 0..300 {
        let world = World::drawn(seed);
        let (chosen, receipt) = explain(&world, policy::default(), seed);
        let Ok(chosen) = chosen else { continue };
        let of_chosen =
            |one: &&forebay_scheduler::Considered| one.incarnation == chosen.incarnation;
        let Some(shown) = receipt.considered.iter().find(of_chosen) else {
            assert!(!receipt.drawn.is_empty());
            continue;
        };
        assert_eq!(shown.feasible, chosen.feasible);
        assert_eq!(shown.score, chosen.score);
        // Nobody breaks a promise where another one would keep it.
        let kept = receipt.considered.iter().any(|one| one.feasible);
        assert_eq!(kept, chosen.feasible);
        seen[usize::from(chosen.feasible)] += 1;
    }
    assert!(seen.iter().all(|n| *n > 20), "{seen:?}");
}
