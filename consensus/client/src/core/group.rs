//! The control plane's own members as its leader sees them, and what adding one takes next.

use forebay_proto::fleet::{Member, check_address};
use forebay_proto::ids::check_name;
use forebay_proto::wire::control as wire;
use forebay_proto::{ClusterId, NodeId, StoreId};

use super::error::{ClientError, NodeError};

/// The group, by the word of its leader.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Which cluster.
    pub cluster_id: ClusterId,
    /// Its members.
    pub members: Vec<Member>,
    /// The newest id that any member ever had.
    pub newest: NodeId,
    /// Who says so.
    pub leader: NodeId,
    /// Where the leader's log ends.
    pub last_index: u64,
    /// How far the others are.
    pub peers: Vec<wire::PeerStatus>,
}

impl Group {
    /// The group, if one of those who were asked leads it.
    #[must_use]
    pub fn of<'a>(statuses: impl IntoIterator<Item = &'a wire::NodeStatus>) -> Option<Self> {
        let leads = |status: &&wire::NodeStatus| {
            status.initialised && status.node_id != 0 && status.leader == status.node_id
        };
        // One that was deposed may not know it yet.
        let leaders = statuses.into_iter().filter(leads);
        let leader = leaders.max_by_key(|status| status.term)?;
        let members = leader.members.iter().map(Member::from_wire);
        Some(Self {
            cluster_id: ClusterId::from_wire(&leader.cluster_id).ok()?,
            members: members.collect::<Result<_, _>>().ok()?,
            newest: NodeId(leader.newest_member),
            leader: NodeId(leader.node_id),
            last_index: leader.last_index,
            peers: leader.peers.clone(),
        })
    }

    /// The member of this name or id, as `4` or as it is shown, `n4`. A name goes before an id.
    #[must_use]
    pub fn find(&self, name_or_id: &str) -> Option<&Member> {
        let named = self.members.iter().find(|one| one.name == name_or_id);
        let number = name_or_id.strip_prefix('n').unwrap_or(name_or_id);
        let id = number.parse().ok().map(NodeId);
        named.or_else(|| self.members.iter().find(|one| Some(one.id) == id))
    }
}

/// What adding a node takes next. A verb that was interrupted begins anew and gets the step at which it
/// stood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Have the group agree on it, as a learner.
    Agree(Member),
    /// Give it its place: the group has agreed.
    Place(Member),
    /// It is a member and knows it.
    Done(Member),
}

/// Why a node is not added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// An address has no form to dial.
    #[error("{0}")]
    Address(String),
    /// The node does not answer.
    #[error(
        "{address}: {error}: start the node on an empty data directory, then add it again; nothing was changed"
    )]
    Unreachable {
        /// Which.
        address: String,
        /// What happened.
        error: NodeError,
    },
    /// It cannot be a member.
    #[error("{address} cannot be a member: {problem}")]
    Unfit {
        /// Which.
        address: String,
        /// Why.
        problem: String,
    },
    /// It belongs to another cluster.
    #[error(
        "{address} belongs to cluster {cluster}, not to {ours}: nothing was changed. If that one is to be given up, stop the node and move its data directory away first"
    )]
    OtherCluster {
        /// Which.
        address: String,
        /// Its cluster, as text.
        cluster: String,
        /// The one that it was to join.
        ours: ClusterId,
    },
    /// It was a member once.
    #[error(
        "{address} was node {id} of this cluster and was removed; ids are never used again. Stop it, move its data directory away, start it, and add it as a new node"
    )]
    WasRemoved {
        /// Which.
        address: String,
        /// Its id.
        id: NodeId,
    },
    /// The group knows this name with another disk.
    #[error(
        "{name} lost its disk: the cluster knows it as node {id} with store {known}, {address} answers with store {found}. Its votes are forgotten: remove it, then add it as a new node: `forebay raft remove {name}`, then `forebay raft add {address}`"
    )]
    LostDisk {
        /// Its name.
        name: String,
        /// Its id.
        id: NodeId,
        /// The store the cluster knows.
        known: StoreId,
        /// The store that answers.
        found: StoreId,
        /// Where.
        address: String,
    },
    /// The group knows this disk at another address.
    #[error("{name} is known at {known}: add it by that address, or remove it first")]
    OtherAddress {
        /// Its name.
        name: String,
        /// The address the cluster knows.
        known: String,
    },
    /// The group did not agree, or it is not known.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The group has agreed, and the node has not taken its place.
    #[error(
        "the cluster has added {address} as node {id}, but it did not take its place: {error}. Add it again to finish it"
    )]
    Unfinished {
        /// Which.
        address: String,
        /// Its id.
        id: NodeId,
        /// What happened.
        error: NodeError,
    },
}

/// What to do next so that the node at `address`, which says `status`, becomes a member.
///
/// # Errors
///
/// Returns why it cannot; nothing was changed then.
pub fn next(group: &Group, address: &str, status: &wire::NodeStatus) -> Result<Step, AddError> {
    check_address(address).map_err(AddError::Address)?;
    let unfit = |problem: String| AddError::Unfit {
        address: address.into(),
        problem,
    };
    let name = &status.name;
    check_name("node", name).map_err(|error| unfit(error.to_string()))?;
    let store_id =
        StoreId::from_wire(&status.store_id).map_err(|error| unfit(error.to_string()))?;
    if status.initialised {
        let theirs = ClusterId::from_wire(&status.cluster_id).ok();
        if theirs != Some(group.cluster_id) {
            return Err(AddError::OtherCluster {
                address: address.into(),
                cluster: theirs.map_or_else(|| "?".into(), |id| id.to_string()),
                ours: group.cluster_id,
            });
        }
        let id = NodeId(status.node_id);
        let own = group.members.iter().find(|member| member.id == id);
        return own.cloned().map(Step::Done).ok_or(AddError::WasRemoved {
            address: address.into(),
            id,
        });
    }
    if let Some(known) = group.members.iter().find(|one| one.store_id == store_id) {
        if known.address != address {
            return Err(AddError::OtherAddress {
                name: name.clone(),
                known: known.address.clone(),
            });
        }
        return Ok(Step::Place(known.clone()));
    }
    if let Some(known) = group.members.iter().find(|one| one.name == *name) {
        return Err(AddError::LostDisk {
            name: name.clone(),
            id: known.id,
            known: known.store_id,
            found: store_id,
            address: address.into(),
        });
    }
    if let Some(known) = group.members.iter().find(|one| one.address == address) {
        return Err(unfit(format!(
            "its address is that of member {}: remove that one first",
            known.name
        )));
    }
    Ok(Step::Agree(Member {
        id: NodeId(group.newest.0 + 1),
        name: name.clone(),
        address: address.into(),
        store_id,
        learner: true,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: ClusterId = ClusterId([1; 16]);

    fn member(number: u8) -> Member {
        Member {
            id: NodeId(number.into()),
            name: format!("c{number}"),
            address: format!("h{number}:1"),
            store_id: StoreId([number; 16]),
            learner: false,
        }
    }

    fn group() -> Group {
        Group {
            cluster_id: OURS,
            members: vec![member(1), member(2)],
            newest: NodeId(5),
            leader: NodeId(1),
            last_index: 10,
            peers: vec![],
        }
    }

    fn empty(number: u8) -> wire::NodeStatus {
        wire::NodeStatus {
            name: format!("c{number}"),
            store_id: StoreId([number; 16]).to_wire(),
            ..Default::default()
        }
    }

    fn of_cluster(number: u8, cluster: u8) -> wire::NodeStatus {
        wire::NodeStatus {
            initialised: true,
            cluster_id: ClusterId([cluster; 16]).to_wire(),
            node_id: number.into(),
            ..empty(number)
        }
    }

    #[test]
    fn an_empty_node_is_agreed_on_then_gets_its_place_and_then_nothing_is_left_to_do() {
        let mut group = group();
        let Ok(Step::Agree(added)) = next(&group, "h7:1", &empty(7)) else {
            panic!("not to be agreed on")
        };
        assert_eq!((added.id, &*added.name), (NodeId(6), "c7"));
        group.members.push(added.clone());
        assert_eq!(
            next(&group, "h7:1", &empty(7)),
            Ok(Step::Place(added.clone()))
        );
        let placed = wire::NodeStatus {
            node_id: 6,
            ..of_cluster(7, 1)
        };
        assert_eq!(next(&group, "h7:1", &placed), Ok(Step::Done(added)));
    }

    #[test]
    fn a_node_that_cannot_be_added_is_told_why() {
        let refused = |address: &str, status: &wire::NodeStatus| {
            next(&group(), address, status).unwrap_err().to_string()
        };
        let lost = wire::NodeStatus {
            store_id: StoreId([9; 16]).to_wire(),
            ..empty(2)
        };
        let says = refused("h2:1", &lost);
        assert!(says.contains("c2 lost its disk"), "{says}");
        assert!(says.contains("forebay raft remove c2"), "{says}");
        assert!(refused("h7:1", &of_cluster(7, 2)).contains("belongs to cluster 0202"));
        assert!(refused("h4:1", &of_cluster(4, 1)).contains("was removed"));
        assert!(refused("h9:1", &empty(2)).contains("is known at h2:1"));
        assert!(refused("h2:1", &empty(7)).contains("that of member c2"));
        assert!(refused("nowhere", &empty(7)).contains("host:port"));
    }

    #[test]
    fn the_group_is_what_the_leader_of_the_newest_term_says() {
        let leads = |number: u8, term| wire::NodeStatus {
            leader: number.into(),
            term,
            newest_member: term,
            members: vec![member(number).to_wire()],
            ..of_cluster(number, 1)
        };
        let follows = wire::NodeStatus {
            leader: 1,
            ..of_cluster(3, 1)
        };
        let all = [leads(1, 4), leads(2, 5), follows.clone(), empty(7)];
        let group = Group::of(&all).unwrap();
        assert_eq!((group.leader, group.newest), (NodeId(2), NodeId(5)));
        for id in ["2", "n2"] {
            assert_eq!(group.find("c2"), group.find(id));
        }
        assert_eq!(group.find("n"), None);
        assert_eq!(group.find("c3"), None);
        assert_eq!(Group::of([&follows, &empty(7)]), None);
    }
}
