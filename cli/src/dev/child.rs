//! One process of the fleet: how it is started, what it leaves behind.

use std::fs::OpenOptions;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use super::DevError;
use super::material::Addresses;

/// How to run one process.
#[derive(Debug)]
pub(super) struct Plan {
    /// What it is.
    pub(super) role: &'static str,
    /// Which one.
    pub(super) name: String,
    /// Its options.
    pub(super) config: PathBuf,
    /// What it writes.
    pub(super) log: PathBuf,
    /// Where it is found.
    pub(super) addresses: Addresses,
}

impl Plan {
    /// The command line, as somebody could type it.
    pub(super) fn argv(&self, exe: &Path) -> Vec<String> {
        vec![
            exe.display().to_string(),
            self.role.into(),
            "--config".into(),
            self.config.display().to_string(),
        ]
    }

    /// Starts it. The child dies with the thread that calls this.
    pub(super) fn start(&self, exe: &Path) -> Result<Child, DevError> {
        let wrong = |error| DevError::Spawn {
            name: self.name.clone(),
            error,
        };
        let log = open_log(&self.log).map_err(wrong)?;
        let mut command = Command::new(exe);
        command
            .args([self.role, "--config"])
            .arg(&self.config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(wrong)?)
            .stderr(log)
            // Ctrl-C is for the supervisor, which stops the others in order.
            .process_group(0)
            .kill_on_drop(true);
        // Our environment is not theirs: their options come from their files.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("FOREBAY_") && !PASSED_ON.contains(&&*text) {
                command.env_remove(name);
            }
        }
        command.env("FOREBAY_PARENT_PID", std::process::id().to_string());
        command.spawn().map_err(wrong)
    }
}

fn open_log(path: &Path) -> std::io::Result<std::fs::File> {
    if path.metadata().is_ok_and(|meta| meta.len() > MAX_LOG_BYTES) {
        std::fs::rename(path, path.with_extension("log.1"))?;
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// Sends a signal; a process that is gone already is no error.
pub(super) fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, signal);
    }
}

/// How a process ended, in words.
pub(super) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

/// The last lines of a log.
pub(super) fn tail(path: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = vec![];
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_else(|error| format!("({error})"));
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(TAIL_LINES);
    let shown: Vec<String> = lines[from..]
        .iter()
        .map(|line| format!("  {line}"))
        .collect();
    shown.join("\n")
}

/// What is for all of them.
const PASSED_ON: [&str; 2] = [
    forebay_admin::logs::FILTER_VARIABLE,
    crate::roles::LOG_FORMAT_VARIABLE,
];
const MAX_LOG_BYTES: u64 = 16 << 20;
const TAIL_BYTES: u64 = 8 << 10;
const TAIL_LINES: usize = 20;
