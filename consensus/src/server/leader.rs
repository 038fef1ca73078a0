//! What a node does while it leads: leases, cell time, and the stamp on every proposal.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Incarnation, Millis, NodeId, Now, WorkerId};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::watch;
use wire::command::Action;

use super::group::Group;
use super::publish::Publisher;
use crate::fleet::Applied;
use crate::fleet::lease::{Leases, RenewError};
use crate::fleet::reign::{self, Asked, Reign};
use crate::node::MembersChange;
use crate::replica::{ProposeError, ReplicaHandle};

/// How long the leader waits for its own proposals.
const OWN_DEADLINE: Duration = Duration::from_secs(5);

/// Why a command of the leader's own came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeFailure {
    /// Raft did not carry it.
    #[error(transparent)]
    Raft(#[from] ProposeError),
}

/// A node's side of leading. Cheap to clone; works only while the node leads.
#[derive(Clone)]
pub struct Leader(Arc<Inner>);

struct Inner {
    started: Instant,
    replica: ReplicaHandle<Applied>,
    published: Arc<Publisher>,
    group: Group,
    reign: Mutex<Reign>,
    /// The term of the reign, for those who wait for it to begin.
    reigns: watch::Sender<Option<u64>>,
    /// What agents said of themselves and is being agreed: one proposal a worker at a time, and what
    /// came after it. Bounded by the workers of the fleet.
    observing: Mutex<BTreeMap<WorkerId, Observing>>,
    /// How many times faster than the node's clock leases run out and cell time passes.
    pace: u32,
}

struct Observing {
    proposed: wire::ObserveWorker,
    then: Option<wire::ObserveWorker>,
}

impl Leader {
    pub(crate) fn new(
        started: Instant,
        replica: ReplicaHandle<Applied>,
        published: Arc<Publisher>,
        group: Group,
        pace: u32,
    ) -> Self {
        Self(Arc::new(Inner {
            started,
            replica,
            published,
            group,
            reign: Mutex::default(),
            reigns: watch::Sender::new(None),
            observing: Mutex::default(),
            pace,
        }))
    }

    /// The node's monotonic clock.
    #[must_use]
    pub fn now(&self) -> Now {
        Now::at(self.0.started.elapsed() * self.0.pace)
    }

    /// Whether this node leads, as far as it knows, and has applied all that was agreed before.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.0.reign.lock().term().is_some()
    }

    /// The newest facts that this node has applied.
    #[must_use]
    pub fn facts(&self) -> Arc<wire::Facts> {
        self.0.published.facts()
    }

    /// The least feature level that a member understands; 0 while one of them is not there to say it.
    #[must_use]
    pub fn members_level(&self) -> u32 {
        if self.0.replica.status().borrow().members.is_joint() {
            // Who is on the way out applies what is agreed until the others have left it.
            return 0;
        }
        self.0.group.feature_level()
    }

    /// Looks at the leases. They mean nothing unless this node leads.
    pub fn with_leases<T>(&self, look: impl FnOnce(&Leases, Now) -> T) -> T {
        let now = self.now();
        look(self.0.reign.lock().leases(), now)
    }

    /// The cell's time, which commands are stamped with; means nothing unless this node leads.
    #[must_use]
    pub fn cell_time(&self) -> Millis {
        let now = self.now();
        self.0.reign.lock().cell_time(now)
    }

    /// Proposes a command of the control plane's own.
    ///
    /// # Errors
    ///
    /// Returns why it was not carried. A refusal by the state machine is a result, not an error.
    pub async fn propose(
        &self,
        action: Action,
        reason: &str,
    ) -> Result<wire::Outcome, ProposeFailure> {
        let command = wire::Command {
            action: Some(action),
        };
        let actor = wire::Actor {
            identity: "control".into(),
            address: String::new(),
        };
        let asked = Asked {
            actor,
            client: Bytes::from_static(&[0; 16]),
            // The leader's own commands may be applied twice without harm.
            sequence: 0,
            command: command.encode_to_vec().into(),
            reason: reason.into(),
            registers: None,
            takes_capacity: false,
        };
        let deadline = tokio::time::Instant::now() + OWN_DEADLINE;
        Ok(self.propose_for(asked, None, deadline).await?)
    }

    /// Stamps and proposes what somebody asked.
    pub(crate) async fn propose_for(
        &self,
        asked: Asked,
        change: Option<MembersChange>,
        deadline: tokio::time::Instant,
    ) -> Result<wire::Outcome, ProposeError> {
        let entry = self.stamp(asked).ok_or_else(|| ProposeError::NotLeader {
            leader: self.0.replica.status().borrow().leader,
        })?;
        let replica = &self.0.replica;
        let applied = match change {
            Some(change) => replica.propose_change(change, entry, deadline).await?,
            None => replica.propose(entry, deadline).await?,
        };
        Ok(applied.output.outcome)
    }

    fn stamp(&self, asked: Asked) -> Option<Bytes> {
        self.0.reign.lock().stamp(self.now(), asked)
    }

    /// Whether this node leads; waits while it was elected but has not applied yet what was agreed
    /// before, because until then it can judge nothing.
    pub(crate) async fn leads(&self, deadline: tokio::time::Instant) -> bool {
        let (mut status, mut reigns) = (self.0.replica.status(), self.0.reigns.subscribe());
        let settled = async {
            loop {
                let elected = reign::elected(&status.borrow_and_update());
                if elected.is_none() || *reigns.borrow_and_update() == elected {
                    return elected.is_some();
                }
                let changed = tokio::select! {
                    changed = status.changed() => changed,
                    changed = reigns.changed() => changed,
                };
                if changed.is_err() {
                    return false;
                }
            }
        };
        tokio::time::timeout_at(deadline, settled)
            .await
            .unwrap_or(false)
    }

    /// Takes a renewal, if this node leads.
    pub(crate) fn renewed(
        &self,
        renew: impl Fn(&mut Leases, Now) -> Result<Duration, RenewError>,
    ) -> Option<Result<Duration, RenewError>> {
        let now = self.now();
        let mut reign = self.0.reign.lock();
        reign.renewed(now, || self.0.published.facts(), renew)
    }

    /// A process registered as this incarnation just now, so it lives.
    pub(crate) fn registered(&self, name: &str, incarnation: Incarnation) {
        let now = self.now();
        self.0.reign.lock().registered(now, name, incarnation);
    }

    /// Gets agreed what an agent says of itself, if that is news or something else is under way.
    /// The next renewal says it again if this is lost.
    pub(crate) fn observe(&self, worker: WorkerId, said: wire::ObserveWorker, is_news: bool) {
        let mut observing = self.0.observing.lock();
        if let Some(under_way) = observing.get_mut(&worker) {
            under_way.then = (under_way.proposed != said).then_some(said);
            return;
        }
        if !is_news {
            return;
        }
        let (proposed, then) = (said, None);
        observing.insert(worker, Observing { proposed, then });
        drop(observing);
        let leader = self.clone();
        tokio::spawn(async move {
            let mut next = Some(said);
            while let Some(said) = next {
                let observe = Action::Observe(said);
                if let Err(problem) = leader.propose(observe, "observed state").await {
                    tracing::debug!(%problem, "an observed state was not agreed");
                }
                next = leader.observed(worker);
            }
        });
    }

    /// What to propose after the proposal that came back; without anything the worker is done.
    fn observed(&self, worker: WorkerId) -> Option<wire::ObserveWorker> {
        let mut observing = self.0.observing.lock();
        let under_way = observing.get_mut(&worker)?;
        let next = under_way.then.take();
        match &next {
            Some(said) => under_way.proposed = *said,
            None => {
                observing.remove(&worker);
            }
        }
        next
    }

    /// Follows the replica: begins and ends reigns, and keeps the leases with the facts.
    pub(crate) async fn follow(self) {
        let mut status = self.0.replica.status();
        let mut changes = self.0.published.changes();
        let mut election = None;
        loop {
            changes.mark_unchanged();
            let leads = reign::begun(&mut election, &status.borrow_and_update());
            self.settle(leads);
            tokio::select! {
                changed = status.changed() => if changed.is_err() { return },
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }

    fn settle(&self, leads: Option<u64>) {
        let now = self.now();
        let mut reign = self.0.reign.lock();
        // Under the lock: leases must not follow older facts after newer ones.
        let facts = self.0.published.facts();
        if reign.settle(now, leads, &facts, wall_clock) {
            self.0.reigns.send_replace(leads);
        }
    }

    /// Where the leader listens, as the facts say.
    pub(crate) fn address_of(&self, node: NodeId) -> String {
        let facts = self.0.published.facts();
        let member = facts.members.iter().find(|member| member.id == node.0);
        member
            .map(|member| member.address.clone())
            .unwrap_or_default()
    }
}

fn wall_clock() -> Millis {
    Millis::from_duration(
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default(),
    )
}
