//! All that decides, pure: what a balancer believes of its workers, how long a request would wait
//! on each, what it has booked, and which worker it picks.
//!
//! No clock, randomness, socket or task: `now` and the generator are arguments, so that the
//! simulator runs the same code.

pub mod fingerprint;
pub mod index;
pub mod json;
pub mod learn;
mod load;
pub mod model;
mod pick;
pub mod policy;
pub mod residency;
mod view;
mod wait;

pub use load::{Acceptance, Load, LoadError};
pub use pick::{Choice, NoChoice, Work};
pub use view::{BookingId, Known, View};
pub use wait::{Queueing, exceeds, first_token};
