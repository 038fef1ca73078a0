//! Leases: who was heard lately, in the leader's memory only.
//!
//! They are evidence, not fences: a lease that ran out lets the leader propose `lost`, and a recent
//! one keeps a second process from taking a name. Nothing here is replicated, and a new leader
//! starts every lease afresh, because it cannot know who was heard before it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use forebay_proto::wire::control;
use forebay_proto::wire::fleet::{Observed, WorkerLoad};
use forebay_proto::{Identity, Incarnation, Millis, Now, Revision, Role};

use super::MAX_WORKERS;

/// An agent's lease: it renews ten times as often.
pub const AGENT_TTL: Duration = Duration::from_secs(10);

/// A balancer's lease.
pub const BALANCER_TTL: Duration = Duration::from_secs(3);

/// Balancers of one cell.
pub const MAX_BALANCERS: usize = 256;

/// Families of one agent's heat.
const MAX_FAMILIES_SAID: usize = 64;

/// What was said longer ago than this says nothing of now: agents say it every five seconds.
const HEAT_HOLDS: Duration = Duration::from_secs(30);

/// Ids of requests that are kept of one agent, and bytes of one.
const MAX_OLDEST: usize = 5;
const MAX_ID_BYTES: usize = 128;

/// What the leader knows of one process.
#[derive(Clone, Debug, PartialEq)]
pub struct Lease {
    /// When it was last heard, or assumed to be when this leader began.
    pub last: Now,
    /// Whether it was really heard by this leader.
    pub heard: bool,
    /// The newest revision it has applied.
    pub applied: Revision,
    /// What it says of itself; unspecified for balancers.
    pub observed: Observed,
    /// Newest feature it understands; 0 until it was heard.
    pub feature_level: u32,
    /// What it has under way; `None` of balancers, and until an agent said it.
    pub work: Option<control::Work>,
    /// What it was asked for lately, as it last said it, and when; `None` of balancers.
    pub heat: Option<(Now, Arc<control::Heat>)>,
}

impl Lease {
    const fn assumed(now: Now) -> Self {
        Self {
            last: now,
            heard: false,
            applied: Revision(0),
            observed: Observed::Unspecified,
            feature_level: 0,
            work: None,
            heat: None,
        }
    }
}

/// A lease that ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expired {
    /// Whose.
    pub incarnation: Incarnation,
    /// Since it was last heard.
    pub silent: Duration,
}

/// Why a renewal is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RenewError {
    /// A newer start of the same worker holds the lease.
    #[error("{current} holds the lease: this process must stop")]
    Superseded {
        /// Who holds it.
        current: Incarnation,
    },
    /// This worker is not registered, or not with this incarnation.
    #[error("this incarnation is not registered: register first")]
    NotRegistered,
    /// An agent without an incarnation, or a process that holds no leases.
    #[error("only agents with an incarnation and balancers hold leases")]
    NotAHolder,
    /// Too many balancers.
    #[error("{MAX_BALANCERS} balancers hold leases already")]
    Full,
}

/// The leader's table.
///
/// Bounded by the fleet: agents have a lease iff their worker is registered (see
/// [`Leases::follow`]), balancers up to [`MAX_BALANCERS`], where the longest silent one gives way if
/// its lease ran out and the newcomer is refused otherwise.
#[derive(Clone, Debug, Default)]
pub struct Leases {
    agents: BTreeMap<String, (Incarnation, Lease)>,
    balancers: BTreeMap<String, Lease>,
}

impl Leases {
    /// Starts all leases afresh: this node began to lead, with these workers registered.
    pub fn became_leader(
        &mut self,
        now: Now,
        workers: impl IntoIterator<Item = (String, Incarnation)>,
    ) {
        *self = Self::default();
        self.follow(now, workers);
    }

    /// Follows the facts: what registered begins a lease, what was removed or departed loses it.
    ///
    /// `workers` are all that are registered and did not say goodbye.
    pub fn follow(&mut self, now: Now, workers: impl IntoIterator<Item = (String, Incarnation)>) {
        let mut before = std::mem::take(&mut self.agents);
        for (name, incarnation) in workers.into_iter().take(MAX_WORKERS) {
            let lease = match before.remove(&name) {
                Some((held, lease)) if held == incarnation => lease,
                Some(_) | None => Lease::assumed(now),
            };
            self.agents.insert(name, (incarnation, lease));
        }
    }

    /// A process registered as this incarnation: it was heard of as by a renewal.
    pub fn registered(&mut self, now: Now, name: &str, incarnation: Incarnation) {
        let known = self.agents.get(name).cloned();
        let same = known.clone().filter(|(held, _)| *held == incarnation);
        let newer = known.as_ref().is_some_and(|(held, _)| *held > incarnation);
        if newer || (known.is_none() && self.agents.len() >= MAX_WORKERS) {
            return;
        }
        let lease = same.map_or_else(|| Lease::assumed(now), |(_, lease)| lease);
        let lease = Lease { last: now, ..lease };
        self.agents.insert(name.to_owned(), (incarnation, lease));
    }

    /// Takes a renewal and returns how long it holds.
    ///
    /// # Errors
    ///
    /// Returns why the caller holds no lease.
    pub fn renewed(
        &mut self,
        now: Now,
        identity: &Identity,
        renew: &control::Renew,
    ) -> Result<Duration, RenewError> {
        let incarnation = Incarnation::from_wire(renew.incarnation.as_ref()).ok();
        let work = renew.work.clone().map(|mut work| {
            work.oldest.truncate(MAX_OLDEST);
            work.oldest.retain(|id| id.len() <= MAX_ID_BYTES);
            work
        });
        let lease = Lease {
            last: now,
            heard: true,
            applied: Revision(renew.applied_revision),
            observed: renew.observed(),
            feature_level: renew.feature_level,
            work: work.filter(|_| identity.role == Role::Agent),
            heat: renew
                .heat
                .clone()
                .map(|heat| (now, Arc::new(bounded(heat)))),
        };
        match identity.role {
            Role::Agent => self.agent(&identity.name, incarnation, lease),
            Role::Balancer => self.balancer(now, &identity.name, lease),
            Role::Control | Role::Operator(_) => Err(RenewError::NotAHolder),
        }
    }

    fn agent(
        &mut self,
        name: &str,
        incarnation: Option<Incarnation>,
        lease: Lease,
    ) -> Result<Duration, RenewError> {
        let asked = incarnation.ok_or(RenewError::NotAHolder)?;
        match self.agents.get_mut(name) {
            Some((current, held)) if *current == asked => {
                // It is said less often than a lease is renewed.
                let heat = lease.heat.clone().or(held.heat.take());
                *held = Lease { heat, ..lease };
                Ok(AGENT_TTL)
            }
            Some((current, _)) if current.worker == asked.worker && *current > asked => {
                Err(RenewError::Superseded { current: *current })
            }
            Some(_) | None => Err(RenewError::NotRegistered),
        }
    }

    fn balancer(&mut self, now: Now, name: &str, lease: Lease) -> Result<Duration, RenewError> {
        if !self.balancers.contains_key(name) && self.balancers.len() >= MAX_BALANCERS {
            let silent = self
                .balancers
                .iter()
                .filter(|(_, lease)| now.since(lease.last) >= BALANCER_TTL)
                .min_by_key(|(_, lease)| lease.last)
                .map(|(name, _)| name.clone())
                .ok_or(RenewError::Full)?;
            self.balancers.remove(&silent);
        }
        let lease = Lease {
            heat: None,
            ..lease
        };
        self.balancers.insert(name.to_owned(), lease);
        Ok(BALANCER_TTL)
    }

    /// Agents that were silent for `ttl` or longer, in order of their names.
    #[must_use]
    pub fn expired(&self, now: Now, ttl: Duration) -> Vec<Expired> {
        self.agents
            .values()
            .map(|(incarnation, lease)| Expired {
                incarnation: *incarnation,
                silent: now.since(lease.last),
            })
            .filter(|lease| lease.silent >= ttl)
            .collect()
    }

    /// The lease of this agent.
    #[must_use]
    pub fn of(&self, name: &str) -> Option<(Incarnation, Lease)> {
        self.agents.get(name).cloned()
    }

    /// How long ago a live process of this worker's name was heard: the evidence for a registration.
    ///
    /// What this leader only assumes counts as heard when it began, so that a change of leader does
    /// not open a name to a second process.
    #[must_use]
    pub fn renewed_ago(&self, now: Now, name: &str) -> Option<Duration> {
        self.agents
            .get(name)
            .map(|(_, lease)| now.since(lease.last))
    }

    /// How busy each agent said that it is with its last renewal, and how long ago that was.
    #[must_use]
    pub fn loads(&self, now: Now) -> Vec<WorkerLoad> {
        let said = self.agents.values().filter_map(|(incarnation, lease)| {
            Some(WorkerLoad {
                worker: incarnation.worker.0,
                in_flight: lease.work.as_ref()?.in_flight,
                age_ms: Millis::from_duration(now.since(lease.last)).wire(),
            })
        });
        said.collect()
    }

    /// What this agent was asked for, if it said so lately.
    #[must_use]
    pub fn heat(&self, now: Now, name: &str) -> Option<Arc<control::Heat>> {
        let (_, lease) = self.agents.get(name)?;
        let (said, heat) = lease.heat.as_ref()?;
        (now.since(*said) < HEAT_HOLDS).then(|| heat.clone())
    }

    /// All balancers that were heard, also those whose lease ran out, by name.
    pub fn all_balancers(&self) -> impl Iterator<Item = (&str, &Lease)> {
        let balancers = self.balancers.iter();
        balancers.map(|(name, lease)| (name.as_str(), lease))
    }

    /// Balancers whose lease holds, by name.
    pub fn balancers(&self, now: Now) -> impl Iterator<Item = (&str, &Lease)> {
        self.balancers
            .iter()
            .filter(move |(_, lease)| now.since(lease.last) < BALANCER_TTL)
            .map(|(name, lease)| (name.as_str(), lease))
    }

    /// The least feature level that a holder of a lease reported: 0 while one of them has not, `None`
    /// when nobody holds one.
    #[must_use]
    pub fn feature_level(&self, now: Now) -> Option<u32> {
        let agents = self.agents.values().map(|(_, lease)| lease);
        let agents = agents.filter(|lease| now.since(lease.last) < AGENT_TTL);
        let balancers = self.balancers(now).map(|(_, lease)| lease);
        let holders = agents.chain(balancers);
        holders.map(|lease| lease.feature_level).min()
    }

    /// Names of the agents with a lease.
    #[must_use]
    pub fn agents(&self) -> BTreeSet<&str> {
        self.agents.keys().map(String::as_str).collect()
    }
}

/// What is kept of an agent's heat.
fn bounded(mut heat: control::Heat) -> control::Heat {
    heat.families.truncate(MAX_FAMILIES_SAID);
    heat.families
        .retain(|family| family.pool.len() <= MAX_ID_BYTES);
    heat
}

#[cfg(test)]
mod tests {
    use forebay_proto::WorkerId;

    use super::*;

    fn at(ms: u64) -> Now {
        Now::at(Duration::from_millis(ms))
    }

    fn start(worker: u32, start: u32) -> Incarnation {
        Incarnation {
            worker: WorkerId(worker),
            grant: 1,
            start,
        }
    }

    fn who(role: Role, name: &str) -> Identity {
        Identity {
            trust_domain: "td".into(),
            role,
            name: name.into(),
        }
    }

    fn renew(
        leases: &mut Leases,
        ms: u64,
        role: Role,
        name: &str,
        incarnation: Option<Incarnation>,
    ) -> Result<Duration, RenewError> {
        let who = who(role, name);
        leases.renewed(at(ms), &who, &said(incarnation, 3))
    }

    fn said(incarnation: Option<Incarnation>, in_flight: u32) -> control::Renew {
        control::Renew {
            incarnation: incarnation.map(Incarnation::to_wire),
            applied_revision: 7,
            observed: Observed::Ready.into(),
            feature_level: 1,
            work: Some(control::Work {
                in_flight,
                oldest: vec!["r".repeat(200), "r1".into()],
                ..control::Work::default()
            }),
            heat: None,
        }
    }

    fn led() -> Leases {
        let mut leases = Leases::default();
        leases.became_leader(
            at(0),
            [("w1".into(), start(1, 5)), ("w2".into(), start(2, 0))],
        );
        leases
    }

    #[test]
    fn a_new_leader_counts_silence_from_when_it_began() {
        let mut leases = led();
        assert_eq!(leases.expired(at(9_999), AGENT_TTL), []);
        assert_eq!(leases.expired(at(10_000), AGENT_TTL).len(), 2);
        leases.became_leader(at(10_000), [("w1".into(), start(1, 5))]);
        assert_eq!(leases.expired(at(19_999), AGENT_TTL), []);
    }

    #[test]
    fn a_renewal_keeps_a_lease_and_only_the_registered_start_can_renew() {
        let mut leases = led();
        let agent = Role::Agent;
        assert_eq!(
            renew(&mut leases, 8_000, agent, "w1", Some(start(1, 5))),
            Ok(AGENT_TTL)
        );
        assert_eq!(
            renew(&mut leases, 8_000, agent, "w1", Some(start(1, 4))),
            Err(RenewError::Superseded {
                current: start(1, 5)
            })
        );
        for (name, asked, why) in [
            ("w1", Some(start(1, 6)), RenewError::NotRegistered),
            ("w1", Some(start(2, 0)), RenewError::NotRegistered),
            ("w3", Some(start(3, 0)), RenewError::NotRegistered),
            ("w1", None, RenewError::NotAHolder),
        ] {
            assert_eq!(renew(&mut leases, 8_000, agent, name, asked), Err(why));
        }
        let expired = leases.expired(at(12_000), AGENT_TTL);
        assert_eq!(
            expired,
            [Expired {
                incarnation: start(2, 0),
                silent: Duration::from_secs(12)
            }]
        );
        assert_eq!(
            leases.renewed_ago(at(12_000), "w1"),
            Some(Duration::from_secs(4))
        );
        assert_eq!(leases.renewed_ago(at(12_000), "w9"), None);
    }

    #[test]
    fn leases_follow_the_facts() {
        let mut leases = led();
        leases.follow(
            at(6_000),
            [("w1".into(), start(1, 6)), ("w3".into(), start(3, 0))],
        );
        assert_eq!(leases.agents(), BTreeSet::from(["w1", "w3"]));
        assert_eq!(leases.expired(at(15_999), AGENT_TTL), []);
    }

    #[test]
    fn a_registration_keeps_a_lease_like_a_renewal() {
        let mut leases = led();
        for (name, incarnation, left) in [
            ("w1", start(1, 5), 1),
            ("w2", start(2, 1), 0),
            ("w3", start(3, 0), 0),
            ("w2", start(2, 0), 0),
        ] {
            leases.registered(at(9_000), name, incarnation);
            assert_eq!(leases.expired(at(10_000), AGENT_TTL).len(), left, "{name}");
        }
        assert_eq!(
            leases.of("w2").unwrap().0,
            start(2, 1),
            "never an older start"
        );
    }

    #[test]
    fn a_balancer_past_the_bound_takes_the_place_of_a_silent_one_or_is_refused() {
        let mut leases = led();
        for i in 0..MAX_BALANCERS {
            renew(&mut leases, 0, Role::Balancer, &format!("b{i}"), None).unwrap();
        }
        assert_eq!(
            renew(&mut leases, 100, Role::Balancer, "new", None),
            Err(RenewError::Full)
        );
        assert_eq!(
            renew(&mut leases, 3_000, Role::Balancer, "new", None),
            Ok(BALANCER_TTL)
        );
        assert_eq!(leases.balancers.len(), MAX_BALANCERS);
        assert_eq!(leases.balancers(at(3_000)).count(), 1);
    }

    #[test]
    fn the_feature_level_is_the_least_that_anyone_alive_reported() {
        let mut leases = led();
        renew(&mut leases, 0, Role::Agent, "w1", Some(start(1, 5))).unwrap();
        assert_eq!(leases.feature_level(at(0)), Some(0), "w2 has said nothing");
        renew(&mut leases, 0, Role::Agent, "w2", Some(start(2, 0))).unwrap();
        assert_eq!(leases.feature_level(at(0)), Some(1));
        assert_eq!(leases.feature_level(at(10_000)), None);
    }

    #[test]
    fn how_busy_agents_are_is_told_with_its_age_by_those_that_said_it() {
        let mut leases = led();
        assert_eq!(leases.loads(at(0)), []);
        renew(&mut leases, 1_000, Role::Agent, "w1", Some(start(1, 5))).unwrap();
        renew(&mut leases, 1_000, Role::Balancer, "b1", None).unwrap();
        let load = WorkerLoad {
            worker: 1,
            in_flight: 3,
            age_ms: 500,
        };
        assert_eq!(leases.loads(at(1_500)), [load]);
        let (_, lease) = leases.of("w1").unwrap();
        assert_eq!(lease.work.unwrap().oldest, ["r1"], "none is too long");
        leases.registered(at(2_000), "w1", start(1, 6));
        assert_eq!(leases.loads(at(2_000)), [], "another process");
    }

    #[test]
    fn heat_is_bounded_outlives_renewals_that_say_none_and_no_longer_than_it_is_true() {
        let mut leases = led();
        let family = |pool: &str| control::FamilyHeat {
            chunk: 7,
            pool: pool.into(),
            ..control::FamilyHeat::default()
        };
        let mut families = vec![family(&"p".repeat(200))];
        families.extend((0..100).map(|_| family("p")));
        let renew = control::Renew {
            heat: Some(control::Heat {
                families,
                takes: 70,
                ..control::Heat::default()
            }),
            ..said(Some(start(1, 5)), 3)
        };
        let w1 = who(Role::Agent, "w1");
        leases.renewed(at(1_000), &w1, &renew).unwrap();
        let quiet = said(Some(start(1, 5)), 3);
        leases.renewed(at(2_000), &w1, &quiet).unwrap();
        let heat = leases.heat(at(30_999), "w1").unwrap();
        assert_eq!((heat.takes, heat.families.len()), (70, 63));
        assert_eq!(leases.heat(at(31_000), "w1"), None);
        assert_eq!(leases.heat(at(2_000), "w2"), None);
        leases.registered(at(3_000), "w1", start(1, 6));
        assert_eq!(leases.heat(at(3_000), "w1"), None, "another process");
        leases
            .renewed(at(1_000), &who(Role::Balancer, "b1"), &renew)
            .unwrap();
        let (_, balancer) = leases.all_balancers().next().unwrap();
        assert_eq!(balancer.heat, None);
    }

    #[test]
    fn operators_and_control_nodes_hold_no_leases() {
        let mut leases = led();
        assert_eq!(
            renew(&mut leases, 0, Role::Control, "n1", None),
            Err(RenewError::NotAHolder)
        );
    }
}
