//! Real files: every truncation, damage, faults of the disk, and a model.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use bytes::Bytes;
use forebay_proto::{ClusterId, NodeId, StoreId};

use super::testing::failing;
use super::*;
use crate::node::{Entry, Members};

pub(super) fn entry(index: u64, term: u64) -> Entry {
    Entry::command(
        index,
        term,
        Bytes::from(format!("command {index} of {term}")),
    )
}

pub(super) fn start() -> Snapshot {
    Snapshot::bootstrap(
        Members::new([NodeId(1)], []).unwrap(),
        Bytes::from_static(b"state"),
    )
}

fn cluster(store_id: StoreId) -> ClusterFile {
    let member = MemberRecord {
        id: NodeId(1),
        name: "a".into(),
        address: "127.0.0.1:7400".into(),
        store_id,
    };
    ClusterFile::new(ClusterId([7; 16]), NodeId(1), "a".into(), vec![member])
}

pub(super) fn options(segment_bytes: u64) -> StoreOptions {
    StoreOptions {
        segment_bytes,
        ..StoreOptions::default()
    }
}

pub(super) fn bootstrap(dir: &Path, options: StoreOptions) -> Store {
    let Opened::Uninitialised(empty) = Store::open(dir, options).unwrap() else {
        panic!("a new directory is uninitialised")
    };
    let cluster = cluster(empty.store_id());
    empty.bootstrap(cluster, &start()).unwrap().0
}

pub(super) fn reopen(
    dir: &Path,
    options: StoreOptions,
) -> Result<(Box<Store>, Box<Restored>), StoreError> {
    match Store::open(dir, options)? {
        Opened::Member(store, restored) => Ok((store, restored)),
        Opened::Uninitialised(_) => panic!("it was bootstrapped"),
    }
}

pub(super) fn append(
    store: &mut Store,
    entries: &[(u64, u64)],
    commit: u64,
) -> Result<(), StoreError> {
    store.write(&Write {
        entries: entries
            .iter()
            .map(|&(index, term)| entry(index, term))
            .collect(),
        hard_state: Some(HardState {
            term: 9,
            vote: 1,
            commit,
        }),
        must_sync: true,
        ..Write::default()
    })
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    files::list(&RealDisk, &dir.join("wal"), "log").unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        let target = to.join(file.file_name());
        if file.path().is_dir() {
            copy(&file.path(), &target);
        } else {
            fs::copy(file.path(), target).unwrap();
        }
    }
}

#[test]
fn an_empty_disk_waits_uninitialised_with_a_stable_id_and_private_files() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("data/a");
    let id = |opened| match opened {
        Opened::Uninitialised(empty) => empty.store_id(),
        Opened::Member(..) => panic!("nobody called init"),
    };
    let first = id(Store::open(&dir, StoreOptions::default()).unwrap());
    assert_eq!(
        first,
        id(Store::open(&dir, StoreOptions::default()).unwrap())
    );
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (
            mode(&dir),
            mode(&dir.join("store.json")),
            mode(&dir.join("LOCK"))
        ),
        (0o700, 0o600, 0o600)
    );
    let store = bootstrap(&dir, StoreOptions::default());
    drop(store);
    let wal = segments(&dir);
    assert_eq!(
        (
            mode(&dir.join("wal")),
            mode(&wal[0]),
            mode(&dir.join("cluster.json"))
        ),
        (0o700, 0o600, 0o600)
    );
}

#[test]
fn a_second_process_is_told_which_directory_is_in_use() {
    let temp = tempfile::tempdir().unwrap();
    let _store = bootstrap(temp.path(), StoreOptions::default());
    let second = Store::open(temp.path(), StoreOptions::default()).unwrap_err();
    assert!(matches!(&second, StoreError::InUse { dir } if dir == temp.path()));
    assert!(
        second
            .to_string()
            .contains(&temp.path().display().to_string())
    );
}

#[test]
fn what_was_written_comes_back() {
    let temp = tempfile::tempdir().unwrap();
    let mut store = bootstrap(temp.path(), options(200));
    append(&mut store, &[(2, 1), (3, 1)], 2).unwrap();
    append(&mut store, &[(4, 1), (5, 1), (6, 1)], 3).unwrap();
    append(&mut store, &[(4, 2)], 4).unwrap();
    let cluster = store.cluster().clone();
    drop(store);
    let (store, restored) = reopen(temp.path(), options(200)).unwrap();
    assert_eq!(store.cluster(), &cluster);
    assert_eq!(restored.snapshot, start());
    assert_eq!(
        restored.hard_state,
        HardState {
            term: 9,
            vote: 1,
            commit: 4
        }
    );
    assert_eq!(restored.entries, [entry(2, 1), entry(3, 1), entry(4, 2)]);
    assert!(store.expect_cluster(ClusterId([7; 16])).is_ok());
    let other = store.expect_cluster(ClusterId([8; 16])).unwrap_err();
    assert!(matches!(other, StoreError::OtherCluster { .. }));
}

#[test]
fn a_log_cut_at_any_byte_gives_back_all_that_was_synced_before_it() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("whole");
    let mut store = bootstrap(&dir, StoreOptions::default());
    let path = segments(&dir).pop().unwrap();
    let synced_at = |path: &Path| fs::metadata(path).unwrap().len();
    let mut states = vec![(synced_at(&path), vec![], 1)];
    let writes: [&[(u64, u64)]; 5] = [
        &[(2, 1)],
        &[(3, 1), (4, 1)],
        &[(4, 2), (5, 2)],
        &[(6, 2)],
        &[(5, 3)],
    ];
    for (commit, write) in (1..).zip(writes) {
        append(&mut store, write, commit).unwrap();
        let mut log: Vec<Entry> = states.last().unwrap().1.clone();
        log.retain(|held| held.index < write[0].0);
        log.extend(write.iter().map(|&(index, term)| entry(index, term)));
        states.push((synced_at(&path), log, commit));
    }
    drop(store);
    let whole = fs::read(&path).unwrap();
    let cut = temp.path().join("cut");
    copy(&dir, &cut);
    let path = segments(&cut).pop().unwrap();
    for length in states[0].0..=whole.len() as u64 {
        fs::write(&path, &whole[..length as usize]).unwrap();
        // The mark is older than what is cut: the crash came at once.
        fs::remove_file(cut.join("wal/synced.mark")).unwrap();
        let (mut store, restored) = reopen(&cut, StoreOptions::default()).unwrap();
        let (_, log, commit) = states.iter().rev().find(|(at, ..)| *at <= length).unwrap();
        let at_least = log.len() as u64 + 1;
        assert!(restored.hard_state.commit >= *commit, "cut at {length}");
        let boundary = states.iter().any(|(at, ..)| *at == length);
        if boundary {
            assert_eq!(&restored.entries, log, "cut at {length}");
        }
        // It goes on from wherever it was cut, and what is written then comes back too.
        let last = restored.entries.last().map_or(1, |last| last.index);
        assert!(last >= at_least.min(3), "cut at {length}");
        append(&mut store, &[(last + 1, 8)], 1).unwrap();
        drop(store);
        let (_, again) = reopen(&cut, StoreOptions::default()).unwrap();
        assert_eq!(
            again.entries.last(),
            Some(&entry(last + 1, 8)),
            "cut at {length}"
        );
        assert_eq!(
            again.entries.len(),
            restored.entries.len() + 1,
            "cut at {length}"
        );
    }
    for length in 0..states[0].0.min(HEADER) {
        fs::write(&path, &whole[..length as usize]).unwrap();
        let refused = reopen(&cut, StoreOptions::default()).unwrap_err();
        assert!(
            matches!(refused, StoreError::Corrupt { offset: 0, .. }),
            "cut at {length}"
        );
    }
}

const HEADER: u64 = 44;

#[test]
fn a_flipped_byte_in_what_was_synced_is_refused_with_file_and_offset() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("whole");
    let mut store = bootstrap(&dir, options(300));
    for index in 2..14 {
        append(&mut store, &[(index, 1)], index - 1).unwrap();
    }
    drop(store);
    let paths = segments(&dir);
    assert!(paths.len() >= 3);
    for path in &paths {
        let whole = fs::read(path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x40;
            fs::write(path, &damaged).unwrap();
            match reopen(&dir, options(300)) {
                Err(StoreError::Corrupt {
                    path: named,
                    offset,
                    ..
                }) => {
                    assert_eq!(&named, path);
                    assert!(
                        offset <= at as u64 && at as u64 - offset < 64,
                        "{at} as {offset}"
                    );
                }
                Err(StoreError::Format { path: named, .. }) => assert_eq!((&named, at), (path, 7)),
                other => panic!("byte {at} of {}: {other:?}", path.display()),
            }
        }
        fs::write(path, &whole).unwrap();
    }
    fs::remove_file(&paths[1]).unwrap();
    assert!(matches!(
        reopen(&dir, options(300)),
        Err(StoreError::Corrupt { offset: 8, .. })
    ));
}

#[test]
fn old_segments_and_snapshots_go_when_a_snapshot_covers_them() {
    let temp = tempfile::tempdir().unwrap();
    let mut store = bootstrap(temp.path(), options(200));
    for index in 2..40 {
        append(&mut store, &[(index, 1)], index).unwrap();
    }
    let many = segments(temp.path()).len();
    for index in [20, 30, 38] {
        store
            .save_snapshot(&Snapshot { index, ..start() }, 4)
            .unwrap();
    }
    let few = segments(temp.path()).len();
    assert!(few + 5 < many, "{many} became {few}");
    assert_eq!(
        files::list(&RealDisk, &temp.path().join("snapshots"), "snap")
            .unwrap()
            .len(),
        2
    );
    drop(store);
    let (_, restored) = reopen(temp.path(), options(200)).unwrap();
    assert_eq!(restored.snapshot.index, 38);
    assert!(restored.entries[0].index <= 35 && restored.entries.last().unwrap().index == 39);
    assert_eq!(restored.hard_state.commit, 39);
}

#[test]
fn a_snapshot_of_the_leader_replaces_the_log_even_if_the_crash_comes_in_between() {
    for cut_off in [false, true] {
        let temp = tempfile::tempdir().unwrap();
        let mut store = bootstrap(temp.path(), options(1 << 20));
        append(&mut store, &[(2, 1), (3, 1), (4, 1)], 2).unwrap();
        let snapshot = Snapshot {
            index: 10,
            term: 5,
            data: "later".into(),
            ..start()
        };
        if cut_off {
            snapshot::save(&RealDisk, temp.path(), &snapshot).unwrap();
        } else {
            let write = Write {
                snapshot: Some(snapshot.clone()),
                must_sync: true,
                ..Write::default()
            };
            store.write(&write).unwrap();
        }
        drop(store);
        let (mut store, restored) = reopen(temp.path(), options(1 << 20)).unwrap();
        assert_eq!((&restored.snapshot, restored.entries.len()), (&snapshot, 0));
        append(&mut store, &[(11, 6)], 10).unwrap();
        drop(store);
        let (_, restored) = reopen(temp.path(), options(1 << 20)).unwrap();
        assert_eq!(restored.entries, [entry(11, 6)]);
    }
}

#[test]
fn a_directory_that_is_not_whole_is_refused_with_the_way_out() {
    type Change = fn(&Path);
    let cases: [(&str, Change); 8] = [
        ("no store.json", |dir| {
            fs::remove_file(dir.join("store.json")).unwrap();
        }),
        ("no cluster.json", |dir| {
            fs::remove_file(dir.join("cluster.json")).unwrap();
        }),
        ("no readable snapshot", |dir| {
            fs::remove_dir_all(dir.join("snapshots")).unwrap();
        }),
        ("its log is gone", |dir| {
            fs::remove_dir_all(dir.join("wal")).unwrap();
        }),
        ("two disks", |dir| {
            let other = format!("{{\"format\":1,\"store_id\":\"{}\"}}", "ab".repeat(16));
            fs::write(dir.join("store.json"), other).unwrap();
        }),
        ("has format 2", |dir| {
            fs::write(dir.join("store.json"), "{\"format\":2}").unwrap();
        }),
        ("is damaged", |dir| {
            fs::write(dir.join("cluster.json"), "{").unwrap();
        }),
        ("checksum is wrong", |dir| {
            let path = files::list(&RealDisk, &dir.join("snapshots"), "snap")
                .unwrap()
                .remove(0);
            let mut bytes = fs::read(&path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(path, bytes).unwrap();
        }),
    ];
    for (says, change) in cases {
        let temp = tempfile::tempdir().unwrap();
        drop(bootstrap(temp.path(), StoreOptions::default()));
        change(temp.path());
        let refused = Store::open(temp.path(), StoreOptions::default())
            .unwrap_err()
            .to_string();
        assert!(refused.contains(says), "{refused:?} should say {says:?}");
    }
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("file");
    fs::write(&file, "").unwrap();
    let refused = Store::open(file.join("below"), StoreOptions::default())
        .unwrap_err()
        .to_string();
    assert!(refused.contains("must name a directory"), "{refused}");
}

#[test]
fn a_bootstrap_that_was_cut_off_leaves_an_uninitialised_disk() {
    let temp = tempfile::tempdir().unwrap();
    drop(bootstrap(temp.path(), StoreOptions::default()));
    fs::remove_file(temp.path().join("cluster.json")).unwrap();
    identity::begin_bootstrap(&RealDisk, temp.path()).unwrap();
    let store = bootstrap(temp.path(), StoreOptions::default());
    assert_eq!(store.cluster().node_id, NodeId(1));
    drop(store);
    // Cut off after cluster.json it is a member, and the mark cannot clear anything later.
    identity::begin_bootstrap(&RealDisk, temp.path()).unwrap();
    drop(reopen(temp.path(), StoreOptions::default()).unwrap());
    assert!(!identity::is_bootstrapping(&RealDisk, temp.path()));
}

#[test]
fn a_failed_sync_ends_the_store_and_what_was_acknowledged_comes_back() {
    let temp = tempfile::tempdir().unwrap();
    let (options, orders) = failing();
    let mut store = bootstrap(temp.path(), options.clone());
    append(&mut store, &[(2, 1)], 1).unwrap();
    orders.sync.store(true, Ordering::Relaxed);
    let failed = append(&mut store, &[(3, 1)], 2).unwrap_err();
    assert!(matches!(failed, StoreError::Io { .. }), "{failed}");
    orders.sync.store(false, Ordering::Relaxed);
    let again = append(&mut store, &[(3, 1)], 2).unwrap_err();
    assert!(
        matches!(again, StoreError::Broken { .. }),
        "a failed sync is never tried again"
    );
    drop(store);
    let (_, restored) = reopen(temp.path(), options).unwrap();
    assert_eq!(restored.entries[0], entry(2, 1));
}

#[test]
fn a_full_disk_loses_nothing_and_takes_the_same_batch_once_there_is_room() {
    for segment_bytes in [1 << 20, 100] {
        let temp = tempfile::tempdir().unwrap();
        let (options, orders) = failing();
        let options = StoreOptions {
            segment_bytes,
            ..options
        };
        let mut store = bootstrap(temp.path(), options.clone());
        append(&mut store, &[(2, 1)], 1).unwrap();
        orders.full.store(true, Ordering::Relaxed);
        for _ in 0..3 {
            let full = append(&mut store, &[(3, 1)], 2).unwrap_err();
            assert!(full.is_full(), "{full}");
            assert!(full.to_string().contains("free space"), "{full}");
        }
        let snapshot = Snapshot {
            index: 2,
            ..start()
        };
        assert!(store.save_snapshot(&snapshot, 0).unwrap_err().is_full());
        orders.full.store(false, Ordering::Relaxed);
        append(&mut store, &[(3, 1)], 2).unwrap();
        drop(store);
        let (_, restored) = reopen(temp.path(), options).unwrap();
        assert_eq!(restored.entries, [entry(2, 1), entry(3, 1)]);
    }
}

#[test]
fn a_batch_is_one_sync_and_a_commit_alone_is_none() {
    let temp = tempfile::tempdir().unwrap();
    let (options, orders) = failing();
    let mut store = bootstrap(temp.path(), options);
    let before = orders.syncs.load(Ordering::Relaxed);
    let entries: Vec<_> = (2..100).map(|index| (index, 1)).collect();
    append(&mut store, &entries, 1).unwrap();
    let hard_state = Some(HardState {
        term: 9,
        vote: 1,
        commit: 50,
    });
    store
        .write(&Write {
            hard_state,
            ..Write::default()
        })
        .unwrap();
    assert_eq!(orders.syncs.load(Ordering::Relaxed), before + 1);
}
