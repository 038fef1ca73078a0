//! The processes of a fleet, in the foreground: one file a role, from options to its shell.
//!
//! A role logs one line at `info` when it is up, writes nothing to stdout, and stops gracefully on
//! SIGTERM or SIGINT.

pub(crate) mod agent;
pub(crate) mod balancer;
pub(crate) mod control;
pub(crate) mod engine;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use crate::exit::{CliError, Exit};

/// The environment variable with the form of log lines.
pub(crate) const LOG_FORMAT_VARIABLE: &str = "FOREBAY_LOG_FORMAT";

/// What every role takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Process")]
pub(crate) struct ProcessArgs {
    /// TOML file with options: the keys are the long flags. Flags and FOREBAY_* win over it.
    #[arg(id = crate::settings::FILE, long = "config", value_name = "FILE", env = "FOREBAY_CONFIG")]
    #[allow(dead_code)] // read by `settings` before the options are built
    file: Option<PathBuf>,
    /// The form of log lines on stderr. Which lines there are is up to FOREBAY_LOG: a level or
    /// targets, such as warn or info,forebay_link=debug; default: info. That a process is ready is
    /// told at info, so warn hides it: ask /readyz on --admin instead.
    #[arg(long, value_name = "FORM", value_enum, default_value_t = LogFormat::Human, env = LOG_FORMAT_VARIABLE)]
    log_format: LogFormat,
    /// Die when the process with this id, our parent, dies.
    #[arg(long, hide = true, env = "FOREBAY_PARENT_PID")]
    parent_pid: Option<i32>,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// For people.
    Human,
    /// For programs.
    Json,
}

impl ProcessArgs {
    /// Makes the process a role: tied to its supervisor, without core dumps, with logs.
    pub(crate) fn enter(&self) -> Result<(), CliError> {
        if let Some(parent) = self.parent_pid {
            die_with(parent)?;
        }
        forebay_admin::no_core_dumps()?;
        forebay_admin::logs::init(match self.log_format {
            LogFormat::Human => forebay_admin::logs::Format::Human,
            LogFormat::Json => forebay_admin::logs::Format::Json,
        })?;
        Ok(())
    }
}

/// Ties our life to our parent's: it is told to the kernel, then checked against the race.
fn die_with(parent: i32) -> Result<(), CliError> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|error| CliError::System {
        what: "cannot tie this process to its supervisor",
        error: error.into(),
    })?;
    if getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(parent) {
        return Err(CliError::because(
            Exit::Failed,
            "the supervisor is gone: start it again",
        ));
    }
    Ok(())
}

/// A runtime on all cores.
pub(crate) fn threads() -> Result<Runtime, CliError> {
    build(&mut Builder::new_multi_thread())
}

/// A runtime on this thread.
pub(crate) fn thread() -> Result<Runtime, CliError> {
    build(&mut Builder::new_current_thread())
}

fn build(builder: &mut Builder) -> Result<Runtime, CliError> {
    builder
        .enable_all()
        .build()
        .map_err(|error| CliError::System {
            what: "cannot start threads",
            error,
        })
}

/// Ends when the process is asked to stop.
///
/// # Errors
///
/// When signals cannot be listened to; the process must not start then.
pub(crate) fn asked_to_stop() -> Result<impl Future<Output = ()> + Send + 'static, CliError> {
    let listen = |kind| {
        signal(kind).map_err(|error| CliError::System {
            what: "cannot listen to signals",
            error,
        })
    };
    let (mut term, mut int) = (
        listen(SignalKind::terminate())?,
        listen(SignalKind::interrupt())?,
    );
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::info!("stopping");
    })
}
