//! `forebay docs` and `forebay completions`: what follows from the command line's own definition.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory as _, Subcommand};
use clap_complete::Shell;

use crate::args::Cli;
use crate::exit::CliError;
use crate::output::{result, say};

/// Options of `forebay docs`.
#[derive(Debug, Args)]
pub(crate) struct DocsArgs {
    #[command(subcommand)]
    page: Page,
}

#[derive(Debug, Subcommand)]
enum Page {
    /// Print docs/cli.md: the help of every verb.
    Cli,
    /// Write a manual page for every verb: forebay.1, forebay-status.1 and so on.
    #[command(
        after_help = "Example:\n  forebay docs man ~/.local/share/man/man1 && man forebay-drain"
    )]
    Man {
        /// Where to; made if needed. Pages that are there are replaced.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}

/// Options of `forebay completions`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay completions bash > ~/.local/share/bash-completion/completions/forebay\n  forebay completions zsh > ~/.zfunc/_forebay      # with ~/.zfunc in $fpath\n  forebay completions fish > ~/.config/fish/completions/forebay.fish"
)]
pub(crate) struct CompletionsArgs {
    /// For which shell.
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

/// Prints or writes pages.
pub(crate) fn run(args: &DocsArgs) -> Result<(), CliError> {
    match &args.page {
        Page::Cli => {
            result(&cli());
            Ok(())
        }
        Page::Man { dir } => man(dir),
    }
}

/// Prints a shell's completions.
pub(crate) fn completions(args: &CompletionsArgs) {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "forebay", &mut script);
    result(&String::from_utf8_lossy(&script));
}

fn man(dir: &Path) -> Result<(), CliError> {
    let wrong = |error| CliError::File {
        path: dir.into(),
        error,
    };
    std::fs::create_dir_all(dir).map_err(wrong)?;
    clap_mangen::generate_to(quiet(Cli::command()), dir).map_err(wrong)?;
    let pages = std::fs::read_dir(dir).map_err(wrong)?;
    let of_ours = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("forebay");
    let count = pages
        .flatten()
        .filter(|page| of_ours(&page.file_name()))
        .count();
    say(&format!("{count} manual pages are in {}", dir.display()));
    Ok(())
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
