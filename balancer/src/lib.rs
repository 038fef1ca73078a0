//! The balancer: OpenAI's API in, a decision, one QUIC stream to a worker's agent out.
//!
//! [`core`] decides, without clocks or sockets: what a body asks for, whose key it is, who waits for
//! what, when to try again, and what each error looks like. The shell around it reads bodies, keeps
//! links, relays answers, and gives everything back when a client leaves: what a request took is
//! held by guards whose `Drop` returns it.
//!
//! [`run`] is the process. [`serve`] is the same without a control plane: facts are handed in.

mod admin;
mod asking;
mod attempt;
mod body;
mod connection;
mod control;
pub mod core;
mod events;
mod exchange;
mod fleet;
mod http;
mod links;
mod metrics;
mod prompt;
mod reload;
mod reply;
mod residency;
mod run;
mod serve;
mod shadow;
mod shared;
mod socket;
mod tls;

pub use crate::core::auth::{KeysError, count_keys};
pub use fleet::Fleet;
pub use run::{BalancerError, Bound, Config, Limits, Settings, run, serve};
pub use tls::{TlsError, TlsPaths};
