//! What the leader's loop proposes, step by step.

use forebay_proto::wire::control;
use forebay_proto::wire::fleet::Observed;
use forebay_proto::{Identity, Role, WorkerId};

use super::*;

/// Workers `w1`, `w2`, … of pool `p`, their leases, and the loop.
struct World {
    controller: Controller,
    leases: Leases,
    facts: wire::Facts,
    members_level: u32,
}

fn at(ms: u64) -> Now {
    Now::at(Duration::from_millis(ms))
}

fn incarnation(worker: u32) -> Incarnation {
    Incarnation {
        worker: WorkerId(worker),
        grant: 1,
        start: 0,
    }
}

fn a_key() -> wire::KeyRing {
    wire::KeyRing {
        keys: vec![wire::FingerprintKey {
            epoch: 1,
            key: vec![7; 16].into(),
        }],
    }
}

fn spec(profile: Option<&str>) -> bytes::Bytes {
    let said = profile.map(|profile| ("render-profile".to_owned(), profile.to_owned()));
    let spec = WorkerSpec {
        pool: "p".into(),
        advertise: "h:1".into(),
        engine: String::new(),
        models: vec!["m".into()],
        revision: String::new(),
        gpu_type: String::new(),
        gpu_count: 0,
        kv_tokens: 0,
        max_context_tokens: 0,
        adapters: vec![],
        zone: String::new(),
        labels: said.into_iter().collect(),
        slots: 1,
    };
    spec.to_wire()
}

impl World {
    fn new(workers: u32) -> Self {
        let mut leases = Leases::default();
        let known = (1..=workers).map(|i| (format!("w{i}"), incarnation(i)));
        leases.became_leader(at(0), known);
        let workers = (1..=workers).map(|id| wire::Worker {
            id,
            name: format!("w{id}"),
            incarnation: Some(incarnation(id).to_wire()),
            spec: spec(None),
            ..Default::default()
        });
        Self {
            controller: Controller::default(),
            leases,
            facts: wire::Facts {
                workers: workers.collect(),
                keys: Some(a_key()),
                feature_level: 1,
                ..Default::default()
            },
            members_level: 1,
        }
    }

    fn renew(&mut self, ms: u64, workers: impl IntoIterator<Item = u32>) {
        self.renew_at_level(ms, workers, 1);
    }

    fn renew_with(&mut self, ms: u64, id: u32, heat: Option<control::Heat>) {
        self.renewal(ms, id, 1, heat);
    }

    fn renew_at_level(&mut self, ms: u64, workers: impl IntoIterator<Item = u32>, level: u32) {
        for id in workers {
            self.renewal(ms, id, level, None);
        }
    }

    fn renewal(&mut self, ms: u64, id: u32, level: u32, heat: Option<control::Heat>) {
        let who = Identity {
            trust_domain: "td".into(),
            role: Role::Agent,
            name: format!("w{id}"),
        };
        let renew = control::Renew {
            incarnation: Some(incarnation(id).to_wire()),
            applied_revision: 9,
            observed: Observed::Ready.into(),
            feature_level: level,
            work: None,
            heat,
        };
        self.leases.renewed(at(ms), &who, &renew).unwrap();
    }

    /// What the step proposes, as text; the facts then hold it.
    fn step(&mut self, ms: u64) -> String {
        let actions = self.controller.step(
            at(ms),
            true,
            &self.leases,
            &self.facts,
            self.members_level,
            Millis(1_000_000 + ms),
        );
        let mut shown = vec![];
        for action in actions {
            match action {
                Action::Expire(expire) => {
                    for lease in &expire.evidence {
                        let id = lease.incarnation.unwrap().worker;
                        assert!(lease.silent_ms >= 10_000);
                        self.facts.workers[id as usize - 1].lost = true;
                        shown.push(format!("lost w{id}"));
                    }
                    shown.extend(expire.correlated.iter().map(|pool| format!("alarm {pool}")));
                    if expire.correlated.is_empty() && !self.facts.correlated_expiry.is_empty() {
                        shown.push("clear".into());
                    }
                    self.facts.correlated_expiry = expire.correlated;
                }
                Action::FirstKey => {
                    shown.push("key".into());
                    self.facts.keys = Some(a_key());
                }
                Action::RaiseFeatureLevel(level) => {
                    shown.push(format!("level {level}"));
                    self.facts.feature_level = level;
                }
                Action::PassDrainDeadline(id) => {
                    shown.push(format!("deadline d{id}"));
                    self.facts.drains[0].overdue = true;
                }
                Action::AssignHomes(assign) => {
                    let put = assign.put.iter();
                    shown.extend(put.map(|put| format!("{:x} at {:?}", put.chunk, put.homes)));
                    self.facts.families = assign.put;
                }
                Action::StepRebalance(step) => {
                    shown.push(format!("r{} move {}", step.id, step.step));
                    self.facts.rebalances[0].done += 1;
                    self.facts.rebalances[0].moved_ms = 1_000_000 + ms;
                }
                Action::StopRebalance(stop) => {
                    shown.push(format!("stop r{}: {}", stop.id, stop.why));
                    self.facts.rebalances[0].ended_ms = 1_000_000 + ms;
                }
                Action::ForgetSuspects => {
                    shown.push("forget".into());
                    self.facts.suspects.clear();
                }
            }
        }
        shown.join(", ")
    }
}

#[test]
fn a_single_silent_worker_is_lost_once() {
    let mut world = World::new(2);
    world.renew(5_000, [2]);
    assert_eq!(world.step(9_999), "");
    assert_eq!(world.step(10_000), "lost w1");
    assert_eq!(world.step(10_500), "");
    world.renew(11_000, [1, 2]);
    assert_eq!(world.step(11_000), "");
}

#[test]
fn up_to_a_fifth_of_a_pool_is_lost_at_once() {
    let mut world = World::new(10);
    world.renew(5_000, 3..=10);
    assert_eq!(world.step(10_000), "lost w1, lost w2");
}

#[test]
fn more_than_a_fifth_at_once_raises_an_alarm_and_loses_nobody() {
    let mut world = World::new(10);
    world.renew(5_000, 4..=10);
    assert_eq!(world.step(10_000), "alarm p");
    assert_eq!(world.step(10_500), "");
    world.renew(11_000, 2..=10);
    assert_eq!(world.step(11_000), "lost w1, clear");
}

#[test]
fn losses_within_ten_seconds_count_together() {
    let mut world = World::new(10);
    world.renew(5_000, 3..=10);
    assert_eq!(world.step(10_000), "lost w1, lost w2");
    world.renew(10_000, 4..=10);
    assert_eq!(world.step(15_000), "alarm p");
    world.renew(19_000, 4..=10);
    assert_eq!(world.step(20_000), "lost w3, clear");
}

#[test]
fn a_whole_pool_that_falls_silent_is_not_believed() {
    let mut world = World::new(2);
    assert_eq!(world.step(10_000), "alarm p");
    world.renew(10_600, [1, 2]);
    assert_eq!(world.step(10_600), "clear");
}

#[test]
fn the_first_fingerprint_key_is_drawn_once() {
    let mut world = World::new(0);
    world.facts.keys = None;
    assert_eq!(world.step(100), "key");
    assert_eq!(world.step(600), "");
}

#[test]
fn the_feature_level_follows_the_least_that_anyone_understands() {
    let mut world = World::new(2);
    world.members_level = 3;
    assert_eq!(world.step(100), "", "no worker has said anything");
    world.renew_at_level(600, [1], 3);
    world.renew_at_level(600, [2], 2);
    assert_eq!(world.step(1_000), "level 2");
    world.renew_at_level(1_100, [2], 3);
    world.members_level = 0;
    assert_eq!(world.step(1_500), "", "a member is away");
    world.members_level = 3;
    assert_eq!(world.step(2_000), "level 3");
    assert_eq!(world.step(2_500), "");
}

#[test]
fn a_drains_deadline_is_proposed_once_it_passed_by_cell_time() {
    let drain = wire::Drain {
        id: 7,
        deadline_ms: 1_005_000,
        ..Default::default()
    };
    let step = |drain: wire::Drain, ms| {
        let mut world = World::new(0);
        world.facts.drains = vec![drain];
        (world.step(ms), world.step(ms + 500))
    };
    assert_eq!(step(drain.clone(), 4_400), (String::new(), String::new()));
    assert_eq!(
        step(drain.clone(), 5_000),
        ("deadline d7".into(), String::new())
    );
    let ended = wire::Drain {
        ended_ms: 1_002_000,
        ..drain.clone()
    };
    assert_eq!(step(ended, 9_000).0, "");
    let none = wire::Drain {
        deadline_ms: 0,
        ..drain
    };
    assert_eq!(step(none, 9_000).0, "");
}

/// All workers say this of the last minute.
fn heat(world: &mut World, ms: u64, first_tokens: u32, in_time: u32) {
    for id in 1..=2 {
        let hot = control::FamilyHeat {
            chunk: 0xf,
            chunks: 16,
            tokens: 4_096,
            arrivals: 500,
            takes: 300,
            held: id == 2,
            pool: "p".into(),
            ..Default::default()
        };
        world.renew_with(
            ms,
            id,
            Some(control::Heat {
                families: vec![hot],
                takes: 300,
                first_tokens,
                in_time,
                ..Default::default()
            }),
        );
    }
}

fn hot() -> World {
    let mut world = World::new(2);
    world.facts.feature_level = 9;
    for worker in &mut world.facts.workers {
        worker.desired = wire::Desired::Ready.into();
        worker.observed = Observed::Ready.into();
    }
    heat(&mut world, 0, 10, 10);
    world
}

#[test]
fn homes_follow_the_heat_every_ten_seconds() {
    let mut world = hot();
    for ms in [500, 5_000, 6_000] {
        heat(&mut world, ms, 10, 10);
        assert_eq!(world.step(ms), "");
    }
    assert_eq!(world.step(6_500), "f at [2]", "agents have said it by then");
    assert_eq!(world.step(11_000), "");
    heat(&mut world, 16_000, 10, 10);
    assert_eq!(world.step(16_500), "", "nothing changed");
    world.facts.workers[1].desired = wire::Desired::Cordoned.into();
    heat(&mut world, 26_000, 10, 10);
    assert_eq!(world.step(26_000), "");
    assert_eq!(world.step(26_500), "f at [1]");
    let mut other = hot();
    other.facts.workers[1].spec = spec(Some("tools_first"));
    heat(&mut other, 6_000, 10, 10);
    assert_eq!(other.step(500), "");
    assert_eq!(
        other.step(6_500),
        "f at [1]",
        "w2 renders prompts otherwise"
    );
    let mut old = hot();
    old.facts.feature_level = 4;
    heat(&mut old, 10_000, 10, 10);
    assert_eq!(old.step(10_500), "", "not everyone knows of homes");
}

fn moving(interval_ms: u32, stop_below: u32) -> World {
    let mut world = hot();
    // As the heat asks for it.
    world.facts.families = vec![wire::Family {
        pool: "p".into(),
        chunk: 0xf,
        chunks: 16,
        homes: vec![2],
        ..Default::default()
    }];
    world.facts.rebalances = vec![wire::Rebalance {
        id: 7,
        pool: "p".into(),
        interval_ms,
        stop_below,
        ..Default::default()
    }];
    world
}

#[test]
fn a_rebalance_makes_a_move_at_each_interval_by_cell_time() {
    let mut world = moving(2_000, 900);
    assert_eq!(world.step(100), "r7 move 0");
    assert_eq!(world.step(2_000), "");
    assert_eq!(world.step(2_100), "r7 move 1");
    assert_eq!(world.step(9_000), "r7 move 2");
    world.facts.rebalances[0].ended_ms = 1;
    heat(&mut world, 9_500, 10, 10);
    assert_eq!(world.step(9_900), "");
}

#[test]
fn a_rebalance_waits_while_promises_are_broken_and_stops_when_they_stay_so() {
    let mut world = moving(500, 900);
    assert_eq!(world.step(100), "r7 move 0");
    heat(&mut world, 600, 10, 8);
    assert_eq!(world.step(700), "");
    assert_eq!(world.step(5_600), "", "the next look is five seconds later");
    heat(&mut world, 5_650, 10, 9);
    assert_eq!(world.step(5_700), "r7 move 1", "they are kept again");
    heat(&mut world, 6_000, 10, 8);
    assert_eq!(world.step(6_300), "");
    assert_eq!(
        world.step(11_300),
        "stop r7: 80.0 % of the pool's first tokens are in time, fewer than 90.0 %"
    );
    heat(&mut world, 11_500, 10, 8);
    assert!(!world.step(12_000).contains("r7"));
}

#[test]
fn nothing_said_and_nothing_asked_for_stop_nothing() {
    let mut world = moving(500, 900);
    heat(&mut world, 50, 0, 0);
    assert_eq!(world.step(100), "r7 move 0");
    let mut world = moving(500, 0);
    heat(&mut world, 50, 10, 0);
    assert_eq!(world.step(100), "r7 move 0");
    assert_eq!(world.step(600), "r7 move 1");
}

#[test]
fn only_the_leader_proposes() {
    let mut world = World::new(1);
    let actions =
        world
            .controller
            .step(at(60_000), false, &world.leases, &world.facts, 9, Millis(0));
    assert_eq!(actions, []);
}

#[test]
fn who_said_goodbye_is_not_expired() {
    let mut world = World::new(1);
    world.facts.workers[0].departed = true;
    assert_eq!(world.step(60_000), "");
}
