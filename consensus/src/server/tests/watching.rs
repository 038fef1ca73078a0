//! Watch streams over real links.

use super::*;
use forebay_link::{FrameReceiver, FrameSender};
use watch_frame::Frame as Seen;
use wire::change::Change;

use forebay_proto::wire::control::watch_frame;

/// One watch, and the link that it lives on.
pub(super) struct Watch {
    _link: Link,
    _send: FrameSender,
    recv: FrameReceiver,
}

impl Cell {
    /// A link of one of many callers; lives as long as its endpoint.
    pub(super) fn link_of(&self, node: usize, role: Role, name: &str) -> (Endpoint, Link) {
        let paths = self.paths(role, name);
        let address = self.addresses[node].clone();
        self.runtime.block_on(async {
            let endpoint = Endpoint::client(&Credentials::load(&paths).unwrap()).unwrap();
            let expect = Expect::role(Role::Control);
            let link = endpoint.connect(&address, Alpn::Control, &expect, PATIENCE);
            let link = link.await.unwrap();
            (endpoint, link)
        })
    }

    fn watch(&self, link: &Link, cluster: u8, revision: u64) -> Watch {
        self.runtime.block_on(async {
            let (mut send, recv) = link.open().unwrap();
            let watch = control::Watch {
                cluster_id: vec![cluster; 16].into(),
                revision,
            };
            let request = control::Request {
                request: Some(Request::Watch(watch)),
            };
            let frame = Frame::message(Kind::Request, &request);
            send.send(&frame).await.unwrap();
            Watch {
                _link: link.clone(),
                _send: send,
                recv,
            }
        })
    }

    fn next(&self, watch: &mut Watch) -> Seen {
        self.runtime.block_on(async {
            let frame = tokio::time::timeout(PATIENCE, watch.recv.recv()).await;
            let frame = frame.expect("a frame in time").unwrap().unwrap();
            match frame.decode::<control::Response>().unwrap().response {
                Some(Response::Watch(control::WatchFrame { frame })) => frame.unwrap(),
                other => panic!("{other:?}"),
            }
        })
    }

    /// The next frame that is not a heartbeat, shortly; `None` if only heartbeats come for a second.
    fn next_change(&self, watch: &mut Watch) -> Option<Seen> {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(1) {
            match self.next(watch) {
                Seen::Heartbeat(_) => {}
                other => return Some(other),
            }
        }
        None
    }

    fn write(&mut self, node: usize, sequence: u64, pools: usize, expected: u64) -> u64 {
        let text: String = (0..pools)
            .map(|pool| format!("[[pools]]\nname = \"p{pool}\"\n"))
            .collect();
        revision(&self.apply_config(node, sequence, &text, expected))
    }
}

fn shown(seen: Option<Seen>) -> String {
    match seen {
        Some(Seen::Snapshot(facts)) => format!("snapshot {}", facts.revision),
        Some(Seen::Delta(delta)) => format!("delta {}", delta.revision),
        Some(Seen::Heartbeat(_)) => "heartbeat".into(),
        None => "nothing".into(),
    }
}

#[test]
fn a_watch_is_a_snapshot_then_deltas_and_goes_on_at_another_node_by_its_revision() {
    let mut cell = Cell::initialised_with(
        3,
        Settings {
            watch_deltas: 3,
            ..Settings::default()
        },
    );
    let leader = cell.leader();
    let first = cell.write(leader, 1, 1, 0);
    let (_kept, link) = cell.link_of(leader, Role::Balancer, "b1");
    let mut watch = cell.watch(&link, 1, 0);
    assert_eq!(
        shown(cell.next_change(&mut watch)),
        format!("snapshot {first}")
    );
    let second = cell.write(leader, 2, 2, first);
    let third = cell.write(leader, 3, 3, second);
    for revision in [second, third] {
        assert_eq!(
            shown(cell.next_change(&mut watch)),
            format!("delta {revision}")
        );
    }

    let other = (leader + 1) % 3;
    cell.facts(other);
    let (_kept, link) = cell.link_of(other, Role::Balancer, "b1");
    let mut resumed = cell.watch(&link, 1, first);
    for revision in [second, third] {
        assert_eq!(
            shown(cell.next_change(&mut resumed)),
            format!("delta {revision}")
        );
    }
    let mut foreign = cell.watch(&link, 9, first);
    assert_eq!(
        shown(cell.next_change(&mut foreign)),
        format!("snapshot {third}")
    );
    let mut ahead = cell.watch(&link, 1, third + 1_000);
    assert_eq!(shown(cell.next_change(&mut ahead)), "nothing");

    let mut newest = third;
    for number in 4..8 {
        newest = cell.write(leader, number, number as usize, newest);
    }
    cell.facts(other);
    let mut behind = cell.watch(&link, 1, second);
    assert_eq!(
        shown(cell.next_change(&mut behind)),
        format!("snapshot {newest}")
    );
    assert_eq!(shown(cell.next_change(&mut behind)), "nothing");
}

#[test]
fn heartbeats_tell_how_long_ago_the_leader_was_heard() {
    let mut cell = Cell::initialised(3);
    let leader = cell.leader();
    let node = (leader + 1) % 3;
    let (_kept, link) = cell.link_of(node, Role::Balancer, "b1");
    let mut watch = cell.watch(&link, 1, 0);
    let heard = |cell: &Cell, watch: &mut Watch| {
        let began = Instant::now();
        loop {
            if let Seen::Heartbeat(beat) = cell.next(watch) {
                assert!(began.elapsed() < Duration::from_millis(500));
                return beat.leader_heard_ms;
            }
        }
    };
    for _ in 0..4 {
        let ms = heard(&cell, &mut watch);
        assert!(ms <= 500, "the leader lives: {ms} ms");
    }
    for other in (0..3).filter(|other| *other != node) {
        cell.stop(other);
    }
    let first = heard(&cell, &mut watch);
    let later: Vec<u64> = (0..6).map(|_| heard(&cell, &mut watch)).collect();
    let last = later.last().copied().unwrap();
    assert!(last >= first + 1_000, "{first} ms, then {later:?}");
}

#[test]
fn agents_see_themselves_and_every_revision() {
    let mut cell = Cell::initialised(1);
    let leader = cell.leader();
    let (_kept, link) = cell.link_of(leader, Role::Agent, "w1");
    let mut watch = cell.watch(&link, 1, 0);
    cell.next_change(&mut watch);
    for name in ["w1", "w2"] {
        let (_kept, link) = cell.link_of(leader, Role::Agent, name);
        cell.register(&link, name, 1);
        let Some(Seen::Delta(delta)) = cell.next_change(&mut watch) else {
            panic!("no delta for {name}")
        };
        let seen = delta.changes.into_iter().map(|change| change.change);
        let seen = seen.filter(|change| matches!(change, Some(Change::WorkerPut(_))));
        assert_eq!(seen.count(), usize::from(name == "w1"), "{name}");
    }
    let mut again = cell.watch(&link, 1, 0);
    match cell.next_change(&mut again) {
        Some(Seen::Snapshot(facts)) => {
            let names: Vec<&str> = facts.workers.iter().map(|w| w.name.as_str()).collect();
            assert_eq!(names, ["w1"]);
        }
        other => panic!("{other:?}"),
    }
}
