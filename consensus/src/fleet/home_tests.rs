//! What homes and rebalances do, as transcripts: entry 1 is the first line, and so on; entry n is stamped
//! 10 n ms of cell time. Family `f` is that of chunk 15.

use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Millis, Rebalance, RebalancePhase, WorkerId};

use super::testing::{World, check, entry};
use super::*;

/// Three workers that are ready: entries 1 to 6.
const THREE: &str = "register w1 -> done 1.1.0
    register w2 -> done 2.2.0
    register w3 -> done 3.3.0
    observe 1.1.0 ready ack=1 -> done
    observe 2.2.0 ready ack=2 -> done
    observe 3.3.0 ready ack=3 -> done
    ";

fn three(rest: &str) -> World {
    check(&format!("{THREE}{rest}"))
}

/// Its homes, and whether it is pinned.
fn homes(world: &World, chunk: u64) -> (Vec<u32>, bool) {
    let family = world.fleet.families().find(|family| family.chunk == chunk);
    family.map_or((vec![], false), |family| {
        let homes = family.homes.iter().map(|home| home.0);
        (homes.collect(), family.pinned)
    })
}

fn rebalance(world: &World) -> &Rebalance {
    world.fleet.rebalances().next().unwrap()
}

#[test]
fn families_get_their_homes_and_lose_them_when_nobody_asks_for_them() {
    let mut world = three(
        "homes f=1,2 e=3 -> done
         homes f=1,2 e=3 -> unchanged
         homes f=2 gone=e -> done",
    );
    assert_eq!(homes(&world, 0xf), (vec![2], false));
    assert_eq!(homes(&world, 0xe), (vec![], false));
    assert_eq!(world.run("homes f=2:50"), "done", "other heat");
    assert_eq!(world.fleet.families().next().unwrap().takes, 50);
}

#[test]
fn a_home_is_a_worker_of_the_pool_that_serves() {
    let world = three(
        "register w4 pool=other -> unknown-pool
         config default,other expected=0 -> done
         register w4 pool=other -> done 4.9.0
         cordon w3 -> done +1
         homes f=1,3,4,9 e=3,4 -> done
         homes f=1 pool=nowhere -> unknown-pool
         homes f=1 pool=other -> invalid assign_homes.put
         homes f=1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17 -> invalid assign_homes.put",
    );
    assert_eq!(homes(&world, 0xf), (vec![1], false));
    assert_eq!(
        homes(&world, 0xe),
        (vec![], false),
        "without a home it is none"
    );
}

#[test]
fn what_was_made_from_older_homes_is_refused() {
    let mut world = three("homes f=1 as_of=6 -> done");
    assert_eq!(world.run("homes f=2 as_of=6"), "plan-stale");
    assert_eq!(world.run("homes f=2 as_of=7"), "done");
    assert_eq!(world.run("observe 1.1.0 joining ack=1"), "done");
    assert_eq!(
        world.run("homes f=1 as_of=9"),
        "done",
        "no home changed since"
    );
}

#[test]
fn a_bounded_number_of_families_has_homes() {
    let mut world = three("");
    let some = |from: usize, n: usize| {
        let families = (from..from + n).map(|chunk| format!("{chunk:x}=1"));
        format!("homes {}", families.collect::<Vec<_>>().join(" "))
    };
    assert_eq!(world.run(&some(1, MAX_FAMILIES)), "done");
    assert_eq!(world.run(&some(1, MAX_FAMILIES)), "unchanged");
    assert_eq!(world.run(&some(MAX_FAMILIES + 1, 1)), "full");
    assert_eq!(
        world.run(&some(1, MAX_FAMILIES + 1)),
        "invalid assign_homes.put"
    );
}

#[test]
fn homes_leave_who_is_cordoned_or_drained_in_the_same_entry_for_who_is_asked_least() {
    let mut world = three(
        "homes f=1:90 e=1:10 d=2:50 -> done
         cordon w1 -> done +1",
    );
    assert_eq!(
        homes(&world, 0xf),
        (vec![3], true),
        "the hottest to who has none"
    );
    assert_eq!(homes(&world, 0xe), (vec![2], true));
    assert_eq!(homes(&world, 0xd), (vec![2], false), "it did not move");
    let told = &world.deltas.last().unwrap().changes;
    let families = told.iter().find_map(|change| match &change.change {
        Some(Change::Families(families)) => Some(families.put.len()),
        _ => None,
    });
    assert_eq!(families, Some(2));
    assert_eq!(world.run("drain w3"), "done d9 +1");
    assert_eq!(homes(&world, 0xf), (vec![2], true));
    assert_eq!(world.run("uncordon w1"), "done +1");
    assert_eq!(homes(&world, 0xf), (vec![2], true), "what moved stays");
    assert_eq!(world.run("set w2 cordoned override"), "done");
    assert_eq!(homes(&world, 0xf), (vec![1], true));
}

#[test]
fn a_home_goes_to_nobody_who_could_not_serve_its_requests() {
    let world = check(
        "register w1 models=m -> done 1.1.0
         register w2 models=a -> done 2.2.0
         register w3 models=a,m -> done 3.3.0
         observe 2.2.0 ready ack=2 -> done
         homes f=1 e=1,3 -> done
         cordon w1 ignore -> done +1",
    );
    assert_eq!(
        homes(&world, 0xf),
        (vec![], false),
        "w3 is not ready, w2 serves another model"
    );
    assert_eq!(homes(&world, 0xe), (vec![3], true));
}

#[test]
fn who_is_removed_or_goes_to_another_pool_is_no_home() {
    let world = three(
        "config default,other expected=0 -> done
         homes f=1,2,3 -> done
         remove w1 -> done
         register w2 pool=other held=2.2.0 start=1 -> done 2.2.1",
    );
    assert_eq!(homes(&world, 0xf), (vec![3], false));
}

#[test]
fn a_pinned_family_only_gains_homes() {
    let world = three(
        "homes f=1 -> done
         drain w1 -> done d8 +1
         homes f=3 -> done",
    );
    assert_eq!(homes(&world, 0xf), (vec![2, 3], true));
    let world = three(
        "homes f=1 -> done
         drain w1 -> done d8 +1
         expire 2.2.0:10000 -> done
         homes f=3 -> done",
    );
    assert_eq!(
        homes(&world, 0xf),
        (vec![3], true),
        "but for those that are lost"
    );
}

#[test]
fn a_rebalance_moves_one_home_after_the_other() {
    let mut world = three(
        "homes f=1 e=1 -> done
         rebalance f:1>2 e:1>3 e:0>1 -> done r8 +3
         step r8 0 -> done r8
         step r8 0 -> unchanged
         step r8 1 -> invalid step_rebalance.id",
    );
    assert_eq!(homes(&world, 0xf), (vec![2], true));
    assert_eq!(homes(&world, 0xe), (vec![1], false), "not yet");
    assert_eq!(rebalance(&world).moved, Some(Millis(90)));
    // The next is due 100 ms after the first: at entry 19.
    while world.next() < 19 {
        world.run("homes f=2,3 -> done");
    }
    assert_eq!(homes(&world, 0xf), (vec![2, 3], true));
    assert_eq!(world.run("step r8 1"), "done r8");
    assert_eq!(
        (homes(&world, 0xe), rebalance(&world).done),
        ((vec![3], true), 2)
    );
    assert_eq!(rebalance(&world).phase, RebalancePhase::Moving);
    while world.next() < 29 {
        world.run("goodbye 9.9.9");
    }
    assert_eq!(world.run("step r8 2"), "done r8");
    assert_eq!(homes(&world, 0xe), (vec![1, 3], true));
    let done = rebalance(&world).clone();
    assert_eq!(
        (done.phase, done.done, done.began, done.ended),
        (RebalancePhase::Done, 3, Millis(80), Some(Millis(290)))
    );
    assert_eq!(
        (&*done.actor, &*done.reason),
        ("operator/admin/alice", "a reason")
    );
    assert_eq!(world.run("step r8 3"), "unchanged");
    assert_eq!(world.run("stop r8"), "unchanged");
    assert_eq!(world.run("call-rebalance-off r8"), "unchanged r8");
}

#[test]
fn a_plan_that_is_not_possible_any_more_is_refused_and_says_why() {
    let mut world = three(
        "homes f=1 e=1,2 -> done
         cordon w3 -> done +1
         rebalance f:2>1 -> plan-stale
         rebalance f:1>1 -> invalid start_rebalance.moves
         rebalance f:1>3 -> plan-stale
         rebalance f:1>9 -> plan-stale
         rebalance e:1>2 -> plan-stale
         rebalance f:1>0 -> plan-stale
         rebalance a:1>2 -> plan-stale
         rebalance f:1>2 f:1>2 -> plan-stale
         rebalance f:1>2 pool=other -> unknown-pool
         rebalance -> invalid start_rebalance.moves
         rebalance f:1>2 every=99 -> invalid start_rebalance.interval_ms
         rebalance f:1>2 below=1001 -> invalid start_rebalance.stop_below
         rebalance f:1>2 dry -> unchanged +1
         rebalance f:1>2 f:2>1 dry -> unchanged +2",
    );
    assert_eq!(world.fleet.rebalances().count(), 0);
    let line = entry("rebalance f:1>3", 7, world.next());
    let outcome = world.apply(line).outcome.outcome.unwrap();
    let wire::outcome::Outcome::Refusal(refusal) = outcome else {
        panic!("{outcome:?}")
    };
    let said = Refusal::from_wire(refusal).unwrap().to_string();
    assert!(
        said.contains("worker w3 is not ready in pool default: plan again"),
        "{said}"
    );
    let many = format!("rebalance {}", "f:1>2 ".repeat(MAX_MOVES + 1));
    assert_eq!(world.run(&many), "invalid start_rebalance.moves");
}

#[test]
fn a_pool_has_one_rebalance_at_a_time_and_its_newest_is_kept() {
    let mut world = three(
        "homes f=1 e=1 -> done
         rebalance f:1>2 -> done r8 +1
         rebalance f:1>2 -> unchanged r8
         rebalance f:1>3 -> rebalance-active
         call-rebalance-off r7 -> unknown-rebalance
         call-rebalance-off r8 dry -> unchanged r8
         call-rebalance-off r8 -> done r8
         step r8 0 -> unchanged
         rebalance e:1>3 -> done r15 +1
         call-rebalance-off r8 -> unknown-rebalance
         stop r15 -> done r15",
    );
    assert_eq!(world.fleet.rebalances().count(), 1);
    let stopped = rebalance(&world);
    assert_eq!(
        (stopped.phase, &*stopped.stopped),
        (RebalancePhase::Stopped, "too late")
    );
    assert_eq!(homes(&world, 0xf), (vec![1], false), "nothing was moved");
    assert_eq!(world.run("rebalance e:1>3"), "done r18 +1");
    assert_eq!(rebalance(&world).phase, RebalancePhase::Moving);
}

#[test]
fn while_a_family_is_to_be_moved_nothing_but_a_leaver_changes_its_homes() {
    let world = three(
        "homes f=1 e=1 -> done
         rebalance f:1>2 -> done r8 +1
         homes f=3:70 gone=e -> done
         homes gone=f -> unchanged",
    );
    assert_eq!(homes(&world, 0xf), (vec![1], false));
    assert_eq!(world.fleet.families().next().unwrap().takes, 70);
}

#[test]
fn a_move_that_became_impossible_stops_its_rebalance() {
    let world = three(
        "homes f=1 -> done
         rebalance f:1>2 -> done r8 +1
         cordon w2 -> done +1
         step r8 0 -> done r8",
    );
    let stopped = rebalance(&world);
    assert_eq!(stopped.phase, RebalancePhase::Stopped);
    assert_eq!(stopped.stopped, "worker w2 is not ready in pool default");
    assert_eq!(stopped.done, 0);
    assert_eq!(homes(&world, 0xf), (vec![1], false));
}

#[test]
fn a_rebalance_is_forgotten_with_its_pool() {
    let world = three(
        "config default,other expected=0 -> done
         register w4 pool=other -> done 4.8.0
         observe 4.8.0 ready ack=8 -> done
         register w5 pool=other -> done 5.10.0
         observe 5.10.0 ready ack=10 -> done
         homes f=4 pool=other -> done
         rebalance f:4>5 pool=other -> done r13 +1
         remove w4 override -> done
         remove w5 override -> done
         config default expected=7 -> done",
    );
    assert_eq!(world.fleet.rebalances().count(), 0);
    assert_eq!(world.fleet.families().count(), 0);
    let told = &world.deltas.last().unwrap().changes;
    let forgotten = Some(Change::RebalanceForgotten("other".into()));
    assert!(told.iter().any(|change| change.change == forgotten));
}

#[test]
fn homes_and_rebalances_outlive_snapshots_and_are_audited_but_for_what_follows_heat() {
    let mut world = three(
        "homes f=1 -> done
         rebalance f:1>2 -> done r8 +1
         step r8 0 -> done r8
         homes f=2,3 -> done",
    );
    let restored = Fleet::restore(&world.fleet.snapshot()).unwrap();
    assert_eq!(restored, world.fleet);
    assert_eq!(restored.facts().families, world.fleet.facts().families);
    assert_eq!(homes(&world, 0xf), (vec![2, 3], true));
    world.fleet = restored;
    assert_eq!(
        world.run("homes f=2 as_of=9"),
        "plan-stale",
        "it knows when homes changed"
    );
    let (tail, _) = world.fleet.audit_tail(2);
    let shown: Vec<String> = tail
        .iter()
        .map(|entry| format!("{} {}: {}", entry.action, entry.target, entry.result))
        .collect();
    assert_eq!(
        shown,
        [
            "rebalance default, 1 moves: done",
            "rebalance-step r8 move 1: done"
        ]
    );
    assert_eq!(rebalance(&world).moves[0].to, Some(WorkerId(2)));
}

#[test]
fn cells_of_an_older_level_know_no_homes() {
    let mut world = three("");
    world.fleet = world.fleet.with_feature_level(HOMES_LEVEL - 1);
    for line in [
        "homes f=1",
        "rebalance f:1>2",
        "step r1 0",
        "stop r1",
        "call-rebalance-off r1",
    ] {
        assert_eq!(world.run(line), "feature-too-new", "{line}");
    }
}
