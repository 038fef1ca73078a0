//! `forebay drain`: begins a drain, follows one, calls one off.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use forebay_control_client::Facts;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::{CancelDrain, StartDrain};
use forebay_proto::{Drain, DrainId, Millis, OnDeadline};
use serde::Serialize;

use super::follow::follow;
use super::report::Report;
use super::{ChangeArgs, Selection, confirm, listed, propose};
use crate::context::ContextArgs;
use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, say, table};
use crate::verbs::ask::Asked;

/// Options of `forebay drain`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  forebay drain w7 --reason 'new driver'\n  forebay drain w7 w8 --deadline 10m --on-deadline cancel --yes\n  forebay drain watch w7\n\nA drained worker takes nothing new, what waits in its queue goes to others at once, and what runs is finished. Several workers are judged together: all of them are drained, or none. The drain goes on without this command: Ctrl-C leaves it alone, `forebay drain watch` follows it again.\n\nExits with 3 when the deadline passed and something still runs (--on-deadline wait), or on Ctrl-C; with 4 when the others could not carry the load; with 8 when somebody called the drain off.\n\nUndo: forebay drain cancel, while it goes on; forebay uncordon, when it is over."
)]
pub(crate) struct DrainArgs {
    #[command(subcommand)]
    verb: Option<DrainVerb>,
    #[command(flatten)]
    start: StartArgs,
}

#[derive(Debug, Subcommand)]
enum DrainVerb {
    /// Show drains that go on, and the newest that ended.
    Status(StatusArgs),
    /// Follow a drain until it is over.
    Watch(WatchArgs),
    /// Call a drain off; its workers stay cordoned.
    Cancel(CancelArgs),
}

#[derive(Debug, Args)]
struct StartArgs {
    #[command(flatten)]
    workers: Selection,
    /// Until when it should be done: 90s, 10m, 2h, or none.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = time)]
    deadline: Limit,
    /// What becomes of what still runs at the deadline.
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = AtDeadline::Wait)]
    on_deadline: AtDeadline,
    /// Go ahead although what is left may not carry the load, or nothing is left.
    #[arg(long)]
    ignore_capacity_guard: bool,
    /// Stop waiting after this time (90s, 10m, 2h); the drain goes on. Default: wait until it is over or
    /// overdue.
    #[arg(long, value_name = "TIME", default_value = "none", value_parser = time, hide_default_value = true)]
    wait_timeout: Limit,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum AtDeadline {
    /// It goes on; the command exits with 3.
    Wait,
    /// It is ended with a typed error.
    Cancel,
    /// It continues on another worker. Not available yet.
    Migrate,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// Drains, such as d812, or workers; default: all.
    #[arg(value_name = "DRAIN")]
    which: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Debug, Args)]
struct WatchArgs {
    /// The drain, such as d812, or one of its workers.
    #[arg(value_name = "DRAIN")]
    which: String,
    /// Stop waiting after this time (90s, 10m, 2h); the drain goes on.
    #[arg(long, value_name = "TIME", default_value = "none", value_parser = time, hide_default_value = true)]
    wait_timeout: Limit,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay drain cancel d812 --reason 'wrong host'\n\nWhat was sent to others stays there; what runs goes on."
)]
struct CancelArgs {
    /// The drain, such as d812, or one of its workers.
    #[arg(value_name = "DRAIN")]
    which: String,
    /// Make its workers ready again.
    #[arg(long)]
    uncordon: bool,
    /// Say what would happen and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Why, for the audit.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

/// A time, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit(pub(super) Option<Duration>);

/// Reads 90s, 10m, 2h or none.
pub(super) fn time(text: &str) -> Result<Limit, String> {
    if text == "none" {
        return Ok(Limit(None));
    }
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, "s"),
    };
    let unit = match unit {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3_600),
        _ => None,
    };
    let seconds = number.parse::<u64>().ok().zip(unit);
    let seconds = seconds.and_then(|(number, unit)| number.checked_mul(unit));
    seconds
        .filter(|seconds| (1..=30 * 24 * 3_600).contains(seconds))
        .map(|seconds| Limit(Some(Duration::from_secs(seconds))))
        .ok_or_else(|| "is no time from 1s to 720h, such as 90s, 10m or 2h, nor none".into())
}

#[derive(Serialize)]
struct Planned {
    schema_version: u32,
    dry_run: bool,
    /// Workers that would be drained.
    affected: u32,
    workers: Vec<String>,
}

#[derive(Serialize)]
struct Drains {
    schema_version: u32,
    drains: Vec<Report>,
}

/// Runs `forebay drain`.
pub(crate) fn run(args: &DrainArgs) -> Result<(), CliError> {
    match &args.verb {
        None => start(&args.start),
        Some(DrainVerb::Status(args)) => status(args),
        Some(DrainVerb::Watch(args)) => watch(args),
        Some(DrainVerb::Cancel(args)) => cancel(args),
    }
}

fn start(args: &StartArgs) -> Result<(), CliError> {
    let on_deadline = match args.on_deadline {
        AtDeadline::Wait => OnDeadline::Wait,
        AtDeadline::Cancel => OnDeadline::Cancel,
        AtDeadline::Migrate => {
            return Err(CliError::usage(
                "--on-deadline migrate is not available yet: no stream can be continued on another worker; use wait or cancel",
            ));
        }
    };
    args.workers.check()?;
    let change = &args.change;
    let context = change.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let names = args.workers.names(&asked.read().await?)?;
        confirm(change, &format!("Drain {}?", listed(&names)))?;
        let deadline = args.deadline.0.map_or(Millis(0), Millis::from_duration);
        let action = Action::StartDrain(StartDrain {
            names: names.clone(),
            deadline_ms: deadline.0,
            on_deadline: on_deadline.to_wire().into(),
            ignore_capacity_guard: args.ignore_capacity_guard,
            dry_run: change.dry_run,
        });
        let done = propose(&asked, &action, &change.reason).await?;
        if change.dry_run {
            let planned = Planned {
                schema_version: 1,
                dry_run: true,
                affected: done.affected,
                workers: names,
            };
            change.output.print(&planned, || {
                format!("dry run: would drain {}", listed(&planned.workers))
            });
            return Ok(());
        }
        let id = done.drain.ok_or_else(|| {
            CliError::because(Exit::Failed, "the control plane's answer names no drain")
        })?;
        if done.unchanged {
            say(&format!("{id} drains them already"));
        } else {
            say(&format!(
                "{id} drains {}; undo: forebay drain cancel {id}",
                listed(&names)
            ));
        }
        if change.wait.no_wait {
            let facts = asked.read().await?;
            let report = Report::of(found(&facts, id)?);
            change
                .output
                .print(&report, || format!("{id} is under way: {}", listed(&names)));
            return Ok(());
        }
        follow(&asked, id, args.wait_timeout.0, change.output).await
    })
}

fn status(args: &StatusArgs) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let facts = asked.read().await?;
        let chosen: Vec<&Drain> = if args.which.is_empty() {
            facts.drains.values().collect()
        } else {
            let ids = args.which.iter().map(|which| meant(&facts, which));
            let ids = ids.collect::<Result<Vec<_>, _>>()?;
            let drains = ids.into_iter().map(|id| found(&facts, id));
            drains.collect::<Result<_, _>>()?
        };
        let drains = Drains {
            schema_version: 1,
            drains: chosen.into_iter().map(Report::of).collect(),
        };
        args.output.print(&drains, || page(&drains.drains));
        Ok(())
    })
}

fn watch(args: &WatchArgs) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let id = meant(&asked.read().await?, &args.which)?;
        follow(&asked, id, args.wait_timeout.0, args.output).await
    })
}

fn cancel(args: &CancelArgs) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let id = meant(&asked.read().await?, &args.which)?;
        let action = Action::CancelDrain(CancelDrain {
            id: id.0,
            uncordon: args.uncordon,
            dry_run: args.dry_run,
        });
        let done = asked
            .client
            .propose(action, &args.reason, asked.timeout)
            .await?;
        let facts = asked.read().await?;
        let report = Report::of(found(&facts, id)?);
        args.output.print(&report, || {
            let left = if args.uncordon { "ready" } else { "cordoned" };
            match (args.dry_run, done.unchanged) {
                (true, _) => format!(
                    "dry run: would call {id} off and leave {} workers {left}",
                    done.affected
                ),
                (false, true) => format!("{id} is over already: {}", report.state),
                (false, false) => {
                    format!("{id} is called off, {} workers are {left}", done.affected)
                }
            }
        });
        Ok(())
    })
}

/// The drain of this id, or the newest one of this worker: one that goes on before one that ended.
fn meant(facts: &Facts, which: &str) -> Result<DrainId, CliError> {
    if let Ok(id) = which.parse::<DrainId>()
        && facts.drains.contains_key(&id)
    {
        return Ok(id);
    }
    let of_worker = facts
        .drains
        .values()
        .filter(|drain| drain.workers.iter().any(|one| one.name == which));
    let newest = of_worker.max_by_key(|drain| (drain.is_active(), drain.id));
    newest.map(|drain| drain.id).ok_or_else(|| {
        CliError::because(
            Exit::NotFound,
            format!("{which} is no drain, and no worker of one: see `forebay drain status`"),
        )
    })
}

fn found(facts: &Facts, id: DrainId) -> Result<&Drain, CliError> {
    facts.drains.get(&id).ok_or_else(|| {
        CliError::because(
            Exit::NotFound,
            format!("there is no drain {id}: see `forebay drain status`"),
        )
    })
}

fn page(drains: &[Report]) -> String {
    if drains.is_empty() {
        return "no drains".into();
    }
    let rows = drains.iter().map(|drain| {
        let ms = |ms: Option<u64>| ms.map_or_else(String::new, |ms| format!("{ms} ms"));
        let over = drain.workers.iter().filter(|w| w.drained_ms.is_some());
        [
            drain.id.clone(),
            drain.state.to_owned(),
            format!("{}/{}", over.count(), drain.workers.len()),
            ms(drain.in_force_ms),
            ms(drain.drained_ms),
            drain.actor.clone(),
            drain.reason.clone(),
        ]
    });
    table(
        [
            "DRAIN", "STATE", "DRAINED", "IN FORCE", "AFTER", "ACTOR", "REASON",
        ],
        rows,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_unit_and_a_bound() {
        let seconds = |text: &str| time(text).map(|limit| limit.0.map(|time| time.as_secs()));
        for (text, expected) in [
            ("90", Ok(Some(90))),
            ("90s", Ok(Some(90))),
            ("10m", Ok(Some(600))),
            ("2h", Ok(Some(7_200))),
            ("none", Ok(None)),
        ] {
            assert_eq!(seconds(text), expected, "{text}");
        }
        for bad in [
            "",
            "0s",
            "s",
            "1d",
            "-1s",
            "1.5h",
            "99999999999999999999s",
            "721h",
        ] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
