//! The queues and bookings of `dispatch` as claims, without sockets.

use std::time::Duration;

use forebay_proto::Revision;
use forebay_proto::config::Config;
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::Desired;
use forebay_scheduler::{Acceptance, Known, Outcome};
use rand::SeedableRng;

use super::*;

const NOW: Now = Now::at(Duration::from_secs(1));

/// Workers `w1..` of one slot each, with these models, connected and idle.
struct World {
    dispatch: Dispatch<u32, &'static str>,
    seq: u64,
}

fn incarnation(worker: u32, start: u32) -> Incarnation {
    Incarnation {
        worker: WorkerId(worker),
        grant: 1,
        start,
    }
}

impl World {
    fn new(models: &[&str]) -> Self {
        let workers = models.iter().zip(1..).map(|(model, id)| Known {
            name: format!("w{id}"),
            incarnation: incarnation(id, 1),
            spec: WorkerSpec {
                pool: "default".into(),
                advertise: "127.0.0.1:1".into(),
                engine: String::new(),
                models: vec![(*model).into()],
                revision: String::new(),
                gpu_type: String::new(),
                gpu_count: 0,
                kv_tokens: 0,
                max_context_tokens: 0,
                adapters: Vec::new(),
                zone: String::new(),
                labels: BTreeMap::new(),
                slots: 1,
            },
            desired: Desired::Ready,
            departed: false,
        });
        let fleet = Fleet {
            revision: Revision(1),
            workers: workers.collect(),
            config: Config::default(),
            keys: Vec::new(),
            families: Vec::new(),
            suspects: Vec::new(),
            cell_time: forebay_proto::Millis(0),
        };
        let mut world = Self {
            dispatch: Dispatch::new(StdRng::seed_from_u64(1), true),
            seq: 0,
        };
        world.dispatch.facts(&fleet);
        for id in (1..).take(models.len()) {
            world.connect(id, 1);
        }
        world
    }

    fn connect(&mut self, id: u32, start: u32) -> LinkNumber {
        let name = format!("w{id}").into();
        let number = self
            .dispatch
            .connected(NOW, incarnation(id, start), &name, id)
            .unwrap();
        self.seq += 1;
        let load = Load {
            incarnation: incarnation(id, start),
            seq: self.seq,
            acceptance: Acceptance::Open,
            running: 0,
            queued: 0,
            slots: 1,
            queue_limit: 0,
            service: Duration::ZERO,
            facts_revision: Revision(1),
            interval: Duration::from_secs(1),
            backlog: Default::default(),
            model: None,
            residuals: forebay_scheduler::model::Residuals::default(),
        };
        assert!(self.dispatch.report(NOW, load));
        number
    }

    fn ask(&mut self, model: &str, tried: &[Incarnation]) -> Ask {
        Ask {
            ticket: self.dispatch.arrive(),
            pool: "default".into(),
            model: model.into(),
            tried: tried.to_vec(),
            answers: Vec::new(),
            sought: Arc::default(),
        }
    }

    fn place(&mut self, model: &str) -> Option<Placed<u32>> {
        let ask = self.ask(model, &[]);
        self.dispatch.place(NOW, &ask).ok()
    }

    fn wait(&mut self, name: &'static str, model: &str) -> Ask {
        let ask = self.ask(model, &[]);
        assert!(self.dispatch.enqueue(ask.clone(), name, 10));
        ask
    }

    fn matched(&mut self) -> Vec<&'static str> {
        let matched = self.dispatch.matches(NOW);
        matched.into_iter().map(|(name, _)| name).collect()
    }
}

#[test]
fn who_answered_is_preferred_as_long_as_it_takes_anything() {
    let mut world = World::new(&["m", "m", "m"]);
    let mut ask = world.ask("m", &[]);
    let mut best = world.dispatch.best(NOW, &ask);
    best.sort_unstable();
    let all: Vec<_> = (0..4).map(|id| (WorkerId(id), id)).skip(1).collect();
    assert_eq!(
        best,
        all[..best.len()],
        "each that can be asked, with its link"
    );
    ask.answers = vec![(WorkerId(2), 100)];
    let placed = world.dispatch.place(NOW, &ask).ok().unwrap();
    assert_eq!(placed.link, 2);
    // It has one slot, which is taken now.
    let placed = world.dispatch.place(NOW, &ask).ok().unwrap();
    assert_ne!(placed.link, 2);
}

#[test]
fn what_a_worker_says_of_a_prompt_counts_for_more_than_the_index() {
    let hit = |worker, tokens| Hit {
        worker: WorkerId(worker),
        chunks: 1,
        tokens,
    };
    let sought = Sought {
        hits: vec![hit(1, 10), hit(2, 20)],
        ..Sought::default()
    };
    assert_eq!(sought.corrected(&[]), None);
    let said = sought
        .corrected(&[(WorkerId(3), 30), (WorkerId(2), 0)])
        .unwrap();
    let said: Vec<_> = said.iter().map(|hit| (hit.worker.0, hit.tokens)).collect();
    assert_eq!(said, [(1, 10), (2, 0), (3, 30)]);
}

#[test]
fn waiters_go_in_the_order_of_arrival_and_nobody_overtakes() {
    let mut world = World::new(&["m"]);
    let running = world.place("m").unwrap();
    let back = world.ask("m", &[]);
    world.wait("second", "m");
    world.wait("third", "m");
    assert_eq!(world.matched(), [""; 0]);
    assert!(
        world
            .dispatch
            .enqueue(back, "first, back after a refusal", 10)
    );
    world.dispatch.released(running.booking, None);
    assert!(world.place("m").is_none(), "those who wait come first");
    assert_eq!(world.matched(), ["first, back after a refusal"]);
    assert_eq!(world.dispatch.waiting(), 2);
}

#[test]
fn one_model_without_room_does_not_hold_up_another() {
    let mut world = World::new(&["a", "b"]);
    let _a = world.place("a").unwrap();
    world.wait("a", "a");
    world.wait("b", "b");
    assert_eq!(world.matched(), ["b"]);
}

#[test]
fn the_queue_is_bounded_and_can_be_left() {
    let mut world = World::new(&["m"]);
    let _running = world.place("m").unwrap();
    let one = world.ask("m", &[]);
    let other = world.ask("m", &[]);
    assert!(world.dispatch.enqueue(one.clone(), "one", 1));
    assert!(!world.dispatch.enqueue(other.clone(), "other", 1));
    world.dispatch.leave(&one.pool, one.ticket);
    assert_eq!(world.dispatch.waiting(), 0);
    assert!(!world.dispatch.enqueue(other, "other", 0));
    assert!(world.dispatch.queues.is_empty());
}

#[test]
fn a_worker_that_failed_is_not_asked_again_but_its_next_start_is() {
    let mut world = World::new(&["m"]);
    let ask = world.ask("m", &[incarnation(1, 1)]);
    assert!(world.dispatch.place(NOW, &ask).is_err());
    world.connect(1, 2);
    let placed = world.dispatch.place(NOW, &ask).ok().unwrap();
    assert_eq!(placed.choice.incarnation, incarnation(1, 2));
}

#[test]
fn a_start_that_the_facts_declare_dead_is_named() {
    let mut world = World::new(&["m"]);
    let (known, ..) = world.dispatch.view().iter().next().unwrap();
    let newer = Known {
        incarnation: incarnation(1, 2),
        ..known.clone()
    };
    let fleet = Fleet {
        revision: Revision(2),
        workers: vec![newer],
        config: Config::default(),
        keys: Vec::new(),
        families: Vec::new(),
        suspects: Vec::new(),
        cell_time: forebay_proto::Millis(0),
    };
    assert_eq!(world.dispatch.facts(&fleet), [1]);
}

#[test]
fn a_worker_that_was_removed_is_dead_as_well() {
    let mut world = World::new(&["m"]);
    let fleet = Fleet {
        revision: Revision(2),
        workers: Vec::new(),
        config: Config::default(),
        keys: Vec::new(),
        families: Vec::new(),
        suspects: Vec::new(),
        cell_time: forebay_proto::Millis(0),
    };
    assert_eq!(world.dispatch.facts(&fleet), [1]);
}

#[test]
fn who_waits_behind_others_is_told_at_once_when_nobody_is_left_to_wait_for() {
    let mut world = World::new(&["m"]);
    let _running = world.place("m").unwrap();
    world.wait("first", "m");
    let second = world.wait("second", "m");
    let why = world.dispatch.place(NOW, &second).err();
    assert_eq!(why, Some(NoChoice::Busy));
    let number = world.connect(1, 1);
    world.dispatch.disconnected(incarnation(1, 1), number);
    let why = world.dispatch.place(NOW, &second).err();
    assert_eq!(why, Some(NoChoice::NoCapacity));
}

#[test]
fn an_end_that_comes_late_does_not_take_the_next_link_down() {
    let mut world = World::new(&["m"]);
    let first = world.connect(1, 1);
    let second = world.connect(1, 1);
    world.dispatch.disconnected(incarnation(1, 1), first);
    assert!(world.place("m").is_some());
    world.dispatch.disconnected(incarnation(1, 1), second);
    assert!(world.place("m").is_none());
}

#[test]
fn a_placement_has_its_receipt_and_what_waits_has_none() {
    let mut world = World::new(&["m", "m", "m"]);
    for id in ["r1", "r2", "r3", "r4"] {
        let mut ask = world.ask("m", &[]);
        ask.sought = Arc::new(Sought {
            request_id: id.into(),
            index_version: 7,
            ..Sought::default()
        });
        let placed = world.dispatch.place(NOW, &ask);
        assert_eq!(placed.is_ok(), id != "r4", "the fleet has three slots");
        let Ok(placed) = placed else {
            continue;
        };
        assert_eq!(&*placed.request_id, id);
        let receipt = placed.receipt.unwrap();
        assert_eq!(receipt.versions.facts_revision, Revision(1));
        assert_eq!(receipt.versions.index_version, 7);
        assert_eq!(receipt.replay(), Some(receipt.outcome));
    }
}

#[test]
fn what_if_books_nothing_and_takes_no_turn() {
    let mut world = World::new(&["m", "m"]);
    let ask = world.ask("m", &[]);
    assert!(world.place("m").is_some());
    for _ in 0..3 {
        let receipt = world.dispatch.what_if(NOW, &ask);
        assert!(matches!(receipt.outcome, Outcome::Chosen(_)), "{receipt:?}");
        assert_eq!(world.dispatch.view().open_bookings(None), 1);
    }
    assert!(world.place("m").is_some());
    let receipt = world.dispatch.what_if(NOW, &ask);
    assert_eq!(receipt.outcome, Outcome::Nobody(NoChoice::Busy));
}

#[test]
fn unless_it_is_asked_for_no_receipt_is_made() {
    let mut world = World::new(&["m"]);
    world.dispatch.explains = false;
    assert!(world.place("m").unwrap().receipt.is_none());
}
