//! `forebay docs`: pages of the documentation that follow from the code.

use std::fmt::Write as _;

use clap::{Args, Command, CommandFactory as _, ValueEnum};

use crate::args::Cli;
use crate::output::result;

/// Options of `forebay docs`.
#[derive(Debug, Args)]
pub(crate) struct DocsArgs {
    /// Which page.
    #[arg(value_enum)]
    page: Page,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Page {
    /// docs/cli.md: the help of every verb.
    Cli,
}

/// Prints a page.
pub(crate) fn run(args: &DocsArgs) {
    match args.page {
        Page::Cli => result(&cli()),
    }
}

fn cli() -> String {
    let mut page = String::from(HEAD);
    // The same page whoever writes it: neither their environment nor their terminal shows.
    let mut whole = quiet(Cli::command().term_width(WIDTH));
    whole.build();
    help(&mut whole, &mut page);
    page
}

fn quiet(command: Command) -> Command {
    command
        .mut_args(|argument| argument.hide_env_values(true))
        .mut_subcommands(quiet)
}

fn help(command: &mut Command, page: &mut String) {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let _ = write!(page, "\n## {name}\n\n```text\n");
    for line in command.render_long_help().to_string().trim_end().lines() {
        let _ = writeln!(page, "{}", line.trim_end());
    }
    page.push_str("```\n");
    for verb in command.get_subcommands_mut() {
        if !verb.is_hide_set() && verb.get_name() != "help" {
            help(verb, page);
        }
    }
}

const WIDTH: usize = 100;
const HEAD: &str = "\
# The command line

What `--help` says, verb by verb. Written by `cargo run -q -- docs cli > docs/cli.md`; a test fails when
it differs from the code.
";
