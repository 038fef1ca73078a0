//! One connection a control node, dialled when it is needed and again when it is gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forebay_link::{Alpn, ConnectError, Endpoint, Expect, FrameReceiver, FrameSender, Link};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::control as wire;
use forebay_proto::{ClusterId, Role};
use parking_lot::Mutex;

use crate::core::error::NodeError;
use crate::core::roster::MAX_NODES;

/// A first handshake, on a machine that has other things to do.
const DIAL_PATIENCE: Duration = Duration::from_secs(1);

/// Each one that was not answered doubles the patience with the next, up to this: a thousand processes
/// that come back at once have to wait for each other, and whoever begins anew makes the queue longer.
const MOST_DIAL_PATIENCE: Duration = Duration::from_secs(4);

/// Addresses remembered. At the bound all are forgotten; what is in use goes on until it ends.
const MAX_SLOTS: usize = 2 * MAX_NODES;

/// Connections by address.
pub(crate) struct Links {
    endpoint: Endpoint,
    /// The cluster whose facts this process holds: nodes of another one are not spoken to.
    cluster: Mutex<Option<ClusterId>>,
    slots: Mutex<BTreeMap<String, Slot>>,
}

/// Held while dialling, so that one node is dialled once.
type Slot = Arc<tokio::sync::Mutex<Slotted>>;

#[derive(Default)]
struct Slotted {
    link: Option<Link>,
    /// Dials in a row that nobody answered.
    unanswered: u32,
}

impl Slotted {
    fn patience(&self) -> Duration {
        let doubled = DIAL_PATIENCE * 2u32.saturating_pow(self.unanswered.min(8));
        doubled.min(MOST_DIAL_PATIENCE)
    }
}

impl Links {
    pub(crate) fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            cluster: Mutex::default(),
            slots: Mutex::default(),
        }
    }

    /// From now on only nodes of this cluster are spoken to.
    pub(crate) fn belong_to(&self, cluster: ClusterId) {
        *self.cluster.lock() = Some(cluster);
    }

    /// Asks one question and waits for its answer, at most `patience`.
    pub(crate) async fn ask(
        &self,
        address: &str,
        name: Option<&str>,
        question: &wire::Request,
        patience: Duration,
    ) -> Result<wire::response::Response, NodeError> {
        let exchange = self.exchange(address, name, question);
        match tokio::time::timeout(patience, exchange).await {
            Ok(answer) => answer,
            Err(_) => {
                // Its process may be gone and another in its place: the next question dials anew.
                self.forget(address);
                Err(NodeError::Silent)
            }
        }
    }

    async fn exchange(
        &self,
        address: &str,
        name: Option<&str>,
        question: &wire::Request,
    ) -> Result<wire::response::Response, NodeError> {
        let (mut sender, mut receiver) = self.open(address, name, question).await?;
        sender.finish();
        let answer = receiver.recv().await.map_err(|error| unreachable(&error))?;
        let answer = answer.ok_or_else(|| unintelligible("the stream ended without an answer"))?;
        read(&answer)
    }

    /// Opens a stream with a question on it, dialling if there is no connection.
    pub(crate) async fn open(
        &self,
        address: &str,
        name: Option<&str>,
        question: &wire::Request,
    ) -> Result<(FrameSender, FrameReceiver), NodeError> {
        let frame = Frame::message(Kind::Request, question);
        let (mut sender, receiver) = {
            let link = self.link(address, name).await?;
            link.open().map_err(|error| unreachable(&error))?
        };
        sender
            .send(&frame)
            .await
            .map_err(|error| unreachable(&error))?;
        Ok((sender, receiver))
    }

    /// The connection to a node. What the facts call it, its certificate has to.
    pub(crate) async fn link(&self, address: &str, name: Option<&str>) -> Result<Link, NodeError> {
        let mut slot = self.slot(address).lock_owned().await;
        if let Some(link) = slot
            .link
            .as_ref()
            .filter(|link| link.close_reason().is_none())
        {
            self.check_cluster(link)?;
            return Ok(link.clone());
        }
        let expect = name.map_or(Expect::role(Role::Control), |name| {
            Expect::named(Role::Control, name)
        });
        let (endpoint, address) = (self.endpoint.clone(), address.to_owned());
        // Goes on when whoever asked gives up: the next question finds the link.
        let dial = tokio::spawn(async move {
            let patience = slot.patience();
            let dialled = endpoint
                .connect(&address, Alpn::Control, &expect, patience)
                .await;
            slot.unanswered = match &dialled {
                Err(ConnectError::NoAnswer { .. }) => slot.unanswered + 1,
                Ok(_) | Err(_) => 0,
            };
            slot.link = dialled.as_ref().ok().cloned();
            dialled
        });
        let link = dial
            .await
            .map_err(|error| unreachable(&error))?
            .map_err(|error| unreachable(&error))?;
        self.check_cluster(&link)?;
        Ok(link)
    }

    fn slot(&self, address: &str) -> Slot {
        let mut slots = self.slots.lock();
        if slots.len() >= MAX_SLOTS && !slots.contains_key(address) {
            slots.clear();
        }
        slots.entry(address.into()).or_default().clone()
    }

    fn check_cluster(&self, link: &Link) -> Result<(), NodeError> {
        // A node that belongs to none says so itself.
        let Ok(found) = ClusterId::from_wire(&link.hello().cluster_id) else {
            return Ok(());
        };
        match *self.cluster.lock() {
            Some(held) if held != found => Err(NodeError::WrongCluster { found, held }),
            Some(_) | None => Ok(()),
        }
    }

    /// Drops the connection to a node, once nobody uses it. One that is being dialled stays: it is new.
    pub(crate) fn forget(&self, address: &str) {
        let mut slots = self.slots.lock();
        if slots
            .get(address)
            .is_some_and(|slot| slot.try_lock().is_ok())
        {
            slots.remove(address);
        }
    }
}

/// Reads an answer.
pub(crate) fn read(frame: &Frame) -> Result<wire::response::Response, NodeError> {
    if frame.kind != Kind::Response {
        return Err(unintelligible("not a response"));
    }
    let response: wire::Response = frame
        .decode()
        .map_err(|error| unintelligible(&error.to_string()))?;
    response
        .response
        .ok_or_else(|| unintelligible("a response of an unknown kind"))
}

fn unreachable(error: &dyn std::error::Error) -> NodeError {
    NodeError::Unreachable {
        problem: error.to_string(),
    }
}

fn unintelligible(problem: &str) -> NodeError {
    NodeError::Unintelligible {
        problem: problem.into(),
    }
}
