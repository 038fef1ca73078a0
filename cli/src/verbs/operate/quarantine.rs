//! `forebay quarantine`: requests that engines died of, and letting them through again.

use clap::{Args, Subcommand};
use forebay_control_client::Facts;
use forebay_proto::Revision;
use forebay_proto::suspect::{QUARANTINE_AT, QUARANTINE_WORKERS, Suspect, suspect_name};
use forebay_proto::wire::fleet::LiftQuarantine;
use forebay_proto::wire::fleet::command::Action;
use serde::Serialize;

use super::{Balancers, ChangeArgs, balancers, confirm, listed, propose};
use crate::context::ContextArgs;
use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, clock, say, table};
use crate::verbs::ask::Asked;

/// Options of `forebay quarantine`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay quarantine list\n  forebay quarantine show 3f2a9c01d4e5b677\n  forebay quarantine lift 3f2a9c01d4e5b677 --reason 'engines updated'\n\nWhen an engine dies and nobody knows why, what was on it is suspected. A request that two workers' engines died under is refused by every balancer for an hour: 422 `quarantined`. It is known by a keyed hash of its tenant, model, kinds of parameters and prompt; nothing of its text is kept."
)]
pub(crate) struct QuarantineArgs {
    #[command(subcommand)]
    verb: QuarantineVerb,
}

#[derive(Debug, Subcommand)]
enum QuarantineVerb {
    /// Show which requests are refused.
    List(ListArgs),
    /// Show one, and the deaths that are held against it.
    Show(ShowArgs),
    /// Let requests through again: nothing is held against them any more.
    Lift(LiftArgs),
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Show also those that are suspected, and not refused.
    #[arg(long, short)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Debug, Args)]
struct ShowArgs {
    /// Its name, as `list` shows it.
    #[arg(value_name = "REQUEST", value_parser = key)]
    request: u64,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "What kills engines still will do so again: two of them, until it is refused again. Lift it when the engines were updated, or when the deaths had another cause.\n\nUndo: none is needed; it is refused again by itself."
)]
struct LiftArgs {
    /// Names, as `list` shows them.
    #[arg(value_name = "REQUEST", value_parser = key, required_unless_present = "all")]
    requests: Vec<u64>,
    /// All that are refused.
    #[arg(long, conflicts_with = "requests")]
    all: bool,
    #[command(flatten)]
    change: ChangeArgs,
}

fn key(text: &str) -> Result<u64, String> {
    let named = (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok());
    let named = named.flatten().filter(|key| *key != 0);
    named.ok_or_else(|| {
        "is no name of a request: 16 hexadecimal digits, as `list` shows them".into()
    })
}

#[derive(Serialize)]
struct List {
    schema_version: u32,
    requests: Vec<Row>,
}

#[derive(Serialize)]
struct Shown {
    schema_version: u32,
    request: Row,
}

#[derive(Serialize)]
struct Row {
    name: String,
    quarantined: bool,
    /// What is held against it, as a share of one death; 1.5 from two workers is enough.
    suspicion: f64,
    tenant: String,
    model: String,
    shape: String,
    key_epoch: u32,
    deaths: Vec<Death>,
    /// Cell time, milliseconds since 1970.
    quarantined_ms: Option<u64>,
    until_ms: u64,
}

#[derive(Serialize)]
struct Death {
    worker: String,
    share: f64,
    at_ms: u64,
}

#[derive(Serialize)]
struct Lifted {
    schema_version: u32,
    dry_run: bool,
    /// Requests that are let through, or would be.
    affected: u32,
    unchanged: bool,
    revision: Revision,
    balancers: Option<Balancers>,
}

/// Runs `forebay quarantine`.
pub(crate) fn run(args: &QuarantineArgs) -> Result<(), CliError> {
    crate::roles::thread()?.block_on(async {
        match &args.verb {
            QuarantineVerb::List(args) => list(args).await,
            QuarantineVerb::Show(args) => show(args).await,
            QuarantineVerb::Lift(args) => lift(args).await,
        }
    })
}

async fn list(args: &ListArgs) -> Result<(), CliError> {
    let asked = Asked::new(args.context.resolve()?)?;
    let facts = asked.read().await?;
    let shown = facts.suspects.values();
    let shown = shown.filter(|suspect| args.all || suspect.is_quarantined());
    let mut rows: Vec<Row> = shown.map(|suspect| row(&facts, suspect)).collect();
    rows.sort_by(|one, other| {
        let order = other.quarantined.cmp(&one.quarantined);
        order.then(other.suspicion.total_cmp(&one.suspicion))
    });
    let list = List {
        schema_version: 1,
        requests: rows,
    };
    args.output.print(&list, || page(&list.requests, args.all));
    Ok(())
}

async fn show(args: &ShowArgs) -> Result<(), CliError> {
    let asked = Asked::new(args.context.resolve()?)?;
    let facts = asked.read().await?;
    let suspect = facts.suspects.get(&args.request).ok_or_else(|| {
        let name = suspect_name(args.request);
        let problem = format!("nothing is held against request {name}, or not any more");
        CliError::because(Exit::NotFound, problem)
    })?;
    let shown = Shown {
        schema_version: 1,
        request: row(&facts, suspect),
    };
    args.output.print(&shown, || one(&shown.request));
    Ok(())
}

async fn lift(args: &LiftArgs) -> Result<(), CliError> {
    let change = &args.change;
    let names: Vec<String> = args.requests.iter().map(|key| suspect_name(*key)).collect();
    let asked = Asked::new(change.context.resolve()?)?;
    let which = if args.all {
        "all requests that are refused".to_owned()
    } else {
        listed(&names)
    };
    if args.all {
        confirm(change, &format!("Let {which} through again?"))?;
    }
    let action = Action::LiftQuarantine(LiftQuarantine {
        keys: args.requests.clone(),
        dry_run: change.dry_run,
    });
    let done = propose(&asked, &action, &change.reason).await?;
    let lifted = Lifted {
        schema_version: 1,
        dry_run: change.dry_run,
        affected: done.affected,
        unchanged: done.unchanged,
        revision: done.revision,
        balancers: balancers(&asked, done.revision).await,
    };
    change
        .output
        .print(&lifted, || match (lifted.dry_run, lifted.affected) {
            (_, 0) => "none is refused".to_owned(),
            (true, n) => format!("dry run: would let {n} through"),
            (false, n) => {
                let balancers = lifted.balancers.as_ref().map(Balancers::line);
                let revision = lifted.revision;
                format!(
                    "let {n} through as {revision}\n{}",
                    balancers.unwrap_or_default()
                )
            }
        });
    if !lifted.dry_run && lifted.affected > 0 {
        say("what kills engines still is refused again once two more died of it");
    }
    Ok(())
}

fn row(facts: &Facts, suspect: &Suspect) -> Row {
    let deaths = suspect.deaths.iter().map(|death| Death {
        worker: facts
            .worker(death.worker)
            .map_or_else(|| death.worker.to_string(), |worker| worker.name.clone()),
        share: f64::from(death.share) / 1e3,
        at_ms: death.at.0,
    });
    Row {
        name: suspect.name(),
        quarantined: suspect.is_quarantined(),
        suspicion: f64::from(suspect.suspicion()) / 1e3,
        tenant: suspect.tenant.clone(),
        model: suspect.model.clone(),
        shape: suspect.shape.clone(),
        key_epoch: suspect.key_epoch,
        deaths: deaths.collect(),
        quarantined_ms: suspect.quarantined_at.map(|at| at.0),
        until_ms: suspect.until().0,
    }
}

fn page(rows: &[Row], all: bool) -> String {
    if rows.is_empty() {
        return if all {
            "no request is suspected of anything".into()
        } else {
            "no request is refused".into()
        };
    }
    let rows = rows.iter().map(|row| {
        [
            row.name.clone(),
            if row.quarantined {
                "refused"
            } else {
                "suspected"
            }
            .to_owned(),
            format!("{:.2}", row.suspicion),
            row.deaths.len().to_string(),
            row.tenant.clone(),
            row.model.clone(),
            row.shape.clone(),
            clock(row.until_ms),
        ]
    });
    let header = [
        "REQUEST",
        "STATE",
        "SUSPICION",
        "ENGINES",
        "TENANT",
        "MODEL",
        "PARAMETERS",
        "UNTIL",
    ];
    table(header, rows)
}

fn one(row: &Row) -> String {
    let state = match row.quarantined_ms {
        Some(since) => format!(
            "refused since {}, until {}",
            clock(since),
            clock(row.until_ms)
        ),
        None => format!(
            "suspected until {}: not refused, which takes {:.1} from {QUARANTINE_WORKERS} workers",
            clock(row.until_ms),
            f64::from(QUARANTINE_AT) / 1e3
        ),
    };
    let deaths = row.deaths.iter().map(|death| {
        [
            death.worker.clone(),
            format!("{:.2}", death.share),
            clock(death.at_ms),
        ]
    });
    format!(
        "request {} of tenant {}, model {}\nparameters: {}\n{state}\nsuspicion {:.2}\n\n{}",
        row.name,
        row.tenant,
        row.model,
        row.shape,
        row.suspicion,
        table(["ENGINE OF", "SHARE", "DIED"], deaths)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_named_by_sixteen_digits() {
        assert_eq!(key("000000000000002a"), Ok(42));
        for bad in [
            "",
            "2a",
            "0000000000000000",
            "zz00000000000000",
            "000000000000002a0",
        ] {
            assert!(key(bad).is_err(), "{bad}");
        }
    }
}
