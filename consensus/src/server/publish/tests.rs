//! What watchers are told, for batches of every mixture.

use bytes::Bytes;
use forebay_proto::config::Config;
use wire::command::Action;

use super::*;

/// A fleet whose every batch is published.
struct World {
    fleet: Fleet,
    published: Publisher,
    index: u64,
}

enum Entry {
    /// Changes the configuration; this many pools.
    Config(usize),
    /// Is refused, and audited.
    Refused,
    /// Changes nothing and is not audited, but carries the time.
    Nothing,
}
use Entry::{Config as Pools, Nothing, Refused};

impl World {
    fn new(max_deltas: usize) -> Self {
        let world = Self {
            fleet: Fleet::bootstrap(ClusterId([1; 16]), vec![]),
            published: Publisher::new(ClusterId([1; 16]), max_deltas),
            index: 1,
        };
        world.published.publish(&world.fleet, 1, &[]);
        world
    }

    fn apply(&mut self, entry: &Entry) -> replica::Applied<Applied> {
        self.index += 1;
        let action = match entry {
            Pools(pools) => {
                let text: String = (0..*pools)
                    .map(|pool| format!("[[pools]]\nname = \"p{pool}\"\n"))
                    .collect();
                Action::ApplyConfig(wire::ApplyConfig {
                    config: Config::from_toml(&text).unwrap().to_wire(),
                    expected_revision: self.fleet.facts().config_revision,
                })
            }
            Refused => Action::Remove(wire::RemoveWorker {
                name: "nobody".into(),
                override_guard: false,
            }),
            Nothing => Action::Observe(wire::ObserveWorker::default()),
        };
        let command = wire::Command {
            action: Some(action),
        };
        let proposal = wire::Proposal {
            at_ms: self.index * 1_000,
            client: Bytes::from_static(&[0; 16]),
            command: command.encode_to_vec().into(),
            ..wire::Proposal::default()
        };
        let output = self
            .fleet
            .apply(self.index, &proposal.encode_to_vec().into());
        replica::Applied {
            index: self.index,
            term: 1,
            output,
        }
    }

    fn batch(&mut self, entries: &[Entry]) {
        let outputs: Vec<_> = entries.iter().map(|entry| self.apply(entry)).collect();
        self.published.publish(&self.fleet, self.index, &outputs);
        let (entries, head, count) = self.published.audit(usize::MAX);
        assert_eq!(count, self.fleet.audit_count());
        assert_eq!(*self.published.facts(), self.fleet.facts());
        assert_eq!(crate::fleet::audit::verify(&entries, &head), Ok(()));
        // All of them are kept here.
        for last in 0..=count + 2 {
            let from = usize::try_from(last).unwrap().min(entries.len());
            let newer = (last.min(count) + 1, entries[from..].to_vec());
            let (first, found) = self.published.audit_after(last);
            assert_eq!((first.min(count + 1), found), newer, "after {last}");
        }
        assert_eq!((entries, head), self.fleet.audit_tail(usize::MAX));
    }

    fn since(&self, revision: u64) -> String {
        match self.published.since(revision) {
            Next::Snapshot(facts) => format!("snapshot {}", facts.revision),
            Next::Deltas(deltas) => {
                let revisions = deltas.iter().map(|delta| delta.revision.to_string());
                revisions.collect::<Vec<_>>().join(" ")
            }
        }
    }
}

#[test]
fn facts_time_deltas_and_audit_agree_after_batches_of_every_mixture() {
    let mut world = World::new(10);
    for batch in [
        &[Refused] as &[_],
        &[Nothing],
        &[Pools(1)],
        &[Refused, Pools(2), Refused],
        &[],
        &[Nothing, Refused],
    ] {
        world.batch(batch);
    }
    assert_eq!(world.since(0), "4 6");
    assert_eq!(world.since(4), "6");
    assert_eq!(world.since(6), "");
    assert_eq!(
        world.since(99),
        "",
        "from the future: nothing is taken back"
    );
}

#[test]
fn who_is_further_behind_than_the_deltas_reach_gets_a_snapshot() {
    let mut world = World::new(2);
    world.batch(&[Pools(1), Pools(2), Pools(3)]);
    assert_eq!(world.since(0), "snapshot 4");
    assert_eq!(world.since(1), "snapshot 4");
    assert_eq!(world.since(2), "3 4");
    world.batch(&[Pools(4)]);
    assert_eq!(world.since(2), "snapshot 5");
    assert_eq!(world.since(3), "4 5");
}

#[test]
fn a_snapshot_from_the_leader_begins_the_deltas_anew() {
    let mut world = World::new(10);
    world.batch(&[Pools(1)]);
    for pools in [2, 3] {
        world.apply(&Pools(pools));
    }
    world.batch(&[]);
    assert_eq!(world.since(2), "snapshot 4");
    world.batch(&[Pools(4)]);
    assert_eq!(world.since(3), "snapshot 5");
    assert_eq!(world.since(4), "5");
}

#[test]
fn the_deltas_are_bounded_by_their_size_too() {
    let world = World::new(100_000);
    let large = |revision: u64| wire::Delta {
        revision,
        cell_time_ms: 0,
        changes: vec![wire::Change {
            change: Some(wire::change::Change::Config(wire::ConfigChange {
                config: vec![0; 256 << 10].into(),
                config_revision: revision,
            })),
        }],
    };
    for revision in 1..=1_000 {
        let outcome = wire::Outcome::default();
        let delta = Some(large(revision));
        let output = Applied { outcome, delta };
        world.published.publish(
            &world.fleet,
            revision,
            &[replica::Applied {
                index: revision,
                term: 1,
                output,
            }],
        );
    }
    let state = world.published.state.lock();
    let held: usize = state
        .deltas
        .iter()
        .map(|told| told.delta.encoded_len())
        .sum();
    assert_eq!(held, state.delta_bytes);
    assert!(held <= MAX_DELTA_BYTES, "{held}");
    assert!(state.deltas.len() > 50, "{}", state.deltas.len());
    let oldest = state.deltas.front().map(|told| told.delta.revision);
    assert_eq!(oldest, Some(state.floor + 1));
}
