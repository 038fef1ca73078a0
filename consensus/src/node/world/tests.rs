//! What must hold in any world.

use std::hash::Hasher as _;

use forebay_proto::NodeId;

use super::super::Role;
use super::disk::DiskFault;
use super::{CALM, Faults, STORM, World};

#[test]
fn storms_never_lose_what_was_committed_and_the_calm_after_them_settles() {
    let (mut installed, mut reads, mut elections) = (0, 0, 0);
    for seed in 0..60 {
        let mut world = World::new(seed, 3 + 2 * (seed % 2), STORM);
        world.run(12_000);
        world.faults = CALM;
        world.apart.clear();
        world.run(6_000);
        let before = world.committed.len();
        world.run(3_000);
        assert!(
            world.committed.len() > before + 9,
            "seed {seed}: the calm serves"
        );
        let newest = *world.committed.last_key_value().unwrap().0;
        for (id, host) in &world.hosts {
            assert!(
                host.applied + 20 > newest,
                "seed {seed}: node {id} at {} of {newest}",
                host.applied
            );
        }
        installed += world.snapshots_installed;
        reads += world.reads_done;
        elections += world.elected_at.len();
    }
    assert!(
        installed > 10 && reads > 1_000 && elections > 48,
        "{installed} {reads} {elections}"
    );
}

#[test]
fn equal_seeds_and_inputs_give_equal_outputs() {
    let trace = |seed| {
        let mut world = World::new(seed, 3, STORM);
        world.run(10_000);
        (world.trace.finish(), world.sent)
    };
    for seed in 100..104 {
        assert_eq!(trace(seed), trace(seed));
    }
    assert_ne!(trace(100), trace(101));
}

#[test]
fn a_dead_leader_is_followed_within_half_a_second_to_one_and_a_half() {
    let mut took = Vec::new();
    for seed in 0..40 {
        let mut world = World::new(1_000 + seed, 3, CALM);
        world.run(4_000);
        let leader = world.leader().unwrap();
        let died = world.now;
        world.crash(leader, 60_000);
        while world.leader().is_none() {
            world.run(1);
            assert!(world.now < died + 5_000, "seed {seed}: no leader after 5 s");
        }
        took.push(world.now - died);
    }
    took.sort_unstable();
    let (least, median, most) = (took[0], took[20], took[39]);
    assert!(
        least >= 350 && median < 1_000 && most < 1_500,
        "{least} {median} {most}"
    );
}

#[test]
fn a_group_of_one_elects_itself_at_once() {
    let mut world = World::new(7, 1, CALM);
    world.run(1);
    world.node(1).unwrap().campaign();
    world.perform(1);
    assert_eq!(world.node(1).unwrap().role(), Role::Leader);
    world.run(100);
    assert!(world.committed.len() > 2 && world.reads_done > 2);
}

#[test]
fn leadership_is_handed_over_without_an_election_timeout() {
    let mut world = World::new(8, 3, CALM);
    world.run(4_000);
    let leader = world.leader().unwrap();
    let heir = 1 + leader % 3;
    world.node(leader).unwrap().transfer(NodeId(heir)).unwrap();
    world.perform(leader);
    world.run(40);
    assert_eq!(world.leader(), Some(heir));
}

#[test]
fn a_disk_that_breaks_its_promise_is_noticed() {
    // Many short crashes and slow elections: a vote that is forgotten is given twice.
    let mayhem = Faults {
        max_delay_ms: 80,
        crash_every_ms: 120,
        max_down_ms: 40,
        split_every_ms: 400,
        ..STORM
    };
    let noticed = |disk| {
        (0..100).any(|seed| {
            let storm = || World::new(seed, 3, Faults { disk, ..mayhem }).run(10_000);
            std::panic::catch_unwind(storm).is_err()
        })
    };
    assert!(!noticed(DiskFault::Honest));
    assert!(noticed(DiskFault::ForgetsVotes));
    assert!(noticed(DiskFault::LosesTheLastWrite));
}
