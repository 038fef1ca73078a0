//! The rim: sockets, files, tasks and clocks. What is decided is decided in the core.
#![allow(clippy::disallowed_methods)] // a rim: it runs the core on tokio's clock

mod aligner;
pub(crate) mod config;
mod disk;
pub(crate) mod engine;
mod event_metrics;
mod events;
pub(crate) mod follow;
pub(crate) mod found;
mod heat;
mod lifecycle;
pub(crate) mod map;
mod metrics;
mod peers;
mod placement;
mod pool;
mod post_mortem;
mod probe;
mod register;
mod render;
mod reports;
mod residency;

pub(crate) mod run;
mod seen;
pub(crate) mod sources;
mod tasks;
pub(crate) mod work;
