//! `forebay status`: the fleet on one page, and for each problem what to do about it.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use forebay_control_client::Facts;
use forebay_proto::wire::fleet::Observed;
use forebay_proto::{ClusterId, Revision};
use serde::Serialize;

use super::ask::{Asked, of_read};
use super::members::Row;
use super::operate::{drain_line, rebalance_line};
use super::workers::state;
use crate::context::ContextArgs;
use crate::exit::CliError;
use crate::look;
use crate::look::limit::{Limit, limited_by};
use crate::output::{OutputArgs, table};

/// Options of `forebay status`.
#[derive(Debug, Args)]
#[command(
    after_help = "What limits the fleet is the first of these that holds: control (the facts cannot be read), balancers (none is ready), workers (none takes requests), kv (at half of the workers or more, requests use 90 % of the KV cache), capacity (90 % of all slots are taken, or requests wait at every worker), queue (requests wait though a worker has room), nothing. Balancers are asked, those of the table [balancers] in the context file; without one it is unknown.\n\nExits with 7 when the control plane has no quorum."
)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Debug, Serialize)]
struct Status {
    schema_version: u32,
    cluster_id: Option<ClusterId>,
    leader: Option<String>,
    quorum: bool,
    /// See `forebay status --help` for the rule.
    limited_by: Limit,
    /// The numbers that say so.
    limited_because: String,
    control: Control,
    members: Vec<Row>,
    revision: Option<Revision>,
    workers: BTreeMap<&'static str, u32>,
    pools: BTreeMap<String, Pool>,
    alarms: Vec<String>,
    /// Those under way, such as `d812 in_force: w1, w2`.
    drains: Vec<String>,
    /// Families that have homes.
    families: usize,
    /// Those under way, such as `r812 moving: 2 of 5 moves in pool default`.
    rebalances: Vec<String>,
    problems: Vec<Problem>,
}

#[derive(Debug, Serialize)]
struct Control {
    total: usize,
    reachable: usize,
}

#[derive(Debug, Default, Serialize)]
struct Pool {
    workers: u32,
    serving: u32,
    slots: u32,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Problem {
    what: String,
    #[serde(rename = "do")]
    remedy: String,
}

impl Problem {
    fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            remedy: remedy.into(),
        }
    }
}

/// A page is wanted now: this is longer than an election takes.
const READ_TIME: Duration = Duration::from_secs(5);
/// A process shows itself within this time, for each of its pages.
const LOOK_TIME: Duration = Duration::from_secs(2);

/// Runs `forebay status`.
pub(crate) fn run(args: &StatusArgs) -> Result<(), CliError> {
    let (context, urls) = (args.context.resolve()?, args.context.urls()?);
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        // In this order: a read waits for an election, and the nodes then know who won it.
        let controlled = async {
            let facts = asked.client.read(asked.timeout.min(READ_TIME)).await;
            (facts.map_err(of_read), asked.nodes().await)
        };
        let looked = look::processes(&urls.balancers, LOOK_TIME);
        let ((facts, nodes), balancers) = futures::join!(controlled, looked);
        let rows: Vec<Row> = nodes.iter().map(Row::of).collect();
        let limited = limited_by(facts.is_ok(), &balancers);
        let status = status(rows, &facts, limited);
        args.output.print(&status, || page(&status));
        // The page has said why; a script that reads none of it sees the exit code.
        facts.map(drop).map_err(|error| {
            CliError::because(error.exit(), "the facts cannot be read: see the problems")
        })
    })
}

fn status(
    nodes: Vec<Row>,
    facts: &Result<Facts, CliError>,
    (limited_by, limited_because): (Limit, String),
) -> Status {
    let leader = nodes
        .iter()
        .filter(|row| row.leader)
        .max_by_key(|row| row.term);
    let leader = leader.map(|row| row.name.clone());
    let mut problems = of_control(&nodes, facts);
    let mut status = Status {
        schema_version: 1,
        cluster_id: None,
        leader,
        quorum: facts.is_ok(),
        limited_by,
        limited_because,
        control: Control {
            total: nodes.len(),
            reachable: nodes.iter().filter(|row| row.reachable).count(),
        },
        members: nodes,
        revision: None,
        workers: BTreeMap::new(),
        pools: BTreeMap::new(),
        alarms: vec![],
        drains: vec![],
        families: 0,
        rebalances: vec![],
        problems: vec![],
    };
    if let Ok(facts) = facts {
        status.cluster_id = Some(facts.cluster_id);
        status.revision = Some(facts.revision);
        for pool in &facts.config.pools {
            status.pools.insert(pool.name.clone(), Pool::default());
        }
        for worker in facts.workers.values() {
            *status.workers.entry(state(worker)).or_default() += 1;
            let pool = status.pools.entry(worker.spec.pool.clone()).or_default();
            pool.workers += 1;
            if !worker.lost && !worker.departed && worker.observed == Observed::Ready {
                pool.serving += 1;
                pool.slots = pool.slots.saturating_add(worker.spec.slots);
            }
        }
        let alarm = |pool: &String| format!("correlated expiry in pool {pool}");
        status.alarms = facts.correlated_expiry.iter().map(alarm).collect();
        let active = facts.drains.values().filter(|drain| drain.is_active());
        status.drains = active.map(drain_line).collect();
        status.families = facts.families.len();
        let active = facts.rebalances.values().filter(|one| one.is_active());
        status.rebalances = active.map(rebalance_line).collect();
        problems.extend(of_workers(facts, &status.pools));
    }
    status.problems = problems;
    status
}

fn of_control(nodes: &[Row], facts: &Result<Facts, CliError>) -> Vec<Problem> {
    let mut problems = vec![];
    if let Err(error) = facts {
        problems.push(Problem::new(
            "the facts cannot be read; requests are still served from the last ones",
            error.to_string(),
        ));
    }
    for row in nodes {
        // Nobody who answers knows the name of a node that does not.
        let name = if row.name.is_empty() {
            format!("control node at {}", row.address)
        } else {
            format!("control node {} at {}", row.name, row.address)
        };
        match (&row.error, row.reachable) {
            (Some(error), false) => problems.push(Problem::new(
                format!("{name} is not reachable: {error}"),
                "start it, or look at its logs, the network between, and our certificate",
            )),
            (Some(problem), true) => problems.push(Problem::new(
                format!("{name} does not take part"),
                problem.clone(),
            )),
            (None, _) => {}
        }
    }
    problems
}

fn of_workers(facts: &Facts, pools: &BTreeMap<String, Pool>) -> Vec<Problem> {
    let mut problems: Vec<_> = facts
        .correlated_expiry
        .iter()
        .map(|pool| {
            Problem::new(
                format!("more than 20 % of pool {pool} fell silent at once; none is taken as lost"),
                "look at the network between the control nodes and that pool",
            )
        })
        .collect();
    for (name, pool) in pools.iter().filter(|(_, pool)| pool.serving == 0) {
        problems.push(if pool.workers == 0 {
            Problem::new(
                format!("pool {name} has no workers"),
                "start an agent with this --pool",
            )
        } else {
            Problem::new(
                format!("no worker of pool {name} serves"),
                "see `forebay workers` for the state of each",
            )
        });
    }
    for worker in facts.workers.values() {
        let name = &worker.name;
        if worker.departed {
            continue;
        } else if worker.lost {
            problems.push(Problem::new(
                format!("worker {name} is lost: its lease ran out"),
                "look at its agent and host; it comes back by itself when its agent is heard",
            ));
        } else if worker.observed == Observed::EngineDown {
            problems.push(Problem::new(
                format!("the engine of worker {name} is down"),
                "look at the engine's logs; the agent keeps trying",
            ));
        } else if !worker.is_in_force() {
            problems.push(Problem::new(
                format!("worker {name} has not applied its desired state yet"),
                "wait, or look at its agent's logs",
            ));
        }
    }
    problems
}

/// Such as `3 families; r812 moving: 2 of 5 moves in pool default`.
fn homes(status: &Status) -> String {
    let families = match status.families {
        0 => "none".into(),
        1 => "1 family".into(),
        more => format!("{more} families"),
    };
    let rebalances = status.rebalances.iter().cloned();
    let parts: Vec<String> = std::iter::once(families).chain(rebalances).collect();
    parts.join("; ")
}

fn page(status: &Status) -> String {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "none".into());
    let states: Vec<String> = status
        .workers
        .iter()
        .map(|(s, n)| format!("{n} {s}"))
        .collect();
    let mut text = format!(
        "cluster   {}\nleader    {}\nquorum    {}\nlimit     {}: {}\ncontrol   {} of {} nodes reachable\nrevision  {}\nworkers   {}\nalarms    {}\ndrains    {}\nhomes     {}\n",
        or_none(status.cluster_id.map(|id| id.to_string())),
        or_none(status.leader.clone()),
        if status.quorum { "yes" } else { "no" },
        status.limited_by.name(),
        status.limited_because,
        status.control.reachable,
        status.control.total,
        or_none(status.revision.map(|revision| revision.to_string())),
        if states.is_empty() {
            "none".into()
        } else {
            states.join(", ")
        },
        if status.alarms.is_empty() {
            "none".into()
        } else {
            status.alarms.join(", ")
        },
        if status.drains.is_empty() {
            "none".into()
        } else {
            status.drains.join("; ")
        },
        homes(status),
    );
    text += &format!("\n{}\n", super::members::page(&status.members));
    if !status.pools.is_empty() {
        let rows = status.pools.iter().map(|(name, pool)| {
            [
                name.clone(),
                pool.workers.to_string(),
                pool.serving.to_string(),
                pool.slots.to_string(),
            ]
        });
        text += &format!(
            "\n{}\n",
            table(["POOL", "WORKERS", "SERVING", "SLOTS"], rows)
        );
    }
    if status.problems.is_empty() {
        return text + "\nno problems";
    }
    text += "\nproblems:\n";
    for Problem { what, remedy } in &status.problems {
        text += &format!("- {what}\n  {remedy}\n");
    }
    text
}
