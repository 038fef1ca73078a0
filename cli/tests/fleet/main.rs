//! A fleet of real processes, as a newcomer starts it: used, hurt, and looked into.

// Helpers of a test fail as its assertions do, and measurements are printed beside them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    unreachable_pub
)]

mod audit;
mod check;
mod clients;
mod compare;
mod control_gone;
mod differential;
mod drain;
mod exact;
mod explain;
mod failures;
mod figures;
mod harness;
mod keys;
mod looking;
mod lost_disks;
mod many_balancers;
mod operators;
mod poison;
mod rebalance;
mod receipts;
mod secrets;
mod supervised;
mod transcripts;
