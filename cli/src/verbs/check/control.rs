//! The control nodes: who answers, who leads, and whether they agree.

use std::collections::{BTreeMap, BTreeSet};

use forebay_proto::FEATURE_LEVEL;
use forebay_proto::wire::control::NodeStatus;

use super::Seen;
use super::credentials::IterErr as _;
use super::report::Report;
use crate::look::Process;
use crate::verbs::ask::{Node, without_address};

/// Adds what concerns the control plane.
pub(super) fn check(seen: &Seen, report: &mut Report) {
    match &seen.facts {
        None => {
            for id in IDS {
                report.skip(id, "nobody could be asked");
            }
        }
        Some(facts) => {
            let problems: Vec<String> = facts.iter_err().collect();
            report.fail(
                "control.quorum",
                &problems,
                "a majority agrees on the facts",
                "start the missing control nodes; requests go on meanwhile. Two disks of three lost for good: \"A lost disk\" in docs/operators.md",
            );
            nodes(seen, report);
            agreed(seen, report);
        }
    }
    admin_sides(seen, report);
}

fn named(node: &Node) -> String {
    match node.name() {
        name if name.is_empty() => format!("the node at {}", node.address),
        name => format!("{name} at {}", node.address),
    }
}

fn nodes(seen: &Seen, report: &mut Report) {
    let answered: Vec<(&Node, &NodeStatus)> = seen
        .nodes
        .iter()
        .filter_map(|node| Some((node, node.status.as_ref().ok()?)))
        .collect();
    let silent = seen.nodes.iter().filter_map(|node| {
        let error = node.status.as_ref().err()?;
        Some(format!(
            "{}: {}",
            named(node),
            without_address(&node.address, error)
        ))
    });
    report.fail(
        "control.reachable",
        &silent.collect::<Vec<_>>(),
        format!("{} nodes answer", answered.len()),
        "start it, or look at its log, the network between, and the address in the context",
    );
    let idle = answered
        .iter()
        .filter_map(|(node, status)| match status.problem.as_str() {
            "" if status.initialised => None,
            "" => Some(format!("{} belongs to no cluster", named(node))),
            problem => Some(format!("{}: {problem}", named(node))),
        });
    report.fail(
        "control.taking-part",
        &idle.collect::<Vec<_>>(),
        "every node that answers takes part",
        "see docs/operators.md: \"A lost disk\", \"A damaged disk\", or `forebay raft add`",
    );
    let members: Vec<_> = answered
        .iter()
        .filter(|(_, status)| status.initialised)
        .collect();
    if members.is_empty() {
        for id in OF_MEMBERS {
            report.skip(id, "no member answers");
        }
        return;
    }
    let clusters: BTreeSet<_> = members
        .iter()
        .map(|(_, status)| &status.cluster_id)
        .collect();
    let several = if clusters.len() > 1 {
        members
            .iter()
            .map(|(node, status)| {
                format!(
                    "{} is of cluster {}",
                    named(node),
                    short(&status.cluster_id)
                )
            })
            .collect()
    } else {
        vec![]
    };
    report.fail(
        "control.one-cluster",
        &several,
        "all are of one cluster",
        "the context's addresses are of two cells: keep those of one",
    );
    leadership(seen, &members, report);
    lag(&members, report);
    let builds: BTreeSet<_> = members.iter().map(|(_, status)| &status.build).collect();
    let mixed = if builds.len() > 1 {
        members
            .iter()
            .map(|(node, status)| format!("{} has {}", named(node), status.build))
            .collect()
    } else {
        vec![]
    };
    report.warn(
        "control.versions",
        &mixed,
        "all have one version",
        "go on with the change of versions: control nodes first, the leader last",
    );
}

fn leadership(seen: &Seen, members: &[&(&Node, &NodeStatus)], report: &mut Report) {
    let leaders: BTreeSet<u64> = members.iter().map(|(_, status)| status.leader).collect();
    let problems = match leaders.iter().copied().collect::<Vec<_>>()[..] {
        [0] => vec!["no node knows a leader".to_owned()],
        [_] => vec![],
        _ => members
            .iter()
            .map(|(node, status)| match status.leader {
                0 => format!("{} knows no leader", named(node)),
                leader => format!("{} follows node {leader}", named(node)),
            })
            .collect(),
    };
    report.fail(
        "control.leader",
        &problems,
        "all follow one leader",
        "an election may be under way: look again; if it stays, look at the network between the nodes",
    );
    let terms = |nodes: &[Node]| -> BTreeMap<u64, u64> {
        let answered = nodes.iter().filter_map(|node| node.status.as_ref().ok());
        answered
            .map(|status| (status.node_id, status.term))
            .collect()
    };
    let (before, after) = (terms(&seen.nodes), terms(&seen.again));
    let moved = before.iter().filter_map(|(id, term)| {
        let later = after.get(id)?;
        (later > term)
            .then(|| format!("node {id} went from term {term} to {later} within a second"))
    });
    report.fail(
        "control.leader-stable",
        &moved.collect::<Vec<_>>(),
        "no election within the last second",
        "elections follow each other: look at the nodes' disks (`forebay raft check-perf`), load and network",
    );
    let deaf = members
        .iter()
        .filter(|(_, status)| status.leader_heard_ms > DEAF_MS);
    let deaf = deaf.map(|(node, status)| {
        format!(
            "{} has not heard the leader for {} ms",
            named(node),
            status.leader_heard_ms
        )
    });
    report.fail(
        "control.leader-heard",
        &deaf.collect::<Vec<_>>(),
        "every node hears the leader",
        "look at the network between this node and the leader",
    );
    let listed = members
        .iter()
        .map(|(_, status)| &status.members)
        .max_by_key(|list| list.len());
    let listed = listed.map_or(&[][..], |list| &list[..]);
    let voters = listed.iter().filter(|member| !member.learner).count();
    let mut odd: Vec<String> = listed
        .iter()
        .filter(|member| member.learner)
        .map(|member| format!("{} follows and has no vote", member.name))
        .collect();
    if voters > 1 && voters % 2 == 0 {
        odd.push(format!(
            "{voters} votes bear no more failures than {}",
            voters - 1
        ));
    }
    report.warn(
        "control.voters",
        &odd,
        format!("{voters} votes"),
        "go on with the change of members: `forebay raft promote`, `forebay raft remove`",
    );
}

fn lag(members: &[&(&Node, &NodeStatus)], report: &mut Report) {
    let commit = members
        .iter()
        .map(|(_, status)| status.commit)
        .max()
        .unwrap_or(0);
    let behind = members.iter().filter_map(|(node, status)| {
        let behind = commit.saturating_sub(status.applied);
        (behind > MOST_BEHIND).then(|| format!("{} is {behind} entries behind", named(node)))
    });
    report.fail(
        "control.lag",
        &behind.collect::<Vec<_>>(),
        "every node has applied what was agreed on",
        "wait; if it does not catch up, look at its disk and its network",
    );
}

fn agreed(seen: &Seen, report: &mut Report) {
    let Some(Ok(facts)) = &seen.facts else {
        for id in OF_FACTS {
            report.skip(id, "the facts cannot be read");
        }
        return;
    };
    let known = seen
        .nodes
        .iter()
        .filter_map(|node| node.status.as_ref().ok());
    let least = known
        .map(|status| status.feature_level)
        .filter(|level| *level > 0)
        .min();
    let level = facts.feature_level;
    let mut problems = vec![];
    if least.is_some_and(|least| least > level) {
        problems.push(format!(
            "the cell is at {level}, and every node that answers understands {}",
            least.unwrap_or(0)
        ));
    }
    if level > FEATURE_LEVEL {
        problems.push(format!(
            "the cell is at {level}, and this binary understands {FEATURE_LEVEL}"
        ));
    }
    report.warn(
        "control.feature-level",
        &problems,
        format!("{level}, as all understand"),
        "the leader raises it by itself once every member, balancer and agent has said that it knows it: start or remove those of the old version",
    );
    let ahead = facts.cell_time.0.saturating_sub(seen.now_ms);
    let skew: Vec<String> = (ahead > MOST_AHEAD_MS)
        .then(|| format!("the cell's time is {ahead} ms ahead of this machine's"))
        .into_iter()
        .collect();
    report.warn(
        "control.clock",
        &skew,
        "the cell's time is not ahead of ours",
        "set the clocks of control nodes and of this machine (NTP): certificates depend on them",
    );
    match &seen.audit {
        None => report.skip("control.audit", "the facts cannot be read"),
        Some(audit) => {
            let problems: Vec<String> = audit.iter_err().collect();
            let fine = audit.as_ref().map_or_else(
                |_| String::new(),
                |tail| {
                    format!(
                        "entries {} to {} are an unbroken chain",
                        tail.begins(),
                        tail.count
                    )
                },
            );
            let hint = "compare nodes and exported files: `forebay audit verify`";
            report.fail("control.audit", &problems, fine, hint);
        }
    }
}

fn admin_sides(seen: &Seen, report: &mut Report) {
    if seen.control_nodes.is_empty() {
        for id in OF_ADMIN {
            report.skip(id, "the context has no table [control_nodes]");
        }
        return;
    }
    let (silent, unready) = super::processes::readiness(&seen.control_nodes);
    report.fail(
        "control.ready",
        &[silent, unready].concat(),
        "every node says that it takes part",
        "look at its log; /readyz on its admin side says why",
    );
    let full = seen.control_nodes.iter().filter_map(|node: &Process| {
        let shown = node.seen.as_ref().ok()?;
        let free = shown.metrics.sum("forebay_control_disk_free_bytes")?;
        (0.0..LEAST_FREE_BYTES).contains(&free).then(|| {
            format!(
                "{} has {:.0} MiB left on its disk",
                node.name,
                free / 1_048_576.0
            )
        })
    });
    report.fail(
        "control.disk",
        &full.collect::<Vec<_>>(),
        "every node has a gibibyte or more left on its disk",
        "make room: a node whose disk is full stops",
    );
}

fn short(bytes: &[u8]) -> String {
    bytes
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

const IDS: [&str; 13] = [
    "control.quorum",
    "control.reachable",
    "control.taking-part",
    "control.one-cluster",
    "control.leader",
    "control.leader-stable",
    "control.leader-heard",
    "control.voters",
    "control.lag",
    "control.versions",
    "control.feature-level",
    "control.clock",
    "control.audit",
];
const OF_MEMBERS: [&str; 7] = [
    "control.one-cluster",
    "control.leader",
    "control.leader-stable",
    "control.leader-heard",
    "control.voters",
    "control.lag",
    "control.versions",
];
const OF_FACTS: [&str; 3] = ["control.feature-level", "control.clock", "control.audit"];
const OF_ADMIN: [&str; 2] = ["control.ready", "control.disk"];
/// Longer than an election takes.
const DEAF_MS: u64 = 2_000;
/// More than a second's worth at the highest rate of changes.
const MOST_BEHIND: u64 = 200;
/// Cell time is that of the last entry; no more than drift may put it ahead.
const MOST_AHEAD_MS: u64 = 2_000;
const LEAST_FREE_BYTES: f64 = (1_u64 << 30) as f64;
