//! `run.json`: who runs, for people and scripts that want to kill somebody.

use std::path::Path;

use serde::Serialize;

use super::material::Addresses;
use super::write_whole;
use crate::exit::CliError;

/// The file, whole.
#[derive(Debug, Serialize)]
pub(super) struct RunFile<'a> {
    pub(super) schema_version: u32,
    pub(super) supervisor_pid: u32,
    pub(super) processes: Vec<Process<'a>>,
}

/// One process that was started; one that died keeps its last pid.
#[derive(Debug, Serialize)]
pub(super) struct Process<'a> {
    pub(super) role: &'a str,
    pub(super) name: &'a str,
    pub(super) pid: i32,
    pub(super) running: bool,
    pub(super) addresses: &'a Addresses,
    pub(super) log: &'a Path,
    pub(super) command: Vec<String>,
    /// How it ended, when it did.
    pub(super) ended: Option<&'a str>,
}

impl RunFile<'_> {
    /// Replaces the file of a data directory.
    pub(super) fn write(&self, dir: &Path) -> Result<(), CliError> {
        let text = serde_json::to_string_pretty(self).expect("plain data serialises");
        write_whole(&dir.join(NAME), &(text + "\n"))
    }
}

/// Removes the file: nobody runs.
pub(super) fn remove(dir: &Path) {
    let _ = std::fs::remove_file(dir.join(NAME));
}

/// Its name in the data directory.
pub(super) const NAME: &str = "run.json";
