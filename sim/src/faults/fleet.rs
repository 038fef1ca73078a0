//! What agents and balancers do with the facts: balancers place by their view, agents take it or not,
//! and report. No engine runs; a placement lasts a while.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forebay_control_client::Facts;
use forebay_proto::wire::fleet::{Desired, Observed};
use forebay_proto::{Incarnation, Now};
use forebay_scheduler::model::Targets;
use forebay_scheduler::policy::{self, Request};
use forebay_scheduler::{BookingId, Known, Load, NoChoice, View};
use forebay_worker_agent::core::{Effect, End, Offer, PlacementId};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::agent::MODEL;
use super::check::Held;
use super::net::Place;
use super::party::Party;
use super::world::{Event, World};

/// Agents look after deadlines and reports as often.
const AGENT_EVERY_US: u64 = 100_000;
/// A balancer waits no longer for a placement's end.
const PATIENCE_US: u64 = 3_000_000;
/// And places as often, or up to twice so.
const PLACE_EVERY_US: u64 = 150_000;

/// One balancer: what it believes, and what it has under way.
pub(super) struct Balancer {
    view: View,
    rng: StdRng,
    placements: u64,
    under_way: BTreeMap<u64, BookingId>,
}

/// Between balancers and agents.
pub(super) enum Data {
    /// A balancer has a request.
    Arrives(u32),
    Offer {
        to: Party,
        balancer: u32,
        number: u64,
        incarnation: Incarnation,
    },
    /// An agent's answer, or its word that a placement is over.
    Said {
        balancer: u32,
        number: u64,
        said: Said,
        load: Box<Load>,
    },
    Report {
        balancer: u32,
        load: Box<Load>,
    },
    /// A placement has lasted its while.
    Over {
        party: Party,
        life: u64,
        id: PlacementId,
    },
    /// A balancer has waited long enough.
    GivenUp {
        balancer: u32,
        number: u64,
    },
    /// An agent's deadlines and reports.
    Agent {
        party: Party,
        life: u64,
    },
}

impl Data {
    /// For the trace.
    pub(super) fn number(&self) -> u64 {
        match self {
            Self::Arrives(balancer) => u64::from(*balancer),
            Self::Offer {
                balancer, number, ..
            } => 1 << 56 | u64::from(*balancer) << 32 | number,
            Self::Said {
                balancer,
                number,
                load,
                ..
            } => 2 << 56 | u64::from(*balancer) << 32 | number ^ load.seq << 16,
            Self::Report { balancer, load } => 3 << 56 | u64::from(*balancer) << 32 | load.seq,
            Self::Over { life, .. } => 4 << 56 | life,
            Self::GivenUp { balancer, number } => 5 << 56 | u64::from(*balancer) << 32 | number,
            Self::Agent { life, .. } => 6 << 56 | life,
        }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Said {
    Taken(u64),
    Refused,
    Ended(u64),
}

impl Balancer {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            view: View::default(),
            rng: StdRng::seed_from_u64(seed),
            placements: 0,
            under_way: BTreeMap::new(),
        }
    }

    fn facts(&mut self, facts: &Facts) {
        let workers = facts.workers.values().map(|worker| Known {
            name: worker.name.clone(),
            incarnation: worker.incarnation,
            spec: worker.spec.clone(),
            desired: worker.desired,
            departed: worker.departed,
        });
        self.view.set_known(workers);
    }

    /// Whether it would place a request now, or at least let it wait.
    pub(super) fn would_place(&mut self, now: Now) -> bool {
        let request = Request::of(MODEL);
        let choice = self
            .view
            .pick(now, &request, policy::default(), &mut self.rng);
        matches!(choice, Ok(_) | Err(NoChoice::Busy))
    }
}

impl World {
    /// A watcher holds new facts.
    pub(super) fn facts(&mut self, party: Party, now: Now, facts: &Arc<Facts>) {
        if let Party::Balancer(number) = party
            && let Some(balancer) = self.balancers.get_mut(&number)
        {
            balancer.facts(facts);
        }
        let Some(asker) = self.askers.get_mut(&party) else {
            return;
        };
        asker.works_by(facts.revision.0);
        let idle = asker.is_idle();
        let news = asker
            .as_agent()
            .is_some_and(|agent| agent.facts(now, facts));
        if news && idle {
            // What is new is said at once.
            self.awake(party);
        }
    }

    pub(super) fn data(&mut self, data: Data) -> Held {
        match data {
            Data::Arrives(balancer) => self.arrives(balancer),
            Data::Offer {
                to,
                balancer,
                number,
                incarnation,
            } => return self.offered(to, balancer, number, incarnation),
            Data::Said {
                balancer,
                number,
                said,
                load,
            } => self.said(balancer, number, said, *load),
            Data::Report { balancer, load } => self.reported(balancer, *load),
            Data::Over { party, life, id } => self.over(party, life, id),
            Data::GivenUp { balancer, number } => {
                if let Some(balancer) = self.balancers.get_mut(&balancer)
                    && let Some(booking) = balancer.under_way.remove(&number)
                {
                    balancer.view.released(booking, None);
                }
            }
            Data::Agent { party, life } => self.agent_looks(party, life),
        }
        Ok(())
    }

    fn arrives(&mut self, number: u32) {
        let pause = self
            .placing
            .random_range(PLACE_EVERY_US..2 * PLACE_EVERY_US);
        self.at(self.now_us + pause, Event::Data(Data::Arrives(number)));
        let now = self.time_of(Party::Balancer(number));
        let Some(balancer) = self.balancers.get_mut(&number) else {
            return;
        };
        let request = Request::of(MODEL);
        let Ok(choice) = balancer
            .view
            .pick(now, &request, policy::default(), &mut balancer.rng)
        else {
            return;
        };
        let worker = choice.incarnation.worker;
        let booking = balancer.view.book(worker, choice.work);
        balancer.placements += 1;
        let placement = balancer.placements;
        balancer.under_way.insert(placement, booking);
        let to = self.process_of(choice.incarnation);
        self.at(
            self.now_us + PATIENCE_US,
            Event::Data(Data::GivenUp {
                balancer: number,
                number: placement,
            }),
        );
        let Some(to) = to else {
            return;
        };
        for at in self.between_outsiders() {
            self.at(
                at,
                Event::Data(Data::Offer {
                    to,
                    balancer: number,
                    number: placement,
                    incarnation: choice.incarnation,
                }),
            );
        }
    }

    /// The process that is this start of a worker, else the newest of the same worker.
    fn process_of(&mut self, incarnation: Incarnation) -> Option<Party> {
        let mut same = None;
        for (party, asker) in &mut self.askers {
            let Some(own) = asker
                .as_agent()
                .and_then(|agent| agent.core.as_ref())
                .map(forebay_worker_agent::core::Core::incarnation)
            else {
                continue;
            };
            if own == incarnation {
                return Some(*party);
            }
            if own.worker == incarnation.worker {
                same = Some(*party);
            }
        }
        same
    }

    fn between_outsiders(&mut self) -> Vec<u64> {
        let places = (Place::Outside, Place::Outside);
        self.network
            .send(&mut self.placing, &self.params, self.now_us, places)
    }

    fn offered(
        &mut self,
        party: Party,
        balancer: u32,
        number: u64,
        incarnation: Incarnation,
    ) -> Held {
        let now = self.time_of(party);
        let Some(agent) = self
            .askers
            .get_mut(&party)
            .and_then(super::clients::Asker::as_agent)
        else {
            return Ok(());
        };
        let (name, life) = (agent.name.clone(), agent.life);
        let Some(core) = &mut agent.core else {
            return Ok(());
        };
        let offer = Offer {
            request_id: String::new(),
            incarnation,
            model: MODEL.into(),
            path: String::new(),
            body_bytes: 100,
            deadline: Duration::from_secs(2),
            targets: Targets::NONE,
            expected_ttft: None,
            must_queue: true,
            prompt: Default::default(),
            max_tokens: 10,
            stream: true,
            cache_salt: None,
            zone: None,
            key_epoch: 0,
            shadow: false,
            named: None,
            tenant: String::new(),
        };
        let (said, load) = match core.place(now, &offer) {
            Ok(admitted) => {
                let own = core.incarnation();
                agent.placed.insert(admitted.id, (balancer, number));
                if admitted.starts {
                    self.lasts(party, life, admitted.id);
                }
                self.checks.force.took(&name, own)?;
                (Said::Taken(admitted.report_seq), admitted.load)
            }
            Err(refused) => (Said::Refused, refused.load),
        };
        self.say(balancer, number, said, load);
        Ok(())
    }

    fn lasts(&mut self, party: Party, life: u64, id: PlacementId) {
        let at = self.now_us + self.placing.random_range(10_000..400_000);
        self.at(at, Event::Data(Data::Over { party, life, id }));
    }

    fn say(&mut self, balancer: u32, number: u64, said: Said, load: Load) {
        // A stream carries it: it comes once, or the stream is dead.
        if let Some(at) = self.between_outsiders().first() {
            self.at(
                *at,
                Event::Data(Data::Said {
                    balancer,
                    number,
                    said,
                    load: Box::new(load),
                }),
            );
        }
    }

    fn said(&mut self, balancer: u32, number: u64, said: Said, load: Load) {
        self.reported(balancer, load);
        let Some(balancer) = self.balancers.get_mut(&balancer) else {
            return;
        };
        let Some(booking) = balancer.under_way.get(&number).copied() else {
            return;
        };
        match said {
            Said::Taken(seq) => balancer.view.accepted(booking, seq),
            Said::Refused => {
                balancer.under_way.remove(&number);
                balancer.view.released(booking, None);
            }
            Said::Ended(seq) => {
                balancer.under_way.remove(&number);
                balancer.view.released(booking, Some(seq));
            }
        }
    }

    fn reported(&mut self, number: u32, load: Load) {
        let now = self.time_of(Party::Balancer(number));
        if let Some(balancer) = self.balancers.get_mut(&number)
            && balancer.view.connected(now, load.incarnation)
        {
            balancer.view.report(now, load);
        }
    }

    fn over(&mut self, party: Party, life: u64, id: PlacementId) {
        let now = self.time_of(party);
        let Some(agent) = self
            .askers
            .get_mut(&party)
            .and_then(super::clients::Asker::as_agent)
            .filter(|agent| agent.life == life)
        else {
            return;
        };
        let Some(core) = &mut agent.core else {
            return;
        };
        let ended = core.end(now, id, End::Complete);
        let who = agent.placed.remove(&id);
        if let (Some(ending), Some((balancer, number))) = (ended, who) {
            self.say(
                balancer,
                number,
                Said::Ended(ending.report_seq),
                ending.load,
            );
        }
        self.effects(party);
    }

    /// Carries out what an agent's core wants.
    fn effects(&mut self, party: Party) {
        loop {
            let Some(agent) = self
                .askers
                .get_mut(&party)
                .and_then(super::clients::Asker::as_agent)
            else {
                return;
            };
            let life = agent.life;
            let Some(core) = &mut agent.core else {
                return;
            };
            match core.poll_effect() {
                None => return,
                Some(Effect::Start(id)) => self.lasts(party, life, id),
                Some(Effect::Over(id, _, ending)) => {
                    if let Some((balancer, number)) = agent.placed.remove(&id) {
                        self.say(
                            balancer,
                            number,
                            Said::Ended(ending.report_seq),
                            ending.load,
                        );
                    }
                }
            }
        }
    }

    fn agent_looks(&mut self, party: Party, life: u64) {
        let now = self.time_of(party);
        let Some(agent) = self
            .askers
            .get_mut(&party)
            .and_then(super::clients::Asker::as_agent)
        else {
            return;
        };
        let next = agent.life;
        let mut report = None;
        if let Some(core) = &mut agent.core {
            core.expire(now);
            agent.reports.used(now);
            report = core.report(now, &mut agent.reports);
        }
        self.at(
            self.now_us + AGENT_EVERY_US,
            Event::Data(Data::Agent { party, life: next }),
        );
        if next != life {
            return;
        }
        self.effects(party);
        let Some(load) = report else {
            return;
        };
        for balancer in 0..self.params.balancers {
            for at in self.between_outsiders() {
                let load = Box::new(load);
                self.at(at, Event::Data(Data::Report { balancer, load }));
            }
        }
    }

    /// Balancers that would place nothing, although a worker is ready and has been for a while.
    pub(super) fn idle_balancers(&mut self) -> Vec<Party> {
        let ready = self.hosts.values().any(|host| {
            host.leads()
                && host.process.as_ref().is_some_and(|process| {
                    process.publisher.facts().workers.iter().any(|worker| {
                        worker.desired == i32::from(Desired::Ready)
                            && worker.observed == i32::from(Observed::Ready)
                            && !worker.lost
                            && !worker.departed
                            && worker.acknowledged_revision >= worker.desired_revision
                    })
                })
        });
        if !ready {
            return Vec::new();
        }
        let mut idle = Vec::new();
        for number in 0..self.params.balancers {
            let party = Party::Balancer(number);
            let now = self.time_of(party);
            if let Some(balancer) = self.balancers.get_mut(&number)
                && !balancer.would_place(now)
            {
                idle.push(party);
            }
        }
        idle
    }
}
