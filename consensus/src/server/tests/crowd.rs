//! Many callers at once, and one that asks for too much.

use super::leases::{ask_on, incarnation_in, registration, renewal};
use super::*;
use crate::server::callers::{MAX_LINKS, MAX_STREAMS};
use wire::Observed;

const AGENTS: usize = 200;

#[test]
fn two_hundred_agents_at_once_delay_no_write_for_long_and_depose_nobody() {
    let mut cell = Cell::initialised(3);
    let leader = cell.leader();
    let term = cell.status(leader).term;
    let agents: Vec<_> = (0..AGENTS)
        .map(|number| {
            let name = format!("w{number}");
            (cell.link_of(leader, Role::Agent, &name), name)
        })
        .collect();
    let began = Instant::now();
    let mut crowd = tokio::task::JoinSet::new();
    for ((_, link), name) in &agents {
        let (link, name) = (link.clone(), name.clone());
        crowd.spawn_on(
            async move {
                let worker = incarnation_in(&ask_on(&link, registration(&name, 1)).await);
                for state in [Observed::Ready, Observed::Cordoned, Observed::Ready] {
                    let taken = ask_on(&link, renewal(worker, state, 1_000_000)).await;
                    assert!(matches!(taken, Response::Renewed(_)), "{taken:?}");
                }
            },
            cell.runtime.handle(),
        );
    }
    let (mut held, mut slowest) = (0, Duration::ZERO);
    for number in 1..=10 {
        let asked = Instant::now();
        let pools = ["[[pools]]\nname = \"default\"\n", TWO_POOLS][number as usize % 2];
        held = revision(&cell.apply_config(leader, number, pools, held));
        slowest = slowest.max(asked.elapsed());
    }
    let runtime = cell.runtime.handle().clone();
    runtime.block_on(async {
        while let Some(done) = crowd.join_next().await {
            done.unwrap();
        }
    });
    println!(
        "{AGENTS} agents in {:?}, slowest write {slowest:?}",
        began.elapsed()
    );
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    let status = cell.status(leader);
    assert_eq!((status.role.as_str(), status.term), ("leader", term));
    cell.within(PATIENCE, |cell| {
        let facts = cell.facts((leader + 1) % 3);
        let ready = facts.workers.iter();
        let ready = ready.filter(|worker| worker.observed == i32::from(Observed::Ready));
        (ready.count() == AGENTS).then_some(())
    });
}

#[test]
fn a_caller_with_too_many_streams_is_refused_and_others_are_not() {
    let mut cell = Cell::initialised(1);
    cell.leader();
    let (_kept, greedy) = cell.link_of(0, Role::Agent, "greedy");
    let (_kept, modest) = cell.link_of(0, Role::Agent, "modest");
    let probe = || Request::Probe(control::Probe {});
    cell.runtime.block_on(async {
        let mut held = Vec::new();
        for _ in 0..MAX_STREAMS {
            let (mut send, recv) = greedy.open().unwrap();
            let watch = Request::Watch(control::Watch::default());
            let request = control::Request {
                request: Some(watch),
            };
            let frame = Frame::message(Kind::Request, &request);
            send.send(&frame).await.unwrap();
            held.push((send, recv));
        }
        for (_, recv) in &mut held {
            recv.recv().await.unwrap().unwrap();
        }
        let refused = ask_on(&greedy, probe()).await;
        assert!(
            matches!(&refused, Response::Failure(f) if matches!(f.failure, Some(Failure::Overloaded(_)))),
            "{refused:?}"
        );
        assert!(matches!(ask_on(&modest, probe()).await, Response::Status(_)));
        drop(held);
        let until = Instant::now() + PATIENCE;
        while !matches!(ask_on(&greedy, probe()).await, Response::Status(_)) {
            assert!(Instant::now() < until, "streams are given back");
        }
    });
}

#[test]
fn the_oldest_link_of_a_caller_gives_way_to_a_new_one() {
    let mut cell = Cell::initialised(1);
    cell.leader();
    let links: Vec<_> = (0..=MAX_LINKS)
        .map(|_| cell.link_of(0, Role::Balancer, "b1"))
        .collect();
    cell.runtime.block_on(async {
        let closed = tokio::time::timeout(PATIENCE, links[0].1.closed()).await;
        assert!(closed.is_ok(), "the oldest is closed");
        let newest = &links[MAX_LINKS].1;
        let probe = Request::Probe(control::Probe {});
        assert!(matches!(ask_on(newest, probe).await, Response::Status(_)));
        assert!(links[1].1.close_reason().is_none());
    });
}
