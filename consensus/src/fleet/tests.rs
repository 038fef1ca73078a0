//! What each command does, as transcripts: entry 1 is the first line, and so on.

use bytes::Bytes;
use forebay_proto::Revision;
use forebay_proto::wire::fleet as wire;
use prost::Message;
use wire::{Desired, Observed};

use super::testing::{World, check, config, entry, proposal, shown};
use super::*;

#[test]
fn a_new_name_gets_the_next_id_and_the_entrys_index_as_its_grant() {
    check(
        "register w1 -> done 1.1.0
         register w2 start=4 -> done 2.2.4
         remove w1 override -> done
         register w1 -> done 3.4.0",
    );
}

#[test]
fn a_start_counted_on_the_workers_own_disk_must_be_higher() {
    check(
        "register w1 -> done 1.1.0
         register w1 held=1.1.0 start=1 renewed=100 -> done 1.1.1
         register w1 held=1.1.0 start=0 -> superseded
         register w1 held=1.1.0 start=1 -> unchanged 1.1.1
         register w1 held=1.1.1 start=2 spec=other -> done 1.1.2",
    );
}

#[test]
fn a_start_may_declare_another_spec_without_dying_for_it() {
    check(
        "register w1 -> done 1.1.0
         register w1 held=1.1.0 start=0 spec=other -> done 1.1.0
         register w1 held=1.1.0 start=0 spec=other -> unchanged 1.1.0
         register w1 held=1.1.0 start=1 -> done 1.1.1
         register w1 held=1.1.0 start=0 spec=other -> superseded",
    );
}

#[test]
fn a_lost_disk_is_granted_anew_once_nobody_of_that_name_lives() {
    check(
        "register w1 -> done 1.1.0
         register w1 renewed=9999 -> still-live
         register w1 renewed=10000 -> done 1.3.0
         register w1 renewed=5 takeover -> done 1.4.0
         register w1 -> done 1.5.0
         register w1 held=1.4.0 start=9 -> superseded",
    );
}

#[test]
fn what_a_disk_cannot_hold_is_refused() {
    check(
        "register w1 -> done 1.1.0
         register w2 -> done 2.2.0
         register w1 held=2.2.0 start=1 -> invalid register.held
         register w1 held=1.99.0 start=1 -> invalid register.held
         register w1 held=1.0.0 start=1 -> invalid register.held.incarnation
         register w3 held=1.1.0 start=1 -> unknown-worker",
    );
}

#[test]
fn a_registration_is_checked_whole() {
    check(
        "register -w -> invalid register.name
         register w1 advertise=nowhere -> invalid spec.advertise
         register w1 models= -> invalid spec.models
         register w1 pool=none -> unknown-pool
         register w1 age=10001 -> stale-evidence
         register w1 unproven -> invalid evidence",
    );
}

#[test]
fn an_incarnation_dies_by_its_own_goodbye() {
    let world = check(
        "register w1 -> done 1.1.0
         goodbye 1.1.0 -> done
         goodbye 1.1.0 -> unchanged
         observe 1.1.0 ready -> superseded
         register w1 held=1.1.0 start=0 -> superseded
         register w1 held=1.1.0 start=1 renewed=10 -> done 1.1.1
         goodbye 1.1.0 -> superseded
         goodbye 1.1.1 -> done
         register w1 renewed=10 -> done 1.9.0",
    );
    assert!(!world.fleet.worker("w1").unwrap().departed);
}

#[test]
fn what_an_operator_wants_outlives_every_start() {
    let world = check(
        "register w1 -> done 1.1.0
         register w2 -> done 2.2.0
         set w1 cordoned -> done
         observe 1.1.0 cordoned ack=3 -> done
         set w1 cordoned -> unchanged
         register w1 held=1.1.0 start=1 -> done 1.1.1",
    );
    let worker = world.fleet.worker("w1").unwrap();
    assert_eq!(worker.desired, Desired::Cordoned);
    assert_eq!(worker.desired_revision, Revision(3));
    assert_eq!(worker.observed, Observed::Joining);
    assert_eq!(worker.acknowledged_revision, Revision(0));
}

#[test]
fn a_worker_acknowledges_what_it_was_wanted_and_no_more() {
    let world = check(
        "register w1 -> done 1.1.0
         observe 1.1.0 ready ack=1 -> done
         observe 1.1.0 ready ack=99 -> unchanged
         observe 1.1.0 ready -> unchanged
         observe 1.1.0 77 -> invalid observe.observed
         observe 1.1.0 0 -> invalid observe.observed
         observe 1.1.9 ready -> superseded
         observe 5.1.0 ready -> unknown-worker",
    );
    let acknowledged = world.fleet.worker("w1").unwrap().acknowledged_revision;
    assert_eq!(acknowledged, Revision(1));
}

#[test]
fn no_model_is_left_without_a_ready_worker_unless_overridden() {
    check(
        "register w1 models=a,b -> done 1.1.0
         register w2 models=a -> done 2.2.0
         set w2 draining -> done
         set w1 draining -> leaves-model-empty
         remove w1 -> leaves-model-empty
         remove w2 -> done
         set w1 cordoned override -> done
         remove w1 -> done",
    );
}

#[test]
fn a_worker_that_is_lost_does_not_stand_in_for_one_that_serves() {
    check(
        "register w1 -> done 1.1.0
         register w2 -> done 2.2.0
         register w3 -> done 3.3.0
         expire 2.2.0:10000 3.3.0:10000 -> done
         set w1 cordoned -> leaves-model-empty
         remove w2 -> done
         remove w3 -> done
         remove w1 -> leaves-model-empty",
    );
}

#[test]
fn the_same_model_in_another_pool_is_no_stand_in() {
    check(
        "config default,other -> done
         register w1 -> done 1.2.0
         register w2 pool=other -> done 2.3.0
         set w1 cordoned -> leaves-model-empty
         set w1 9 -> invalid set_desired.desired
         set w9 cordoned -> unknown-worker",
    );
}

#[test]
fn the_configuration_is_replaced_by_compare_and_set() {
    let world = check(
        "config default,other -> done
         config default -> revision-conflict
         register w1 pool=other -> done 1.3.0
         config default expected=1 -> pool-in-use
         config default,other expected=1 -> unchanged
         config a,a expected=1 -> invalid config.pools[1].name
         set w1 cordoned override -> done
         remove w1 -> done
         config default expected=1 -> done",
    );
    assert_eq!(world.fleet.facts().config_revision, 9);
    assert_eq!(world.fleet.facts().config, config("default"));
}

#[test]
fn a_lease_that_ran_out_marks_the_current_incarnation_lost_until_it_is_heard() {
    let world = check(
        "register w1 -> done 1.1.0
         register w2 -> done 2.2.0
         register w2 held=2.2.0 start=1 -> done 2.2.1
         expire 1.1.0:10000 2.2.0:50000 9.9.9:10000 -> done
         expire 1.1.0:11000 -> unchanged
         observe 1.1.0 joining -> done
         expire 1.1.0:12000 -> done
         register w1 held=1.1.0 start=0 -> done 1.1.0
         expire 2.2.1:9999 -> invalid expire.evidence
         expire 2.2.1:12000 age=10001 -> stale-evidence
         goodbye 2.2.1 -> done
         expire 2.2.1:12000 -> unchanged",
    );
    assert!(world.fleet.workers().all(|worker| !worker.lost));
}

#[test]
fn too_many_at_once_raise_an_alarm_instead() {
    let world = check(
        "config default,other -> done
         register w1 -> done 1.2.0
         register w2 pool=other -> done 2.3.0
         expire 1.2.0:10000 2.3.0:10000 correlated=default,nowhere -> done
         expire correlated=default -> unchanged
         set w2 cordoned override -> done
         remove w2 -> done",
    );
    assert!(!world.fleet.worker("w1").unwrap().lost);
    assert_eq!(world.fleet.facts().correlated_expiry, ["default"]);
    let mut world = world;
    assert_eq!(world.run("expire"), "done");
    assert!(world.fleet.facts().correlated_expiry.is_empty());
}

#[test]
fn taking_a_pool_out_clears_its_alarm() {
    let mut world = check(
        "config default,other -> done
         expire correlated=other -> done
         config default expected=1 -> done",
    );
    assert!(world.fleet.facts().correlated_expiry.is_empty());
    assert_eq!(world.deltas.pop().unwrap().changes.len(), 2);
}

#[test]
fn a_repetition_gets_the_first_outcome_and_changes_nothing() {
    let mut world = World::new();
    let first = world.apply(entry("register w1", 1, 5));
    let before = world.fleet.facts();
    let again = world.apply(entry("register w1", 1, 5));
    assert_eq!(first.outcome, again.outcome);
    assert_eq!(again.delta, None);
    assert_eq!(world.fleet.facts(), before);
    assert_eq!(world.fleet.audit_count(), 1);
    let older = world.apply(entry("register w9", 1, 4));
    assert_eq!(shown(&older), "stale-sequence");
    let other_client = world.apply(entry("register w9", 2, 4));
    assert_eq!(shown(&other_client), "done 2.4.0");
}

#[test]
fn a_command_without_a_number_is_applied_each_time() {
    let mut world = World::new();
    world.run("register w1");
    for (line, expected) in [
        ("observe 1.1.0 ready", "done"),
        ("observe 1.1.0 cordoned", "done"),
        ("observe 1.1.0 cordoned", "unchanged"),
    ] {
        assert_eq!(shown(&world.apply(entry(line, 0, 0))), expected);
    }
}

#[test]
fn a_refusal_is_an_outcome_that_a_repetition_gets_too() {
    let mut world = World::new();
    let refused = world.apply(entry("remove w1", 1, 1));
    world.run("register w1");
    let again = world.apply(entry("remove w1", 1, 1));
    assert_eq!(again.outcome, refused.outcome);
}

#[test]
fn each_mutation_is_audited_once_and_routine_reports_are_not() {
    let world = check(
        "register w1 -> done 1.1.0
         observe 1.1.0 ready -> done
         set w1 cordoned -> leaves-model-empty
         set w1 cordoned override -> done
         goodbye 1.1.0 -> done",
    );
    let (entries, head) = world.fleet.audit_tail(100);
    let lines: Vec<_> = entries
        .iter()
        .map(|entry| format!("{} {} {}", entry.action, entry.target, entry.result))
        .collect();
    assert_eq!(
        lines,
        [
            "register w1 done",
            "set-desired w1 cordoned leaves-model-empty",
            "set-desired w1 cordoned (guard overridden) done",
            "goodbye w1.1.0 done",
        ]
    );
    assert_eq!(audit::verify(&entries, &head), Ok(()));
    assert_eq!(
        entries[0].actor.clone().unwrap().identity,
        "operator/admin/alice"
    );
}

#[test]
fn what_is_no_command_is_refused_alike_everywhere() {
    let mut world = World::new();
    for (entry, expected) in [
        (Bytes::from_static(b"\xff\xff"), "invalid proposal"),
        (Bytes::new(), "invalid proposal.client"),
        (
            proposal(Bytes::from_static(b"\xff"), 1, 1, None),
            "invalid command",
        ),
        (proposal(Bytes::new(), 1, 2, None), "invalid command"),
    ] {
        assert_eq!(shown(&world.apply(entry)), expected);
    }
}

#[test]
fn the_fleet_is_bounded() {
    let mut world = World::new();
    for i in 0..MAX_WORKERS {
        world.run(&format!("register w{i}"));
    }
    assert_eq!(world.run("register one-more"), "full");
    assert_eq!(world.run("remove w1"), "done");
    assert_eq!(world.run("register one-more"), "done 4097.4099.0");
}

#[test]
fn cell_time_never_goes_back() {
    let mut world = World::new();
    world.apply(entry("register w1", 1, 50));
    world.apply(entry("register w2", 2, 20));
    assert_eq!(world.fleet.cell_time(), forebay_proto::Millis(500));
}

#[test]
fn fields_of_a_later_version_survive_byte_for_byte() {
    let mut world = World::new();
    let registration = wire::Proposal::decode(entry("register w1", 1, 1)).unwrap();
    let mut command = wire::Command::decode(registration.command).unwrap();
    let unknown = b"\xfa\x3f\x03new"; // field 1023, length-delimited
    let Some(Action::Register(register)) = &mut command.action else {
        panic!("a registration")
    };
    let mut spec = register.spec.to_vec();
    spec.extend_from_slice(unknown);
    register.spec = spec.clone().into();
    let evidence = Some(wire::Evidence::default());
    world.apply(proposal(command.encode_to_vec().into(), 1, 1, evidence));

    let mut document = config("default").to_vec();
    document.extend_from_slice(unknown);
    let apply = wire::Command {
        action: Some(Action::ApplyConfig(wire::ApplyConfig {
            config: document.clone().into(),
            expected_revision: 0,
        })),
    };
    world.apply(proposal(apply.encode_to_vec().into(), 1, 2, None));

    let restored = Fleet::restore(&world.fleet.snapshot()).unwrap();
    for facts in [world.fleet.facts(), restored.facts()] {
        assert_eq!(facts.workers[0].spec, spec);
        assert_eq!(facts.config, document);
    }
}

#[test]
fn a_damaged_snapshot_is_refused_with_what_is_wrong() {
    let world = check("register w1 -> done 1.1.0");
    let good = world.fleet.snapshot();
    let damaged = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        Fleet::restore(&bytes).unwrap_err()
    };
    assert_eq!(damaged(0), RestoreError::NotASnapshot);
    assert_eq!(damaged(9), RestoreError::Version { found: 0 });
    assert_eq!(damaged(12), RestoreError::Checksum);
    assert_eq!(damaged(good.len() - 1), RestoreError::Checksum);
    for cut in 0..good.len() {
        assert!(Fleet::restore(&good[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn time_never_goes_back_not_even_in_the_audit() {
    let mut world = World::new();
    for (line, client, sequence) in [
        ("register w1", 1, 9),
        ("register w2", 2, 3),
        ("remove w9", 3, 2),
    ] {
        world.apply(entry(line, client, sequence));
    }
    assert_eq!(world.fleet.cell_time().0, 90);
    let (entries, head) = world.fleet.audit_tail(100);
    let times: Vec<u64> = entries.iter().map(|entry| entry.at_ms).collect();
    assert_eq!(times, [90, 90, 90]);
    assert_eq!(audit::verify(&entries, &head), Ok(()));
}
