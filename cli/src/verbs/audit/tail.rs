//! `forebay audit tail`: the newest entries, and those that come.

use std::time::Duration;

use clap::{Args, ValueEnum};
use forebay_consensus::fleet::archive::{Record, Tail};
use forebay_consensus::fleet::audit::KEPT_ENTRIES;
use forebay_proto::ClusterId;
use serde::Serialize;

use super::{beginning, kept, newest, older};
use crate::context::ContextArgs;
use crate::exit::CliError;
use crate::output::{clock, result, say, table};
use crate::verbs::ask::Asked;

/// Options of `forebay audit tail`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay audit tail -n 50\n  forebay audit tail --follow --output jsonl | tee -a audit.jsonl"
)]
pub(super) struct TailArgs {
    /// The newest so many; those before the newest 1,000 come from control nodes' files.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 20)]
    lines: usize,
    /// Go on with those that come, until Ctrl-C.
    #[arg(long, short)]
    follow: bool,
    /// The form of the result on stdout.
    #[arg(long, short, value_enum, default_value_t = Form::Table, env = "FOREBAY_OUTPUT")]
    output: Form,
    #[command(flatten)]
    context: ContextArgs,
}

/// How entries look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Form {
    /// For people; its form may change.
    Table,
    /// For programs: one document, with a `schema_version`.
    Json,
    /// For programs: an entry a line, as exports have them.
    Jsonl,
}

#[derive(Serialize)]
struct Document<'a> {
    schema_version: u32,
    cluster_id: ClusterId,
    /// Entries that there ever were.
    count: u64,
    /// The first that the cluster still has.
    begins: u64,
    /// Hash of the last one.
    head: &'a str,
    entries: &'a [Record],
}

/// Between two looks for new entries.
const LOOK: Duration = Duration::from_secs(1);
/// More than come between two looks, usually.
const USUAL: usize = 50;

/// Runs `forebay audit tail`.
pub(super) fn run(args: &TailArgs) -> Result<(), CliError> {
    if args.follow && args.output == Form::Json {
        let message = "--follow has no end, and one JSON document would: take --output jsonl";
        return Err(CliError::usage(message));
    }
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let (tail, _) = newest(&asked).await?;
        let (begins, records) = newest_of(&asked, &tail, args.lines).await?;
        if let Some(note) = beginning(begins).filter(|_| records.len() < args.lines) {
            say(&note);
        }
        show(args, &tail, begins, &records);
        if args.follow {
            follow(args, &asked, tail).await;
        }
        Ok(())
    })
}

/// The newest so many, and where the chain begins.
async fn newest_of(
    asked: &Asked,
    tail: &Tail,
    lines: usize,
) -> Result<(u64, Vec<Record>), CliError> {
    let begins = older::begins(asked, tail).await;
    let first = (tail.count + 1).saturating_sub(lines as u64).max(begins);
    let mut records = Vec::new();
    if first < tail.begins() {
        let take = |record| {
            records.push(record);
            Ok(())
        };
        older::each(asked, tail, first, None, take).await?;
    }
    let newer = tail.records.iter().filter(|one| one.number >= first);
    records.extend(newer.cloned());
    Ok((begins, records))
}

async fn follow(args: &TailArgs, asked: &Asked, mut before: Tail) {
    loop {
        tokio::time::sleep(LOOK).await;
        let mut newest = kept(asked, before.cluster_id, USUAL).await;
        if newest
            .as_ref()
            .is_ok_and(|tail| tail.begins() > before.count + 1)
        {
            newest = kept(asked, before.cluster_id, KEPT_ENTRIES).await;
        }
        let tail = match newest {
            Ok(tail) => tail,
            Err(error) => {
                say(&format!("asking again: {error}"));
                continue;
            }
        };
        if tail.begins() > before.count + 1 {
            let (from, to) = (before.count + 1, tail.begins() - 1);
            say(&format!("entries {from} to {to} came and went unseen"));
        }
        let new = tail.records.iter().filter(|one| one.number > before.count);
        for record in new {
            result(&match args.output {
                Form::Table => line(record),
                Form::Json | Form::Jsonl => record.line(),
            });
        }
        before = tail;
    }
}

fn show(args: &TailArgs, tail: &Tail, begins: u64, records: &[Record]) {
    match args.output {
        // What follows is not known, so columns cannot depend on it.
        Form::Table if args.follow => records.iter().for_each(|record| result(&line(record))),
        Form::Table => result(&page(records)),
        Form::Jsonl => records.iter().for_each(|record| result(&record.line())),
        Form::Json => {
            let document = Document {
                schema_version: 1,
                cluster_id: tail.cluster_id,
                count: tail.count,
                begins,
                head: &tail.head,
                entries: records,
            };
            let text = serde_json::to_string_pretty(&document);
            result(&text.expect("strings and numbers serialise"));
        }
    }
}

fn line(record: &Record) -> String {
    let [
        number,
        time,
        revision,
        who,
        from,
        action,
        target,
        outcome,
        hash,
        why,
    ] = cells(record);
    format!(
        "{number:>6}  {time:<24}  {revision:>7}  {who:<24}  {from:<21}  {action:<16}  {target:<24}  {outcome:<10}  {hash}  {why}"
    )
}

fn page(records: &[Record]) -> String {
    let header = [
        "ENTRY", "TIME", "REVISION", "WHO", "FROM", "WHAT", "OF", "RESULT", "HASH", "WHY",
    ];
    table(header, records.iter().map(cells))
}

fn cells(record: &Record) -> [String; 10] {
    [
        record.number.to_string(),
        clock(record.at_ms),
        record.revision.to_string(),
        record.actor.clone(),
        record.address.clone(),
        record.action.clone(),
        record.target.clone(),
        record.result.clone(),
        record.hash.chars().take(12).collect(),
        record.reason.clone(),
    ]
}
