//! What `forebay init` may do: found a cluster on nodes that all answer and all are empty.

use forebay_proto::fleet::{Member, check_address};
use forebay_proto::ids::check_name;
use forebay_proto::wire::control as wire;
use forebay_proto::{ClusterId, NodeId, StoreId};

use super::error::NodeError;

/// Sizes that a control plane can have.
pub const SIZES: [usize; 3] = [1, 3, 5];

/// Why no cluster was founded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InitError {
    /// Not a size that tolerates what it should.
    #[error("{found} control nodes were given: found a cluster with 1, 3 or 5, each listed once")]
    Size {
        /// How many were given.
        found: usize,
    },
    /// An address has no form to dial.
    #[error("--control: {0}")]
    Address(String),
    /// A node did not answer.
    #[error("{address}: {error}: start every node, then init again; nothing was changed")]
    Unreachable {
        /// Which.
        address: String,
        /// What happened.
        error: NodeError,
    },
    /// A node belongs to a cluster.
    #[error(
        "{address} belongs to cluster {cluster} already: nothing was changed. If that cluster is to be given up, stop the node and empty its data directory first"
    )]
    Initialised {
        /// Which.
        address: String,
        /// Its cluster, as text.
        cluster: String,
    },
    /// A node cannot be a member.
    #[error("{address} cannot be a member: {problem}")]
    Unfit {
        /// Which.
        address: String,
        /// Why.
        problem: String,
    },
    /// Two of the addresses or nodes are one.
    #[error("{first} and {second} are the same node or have the same name: list each node once")]
    Twice {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// Some nodes took the new cluster and this one did not.
    #[error(
        "{address} did not take its place in cluster {cluster}: {error}. Run init again with the same --control to finish it"
    )]
    Unfinished {
        /// Which.
        address: String,
        /// The cluster that was begun.
        cluster: ClusterId,
        /// What happened.
        error: NodeError,
    },
}

/// What each node said when it was probed.
pub type Probed = (String, Result<wire::NodeStatus, NodeError>);

/// What to found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Founding {
    /// The cluster: the one drawn, or one that an earlier `init` began.
    pub cluster_id: ClusterId,
    /// Its members, numbered in the order they were given.
    pub members: Vec<Member>,
    /// The least feature level that any of them understands.
    pub feature_level: u32,
    /// Addresses that have yet to take their place, to be asked one after the other. Every `init` of
    /// these nodes has the same order, so that of two at once one fails at its first node, having
    /// changed nothing, instead of each taking some.
    pub missing: Vec<String>,
}

/// Checks that a cluster can be founded on these nodes.
///
/// An `init` that was interrupted can be finished: nodes that took their place in a cluster whose
/// members are exactly these are passed over, as long as one is still empty.
///
/// # Errors
///
/// Returns the first reason why not; nothing was changed then.
pub fn plan(drawn: ClusterId, probed: &[Probed]) -> Result<Founding, InitError> {
    if !SIZES.contains(&probed.len()) {
        return Err(InitError::Size {
            found: probed.len(),
        });
    }
    let mut members: Vec<Member> = vec![];
    let mut statuses = vec![];
    for (number, (address, status)) in (1..).zip(probed) {
        let status = status.as_ref().map_err(|error| InitError::Unreachable {
            address: address.clone(),
            error: error.clone(),
        })?;
        check_address(address).map_err(InitError::Address)?;
        let member = member(NodeId(number), address, status)?;
        let same = |other: &&Member| {
            other.name == member.name
                || other.address == member.address
                || other.store_id == member.store_id
        };
        if let Some(first) = members.iter().find(same) {
            return Err(InitError::Twice {
                first: first.address.clone(),
                second: address.clone(),
            });
        }
        members.push(member);
        statuses.push((address, status));
    }
    let wire: Vec<_> = members.iter().map(Member::to_wire).collect();
    let mut cluster_id = None;
    for (address, status) in &statuses {
        if !status.initialised {
            continue;
        }
        let theirs = ClusterId::from_wire(&status.cluster_id).ok();
        let unfinished = theirs
            .filter(|theirs| status.members == wire && cluster_id.is_none_or(|id| id == *theirs));
        let initialised = || InitError::Initialised {
            address: (*address).clone(),
            cluster: theirs.map_or_else(|| "?".into(), |id| id.to_string()),
        };
        cluster_id = Some(unfinished.ok_or_else(initialised)?);
    }
    let mut empty: Vec<_> = statuses.iter().filter(|(_, s)| !s.initialised).collect();
    empty.sort_by_key(|(_, status)| status.store_id.clone());
    let missing: Vec<String> = empty
        .iter()
        .map(|(address, _)| (*address).clone())
        .collect();
    if let (true, Some(id), Some((address, _))) = (missing.is_empty(), cluster_id, statuses.first())
    {
        return Err(InitError::Initialised {
            address: (*address).clone(),
            cluster: id.to_string(),
        });
    }
    let levels = statuses.iter().map(|(_, status)| status.feature_level);
    Ok(Founding {
        cluster_id: cluster_id.unwrap_or(drawn),
        feature_level: levels.min().unwrap_or(0),
        members,
        missing,
    })
}

fn member(id: NodeId, address: &str, status: &wire::NodeStatus) -> Result<Member, InitError> {
    let unfit = |problem: String| InitError::Unfit {
        address: address.into(),
        problem,
    };
    check_name("node", &status.name).map_err(|error| unfit(error.to_string()))?;
    let store_id =
        StoreId::from_wire(&status.store_id).map_err(|error| unfit(error.to_string()))?;
    Ok(Member {
        id,
        name: status.name.clone(),
        address: address.into(),
        store_id,
        learner: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAWN: ClusterId = ClusterId([9; 16]);

    fn empty(number: u8) -> Probed {
        let status = wire::NodeStatus {
            name: format!("c{number}"),
            store_id: StoreId([number; 16]).to_wire(),
            feature_level: u32::from(number),
            ..Default::default()
        };
        (format!("h{number}:7400"), Ok(status))
    }

    fn three() -> [Probed; 3] {
        [empty(1), empty(2), empty(3)]
    }

    fn taken(probed: &mut Probed, members: &[Member]) {
        let status = probed.1.as_mut().unwrap();
        status.initialised = true;
        status.cluster_id = ClusterId([8; 16]).to_wire();
        status.members = members.iter().map(Member::to_wire).collect();
    }

    #[test]
    fn empty_nodes_are_numbered_in_the_order_given() {
        let founding = plan(DRAWN, &three()).unwrap();
        let ids: Vec<_> = founding
            .members
            .iter()
            .map(|m| (m.id.0, &*m.name))
            .collect();
        assert_eq!(ids, [(1, "c1"), (2, "c2"), (3, "c3")]);
        assert_eq!(founding.cluster_id, DRAWN);
        assert_eq!(founding.missing.len(), 3);
        assert_eq!(founding.feature_level, 1, "c1 understands no more");
        assert_eq!(plan(DRAWN, &three()[..1]).unwrap().members.len(), 1);
    }

    #[test]
    fn it_refuses_what_is_not_all_there_and_all_empty() {
        let refused = |change: fn(&mut [Probed; 3])| {
            let mut probed = three();
            change(&mut probed);
            plan(DRAWN, &probed).unwrap_err().to_string()
        };
        assert!(refused(|p| p[1].1 = Err(NodeError::Silent)).contains("start every node"));
        assert!(refused(|p| taken(&mut p[2], &[])).contains("belongs to cluster 0808"));
        assert!(refused(|p| p[1] = empty(1)).contains("the same node"));
        assert!(refused(|p| p[1].1.as_mut().unwrap().store_id.clear()).contains("cannot be"));
        assert!(refused(|p| p[1].0 = "nowhere".into()).contains("host:port"));
        assert!(matches!(
            plan(DRAWN, &three()[..2]),
            Err(InitError::Size { found: 2 })
        ));
    }

    #[test]
    fn an_interrupted_init_is_finished_with_the_cluster_it_began() {
        let members = plan(DRAWN, &three()).unwrap().members;
        let mut probed = three();
        taken(&mut probed[0], &members);
        let founding = plan(DRAWN, &probed).unwrap();
        assert_eq!(founding.cluster_id, ClusterId([8; 16]));
        assert_eq!(founding.missing, ["h2:7400", "h3:7400"]);
    }

    #[test]
    fn every_init_asks_the_nodes_in_the_same_order_however_they_were_listed() {
        let mut probed = three();
        for _ in 0..probed.len() {
            probed.rotate_left(1);
            let missing = plan(DRAWN, &probed).unwrap().missing;
            assert_eq!(missing, ["h1:7400", "h2:7400", "h3:7400"]);
        }
    }

    #[test]
    fn a_cluster_that_is_whole_is_not_founded_again() {
        let members = plan(DRAWN, &three()).unwrap().members;
        let mut probed = three();
        probed.iter_mut().for_each(|p| taken(p, &members));
        assert!(matches!(
            plan(DRAWN, &probed),
            Err(InitError::Initialised { .. })
        ));
    }
}
