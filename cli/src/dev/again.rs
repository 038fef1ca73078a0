//! `forebay dev start`: has the supervisor start processes that died.
//!
//! The names go into a file of the data directory and the supervisor is sent SIGHUP; it takes the
//! file. Without one, SIGHUP means all.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use rustix::process::Signal;
use serde::Deserialize;

use super::{child, write_whole};
use crate::exit::{CliError, Exit};
use crate::output::say;

/// Options of `forebay dev start`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  forebay dev start c1 w2\n\nNames are those of run.json.")]
pub(super) struct StartArgs {
    /// Which; default: all that died.
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// The fleet's data directory.
    #[arg(long, value_name = "DIR", default_value = "forebay-data")]
    data_dir: PathBuf,
}

#[derive(Deserialize)]
struct Running {
    supervisor_pid: i32,
    processes: Vec<Process>,
}

#[derive(Deserialize)]
struct Process {
    name: String,
    pid: i32,
    running: bool,
}

/// Runs `forebay dev start`.
pub(super) fn run(args: &StartArgs) -> Result<(), CliError> {
    let until = Instant::now() + PATIENCE;
    loop {
        let now = read(&args.data_dir)?;
        let unknown = args
            .names
            .iter()
            .find(|name| !now.processes.iter().any(|process| process.name == **name));
        if let Some(name) = unknown {
            return Err(CliError::because(
                Exit::NotFound,
                format!("no process {name} in this fleet: look at run.json in the data directory"),
            ));
        }
        let wanted =
            |process: &&Process| args.names.is_empty() || args.names.contains(&process.name);
        let dead: Vec<&Process> = now
            .processes
            .iter()
            .filter(wanted)
            .filter(|process| !(process.running && is_alive(process.pid)))
            .collect();
        if dead.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = dead.iter().map(|process| process.name.as_str()).collect();
        if Instant::now() >= until {
            return Err(CliError::because(
                Exit::TimedOut,
                format!("{} did not start: look at the logs", names.join(", ")),
            ));
        }
        // One whose end the supervisor has not noticed yet is asked for again.
        if dead.iter().any(|process| !process.running) {
            write_whole(&args.data_dir.join(FILE), &names.join("\n"))?;
            child::signal(now.supervisor_pid, Signal::HUP);
            say(&format!("asked for {}", names.join(", ")));
        }
        std::thread::sleep(PAUSE);
    }
}

/// What SIGHUP asks the supervisor for; none means all.
pub(super) fn asked(dir: &Path) -> Option<Vec<String>> {
    let path = dir.join(FILE);
    let text = std::fs::read_to_string(&path).ok()?;
    let _ = std::fs::remove_file(path);
    Some(text.lines().map(str::to_owned).collect())
}

fn read(dir: &Path) -> Result<Running, CliError> {
    let path = dir.join(super::run_file::NAME);
    let none = || {
        CliError::because(
            Exit::NotFound,
            format!(
                "no `forebay dev` runs on {}: start one, or give its --data-dir",
                dir.display()
            ),
        )
    };
    let text = std::fs::read_to_string(&path).map_err(|_| none())?;
    let running: Running = serde_json::from_str(&text).map_err(|_| none())?;
    if is_alive(running.supervisor_pid) {
        Ok(running)
    } else {
        Err(none())
    }
}

/// Whether a process runs; a zombie does not.
fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    // The state follows the name, which is in parentheses and may hold any character.
    let state = stat
        .ok()
        .and_then(|stat| stat.rsplit_once(") ")?.1.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

const FILE: &str = "start-again";
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(asked(dir.path()), None);
        std::fs::write(dir.path().join(FILE), "c1\nw2").unwrap();
        assert_eq!(asked(dir.path()), Some(vec!["c1".into(), "w2".into()]));
        assert_eq!(asked(dir.path()), None);
    }

    #[test]
    fn we_are_alive_and_nobody_is_not() {
        assert!(is_alive(i32::try_from(std::process::id()).unwrap()));
        assert!(!is_alive(i32::MAX));
    }
}
