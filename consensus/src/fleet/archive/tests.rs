//! Each record of an exported file, touched in each way; each is named.

use forebay_proto::Millis;

use super::super::audit::{GENESIS, KEPT_ENTRIES};
use super::super::testing::World;
use super::*;

/// A fleet with this many entries of the audit, refusals among them.
fn world(entries: usize) -> World {
    let mut world = World::new();
    world.run("register w1 models=m");
    for n in 1..entries {
        let _ = world.run(match n % 3 {
            0 => "set w1 cordoned override",
            1 => "set nobody ready",
            _ => "set w1 ready",
        });
    }
    world
}

fn tail(world: &World) -> Tail {
    let (entries, head) = world.fleet.audit_tail(usize::MAX);
    let count = world.fleet.audit_count();
    Tail::new(world.fleet.cluster_id(), count, &entries, &head).unwrap()
}

fn exported(tail: &Tail) -> String {
    let mut file = Vec::new();
    let end = tail.end(tail.begins(), Millis(9_000));
    write(&mut file, &tail.records, &end).unwrap();
    String::from_utf8(file).unwrap()
}

fn fault(file: &[u8]) -> Fault {
    match read(file, |_| Ok(())) {
        Err(ArchiveError::Fault(fault)) => fault,
        other => panic!("{other:?}"),
    }
}

fn joined(lines: &[&str]) -> Vec<u8> {
    let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
    lines.into_bytes()
}

/// The number that a fault names.
fn named(fault: &Fault) -> (u64, &'static str) {
    match fault {
        Fault::Changed { number, .. } => (*number, "changed"),
        Fault::Missing { from, .. } => (*from, "missing"),
        Fault::Inserted { line, .. } => (*line, "inserted"),
        Fault::CutOff { number } => (*number, "cut off"),
        Fault::OtherEnd { number, .. } => (*number, "other end"),
        Fault::OtherCluster { .. } => (0, "other cluster"),
        Fault::Ahead { number } => (*number, "ahead"),
    }
}

const N: usize = 12;

#[test]
fn an_export_is_whole_and_joins_the_cluster() {
    let tail = tail(&world(N));
    let file = exported(&tail);
    let mut lines = 0;
    let archive = read(file.as_bytes(), |_| {
        lines += 1;
        Ok(())
    })
    .unwrap();
    assert_eq!((lines, archive.end.last), (N, N as u64));
    let whole = Joined {
        shared: N as u64,
        linked: true,
        newer: 0,
    };
    assert_eq!(tail.check(&archive), Ok(whole));
}

#[test]
fn every_flipped_byte_of_every_record_names_the_record() {
    let file = exported(&tail(&world(N)));
    let mut flipped = 0;
    let mut start = 0;
    for (number, line) in (1..).zip(file.lines().take(N)) {
        for at in start..=start + line.len() {
            let mut file = file.clone().into_bytes();
            file[at] ^= 1;
            assert_eq!(named(&fault(&file)), (number, "changed"), "byte {at}");
            flipped += 1;
        }
        start += line.len() + 1;
    }
    assert!(flipped > 3_000, "{flipped}");
}

#[test]
fn every_dropped_record_is_named() {
    let file = exported(&tail(&world(N)));
    let lines: Vec<&str> = file.lines().collect();
    for number in 1..=N {
        let mut lines = lines.clone();
        lines.remove(number - 1);
        let fault = fault(&joined(&lines));
        assert_eq!(named(&fault), (number as u64, "missing"));
    }
}

#[test]
fn every_inserted_record_is_named_by_its_line() {
    let file = exported(&tail(&world(N)));
    let lines: Vec<&str> = file.lines().collect();
    for copied in 0..N {
        for at in 0..=N {
            let mut lines = lines.clone();
            lines.insert(at, lines[copied]);
            let (line, what) = named(&fault(&joined(&lines)));
            // A copy beside its original is either of the two.
            let here = lines[usize::try_from(line).unwrap() - 1] == lines[at];
            assert!(what == "inserted" && here, "{copied} at {at}: {line}");
        }
    }
}

#[test]
fn a_record_made_up_with_the_right_links_is_told_from_the_one_whose_place_it_takes() {
    let tail = tail(&world(N));
    for at in 0..=N {
        let mut records = tail.records.clone();
        let mut forged = records[at.min(N - 1)].clone();
        forged.number = at as u64 + 1;
        forged.reason = "never said".into();
        forged.previous_hash = match at {
            0 => hex(&GENESIS),
            _ => records[at - 1].hash.clone(),
        };
        forged.hash = forged.content_hash().unwrap();
        records.insert(at, forged);
        let mut file = Vec::new();
        write(&mut file, &records, &tail.end(1, Millis(9))).unwrap();
        assert_eq!(named(&fault(&file)), (at as u64 + 1, "inserted"), "{at}");
    }
}

#[test]
fn a_file_that_was_cut_off_anywhere_says_what_is_missing() {
    let tail = tail(&world(N));
    let file = exported(&tail);
    let lines: Vec<&str> = file.lines().collect();
    for kept in 0..=N {
        // Without its end, and with it.
        let cut = fault(&joined(&lines[..kept]));
        assert_eq!(named(&cut), (kept as u64 + 1, "cut off"));
        if kept < N {
            let cut = fault(&joined(&[&lines[..kept], &lines[N..]].concat()));
            assert_eq!(named(&cut), (kept as u64 + 1, "missing"));
        }
        // With another end that fits: what the cluster has beyond it is told.
        let end = End {
            last: kept as u64,
            head: kept
                .checked_sub(1)
                .map_or_else(|| hex(&GENESIS), |at| tail.records[at].hash.clone()),
            ..tail.end(1, Millis(9))
        };
        let mut file = Vec::new();
        write(&mut file, &tail.records[..kept], &end).unwrap();
        let archive = read(&file[..], |_| Ok(())).unwrap();
        assert_eq!(tail.check(&archive).unwrap().newer, (N - kept) as u64);
    }
    let middle = file.len() / 2;
    assert_eq!(named(&fault(&file.as_bytes()[..middle])).1, "changed");
}

#[test]
fn a_chain_that_was_hashed_anew_is_told_by_the_cluster() {
    let tail = tail(&world(N));
    for from in 0..N {
        let mut records = tail.records.clone();
        records[from].actor = "operator/admin/mallory".into();
        let mut previous = records[from].previous_hash.clone();
        for record in &mut records[from..] {
            record.previous_hash = previous;
            record.hash = record.content_hash().unwrap();
            previous = record.hash.clone();
        }
        let end = End {
            head: previous,
            ..tail.end(1, Millis(9))
        };
        let mut file = Vec::new();
        write(&mut file, &records, &end).unwrap();
        let archive = read(&file[..], |_| Ok(())).unwrap();
        let fault = tail.check(&archive).unwrap_err();
        assert_eq!(named(&fault), (from as u64 + 1, "changed"));
    }
}

#[test]
fn files_and_the_clusters_tail_join_where_they_meet_and_say_so_where_they_do_not() {
    let mut world = world(3);
    let early = exported(&tail(&world));
    let early = read(early.as_bytes(), |_| Ok(())).unwrap();
    let run = |world: &mut World, entries: usize| {
        for n in 0..entries {
            let _ = world.run(["set nobody ready", "set w1 ready"][n % 2]);
        }
    };
    // The tail's first entry follows the file's last one.
    run(&mut world, KEPT_ENTRIES);
    let newer = KEPT_ENTRIES as u64;
    let joined = tail(&world).check(&early).unwrap();
    let expected = Joined {
        shared: 0,
        linked: true,
        newer,
    };
    assert_eq!(joined, expected);
    run(&mut world, 1);
    let joined = tail(&world).check(&early).unwrap();
    assert!(!joined.linked, "entry 4 is kept nowhere");
    // A file of what is left begins later, and says so.
    let late = exported(&tail(&world));
    let late = read(late.as_bytes(), |_| Ok(())).unwrap();
    assert_eq!(late.end.first, 5);
    let other = Tail {
        cluster_id: ClusterId([9; 16]),
        ..tail(&world)
    };
    assert_eq!(named(&other.check(&late).unwrap_err()).1, "other cluster");
    let shorter = tail(&self::world(3));
    assert_eq!(named(&shorter.check(&late).unwrap_err()), (4, "ahead"));
}
