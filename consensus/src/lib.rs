//! What the fleet agrees on: a Raft node, the fleet state machine, its storage and server.

pub mod backup;
pub mod bug;
pub mod fleet;
pub mod node;
pub mod probe;
pub mod replica;
pub mod server;
pub mod store;
