//! What is hard to bring about in a real fleet: each condition, and the check that names it.

use std::collections::BTreeMap;
use std::sync::Arc;

use forebay_control_client::WorkerFact;
use forebay_proto::config::Config;
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::control::NodeStatus;
use forebay_proto::wire::fleet::{Desired, Member, Observed};
use forebay_proto::{
    ClusterId, Drain, DrainId, DrainPhase, DrainedWorker, Incarnation, Millis, NodeId, OnDeadline,
    Revision, WorkerId,
};

use super::report::Status;
use super::*;
use crate::look::Shown;
use crate::look::metrics::Metrics;

const NOW_MS: u64 = 1_800_000_000_000;

fn worker(name: &str, change: impl FnOnce(&mut WorkerFact)) -> (String, Arc<WorkerFact>) {
    let id = WorkerId(name[1..].parse().unwrap());
    let mut worker = WorkerFact {
        id,
        name: name.into(),
        incarnation: Incarnation {
            worker: id,
            grant: 1,
            start: 1,
        },
        spec: WorkerSpec {
            pool: "default".into(),
            advertise: format!("{name}:7420"),
            engine: String::new(),
            models: vec!["m".into()],
            revision: String::new(),
            gpu_type: String::new(),
            gpu_count: 0,
            kv_tokens: 0,
            max_context_tokens: 0,
            adapters: vec![],
            zone: String::new(),
            labels: BTreeMap::new(),
            slots: 8,
        },
        spec_bytes: bytes::Bytes::new(),
        desired: Desired::Ready,
        observed: Observed::Ready,
        lost: false,
        departed: false,
        desired_revision: Revision(5),
        acknowledged_revision: Revision(5),
        revision: Revision(5),
        end_streams: false,
    };
    change(&mut worker);
    (name.into(), Arc::new(worker))
}

fn facts(workers: impl IntoIterator<Item = (String, Arc<WorkerFact>)>) -> Facts {
    Facts {
        cluster_id: ClusterId([1; 16]),
        revision: Revision(9),
        cell_time: Millis(NOW_MS - 1_000),
        workers: workers.into_iter().collect(),
        members: vec![],
        config: Arc::new(Config::default()),
        config_bytes: bytes::Bytes::new(),
        config_revision: Revision(0),
        correlated_expiry: Default::default(),
        keys: vec![],
        key_epoch: 1,
        feature_level: forebay_proto::FEATURE_LEVEL,
        drains: BTreeMap::new(),
        families: BTreeMap::new(),
        rebalances: BTreeMap::new(),
        suspects: BTreeMap::new(),
    }
}

fn node(id: u64, change: impl FnOnce(&mut NodeStatus)) -> Node {
    let mut status = NodeStatus {
        name: format!("c{id}"),
        initialised: true,
        cluster_id: vec![1; 16].into(),
        node_id: id,
        leader: 1,
        term: 3,
        commit: 1_000,
        applied: 1_000,
        build: "1.0.0".into(),
        feature_level: forebay_proto::FEATURE_LEVEL,
        members: (1..=3)
            .map(|id| Member {
                id,
                name: format!("c{id}"),
                ..Member::default()
            })
            .collect(),
        ..NodeStatus::default()
    };
    change(&mut status);
    Node {
        address: format!("c{id}:7400"),
        member: Some((NodeId(id), format!("c{id}"), None)),
        status: Ok(status),
    }
}

fn shown(name: &str, page: &str, change: impl FnOnce(&mut Shown)) -> Process {
    let mut shown = Shown {
        metrics: Metrics::parse(page),
        ..Shown::default()
    };
    change(&mut shown);
    Process {
        name: name.into(),
        seen: Ok(shown),
    }
}

/// A fleet without a fault.
fn fleet() -> Seen {
    Seen {
        now_ms: NOW_MS,
        context: Err(CliError::usage("of no interest here")),
        urls: Urls::default(),
        keys: None,
        facts: Some(Ok(facts([worker("w1", |_| {}), worker("w2", |_| {})]))),
        audit: None,
        nodes: (1..=3).map(|id| node(id, |_| {})).collect(),
        again: (1..=3).map(|id| node(id, |_| {})).collect(),
        balancers: vec![shown("b1", "", |shown| shown.revision = Some(9))],
        agents: vec![shown("w1", "", |_| {})],
        control_nodes: vec![shown("c1", "", |_| {})],
        endpoints: vec![("b1".into(), Ok(()))],
    }
}

fn reported(seen: &Seen) -> Report {
    let mut report = Report::default();
    control::check(seen, &mut report);
    workers::check(seen, &mut report);
    processes::check(seen, &mut report);
    report.done()
}

/// Only the check of this id says anything, and names this.
fn finds(id: &str, status: Status, says: &str, change: impl FnOnce(&mut Seen)) {
    let mut seen = fleet();
    change(&mut seen);
    let report = reported(&seen);
    let found = report.checks.iter();
    let found: Vec<_> = found
        .filter(|check| matches!(check.status, Status::Warn | Status::Fail))
        .collect();
    let [one] = found[..] else {
        panic!("{id}: {found:#?}");
    };
    assert_eq!((one.id, one.status), (id, status), "{}", one.what);
    assert!(
        one.what.contains(says) && !one.hint.is_empty(),
        "{}",
        one.what
    );
}

fn of_facts(seen: &mut Seen) -> &mut Facts {
    seen.facts.as_mut().unwrap().as_mut().unwrap()
}

fn put(seen: &mut Seen, change: impl FnOnce(&mut WorkerFact)) {
    let (name, changed) = worker("w1", change);
    of_facts(seen).workers.insert(name, changed);
}

#[test]
fn a_fleet_without_a_fault_passes_and_ids_are_unique() {
    let report = reported(&fleet());
    assert_eq!(
        (report.failed, report.warned),
        (0, 0),
        "{:#?}",
        report.checks
    );
    let mut ids: Vec<_> = report.checks.iter().map(|check| check.id).collect();
    ids.sort_unstable();
    let count = ids.len();
    ids.dedup();
    assert_eq!((ids.len(), count >= 25), (count, true));
    assert!(report.ok);
}

#[test]
fn faults_of_control_nodes_are_told_apart() {
    use Status::{Fail, Warn};
    finds(
        "control.one-cluster",
        Fail,
        "c2 at c2:7400 is of cluster 02020202",
        |seen| {
            seen.nodes[1] = node(2, |status| status.cluster_id = vec![2; 16].into());
        },
    );
    finds(
        "control.leader",
        Fail,
        "c3 at c3:7400 follows node 3",
        |seen| {
            seen.nodes[2] = node(3, |status| status.leader = 3);
        },
    );
    finds(
        "control.leader-stable",
        Fail,
        "node 2 went from term 3 to 5",
        |seen| {
            seen.again[1] = node(2, |status| status.term = 5);
        },
    );
    finds(
        "control.leader-heard",
        Fail,
        "c3 at c3:7400 has not heard the leader for 2001 ms",
        |seen| {
            seen.nodes[2] = node(3, |status| status.leader_heard_ms = 2_001);
        },
    );
    finds(
        "control.lag",
        Fail,
        "c2 at c2:7400 is 201 entries behind",
        |seen| {
            seen.nodes[1] = node(2, |status| status.applied = 799);
        },
    );
    finds(
        "control.versions",
        Warn,
        "c2 at c2:7400 has 1.1.0",
        |seen| {
            seen.nodes[1] = node(2, |status| status.build = "1.1.0".into());
        },
    );
    finds(
        "control.voters",
        Warn,
        "2 votes bear no more failures than 1",
        |seen| {
            for node in &mut seen.nodes {
                node.status.as_mut().unwrap().members.pop();
            }
        },
    );
    finds("control.taking-part", Fail, "the disk is full", |seen| {
        seen.nodes[1] = node(2, |status| status.problem = "the disk is full".into());
    });
    finds("control.feature-level", Warn, "the cell is at 1", |seen| {
        of_facts(seen).feature_level = 1;
    });
    finds(
        "control.clock",
        Warn,
        "the cell's time is 3000 ms ahead",
        |seen| {
            of_facts(seen).cell_time = Millis(NOW_MS + 3_000);
        },
    );
    finds("control.disk", Fail, "c1 has 12 MiB left", |seen| {
        let page = "forebay_control_disk_free_bytes 12582912\n";
        seen.control_nodes = vec![shown("c1", page, |_| {})];
    });
    finds("control.ready", Fail, "c1: it waits", |seen| {
        let waits = |shown: &mut Shown| shown.reasons.push("it waits".into());
        seen.control_nodes = vec![shown("c1", "", waits)];
    });
    finds("control.audit", Fail, "entry 7 was changed", |seen| {
        seen.audit = Some(Err("entry 7 was changed".into()));
    });
}

#[test]
fn faults_of_workers_are_told_apart() {
    use Status::{Fail, Warn};
    finds("workers.lost", Fail, "w1", |seen| {
        put(seen, |worker| worker.lost = true);
    });
    finds("workers.departed", Warn, "w1", |seen| {
        put(seen, |worker| worker.departed = true);
    });
    finds("workers.joining", Warn, "w1", |seen| {
        put(seen, |worker| worker.observed = Observed::Joining);
    });
    finds("workers.cordoned", Warn, "w1", |seen| {
        put(seen, |worker| {
            (worker.desired, worker.observed) = (Desired::Cordoned, Observed::Cordoned);
        });
    });
    finds(
        "workers.addresses",
        Fail,
        "w1 and w2 share w2:7420",
        |seen| {
            put(seen, |worker| worker.spec.advertise = "w2:7420".into());
        },
    );
    finds(
        "models.profiles",
        Fail,
        "m in default is rendered tools_first, but otherwise by w2",
        |seen| {
            put(seen, |worker| {
                let label = ("render-profile".to_owned(), "tools_first".to_owned());
                worker.spec.labels.extend([label]);
            });
        },
    );
    finds("models.ready", Fail, "n has no ready worker", |seen| {
        put(seen, |worker| {
            worker.observed = Observed::Drained;
            worker.spec.models = vec!["m".into(), "n".into()];
        });
    });
    finds("fleet.alarms", Fail, "pool default fell silent", |seen| {
        of_facts(seen).correlated_expiry.insert("default".into());
    });
    let draining = |minutes: u64, overdue: bool| {
        move |seen: &mut Seen| {
            let drain = Drain {
                id: DrainId(812),
                phase: DrainPhase::InForce,
                on_deadline: OnDeadline::Wait,
                began: Millis(NOW_MS - minutes * 60_000),
                deadline: None,
                in_force: None,
                ended: None,
                overdue,
                actor: "operator/operator/bob".into(),
                reason: String::new(),
                workers: vec![DrainedWorker {
                    name: "w1".into(),
                    id: WorkerId(1),
                    in_force: None,
                    drained: None,
                }],
            };
            of_facts(seen).drains.insert(drain.id, drain);
        }
    };
    let (id, says) = ("workers.draining", "d812 waits for w1 since");
    finds(
        id,
        Warn,
        &format!("{says} 11 minutes, by operator/operator/bob"),
        draining(11, false),
    );
    finds(
        id,
        Warn,
        &format!("{says} 2 minutes, past its deadline"),
        draining(2, true),
    );
    let mut short = fleet();
    draining(9, false)(&mut short);
    assert_eq!(reported(&short).warned, 0);
}

#[test]
fn faults_of_processes_are_told_apart() {
    use Status::{Fail, Warn};
    let agent =
        |page: &'static str| move |seen: &mut Seen| seen.agents = vec![shown("w1", page, |_| {})];
    finds(
        "agents.engines",
        Fail,
        "w1",
        agent("forebay_agent_engine_up 0\n"),
    );
    finds(
        "agents.residency",
        Warn,
        "w1",
        agent("forebay_agent_residency_trusted 0\n"),
    );
    let unseen = "forebay_agent_accepted_total 1000\nforebay_agent_unseen_arrivals_total 310\n";
    finds(
        "agents.unseen-arrivals",
        Warn,
        "w1 had 0.31 unseen",
        agent(unseen),
    );
    let late = "forebay_agent_ttft_predicted 1000\nforebay_agent_ttft_within_p95 700\n";
    finds("agents.promises", Warn, "w1 kept 70 %", agent(late));
    let balancer = |page: &'static str| {
        move |seen: &mut Seen| {
            seen.balancers = vec![shown("b1", page, |shown| shown.revision = Some(9))];
        }
    };
    let blind = "forebay_balancer_residency_pending 1\nforebay_balancer_residency_blind 2\n";
    finds(
        "balancers.residency",
        Warn,
        "b1 does not know 1 caches and trusts 2",
        balancer(blind),
    );
    let missed = "forebay_balancer_cached_tokens_predicted_total 200000\nforebay_balancer_cached_tokens_reported_total 20000\n";
    finds("balancers.hits", Warn, "b1 found 10 %", balancer(missed));
    finds(
        "balancers.queues",
        Warn,
        "b1 has 3 requests",
        balancer("forebay_balancer_queued 3\n"),
    );
    finds("balancers.facts", Warn, "b1 uses r8, and r9", |seen| {
        seen.balancers = vec![shown("b1", "", |shown| shown.revision = Some(8))];
    });
    finds("balancers.links", Fail, "b1 does not reach w2", |seen| {
        seen.balancers = vec![shown("b1", "", |shown| {
            shown.revision = Some(9);
            shown.workers = vec![look::Worker {
                name: "w2".into(),
                ..look::Worker::default()
            }];
        })];
    });
    finds("endpoints.answer", Fail, "b1: refused", |seen| {
        seen.endpoints = vec![("b1".into(), Err("refused".into()))];
    });
}
