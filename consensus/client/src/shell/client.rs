//! Calls: what is asked of whichever node can answer it.

use std::sync::Arc;
use std::time::Duration;

use forebay_link::Endpoint;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::control::request::Request as Ask;
use forebay_proto::wire::control::response::Response;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::outcome::Outcome;
use forebay_proto::wire::{control as wire, fleet};
use forebay_proto::{ClientId, ClusterId, DrainId, Millis, NodeId, Now, RebalanceId, Revision};
use futures::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use prost::Message;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

use super::links::Links;
use crate::core::error::{Answer, ClientError, NodeError, classify};
use crate::core::facts::{Facts, WorkerFact};
use crate::core::plan::{Next, Plan};
use crate::core::roster::Roster;

/// One question to one node is asked anew after this long: commands are applied once anyway.
const ATTEMPT_PATIENCE: Duration = Duration::from_secs(2);

/// The control plane, for one process. Cheap to clone.
#[derive(Clone)]
pub struct ControlClient {
    inner: Arc<Inner>,
}

struct Inner {
    links: Links,
    roster: Mutex<Roster>,
    client_id: ClientId,
    /// Of the newest command. Held during a command: a client sends one at a time.
    sequence: tokio::sync::Mutex<u64>,
    rng: Mutex<StdRng>,
    origin: Instant,
}

/// What a command that was not refused did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Facts at this revision or later show it.
    pub revision: Revision,
    /// The worker as registered, for a registration.
    pub worker: Option<WorkerFact>,
    /// It was so already.
    pub unchanged: bool,
    /// Workers that it changed, or would have changed without a dry run.
    pub affected: u32,
    /// The drain that began or goes on.
    pub drain: Option<DrainId>,
    /// The rebalance that began or goes on.
    pub rebalance: Option<RebalanceId>,
}

impl ControlClient {
    /// A client of the control plane at these addresses; any one that is up suffices.
    ///
    /// `client_id` must be new for each process: commands are applied once per id and number. `seed`
    /// is for jitter. Nothing is dialled before the first call.
    #[must_use]
    pub fn new(endpoint: Endpoint, control: Vec<String>, client_id: ClientId, seed: u64) -> Self {
        Self {
            inner: Arc::new(Inner {
                links: Links::new(endpoint),
                roster: Mutex::new(Roster::new(control)),
                client_id,
                sequence: tokio::sync::Mutex::default(),
                rng: Mutex::new(StdRng::seed_from_u64(seed)),
                origin: Instant::now(),
            }),
        }
    }

    /// Has the fleet agree on a command, once, however often the network makes us ask.
    ///
    /// Commands of one client are sent one after the other; waiting for one's turn counts.
    ///
    /// # Errors
    ///
    /// Returns why it was not agreed on, or that it is not known whether it was.
    pub async fn propose(
        &self,
        action: Action,
        reason: &str,
        deadline: Duration,
    ) -> Result<Done, ClientError> {
        let until = Instant::now() + deadline;
        let turn = tokio::time::timeout_at(until, self.inner.sequence.lock()).await;
        let Ok(mut sequence) = turn else {
            return Err(ClientError::DeadlineExceeded {
                tried: Default::default(),
            });
        };
        *sequence += 1;
        let propose = wire::Propose {
            client: self.inner.client_id.to_wire(),
            sequence: *sequence,
            command: fleet::Command {
                action: Some(action),
            }
            .encode_to_vec()
            .into(),
            reason: reason.into(),
            deadline_ms: 0,
        };
        let ask = |left: Duration| {
            Ask::Propose(wire::Propose {
                deadline_ms: Millis::from_duration(left).wire(),
                ..propose.clone()
            })
        };
        let left = until.saturating_duration_since(Instant::now());
        let (address, response) = self.call(left, ask).await?;
        self.inner.roster.lock().led_by(&address);
        match response {
            Response::Outcome(fleet::Outcome {
                outcome: Some(outcome),
            }) => read_outcome(&address, outcome),
            _ => Err(unexpected(&address)),
        }
    }

    /// The facts as of now: at least as new as anything that was agreed on before this call.
    ///
    /// # Errors
    ///
    /// Returns why they could not be read.
    pub async fn read(&self, deadline: Duration) -> Result<Facts, ClientError> {
        let ask = |left| {
            Ask::Read(wire::Read {
                deadline_ms: Millis::from_duration(left).wire(),
            })
        };
        let (address, response) = self.call(deadline, ask).await?;
        let Response::Facts(facts) = response else {
            return Err(unexpected(&address));
        };
        let facts = Facts::from_wire(facts).map_err(|error| ClientError::Unintelligible {
            address,
            problem: error.to_string(),
        })?;
        self.inner.roster.lock().learn(&facts.members);
        Ok(facts)
    }

    /// The newest `limit` entries of the audit and the head of its chain, as the first node that answers
    /// has them; needs no quorum.
    ///
    /// # Errors
    ///
    /// Returns why they could not be read.
    pub async fn audit(
        &self,
        limit: u32,
        deadline: Duration,
    ) -> Result<wire::AuditTail, ClientError> {
        let ask = |_| {
            Ask::Audit(wire::Audit {
                limit,
                ..wire::Audit::default()
            })
        };
        match self.call(deadline, ask).await? {
            (_, Response::Audit(tail)) => Ok(tail),
            (address, _) => Err(unexpected(&address)),
        }
    }

    /// As [`ControlClient::audit`], at least as new as anything that was agreed on before this call.
    ///
    /// # Errors
    ///
    /// Returns why it could not be read, among that that there is no quorum.
    pub async fn agreed_audit(
        &self,
        limit: u32,
        deadline: Duration,
    ) -> Result<wire::AuditTail, ClientError> {
        let ask = |left| {
            Ask::Audit(wire::Audit {
                limit,
                deadline_ms: Millis::from_duration(left).wire(),
                from: 0,
            })
        };
        match self.call(deadline, ask).await? {
            (_, Response::Audit(tail)) => Ok(tail),
            (address, _) => Err(unexpected(&address)),
        }
    }

    /// What each node's files have of the audit from this number on, at most `limit` entries; `begins` says where a
    /// node's files begin. A node that does not answer, or keeps no files, is left out.
    pub async fn audit_files(
        &self,
        from: u64,
        limit: u32,
        patience: Duration,
    ) -> Vec<wire::AuditTail> {
        let asked = self.addresses().into_iter().map(|address| async move {
            let ask = Ask::Audit(wire::Audit {
                limit,
                from,
                deadline_ms: 0,
            });
            match self.ask(&address, ask, patience).await {
                Ok(Response::Audit(tail)) => Some(tail).filter(|tail| tail.begins.is_some()),
                Ok(_) | Err(_) => None,
            }
        });
        let answers = futures::future::join_all(asked).await;
        answers.into_iter().flatten().collect()
    }

    /// What the leader heard of these workers' agents, and of all balancers; nothing of it is agreed on.
    ///
    /// # Errors
    ///
    /// Returns why it could not be asked.
    pub async fn holders(
        &self,
        workers: &[String],
        deadline: Duration,
    ) -> Result<wire::HeldLeases, ClientError> {
        let ask = |_| {
            Ask::Holders(wire::Holders {
                workers: workers.to_vec(),
            })
        };
        match self.call(deadline, ask).await? {
            (_, Response::Holders(held)) => Ok(held),
            (address, _) => Err(unexpected(&address)),
        }
    }

    /// What a rebalance of a pool would move, by what its agents recorded in this time; nothing is changed.
    ///
    /// The leader needs some seconds: it asks the agents first.
    ///
    /// # Errors
    ///
    /// Returns why nobody could plan by the deadline.
    pub async fn plan(
        &self,
        pool: &str,
        window: Millis,
        most_moves: u32,
        deadline: Duration,
    ) -> Result<wire::Planned, ClientError> {
        let ask = |patience| {
            Ask::Plan(wire::Plan {
                pool: pool.into(),
                window_ms: window.0,
                most_moves,
                deadline_ms: Millis::from_duration(patience).wire(),
            })
        };
        match self.call_patiently(deadline, deadline, ask).await? {
            (_, Response::Planned(planned)) => Ok(planned),
            (address, _) => Err(unexpected(&address)),
        }
    }

    /// Tells the leader what was recorded, as it wanted.
    ///
    /// # Errors
    ///
    /// Returns why it was not taken.
    pub async fn tell_arrivals(
        &self,
        arrivals: wire::Arrivals,
        deadline: Duration,
    ) -> Result<(), ClientError> {
        let ask = |_| Ask::Arrivals(arrivals.clone());
        match self.call(deadline, ask).await? {
            (_, Response::ArrivalsTaken(_)) => Ok(()),
            (address, _) => Err(unexpected(&address)),
        }
    }

    /// Keeps the caller's lease.
    pub(crate) async fn renew(
        &self,
        renew: wire::Renew,
        deadline: Duration,
    ) -> Result<wire::Renewed, ClientError> {
        let ask = |_| Ask::Renew(renew.clone());
        match self.call(deadline, ask).await? {
            (address, Response::Renewed(renewed)) => {
                self.inner.roster.lock().led_by(&address);
                Ok(renewed)
            }
            (address, _) => Err(unexpected(&address)),
        }
    }

    /// What every node says of itself, or why it says nothing; works without a quorum.
    pub async fn probe_all(
        &self,
        deadline: Duration,
    ) -> Vec<(String, Result<wire::NodeStatus, NodeError>)> {
        let addresses = self.inner.roster.lock().addresses();
        self.probe(addresses, deadline).await
    }

    pub(crate) async fn probe(
        &self,
        addresses: Vec<String>,
        deadline: Duration,
    ) -> Vec<(String, Result<wire::NodeStatus, NodeError>)> {
        let probes = addresses.into_iter().map(|address| async move {
            let ask = Ask::Probe(wire::Probe {});
            let status = match self.ask(&address, ask, deadline).await {
                Ok(Response::Status(status)) => Ok(status),
                Ok(other) => Err(not_helpful(other)),
                Err(error) => Err(error),
            };
            (address, status)
        });
        futures::future::join_all(probes).await
    }

    /// Gives an uninitialised node its place in a new cluster. See [`ControlClient::init`].
    ///
    /// # Errors
    ///
    /// Returns why the node did not take it.
    pub async fn bootstrap(
        &self,
        address: &str,
        cluster_id: ClusterId,
        members: &[forebay_proto::fleet::Member],
        feature_level: u32,
        deadline: Duration,
    ) -> Result<NodeId, NodeError> {
        let ask = Ask::Bootstrap(wire::Bootstrap {
            cluster_id: cluster_id.to_wire(),
            members: members.iter().map(|member| member.to_wire()).collect(),
            feature_level: Some(feature_level),
        });
        match self.ask(address, ask, deadline).await? {
            Response::Bootstrapped(done) => Ok(NodeId(done.node_id)),
            other => Err(not_helpful(other)),
        }
    }

    /// Asks whichever nodes the plan says until one answers or the deadline comes.
    pub(crate) async fn call(
        &self,
        deadline: Duration,
        question: impl Fn(Duration) -> Ask,
    ) -> Result<(String, Response), ClientError> {
        self.call_patiently(ATTEMPT_PATIENCE, deadline, question)
            .await
    }

    /// As [`ControlClient::call`], with another time for each question.
    pub(crate) async fn call_patiently(
        &self,
        attempt: Duration,
        deadline: Duration,
        question: impl Fn(Duration) -> Ask,
    ) -> Result<(String, Response), ClientError> {
        let until = self.now() + deadline;
        let rng = self.child_rng();
        let mut plan = Plan::new(&self.inner.roster.lock(), self.now(), until, rng);
        let mut asked = FuturesUnordered::new();
        loop {
            let wake_up = match plan.next(self.now()) {
                Next::Ask(address) => {
                    let patience = until.since(self.now()).min(attempt);
                    // The node gives up a little earlier, so that it can say why.
                    let question = question(patience.mul_f32(0.9));
                    asked.push(async move {
                        let answer = self.ask(&address, question, patience).await;
                        (address, answer)
                    });
                    continue;
                }
                Next::GiveUp(error) => return Err(error),
                Next::Wait(until) => self.instant(until),
            };
            let (address, answer) = tokio::select! {
                Some(answered) = asked.next() => answered,
                () = tokio::time::sleep_until(wake_up) => continue,
            };
            match answer.map(classify) {
                Ok(Answer::Success(response)) => return Ok((address, response)),
                Ok(Answer::Final(error)) => return Err(error),
                Ok(Answer::TryOn(error)) | Err(error) => plan.failed(self.now(), &address, error),
            }
        }
    }

    pub(crate) async fn ask(
        &self,
        address: &str,
        question: Ask,
        patience: Duration,
    ) -> Result<Response, NodeError> {
        let name = self.name_of(address);
        let question = wire::Request {
            request: Some(question),
        };
        self.inner
            .links
            .ask(address, name.as_deref(), &question, patience)
            .await
    }

    pub(crate) fn note_leader(&self, address: &str) {
        self.inner.roster.lock().led_by(address);
    }

    pub(crate) fn links(&self) -> &Links {
        &self.inner.links
    }

    pub(crate) fn name_of(&self, address: &str) -> Option<String> {
        self.inner
            .roster
            .lock()
            .name_of(address)
            .map(ToOwned::to_owned)
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        self.inner.roster.lock().addresses()
    }

    pub(crate) fn given(&self) -> Vec<String> {
        self.inner.roster.lock().given().to_vec()
    }

    /// Takes from the facts whom to ask, and to which cluster this process belongs.
    pub(crate) fn learn(&self, facts: &Facts) {
        self.inner.links.belong_to(facts.cluster_id);
        self.inner.roster.lock().learn(&facts.members);
    }

    /// A generator of its own for each purpose.
    pub(crate) fn child_rng(&self) -> StdRng {
        StdRng::seed_from_u64(self.inner.rng.lock().random())
    }

    pub(crate) fn now(&self) -> Now {
        Now::at(self.inner.origin.elapsed())
    }

    pub(crate) fn instant(&self, now: Now) -> Instant {
        self.inner.origin + now.since(Now::default())
    }
}

pub(crate) fn read_outcome(address: &str, outcome: Outcome) -> Result<Done, ClientError> {
    let unintelligible = |problem: String| ClientError::Unintelligible {
        address: address.into(),
        problem,
    };
    match outcome {
        Outcome::Done(done) => {
            let worker = done.worker.map(WorkerFact::from_wire).transpose();
            Ok(Done {
                revision: Revision(done.revision),
                worker: worker.map_err(|error| unintelligible(error.to_string()))?,
                unchanged: done.unchanged,
                affected: done.affected,
                drain: (done.drain > 0).then_some(DrainId(done.drain)),
                rebalance: (done.rebalance > 0).then_some(RebalanceId(done.rebalance)),
            })
        }
        Outcome::Refusal(refusal) => Err(Refusal::from_wire(refusal).map_or_else(
            || unintelligible("a refusal of an unknown kind".into()),
            ClientError::Refused,
        )),
    }
}

pub(crate) fn unexpected(address: &str) -> ClientError {
    ClientError::Unintelligible {
        address: address.into(),
        problem: "an answer to another question".into(),
    }
}

/// What a node said in place of the answer to a question that only it can answer.
pub(crate) fn not_helpful(response: Response) -> NodeError {
    match classify(response) {
        Answer::TryOn(error) => error,
        Answer::Final(error) => NodeError::Unreachable {
            problem: error.to_string(),
        },
        Answer::Success(_) => NodeError::Unintelligible {
            problem: "an answer to another question".into(),
        },
    }
}
