//! What deaths of engines make of the requests that were on them, as transcripts: entry n is stamped 10 n ms.

use forebay_proto::Millis;
use forebay_proto::suspect::HELD_FOR;
use forebay_proto::wire::fleet as wire;
use prost::Message as _;
use wire::change::Change;

use super::testing::{World, check, entry};
use super::*;

/// Three workers: entries 1 to 3.
const THREE: &str = "register w1 -> done 1.1.0
    register w2 -> done 2.2.0
    register w3 -> done 3.3.0
    ";

fn three(rest: &str) -> World {
    check(&format!("{THREE}{rest}"))
}

/// `f:1750!`: request 15 is suspected by 1.75 and refused.
fn shown(world: &World) -> String {
    let suspects = world.fleet.suspects().map(|suspect| {
        let quarantined = if suspect.is_quarantined() { "!" } else { "" };
        format!("{:x}:{}{quarantined}", suspect.key, suspect.suspicion())
    });
    suspects.collect::<Vec<_>>().join(" ")
}

/// What watchers of all deltas hold.
fn watched(world: &World) -> BTreeMap<u64, wire::Suspect> {
    let mut held = BTreeMap::new();
    for change in world.deltas.iter().flat_map(|delta| &delta.changes) {
        if let Some(Change::Suspects(changes)) = &change.change {
            for key in &changes.removed {
                held.remove(key);
            }
            for suspect in &changes.put {
                held.insert(suspect.key, suspect.clone());
            }
        }
    }
    held
}

#[test]
fn deaths_on_two_workers_quarantine_whom_they_are_held_against_and_not_who_was_there_once() {
    let world = three(
        "accuse 1.1.0 a:250 b:250 c:500 -> done
         accuse 2.2.0 a:1500 d:200 -> done",
    );
    assert_eq!(shown(&world), "a:1750! b:250 c:500 d:200");
    let facts: Vec<_> = watched(&world).into_values().collect();
    assert_eq!(world.fleet.facts().suspects, facts);
}

#[test]
fn a_death_told_again_changes_nothing_and_one_worker_is_not_enough() {
    let world = three(
        "accuse 1.1.0 a:1500 -> done
         accuse 1.1.0 a:1500 -> done
         accuse 1.1.0 a:900 -> done",
    );
    // The time of the newest death is all that changed.
    assert_eq!(shown(&world), "a:1500");
}

#[test]
fn those_that_ran_well_are_cleared_and_who_is_quarantined_stays_so() {
    let world = three(
        "accuse 1.1.0 a:250 b:900 c:1000 -> done
         accuse 2.2.0 c:1000 -> done
         clear 3.3.0 a b c ee -> done
         clear 3.3.0 a -> unchanged",
    );
    assert_eq!(shown(&world), "b:400 c:2000!");
}

#[test]
fn only_the_worker_that_is_registered_is_believed() {
    let world = three(
        "accuse 1.1.7 a:1000 -> superseded
         accuse 9.9.0 a:1000 -> unknown-worker
         clear 1.1.7 a -> superseded
         accuse 1.1.0 a:0 -> invalid accuse_requests.accused[0].key
         accuse 1.1.0 0:9 -> invalid accuse_requests.accused[0].key",
    );
    assert_eq!(shown(&world), "");
}

#[test]
fn what_is_lifted_begins_anew() {
    let world = three(
        "accuse 1.1.0 a:1000 b:1000 c:100 -> done
         accuse 2.2.0 a:1000 b:1000 -> done
         lift 77 -> unknown-suspect
         lift dry a -> unchanged +1
         lift a -> done +1
         lift a -> unknown-suspect
         lift -> done +1
         lift -> unchanged
         accuse 3.3.0 a:1000 -> done",
    );
    assert_eq!(shown(&world), "a:1000 c:100");
}

#[test]
fn suspicions_are_forgotten_after_their_time() {
    let mut world = three(
        "accuse 1.1.0 a:1000 b:500 -> done
         accuse 2.2.0 a:1000 -> done
         forget -> unchanged",
    );
    let old = Millis(HELD_FOR.0 + 40);
    let later = |line: &str, at: Millis| {
        let mut late = wire::Proposal::decode(entry(line, 8, 1)).unwrap();
        late.at_ms = at.0;
        late.sequence = 0;
        Bytes::from(late.encode_to_vec())
    };
    world.apply(later("forget", old));
    assert_eq!(shown(&world), "a:2000!", "b's only death was an hour ago");
    world.apply(later("forget", Millis(old.0 + 10)));
    assert_eq!(shown(&world), "");
    assert_eq!(watched(&world), BTreeMap::new());
}

#[test]
fn suspects_are_bounded_and_a_quarantine_does_not_give_way_to_a_suspicion() {
    let mut world = three(
        "accuse 1.1.0 a1:1000 -> done
         accuse 2.2.0 a1:1000 -> done",
    );
    for round in 0..=(MAX_SUSPECTS / MAX_ACCUSED) {
        let many = (0..MAX_ACCUSED).map(|one| format!("{:x}:20", 0x1_0000 + round * 1_000 + one));
        let many: Vec<_> = many.collect();
        assert_eq!(
            world.run(&format!("accuse 1.1.0 {}", many.join(" "))),
            "done"
        );
    }
    assert_eq!(world.fleet.suspects().count(), MAX_SUSPECTS);
    assert!(shown(&world).starts_with("a1:2000!"));
    assert_eq!(watched(&world).len(), MAX_SUSPECTS);
    let too_many = (0..=MAX_ACCUSED).map(|one| format!("{:x}:20", one + 1));
    let too_many: Vec<_> = too_many.collect();
    let said = world.run(&format!("accuse 1.1.0 {}", too_many.join(" ")));
    assert_eq!(said, "invalid accuse_requests.accused");
}

#[test]
fn suspects_survive_snapshots_and_are_in_the_audit_by_name() {
    let world = three(
        "accuse 1.1.0 a:1000 -> done
         accuse 2.2.0 a:1000 -> done
         lift dry a -> unchanged +1",
    );
    let restored = Fleet::restore(&world.fleet.snapshot()).unwrap();
    assert_eq!(restored, world.fleet);
    let (audit, _) = world.fleet.audit_tail(2);
    let said: Vec<_> = audit
        .iter()
        .map(|entry| (entry.action.as_str(), entry.target.as_str()))
        .collect();
    assert_eq!(
        said,
        [
            ("engine-died", "w2.2.0, 9 requests on it: 000000000000000a"),
            ("lift-quarantine", "000000000000000a (dry run)"),
        ]
    );
}

#[test]
fn a_cell_of_an_older_level_knows_no_suspects() {
    let mut world = World::new();
    world.fleet = world.fleet.with_feature_level(HOMES_LEVEL);
    assert_eq!(world.run("register w1"), "done 1.1.0");
    for line in ["accuse 1.1.0 a:1000", "clear 1.1.0 a", "lift a", "forget"] {
        assert_eq!(world.run(line), "feature-too-new", "{line}");
    }
}
