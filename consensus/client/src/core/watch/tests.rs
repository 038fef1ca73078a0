//! What the watch does with each frame and silence.

use forebay_proto::config::Config;
use forebay_proto::wire::fleet;
use rand::SeedableRng;

use super::*;

fn at(ms: u64) -> Now {
    Now::at(Duration::from_millis(ms))
}

fn nodes() -> Vec<String> {
    ["a", "b", "c"].map(Into::into).into()
}

fn snapshot(cluster: u8, revision: u64) -> wire::WatchFrame {
    wire::WatchFrame {
        frame: Some(Frame::Snapshot(fleet::Facts {
            cluster_id: ClusterId([cluster; 16]).to_wire(),
            revision,
            config: Config::default().to_wire(),
            ..Default::default()
        })),
    }
}

fn delta(revision: u64, pools: &[&str]) -> wire::WatchFrame {
    let alarm = fleet::CorrelatedExpiry {
        pools: pools.iter().map(|pool| (*pool).to_owned()).collect(),
    };
    wire::WatchFrame {
        frame: Some(Frame::Delta(fleet::Delta {
            revision,
            cell_time_ms: 0,
            changes: vec![fleet::Change {
                change: Some(fleet::change::Change::CorrelatedExpiry(alarm)),
            }],
        })),
    }
}

fn heartbeat(leader_heard_ms: u64) -> wire::WatchFrame {
    wire::WatchFrame {
        frame: Some(Frame::Heartbeat(wire::Heartbeat {
            revision: 0,
            leader_heard_ms,
        })),
    }
}

fn dialled(watch: &mut Watch, now: Now) -> (String, u64) {
    match watch.next(now, &nodes()) {
        Step::Dial { address, from } => (address, from.revision),
        other => panic!("{other:?}"),
    }
}

fn watching() -> (Watch, String) {
    let mut watch = Watch::new(None, StdRng::seed_from_u64(1));
    let (address, from) = dialled(&mut watch, at(0));
    assert_eq!(from, 0);
    (watch, address)
}

#[test]
fn facts_follow_a_snapshot_and_its_deltas() {
    let (mut watch, _) = watching();
    assert!(watch.handle(at(1), snapshot(1, 5)).unwrap().is_some());
    let facts = watch
        .handle(at(2), delta(7, &["default"]))
        .unwrap()
        .unwrap();
    assert_eq!(facts.revision, Revision(7));
    assert!(facts.correlated_expiry.contains("default"));
}

#[test]
fn an_older_or_equal_revision_is_passed_over() {
    let (mut watch, _) = watching();
    watch.handle(at(1), snapshot(1, 5)).unwrap();
    for frame in [
        snapshot(1, 4),
        snapshot(1, 5),
        delta(5, &["x"]),
        delta(2, &[]),
    ] {
        assert_eq!(watch.handle(at(2), frame), Ok(None));
    }
    assert_eq!(watch.held().unwrap().revision, Revision(5));
}

#[test]
fn another_cluster_is_refused_and_the_facts_stay() {
    let (mut watch, address) = watching();
    watch.handle(at(1), snapshot(1, 5)).unwrap();
    let refused = watch.handle(at(2), snapshot(2, 9)).unwrap_err();
    assert!(matches!(refused, WatchProblem::WrongCluster { .. }));
    assert!(refused.to_string().contains("another data directory"));
    assert_eq!(watch.held().unwrap().revision, Revision(5));
    assert!(watch.check_cluster(&address, ClusterId([2; 16])).is_err());
}

#[test]
fn a_silent_node_is_left_and_the_next_one_continues_from_what_is_held() {
    let (mut watch, first) = watching();
    watch.handle(at(500), snapshot(1, 5)).unwrap();
    assert_eq!(watch.next(at(1_499), &nodes()), Step::Wait(at(1_500)));
    assert_eq!(watch.next(at(1_500), &nodes()), Step::Leave);
    let Step::Wait(until) = watch.next(at(1_500), &nodes()) else {
        panic!("no pause")
    };
    let (second, from) = dialled(&mut watch, until);
    assert_ne!(second, first);
    assert_eq!(from, 5);
}

#[test]
fn a_stale_node_is_left_only_for_a_fresher_one() {
    let (mut watch, first) = watching();
    watch.handle(at(1), heartbeat(1_001)).unwrap();
    assert_eq!(watch.next(at(1), &nodes()), Step::Scout);
    assert_eq!(watch.next(at(1), &nodes()), Step::Wait(at(1_001)));
    let alike: Vec<_> = nodes()
        .into_iter()
        .map(|n| (n, Duration::from_millis(900)))
        .collect();
    assert!(!watch.scouted(at(20), &alike));
    assert_eq!(watch.watching(), Some(&*first));

    watch.handle(at(1_000), heartbeat(2_000)).unwrap();
    assert_eq!(watch.next(at(1_001), &nodes()), Step::Scout);
    let fresh = if first == "b" { "a" } else { "b" };
    assert!(watch.scouted(at(1_020), &[(fresh.into(), Duration::from_millis(90))]));
    assert_eq!(dialled(&mut watch, at(1_020)).0, fresh);
}

#[test]
fn facts_that_cannot_be_used_are_reported_and_those_before_stay() {
    let (mut watch, _) = watching();
    watch.handle(at(1), snapshot(1, 5)).unwrap();
    let unknown = wire::WatchFrame {
        frame: Some(Frame::Delta(fleet::Delta {
            revision: 6,
            cell_time_ms: 0,
            changes: vec![fleet::Change { change: None }],
        })),
    };
    let problem = watch.handle(at(2), unknown).unwrap_err();
    assert!(matches!(problem, WatchProblem::Unusable { .. }));
    assert_eq!(watch.held().unwrap().revision, Revision(5));
    assert_eq!(watch.watching(), None);
}

#[test]
fn a_delta_before_any_snapshot_breaks_the_protocol() {
    let (mut watch, _) = watching();
    let problem = watch.handle(at(1), delta(1, &[])).unwrap_err();
    assert!(matches!(problem, WatchProblem::Protocol { .. }));
}

#[test]
fn without_addresses_it_waits() {
    let mut watch = Watch::new(None, StdRng::seed_from_u64(1));
    assert_eq!(watch.next(at(0), &[]), Step::Wait(at(1_000)));
}
