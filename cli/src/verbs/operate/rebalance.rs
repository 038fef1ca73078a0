//! `forebay rebalance`: plans how load could be evened out, has it done, shows it, calls it off; and
//! `forebay homes`, which shows what is moved.

mod document;
mod follow;
mod report;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use forebay_consensus::fleet::MAX_MOVES;
use forebay_control_client::Facts;
use forebay_proto::wire::fleet::CancelRebalance;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::{Millis, Rebalance, RebalanceId};
use serde::Serialize;

use super::drain::{Limit, time};
use super::{ChangeArgs, confirm, listed};
use crate::context::ContextArgs;
use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, say};
use crate::verbs::ask::Asked;
use document::{FamilyRow, Plan, thousandths};
use follow::{PLANNING, Stay, follow};
use report::{Report, families, families_page, page};

pub(crate) use report::rebalance_line;

/// Promises that were kept less often before a rebalance are no reason to stop it, unless it gets worse by
/// more than this share.
const SLACK: f64 = 0.05;
const STOP_BELOW: f64 = 0.9;

/// Options of `forebay rebalance`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay rebalance plan --pool default --out plan.json\n  forebay rebalance apply plan.json --reason 'one hot prompt'\n  forebay rebalance status\n\nA rebalance moves homes: the workers that are to hold what many conversations share. Requests follow by themselves, and only where their promise is kept."
)]
pub(crate) struct RebalanceArgs {
    #[command(subcommand)]
    verb: RebalanceVerb,
}

#[derive(Debug, Subcommand)]
enum RebalanceVerb {
    /// Show what would even out a pool's load, and what it would be good for; nothing is changed.
    Plan(PlanArgs),
    /// Carry a plan out, one move after the other.
    Apply(Box<ApplyArgs>),
    /// Show the rebalance of each pool that goes on, or ended last.
    Status(StatusArgs),
    /// Call a rebalance off; what was moved stays.
    Cancel(CancelArgs),
}

/// What to plan.
#[derive(Clone, Debug, Args)]
struct WishArgs {
    /// The pool; it may be left out where there is one only.
    #[arg(long, value_name = "POOL")]
    pool: Option<String>,
    /// How far back to look at what came: 10s to 10m.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = recorded)]
    window: Time,
    /// Most moves of the plan.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=MAX_MOVES as i64))]
    most_moves: u32,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Agents record what came in the last ten minutes, fingerprints and lengths only; the leader replays that with the homes as they are and as they could be. An empty plan is a success: it is balanced already."
)]
struct PlanArgs {
    #[command(flatten)]
    wish: WishArgs,
    /// Write the plan here as JSON, for `forebay rebalance apply`.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Without a plan it makes one first and writes it, into --out or the current directory, before it is applied. The rebalance goes on without this command: Ctrl-C leaves it alone, `forebay rebalance status` shows it.\n\nExits with 1 when it stopped by itself, because fewer first tokens were in time or a move was not possible any more; with 3 on Ctrl-C or --wait-timeout; with 8 when the plan is not true any more, another rebalance of the pool goes on, or somebody called it off.\n\nUndo: forebay rebalance cancel, while it goes on; what was moved stays, and a later plan moves it again."
)]
struct ApplyArgs {
    /// A plan that was written before; default: plan now.
    #[arg(value_name = "PLANFILE", conflicts_with_all = ["pool", "window", "most_moves", "out"])]
    plan: Option<PathBuf>,
    #[command(flatten)]
    wish: WishArgs,
    /// Where the plan that is made now is written before it is applied; default: the current directory.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Between two moves.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = some_time)]
    interval: Time,
    /// Stop when a smaller share of the pool's first tokens than this is in time, 0 to 1; 0: never.
    /// Default: 0.9, or 0.05 less than was measured, whichever is less.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    stop_below: Option<f64>,
    /// After the last move, measure for so long what came of it; none: do not.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
    measure: Limit,
    /// Stop waiting after this time (90s, 10m, 2h); the rebalance goes on. Default: wait until it is over.
    #[arg(long, value_name = "TIME", default_value = "none", value_parser = time, hide_default_value = true)]
    wait_timeout: Limit,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// Only of this pool.
    #[arg(long, value_name = "POOL")]
    pool: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Debug, Args)]
struct CancelArgs {
    /// The rebalance, such as r812, or its pool; it may be left out where one only goes on.
    #[arg(value_name = "REBALANCE")]
    which: Option<String>,
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

/// Options of `forebay homes`.
#[derive(Debug, Args)]
#[command(
    after_help = "A family is the beginning of prompts that several conversations share; its homes are the workers that are to hold it. LOAD is what its requests take of one worker, SAVES the tokens a second that need no prefill where it is held. A pinned family's homes were chosen by a rebalance or a drain: the control plane adds some, and takes none away."
)]
pub(crate) struct HomesArgs {
    /// Only of this pool.
    #[arg(long, value_name = "POOL")]
    pool: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

/// A time that is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Time(Duration);

fn some_time(text: &str) -> Result<Time, String> {
    let limit = time(text)?.0;
    limit.map(Time).ok_or_else(|| "is no time".into())
}

/// As far back as agents record.
fn recorded(text: &str) -> Result<Time, String> {
    let time = some_time(text)?;
    let known = (10..=600).contains(&time.0.as_secs());
    known
        .then_some(time)
        .ok_or_else(|| "is no time from 10s to 10m".into())
}

fn share(text: &str) -> Result<f64, String> {
    let share = text
        .parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "is no share from 0 to 1, such as 0.9".into())
}

#[derive(Serialize)]
struct Rebalances {
    schema_version: u32,
    rebalances: Vec<Report>,
}

#[derive(Serialize)]
struct Homes {
    schema_version: u32,
    families: Vec<FamilyRow>,
}

/// A rebalance that would begin.
#[derive(Serialize)]
struct Judged {
    schema_version: u32,
    dry_run: bool,
    /// Homes that would be moved.
    affected: u32,
    plan: Plan,
}

/// Runs `forebay rebalance`.
pub(crate) fn run(args: &RebalanceArgs) -> Result<(), CliError> {
    crate::roles::thread()?.block_on(async {
        match &args.verb {
            RebalanceVerb::Plan(args) => plan(args).await,
            RebalanceVerb::Apply(args) => apply(args).await,
            RebalanceVerb::Status(args) => status(args).await,
            RebalanceVerb::Cancel(args) => cancel(args).await,
        }
    })
}

/// Runs `forebay homes`.
pub(crate) fn homes(args: &HomesArgs) -> Result<(), CliError> {
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(args.context.resolve()?)?;
        let facts = asked.read().await?;
        if let Some(pool) = &args.pool {
            known(&facts, pool)?;
        }
        let homes = Homes {
            schema_version: 1,
            families: families(&facts, args.pool.as_deref()),
        };
        args.output.print(&homes, || families_page(&homes.families));
        Ok(())
    })
}

async fn plan(args: &PlanArgs) -> Result<(), CliError> {
    let asked = Asked::new(args.context.resolve()?)?;
    let plan = make(&asked, &asked.read().await?, &args.wish).await?;
    if let Some(path) = &args.out {
        plan.write(path)?;
    }
    args.output.print(&plan, || plan.page());
    if let Some(path) = args.out.as_ref().filter(|_| !plan.moves.is_empty()) {
        say(&format!(
            "apply it: forebay rebalance apply {}",
            path.display()
        ));
    }
    Ok(())
}

/// Has the leader plan; says who sent no record.
async fn make(asked: &Asked, facts: &Facts, wish: &WishArgs) -> Result<Plan, CliError> {
    let pool = pool(facts, wish)?;
    let window = Millis::from_duration(wish.window.0);
    let patience = PLANNING.max(asked.timeout);
    let planned = asked
        .client
        .plan(&pool, window, wish.most_moves, patience)
        .await?;
    if !planned.silent.is_empty() {
        say(&format!(
            "warning: no record of {}: not in the plan",
            listed(&planned.silent)
        ));
    }
    Ok(Plan::of(facts, &pool, &planned))
}

/// The pool that is meant.
fn pool(facts: &Facts, wish: &WishArgs) -> Result<String, CliError> {
    if let Some(pool) = &wish.pool {
        known(facts, pool)?;
        return Ok(pool.clone());
    }
    match &facts.config.pools[..] {
        [only] => Ok(only.name.clone()),
        pools => {
            let names: Vec<String> = pools.iter().map(|pool| pool.name.clone()).collect();
            let problem = format!(
                "there are several pools: give --pool, of {}",
                listed(&names)
            );
            Err(CliError::usage(problem))
        }
    }
}

fn known(facts: &Facts, pool: &str) -> Result<(), CliError> {
    if facts.config.pool(pool).is_some() {
        return Ok(());
    }
    Err(CliError::because(
        Exit::NotFound,
        format!("there is no pool {pool}: see `forebay config show`"),
    ))
}

async fn apply(args: &ApplyArgs) -> Result<(), CliError> {
    let change = &args.change;
    let asked = Asked::new(change.context.resolve()?)?;
    let facts = asked.read().await?;
    let plan = match &args.plan {
        Some(path) => Plan::read(path)?,
        None => make(&asked, &facts, &args.wish).await?,
    };
    if plan.moves.is_empty() {
        let judged = Judged {
            schema_version: 1,
            dry_run: change.dry_run,
            affected: 0,
            plan,
        };
        change.output.print(&judged, || judged.plan.page());
        return Ok(());
    }
    let mut command = plan.command(&facts)?;
    command.interval_ms = Millis::from_duration(args.interval.0).wire();
    command.stop_below = args
        .stop_below
        .map_or_else(|| stop_below(&plan), thousandths);
    command.dry_run = change.dry_run;
    let new = args.plan.is_none();
    if let Some(path) = &args.out {
        plan.write(path)?;
    } else if new && !change.dry_run {
        let path = PathBuf::from(plan.file_name());
        plan.write(&path)?;
        say(&format!("the plan is in {}", path.display()));
    }
    if new && !change.dry_run {
        say(&plan.page());
    }
    let (moves, pool) = (plan.moves.len(), plan.pool.clone());
    let homes = if moves == 1 { "home" } else { "homes" };
    confirm(change, &format!("Move {moves} {homes} in pool {pool}?"))?;
    let action = Action::StartRebalance(command);
    let done = asked
        .client
        .propose(action, &change.reason, asked.timeout)
        .await?;
    if change.dry_run {
        let judged = Judged {
            schema_version: 1,
            dry_run: true,
            affected: done.affected,
            plan,
        };
        change.output.print(&judged, || {
            let page = judged.plan.page();
            format!("{page}\n\ndry run: would move {} {homes}", judged.affected)
        });
        return Ok(());
    }
    let id = done.rebalance.ok_or_else(|| {
        CliError::because(
            Exit::Failed,
            "the control plane's answer names no rebalance",
        )
    })?;
    if done.unchanged {
        say(&format!("{id} makes these moves already"));
    } else {
        say(&format!(
            "{id} moves {moves} {homes} in pool {pool}; undo: forebay rebalance cancel {id}"
        ));
    }
    if change.wait.no_wait {
        let facts = asked.read().await?;
        let report = Report::of(&facts, found(&facts, id)?);
        change.output.print(&report, || report.line());
        return Ok(());
    }
    let stay = Stay {
        at_most: args.wait_timeout.0,
        measure: args.measure.0,
    };
    follow(&asked, id, stay, change.output).await
}

/// When to stop, where the operator did not say it, in thousandths.
fn stop_below(plan: &Plan) -> u32 {
    let before = if plan.measured.arrivals > 0 {
        plan.measured.in_time
    } else {
        1.0
    };
    thousandths((before - SLACK).clamp(0.0, STOP_BELOW))
}

async fn status(args: &StatusArgs) -> Result<(), CliError> {
    let asked = Asked::new(args.context.resolve()?)?;
    let facts = asked.read().await?;
    if let Some(pool) = &args.pool {
        known(&facts, pool)?;
    }
    let of_pool = |one: &&Rebalance| args.pool.as_ref().is_none_or(|pool| *pool == one.pool);
    let chosen = facts.rebalances.values().filter(of_pool);
    let rebalances = Rebalances {
        schema_version: 1,
        rebalances: chosen.map(|one| Report::of(&facts, one)).collect(),
    };
    args.output
        .print(&rebalances, || page(&rebalances.rebalances));
    Ok(())
}

async fn cancel(args: &CancelArgs) -> Result<(), CliError> {
    let asked = Asked::new(args.context.resolve()?)?;
    let id = meant(&asked.read().await?, args.which.as_deref())?;
    let action = Action::CancelRebalance(CancelRebalance {
        id: id.0,
        dry_run: args.dry_run,
    });
    let done = asked
        .client
        .propose(action, &args.reason, asked.timeout)
        .await?;
    let facts = asked.read().await?;
    let report = Report::of(&facts, found(&facts, id)?);
    args.output.print(&report, || {
        match (report.state == "moving", args.dry_run, done.unchanged) {
            (true, true, _) => format!("dry run: would call {id} off"),
            (_, false, false) => format!("{id} is called off; what was moved stays"),
            _ => format!("{id} is over already: {}", report.state),
        }
    });
    Ok(())
}

/// The rebalance of this id or pool, or the only one that goes on.
fn meant(facts: &Facts, which: Option<&str>) -> Result<RebalanceId, CliError> {
    let Some(which) = which else {
        let active = facts.rebalances.values().filter(|one| one.is_active());
        let active: Vec<RebalanceId> = active.map(|one| one.id).collect();
        return match active[..] {
            [only] => Ok(only),
            [] => Err(CliError::because(
                Exit::NotFound,
                "no rebalance goes on: see `forebay rebalance status`",
            )),
            _ => Err(CliError::usage("several rebalances go on: name one")),
        };
    };
    if let Ok(id) = which.parse::<RebalanceId>()
        && facts.rebalances.contains_key(&id)
    {
        return Ok(id);
    }
    let mut of_pool = facts.rebalances.values().filter(|one| one.pool == which);
    of_pool.next().map(|one| one.id).ok_or_else(|| {
        CliError::because(
            Exit::NotFound,
            format!(
                "{which} is no rebalance, and no pool with one: see `forebay rebalance status`"
            ),
        )
    })
}

fn found(facts: &Facts, id: RebalanceId) -> Result<&Rebalance, CliError> {
    facts.rebalances.get(&id).ok_or_else(|| {
        CliError::because(
            Exit::NotFound,
            format!("there is no rebalance {id}: see `forebay rebalance status`"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_lies_between_none_and_all() {
        assert_eq!(share("0.9"), Ok(0.9));
        assert_eq!((share("0"), share("1")), (Ok(0.0), Ok(1.0)));
        for bad in ["", "-0.1", "1.1", "90", "NaN", "x"] {
            assert!(share(bad).is_err(), "{bad}");
        }
        assert_eq!(some_time("5m"), Ok(Time(Duration::from_secs(300))));
        assert!(some_time("none").is_err() && some_time("0s").is_err());
        assert!(recorded("10m").is_ok() && recorded("10s").is_ok());
        assert!(recorded("11m").is_err() && recorded("9s").is_err());
    }
}
