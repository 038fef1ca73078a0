//! All that decides, pure: what a balancer believes of its workers, how long a request would wait
//! on each, what it has booked, and which worker it picks.
//!
//! No clock, randomness, socket or task: `now` and the generator are arguments, so that the
//! simulator runs the same code.

pub mod asking;
pub mod blame;
pub mod fingerprint;
pub mod heat;
pub mod homes;
pub mod index;
pub mod json;
pub mod learn;
pub mod length;
mod lineup;
mod load;
pub mod model;
mod narrow;
mod pick;
pub mod policy;
pub mod rebalance;
mod receipt;
pub mod residency;
mod standing;
mod terms;
mod view;
mod wait;
mod worker;

pub use lineup::{Lineup, NOMINAL_TARGET, second_chance_ms};
pub use load::{Acceptance, Load, LoadError};
pub use pick::{Choice, Draws, NoChoice, Work};
pub use receipt::{
    Asked, Considered, Filtered, MOST_CONSIDERED, Outcome, Packed, Receipt, Versions,
};
pub use terms::Terms;
pub use view::View;
pub use wait::{Queueing, exceeds, first_token};
pub use worker::{BookingId, Known};
