//! The layers of a role's options: flags, then `FOREBAY_*`, then a TOML file, then defaults.
//!
//! An option is declared once, as a clap argument. The keys of the file are the long names of the
//! arguments; what neither a flag nor the environment gave is taken from the file and parsed
//! again as if it had been a flag, so that one parser and one set of checks serve all layers.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory as _, FromArgMatches as _};

use crate::args::Cli;
use crate::exit::CliError;

/// The id of the argument with the file; its long name is `config`.
pub(crate) const FILE: &str = "config_file";

/// Why there is nothing to run.
#[derive(Debug)]
pub(crate) enum ParseError {
    /// What clap says: an error of usage, or help that was asked for.
    Clap(clap::Error),
    /// The config file is wrong.
    File(SettingsError),
}

/// What is wrong with a config file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    /// It cannot be read.
    #[error("cannot read the config {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// It is not TOML.
    #[error("{path} is not TOML: {problem}")]
    Toml {
        /// The file.
        path: PathBuf,
        /// Where and what.
        problem: String,
    },
    /// A key is not an option.
    #[error(
        "{path}: {key}: there is no such option; the keys are the long flags of `forebay {verb} --help`"
    )]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The role.
        verb: String,
    },
    /// A value has a form that no option takes.
    #[error("{path}: {key}: {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong.
        problem: String,
    },
}

/// Parses a command line, and the config file that it names.
pub(crate) fn parse(mut argv: Vec<OsString>) -> Result<Cli, ParseError> {
    let mut matches = Cli::command()
        .try_get_matches_from(&argv)
        .map_err(ParseError::Clap)?;
    let Some((path, added)) = from_file(&matches).map_err(ParseError::File)? else {
        return Cli::from_arg_matches(&matches).map_err(ParseError::Clap);
    };
    for (key, flags) in added {
        argv.extend(flags);
        // One key at a time, so that the file's error is told with its key.
        matches = Cli::command()
            .try_get_matches_from(&argv)
            .map_err(|error| {
                ParseError::File(SettingsError::Value {
                    path: path.clone(),
                    key,
                    problem: first_sentence(&error),
                })
            })?;
    }
    Cli::from_arg_matches(&matches).map_err(ParseError::Clap)
}

/// Flags by the key they come from.
type Added = Vec<(String, Vec<OsString>)>;

/// The file that was given and the flags that it adds.
fn from_file(matches: &ArgMatches) -> Result<Option<(PathBuf, Added)>, SettingsError> {
    let Some((verb, given)) = matches.subcommand() else {
        return Ok(None);
    };
    let Ok(Some(path)) = given.try_get_one::<PathBuf>(FILE) else {
        return Ok(None);
    };
    let mut whole = Cli::command();
    whole.build();
    let command = whole
        .find_subcommand(verb)
        .expect("clap matched this subcommand");
    Ok(Some((path.clone(), flags(path, command, given)?)))
}

/// What an option must have from one of its layers.
pub(crate) fn required<T>(name: &str, value: Option<T>) -> Result<T, CliError> {
    value.ok_or_else(|| {
        let variable = name.to_uppercase().replace('-', "_");
        CliError::usage(format!(
            "--{name} is missing: give it as a flag, as FOREBAY_{variable}, or as `{name}` in the --config file"
        ))
    })
}

/// The flags that the file adds, by key.
fn flags(path: &Path, command: &Command, given: &ArgMatches) -> Result<Added, SettingsError> {
    let text = std::fs::read_to_string(path).map_err(|error| SettingsError::Read {
        path: path.into(),
        error,
    })?;
    let table: toml::Table = toml::from_str(&text).map_err(|error| SettingsError::Toml {
        path: path.into(),
        problem: error.to_string().trim_end().into(),
    })?;
    let mut added = vec![];
    for (key, value) in &table {
        let argument = command
            .get_arguments()
            .find(|argument| argument.get_long() == Some(key) && argument.get_id() != FILE)
            .ok_or_else(|| SettingsError::Unknown {
                path: path.into(),
                key: key.clone(),
                verb: command.get_name().into(),
            })?;
        let flags = of_value(argument, key, value).map_err(|problem| SettingsError::Value {
            path: path.into(),
            key: key.clone(),
            problem,
        })?;
        if !is_given(argument, given) {
            added.push((key.clone(), flags));
        }
    }
    Ok(added)
}

fn is_given(argument: &Arg, given: &ArgMatches) -> bool {
    match given.value_source(argument.get_id().as_str()) {
        Some(ValueSource::DefaultValue) | None => false,
        Some(_) => true,
    }
}

fn of_value(argument: &Arg, key: &str, value: &toml::Value) -> Result<Vec<OsString>, String> {
    let flag = |text: &str| OsString::from(format!("--{key}={text}"));
    if matches!(argument.get_action(), ArgAction::SetTrue) {
        return match value {
            toml::Value::Boolean(true) => Ok(vec![format!("--{key}").into()]),
            toml::Value::Boolean(false) => Ok(vec![]),
            _ => Err("is a switch: use true or false".into()),
        };
    }
    match value {
        toml::Value::Array(values) => values.iter().map(|v| Ok(flag(&scalar(v)?))).collect(),
        toml::Value::Table(table) => table
            .iter()
            .map(|(name, v)| Ok(flag(&format!("{name}={}", scalar(v)?))))
            .collect(),
        value => Ok(vec![flag(&scalar(value)?)]),
    }
}

fn scalar(value: &toml::Value) -> Result<String, String> {
    match value {
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        toml::Value::Boolean(_)
        | toml::Value::Datetime(_)
        | toml::Value::Array(_)
        | toml::Value::Table(_) => Err("is no string or number, nor a list of them".into()),
    }
}

/// Clap's sentence without its usage lines.
fn first_sentence(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or("is not accepted");
    line.trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Verb;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    fn engine(file: &str, flags: &[&str]) -> Result<crate::roles::engine::EngineArgs, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("e.toml");
        std::fs::write(&path, file).unwrap();
        let mut argv: Vec<OsString> = vec!["forebay".into(), "engine".into()];
        argv.extend(flags.iter().map(OsString::from));
        argv.extend([OsString::from("--config"), path.into()]);
        match parse(argv) {
            Ok(Cli {
                verb: Verb::Engine(args),
            }) => Ok(args),
            Ok(_) => panic!("another verb"),
            Err(ParseError::Clap(error)) => Err(format!("clap: {error}")),
            Err(ParseError::File(error)) => Err(error.to_string()),
        }
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let args = engine(
            "slots = 7\nqueue = 3\nmodel = ['a', 'b']\n",
            &["--slots", "9"],
        )
        .unwrap();
        assert_eq!((args.slots, args.queue), (9, 3));
        assert_eq!(args.model, ["a", "b"]);
        assert_eq!(engine("", &[]).unwrap().slots, 256);
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told_with_its_key() {
        for (file, says) in [
            ("slot = 7\n", "slot: there is no such option"),
            ("slots = 'many'\n", "slots: invalid value"),
            ("slots = true\n", "slots: is no string or number"),
            ("config = 'x'\n", "config: there is no such option"),
            ("slots = \n", "is not TOML"),
        ] {
            let error = engine(file, &[]).unwrap_err();
            assert!(error.contains(says) && error.contains("e.toml"), "{error}");
        }
    }
}
