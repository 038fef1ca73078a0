//! The loop on the leader: a step, its proposals one after the other, a pause.
#![allow(clippy::disallowed_methods)] // The rim waits.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use forebay_consensus::fleet::lease::Leases;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{DrainId, Millis, Now, RebalanceId};

use forebay_consensus::server;

use crate::controller::{Action, Controller};

/// Between two steps.
pub const STEP_EVERY: Duration = Duration::from_millis(500);

/// The control node, as the loop needs it.
pub trait Leader: Send + Sync + 'static {
    /// Whether this node leads, as far as it knows.
    fn is_leader(&self) -> bool;

    /// The clock that the leases are kept by.
    fn now(&self) -> Now;

    /// Who was heard, after following the facts as of now ([`Leases::follow`]).
    fn leases(&self) -> Leases;

    /// The least feature level that a member of the group understands, 0 while that is not known.
    fn members_level(&self) -> u32;

    /// The cell's time, as a proposal would be stamped now.
    fn cell_time(&self) -> Millis;

    /// What is agreed.
    fn facts(&self) -> Arc<wire::Facts>;

    /// Proposes a command in the node's own name, with fresh evidence stamped on it, and waits until
    /// it was applied or refused; bounded by the node's own deadline.
    ///
    /// # Errors
    ///
    /// Says why it was not carried out; the next step decides anew.
    fn propose(
        &self,
        action: wire::command::Action,
    ) -> impl Future<Output = Result<(), String>> + Send;
}

impl Leader for server::Leader {
    fn is_leader(&self) -> bool {
        Self::is_leader(self)
    }

    fn now(&self) -> Now {
        Self::now(self)
    }

    fn leases(&self) -> Leases {
        self.with_leases(|leases, _| leases.clone())
    }

    fn members_level(&self) -> u32 {
        Self::members_level(self)
    }

    fn cell_time(&self) -> Millis {
        Self::cell_time(self)
    }

    fn facts(&self) -> Arc<wire::Facts> {
        Self::facts(self)
    }

    async fn propose(&self, action: wire::command::Action) -> Result<(), String> {
        let reason = match &action {
            wire::command::Action::RotateKey(_) => "the first fingerprint key",
            wire::command::Action::RaiseFeatureLevel(_) => "everyone understands it",
            wire::command::Action::PassDrainDeadline(_) => "its deadline passed",
            wire::command::Action::AssignHomes(_) => "as its heat asks for it",
            wire::command::Action::StepRebalance(_) => "it is due",
            wire::command::Action::StopRebalance(_) => "too few first tokens are in time",
            wire::command::Action::ForgetSuspects(_) => "it is long ago",
            _ => "leases ran out",
        };
        let outcome = Self::propose(self, action, reason).await;
        match outcome.map_err(|error| error.to_string())?.outcome {
            Some(wire::outcome::Outcome::Done(_)) => Ok(()),
            Some(wire::outcome::Outcome::Refusal(refusal)) => Err(Refusal::from_wire(refusal)
                .map_or_else(|| "refused".into(), |refusal| refusal.to_string())),
            None => Err("no outcome".into()),
        }
    }
}

/// Runs the loop for as long as it is polled; it does nothing while another node leads.
pub async fn run(leader: Arc<impl Leader>) {
    let mut controller = Controller::default();
    let mut ticks = tokio::time::interval(STEP_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let leads = leader.is_leader();
        let actions = if leads {
            let (leases, facts) = (leader.leases(), leader.facts());
            let members_level = leader.members_level();
            controller.step(
                leader.now(),
                leads,
                &leases,
                &facts,
                members_level,
                leader.cell_time(),
            )
        } else {
            controller = Controller::default();
            vec![]
        };
        for action in actions {
            let action = match action {
                Action::Expire(expire) => {
                    announce(&expire);
                    wire::command::Action::Expire(expire)
                }
                Action::FirstKey => wire::command::Action::RotateKey(wire::RotateKey {
                    expected_epoch: 0,
                    key: rand::random::<[u8; 16]>().to_vec().into(),
                }),
                Action::RaiseFeatureLevel(to) => {
                    tracing::info!(to, "everyone understands a newer feature level: raising it");
                    wire::command::Action::RaiseFeatureLevel(wire::RaiseFeatureLevel { to })
                }
                Action::PassDrainDeadline(id) => {
                    tracing::warn!(drain = %DrainId(id), "its deadline passed before it was drained");
                    wire::command::Action::PassDrainDeadline(wire::PassDrainDeadline { id })
                }
                Action::AssignHomes(assign) => wire::command::Action::AssignHomes(assign),
                Action::StepRebalance(step) => wire::command::Action::StepRebalance(step),
                Action::StopRebalance(stop) => {
                    tracing::warn!(rebalance = %RebalanceId(stop.id), why = stop.why, "it stops");
                    wire::command::Action::StopRebalance(stop)
                }
                Action::ForgetSuspects => {
                    wire::command::Action::ForgetSuspects(wire::ForgetSuspects {})
                }
            };
            if let Err(problem) = leader.propose(action).await {
                tracing::debug!(problem, "a step of the controller was not carried out");
            }
        }
    }
}

fn announce(expire: &wire::ExpireLeases) {
    if !expire.correlated.is_empty() {
        tracing::warn!(
            pools = ?expire.correlated,
            "too many workers are silent at once to believe it: none is declared lost"
        );
    }
    if !expire.evidence.is_empty() {
        let lost = expire.evidence.len();
        tracing::info!(lost, "leases ran out: declaring workers lost");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use forebay_proto::{Incarnation, WorkerId};
    use parking_lot::Mutex;

    use super::*;

    struct Node {
        leads: AtomicBool,
        origin: tokio::time::Instant,
        leases: Leases,
        facts: Arc<wire::Facts>,
        proposed: Mutex<Vec<wire::command::Action>>,
    }

    impl Leader for Node {
        fn is_leader(&self) -> bool {
            self.leads.load(Ordering::Relaxed)
        }
        fn now(&self) -> Now {
            Now::at(self.origin.elapsed())
        }
        fn leases(&self) -> Leases {
            self.leases.clone()
        }
        fn members_level(&self) -> u32 {
            0
        }
        fn cell_time(&self) -> Millis {
            Millis(0)
        }
        fn facts(&self) -> Arc<wire::Facts> {
            self.facts.clone()
        }
        async fn propose(&self, action: wire::command::Action) -> Result<(), String> {
            self.proposed.lock().push(action);
            Err("no quorum".into())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_leader_proposes_again_until_it_is_agreed_and_others_never() {
        let incarnation = Incarnation {
            worker: WorkerId(1),
            grant: 1,
            start: 0,
        };
        let spec = wire::WorkerSpec {
            pool: "p".into(),
            advertise: "h:1".into(),
            models: vec!["m".into()],
            slots: 1,
            ..Default::default()
        };
        let worker = wire::Worker {
            id: 1,
            name: "w1".into(),
            incarnation: Some(incarnation.to_wire()),
            spec: prost::Message::encode_to_vec(&spec).into(),
            ..Default::default()
        };
        let mut leases = Leases::default();
        leases.became_leader(Now::default(), [("w1".into(), incarnation)]);
        let node = Arc::new(Node {
            leads: AtomicBool::new(true),
            origin: tokio::time::Instant::now(),
            leases,
            facts: Arc::new(wire::Facts {
                workers: vec![worker],
                keys: Some(wire::KeyRing {
                    keys: vec![wire::FingerprintKey::default()],
                }),
                ..Default::default()
            }),
            proposed: Mutex::default(),
        });
        let task = tokio::spawn(run(node.clone()));
        tokio::time::sleep(Duration::from_millis(9_900)).await;
        assert_eq!(node.proposed.lock().len(), 0);
        tokio::time::sleep(Duration::from_millis(1_000)).await;
        assert_eq!(node.proposed.lock().len(), 2);
        node.leads.store(false, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(node.proposed.lock().len(), 2);
        task.abort();
    }
}
