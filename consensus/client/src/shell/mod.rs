//! The rim: sockets, the clock, the disk. What is decided, `core` decides.
#![allow(clippy::disallowed_methods)] // The shell is where tasks, timers and files are.

pub(crate) mod client;
pub(crate) mod facts_file;
mod group;
pub(crate) mod init;
mod links;
pub(crate) mod renew;
pub(crate) mod watch;
