//! A stopped node's own files, with one byte that is not what was written.

use std::fs;

use super::*;
use crate::node::Restored;
use crate::store::{Opened, Store, StoreError, StoreOptions};

/// Places in each file that are tried.
const PLACES: usize = 60;

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

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for file in fs::read_dir(dir).unwrap() {
        let path = file.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.metadata().unwrap().len() > 0 {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn open(dir: &Path) -> Result<Box<Restored>, StoreError> {
    match Store::open(dir, StoreOptions::default())? {
        Opened::Member(_, restored) => Ok(restored),
        Opened::Uninitialised(_) => panic!("a member's disk is not empty"),
    }
}

/// What the machine would be, whichever snapshot it starts from.
fn knows(restored: &Restored) -> (crate::node::HardState, u64) {
    let last = restored.entries.last().map_or(0, |last| last.index);
    (restored.hard_state, last.max(restored.snapshot.index))
}

#[test]
fn a_byte_of_a_real_disk_that_rots_is_found_or_harmless() {
    let replica = ReplicaOptions {
        snapshot_entries: 8,
        keep_entries: 2,
        ..ReplicaOptions::default()
    };
    let mut cell = Cell::with_replicas(1, Settings::default(), replica).founded();
    let leader = cell.leader();
    let mut held = 0;
    for number in 1..=20 {
        let pools = ["[[pools]]\nname = \"default\"\n", TWO_POOLS][number as usize % 2];
        held = revision(&cell.apply_config(leader, number, pools, held));
    }
    cell.stop(0);
    let disk = cell.disk(0);
    let whole = cell.dir.path().join("whole");
    copy(&disk, &whole);
    let before = knows(&open(&disk).unwrap());
    let (mut refusals, mut recoveries) = (0, 0);
    for file in files(&whole) {
        let bytes = fs::read(&file).unwrap();
        let own = disk.join(file.strip_prefix(&whole).unwrap());
        let step = bytes.len().div_ceil(PLACES);
        for at in (0..bytes.len()).step_by(step) {
            wipe(&disk);
            copy(&whole, &disk);
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 7);
            fs::write(&own, &damaged).unwrap();
            let what = format!("byte {at} of {}", own.display());
            // The whole server now and then: it says the same, or serves what was agreed on.
            if at / step % 20 == 0 {
                match cell.try_start(0) {
                    Ok(()) => {
                        cell.leader();
                        assert_eq!(cell.facts(0).config_revision, held, "{what}");
                        cell.stop(0);
                    }
                    Err(refused) => says_where(&refused.to_string(), &own, &what),
                }
                continue;
            }
            match open(&disk) {
                Ok(restored) => {
                    assert_eq!(knows(&restored), before, "{what}");
                    recoveries += 1;
                }
                Err(refused) => {
                    says_where(&refused.to_string(), &own, &what);
                    refusals += 1;
                }
            }
        }
    }
    println!("{refusals} refused, {recoveries} recovered");
    assert!(refusals > 100 && recoveries > 20);
}

fn says_where(refused: &str, file: &Path, what: &str) {
    assert!(
        refused.contains(&file.display().to_string()) || refused.contains("two disks"),
        "{what}: {refused}"
    );
    let is_log = file.extension().is_some_and(|ending| ending == "log");
    assert!(
        !is_log || refused.contains("at offset") || refused.contains("has format"),
        "{what}: {refused}"
    );
    assert!(
        refused.contains("join as a new") || refused.contains("start a newer version"),
        "{what}: {refused}"
    );
}
