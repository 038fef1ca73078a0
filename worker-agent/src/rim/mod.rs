//! The rim: sockets, files, tasks and clocks. What is decided is decided in the core.
#![allow(clippy::disallowed_methods)] // a rim: it runs the core on tokio's clock

pub(crate) mod config;
mod disk;
pub(crate) mod engine;
pub(crate) mod found;
mod lifecycle;
pub(crate) mod map;
mod metrics;
mod peers;
mod placement;
mod pool;
mod probe;
mod register;
mod render;
mod reports;
mod residency;

pub(crate) mod run;
mod seen;
mod tasks;
pub(crate) mod work;
