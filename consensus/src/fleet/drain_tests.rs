//! What cordons and drains do, as transcripts: entry 1 is the first line, and so on; entry n is stamped
//! 10 n ms of cell time.

use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{DrainId, DrainPhase, Millis};
use wire::Desired;

use super::testing::{World, check, entry};
use super::*;

/// Two workers of four slots that are ready: entries 1 to 4.
const TWO: &str = "register w1 -> done 1.1.0
    register w2 -> done 2.2.0
    observe 1.1.0 ready ack=1 -> done
    observe 2.2.0 ready ack=2 -> done
    ";

/// One more: entries 5 and 6.
const THIRD: &str = "register w3 -> done 3.5.0
    observe 3.5.0 ready ack=5 -> done
    ";

fn two(rest: &str) -> World {
    check(&format!("{TWO}{rest}"))
}

fn three(rest: &str) -> World {
    check(&format!("{TWO}{THIRD}{rest}"))
}

fn drain(world: &World, id: u64) -> &Drain {
    &world.fleet.drains[&DrainId(id)]
}

fn desired(world: &World, name: &str) -> Desired {
    world.fleet.worker(name).unwrap().desired
}

#[test]
fn several_workers_are_cordoned_together_or_not_at_all() {
    let world = three(
        "cordon w1,w2,nobody -> unknown-worker
         cordon w1,w2 -> done +2
         cordon w2,w1,w1 -> unchanged
         cordon w1,w2,w3 -> capacity-short
         uncordon w1,w3 -> done +1
         uncordon w1 -> unchanged",
    );
    assert_eq!(desired(&world, "w1"), Desired::Ready);
    assert_eq!(desired(&world, "w2"), Desired::Cordoned);
    assert_eq!(desired(&world, "w3"), Desired::Ready);
}

#[test]
fn what_names_nobody_or_too_many_is_refused() {
    let mut world = two("cordon , -> invalid set_desired_of.names
         drain , -> invalid start_drain.names");
    let many: Vec<String> = (0..=MAX_NAMES).map(|i| format!("w{i}")).collect();
    let said = world.run(&format!("cordon {}", many.join(",")));
    assert_eq!(said, "invalid set_desired_of.names");
}

#[test]
fn a_dry_run_is_judged_alike_and_changes_nothing() {
    let world = two("cordon w1 dry -> unchanged +1
         drain w1 dry -> unchanged +1
         drain w1,w2 dry -> capacity-short
         cordon w1,w2 dry ignore -> unchanged +2");
    assert_eq!(desired(&world, "w1"), Desired::Ready);
    assert_eq!(world.fleet.drains().count(), 0);
    let (tail, _) = world.fleet.audit_tail(4);
    let shown: Vec<String> = tail
        .iter()
        .map(|entry| format!("{} {}: {}", entry.action, entry.target, entry.result))
        .collect();
    assert_eq!(
        shown,
        [
            "cordon w1 (dry run): unchanged",
            "drain w1 (dry run): unchanged",
            "drain w1, w2 (dry run): capacity-short",
            "cordon w1, w2 (guard overridden) (dry run): unchanged",
        ]
    );
}

#[test]
fn the_others_have_to_hold_what_is_in_flight_and_a_fifth_more() {
    // Four slots are left: 3 × 6/5 = 3.6 fits, 4 × 6/5 = 4.8 does not.
    two("cordon w1 loads=1:2,2:1 -> done +1");
    two("cordon w1 loads=1:3,2:1 -> capacity-short
         drain w1 loads=1:0,2:4 -> capacity-short
         drain w1 loads=1:0,2:4 ignore -> done d7 +1");
}

#[test]
fn the_refusal_says_the_numbers() {
    let mut world = two("");
    let line = entry("drain w1 loads=1:3,2:1", 7, world.next());
    let outcome = world.apply(line).outcome.outcome.unwrap();
    let wire::outcome::Outcome::Refusal(refusal) = outcome else {
        panic!("{outcome:?}")
    };
    let refusal = Refusal::from_wire(refusal).unwrap();
    assert_eq!(
        refusal,
        Refusal::CapacityShort {
            model: "m".into(),
            pool: "default".into(),
            workers_left: 1,
            slots_left: 4,
            slots_needed: 5,
            in_flight: 4,
        }
    );
    let said = refusal.to_string();
    assert!(said.contains("--ignore-capacity-guard"), "{said}");
}

#[test]
fn who_was_not_heard_lately_is_neither_idle_nor_full() {
    two("drain w1 loads=1:0 -> capacity-unknown
         drain w1 loads= -> capacity-unknown
         drain w1 age=10001 -> stale-evidence
         drain w1 unproven -> invalid evidence
         drain w1 loads= ignore -> done d9 +1");
}

#[test]
fn who_takes_nothing_anyway_may_leave_without_evidence() {
    three(
        "expire 1.1.0:10000 -> done
         cordon w1 loads= -> done +1
         cordon w2 loads=2:0,3:0 -> done +1
         cordon w3 loads=3:0 -> capacity-short",
    );
}

#[test]
fn of_two_operators_who_take_the_last_two_one_is_refused() {
    let world = two("drain w1 -> done d5 +1
         drain w2 -> capacity-short");
    assert_eq!(desired(&world, "w2"), Desired::Ready);
}

#[test]
fn a_drain_is_in_force_then_drained_by_the_words_of_its_workers() {
    let mut world = three("drain w1,w2 deadline=1000 -> done d7 +2");
    assert_eq!(drain(&world, 7).phase, DrainPhase::Committed);
    assert_eq!(drain(&world, 7).began, Millis(70));
    assert_eq!(drain(&world, 7).deadline, Some(Millis(1_070)));
    assert_eq!(world.run("observe 1.1.0 draining ack=7"), "done");
    assert_eq!(drain(&world, 7).phase, DrainPhase::Committed);
    assert_eq!(world.run("observe 2.2.0 draining ack=7"), "done");
    assert_eq!(drain(&world, 7).phase, DrainPhase::InForce);
    assert_eq!(drain(&world, 7).in_force, Some(Millis(90)));
    assert_eq!(world.run("observe 2.2.0 drained ack=7"), "done");
    assert_eq!(drain(&world, 7).phase, DrainPhase::InForce);
    assert_eq!(world.run("observe 1.1.0 drained ack=7"), "done");
    assert_eq!(drain(&world, 7).phase, DrainPhase::Drained);
    assert_eq!(drain(&world, 7).ended, Some(Millis(110)));
    let first_drained = &drain(&world, 7).workers[1];
    assert_eq!(first_drained.in_force, Some(Millis(90)));
    assert_eq!(first_drained.drained, Some(Millis(100)));
    assert_eq!(world.run("uncordon w1,w2"), "done +2");
}

#[test]
fn what_a_worker_said_before_it_knew_of_the_drain_does_not_count() {
    let mut world = two("drain w1 -> done d5 +1
         observe 1.1.0 drained ack=5 -> done
         uncordon w1 -> done +1
         drain w1 -> done d8 +1");
    assert_eq!(
        drain(&world, 8).phase,
        DrainPhase::Committed,
        "it still says drained, of the first one"
    );
    assert_eq!(world.run("observe 1.1.0 drained ack=7"), "done");
    assert_eq!(drain(&world, 8).phase, DrainPhase::Committed);
    assert_eq!(world.run("observe 1.1.0 drained ack=8"), "done");
    assert_eq!(drain(&world, 8).phase, DrainPhase::Drained);
}

#[test]
fn who_starts_anew_or_is_gone_is_no_hindrance_and_who_is_silent_is() {
    let mut world = three(
        "drain w1,w2 -> done d7 +2
         expire 1.1.0:10000 -> done
         remove w2 override -> done
         register w2 -> done 4.10.0",
    );
    assert_eq!(drain(&world, 7).phase, DrainPhase::Committed);
    assert!(drain(&world, 7).workers[1].drained.is_some());
    assert_eq!(desired(&world, "w2"), Desired::Ready, "another of its name");
    assert_eq!(world.run("register w1 held=1.1.0 start=1"), "done 1.1.1");
    assert_eq!(world.run("observe 1.1.1 drained ack=7"), "done");
    assert_eq!(drain(&world, 7).phase, DrainPhase::Drained);

    let mut world = two("drain w1 -> done d5 +1");
    assert_eq!(world.run("goodbye 1.1.0"), "done");
    assert_eq!(drain(&world, 5).phase, DrainPhase::Drained);
}

#[test]
fn a_drain_that_goes_on_is_joined_and_holds_its_workers() {
    three(
        "drain w1,w2 -> done d7 +2
         drain w2,w1 -> unchanged d7
         drain w1 -> drain-active
         drain w3 dry -> capacity-short
         cordon w1 -> unchanged
         uncordon w1 -> drain-active
         set w1 ready -> drain-active",
    );
}

#[test]
fn a_drain_is_called_off_and_its_workers_stay_cordoned_or_serve() {
    let mut world = two("drain w1 -> done d5 +1
         call-off d5 dry -> unchanged d5 +1
         call-off d5 -> done d5 +1
         call-off d5 -> unchanged d5
         call-off d6 -> unknown-drain");
    assert_eq!(drain(&world, 5).phase, DrainPhase::Cancelled);
    assert_eq!(desired(&world, "w1"), Desired::Cordoned);
    assert_eq!(world.run("drain w1"), "done d10 +1");
    assert_eq!(world.run("call-off d10 uncordon"), "done d10 +1");
    assert_eq!(desired(&world, "w1"), Desired::Ready);
    assert_eq!(world.run("observe 1.1.0 drained ack=99"), "done");
    assert_eq!(drain(&world, 10).phase, DrainPhase::Cancelled, "it is over");
}

#[test]
fn a_deadline_passes_by_cell_time_and_only_then() {
    let mut world = two("drain w1 deadline=30 -> done d5 +1
         deadline d5 -> invalid pass_drain_deadline.id
         deadline d6 -> unknown-drain
         deadline d5 -> done
         deadline d5 -> unchanged");
    assert!(drain(&world, 5).overdue);
    assert!(!world.fleet.worker("w1").unwrap().end_streams, "it waits");
    assert_eq!(world.run("observe 1.1.0 drained ack=5"), "done");
    assert_eq!(drain(&world, 5).phase, DrainPhase::Drained);
}

#[test]
fn at_the_deadline_streams_are_ended_where_that_was_asked_for() {
    let mut world = three(
        "drain w1,w2 deadline=30 cancel -> done d7 +2
         observe 1.1.0 drained ack=7 -> done
         observe 2.2.0 draining ack=7 -> done
         deadline d7 -> done",
    );
    let ends = |world: &World, name: &str| world.fleet.worker(name).unwrap().end_streams;
    assert!(!ends(&world, "w1"), "nothing runs there");
    assert!(ends(&world, "w2"));
    assert_eq!(world.run("observe 2.2.0 drained ack=7"), "done");
    assert_eq!(drain(&world, 7).phase, DrainPhase::InForce, "not of that");
    assert_eq!(world.run("observe 2.2.0 drained ack=10"), "done");
    assert_eq!(drain(&world, 7).phase, DrainPhase::Drained);
    assert_eq!(world.run("uncordon w2"), "done +1");
    assert!(!ends(&world, "w2"));
}

#[test]
fn a_bounded_number_of_drains_is_kept_and_none_that_goes_on_is_forgotten() {
    let mut world = World::new();
    for i in 1..=MAX_DRAINS + 2 {
        world.run(&format!("register w{i}"));
    }
    let first = world.next();
    for i in 1..=MAX_DRAINS {
        assert_eq!(
            world.run(&format!("drain w{i} ignore")),
            format!("done d{} +1", world.log.len())
        );
    }
    let next = MAX_DRAINS + 1;
    assert_eq!(world.run(&format!("drain w{next} ignore")), "full");
    assert_eq!(
        world
            .run(&format!("call-off d{}", first + 5))
            .split(' ')
            .next(),
        Some("done")
    );
    let began = world.run(&format!("drain w{next} ignore"));
    assert!(began.starts_with("done"), "{began}");
    assert_eq!(world.fleet.drains().count(), MAX_DRAINS);
    assert!(!world.fleet.drains.contains_key(&DrainId(first + 5)));
    let told = &world.deltas.last().unwrap().changes;
    assert!(
        told.iter()
            .any(|change| change.change == Some(Change::DrainForgotten(first + 5)))
    );
}

#[test]
fn a_drain_outlives_snapshots_and_deltas_tell_all_of_it() {
    let mut world = three(
        "drain w1,w2 deadline=30 cancel -> done d7 +2
         observe 1.1.0 draining ack=7 -> done
         observe 2.2.0 draining ack=7 -> done
         deadline d7 -> done",
    );
    let restored = Fleet::restore(&world.fleet.snapshot()).unwrap();
    assert_eq!(restored, world.fleet);
    assert_eq!(restored.facts().drains.len(), 1);
    let told = world.deltas.iter().flat_map(|delta| &delta.changes);
    let last = told.filter_map(|change| match &change.change {
        Some(Change::DrainPut(drain)) => Some(drain),
        _ => None,
    });
    assert_eq!(last.last(), restored.facts().drains.first());
    world.fleet = restored;
    assert_eq!(world.run("observe 1.1.0 drained ack=10"), "done");
    assert_eq!(world.run("observe 2.2.0 drained ack=10"), "done");
    assert_eq!(drain(&world, 7).phase, DrainPhase::Drained);
}

#[test]
fn cells_of_an_older_level_know_no_drains() {
    let mut world = two("");
    world.fleet = world.fleet.with_feature_level(DRAINS_LEVEL - 1);
    assert_eq!(world.run("drain w1"), "feature-too-new");
    assert_eq!(world.run("cordon w1"), "feature-too-new");
    assert_eq!(world.run("call-off d1"), "feature-too-new");
    assert_eq!(world.run("deadline d1"), "feature-too-new");
}
