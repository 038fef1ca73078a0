//! The leader's loop: what the control plane does by itself.
//!
//! [`Controller::step`] looks at the facts and at what the leader has heard, and says what to
//! propose; it is pure. [`run`] carries that out on whichever node leads, through [`Leader`], which
//! the control node implements. Every proposal is checked again where it is applied, so a step made
//! from an old view can at worst be refused.

mod controller;
mod homes;
mod planner;
mod shell;

pub use controller::{Action, Controller};
pub use planner::Rebalancer;
pub use shell::{Leader, STEP_EVERY, run};
