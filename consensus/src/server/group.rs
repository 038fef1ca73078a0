//! Who belongs to the group, and the messages that wait for each: follows the members as they are
//! applied.
//!
//! Beside the members there are guests: nodes that were added after the last change that this node
//! has applied. They say so themselves, with an id that nobody had before, and a follower that is
//! behind must be able to answer one that leads already. They become members, or go, with the change.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_proto::fleet::Member;
use forebay_proto::{ClusterId, FEATURE_LEVEL, NodeId};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use crate::node::{Members, Message};
use crate::store::ClusterFile;

/// Messages that wait for one peer; more are dropped, which Raft takes as loss.
const MAX_WAITING: usize = 1_024;
/// Of them, places that only snapshots may take: one that is lost without a report leaves its peer
/// without any message for ever, and Raft makes no second one before the report.
const KEPT_FOR_SNAPSHOTS: usize = 4;

/// A member that was silent for longer may come back as an older version.
const PRESENT: Duration = Duration::from_secs(3);

/// The peers of one member. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Group(Arc<Inner>);

struct Inner {
    cluster_id: ClusterId,
    own: NodeId,
    state: Mutex<State>,
    /// Counts changes, to wake who starts the peers' tasks.
    changed: watch::Sender<u64>,
}

struct State {
    /// The members as last applied, this node included.
    members: Vec<Member>,
    /// The newest id that any member had by then.
    newest: NodeId,
    peers: BTreeMap<NodeId, Peer>,
    /// The replica has ended.
    closed: bool,
}

struct Peer {
    member: Member,
    queue: mpsc::Sender<Message>,
    /// The other end, until the peer's task takes it.
    waiting: Option<mpsc::Receiver<Message>>,
    /// Which start of it dialled us last, by its Hello.
    ///
    /// A peer that was killed and started again leaves our link to it dead without a sign; its own new
    /// link is that sign. Without it the first votes of the next election would be lost.
    boot: watch::Sender<u64>,
    heard: Heard,
    /// The newest feature that this start of it understands.
    level: u32,
}

/// When a message of a peer came last.
pub(crate) type Heard = Arc<Mutex<Option<Instant>>>;

/// A peer whose task is to be started.
pub(crate) struct Starting {
    pub(crate) member: Member,
    pub(crate) queue: mpsc::Receiver<Message>,
    pub(crate) boot: watch::Receiver<u64>,
}

/// A peer that has dialled.
pub(crate) struct Caller {
    pub(crate) id: NodeId,
    pub(crate) heard: Heard,
    /// Ends when it belongs to the group no more.
    pub(crate) belongs: watch::Receiver<u64>,
}

/// Why a node that has dialled is none of the group.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stranger {
    /// It was a member and is none any more: its id is not a new one.
    Removed,
    /// No member has its name.
    Unknown,
    /// There is no room for another guest.
    TooMany,
    /// This node is stopping, and knows nobody any more: it may not say that one was removed.
    Stopping,
}

impl Group {
    /// The members as this disk knows them from when it became one of them; newer ones follow by
    /// [`Group::follow`].
    pub(crate) fn new(cluster: &ClusterFile) -> Self {
        let members: Vec<Member> = cluster
            .members
            .iter()
            .map(super::lifecycle::member)
            .collect();
        let newest = members.iter().map(|member| member.id).max();
        let group = Self(Arc::new(Inner {
            cluster_id: cluster.cluster_id,
            own: cluster.node_id,
            state: Mutex::new(State {
                members: vec![],
                newest: NodeId(0),
                peers: BTreeMap::new(),
                closed: false,
            }),
            changed: watch::Sender::new(0),
        }));
        group.follow(&members, newest.unwrap_or(cluster.node_id));
        group
    }

    /// Takes the members as they were just applied. Called on the replica's thread, before any message
    /// that follows from them.
    pub(crate) fn follow(&self, members: &[Member], newest: NodeId) {
        let mut state = self.0.state.lock();
        if state.members == members && state.newest == newest {
            return;
        }
        state.members = members.to_vec();
        state.newest = newest;
        let State { members, peers, .. } = &mut *state;
        peers.retain(|id, peer| {
            *id > newest
                || members
                    .iter()
                    .any(|one| one.id == *id && one.address == peer.member.address)
        });
        for member in members.iter().filter(|member| member.id != self.0.own) {
            peers
                .entry(member.id)
                .and_modify(|peer| peer.member = member.clone())
                .or_insert_with(|| Peer::new(member.clone()));
        }
        drop(state);
        self.0.changed.send_modify(|count| *count += 1);
    }

    /// Queues a message; the replica calls it.
    pub(crate) fn send(&self, to: NodeId, message: Message) {
        if let Some(peer) = self.0.state.lock().peers.get(&to)
            && (message.has_snapshot() || peer.queue.capacity() > KEPT_FOR_SNAPSHOTS)
        {
            // Full: the peer's task reports it unreachable, and Raft sends again.
            let _ = peer.queue.try_send(message);
        }
    }

    /// Wakes after each change of the peers.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    /// Peers whose tasks are not started yet.
    pub(crate) fn starting(&self) -> Vec<Starting> {
        let mut state = self.0.state.lock();
        let peers = state.peers.values_mut();
        let starting = peers.filter_map(|peer| {
            Some(Starting {
                queue: peer.waiting.take()?,
                member: peer.member.clone(),
                boot: peer.boot.subscribe(),
            })
        });
        starting.collect()
    }

    /// The members as last applied, this node included.
    pub(crate) fn members(&self) -> Vec<Member> {
        self.0.state.lock().members.clone()
    }

    /// The newest id that any member had by then.
    pub(crate) fn newest(&self) -> NodeId {
        self.0.state.lock().newest
    }

    /// Whether this node is a member, as far as it has applied.
    pub(crate) fn has_own(&self) -> bool {
        let state = self.0.state.lock();
        state.members.iter().any(|member| member.id == self.0.own)
    }

    /// How long ago a message of this peer came.
    pub(crate) fn heard_ago(&self, peer: NodeId) -> Option<Duration> {
        let state = self.0.state.lock();
        let heard = *state.peers.get(&peer)?.heard.lock();
        heard.map(|heard| heard.elapsed())
    }

    /// The least feature level that a member understands; 0 while one of them is not there to say it.
    pub(crate) fn feature_level(&self) -> u32 {
        let state = self.0.state.lock();
        let others = state.members.iter().filter(|one| one.id != self.0.own);
        let levels = others.map(|one| {
            let peer = state.peers.get(&one.id);
            let present = peer.filter(|peer| {
                let heard = *peer.heard.lock();
                heard.is_some_and(|heard| heard.elapsed() < PRESENT)
            });
            present.map_or(0, |peer| peer.level)
        });
        levels.min().unwrap_or(FEATURE_LEVEL).min(FEATURE_LEVEL)
    }

    /// The member or guest that the one who has dialled must be. `says` is what it says of itself, with
    /// the address that it dialled from, which is where it listens, too.
    pub(crate) fn caller(&self, cluster: ClusterId, says: &Member) -> Result<Member, Stranger> {
        let mut state = self.0.state.lock();
        if state.closed {
            return Err(Stranger::Stopping);
        }
        let State { newest, peers, .. } = &mut *state;
        let same_cluster = cluster == self.0.cluster_id;
        if same_cluster && says.id > *newest {
            if peers.len() >= Members::MAX && !peers.contains_key(&says.id) {
                return Err(Stranger::TooMany);
            }
            let guest = peers
                .entry(says.id)
                .or_insert_with(|| Peer::new(says.clone()));
            let guest = guest.member.clone();
            drop(state);
            self.0.changed.send_modify(|count| *count += 1);
            return Ok(guest);
        }
        if same_cluster && says.id.0 > 0 && !peers.contains_key(&says.id) && says.id != self.0.own {
            return Err(Stranger::Removed);
        }
        let known = peers.values().find(|peer| peer.member.name == says.name);
        known
            .map(|peer| peer.member.clone())
            .ok_or(Stranger::Unknown)
    }

    /// Notes that this start of a peer has dialled; `None` if it has just gone.
    pub(crate) fn called(&self, peer: NodeId, boot: u64, level: u32) -> Option<Caller> {
        let mut state = self.0.state.lock();
        let peer_state = state.peers.get_mut(&peer)?;
        peer_state.level = level;
        peer_state.boot.send_replace(boot);
        Some(Caller {
            id: peer,
            heard: peer_state.heard.clone(),
            belongs: peer_state.boot.subscribe(),
        })
    }

    /// The replica has ended: nobody takes messages any more.
    pub(crate) fn close(&self) {
        let mut state = self.0.state.lock();
        state.closed = true;
        state.peers.clear();
    }
}

impl Peer {
    fn new(member: Member) -> Self {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        Self {
            member,
            queue,
            waiting: Some(waiting),
            boot: watch::Sender::new(0),
            heard: Heard::default(),
            level: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use forebay_proto::StoreId;

    use super::*;
    use crate::store::MemberRecord;

    const CLUSTER: ClusterId = ClusterId([1; 16]);

    fn member(id: u64) -> Member {
        Member {
            id: NodeId(id),
            name: format!("c{id}"),
            address: format!("h{id}:1"),
            store_id: StoreId([1; 16]),
            learner: false,
        }
    }

    fn group() -> Group {
        let record = |id| MemberRecord {
            id: NodeId(id),
            name: format!("c{id}"),
            address: format!("h{id}:1"),
            store_id: StoreId([1; 16]),
        };
        let members = vec![record(1), record(2)];
        Group::new(&ClusterFile::new(CLUSTER, NodeId(1), "c1".into(), members))
    }

    #[test]
    fn a_snapshot_finds_room_in_a_queue_that_is_full_of_other_messages() {
        let group = group();
        for _ in 0..2 * MAX_WAITING {
            group.send(NodeId(2), Message::default());
        }
        let mut snapshot = Message::default();
        snapshot.mut_snapshot().data = vec![1].into();
        group.send(NodeId(2), snapshot);
        let queue = &mut group.starting().remove(0).queue;
        assert!(queue.len() < MAX_WAITING);
        let waiting: Vec<Message> = std::iter::from_fn(|| queue.try_recv().ok()).collect();
        assert!(waiting.last().is_some_and(Message::has_snapshot));
    }

    #[test]
    fn peers_come_and_go_with_the_members_and_each_is_started_once() {
        let group = group();
        let names = |group: &Group| -> Vec<String> {
            let starting = group.starting().into_iter();
            starting.map(|peer| peer.member.name).collect()
        };
        assert_eq!(names(&group), ["c2"]);
        group.follow(&[member(1), member(2), member(3)], NodeId(3));
        assert_eq!(names(&group), ["c3"]);
        let gone = group.called(NodeId(2), 7, 1).unwrap().belongs;
        group.follow(&[member(1), member(3)], NodeId(3));
        assert!(names(&group).is_empty() && group.has_own());
        assert!(gone.has_changed().is_err(), "its links are told to end");
        assert!(group.called(NodeId(2), 8, 1).is_none());
        group.follow(&[member(3)], NodeId(3));
        assert!(!group.has_own());
    }

    #[test]
    fn the_members_understand_what_each_of_them_said_since_it_was_heard_last() {
        let group = group();
        assert_eq!(group.feature_level(), 0, "c2 has not said anything");
        let caller = group.called(NodeId(2), 7, 2).unwrap();
        assert_eq!(group.feature_level(), 0, "it has not been heard");
        *caller.heard.lock() = Some(Instant::now());
        assert_eq!(group.feature_level(), 2);
        group.called(NodeId(2), 8, FEATURE_LEVEL + 1).unwrap();
        assert_eq!(group.feature_level(), FEATURE_LEVEL);
        *caller.heard.lock() = Instant::now().checked_sub(PRESENT);
        assert_eq!(group.feature_level(), 0, "it may come back as another");
    }

    #[test]
    fn a_node_that_stops_tells_no_member_that_it_was_removed() {
        let group = group();
        group.close();
        let known = group.caller(CLUSTER, &member(2));
        assert_eq!(known, Err(Stranger::Stopping));
    }

    #[test]
    fn who_dials_is_a_member_a_guest_that_is_newer_than_all_or_a_stranger() {
        let group = group();
        group.follow(&[member(1), member(3)], NodeId(3));
        let known = |says: Member| group.caller(CLUSTER, &says).map(|known| known.id.0);
        assert_eq!(known(member(3)), Ok(3));
        assert_eq!(known(member(2)), Err(Stranger::Removed));
        assert_eq!(known(member(4)), Ok(4), "added while this node was away");
        let empty = |name: &str| Member {
            id: NodeId(0),
            name: name.into(),
            ..member(9)
        };
        assert_eq!(known(empty("c3")), Ok(3), "its disk is looked at next");
        assert_eq!(known(empty("c2")), Err(Stranger::Unknown));
        let other = group.caller(ClusterId([2; 16]), &member(5));
        assert_eq!(other, Err(Stranger::Unknown), "of another cluster");
        group.follow(&[member(1), member(3)], NodeId(4));
        assert_eq!(known(member(4)), Err(Stranger::Removed));
    }

    #[test]
    fn guests_are_bounded() {
        let group = group();
        let known = |id| group.caller(CLUSTER, &member(id)).map(|known| known.id.0);
        let newcomers = 3..3 + Members::MAX as u64;
        let taken = newcomers.filter(|id| known(*id).is_ok()).count();
        assert_eq!(taken, Members::MAX - 1, "beside c2");
        assert_eq!(known(99), Err(Stranger::TooMany));
    }
}
