//! The generated messages (see `proto/schema/`).
//!
//! They change for compatibility; the types in the other modules change for clarity.
#![allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]

/// Hello, incarnation, label.
pub mod common {
    include!(concat!(env!("OUT_DIR"), "/forebay.v1.rs"));
}
pub use common::{Hello, Incarnation, Label};

/// Mirror of raft-rs' messages.
pub mod raft {
    include!(concat!(env!("OUT_DIR"), "/forebay.v1.raft.rs"));
}

/// Facts and the commands that change them.
pub mod fleet {
    include!(concat!(env!("OUT_DIR"), "/forebay.v1.fleet.rs"));
}

/// RPCs of the control plane.
pub mod control {
    include!(concat!(env!("OUT_DIR"), "/forebay.v1.control.rs"));
}

/// Placements and load reports.
pub mod work {
    include!(concat!(env!("OUT_DIR"), "/forebay.v1.work.rs"));
}
