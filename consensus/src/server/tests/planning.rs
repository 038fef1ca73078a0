//! Plans: agents are asked for what they recorded, once each, and a planner makes of it what it can.

use std::sync::Arc;
use std::sync::mpsc;

use forebay_proto::Incarnation;
use parking_lot::Mutex;

use super::super::{Planner, Question};
use super::leases::{ask_on, incarnation_in, registration, renewal};
use super::*;
use wire::Observed;

/// Shows what it was asked, and says how many arrivals there were once it may.
struct Counting {
    asked: Mutex<Vec<Question>>,
    go: Mutex<mpsc::Receiver<()>>,
}

impl Planner for Counting {
    fn plan(&self, question: Question) -> control::Planned {
        let records = question.workers.iter().flat_map(|one| &one.record);
        let arrivals = records.map(|record| record.arrivals.len()).sum::<usize>();
        self.asked.lock().push(question);
        self.go.lock().recv().unwrap();
        control::Planned {
            before: Some(wire::Forecast {
                arrivals: u32::try_from(arrivals).unwrap(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

fn plan(pool: &str) -> Request {
    Request::Plan(control::Plan {
        pool: pool.into(),
        window_ms: 60_000,
        most_moves: 500,
        deadline_ms: 8_000,
    })
}

fn told(worker: forebay_proto::wire::Incarnation, wanted: u64, arrivals: usize) -> Request {
    Request::Arrivals(control::Arrivals {
        incarnation: Some(worker),
        wanted,
        arrivals: vec![control::Arrival::default(); arrivals],
        ..Default::default()
    })
}

impl Cell {
    /// A ready worker, and the link of its agent.
    fn ready(&mut self, name: &str) -> (Endpoint, Link, forebay_proto::wire::Incarnation) {
        let leader = self.leader();
        let (kept, link) = self.link_of(leader, Role::Agent, name);
        let registered = self.runtime.block_on(ask_on(&link, registration(name, 1)));
        let worker = incarnation_in(&registered);
        let renew = renewal(worker, Observed::Ready, 0);
        self.runtime.block_on(ask_on(&link, renew));
        self.within(PATIENCE, |cell| {
            let facts = cell.facts(leader);
            let worker = facts.workers.into_iter().find(|worker| worker.name == name);
            (worker.unwrap().observed() == Observed::Ready).then_some(())
        });
        (kept, link, worker)
    }

    /// What an agent is asked for.
    fn wanted(
        &mut self,
        link: &Link,
        worker: forebay_proto::wire::Incarnation,
    ) -> control::Renewed {
        let renew = renewal(worker, Observed::Ready, 0);
        match self.runtime.block_on(ask_on(link, renew)) {
            Response::Renewed(renewed) => renewed,
            other => panic!("{other:?}"),
        }
    }
}

fn failure(response: &Response) -> &Failure {
    match response {
        Response::Failure(failed) => failed.failure.as_ref().unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_plan_is_made_from_what_agents_recorded_and_who_says_nothing_is_named() {
    let mut cell = Cell::initialised(1);
    let (go, gone) = mpsc::channel();
    let planner = Arc::new(Counting {
        asked: Mutex::default(),
        go: Mutex::new(gone),
    });
    cell.leader();
    let early = cell.ask(0, plan("default"));
    assert!(
        matches!(failure(&early), Failure::BadRequest(_)),
        "no planner: {early:?}"
    );
    cell.controls[0]
        .as_ref()
        .unwrap()
        .plan_with(planner.clone());
    let unknown = cell.ask(0, plan("nowhere"));
    assert!(
        matches!(failure(&unknown), Failure::BadRequest(_)),
        "{unknown:?}"
    );

    let (_kept1, one, w1) = cell.ready("w1");
    let (_kept2, _two, _) = cell.ready("w2");
    assert_eq!(cell.wanted(&one, w1).wants_arrivals, 0, "no plan is made");
    let operator = cell.link(0, Role::Operator(Level::Viewer));
    let asked = operator.clone();
    let planned = cell
        .runtime
        .spawn(async move { ask_on(&asked, plan("default")).await });
    let wants = cell.within(PATIENCE, |cell| {
        let wants = cell.wanted(&one, w1);
        (wants.wants_arrivals > 0).then_some(wants)
    });
    assert_eq!((wants.window_ms, wants.most), (60_000, 1_200));
    // Another number says nothing, and more than was asked for is cut off.
    for (wanted, arrivals) in [(wants.wants_arrivals + 1, 3), (wants.wants_arrivals, 2_000)] {
        let taken = cell
            .runtime
            .block_on(ask_on(&one, told(w1, wanted, arrivals)));
        assert!(matches!(taken, Response::ArrivalsTaken(_)), "{taken:?}");
    }
    assert_eq!(
        cell.wanted(&one, w1).wants_arrivals,
        0,
        "once for each plan"
    );
    let second = cell.runtime.block_on(ask_on(&operator, plan("default")));
    assert!(
        matches!(failure(&second), Failure::Overloaded(_)),
        "{second:?}"
    );

    go.send(()).unwrap();
    let planned = match cell.runtime.block_on(planned).unwrap() {
        Response::Planned(planned) => planned,
        other => panic!("{other:?}"),
    };
    assert_eq!(planned.silent, ["w2"]);
    assert_eq!(planned.before.unwrap().arrivals, wants.most);
    assert_eq!(planned.revision, cell.facts(0).revision);
    let asked = planner.asked.lock();
    assert_eq!(asked.len(), 1);
    assert_eq!(
        (asked[0].pool.as_str(), asked[0].most_moves),
        ("default", 64)
    );
    let first = Incarnation::from_wire(Some(&w1)).unwrap().worker;
    assert_eq!(asked[0].workers[0].worker, first);
}

#[test]
fn an_agent_hands_over_records_of_its_own_worker_only() {
    let mut cell = Cell::initialised(1);
    let (_kept1, one, _) = cell.ready("w1");
    let (_kept2, _two, w2) = cell.ready("w2");
    let taken = cell.runtime.block_on(ask_on(&one, told(w2, 7, 1)));
    assert!(
        matches!(failure(&taken), Failure::BadRequest(_)),
        "{taken:?}"
    );
}
