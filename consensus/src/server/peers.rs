//! Raft messages between members, over one link each way.
//!
//! Before a message is sent or looked at, both ends compare cluster, node and store id: a member
//! whose disk was emptied has forgotten its votes, and would help to elect a second history.

use std::sync::Arc;
use std::time::Duration;

use forebay_link::{Alpn, Backoff, Code, ConnectError, Expect, Link, LinkClosed};
use forebay_proto::fleet::Member;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::Hello;
use forebay_proto::{ClusterId, NodeId, Role, StoreId};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::group::{Caller, Group, Starting, Stranger};
use super::lifecycle::{Running, Shared};
use super::snapshots::{self, OnItsWay};
use crate::fleet::Applied;
use crate::node::{Message, SnapshotReport, wire};
use crate::replica::ReplicaHandle;
use crate::store::ClusterFile;

const CONNECT_PATIENCE: Duration = Duration::from_secs(1);
const LEAST_BACKOFF: Duration = Duration::from_millis(50);
const MOST_BACKOFF: Duration = Duration::from_millis(500);
/// A peer that takes nothing for so long is taken for gone.
const SEND_PATIENCE: Duration = Duration::from_secs(2);

type Replica = ReplicaHandle<Applied>;

/// A link that ended sooner than this was refused rather than lost.
const LEAST_LIFE: Duration = Duration::from_millis(100);

/// Starts a task for each peer, now and as the members change, until the replica ends.
pub(crate) async fn attend(
    group: Group,
    cluster: ClusterFile,
    shared: Arc<Shared>,
    replica: Replica,
) {
    let mut changes = group.changes();
    let cluster_id = cluster.cluster_id;
    let snapshots = snapshots::Outbound::default();
    loop {
        changes.mark_unchanged();
        for Starting {
            member,
            queue,
            boot,
        } in group.starting()
        {
            let task = PeerTask {
                shared: shared.clone(),
                replica: replica.clone(),
                cluster_id,
                boot,
                snapshots: snapshots.clone(),
                snapshot: OnItsWay::default(),
                member,
                backoff: Backoff::new(LEAST_BACKOFF, MOST_BACKOFF),
                trouble: String::new(),
            };
            tokio::spawn(task.run(queue));
        }
        if !group.has_own() {
            removed(&shared, cluster_id);
        }
        tokio::select! {
            // The sender lives as long as the group.
            _ = changes.changed() => {}
            _ = replica.stopped() => return group.close(),
        }
    }
}

struct PeerTask {
    shared: Arc<Shared>,
    replica: Replica,
    cluster_id: ClusterId,
    member: Member,
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
                    if let Some(LinkClosed::Peer { code, .. }) = link.close_reason()
                        && code == u64::from(Code::Removed as u32)
                    {
                        return removed(&self.shared, self.cluster_id);
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
fn check_disk(ours: ClusterId, member: &Member, hello: &Hello) -> Result<(), String> {
    let name = &member.name;
    if hello.store_id != member.store_id.0[..] {
        let found = StoreId::from_wire(&hello.store_id)
            .map_or_else(|_| "no store id".to_owned(), |id| format!("store {id}"));
        return Err(format!(
            "{name} lost its disk: cluster {ours} knows it with store {}, it answers with {found}. \
             Its votes are forgotten, so it is refused: put the old disk back, or remove the node and \
             add it as a new one; see docs/operators.md, \"A lost disk\"",
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
    let Some(mut caller) = admit(&running, link) else {
        return;
    };
    loop {
        let mut stream = tokio::select! {
            stream = link.accept_one_way() => match stream {
                Ok(stream) => stream,
                Err(_) => return,
            },
            changed = caller.belongs.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return part(&running, caller.id, link),
            },
        };
        let (replica, from, link) = (running.replica.clone(), caller.id, link.clone());
        let heard = caller.heard.clone();
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
                *heard.lock() = Some(std::time::Instant::now());
                replica.step(from, message);
            }
        });
    }
}

/// Whether the one who has dialled is the member or guest that it must be.
fn admit(running: &Running, link: &Link) -> Option<Caller> {
    let (hello, name) = (link.hello(), &link.peer().name);
    let cluster = ClusterId::from_wire(&hello.cluster_id).unwrap_or(ClusterId([0; 16]));
    let says = Member {
        id: NodeId(hello.node_id),
        name: name.clone(),
        address: link.remote().to_string(),
        store_id: StoreId::from_wire(&hello.store_id).unwrap_or(StoreId([0; 16])),
        learner: false,
    };
    let known = match running.group.caller(cluster, &says) {
        Ok(known) => known,
        Err(stranger) => {
            let (code, problem) = match stranger {
                Stranger::Removed => (Code::Removed, "removed from the cluster"),
                Stranger::Stopping => (Code::Shutdown, "this node is stopping"),
                Stranger::Unknown => (Code::Identity, "no member of this cluster"),
                Stranger::TooMany => (
                    Code::Identity,
                    "too many nodes say that they were just added",
                ),
            };
            if code == Code::Identity {
                tracing::warn!(peer = name, problem, "refused a peer");
            }
            link.close(code, problem);
            return None;
        }
    };
    if let Err(problem) = check_disk(running.cluster.cluster_id, &known, hello) {
        tracing::warn!(peer = name, problem, "refused a peer");
        link.close(Code::Identity, &problem);
        return None;
    }
    running
        .group
        .called(known.id, hello.boot, hello.feature_level)
}

/// A peer's place in the group has ended, or is another one.
fn part(running: &Running, peer: NodeId, link: &Link) {
    if running.group.members().iter().any(|one| one.id == peer) {
        link.close(Code::Normal, "its address changed: dial again");
    } else {
        link.close(Code::Removed, "removed from the cluster");
    }
}

/// The others say, or this node has applied, that it is no member any more.
fn removed(shared: &Shared, cluster: ClusterId) {
    shared.set_problem(&format!(
        "{} was removed from cluster {cluster} and takes no part: stop it. To have it back, move its data \
         directory away, start it, and `forebay raft add` it as a new node",
        shared.name
    ));
}

/// A member of a cluster knows this node with another disk than this empty one.
fn lost_disk(shared: &Shared, hello: &Hello) {
    if let Ok(cluster) = ClusterId::from_wire(&hello.cluster_id) {
        shared.set_problem(&format!(
            "{} lost its disk: cluster {cluster} counts it as a member, but this data directory is \
             empty (store {}). It takes no part, and cannot be initialised again, because a second \
             history could begin. Put the old disk back, or remove the node and add it as a new one; see \
             docs/operators.md, \"A lost disk\"",
            shared.name, shared.store_id
        ));
    }
}
