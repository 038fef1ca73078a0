//! What the parts of Forebay say to each other: ids, units, messages and frames.
//!
//! Every decode is bounded. There are no sockets and no policy here: `forebay-link` carries the
//! frames, and each crate that meets the messages turns them into its own types in one module.

pub mod config;
mod drain;
pub mod fleet;
pub mod frame;
mod home;
pub mod identity;
pub mod ids;
mod key;
pub mod refusal;
pub mod rpc;
pub mod secret;
pub mod suspect;
pub mod units;
pub mod wire;

/// Newest replicated feature that this build understands; a cell uses those that everyone in it
/// understands.
pub const FEATURE_LEVEL: u32 = 6;

pub use drain::{Drain, DrainId, DrainPhase, DrainedWorker, OnDeadline};
pub use home::{Family, Forecast, Move, Rebalance, RebalanceId, RebalancePhase, WorkerForecast};
pub use identity::{Identity, Level, Role};
pub use ids::{ClientId, ClusterId, Incarnation, NodeId, Revision, StoreId, WorkerId};
pub use key::FingerprintKey;
pub use secret::Secret;
pub use units::{Millis, Now};
