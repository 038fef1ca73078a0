//! Ten thousand disks with one thing wrong: each start finds everything that was acknowledged, or
//! refuses and says where.

mod history;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::memory::Image;
use super::{Opened, Store, StoreError};
use crate::node::Restored;
use history::{History, dir, options};

const HISTORIES: usize = 60;
const IMAGES: usize = 220;

/// What happens to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Untouched,
    BitFlipped,
    BytesZeroed,
    SectorZeroed,
    SectorStale,
    PageZeroed,
    PageStale,
    FileStale,
    Truncated,
    TailCopied,
    GarbageAppended,
    FileEmpty,
    FileMissing,
    FileDuplicated,
    FilesSwapped,
    HeaderDamaged,
    NewestSnapshotMissing,
    /// A loss of power: the mark is an older one, and the log is torn after what it says.
    TornAfterAnOlderMark,
    /// As an older version leaves it; then any of the above to the log.
    NoMark,
}

use Kind::*;

const KINDS: [Kind; 19] = [
    Untouched,
    BitFlipped,
    BytesZeroed,
    SectorZeroed,
    SectorStale,
    PageZeroed,
    PageStale,
    FileStale,
    Truncated,
    TailCopied,
    GarbageAppended,
    FileEmpty,
    FileMissing,
    FileDuplicated,
    FilesSwapped,
    HeaderDamaged,
    NewestSnapshotMissing,
    TornAfterAnOlderMark,
    NoMark,
];

/// A disk with something wrong, and what must come back from it.
struct Damaged {
    image: Image,
    /// The oldest moment that may.
    least: usize,
    /// The one file that was damaged.
    file: Option<PathBuf>,
}

#[test]
fn a_damaged_disk_gives_back_all_that_was_acknowledged_or_is_refused_with_the_place() {
    let began = Instant::now();
    let mut counts = BTreeMap::<Kind, [usize; 3]>::new();
    for seed in 0..HISTORIES as u64 {
        let mut rng = StdRng::seed_from_u64(seed);
        let history = History::draw(&mut rng);
        for number in 0..IMAGES {
            let kind = KINDS[rng.random_range(0..KINDS.len())];
            let damaged = damage(&mut rng, &history, kind);
            let whole = damaged.image == *history.image();
            let what = || format!("seed {seed}, image {number}, {kind:?} {:?}", damaged.file);
            let counted = counts.entry(kind).or_default();
            match open(&damaged.image, &history) {
                Ok((store, restored)) => {
                    let found = history.moment_of(&restored, damaged.least);
                    assert!(
                        found.is_some(),
                        "{}: neither what was acknowledged nor a refusal: {restored:?}",
                        what()
                    );
                    let known = history.image()[&dir().join("cluster.json")].clone();
                    assert!(
                        known
                            .windows(32)
                            .any(|at| at == store.cluster().cluster_id.to_string().as_bytes()
                                || at == store.store_id().to_string().as_bytes())
                    );
                    counted[0] += 1;
                    if number % 8 == 0 {
                        replica::starts(*store, *restored, &what());
                        counted[2] += 1;
                    }
                }
                Err(refused) => {
                    assert!(!whole, "{}: {refused}", what());
                    says_where_and_what_to_do(&refused, &damaged, &what());
                    counted[1] += 1;
                }
            }
        }
    }
    let all: usize = counts
        .values()
        .map(|[recovered, refused, _]| recovered + refused)
        .sum();
    for (kind, [recovered, refused, started]) in &counts {
        println!("{kind:?}: {recovered} recovered ({started} as a replica), {refused} refused");
    }
    println!("{all} images in {:?}", began.elapsed());
    assert!(all >= 10_000);
    for kind in KINDS {
        let [recovered, refused, _] = counts[&kind];
        assert!(recovered > 0, "{kind:?}");
        assert!(
            (refused > 0) == !matches!(kind, Untouched | TornAfterAnOlderMark),
            "{kind:?}"
        );
    }
}

fn open(image: &Image, history: &History) -> Result<(Box<Store>, Box<Restored>), StoreError> {
    match Store::open(dir(), options(image.clone(), history.segment_bytes))? {
        Opened::Member(store, restored) => Ok((store, restored)),
        Opened::Uninitialised(_) => panic!("a member's disk is not empty"),
    }
}

fn says_where_and_what_to_do(refused: &StoreError, damaged: &Damaged, what: &str) {
    let text = refused.to_string();
    assert!(text.contains("/node"), "{what}: {text}");
    assert!(
        [
            "join as a new one",
            "join as a new node",
            "restore",
            "newer version"
        ]
        .iter()
        .any(|way_out| text.contains(way_out)),
        "{what}: {text}"
    );
    match refused {
        StoreError::Corrupt { path, offset, .. } => {
            let bytes = damaged.image.get(path).map_or(0, |file| file.len());
            assert!(*offset <= bytes as u64, "{what}: {text}");
            if let Some(file) = &damaged.file {
                assert_eq!(path, file, "{what}: {text}");
            }
        }
        StoreError::Damaged { path, .. } | StoreError::Format { path, .. } => {
            if let Some(file) = &damaged.file {
                assert_eq!(path, file, "{what}: {text}");
            }
        }
        StoreError::StoreFileMissing { .. }
        | StoreError::ClusterFileMissing { .. }
        | StoreError::SnapshotMissing { .. }
        | StoreError::NewerSnapshotMissing { .. }
        | StoreError::LogMissing { .. } => {}
        other => panic!("{what}: {other}"),
    }
}

fn damage(rng: &mut StdRng, history: &History, kind: Kind) -> Damaged {
    let all = history.synced_by(history.moments.len() - 1);
    let mut damaged = Damaged {
        image: history.image().clone(),
        least: all,
        file: None,
    };
    match kind {
        Untouched => {}
        FileMissing => {
            let file = any_file(rng, history);
            damaged.image.remove(&file);
        }
        FileDuplicated => {
            let ending = ["log", "snap"][rng.random_range(0..2)];
            let file = pick(rng, &history.files(ending));
            let ending = file.extension().unwrap().to_owned();
            let number: u64 = [0, 1, 2, 5, 40, u64::MAX][rng.random_range(0..6)];
            let name = format!("{number:016x}-{number:016x}");
            let name = if ending == "log" {
                &name[..16]
            } else {
                &name[..]
            };
            let copy = file.with_file_name(name).with_extension(ending);
            let content = damaged.image[&file].clone();
            damaged.image.entry(copy).or_insert(content);
        }
        FilesSwapped => {
            let files = history.files(["log", "snap"][rng.random_range(0..2)]);
            let (one, other) = (pick(rng, &files), pick(rng, &files));
            let (first, second) = (damaged.image[&one].clone(), damaged.image[&other].clone());
            damaged.image.insert(one, second);
            damaged.image.insert(other, first);
        }
        NewestSnapshotMissing => {
            damaged.image.remove(history.files("snap").last().unwrap());
        }
        TornAfterAnOlderMark => {
            // Any step since the last segment was begun: what came before has a durable header after it.
            let log = history.files("log").pop().unwrap();
            let from = history
                .images
                .partition_point(|(image, _)| !image.contains_key(&log));
            let (older, moment) = &history.images[rng.random_range(from..history.images.len())];
            let mark = dir().join("wal/synced.mark");
            damaged.image.insert(mark.clone(), older[&mark].clone());
            damaged.least = history.synced_by(*moment);
            let (kept, whole) = (older[&log].len(), damaged.image[&log].len());
            if kept < whole {
                let at = rng.random_range(kept..whole);
                let torn = Arc::make_mut(damaged.image.get_mut(&log).unwrap());
                match rng.random_range(0..3) {
                    0 => torn.truncate(at),
                    // Not a sector before another that was written: a record further on would show it.
                    1 => torn[at..].fill(0),
                    _ => {
                        torn.truncate(at);
                        torn.resize(whole, 0);
                    }
                }
            }
        }
        NoMark => {
            damaged.image.remove(&dir().join("wal/synced.mark"));
            damaged.least = 0;
            let within = [
                BitFlipped,
                SectorZeroed,
                Truncated,
                GarbageAppended,
                HeaderDamaged,
            ];
            let file = pick(rng, &history.files("log"));
            let kind = within[rng.random_range(0..5)];
            change(rng, history, &mut damaged, file, kind);
        }
        BitFlipped | BytesZeroed | SectorZeroed | SectorStale | PageZeroed | PageStale
        | FileStale | Truncated | TailCopied | GarbageAppended | FileEmpty | HeaderDamaged => {
            let file = any_file(rng, history);
            change(rng, history, &mut damaged, file, kind);
        }
    }
    damaged
}

/// The log half of the time.
fn any_file(rng: &mut StdRng, history: &History) -> PathBuf {
    let ending = ["log", "log", "log", "snap", "json", "mark"][rng.random_range(0..6)];
    pick(rng, &history.files(ending))
}

fn pick(rng: &mut StdRng, files: &[PathBuf]) -> PathBuf {
    files[rng.random_range(0..files.len())].clone()
}

/// Damages one file.
fn change(rng: &mut StdRng, history: &History, damaged: &mut Damaged, file: PathBuf, kind: Kind) {
    let bytes = Arc::make_mut(damaged.image.get_mut(&file).unwrap());
    let length = bytes.len();
    let at = rng.random_range(0..length);
    let piece = |size: usize| {
        let from = at / size * size;
        from..(from + size).min(length)
    };
    match kind {
        BitFlipped => bytes[at] ^= 1 << rng.random_range(0..8),
        BytesZeroed => {
            let count = rng.random_range(1..64).min(length - at);
            bytes[at..at + count].fill(0);
        }
        SectorZeroed => bytes[piece(512)].fill(0),
        PageZeroed => bytes[piece(4_096)].fill(0),
        SectorStale => stale(bytes, older(rng, history, &file), piece(512)),
        PageStale => stale(bytes, older(rng, history, &file), piece(4_096)),
        FileStale => *bytes = older(rng, history, &file).to_vec(),
        Truncated => bytes.truncate(at),
        TailCopied => {
            let copy = bytes[at..].to_vec();
            bytes.extend_from_slice(&copy);
        }
        GarbageAppended => {
            let count = rng.random_range(1..5_000);
            bytes.extend((0..count).map(|_| rng.random::<u8>()));
        }
        FileEmpty => bytes.clear(),
        HeaderDamaged => {
            for byte in bytes.iter_mut().take(44) {
                *byte = rng.random();
            }
        }
        other => unreachable!("{other:?} is not about one file"),
    }
    damaged.file = Some(file);
}

/// The content that a file had earlier.
fn older<'a>(rng: &mut StdRng, history: &'a History, file: &Path) -> &'a [u8] {
    let had: Vec<_> = history
        .images
        .iter()
        .filter_map(|(image, _)| image.get(file))
        .collect();
    had[rng.random_range(0..had.len())]
}

fn stale(bytes: &mut [u8], old: &[u8], piece: std::ops::Range<usize>) {
    for at in piece {
        bytes[at] = old.get(at).copied().unwrap_or(0);
    }
}

/// The replica on what came back.
mod replica {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use bytes::Bytes;
    use forebay_proto::{NodeId, Now};

    use crate::node::{Message, Restored};
    use crate::replica::core::Core;
    use crate::replica::{Applied, Machine, ReplicaOptions, RestoreError};
    use crate::store::Store;

    struct Nothing;

    impl Machine for Nothing {
        type Output = ();
        fn apply(&mut self, _index: u64, _term: u64, _command: &Bytes) {}
        fn apply_change(&mut self, _index: u64, _term: u64, _command: &Bytes) -> ((), bool) {
            ((), false)
        }
        fn snapshot(&self) -> Vec<u8> {
            Vec::new()
        }
        fn restore(&mut self, _bytes: &[u8]) -> Result<(), RestoreError> {
            Ok(())
        }
    }

    /// It starts, leads its group of one, and applies the log to its end.
    pub(super) fn starts(store: Store, restored: Restored, what: &str) {
        let last = restored.entries.last().map_or(0, |last| last.index);
        let last = last.max(restored.snapshot.index);
        let applied = Arc::new(AtomicU64::new(0));
        let seen = applied.clone();
        let mut core = Core::new(
            ReplicaOptions {
                seed: 1,
                ..ReplicaOptions::default()
            },
            (store, restored),
            Nothing,
            Box::new(|_: NodeId, _: Message| {}),
            Box::new(move |_: &Nothing, index: u64, _: &[Applied<()>]| {
                seen.store(index, Ordering::Relaxed);
            }),
            Box::new(|_| false),
        )
        .unwrap_or_else(|refused| panic!("{what}: {refused}"));
        let mut ended = core.begin(Now::default());
        // It does not stand for election before it has applied what changes the members.
        for _ in 0..40 {
            core.tick();
            ended = ended.and_then(|()| core.turn(Now::default()));
        }
        ended.unwrap_or_else(|ended| panic!("{what}: {ended}"));
        // Its own no-op follows what was there.
        assert_eq!(applied.load(Ordering::Relaxed), last + 1, "{what}");
    }
}
