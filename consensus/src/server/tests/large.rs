//! A fleet as large as it may be, and a member that was away.

use bytes::Bytes;
use prost::Message as _;

use super::leases::spec;
use super::*;
use crate::fleet::reign::Asked;

/// As many as there may be, but for a few.
const WORKERS: u32 = 4_000;
const UNDER_WAY: usize = 256;

/// A worker's spec of four kilobytes: what this version does not know of it stays.
fn large_spec() -> Bytes {
    let mut bytes = spec().to_vec();
    let unknown = 4_000;
    prost::encoding::encode_key(900, prost::encoding::WireType::LengthDelimited, &mut bytes);
    prost::encoding::encode_varint(unknown, &mut bytes);
    bytes.resize(bytes.len() + unknown as usize, b'x');
    bytes.into()
}

fn registration(number: u32, spec: Bytes) -> Asked {
    let name = format!("w{number}");
    let register = Action::Register(wire::RegisterWorker {
        name: name.clone(),
        spec,
        held: None,
        start: 0,
        takeover: false,
    });
    let command = wire::Command {
        action: Some(register),
    };
    let mut client = [7; 16];
    client[..4].copy_from_slice(&number.to_be_bytes());
    Asked {
        actor: wire::Actor {
            identity: format!("agent/{name}"),
            address: String::new(),
        },
        client: Bytes::copy_from_slice(&client),
        sequence: 1,
        command: command.encode_to_vec().into(),
        reason: String::new(),
        registers: Some(name),
        takes_capacity: false,
    }
}

impl Cell {
    fn fill(&mut self, node: usize) {
        let control = self.controls[node].clone().unwrap();
        let spec = large_spec();
        let runtime = self.runtime.handle().clone();
        runtime.block_on(async {
            let leader = control.leader().await.unwrap();
            let mut under_way = tokio::task::JoinSet::new();
            for number in 0..WORKERS {
                let (leader, asked) = (leader.clone(), registration(number, spec.clone()));
                under_way.spawn(async move {
                    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
                    let outcome = leader.propose_for(asked, None, deadline).await.unwrap();
                    assert!(matches!(
                        outcome.outcome,
                        Some(wire::outcome::Outcome::Done(_))
                    ));
                });
                if under_way.len() >= UNDER_WAY {
                    under_way.join_next().await.unwrap().unwrap();
                }
            }
            while let Some(done) = under_way.join_next().await {
                done.unwrap();
            }
        });
    }

    /// Configurations written one after the other while `go_on` says so: how long each took.
    fn commits(
        &mut self,
        node: usize,
        mut go_on: impl FnMut(&mut Self, usize) -> bool,
    ) -> Vec<Duration> {
        let control = self.controls[node].clone().unwrap();
        let mut took = Vec::new();
        while go_on(self, took.len()) {
            let pools = ["[[pools]]\nname = \"default\"\n", TWO_POOLS][took.len() % 2];
            let config = forebay_proto::config::Config::from_toml(pools)
                .unwrap()
                .to_wire();
            let began = Instant::now();
            let outcome = self.runtime.block_on(async {
                let leader = control.leader().await.unwrap();
                let expected_revision = leader.facts().config_revision;
                let action = Action::ApplyConfig(wire::ApplyConfig {
                    config,
                    expected_revision,
                });
                leader.propose(action, "a write").await.unwrap()
            });
            assert!(
                matches!(outcome.outcome, Some(wire::outcome::Outcome::Done(_))),
                "{outcome:?}"
            );
            took.push(began.elapsed());
        }
        took.sort();
        took
    }
}

fn p(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

#[test]
fn a_large_state_reaches_a_member_that_was_away_while_commits_go_on() {
    let replica = ReplicaOptions {
        snapshot_entries: 2_000,
        keep_entries: 100,
        ..ReplicaOptions::default()
    };
    let mut cell = Cell::with_replicas(3, Settings::default(), replica).founded();
    let leader = cell.leader();
    let away = (leader + 1) % 3;
    cell.stop(away);
    let began = Instant::now();
    cell.fill(leader);
    println!("{WORKERS} workers in {:?}", began.elapsed());
    // One more snapshot, of them all.
    cell.commits(leader, |_, done| done < 200);
    let before = cell.commits(leader, |_, done| done < 100);
    let term = cell.status(leader).term;
    let snapshots = std::fs::read_dir(cell.disk(leader).join("snapshots")).unwrap();
    let bytes = snapshots
        .map(|file| file.unwrap().metadata().unwrap().len())
        .max()
        .unwrap();

    cell.start(away);
    let began = Instant::now();
    let goal = cell.status(leader).commit;
    let mut arrived = None;
    let during = cell.commits(leader, |cell, done| {
        if done % 5 == 0 && cell.status(away).applied >= goal {
            arrived.get_or_insert(began.elapsed());
        }
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "the state does not arrive"
        );
        arrived.is_none()
    });
    println!(
        "a snapshot of {} MiB and the log after it in {:?}; commits p50 {:?} p99 {:?} before, p50 {:?} p99 {:?} of {} meanwhile",
        bytes >> 20,
        arrived.unwrap(),
        p(&before, 50),
        p(&before, 99),
        p(&during, 50),
        p(&during, 99),
        during.len(),
    );
    assert!(bytes > 8 << 20, "{bytes}");
    let status = cell.status(leader);
    assert_eq!((status.role.as_str(), status.term), ("leader", term));
    assert!(p(&during, 99) < Duration::from_secs(2), "{during:?}");
    // The one that was away started from it, not from the log.
    let installed = std::fs::read_dir(cell.disk(away).join("snapshots")).unwrap();
    let installed = installed
        .map(|file| file.unwrap().metadata().unwrap().len())
        .max();
    assert!(installed >= Some(bytes));
}
