//! The admin side of a process: health, metrics, logs and hygiene.
//!
//! Every role serves the same few pages on a port that clients never see ([`serve`]), keeps its
//! latencies in the same [`Histogram`], logs through [`logs::init`] and starts with
//! [`no_core_dumps`] and [`quiet_panics`], because a core file or a panic message may hold a
//! prompt. Nothing here knows what a role does.

mod histogram;
mod hygiene;
pub mod logs;
mod server;

pub use histogram::Histogram;
pub use hygiene::{HygieneError, no_core_dumps, quiet_panics};
pub use server::{Admin, Content, Find, NotFound, Page, Search, ServeError, serve};

/// The metrics library that [`Admin::registry`] belongs to.
pub use prometheus_client;
