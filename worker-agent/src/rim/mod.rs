//! The rim: sockets, files, tasks and clocks. What is decided is decided in the core.
#![allow(clippy::disallowed_methods)] // a rim: it runs the core on tokio's clock

pub(crate) mod config;
mod disk;
pub(crate) mod engine;
mod heat;
pub(crate) mod map;
mod metrics;
mod placement;
mod pool;
mod probe;
mod register;
mod reports;
mod residency;

pub(crate) mod run;
mod tasks;
pub(crate) mod work;
