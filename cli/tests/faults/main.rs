//! Three control nodes as real processes, hurt in every way that this machine allows, while clients
//! write and read; then whether their history is that of one register a key.
//!
//! Each node is alone in a network namespace, joined to the others and to the clients by a bridge in a
//! namespace of its own, so that no fault reaches beyond this test. Without the right to make
//! namespaces the nodes are on loopback, and the faults of the network are left out, with a message.
//! `FOREBAY_FAULT_SECONDS` sets how long faults go on, `FOREBAY_FAULT_SEED` their order, and
//! `FOREBAY_FAULT_PROGRAM` what is run as `forebay`: a build with a bug has to fail here.

// Helpers of a test fail as its assertions do, and measurements are printed beside them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    unreachable_pub
)]

mod auditor;
mod cell;
mod clients;
mod faults;
mod history;
mod net;

use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::auditor::Auditor;
use crate::cell::Cell;
use crate::clients::Clients;
use crate::faults::Faults;

/// In this time after the last fault every client has written again, and all nodes know the same.
const SETTLED_WITHIN: Duration = Duration::from_secs(10);

#[test]
fn histories_stay_linearizable_while_processes_disks_and_networks_fail() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    let seconds: u64 = number("FOREBAY_FAULT_SECONDS").unwrap_or(40);
    let seed: u64 = number("FOREBAY_FAULT_SEED").unwrap_or_else(rand::random);
    println!("FOREBAY_FAULT_SECONDS={seconds} FOREBAY_FAULT_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);

    let mut cell = Cell::new();
    // After the cell has moved this thread to where the nodes are: threads begin where they are made.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        cell.found().await;
        let auditor = Auditor::start(&cell);
        let clients = Clients::start(&cell, &mut rng).await;
        let mut faults = Faults::new(rng);
        let until = Instant::now() + Duration::from_secs(seconds);
        faults.go_on(until, &mut cell).await;

        let healed = Instant::now();
        clients.all_write_again(SETTLED_WITHIN).await;
        println!(
            "all write again {:?} after the last fault",
            healed.elapsed()
        );
        let history = clients.stop().await;
        let level = cell.all_know_the_same(SETTLED_WITHIN).await;
        println!("all know the same: {level}");
        let entries = auditor.joined(&history.all_acknowledged()).await;
        println!("audit: {entries} entries, one for each command that had an outcome");
        println!("faults: {}", faults.told());
        let counts = history.counts();
        println!("operations: {counts}");
        let calls = history
            .check()
            .unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        println!("linearizable: {calls} calls of registers");
        assert!(
            counts.are_enough(),
            "the run says nothing: of {counts} fewer than half were answered"
        );
    });
    cell.nobody_panicked();
}
