//! Results on stdout, all else on stderr.

use std::io::Write as _;

use clap::{Args, ValueEnum};
use comfy_table::{Cell, Table, presets};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// How a result looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people; its form may change.
    #[default]
    Table,
    /// For programs: a contract, with a `schema_version`.
    Json,
    /// JSON, one line a document: of verbs that wait, progress first and the result last.
    Jsonl,
}

/// The option that every verb with a result has.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct OutputArgs {
    /// The form of the result on stdout.
    #[arg(long, short, value_enum, default_value_t = Output::Table, env = "FOREBAY_OUTPUT")]
    pub(crate) output: Output,
}

impl OutputArgs {
    /// Prints a result in the form that was asked for.
    pub(crate) fn print(self, value: &impl Serialize, table: impl FnOnce() -> String) {
        let text = match self.output {
            Output::Table => table(),
            Output::Json => {
                serde_json::to_string_pretty(value).expect("results have string keys only")
            }
            Output::Jsonl => return line(value),
        };
        result(&text);
    }
}

/// Prints a document on a line of its own to stdout.
pub(crate) fn line(value: &impl Serialize) {
    result(&serde_json::to_string(value).expect("results have string keys only"));
}

/// Prints a result to stdout. A reader that went away is no error.
pub(crate) fn result(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{}", text.trim_end());
    let _ = stdout.flush();
}

/// Prints a line for people to stderr.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// A table without lines: columns that both people and `awk` can read.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.map(Cell::new));
    for row in rows {
        table.add_row(row.map(|text| Cell::new(or_dash(text))));
    }
    let last = N.saturating_sub(1);
    for (number, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if number == last { 0 } else { 2 }));
    }
    let text = table.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.join("\n")
}

/// A moment, given in milliseconds since 1970: UTC, to the millisecond.
pub(crate) fn clock(at_ms: u64) -> String {
    let seconds = i64::try_from(at_ms / 1_000).unwrap_or(i64::MAX);
    let time = OffsetDateTime::from_unix_timestamp(seconds).ok();
    let text = time.and_then(|time| time.format(&Rfc3339).ok());
    let Some(text) = text else {
        return at_ms.to_string();
    };
    format!("{}.{:03}Z", text.trim_end_matches('Z'), at_ms % 1_000)
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_has_three_places() {
        assert_eq!(clock(1_795_975_585_710), "2026-11-29T18:06:25.710Z");
        assert_eq!(clock(5), "1970-01-01T00:00:00.005Z");
        assert_eq!(clock(u64::MAX), u64::MAX.to_string());
    }

    #[test]
    fn an_empty_cell_is_a_dash_and_no_line_ends_in_blanks() {
        let text = table(
            ["NAME", "ZONE"],
            [
                ["w1".to_owned(), String::new()],
                ["worker-2".to_owned(), "a".to_owned()],
            ],
        );
        assert_eq!(text, "NAME      ZONE\nw1        -\nworker-2  a");
    }
}
