//! `forebay config`: the fleet's document, shown and replaced whole by compare-and-set.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use forebay_proto::Revision;
use forebay_proto::config::Config;
use forebay_proto::wire::fleet::ApplyConfig;
use forebay_proto::wire::fleet::command::Action;
use serde::Serialize;
use serde_json::Value;

use super::ask::Asked;
use crate::context::ContextArgs;
use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, table};

/// Options of `forebay config`.
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    verb: ConfigVerb,
}

#[derive(Debug, Subcommand)]
enum ConfigVerb {
    /// Print the document (TOML) with its revision.
    Show(ShowArgs),
    /// Replace the document, unless somebody else did since it was read.
    Apply(ApplyArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  forebay config show > fleet.toml")]
struct ShowArgs {
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay config apply fleet.toml --expected-revision 42\n\nUndo: apply the document that `config show` printed before."
)]
struct ApplyArgs {
    /// The document (TOML); `-` reads stdin.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Refuse unless the document is still at this revision, as `config show` printed it; default:
    /// the current one.
    #[arg(long, value_name = "N", value_parser = revision)]
    expected_revision: Option<u64>,
    /// Why, for the audit.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Serialize)]
struct Shown {
    schema_version: u32,
    /// Of the document; 0 is the built-in one.
    revision: Revision,
    document: Config,
}

#[derive(Serialize)]
struct Applied {
    schema_version: u32,
    revision: Revision,
    unchanged: bool,
    changes: Vec<Change>,
}

/// One setting that differs; absent on a side reads as null.
#[derive(Debug, PartialEq, Serialize)]
struct Change {
    path: String,
    before: Value,
    after: Value,
}

fn revision(text: &str) -> Result<u64, String> {
    text.trim_start_matches('r')
        .parse()
        .map_err(|_| "is no revision, such as 42 or r42".into())
}

/// Runs `forebay config`.
pub(crate) fn run(args: ConfigArgs) -> Result<(), CliError> {
    match args.verb {
        ConfigVerb::Show(args) => show(&args),
        ConfigVerb::Apply(args) => apply(&args),
    }
}

fn show(args: &ShowArgs) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let facts = asked.read().await?;
        let shown = Shown {
            schema_version: 1,
            revision: facts.config_revision,
            document: (*facts.config).clone(),
        };
        args.output.print(&shown, || {
            let built_in = if shown.revision.0 == 0 {
                " (built in)"
            } else {
                ""
            };
            let document = shown.document.to_toml();
            format!("# revision {}{built_in}\n{document}", shown.revision)
        });
        Ok(())
    })
}

fn apply(args: &ApplyArgs) -> Result<(), CliError> {
    let text = read(&args.file)?;
    let document = Config::from_toml(&text)
        .map_err(|error| CliError::usage(format!("{}: {error}", args.file.display())))?;
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let facts = asked.read().await?;
        let expected = args.expected_revision.unwrap_or(facts.config_revision.0);
        let action = Action::ApplyConfig(ApplyConfig {
            config: document.to_wire(),
            expected_revision: expected,
        });
        let done = asked
            .client
            .propose(action, &args.reason, asked.timeout)
            .await?;
        let applied = Applied {
            schema_version: 1,
            revision: done.revision,
            unchanged: done.unchanged,
            changes: changes(&facts.config, &document),
        };
        args.output.print(&applied, || page(&applied));
        Ok(())
    })
}

fn page(applied: &Applied) -> String {
    if applied.unchanged || applied.changes.is_empty() {
        return format!("nothing to change at {}", applied.revision);
    }
    let shown = |value: &Value| match value {
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let rows = applied.changes.iter().map(|change| {
        [
            change.path.clone(),
            shown(&change.before),
            shown(&change.after),
        ]
    });
    format!(
        "applied as {}\n\n{}",
        applied.revision,
        table(["SETTING", "BEFORE", "AFTER"], rows)
    )
}

fn read(file: &Path) -> Result<String, CliError> {
    let mut text = String::new();
    let taken = if file == Path::new("-") {
        std::io::stdin()
            .take(MAX_BYTES + 1)
            .read_to_string(&mut text)
    } else {
        std::fs::File::open(file)
            .and_then(|open| open.take(MAX_BYTES + 1).read_to_string(&mut text))
    };
    match taken {
        Ok(_) if text.len() as u64 <= MAX_BYTES => Ok(text),
        Ok(_) => Err(CliError::usage(format!(
            "{}: the document is longer than {MAX_BYTES} bytes",
            file.display()
        ))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(CliError::because(
            Exit::NotFound,
            format!(
                "{}: no such file; `forebay config show` prints the document",
                file.display()
            ),
        )),
        Err(error) => Err(CliError::File {
            path: file.into(),
            error,
        }),
    }
}

/// The settings that differ, pool by pool.
fn changes(before: &Config, after: &Config) -> Vec<Change> {
    let mut names: Vec<&String> = before.pools.iter().map(|pool| &pool.name).collect();
    names.extend(
        after
            .pools
            .iter()
            .map(|pool| &pool.name)
            .filter(|name| before.pool(name).is_none()),
    );
    let fields = |config: &Config, name: &str| match config.pool(name).map(serde_json::to_value) {
        Some(Ok(Value::Object(fields))) => fields,
        _ => serde_json::Map::new(),
    };
    let mut changes = vec![];
    for name in names {
        let (old, new) = (fields(before, name), fields(after, name));
        let keys = if old.is_empty() { &new } else { &old };
        for key in keys.keys() {
            let of = |side: &serde_json::Map<_, _>| side.get(key).cloned().unwrap_or(Value::Null);
            if of(&old) != of(&new) {
                changes.push(Change {
                    path: format!("pools[{name}].{key}"),
                    before: of(&old),
                    after: of(&new),
                });
            }
        }
    }
    changes
}

const MAX_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use forebay_proto::config::Pool;

    use super::*;

    #[test]
    fn changes_name_the_setting_and_both_values() {
        let before = Config::default();
        let mut after = Config::default();
        after.pools[0].max_refusals = 5;
        let [change] = &changes(&before, &after)[..] else {
            panic!("one change expected")
        };
        assert_eq!(change.path, "pools[default].max_refusals");
        assert_eq!((&change.before, &change.after), (&2.into(), &5.into()));
        assert_eq!(changes(&before, &before), []);
    }

    #[test]
    fn a_pool_that_comes_or_goes_is_shown_with_all_settings() {
        let mut more = Config::default();
        more.pools.push(Pool::named("big"));
        let come = changes(&Config::default(), &more);
        assert!(
            come.iter()
                .all(|c| c.path.starts_with("pools[big].") && c.before.is_null())
        );
        let gone = changes(&more, &Config::default());
        assert!(gone.len() == come.len() && gone.iter().all(|c| c.after.is_null()));
    }
}
