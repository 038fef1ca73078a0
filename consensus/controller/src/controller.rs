//! Expiry, the first fingerprint key, the feature level, and deadlines of drains. Who was silent for longer than a lease becomes lost, unless too many are at once.
//!
//! Many leases of a pool that run out together say more about the network, or about this leader,
//! than about the workers. When more than a fifth of a pool, and at least two, would be lost within
//! ten seconds, none of them is: an alarm is raised for the pool, and cleared when no more than a
//! fifth is silent. That a lost worker was heard again is noted where its renewal is taken.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use forebay_consensus::fleet::lease::{AGENT_TTL, Leases};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Incarnation, Millis, Now};

/// Losses this far apart count as at once.
const AT_ONCE: Duration = Duration::from_secs(10);

/// A pool loses no more than one in this many at once.
const ONE_IN: usize = 5;

/// A single silent worker is always believed.
const FEWEST: usize = 2;

/// What to propose.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Declare leases expired, and in which pools that is not believed.
    Expire(wire::ExpireLeases),
    /// Draw the first fingerprint key.
    FirstKey,
    /// Let commands use features up to this level: everyone understands them.
    RaiseFeatureLevel(u32),
    /// A drain's deadline passed, by cell time.
    PassDrainDeadline(u64),
}

/// The leader's loop, without the loop.
#[derive(Clone, Debug, Default)]
pub struct Controller {
    /// Losses that were proposed lately; forgotten after [`AT_ONCE`]. Bounded by the fleet.
    proposed: BTreeMap<Incarnation, Now>,
}

/// A worker as this loop sees it.
struct Seen {
    incarnation: Incarnation,
    pool: String,
    lost: bool,
}

impl Controller {
    /// What to propose, given what was heard and what is agreed. Nothing unless this node leads.
    ///
    /// `members_level` is the least feature level that a member understands, 0 while that is not known;
    /// `cell_time` is what a proposal would be stamped with.
    pub fn step(
        &mut self,
        now: Now,
        is_leader: bool,
        leases: &Leases,
        facts: &wire::Facts,
        members_level: u32,
        cell_time: Millis,
    ) -> Vec<Action> {
        if !is_leader {
            self.proposed.clear();
            return vec![];
        }
        self.proposed.retain(|_, at| now.since(*at) < AT_ONCE);
        let workers: Vec<Seen> = facts.workers.iter().filter_map(seen).collect();
        let expiry = self.expire(now, leases, &workers, &facts.correlated_expiry);
        let keyless = facts.keys.as_ref().is_none_or(|ring| ring.keys.is_empty());
        let first_key = keyless.then_some(Action::FirstKey);
        let everyone = leases.feature_level(now).unwrap_or(members_level);
        let everyone = everyone.min(members_level);
        let raise = (everyone > facts.feature_level).then_some(Action::RaiseFeatureLevel(everyone));
        let deadlines = facts.drains.iter().filter(|drain| {
            drain.ended_ms == 0 && !drain.overdue && (1..=cell_time.0).contains(&drain.deadline_ms)
        });
        let deadlines = deadlines.map(|drain| Action::PassDrainDeadline(drain.id));
        let own = expiry.into_iter().chain(first_key).chain(raise);
        own.chain(deadlines).collect()
    }

    fn expire(
        &mut self,
        now: Now,
        leases: &Leases,
        workers: &[Seen],
        raised: &[String],
    ) -> Option<Action> {
        let silent: BTreeMap<Incarnation, Duration> = leases
            .expired(now, AGENT_TTL)
            .into_iter()
            .map(|expired| (expired.incarnation, expired.silent))
            .collect();
        let mut pools: BTreeMap<&str, Vec<&Seen>> = BTreeMap::new();
        for worker in workers {
            pools.entry(&worker.pool).or_default().push(worker);
        }
        let (mut evidence, mut correlated) = (vec![], BTreeSet::new());
        for (pool, workers) in pools {
            let losing = |worker: &&&Seen| !worker.lost && silent.contains_key(&worker.incarnation);
            let just_lost =
                |worker: &&&Seen| worker.lost && self.proposed.contains_key(&worker.incarnation);
            let lost = workers.iter().filter(just_lost).count();
            let at_once = workers.iter().filter(losing).count() + lost;
            let living = workers.iter().filter(|worker| !worker.lost).count() + lost;
            if at_once == lost {
                continue;
            }
            if at_once >= FEWEST && at_once * ONE_IN > living {
                correlated.insert(pool.to_owned());
                continue;
            }
            evidence.extend(workers.iter().filter(losing).map(|w| w.incarnation));
        }
        if evidence.is_empty() && correlated.iter().eq(raised) {
            return None;
        }
        self.proposed
            .extend(evidence.iter().map(|incarnation| (*incarnation, now)));
        Some(Action::Expire(wire::ExpireLeases {
            evidence: evidence
                .into_iter()
                .map(|incarnation| wire::LeaseEvidence {
                    incarnation: Some(incarnation.to_wire()),
                    silent_ms: Millis::from_duration(silent[&incarnation]).0,
                })
                .collect(),
            correlated: correlated.into_iter().collect(),
        }))
    }
}

/// `None` for one that said goodbye, or that this version cannot read.
fn seen(worker: &wire::Worker) -> Option<Seen> {
    if worker.departed {
        return None;
    }
    Some(Seen {
        incarnation: Incarnation::from_wire(worker.incarnation.as_ref()).ok()?,
        pool: WorkerSpec::from_wire(&worker.spec).ok()?.pool,
        lost: worker.lost,
    })
}

#[cfg(test)]
mod tests {
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

    fn spec() -> bytes::Bytes {
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
            labels: BTreeMap::new(),
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
                spec: spec(),
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

        fn renew_at_level(&mut self, ms: u64, workers: impl IntoIterator<Item = u32>, level: u32) {
            for id in workers {
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
                    heat: None,
                };
                self.leases.renewed(at(ms), &who, &renew).unwrap();
            }
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
                        if expire.correlated.is_empty() && !self.facts.correlated_expiry.is_empty()
                        {
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
}
