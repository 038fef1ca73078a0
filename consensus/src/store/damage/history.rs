//! Stores with varied pasts, and what each step of such a past may come back as.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rand::Rng as _;
use rand::rngs::StdRng;

use super::super::memory::{Image, MemoryDisk};
use super::super::tests::{bootstrap, start};
use super::super::{Store, StoreOptions};
use crate::node::{Entry, HardState, Restored, Snapshot, Write};

/// One state that a store went through.
#[derive(Clone)]
pub(super) struct Moment {
    pub(super) hard_state: HardState,
    /// Every entry since the log was last emptied, those that a snapshot covers included.
    log: BTreeMap<u64, Entry>,
    /// Where the log was last emptied.
    floor: u64,
    /// Whether it was acknowledged: durable, and whole.
    pub(super) synced: bool,
}

impl Moment {
    pub(super) fn last(&self) -> u64 {
        self.log
            .last_key_value()
            .map_or(self.floor, |(index, _)| *index)
    }
}

/// A store's past.
pub(super) struct History {
    pub(super) moments: Vec<Moment>,
    /// The disk after each step, with the number of the newest moment then.
    pub(super) images: Vec<(Image, usize)>,
    pub(super) snapshots: Vec<Snapshot>,
    pub(super) segment_bytes: u64,
}

pub(super) fn dir() -> &'static Path {
    Path::new("/node")
}

pub(super) fn options(image: Image, segment_bytes: u64) -> StoreOptions {
    StoreOptions {
        segment_bytes,
        disk: Arc::new(MemoryDisk::of(image)),
    }
}

impl History {
    pub(super) fn draw(rng: &mut StdRng) -> Self {
        let segment_bytes = [300, 800, 2_500, 20_000][rng.random_range(0..4)];
        let disk = MemoryDisk::default();
        let disk_options = StoreOptions {
            segment_bytes,
            disk: Arc::new(disk.clone()),
        };
        let mut store = bootstrap(dir(), disk_options);
        let hard_state = HardState {
            term: 1,
            vote: 0,
            commit: 1,
        };
        let began = Moment {
            hard_state,
            log: BTreeMap::new(),
            floor: 1,
            synced: true,
        };
        let empty = Moment {
            hard_state: HardState::default(),
            synced: false,
            ..began.clone()
        };
        let mut history = Self {
            moments: vec![empty, began],
            images: Vec::new(),
            snapshots: vec![start()],
            segment_bytes,
        };
        history.images.push((disk.image(), 1));
        for _ in 0..rng.random_range(10..50) {
            history.step(rng, &mut store);
            history
                .images
                .push((disk.image(), history.moments.len() - 1));
        }
        drop(store);
        history
    }

    fn step(&mut self, rng: &mut StdRng, store: &mut Store) {
        let now = self.moments.last().unwrap().clone();
        let HardState { term, commit, .. } = now.hard_state;
        let last = now.last();
        match rng.random_range(0..20) {
            0..10 => {
                let replaced = if rng.random_bool(0.2) {
                    rng.random_range(0..4)
                } else {
                    0
                };
                let first = (last + 1).saturating_sub(replaced).max(commit + 1);
                let term = term + u64::from(first <= last || rng.random_bool(0.2));
                let count = rng.random_range(1..6);
                let entries: Vec<_> = (first..first + count)
                    .map(|index| entry(rng, index, term))
                    .collect();
                let commit = rng.random_range(commit..first + count);
                let vote = rng.random_range(0..4);
                self.write(store, None, entries, HardState { term, vote, commit }, true);
            }
            10..14 => {
                let commit = rng.random_range(commit..=last);
                let hard_state = HardState {
                    commit,
                    ..now.hard_state
                };
                self.write(store, None, Vec::new(), hard_state, false);
            }
            14..16 => {
                let (term, vote) = (term + 1, rng.random_range(1..4));
                self.write(
                    store,
                    None,
                    Vec::new(),
                    HardState { term, vote, commit },
                    true,
                );
            }
            16..19 => {
                let newest = self.snapshots.last().map_or(1, |newest| newest.index);
                let Some(at) = now.log.get(&commit).filter(|_| commit > newest) else {
                    return;
                };
                let snapshot = snapshot(rng, commit, at.term);
                let keep = [0, 3, 100][rng.random_range(0..3)];
                store.save_snapshot(&snapshot, keep).unwrap();
                self.snapshots.push(snapshot);
            }
            _ => {
                let index = last + rng.random_range(1..20);
                let snapshot = snapshot(rng, index, term);
                let entries = match rng.random_range(0..2) {
                    0 => Vec::new(),
                    _ => vec![entry(rng, index + 1, term)],
                };
                let hard_state = HardState {
                    commit: index,
                    ..now.hard_state
                };
                self.write(store, Some(snapshot), entries, hard_state, true);
            }
        }
    }

    fn write(
        &mut self,
        store: &mut Store,
        snapshot: Option<Snapshot>,
        entries: Vec<Entry>,
        hard_state: HardState,
        must_sync: bool,
    ) {
        let write = Write {
            snapshot: snapshot.clone(),
            entries: entries.clone(),
            hard_state: Some(hard_state),
            must_sync,
        };
        store.write(&write).unwrap();
        // A write that is torn may end after any of its records.
        let mut part = self.moments.last().unwrap().clone();
        part.synced = false;
        if let Some(snapshot) = snapshot {
            part.log.clear();
            part.floor = snapshot.index;
            self.snapshots.push(snapshot);
            self.moments.push(part.clone());
        }
        for entry in entries {
            part.log.retain(|index, _| *index < entry.index);
            part.log.insert(entry.index, entry);
            self.moments.push(part.clone());
        }
        part.hard_state = hard_state;
        part.synced = must_sync;
        self.moments.push(part);
    }

    /// The newest moment that was acknowledged when number `moment` was reached.
    pub(super) fn synced_by(&self, moment: usize) -> usize {
        let before = &self.moments[..=moment];
        before.iter().rposition(|moment| moment.synced).unwrap_or(0)
    }

    /// Which moment came back, if it is `least` or a later one.
    pub(super) fn moment_of(&self, restored: &Restored, least: usize) -> Option<usize> {
        (least..self.moments.len()).find(|&at| self.is(restored, &self.moments[at]))
    }

    fn is(&self, restored: &Restored, moment: &Moment) -> bool {
        let (base, entries) = (&restored.snapshot, &restored.entries);
        let contiguous = entries
            .windows(2)
            .all(|pair| pair[0].index + 1 == pair[1].index);
        let meets = entries
            .first()
            .is_none_or(|first| first.index <= base.index + 1);
        let last = entries.last().map_or(base.index, |last| last.index);
        // A snapshot is a write of its own and may be newer than the log.
        let reaches = last == moment.last() || entries.is_empty() && last > moment.last();
        let known = |entry: &Entry| moment.log.get(&entry.index) == Some(entry);
        restored.hard_state == moment.hard_state
            && self.snapshots.contains(base)
            && contiguous
            && meets
            && reaches
            && entries.iter().all(known)
    }

    /// The disk at the end.
    pub(super) fn image(&self) -> &Image {
        &self.images.last().unwrap().0
    }

    /// Its files with this ending, by name.
    pub(super) fn files(&self, ending: &str) -> Vec<PathBuf> {
        let all = self.image().keys();
        let ours = all.filter(|path| path.extension().is_some_and(|is| is == ending));
        ours.cloned().collect()
    }
}

fn entry(rng: &mut StdRng, index: u64, term: u64) -> Entry {
    let size = [0, 5, 40, 200, 700][rng.random_range(0..5)];
    let data: Vec<u8> = (0..size).map(|_| rng.random()).collect();
    let change = rng.random_bool(0.05).then(|| Bytes::from_static(b"change"));
    Entry {
        change,
        ..Entry::command(index, term, data.into())
    }
}

fn snapshot(rng: &mut StdRng, index: u64, term: u64) -> Snapshot {
    let size = rng.random_range(0..6_000);
    let data: Vec<u8> = (0..size).map(|_| rng.random()).collect();
    let data = data.into();
    Snapshot {
        index,
        term,
        data,
        ..start()
    }
}
