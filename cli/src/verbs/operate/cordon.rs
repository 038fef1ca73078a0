//! `forebay cordon` and `forebay uncordon`: in force when the worker's own agent says so.

use std::time::{Duration, Instant};

use clap::Args;
use forebay_control_client::{Facts, WorkerFact};
use forebay_proto::Revision;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::{Desired, SetDesiredOf};
use serde::Serialize;

use super::{Balancers, ChangeArgs, Selection, balancers, confirm, listed, propose};
use crate::exit::{CliError, Exit};
use crate::output::{say, table};
use crate::verbs::ask::{Asked, desired, observed};

/// Options of `forebay cordon`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay cordon w7 --reason 'ECC errors'\n  forebay cordon --zone b --yes --dry-run\n\nA cordoned worker takes nothing new; what runs there, and what waits in its queue, goes on. It is in force when the worker's own agent says so: from then on it refuses, whoever places. Restarts do not clear it.\n\nExits with 3 when an agent has not said so in time, with 9 when only some have; it stays wanted.\n\nUndo: forebay uncordon."
)]
pub(crate) struct CordonArgs {
    #[command(flatten)]
    workers: Selection,
    /// Go ahead although what is left may not carry the load, or nothing is left.
    #[arg(long)]
    ignore_capacity_guard: bool,
    #[command(flatten)]
    change: ChangeArgs,
}

/// Options of `forebay uncordon`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay uncordon w7 --reason 'new memory'\n\nAlso for workers that were drained. Refused while a drain goes on: `forebay drain cancel` first.\n\nUndo: forebay cordon."
)]
pub(crate) struct UncordonArgs {
    #[command(flatten)]
    workers: Selection,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Changed {
    schema_version: u32,
    desired: &'static str,
    dry_run: bool,
    /// It was so already, or nothing was to be changed.
    unchanged: bool,
    /// Workers that it changed, or would change.
    affected: u32,
    revision: Revision,
    /// From the command to the last agent's word; null: not waited for.
    in_force_ms: Option<u64>,
    workers: Vec<Row>,
    balancers: Option<Balancers>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    desired: &'static str,
    observed: &'static str,
    in_force: bool,
}

/// Runs `forebay cordon`.
pub(crate) fn cordon(args: &CordonArgs) -> Result<(), CliError> {
    let guarded = !args.ignore_capacity_guard;
    change(&args.workers, &args.change, Desired::Cordoned, guarded)
}

/// Runs `forebay uncordon`.
pub(crate) fn uncordon(args: &UncordonArgs) -> Result<(), CliError> {
    change(&args.workers, &args.change, Desired::Ready, true)
}

fn change(
    workers: &Selection,
    change: &ChangeArgs,
    wanted: Desired,
    guarded: bool,
) -> Result<(), CliError> {
    workers.check()?;
    let context = change.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let names = workers.names(&asked.read().await?)?;
        if workers.is_by_selector() || !guarded {
            let verb = if wanted == Desired::Ready {
                "Uncordon"
            } else {
                "Cordon"
            };
            let guard = if guarded {
                ""
            } else {
                " although the others may not carry the load"
            };
            confirm(change, &format!("{verb} {}{guard}?", listed(&names)))?;
        }
        let action = Action::SetDesiredOf(SetDesiredOf {
            names: names.clone(),
            desired: wanted.into(),
            ignore_capacity_guard: !guarded,
            dry_run: change.dry_run,
        });
        let began = Instant::now();
        let done = propose(&asked, &action, &change.reason).await?;
        let waits = !change.dry_run && !change.wait.no_wait;
        let facts = if waits {
            in_force(&asked, &names, done.revision).await?
        } else {
            asked.read().await?
        };
        let rows = rows(&facts, &names);
        let missing: Vec<String> = rows
            .iter()
            .filter(|row| waits && !row.in_force)
            .map(|row| row.name.clone())
            .collect();
        let changed = Changed {
            schema_version: 1,
            desired: desired(wanted),
            dry_run: change.dry_run,
            unchanged: done.unchanged,
            affected: done.affected,
            revision: done.revision,
            in_force_ms: (waits && missing.is_empty()).then(|| millis(began.elapsed())),
            balancers: balancers(&asked, done.revision).await,
            workers: rows,
        };
        change.output.print(&changed, || page(&changed, wanted));
        overtaken(&facts, &names, wanted, change.dry_run)?;
        if wanted == Desired::Cordoned && !done.unchanged {
            say(&format!("undo: forebay uncordon {}", names.join(" ")));
        }
        match missing.len() {
            0 => Ok(()),
            some => {
                let exit = if some == names.len() {
                    Exit::TimedOut
                } else {
                    Exit::Partial
                };
                Err(CliError::because(
                    exit,
                    format!(
                        "not in force within {} s on {}: it stays wanted; look at `forebay workers` and the agent's log",
                        asked.timeout.as_secs(),
                        missing.join(", ")
                    ),
                ))
            }
        }
    })
}

/// The facts once every agent has said that it is in force there, or as they are when time is up.
async fn in_force(asked: &Asked, names: &[String], revision: Revision) -> Result<Facts, CliError> {
    let mut watching = asked.client.spawn_watch(None);
    let there = |facts: &Facts| {
        let in_force = |name: &String| facts.workers.get(name).is_none_or(|w| w.is_in_force());
        facts.revision >= revision && names.iter().all(in_force)
    };
    let seen = watching
        .facts
        .wait_for(|facts| facts.as_ref().is_some_and(|facts| there(facts)));
    match tokio::time::timeout(asked.timeout, seen).await {
        Ok(Ok(facts)) => Ok(facts.as_ref().expect("waited for").as_ref().clone()),
        Ok(Err(_)) | Err(_) => asked.read().await,
    }
}

/// Somebody else wanted something else meanwhile.
fn overtaken(
    facts: &Facts,
    names: &[String],
    wanted: Desired,
    dry_run: bool,
) -> Result<(), CliError> {
    let other = |worker: &WorkerFact| match wanted {
        // Who is drained takes nothing either.
        Desired::Cordoned => worker.desired == Desired::Ready,
        _ => worker.desired != wanted,
    };
    let workers = names.iter().filter_map(|name| facts.workers.get(name));
    let others: Vec<String> = workers
        .filter(|worker| !dry_run && other(worker))
        .map(|worker| format!("{} is wanted {}", worker.name, desired(worker.desired)))
        .collect();
    if others.is_empty() {
        return Ok(());
    }
    Err(CliError::because(
        Exit::Conflict,
        format!("somebody else changed it meanwhile: {}", others.join(", ")),
    ))
}

fn rows(facts: &Facts, names: &[String]) -> Vec<Row> {
    let workers = names.iter().filter_map(|name| facts.workers.get(name));
    workers
        .map(|worker| Row {
            name: worker.name.clone(),
            desired: desired(worker.desired),
            observed: observed(worker.observed),
            in_force: worker.is_in_force(),
        })
        .collect()
}

fn page(changed: &Changed, wanted: Desired) -> String {
    let verb = if wanted == Desired::Ready {
        "uncordon"
    } else {
        "cordon"
    };
    let mut text = match (changed.dry_run, changed.affected) {
        (_, 0) if wanted == Desired::Cordoned => "already cordoned".to_owned(),
        (_, 0) => "already ready".to_owned(),
        (true, n) => format!("dry run: would {verb} {n}"),
        (false, n) => {
            let revision = changed.revision;
            match changed.in_force_ms {
                Some(ms) => format!("{verb}ed {n} as {revision}, in force after {ms} ms"),
                None => format!("{verb}ed {n} as {revision}"),
            }
        }
    };
    if let Some(balancers) = &changed.balancers
        && !changed.dry_run
    {
        text += &format!("\n{}", balancers.line());
    }
    let rows = changed.workers.iter().map(|row| {
        [
            row.name.clone(),
            row.desired.to_owned(),
            row.observed.to_owned(),
            if row.in_force { "yes" } else { "no" }.to_owned(),
        ]
    });
    text + "\n\n" + &table(["NAME", "DESIRED", "STATE", "IN FORCE"], rows)
}

fn millis(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}
