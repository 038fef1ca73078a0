//! Forebay in front of real engines: vLLM and llama.cpp's server, with a tiny model, on the CPU.
//!
//! `.ci/engines install` installs them; a test whose engine is missing is left out, and says so.

// Helpers of a test fail as its assertions do, and measurements are printed beside them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    unreachable_pub
)]

mod chats;
mod client;
mod exact;
mod exact_faults;
#[path = "../fleet/harness.rs"]
#[allow(dead_code)] // what other tests use of it
mod harness;
mod llama;
mod real;
mod together;
mod vllm;
