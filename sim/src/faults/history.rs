//! What clients called and what they got, for the linearizability check.

use crate::linear::{self, Call, Verdict};

pub(super) use linear::{Op, Outcome};

/// Values are above every default.
const NEWER: u64 = 10_000;
/// Steps of the checker a world may take.
const MAX_STEPS: u64 = 20_000_000;

#[derive(Default)]
pub(super) struct History {
    calls: Vec<Entry>,
    values: u64,
}

struct Entry {
    call: Call,
    /// It is certain that it did not take effect.
    never: bool,
}

/// How the operations ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) ok: u64,
    pub(super) unknown: u64,
    pub(super) failed: u64,
}

impl History {
    /// A value that nobody wrote yet; fits a pool's queue limit.
    pub(super) fn fresh(&mut self) -> u64 {
        self.values += 1;
        NEWER + self.values
    }

    pub(super) fn call(&mut self, client: u32, key: &str, called: u64, op: Op) -> usize {
        let call = Call {
            client,
            key: key.to_owned(),
            called,
            returned: None,
            op,
        };
        self.calls.push(Entry { call, never: false });
        self.calls.len() - 1
    }

    pub(super) fn key(&self, call: usize) -> &str {
        self.calls.get(call).map_or("", |entry| &entry.call.key)
    }

    pub(super) fn is_compare(&self, call: usize) -> bool {
        let entry = self.calls.get(call);
        entry.is_some_and(|entry| matches!(entry.call.op, Op::CompareAndSet { .. }))
    }

    pub(super) fn returned(&mut self, call: usize, at: u64, outcome: Outcome) {
        if let Some(entry) = self.calls.get_mut(call) {
            entry.call.returned = Some((at, outcome));
        }
    }

    /// The calls may take effect at any later time, or never.
    pub(super) fn unknown(&mut self, _calls: &[usize]) {}

    /// The calls had no effect.
    pub(super) fn never(&mut self, calls: &[usize]) {
        for call in calls {
            if let Some(entry) = self.calls.get_mut(*call) {
                entry.never = true;
            }
        }
    }

    pub(super) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for entry in &self.calls {
            match (entry.never, entry.call.returned) {
                (true, _) => counts.failed += 1,
                (false, Some(_)) => counts.ok += 1,
                (false, None) => counts.unknown += 1,
            }
        }
        counts
    }

    /// Checks all keys; returns how many calls were checked.
    pub(super) fn check(self) -> Result<u64, String> {
        let calls: Vec<_> = self
            .calls
            .into_iter()
            .filter(|entry| !entry.never)
            .map(|entry| entry.call)
            .collect();
        match linear::check(calls, MAX_STEPS) {
            Verdict::Linearizable { calls } => Ok(calls as u64),
            Verdict::Violation { key, calls } => {
                Err(format!("{key} is not linearizable: {}", calls.join("; ")))
            }
            Verdict::GaveUp { key } => Err(format!("{key}: the check took too many steps")),
        }
    }
}
