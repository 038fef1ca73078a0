//! The store beside a plain list that does the same.

use proptest::prelude::*;

use super::tests::{append, bootstrap, entry, options, reopen, start};
use crate::node::{Entry, Snapshot, Write};

#[derive(Clone, Debug)]
enum Op {
    Append { back: u64, count: u64 },
    Snapshot { behind: u64, keep: u64 },
    Install { ahead: u64 },
    Reopen,
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..4u64, 1..6u64).prop_map(|(back, count)| Op::Append { back, count }),
        1 => (0..5u64, 0..5u64).prop_map(|(behind, keep)| Op::Snapshot { behind, keep }),
        1 => (1..5u64).prop_map(|ahead| Op::Install { ahead }),
        2 => Just(Op::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_comes_back_as_a_list_would(ops in prop::collection::vec(any_op(), 1..40)) {
        let temp = tempfile::tempdir().unwrap();
        let mut store = bootstrap(temp.path(), options(400));
        // The model: the snapshot, and all entries after it.
        let (mut snapshot, mut log) = (start(), Vec::<Entry>::new());
        for (term, op) in (2..).zip(ops) {
            let last = log.last().map_or(snapshot.index, |entry| entry.index);
            match op {
                Op::Append { back, count } => {
                    let first = (last + 1).saturating_sub(back).max(snapshot.index + 1);
                    let added: Vec<_> = (first..first + count).map(|index| (index, term)).collect();
                    append(&mut store, &added, snapshot.index).unwrap();
                    log.retain(|held| held.index < first);
                    log.extend(added.iter().map(|&(index, term)| entry(index, term)));
                }
                Op::Snapshot { behind, keep } => {
                    let index = last.saturating_sub(behind).max(snapshot.index);
                    let Some(at) = log.iter().find(|held| held.index == index) else { continue };
                    snapshot = Snapshot { index, term: at.term, ..start() };
                    store.save_snapshot(&snapshot, keep).unwrap();
                    log.retain(|held| held.index > index);
                }
                Op::Install { ahead } => {
                    snapshot = Snapshot { index: last + ahead, term, ..start() };
                    let write = Write { snapshot: Some(snapshot.clone()), must_sync: true, ..Write::default() };
                    store.write(&write).unwrap();
                    log.clear();
                }
                Op::Reopen => {
                    drop(store);
                    let (again, restored) = reopen(temp.path(), options(400)).unwrap();
                    store = *again;
                    prop_assert_eq!(&restored.snapshot, &snapshot);
                    let after: Vec<_> =
                        restored.entries.iter().filter(|held| held.index > snapshot.index).cloned().collect();
                    prop_assert_eq!(&after, &log);
                    let mut numbers = restored.entries.iter().map(|held| held.index);
                    let first = numbers.next().unwrap_or(snapshot.index + 1);
                    prop_assert!(first <= snapshot.index + 1);
                    prop_assert!(numbers.zip(first + 1..).all(|(is, expected)| is == expected));
                }
            }
        }
    }
}
