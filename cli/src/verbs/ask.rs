//! Asking the control plane: one client for one verb.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_control_client::{ClientError, ControlClient, Facts, Group, NodeError};
use forebay_link::{BindError, Endpoint};
use forebay_proto::wire::control::NodeStatus;
use forebay_proto::wire::fleet::{Desired, Observed};
use forebay_proto::{ClientId, NodeId, StoreId};

use crate::context::Context;
use crate::exit::{CliError, Exit};

/// A node that does not answer a question about itself in this time is not reachable.
const PROBE_TIME: Duration = Duration::from_secs(3);

/// The control plane of a context.
pub(crate) struct Asked {
    /// To it.
    pub(crate) client: ControlClient,
    /// How long to wait for an answer.
    pub(crate) timeout: Duration,
    endpoint: Endpoint,
    control: Vec<String>,
}

/// One control node: what the others say of it, and what it says itself.
pub(crate) struct Node {
    /// Its control endpoint.
    pub(crate) address: String,
    /// Its id, name and disk as the members know them.
    pub(crate) member: Option<(NodeId, String, Option<StoreId>)>,
    /// Its own word.
    pub(crate) status: Result<NodeStatus, NodeError>,
}

impl Asked {
    /// Prepares to ask; nothing is dialled yet. Needs a runtime.
    pub(crate) fn new(context: Context) -> Result<Self, CliError> {
        let endpoint = Endpoint::client(&context.credentials).map_err(|error| match error {
            BindError::Credentials(error) => CliError::Credentials(error),
            other @ (BindError::Taken(_) | BindError::Io { .. }) => {
                CliError::because(Exit::Failed, other.to_string())
            }
        })?;
        Ok(Self {
            client: client(&endpoint, context.control.clone()),
            timeout: context.timeout,
            endpoint,
            control: context.control,
        })
    }

    /// The facts as a majority has them.
    ///
    /// # Errors
    ///
    /// Says what each node answered. Nothing can have happened: a read changes nothing.
    pub(crate) async fn read(&self) -> Result<Facts, CliError> {
        let facts = self.client.read(self.timeout).await;
        facts.map_err(of_read)
    }

    /// The control plane's own members, by the word of its leader.
    ///
    /// # Errors
    ///
    /// As [`Asked::read`].
    pub(crate) async fn group(&self) -> Result<Group, CliError> {
        self.client.group(self.timeout).await.map_err(of_read)
    }

    /// Every node that the context or any node names; works without a quorum.
    pub(crate) async fn nodes(&self) -> Vec<Node> {
        let patience = self.timeout.min(PROBE_TIME);
        let mut probed: BTreeMap<_, _> =
            self.client.probe_all(patience).await.into_iter().collect();
        let mut members = BTreeMap::new();
        for status in probed.values().flatten() {
            for member in &status.members {
                let store = StoreId::from_wire(&member.store_id).ok();
                let known = (NodeId(member.id), member.name.clone(), store);
                members.insert(member.address.clone(), known);
            }
        }
        let others: Vec<_> = members
            .keys()
            .filter(|address| !probed.contains_key(*address))
            .cloned()
            .collect();
        if !others.is_empty() {
            probed.extend(client(&self.endpoint, others).probe_all(patience).await);
        }
        let mut nodes: Vec<_> = probed
            .into_iter()
            .map(|(address, status)| Node {
                member: members.get(&address).cloned(),
                address,
                status,
            })
            .collect();
        // An address that is a node's second name is not a second node.
        let mut seen = vec![];
        nodes.sort_by_key(|node| (node.member.is_none(), node.id()));
        nodes.retain(|node| {
            let store = node.status.as_ref().map(|status| status.store_id.clone());
            let new = store.as_ref().map_or(true, |store| !seen.contains(store));
            seen.extend(store);
            new
        });
        nodes
    }

    /// Control nodes as the context gives them.
    pub(crate) fn control(&self) -> &[String] {
        &self.control
    }
}

impl Node {
    /// Its Raft id, as far as anybody knows it.
    pub(crate) fn id(&self) -> Option<NodeId> {
        let own = self
            .status
            .as_ref()
            .ok()
            .map(|status| NodeId(status.node_id));
        own.filter(|id| id.0 != 0)
            .or_else(|| self.member.as_ref().map(|member| member.0))
    }

    /// Its name, as far as anybody knows it.
    pub(crate) fn name(&self) -> String {
        match (&self.status, &self.member) {
            (Ok(status), _) => status.name.clone(),
            (Err(_), Some((_, name, _))) => name.clone(),
            (Err(_), None) => String::new(),
        }
    }

    /// Whether it leads.
    pub(crate) fn leads(&self) -> bool {
        self.status
            .as_ref()
            .is_ok_and(|status| status.initialised && status.leader == status.node_id)
    }
}

/// What a read's failure means: whoever leads would have answered.
pub(crate) fn of_read(error: ClientError) -> CliError {
    let (ClientError::NoQuorum { tried } | ClientError::DeadlineExceeded { tried }) = &error else {
        return error.into();
    };
    let said: Vec<String> = tried
        .0
        .iter()
        .map(|(address, error)| format!("{address} {}", without_address(address, error)))
        .collect();
    CliError::because(
        Exit::Unreachable,
        format!(
            "no control node leads with a majority behind it: start the missing ones, or check addresses and certificates of the context ({})",
            said.join("; ")
        ),
    )
}

/// A node's problem for a place that names its address already.
pub(crate) fn without_address(address: &str, error: &NodeError) -> String {
    let problem = error.to_string();
    match problem.strip_prefix(address) {
        Some(rest) => rest.trim_start().to_owned(),
        None => problem,
    }
}

fn client(endpoint: &Endpoint, control: Vec<String>) -> ControlClient {
    let id = ClientId(rand::random());
    ControlClient::new(endpoint.clone(), control, id, rand::random())
}

/// The word for a desired state.
pub(crate) const fn desired(state: Desired) -> &'static str {
    match state {
        Desired::Unspecified => "unknown",
        Desired::Ready => "ready",
        Desired::Cordoned => "cordoned",
        Desired::Draining => "draining",
    }
}

/// The word for an observed state.
pub(crate) const fn observed(state: Observed) -> &'static str {
    match state {
        Observed::Unspecified => "unknown",
        Observed::Joining => "joining",
        Observed::Ready => "ready",
        Observed::Cordoned => "cordoned",
        Observed::Draining => "draining",
        Observed::Drained => "drained",
        Observed::EngineDown => "engine-down",
    }
}
