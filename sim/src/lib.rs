//! How we know it works: the emulated engine, real traces, and the replay that drives a fleet.
//!
//! - [`engine`]: an inference engine behind the OpenAI API whose text betrays a gap or a repeat.
//! - [`model`]: what such an engine does in which time, as a pure model.
//! - [`trace`]: reads request traces, and holds the sample that ships with Forebay.
//! - [`faults`]: the control plane in virtual time, with faults, and what must hold all the while.
//! - [`fleet`]: a fleet in virtual time, with the real decision and queue code.
//! - [`linear`]: whether a history could have come from one register.
//! - [`replay`]: sends a trace, open loop, to anything that speaks the OpenAI API, and measures it.
//!
//! Each is pure modules and a rim that owns sockets and clocks. Nothing here knows how Forebay
//! places requests: the replay sees a fleet as its clients do.

pub mod engine;
pub mod faults;
pub mod fleet;
pub mod linear;
pub mod model;
pub mod replay;
pub mod trace;
