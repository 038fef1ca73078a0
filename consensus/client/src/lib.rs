//! The control plane as its users see it: ask the leader, keep a lease, follow the facts.
//!
//! [`core`] decides, without clocks or sockets: which node to ask next and when to hedge
//! ([`core::plan`]), what the facts are ([`core::facts`]) and which node to watch
//! ([`core::watch`]). The shell carries that out over `forebay-link`: [`ControlClient`] and what it
//! spawns.

pub mod core;
mod shell;

pub use crate::core::error::{ClientError, NodeError, Tried};
pub use crate::core::facts::{Facts, FactsError, WorkerFact};
pub use crate::core::group::{AddError, Group};
pub use crate::core::init::InitError;
pub use crate::core::watch::WatchProblem;
pub use shell::client::{ControlClient, Done};
pub use shell::facts_file::{FactsFile, FactsFileError};
pub use shell::init::Initialised;
pub use shell::renew::{RenewState, RenewStatus, Renewing, Wanted};
pub use shell::watch::{WatchStatus, Watching};
