//! Random commands, and what must hold after each.

use std::collections::{BTreeMap, BTreeSet};

use forebay_proto::wire::fleet as wire;
use forebay_proto::{RebalancePhase, WorkerId};
use proptest::prelude::*;
use wire::Desired;

use super::testing::{World, entry};
use super::{Fleet, MAX_FAMILIES, MAX_HOMES, audit};

fn name() -> impl Strategy<Value = String> {
    (1..5u8).prop_map(|i| format!("w{i}"))
}

fn incarnation() -> impl Strategy<Value = String> {
    (1..6u8, 1..30u8, 0..4u8).prop_map(|(w, g, s)| format!("{w}.{g}.{s}"))
}

fn line() -> impl Strategy<Value = String> {
    let word = |words: &'static [&'static str]| proptest::sample::select(words);
    let spec = (
        word(&["", "models=m", "models=a,m", "models=a"]),
        word(&["", "", "pool=other"]),
    );
    prop_oneof![
        (name(), spec.clone(), word(&["", "renewed=5", "takeover"]))
            .prop_map(|(n, (m, p), more)| format!("register {n} {m} {p} {more}")),
        (name(), spec, incarnation(), 0..4u8)
            .prop_map(|(n, (m, p), held, s)| format!("register {n} {m} {p} held={held} start={s}")),
        (
            incarnation(),
            word(&["joining", "ready", "cordoned", "draining", "drained"]),
            0..40u8
        )
            .prop_map(|(i, o, ack)| format!("observe {i} {o} ack={ack}")),
        incarnation().prop_map(|i| format!("goodbye {i}")),
        (
            name(),
            word(&["ready", "cordoned", "draining"]),
            word(&["", "override"])
        )
            .prop_map(|(n, d, o)| format!("set {n} {d} {o}")),
        (name(), word(&["", "override"])).prop_map(|(n, o)| format!("remove {n} {o}")),
        (word(&["default", "default,other"]), 0..30u8)
            .prop_map(|(pools, at)| format!("config {pools} expected={at}")),
        (
            incarnation(),
            incarnation(),
            word(&["", "correlated=default"])
        )
            .prop_map(|(a, b, c)| format!("expire {a}:10000 {b}:20000 {c}")),
        (
            word(&["cordon", "uncordon", "drain", "drain"]),
            name(),
            name(),
            word(&["", "dry", "deadline=5", "deadline=5 cancel"]),
            word(&["", "loads=1:3,2:2", "ignore"])
        )
            .prop_map(|(verb, a, b, how, more)| format!("{verb} {a},{b} {how} {more}")),
        (1..60u8, word(&["", "uncordon", "dry"]))
            .prop_map(|(id, how)| format!("call-off d{id} {how}")),
        (1..60u8).prop_map(|id| format!("deadline d{id}")),
        (0..4u8).prop_map(|epoch| format!("rotate {epoch} key=0123456789abcdef")),
        (
            1..5u8,
            1..5u8,
            1..3u8,
            word(&["", "gone=1", "as_of=9", "pool=other"])
        )
            .prop_map(|(a, b, family, how)| format!("homes {family}={a},{b} 3={b}:90 {how}")),
        (0..5u8, 0..5u8, 1..4u8, word(&["", "dry", "2:1>2", "3:3>1"]))
            .prop_map(|(a, b, family, more)| format!("rebalance {family}:{a}>{b} {more}")),
        (1..60u8, 0..3u8).prop_map(|(id, step)| format!("step r{id} {step}")),
        (1..60u8, word(&["stop", "call-rebalance-off"]))
            .prop_map(|(id, verb)| format!("{verb} r{id}")),
        (
            1..4u8,
            1..12u8,
            word(&["a:900 b:100", "a:1000", "b:500 c:500"])
        )
            .prop_map(|(w, g, accused)| format!("accuse {w}.{g}.0 {accused}")),
        (1..4u8, 1..12u8, word(&["a", "b c"]))
            .prop_map(|(w, g, keys)| format!("clear {w}.{g}.0 {keys}")),
        word(&["lift", "lift a", "lift dry", "forget"]).prop_map(Into::into),
    ]
}

/// A command, the client that sends it, and whether its network repeats it.
fn log() -> impl Strategy<Value = Vec<(String, u8, bool)>> {
    proptest::collection::vec((line(), 0..3u8, any::<bool>()), 1..60)
}

/// The log's entries: each client counts its commands, a repeated one keeps its number.
fn entries(log: &[(String, u8, bool)]) -> Vec<(String, bytes::Bytes, bool)> {
    let mut sequences = BTreeMap::new();
    let mut entries = vec![];
    for (line, client, repeated) in log {
        let sequence = sequences.entry(*client).or_insert(0u64);
        *sequence += 1;
        let bytes = entry(line, *client, *sequence);
        entries.push((line.clone(), bytes.clone(), false));
        if *repeated {
            entries.push((line.clone(), bytes, true));
        }
    }
    entries
}

/// Models with a worker that is wanted ready, by pool.
fn served(fleet: &Fleet) -> BTreeSet<(String, String)> {
    fleet
        .workers()
        .filter(|worker| worker.desired == Desired::Ready)
        .flat_map(|worker| {
            let pool = worker.spec.pool.clone();
            let models = worker.spec.models.iter();
            models.map(move |model| (pool.clone(), model.clone()))
        })
        .collect()
}

/// A drain under way is never forgotten, goes one way, and holds its workers.
fn drains_go_on(before: &Fleet, after: &Fleet) -> Result<(), TestCaseError> {
    for drain in after.drains().filter(|drain| drain.is_active()) {
        for one in &drain.workers {
            let worker = after.worker(&one.name).filter(|worker| worker.id == one.id);
            prop_assert!(worker.is_none_or(|worker| worker.desired == Desired::Draining));
            prop_assert!(one.in_force.is_some() || one.drained.is_none());
        }
    }
    for was in before.drains() {
        let now = after.drains().find(|drain| drain.id == was.id);
        prop_assert!(now.is_some() || !was.is_active(), "{} is forgotten", was.id);
        if let Some(now) = now {
            prop_assert!(
                was.is_active() || now == was,
                "{} goes on after its end",
                was.id
            );
            for (now, was) in now.workers.iter().zip(&was.workers) {
                prop_assert!(was.in_force.is_none() || now.in_force == was.in_force);
                prop_assert!(was.drained.is_none() || now.drained == was.drained);
            }
        }
    }
    Ok(())
}

/// A home is a worker of its family's pool that is wanted ready.
fn homes_are_kept(fleet: &Fleet) -> Result<(), TestCaseError> {
    prop_assert!(fleet.families().count() <= MAX_FAMILIES);
    for family in fleet.families() {
        prop_assert!((1..=MAX_HOMES).contains(&family.homes.len()));
        prop_assert!(family.homes.is_sorted_by(|a, b| a < b));
        for home in &family.homes {
            let worker = fleet.workers().find(|worker| worker.id == *home);
            let fits = worker.is_some_and(|worker| {
                worker.spec.pool == family.pool && worker.desired == Desired::Ready
            });
            prop_assert!(fits, "{family:?} has {worker:?}");
        }
    }
    Ok(())
}

/// A rebalance under way is not forgotten with its pool there, goes one way, and counts its moves.
fn rebalances_go_on(before: &Fleet, after: &Fleet) -> Result<(), TestCaseError> {
    for was in before.rebalances() {
        let now = after.rebalances().find(|now| now.pool == was.pool);
        let Some(now) = now else {
            prop_assert!(
                !after.config.pools.contains(&was.pool),
                "{} is forgotten",
                was.id
            );
            continue;
        };
        if now.id == was.id {
            prop_assert!(
                was.is_active() || now == was,
                "{} goes on after its end",
                was.id
            );
            prop_assert!((was.done..=was.done + 1).contains(&now.done));
            prop_assert_eq!(&now.moves, &was.moves);
            let all = now.done as usize == now.moves.len();
            prop_assert_eq!(all, now.phase == RebalancePhase::Done);
        } else {
            prop_assert!(!was.is_active(), "{} made way while it went on", was.id);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn invariants_hold_after_every_command(log in log()) {
        let mut world = World::new();
        let mut incarnations = BTreeMap::new();
        let mut names: BTreeMap<WorkerId, String> = BTreeMap::new();
        for (line, bytes, repeated) in entries(&log) {
            let before = world.fleet.clone();
            let applied = world.apply(bytes);
            let fleet = &world.fleet;
            if repeated {
                prop_assert_eq!(applied.delta, None);
                prop_assert_eq!(fleet.facts(), before.facts());
                prop_assert_eq!(fleet.audit_count(), before.audit_count());
                continue;
            }
            for worker in fleet.workers() {
                let name = names.entry(worker.id).or_insert_with(|| worker.name.clone());
                prop_assert_eq!(&*name, &worker.name, "an id was used for two names");
                let newest = incarnations.entry(worker.id).or_insert(worker.incarnation);
                prop_assert!(worker.incarnation >= *newest, "an incarnation went back");
                *newest = worker.incarnation;
                prop_assert!(worker.acknowledged_revision <= worker.desired_revision);
                prop_assert!(fleet.config.pools.contains(&worker.spec.pool));
            }
            drains_go_on(&before, fleet)?;
            homes_are_kept(fleet)?;
            rebalances_go_on(&before, fleet)?;
            let guards = ["set", "remove", "cordon", "drain"];
            let guarded = guards.iter().any(|verb| line.starts_with(verb));
            if guarded && !line.ends_with("override") && !line.ends_with("ignore") {
                prop_assert!(served(fleet).is_superset(&served(&before)), "{}", line);
            }
            let routine = ["observe", "homes", "clear"];
            let audited = u64::from(!routine.iter().any(|verb| line.starts_with(verb)));
            prop_assert_eq!(fleet.audit_count(), before.audit_count() + audited);
            let (entries, head) = fleet.audit_tail(usize::MAX);
            prop_assert_eq!(audit::verify(&entries, &head), Ok(()));
            if let Some(delta) = applied.delta {
                prop_assert_eq!(delta.revision, world.log.len() as u64);
                prop_assert_eq!(fleet.revision().0, delta.revision);
            } else {
                prop_assert_eq!(fleet.facts().workers, before.facts().workers);
                prop_assert_eq!(fleet.facts().families, before.facts().families);
                prop_assert_eq!(fleet.facts().rebalances, before.facts().rebalances);
                prop_assert_eq!(fleet.facts().suspects, before.facts().suspects);
                prop_assert_eq!(fleet.revision(), before.revision());
            }
        }
    }

    #[test]
    fn a_state_restored_anywhere_in_the_log_goes_on_alike(log in log(), cut in 0..120usize) {
        let mut one = World::new();
        let mut other: Option<Fleet> = None;
        for (i, (_, bytes, _)) in entries(&log).into_iter().enumerate() {
            if i == cut {
                other = Some(Fleet::restore(&one.fleet.snapshot()).unwrap());
            }
            let applied = one.apply(bytes.clone());
            if let Some(other) = &mut other {
                prop_assert_eq!(other.apply(i as u64 + 1, &bytes), applied);
                prop_assert_eq!(other.state_hash(), one.fleet.state_hash());
                prop_assert_eq!(&*other, &one.fleet);
            }
        }
    }

    #[test]
    fn deltas_add_up_to_the_facts(log in log()) {
        let mut world = World::new();
        for (_, bytes, _) in entries(&log) {
            world.apply(bytes);
        }
        let mut workers: BTreeMap<String, wire::Worker> = BTreeMap::new();
        let mut drains: BTreeMap<u64, wire::Drain> = BTreeMap::new();
        let mut families: BTreeMap<u64, wire::Family> = BTreeMap::new();
        let mut rebalances: BTreeMap<String, wire::Rebalance> = BTreeMap::new();
        let mut suspects: BTreeMap<u64, wire::Suspect> = BTreeMap::new();
        for delta in &world.deltas {
            for change in delta.changes.iter().filter_map(|change| change.change.clone()) {
                match change {
                    wire::change::Change::WorkerPut(worker) => {
                        workers.insert(worker.name.clone(), worker);
                    }
                    wire::change::Change::WorkerRemoved(name) => {
                        workers.remove(&name);
                    }
                    wire::change::Change::DrainPut(drain) => {
                        drains.insert(drain.id, drain);
                    }
                    wire::change::Change::DrainForgotten(id) => {
                        drains.remove(&id);
                    }
                    wire::change::Change::Families(changes) => {
                        for chunk in changes.removed {
                            families.remove(&chunk);
                        }
                        families.extend(changes.put.into_iter().map(|one| (one.chunk, one)));
                    }
                    wire::change::Change::Suspects(changes) => {
                        for key in changes.removed {
                            suspects.remove(&key);
                        }
                        suspects.extend(changes.put.into_iter().map(|one| (one.key, one)));
                    }
                    wire::change::Change::RebalancePut(one) => {
                        rebalances.insert(one.pool.clone(), one);
                    }
                    wire::change::Change::RebalanceForgotten(pool) => {
                        rebalances.remove(&pool);
                    }
                    wire::change::Change::Config(_)
                    | wire::change::Change::Keys(_)
                    | wire::change::Change::CorrelatedExpiry(_)
                    | wire::change::Change::Members(_)
                    | wire::change::Change::FeatureLevel(_) => {}
                }
            }
        }
        prop_assert_eq!(workers.into_values().collect::<Vec<_>>(), world.fleet.facts().workers);
        prop_assert_eq!(drains.into_values().collect::<Vec<_>>(), world.fleet.facts().drains);
        prop_assert_eq!(families.into_values().collect::<Vec<_>>(), world.fleet.facts().families);
        prop_assert_eq!(rebalances.into_values().collect::<Vec<_>>(), world.fleet.facts().rebalances);
        prop_assert_eq!(suspects.into_values().collect::<Vec<_>>(), world.fleet.facts().suspects);
    }

    #[test]
    fn arbitrary_bytes_are_refused_and_never_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut world = World::new();
        world.apply(bytes.clone());
        prop_assert_eq!(world.fleet.revision().0, 0);
        let _ = Fleet::restore(&bytes);
        let mut framed = b"FBYFLEET\0\x01".to_vec();
        framed.extend_from_slice(&crc32c::crc32c(&bytes).to_be_bytes());
        framed.extend_from_slice(&bytes);
        let _ = Fleet::restore(&framed);
    }
}
