//! Workers that do not answer hold up neither each other nor those that do.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{PATIENCE, World, loopback};
use forebay_proto::{Incarnation, Revision, WorkerId};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

/// More than may be dialled at once.
const SILENT: u32 = 40;
const AT_ONCE: usize = 16;

/// Names workers that listen and never answer before the one that does; returns when each was dialled.
async fn dials(world: &World) -> Vec<Instant> {
    let mut fleet = (**world.fleet.borrow().as_ref().unwrap()).clone();
    fleet.revision = Revision(fleet.revision.0 + 1);
    let (tell, mut told) = mpsc::unbounded_channel();
    for number in 0..SILENT {
        let socket = UdpSocket::bind(loopback()).await.unwrap();
        let mut known = fleet.workers[0].clone();
        known.name = format!("silent{number}");
        known.incarnation = Incarnation {
            worker: WorkerId(100 + number),
            grant: 1,
            start: 1,
        };
        known.spec.advertise = socket.local_addr().unwrap().to_string();
        fleet.workers.push(known);
        let tell = tell.clone();
        tokio::spawn(async move {
            socket.recv_from(&mut [0; 2_048]).await.unwrap();
            let _ = tell.send(Instant::now());
            // It stays bound: nobody is told that the port is free.
            std::future::pending::<()>().await;
        });
    }
    world.fleet.send_replace(Some(Arc::new(fleet)));
    let mut dialled = Vec::new();
    while dialled.len() < SILENT as usize {
        let next = tokio::time::timeout(PATIENCE, told.recv());
        dialled.push(next.await.expect("all are dialled").unwrap());
    }
    dialled
}

#[tokio::test]
async fn dials_take_turns_and_a_silent_worker_has_its_turn_for_a_moment_only() {
    let mut apart = Vec::new();
    // A busy machine may deliver together what was sent apart.
    for _ in 0..3 {
        let world = World::with(1).await;
        let began = Instant::now();
        let dialled = dials(&world).await;
        apart.push(dialled[AT_ONCE] - dialled[0]);
        let all = dialled[SILENT as usize - 1] - began;
        assert!(
            all < Duration::from_secs(3),
            "each is given two seconds: {all:?}"
        );
        assert_eq!(world.chat(false).await.status, 200);
        world.settles().await;
        if apart.last() > Some(&Duration::from_millis(150)) {
            return;
        }
    }
    panic!("more than {AT_ONCE} were dialled at once: {apart:?}");
}
