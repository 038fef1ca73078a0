//! What the agent decides: admission, the queue, the order of reports. Pure: `now` comes in, effects
//! come out.
//!
//! The rim calls a method for each thing that happens, then takes the effects until there are none,
//! and comes back with [`Core::expire`] at [`Core::next_deadline`] at the latest: what waits starts when
//! the engine is about to run dry, not only when something happens.

mod admission;
mod batch;
mod cache;
#[cfg(test)]
mod cache_events_tests;
mod cadence;
mod deaths;
mod heat;
#[cfg(test)]
mod heat_tests;
pub mod kv;
mod map;
mod mean;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod order_tests;
mod placement;
mod progress;
mod queue;
mod shadows;
mod standing;
mod starting;
mod state;
mod tenants;
#[cfg(test)]
mod tests;
mod work;

pub use admission::{Admitted, Offer, Question, Quote, RefusalReason, Refused};
pub use cache::{Continuity, GradeChange, Prompt};
pub use cadence::Cadence;
pub use deaths::{EngineDeath, Named};
pub use heat::Recorded;
pub use map::{MAX_MAP_BYTES, Map, MapError};
pub use placement::{Effect, End, Ending, PlacementId, Unstarted, Usage};
pub use progress::{Progress, Pulse};
pub use standing::{Standing, standing};
pub use state::{Core, EngineState, Settings};
pub use tenants::Tenants;
pub use work::Work;
