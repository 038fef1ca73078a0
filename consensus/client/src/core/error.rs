//! Why a call did not succeed: what one node said, and what that means for the caller.

use std::fmt;

use forebay_proto::refusal::Refusal;
use forebay_proto::wire::control as wire;
use forebay_proto::{ClusterId, Incarnation};
use wire::failure::Failure;
use wire::response::Response;

/// What one node had to say, when it was not an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// It was not asked before the deadline.
    #[error("not asked in time")]
    NotAsked,
    /// There is no connection to it.
    #[error("{problem}")]
    Unreachable {
        /// Why, with its address.
        problem: String,
    },
    /// It was asked and has not answered.
    #[error("does not answer")]
    Silent,
    /// It is not the leader.
    #[error("is not the leader{}", .leader.as_ref().map_or_else(|| " and knows none".into(), |at| format!(", {at} is")))]
    NotLeader {
        /// Where the leader is, as far as it knows.
        leader: Option<String>,
    },
    /// It leads but does not reach enough of the others.
    #[error("has no quorum (waited {waited_ms} ms)")]
    NoQuorum {
        /// How long it tried.
        waited_ms: u64,
    },
    /// It does not know what became of the command.
    #[error("does not know what became of the command")]
    Unknown,
    /// It has too much to do.
    #[error("is overloaded: {what}")]
    Overloaded {
        /// With what.
        what: String,
    },
    /// It belongs to no cluster yet.
    #[error("is uninitialised: {problem}")]
    Uninitialised {
        /// What it says.
        problem: String,
    },
    /// It belongs to a cluster already.
    #[error("belongs to cluster {} already", .cluster_id.map_or_else(|| "?".into(), |id| id.to_string()))]
    AlreadyInitialised {
        /// Which.
        cluster_id: Option<ClusterId>,
    },
    /// It belongs to another cluster than the one whose facts this process holds.
    #[error(
        "belongs to cluster {found}, but this process holds facts of cluster {held}: check --control; to join {found} give this process another data directory, or delete what the old cluster left in this one"
    )]
    WrongCluster {
        /// Its cluster.
        found: ClusterId,
        /// Ours.
        held: ClusterId,
    },
    /// It stopped taking part.
    #[error("has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
    /// Its answer is none that this version understands.
    #[error("answered what this version does not understand: {problem}")]
    Unintelligible {
        /// What is wrong.
        problem: String,
    },
}

/// Each node that was tried, and what it said last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tried(pub Vec<(String, NodeError)>);

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no node was asked: an earlier command of this process goes on");
        }
        for (i, (address, error)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "; " };
            write!(f, "{comma}{address} {error}")?;
        }
        Ok(())
    }
}

/// Why a call failed. Each variant is another thing to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// No node that was reached leads with enough others behind it.
    #[error(
        "the control plane has no quorum: start the missing nodes or check --control. Nothing that was asked for has to have happened, though it may have ({tried})"
    )]
    NoQuorum {
        /// What each node said.
        tried: Tried,
    },
    /// A node works on it, or did not say what became of it, until the deadline.
    #[error(
        "no answer before the deadline; what was asked for may still happen: look before asking again ({tried})"
    )]
    DeadlineExceeded {
        /// What each node said.
        tried: Tried,
    },
    /// This identity may not ask for that.
    #[error("{identity} may not call {rpc}: use a certificate with a role that may")]
    Unauthorized {
        /// What was called.
        rpc: String,
        /// Who the node takes us for.
        identity: String,
    },
    /// The fleet refused the command.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// No node belongs to a cluster.
    #[error(
        "the control plane is uninitialised: run `forebay init --control ...` once ({problem})"
    )]
    Uninitialised {
        /// What the nodes say.
        problem: String,
    },
    /// The request is not one.
    #[error("the control plane does not take this request: {problem}")]
    BadRequest {
        /// What is wrong with it.
        problem: String,
    },
    /// A newer process took the caller's place.
    #[error("a newer process took this one's place{}: stop this one", .current.map_or_else(String::new, |current| format!(" ({current})")))]
    Superseded {
        /// Who holds it.
        current: Option<Incarnation>,
    },
    /// The answer is none that this version understands.
    #[error("{address} answered what this version does not understand ({problem}): update it")]
    Unintelligible {
        /// Who answered.
        address: String,
        /// What is wrong.
        problem: String,
    },
}

/// What an answer means for the call.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant)] // taken apart where it is made, never kept
pub enum Answer {
    /// It is what was asked for.
    Success(Response),
    /// Another node, or the same one later, may do better.
    TryOn(NodeError),
    /// No node will do better.
    Final(ClientError),
}

/// Reads an answer.
#[must_use]
pub fn classify(response: Response) -> Answer {
    let Response::Failure(wire::Failure { failure }) = response else {
        return Answer::Success(response);
    };
    let Some(failure) = failure else {
        return Answer::TryOn(NodeError::Unintelligible {
            problem: "a failure of an unknown kind".into(),
        });
    };
    match failure {
        Failure::NotLeader(f) => Answer::TryOn(NodeError::NotLeader {
            leader: (f.leader != 0 && !f.leader_address.is_empty()).then_some(f.leader_address),
        }),
        Failure::Unauthorized(f) => Answer::Final(ClientError::Unauthorized {
            rpc: f.rpc,
            identity: f.identity,
        }),
        Failure::Uninitialised(f) => Answer::TryOn(NodeError::Uninitialised { problem: f.problem }),
        Failure::Overloaded(f) => Answer::TryOn(NodeError::Overloaded { what: f.what }),
        Failure::NoQuorum(f) => Answer::TryOn(NodeError::NoQuorum {
            waited_ms: f.waited_ms,
        }),
        Failure::Unknown(wire::Unknown {}) => Answer::TryOn(NodeError::Unknown),
        Failure::BadRequest(f) => Answer::Final(ClientError::BadRequest { problem: f.problem }),
        Failure::AlreadyInitialised(f) => Answer::TryOn(NodeError::AlreadyInitialised {
            cluster_id: ClusterId::from_wire(&f.cluster_id).ok(),
        }),
        Failure::Superseded(f) => Answer::Final(ClientError::Superseded {
            current: Incarnation::from_wire(f.current.as_ref()).ok(),
        }),
        Failure::Stopped(f) => Answer::TryOn(NodeError::Stopped { reason: f.reason }),
    }
}
