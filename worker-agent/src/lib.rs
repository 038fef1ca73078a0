//! Beside each engine: register, admit, carry, report.
//!
//! [`core`] decides, without clocks or sockets: who is admitted, who waits, what is reported. The
//! rim carries that out: placements come in over QUIC ([`Work`]), go to the engine over HTTP, and
//! [`run`] keeps the worker registered with the control plane and follows what operators want of
//! it. The agent has the last word: balancers place by a view that may be old, here it is checked
//! against the real queue.
//!
//! Prompt and answer pass through and are kept nowhere.

mod adapter;
pub mod core;
mod error;
mod rim;
mod wire;

pub use adapter::Adapter;
pub use error::AgentError;
pub use rim::config::Config;
pub use rim::engine::{EngineAddress, EngineAddressError};
pub use rim::follow::{EventsAt, KvEvents, TokensOf};
pub use rim::found::EngineFacts;
pub use rim::map::MapFile;
pub use rim::run::run;
pub use rim::sources::{EndpointError, LocalEndpoint, Sources};
pub use rim::work::{Manner, Patience, Setup, Status, Work};
