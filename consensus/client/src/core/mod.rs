//! What decides: pure, steppable, the same under a virtual clock.

pub mod error;
pub mod facts;
pub mod group;
pub mod init;
pub mod plan;
pub mod roster;
pub mod watch;
