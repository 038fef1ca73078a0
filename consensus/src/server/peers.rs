//! Raft messages between members, over one link each way.
//!
//! Before a message is sent or looked at, both ends compare cluster, node and store id: a member
//! whose disk was emptied has forgotten its votes, and would help to elect a second history.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forebay_link::{Alpn, Backoff, Code, ConnectError, Expect, Link, LinkClosed};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::Hello;
use forebay_proto::{ClusterId, NodeId, Role, StoreId};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::lifecycle::Shared;
use super::snapshots::{self, OnItsWay};
use crate::fleet::Applied;
use crate::node::{Message, SnapshotReport, wire};
use crate::replica::ReplicaHandle;
use crate::store::{ClusterFile, MemberRecord};

/// Messages that wait for one peer; more are dropped, which Raft takes as loss.
const MAX_WAITING: usize = 1_024;
/// Of them, places that only snapshots may take: one that is lost without a report leaves its peer
/// without any message for ever, and Raft makes no second one before the report.
const KEPT_FOR_SNAPSHOTS: usize = 4;
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);
const LEAST_BACKOFF: Duration = Duration::from_millis(50);
const MOST_BACKOFF: Duration = Duration::from_millis(500);
/// A peer that takes nothing for so long is taken for gone.
const SEND_PATIENCE: Duration = Duration::from_secs(2);

type Replica = ReplicaHandle<Applied>;

/// A link that ended sooner than this was refused rather than lost.
const LEAST_LIFE: Duration = Duration::from_millis(100);

/// The peers of one member, before their tasks run.
pub(crate) struct Peers {
    cluster: ClusterFile,
    queues: Vec<(MemberRecord, mpsc::Receiver<Message>)>,
    boots: Boots,
}

/// Which start of each peer dialled us last, by its Hello.
///
/// A peer that was killed and started again leaves our link to it dead without a sign; its own new
/// link is that sign. Without it the first votes of the next election would be lost.
#[derive(Clone, Default)]
pub(crate) struct Boots(Arc<BTreeMap<NodeId, watch::Sender<u64>>>);

impl Boots {
    fn seen(&self, peer: NodeId, boot: u64) {
        if let Some(sender) = self.0.get(&peer) {
            sender.send_replace(boot);
        }
    }

    fn of(&self, peer: NodeId) -> watch::Receiver<u64> {
        let unknown = || watch::Sender::new(0).subscribe();
        self.0
            .get(&peer)
            .map_or_else(unknown, watch::Sender::subscribe)
    }
}

impl Peers {
    /// The peers, and what the replica hands its messages to.
    pub(crate) fn new(
        cluster: &ClusterFile,
    ) -> (Self, impl FnMut(NodeId, Message) + Send + 'static + use<>) {
        let mut senders = BTreeMap::new();
        let mut queues = Vec::new();
        let mut boots = BTreeMap::new();
        for member in cluster
            .members
            .iter()
            .filter(|member| member.id != cluster.node_id)
        {
            let (sender, receiver) = mpsc::channel(MAX_WAITING);
            senders.insert(member.id, sender);
            boots.insert(member.id, watch::Sender::new(0));
            queues.push((member.clone(), receiver));
        }
        let outbound = move |to: NodeId, message: Message| {
            if let Some(queue) = senders.get(&to)
                && (message.has_snapshot() || queue.capacity() > KEPT_FOR_SNAPSHOTS)
            {
                // Full: the peer's task reports it unreachable, and Raft sends again.
                let _ = queue.try_send(message);
            }
        };
        let (cluster, boots) = (cluster.clone(), Boots(Arc::new(boots)));
        (
            Self {
                cluster,
                queues,
                boots,
            },
            outbound,
        )
    }

    /// Where inbound links are noted.
    pub(crate) fn boots(&self) -> Boots {
        self.boots.clone()
    }

    /// Starts a task for each peer.
    pub(crate) fn spawn(self, shared: &Arc<Shared>, replica: &Replica) {
        let snapshots = snapshots::Outbound::default();
        for (member, queue) in self.queues {
            let task = PeerTask {
                shared: shared.clone(),
                replica: replica.clone(),
                cluster_id: self.cluster.cluster_id,
                boot: self.boots.of(member.id),
                snapshots: snapshots.clone(),
                snapshot: OnItsWay::default(),
                member,
                backoff: Backoff::new(LEAST_BACKOFF, MOST_BACKOFF),
                trouble: String::new(),
            };
            tokio::spawn(task.run(queue));
        }
    }
}

struct PeerTask {
    shared: Arc<Shared>,
    replica: Replica,
    cluster_id: ClusterId,
    member: MemberRecord,
    /// The start of it that dialled us last.
    boot: watch::Receiver<u64>,
    snapshots: snapshots::Outbound,
    snapshot: OnItsWay,
    backoff: Backoff,
    /// What was last logged, so that it is said once.
    trouble: String,
}

impl PeerTask {
    async fn run(mut self, mut queue: mpsc::Receiver<Message>) {
        loop {
            match self.connect().await {
                Ok(link) => {
                    self.say(String::new());
                    let connected = Instant::now();
                    if self.carry(&link, &mut queue).await.is_none() {
                        return;
                    }
                    link.close(Code::Normal, "reconnecting");
                    self.replica.report_unreachable(self.member.id);
                    if connected.elapsed() >= LEAST_LIFE {
                        // At once, and with what waits: a vote is not sent twice.
                        self.backoff.reset();
                        continue;
                    }
                }
                Err(trouble) => self.say(trouble),
            }
            self.replica.report_unreachable(self.member.id);
            let pause = self.backoff.next(&mut rand::rng());
            // What waited is old; Raft sends what is still needed.
            let pausing = tokio::time::sleep(pause);
            tokio::pin!(pausing);
            loop {
                tokio::select! {
                    () = &mut pausing => break,
                    message = queue.recv() => match message {
                        Some(message) => self.lost(&message).await,
                        None => return,
                    },
                }
            }
        }
    }

    async fn connect(&self) -> Result<Link, String> {
        let expect = Expect::named(Role::Control, &self.member.name);
        let link = self
            .shared
            .endpoint
            .connect(&self.member.address, Alpn::Raft, &expect, CONNECT_PATIENCE)
            .await
            .map_err(|error: ConnectError| error.to_string())?;
        if link.hello().cluster_id.is_empty() && link.hello().store_id == self.member.store_id.0[..]
        {
            link.close(Code::Normal, "not initialised yet");
            return Err(format!("{} is not initialised yet", self.member.name));
        }
        match check_disk(self.cluster_id, &self.member, link.hello()) {
            Ok(()) => Ok(link),
            Err(problem) => {
                link.close(Code::Identity, &problem);
                Err(problem)
            }
        }
    }

    /// Sends what comes until the link fails; `None` when the replica has ended.
    async fn carry(&mut self, link: &Link, queue: &mut mpsc::Receiver<Message>) -> Option<()> {
        let Ok(mut stream) = link.open_one_way() else {
            return Some(());
        };
        loop {
            let message = tokio::select! {
                message = queue.recv() => message?,
                _ = link.closed() => return Some(()),
                // The watch lives as long as the node.
                Ok(()) = self.boot.changed() => {
                    if *self.boot.borrow_and_update() == link.hello().boot {
                        continue;
                    }
                    return Some(());
                }
            };
            let is_snapshot = !message.get_snapshot().data.is_empty();
            if is_snapshot {
                // On a stream of its own, so that heartbeats pass it.
                let reported_by = (self.replica.clone(), self.member.id);
                self.snapshot
                    .replace(&self.snapshots, link.clone(), message, reported_by);
                continue;
            }
            let frame = Frame::message(Kind::Raft, &wire::to_wire(message));
            match tokio::time::timeout(SEND_PATIENCE, stream.send(&frame)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Some(()),
            }
        }
    }

    async fn lost(&self, message: &Message) {
        if !message.get_snapshot().data.is_empty() {
            self.replica
                .report_snapshot(self.member.id, SnapshotReport::Failed)
                .await;
        }
    }

    fn say(&mut self, trouble: String) {
        if self.trouble != trouble {
            match trouble.as_str() {
                "" => tracing::info!(peer = self.member.name, "connected"),
                trouble => tracing::warn!(peer = self.member.name, trouble, "cannot reach a peer"),
            }
            self.trouble = trouble;
        }
    }
}

/// Whether a peer's Hello is that of the member we know.
fn check_disk(ours: ClusterId, member: &MemberRecord, hello: &Hello) -> Result<(), String> {
    let name = &member.name;
    if hello.store_id != member.store_id.0[..] {
        let found = StoreId::from_wire(&hello.store_id)
            .map_or_else(|_| "no store id".to_owned(), |id| format!("store {id}"));
        return Err(format!(
            "{name} lost its disk: cluster {ours} knows it with store {}, it answers with {found}. \
             Its votes are forgotten, so it is refused: put the old disk back; see docs/operators.md, \
             \"A lost disk\"",
            member.store_id
        ));
    }
    if hello.cluster_id != ours.0[..] || hello.node_id != member.id.0 {
        let theirs = ClusterId::from_wire(&hello.cluster_id)
            .map_or_else(|_| "no cluster".to_owned(), |id| format!("cluster {id}"));
        return Err(format!(
            "{name} says it is node {} of {theirs}, not {} of cluster {ours}: one of them has \
             another cluster's data directory",
            hello.node_id, member.id
        ));
    }
    Ok(())
}

/// Takes a peer's messages, if it is the member that it must be.
pub(crate) async fn receive(shared: &Arc<Shared>, link: &Link) {
    let Some(running) = shared.running() else {
        // It reads our Hello and leaves: at once if this disk is not the one it knows.
        let left = tokio::time::timeout(CONNECT_PATIENCE, link.closed()).await;
        if let Ok(LinkClosed::Peer { code, .. }) = left
            && code == u64::from(Code::Identity as u32)
        {
            lost_disk(shared, link.hello());
        }
        link.close(Code::Normal, "uninitialised");
        return;
    };
    let peer = running
        .cluster
        .members
        .iter()
        .find(|member| member.name == link.peer().name);
    let checked = match peer {
        Some(member) => {
            check_disk(running.cluster.cluster_id, member, link.hello()).map(|()| member)
        }
        None => Err(format!(
            "{} is no member of this cluster",
            link.peer().short()
        )),
    };
    let member = match checked {
        Ok(member) => member,
        Err(problem) => {
            tracing::warn!(peer = link.peer().name, problem, "refused a peer");
            link.close(Code::Identity, &problem);
            return;
        }
    };
    running.boots.seen(member.id, link.hello().boot);
    while let Ok(mut stream) = link.accept_one_way().await {
        let (replica, from, link) = (running.replica.clone(), member.id, link.clone());
        let inbound = running.snapshots.clone();
        tokio::spawn(async move {
            while let Ok(Some(frame)) = stream.recv().await {
                let received = match frame.kind {
                    Kind::Raft => frame.decode().ok(),
                    Kind::SnapshotHead => match inbound.receive(&mut stream, &frame).await {
                        Ok(message) => Some(message),
                        Err(problem) => {
                            tracing::warn!(peer = link.peer().name, %problem, "a snapshot was dropped");
                            return;
                        }
                    },
                    _ => None,
                };
                let Some(message) = received.and_then(|message| wire::from_wire(message).ok())
                else {
                    link.close(Code::Protocol, "not a Raft message");
                    return;
                };
                replica.step(from, message);
            }
        });
    }
}

/// A member of a cluster knows this node with another disk than this empty one.
fn lost_disk(shared: &Shared, hello: &Hello) {
    if let Ok(cluster) = ClusterId::from_wire(&hello.cluster_id) {
        shared.set_problem(&format!(
            "{} lost its disk: cluster {cluster} counts it as a member, but this data directory is \
             empty (store {}). It takes no part, and cannot be initialised again, because a second \
             history could begin. Put the old disk back; see docs/operators.md, \"A lost disk\"",
            shared.name, shared.store_id
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_finds_room_in_a_queue_that_is_full_of_other_messages() {
        let member = |id| MemberRecord {
            id: NodeId(id),
            name: format!("c{id}"),
            address: String::new(),
            store_id: StoreId([1; 16]),
        };
        let members = vec![member(1), member(2)];
        let cluster = ClusterFile::new(ClusterId([1; 16]), NodeId(1), "c1".into(), members);
        let (mut peers, mut outbound) = Peers::new(&cluster);
        for _ in 0..2 * MAX_WAITING {
            outbound(NodeId(2), Message::default());
        }
        let mut snapshot = Message::default();
        snapshot.mut_snapshot().data = vec![1].into();
        outbound(NodeId(2), snapshot);
        let queue = &mut peers.queues[0].1;
        assert!(queue.len() < MAX_WAITING);
        let waiting: Vec<Message> = std::iter::from_fn(|| queue.try_recv().ok()).collect();
        assert!(waiting.last().is_some_and(Message::has_snapshot));
    }
}
