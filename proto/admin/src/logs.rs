//! Logs to stderr, for a reader or for a machine.

use tracing_subscriber::EnvFilter;

/// The environment variable with the filter, in `tracing`'s syntax (`info,forebay_link=debug`).
pub const FILTER_VARIABLE: &str = "FOREBAY_LOG";

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// One readable line an event, in colour where stderr is a terminal.
    #[default]
    Human,
    /// One JSON object an event.
    Json,
}

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is no filter.
    #[error(
        "{FILTER_VARIABLE} is not a log filter: {0}; use a level (\"info\") or targets \
         (\"info,forebay_link=debug\")"
    )]
    Filter(String),
    /// A logger is set already.
    #[error("logging is set up already: call logs::init once a process")]
    Twice,
}

/// Sends the process's events to stderr: what `FOREBAY_LOG` lets through, or `info`.
///
/// # Errors
///
/// For a filter that does not parse, or when called twice.
pub fn init(format: Format) -> Result<(), LogError> {
    let filter = match std::env::var(FILTER_VARIABLE) {
        Ok(text) => EnvFilter::try_new(text).map_err(|e| LogError::Filter(e.to_string()))?,
        Err(std::env::VarError::NotPresent) => EnvFilter::new("info"),
        Err(e) => return Err(LogError::Filter(e.to_string())),
    };
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours);
    match format {
        Format::Human => builder.try_init(),
        Format::Json => builder.json().try_init(),
    }
    .map_err(|_| LogError::Twice)
}
