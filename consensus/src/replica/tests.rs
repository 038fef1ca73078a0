//! Replicas on real files and threads, joined by a network in memory.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use forebay_proto::ClusterId;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

use super::*;
use crate::node::{Members, Role, Snapshot, SnapshotReport};
use crate::store::testing::failing;
use crate::store::{ClusterFile, MemberRecord, Opened, StoreOptions};

/// Keeps every command; gives back how many there are. One that came last is not kept again: whoever
/// lost its leader tries once more what may have been done.
#[derive(Default)]
struct Lines(Vec<String>);

impl Machine for Lines {
    type Output = usize;

    fn apply(&mut self, _index: u64, _term: u64, command: &Bytes) -> usize {
        let command = String::from_utf8(command.to_vec()).unwrap();
        if self.0.last() != Some(&command) {
            self.0.push(command);
        }
        self.0.len()
    }

    fn apply_change(&mut self, index: u64, term: u64, command: &Bytes) -> (usize, bool) {
        (self.apply(index, term, command), true)
    }

    fn snapshot(&self) -> Vec<u8> {
        self.0.join("\n").into_bytes()
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        let text = std::str::from_utf8(bytes).map_err(|error| RestoreError(error.to_string()))?;
        self.0 = text.lines().map(str::to_owned).collect();
        Ok(())
    }
}

type Handle = ReplicaHandle<usize>;
type Network = Arc<Mutex<HashMap<u64, Handle>>>;
type Shown = Arc<Mutex<Vec<String>>>;

const WAIT: Duration = Duration::from_secs(20);

fn soon() -> Instant {
    Instant::now() + WAIT
}

fn options() -> ReplicaOptions {
    ReplicaOptions {
        tick: Duration::from_millis(10),
        ..ReplicaOptions::default()
    }
}

fn open(dir: &Path, id: u64, nodes: u64, store_options: StoreOptions) -> (Store, Restored) {
    match Store::open(dir, store_options).unwrap() {
        Opened::Member(store, restored) => (*store, *restored),
        Opened::Uninitialised(empty) => {
            let member = |id| MemberRecord {
                id: NodeId(id),
                name: format!("n{id}"),
                address: String::new(),
                store_id: empty.store_id(),
            };
            let members = (1..=nodes).map(member).collect();
            let cluster =
                ClusterFile::new(ClusterId([1; 16]), NodeId(id), format!("n{id}"), members);
            let voters = Members::new((1..=nodes).map(NodeId), []).unwrap();
            empty
                .bootstrap(cluster, &Snapshot::bootstrap(voters, Bytes::new()))
                .unwrap()
        }
    }
}

/// Starts one replica on `dir`, joined to the others of `network`.
fn launch(
    dir: &Path,
    id: u64,
    nodes: u64,
    network: &Network,
    options: ReplicaOptions,
) -> (Handle, Shown) {
    let shown = Shown::default();
    let (seen, peers, runtime) = (
        shown.clone(),
        network.clone(),
        tokio::runtime::Handle::current(),
    );
    let outbound = move |to: NodeId, message: Message| {
        let (peer, own) = {
            let peers = peers.lock();
            (peers.get(&to.0).cloned(), peers.get(&id).cloned())
        };
        let snapshot = message.has_snapshot();
        let delivered = peer.is_some_and(|peer| peer.step(NodeId(id), message));
        let Some(own) = own else { return };
        if !delivered {
            own.report_unreachable(to);
        }
        if snapshot {
            let report = if delivered {
                SnapshotReport::Delivered
            } else {
                SnapshotReport::Failed
            };
            runtime.spawn(async move { own.report_snapshot(to, report).await });
        }
    };
    let hook = move |machine: &Lines, _applied: u64, _outputs: &[Applied<usize>]| {
        seen.lock().clone_from(&machine.0);
    };
    let opened = open(dir, id, nodes, StoreOptions::default());
    let handle = start(options, opened, Lines::default(), outbound, hook).unwrap();
    network.lock().insert(id, handle.clone());
    (handle, shown)
}

async fn wait_for(handle: &Handle, condition: impl FnMut(&Status) -> bool) -> Status {
    let mut status = handle.status();
    let met = timeout(WAIT, status.wait_for(condition)).await;
    met.expect("in time").expect("it runs").clone()
}

async fn stop(network: &Network, handle: &Handle) {
    network.lock().remove(&handle.id().0);
    let reason = handle.stop().await;
    assert!(matches!(*reason, StopReason::Asked), "{reason}");
}

/// Proposes on whoever leads, as a client would, until it is done.
async fn write(network: &Network, command: &str) -> usize {
    let until = soon();
    loop {
        assert!(Instant::now() < until, "no leader took {command:?}");
        let handles: Vec<Handle> = network.lock().values().cloned().collect();
        for handle in handles {
            if handle.status().borrow().role != Role::Leader {
                continue;
            }
            if let Ok(applied) = handle.propose(command.to_owned().into(), soon()).await {
                return applied.output;
            }
        }
        tokio::task::yield_now().await;
    }
}

async fn leader(network: &Network) -> Handle {
    loop {
        let handles: Vec<Handle> = network.lock().values().cloned().collect();
        if let Some(leader) = handles
            .iter()
            .find(|one| one.status().borrow().role == Role::Leader)
        {
            return leader.clone();
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_single_node_leads_at_once_and_keeps_what_it_acknowledged() {
    let temp = tempfile::tempdir().unwrap();
    let network = Network::default();
    let (handle, shown) = launch(temp.path(), 1, 1, &network, options());
    wait_for(&handle, |status| status.role == Role::Leader).await;
    for number in 1..=20 {
        assert_eq!(write(&network, &format!("c{number}")).await, number);
    }
    let applied = handle.read_index(soon()).await.unwrap();
    assert_eq!(shown.lock().len(), 20);
    assert!(applied >= 21 && handle.status().borrow().leader_heard_ms == 0);
    // Every handle gone: the replica ends without a last word to the disk, as in a crash.
    let stopped = handle.stopped.clone();
    network.lock().clear();
    drop(handle);
    let mut stopped = stopped;
    stopped.wait_for(Option::is_some).await.unwrap();
    let (handle, shown) = launch(temp.path(), 1, 1, &network, options());
    handle.read_index(soon()).await.unwrap();
    assert_eq!(shown.lock().last().map(String::as_str), Some("c20"));
    assert_eq!(write(&network, "more").await, 21);
    stop(&network, &handle).await;
    assert_eq!(
        handle.propose("x".into(), soon()).await,
        Err(ProposeError::Stopped)
    );
    assert_eq!(handle.read_index(soon()).await, Err(ReadError::Stopped));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_come_back_when_the_leader_stops_and_it_catches_up_from_a_snapshot() {
    let temp = tempfile::tempdir().unwrap();
    let network = Network::default();
    let options = ReplicaOptions {
        snapshot_entries: 30,
        keep_entries: 5,
        ..options()
    };
    let dir = |id: u64| temp.path().join(id.to_string());
    for id in 1..=3 {
        launch(&dir(id), id, 3, &network, options);
    }
    for number in 1..=20 {
        assert_eq!(write(&network, &format!("a{number}")).await, number);
    }
    let first = leader(&network).await;
    let follower = network
        .lock()
        .values()
        .find(|one| one.id() != first.id())
        .unwrap()
        .clone();
    follower
        .read_index(soon())
        .await
        .expect("a follower reads through the leader");
    let refused = follower.propose("x".into(), soon()).await;
    assert_eq!(
        refused,
        Err(ProposeError::NotLeader {
            leader: Some(first.id())
        })
    );

    stop(&network, &first).await;
    for number in 21..=100 {
        assert_eq!(write(&network, &format!("b{number}")).await, number);
    }
    // What the stopped node misses is compacted away by now: it gets a snapshot, and the rest.
    let (back, shown) = launch(&dir(first.id().0), first.id().0, 3, &network, options);
    back.read_index(soon()).await.unwrap();
    let expected: Vec<String> = (1..=100)
        .map(|n| format!("{}{n}", if n <= 20 { 'a' } else { 'b' }))
        .collect();
    assert_eq!(*shown.lock(), expected);

    // All stop, all start again, from snapshots and logs.
    let all: Vec<Handle> = network.lock().values().cloned().collect();
    for handle in &all {
        stop(&network, handle).await;
    }
    for id in 1..=3 {
        launch(&dir(id), id, 3, &network, options);
    }
    assert_eq!(write(&network, "last").await, 101);
    let now = leader(&network).await;
    let heir = network
        .lock()
        .values()
        .find(|one| one.id() != now.id())
        .unwrap()
        .clone();
    assert!(matches!(
        heir.transfer(now.id()).await,
        Err(TransferError::Refused(_))
    ));
    now.transfer(heir.id()).await.unwrap();
    wait_for(&heir, |status| status.role == Role::Leader).await;
    let all: Vec<Handle> = network.lock().values().cloned().collect();
    for handle in &all {
        stop(&network, handle).await;
    }
}

#[tokio::test]
async fn without_a_quorum_everything_ends_at_its_deadline() {
    let temp = tempfile::tempdir().unwrap();
    let network = Network::default();
    let (handle, _) = launch(temp.path(), 1, 3, &network, options());
    wait_for(&handle, |status| status.role == Role::PreCandidate).await;
    let deadline = || Instant::now() + Duration::from_millis(250);
    assert_eq!(handle.read_index(deadline()).await, Err(ReadError::Timeout));
    let refused = handle.propose("x".into(), deadline()).await;
    assert_eq!(refused, Err(ProposeError::NotLeader { leader: None }));
    assert!(handle.status().borrow().leader_heard_ms >= 100);
    assert_eq!(
        handle.propose(Bytes::new(), deadline()).await,
        Err(ProposeError::Size(0))
    );
    stop(&network, &handle).await;
}

#[tokio::test]
async fn a_failed_sync_ends_the_replica_with_the_reason_and_acknowledges_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let (disk, orders) = failing();
    let opened = open(temp.path(), 1, 1, disk);
    let hook = |_: &Lines, _: u64, _: &[Applied<usize>]| ();
    let handle = start(options(), opened, Lines::default(), |_, _| (), hook).unwrap();
    wait_for(&handle, |status| status.role == Role::Leader).await;
    orders.sync.store(true, Ordering::Relaxed);
    assert_eq!(
        handle.propose("x".into(), soon()).await,
        Err(ProposeError::Stopped)
    );
    let reason = handle.stopped().await;
    assert!(matches!(*reason, StopReason::Store(_)), "{reason}");
}

#[tokio::test]
async fn a_full_disk_holds_the_replica_until_there_is_room_and_loses_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let (disk, orders) = failing();
    let opened = open(temp.path(), 1, 1, disk);
    let hook = |_: &Lines, _: u64, _: &[Applied<usize>]| ();
    let handle = start(options(), opened, Lines::default(), |_, _| (), hook).unwrap();
    wait_for(&handle, |status| status.role == Role::Leader).await;
    orders.full.store(true, Ordering::Relaxed);
    let waiting = handle.clone();
    let proposed = tokio::spawn(async move { waiting.propose("x".into(), soon()).await });
    wait_for(&handle, |status| status.disk_full).await;
    orders.full.store(false, Ordering::Relaxed);
    let applied = proposed.await.unwrap().unwrap();
    assert_eq!(applied.output, 1);
    wait_for(&handle, |status| !status.disk_full).await;
    handle.stop().await;
}

#[tokio::test]
async fn a_replica_that_waits_for_room_can_be_stopped() {
    let temp = tempfile::tempdir().unwrap();
    let (disk, orders) = failing();
    let opened = open(temp.path(), 1, 1, disk);
    let hook = |_: &Lines, _: u64, _: &[Applied<usize>]| ();
    let handle = start(options(), opened, Lines::default(), |_, _| (), hook).unwrap();
    wait_for(&handle, |status| status.role == Role::Leader).await;
    orders.full.store(true, Ordering::Relaxed);
    let waiting = handle.clone();
    let proposed = tokio::spawn(async move { waiting.propose("x".into(), soon()).await });
    wait_for(&handle, |status| status.disk_full).await;
    let reason = handle.stop().await;
    assert!(matches!(*reason, StopReason::Store(_)), "{reason}");
    assert_eq!(proposed.await.unwrap(), Err(ProposeError::Stopped));
}

#[tokio::test]
async fn the_state_on_disk_is_shown_before_the_replica_can_be_asked() {
    let temp = tempfile::tempdir().unwrap();
    let (store, mut restored) = open(temp.path(), 1, 1, StoreOptions::default());
    restored.snapshot.data = "kept".into();
    let shown = Shown::default();
    let seen = shown.clone();
    let hook = move |machine: &Lines, _: u64, _: &[Applied<usize>]| {
        // As slow as a publication may be.
        std::thread::sleep(Duration::from_millis(50));
        seen.lock().clone_from(&machine.0);
    };
    let opened = (store, restored);
    let handle = start(options(), opened, Lines::default(), |_, _| (), hook).unwrap();
    assert_eq!(*shown.lock(), ["kept"]);
    handle.stop().await;
}

struct Bomb;

impl Machine for Bomb {
    type Output = ();

    fn apply(&mut self, _index: u64, _term: u64, _command: &Bytes) {
        panic!("a broken invariant");
    }

    fn apply_change(&mut self, _index: u64, _term: u64, _command: &Bytes) -> ((), bool) {
        panic!("a broken invariant");
    }

    fn snapshot(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restore(&mut self, _bytes: &[u8]) -> Result<(), RestoreError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_panic_in_the_machine_ends_the_replica_with_the_reason() {
    let temp = tempfile::tempdir().unwrap();
    let opened = open(temp.path(), 1, 1, StoreOptions::default());
    let hook = |_: &Bomb, _: u64, _: &[Applied<()>]| ();
    let handle = start(options(), opened, Bomb, |_, _| (), hook).unwrap();
    assert_eq!(
        handle.propose("x".into(), soon()).await,
        Err(ProposeError::Stopped)
    );
    let reason = handle.stopped().await;
    assert!(
        matches!(&*reason, StopReason::Panicked(text) if text == "a broken invariant"),
        "{reason}"
    );
}

/// What does a commit cost on one node, with its sync, and how far do syncs spread over 64 writers?
/// Run with `--ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn commits_of_one_node() {
    let temp = tempfile::tempdir_in(".").unwrap();
    let network = Network::default();
    let opened = open(temp.path(), 1, 1, StoreOptions::default());
    let hook = |_: &Lines, _: u64, _: &[Applied<usize>]| ();
    let handle = start(
        ReplicaOptions::default(),
        opened,
        Lines::default(),
        |_, _| (),
        hook,
    )
    .unwrap();
    network.lock().insert(1, handle.clone());
    wait_for(&handle, |status| status.role == Role::Leader).await;
    let command = Bytes::from(vec![b'x'; 256]);
    let mut took = Vec::new();
    for _ in 0..1_000 {
        let began = Instant::now();
        handle.propose(command.clone(), soon()).await.unwrap();
        took.push(began.elapsed());
    }
    took.sort_unstable();
    println!("one writer: p50 {:?} p99 {:?}", took[500], took[990]);
    let began = Instant::now();
    let writers: Vec<_> = (0..64)
        .map(|_| {
            let (handle, command) = (handle.clone(), command.clone());
            tokio::spawn(async move {
                for _ in 0..200 {
                    handle.propose(command.clone(), soon()).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    println!(
        "64 writers: {:.0} writes/s",
        12_800.0 / began.elapsed().as_secs_f64()
    );
    stop(&network, &handle).await;
}
