//! Files of the audit: what was written is found, whatever a crash or a bound took.

use std::fs;
use std::io::Write as _;

use proptest::prelude::*;

use super::*;
use crate::fleet::archive::Record;
use forebay_proto::Revision;

const BOUNDS: Bounds = Bounds {
    segment_bytes: 2_000,
    all_bytes: 1 << 20,
};

/// A chain's records; what they say does not matter here.
fn records(numbers: std::ops::RangeInclusive<u64>) -> Vec<Record> {
    let hash = |number: u64| format!("{number:064x}");
    numbers
        .map(|number| Record {
            number,
            revision: Revision(number),
            at_ms: number,
            actor: "operator/admin/a".into(),
            address: "h:1".into(),
            action: "remove".into(),
            target: format!("w{number}"),
            reason: String::new(),
            result: "done".into(),
            previous_hash: hash(number - 1),
            hash: hash(number),
        })
        .collect()
}

fn all(segments: &Segments, mut from: u64) -> Vec<u64> {
    let mut numbers = Vec::new();
    loop {
        let page = segments.read(from, 7).unwrap();
        let Some(last) = page.last() else {
            return numbers;
        };
        from = last.number + 1;
        numbers.extend(page.iter().map(|record| record.number));
    }
}

#[test]
fn what_was_added_is_read_again_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut segments = Segments::open(dir.path(), BOUNDS).unwrap();
    assert_eq!((segments.last(), segments.begins()), (0, 1));
    segments.append(&records(1..=30)).unwrap();
    // What the state still has comes again.
    segments.append(&records(20..=33)).unwrap();
    segments.sync().unwrap();
    let again = Segments::open(dir.path(), BOUNDS).unwrap();
    assert_eq!((again.last(), again.begins()), (33, 1));
    assert_eq!(all(&again, 1), (1..=33).collect::<Vec<_>>());
    assert_eq!(all(&again, 25), (25..=33).collect::<Vec<_>>());
    assert_eq!(again.read(34, 7).unwrap(), []);
    assert!(fs::read_dir(dir.path()).unwrap().count() >= 2);
}

#[test]
fn a_line_that_a_crash_cut_off_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut segments = Segments::open(dir.path(), BOUNDS).unwrap();
    segments.append(&records(1..=3)).unwrap();
    let file = dir.path().join(format!("{:020}.jsonl", 1));
    let mut out = OpenOptions::new().append(true).open(&file).unwrap();
    let torn = records(4..=4)[0].line();
    out.write_all(&torn.as_bytes()[..torn.len() / 2]).unwrap();
    // And one of which nothing came.
    fs::write(dir.path().join(format!("{:020}.jsonl", 9)), "").unwrap();
    let mut again = Segments::open(dir.path(), BOUNDS).unwrap();
    assert_eq!(again.last(), 3);
    again.append(&records(4..=5)).unwrap();
    assert_eq!(all(&again, 1), [1, 2, 3, 4, 5]);
}

#[test]
fn what_a_node_missed_is_a_gap() {
    let dir = tempfile::tempdir().unwrap();
    let mut segments = Segments::open(dir.path(), BOUNDS).unwrap();
    segments.append(&records(1..=3)).unwrap();
    segments.append(&records(8..=9)).unwrap();
    segments.append(&records(10..=10)).unwrap();
    for segments in [&segments, &Segments::open(dir.path(), BOUNDS).unwrap()] {
        assert_eq!((segments.last(), segments.begins()), (10, 8));
        assert_eq!(all(segments, 1), [1, 2, 3]);
        assert_eq!(all(segments, 5), [0; 0]);
        assert_eq!(all(segments, 8), [8, 9, 10]);
    }
}

#[test]
fn at_the_bound_the_oldest_give_way() {
    let dir = tempfile::tempdir().unwrap();
    let bounds = Bounds {
        all_bytes: 6_000,
        ..BOUNDS
    };
    let mut segments = Segments::open(dir.path(), bounds).unwrap();
    for number in 1..=100 {
        segments.append(&records(number..=number)).unwrap();
    }
    let begins = segments.begins();
    assert!(begins > 60 && begins < 100, "{begins}");
    assert_eq!(all(&segments, begins), (begins..=100).collect::<Vec<_>>());
    let files = fs::read_dir(dir.path()).unwrap();
    let bytes: u64 = files
        .map(|one| one.unwrap().metadata().unwrap().len())
        .sum();
    assert!(bytes <= 6_000, "{bytes}");
}

#[test]
fn another_cells_files_are_not_added_to() {
    let dir = tempfile::tempdir().unwrap();
    let mut segments = Segments::open(dir.path(), BOUNDS).unwrap();
    segments.append(&records(1..=3)).unwrap();
    let mut other = records(4..=4);
    other[0].previous_hash = "f".repeat(64);
    let refused = segments.append(&other).unwrap_err().to_string();
    assert!(refused.contains("end with record 3"), "{refused}");
    assert_eq!(all(&segments, 1), [1, 2, 3]);
}

#[test]
fn a_file_that_is_none_of_ours_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("00000000000000000001.jsonl"), "so\n").unwrap();
    let refused = Segments::open(dir.path(), BOUNDS).unwrap_err().to_string();
    assert!(refused.contains("00000000000000000001.jsonl"), "{refused}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn nothing_is_lost_or_twice_however_it_came(
        steps in proptest::collection::vec((1_u64..20, 0_u64..30, any::<bool>()), 1..12),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut segments = Segments::open(dir.path(), BOUNDS).unwrap();
        let mut newest = 0_u64;
        for (more, again, restarts) in steps {
            let first = (newest + 1).saturating_sub(again).max(1);
            newest += more;
            segments.append(&records(first..=newest)).unwrap();
            if restarts {
                segments = Segments::open(dir.path(), BOUNDS).unwrap();
            }
            prop_assert_eq!(all(&segments, 1), (1..=newest).collect::<Vec<_>>());
            prop_assert_eq!(segments.begins(), 1);
        }
    }
}
