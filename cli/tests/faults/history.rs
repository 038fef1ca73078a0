//! What clients asked and were told, one register a key, for the check of the simulator.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use forebay_sim::linear::{self, Call, Op, Outcome, Verdict};

/// Steps of the search that a key may take.
const MAX_STEPS: u64 = 20_000_000;

/// A history that many clients write at once.
pub struct History {
    began: Instant,
    calls: Mutex<Vec<Call>>,
    values: AtomicU64,
    /// Reasons of the commands that had an outcome.
    acknowledged: Mutex<Vec<String>>,
    counts: [AtomicU64; 3],
}

/// How an operation ended.
#[derive(Clone, Copy, Debug)]
pub enum Ended {
    /// With an answer.
    Ok,
    /// A write that may have taken effect, may yet, or never.
    Unknown,
    /// Without any effect: refused, or a read without an answer.
    Failed,
}

/// How operations ended.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    pub ok: u64,
    pub unknown: u64,
    pub failed: u64,
}

impl History {
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            calls: Mutex::default(),
            values: AtomicU64::new(0),
            acknowledged: Mutex::default(),
            counts: Default::default(),
        }
    }

    /// A value that nobody wrote yet.
    pub fn fresh(&self) -> u64 {
        self.values.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Microseconds since the history began.
    pub fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap()
    }

    /// One operation ended, with what it asked of registers. A write that certainly had no effect is
    /// not to be among these.
    pub fn ended(&self, ended: Ended, calls: impl IntoIterator<Item = Call>) {
        self.counts[ended as usize].fetch_add(1, Ordering::Relaxed);
        self.calls.lock().unwrap().extend(calls);
    }

    /// A command with this reason had an outcome, which is audited.
    pub fn acknowledged(&self, reason: String) {
        self.acknowledged.lock().unwrap().push(reason);
    }

    pub fn all_acknowledged(&self) -> Vec<String> {
        self.acknowledged.lock().unwrap().clone()
    }

    pub fn counts(&self) -> Counts {
        let [ok, unknown, failed] =
            [0, 1, 2].map(|i: usize| self.counts[i].load(Ordering::Relaxed));
        Counts {
            ok,
            unknown,
            failed,
        }
    }

    /// Checks all keys; returns how many calls were put in order.
    pub fn check(&self) -> Result<usize, String> {
        match linear::check(self.calls.lock().unwrap().clone(), MAX_STEPS) {
            Verdict::Linearizable { calls } => Ok(calls),
            Verdict::Violation { key, calls } => {
                Err(format!("{key} is not linearizable:\n{}", calls.join("\n")))
            }
            Verdict::GaveUp { key } => Err(format!("{key}: the check took too many steps")),
        }
    }
}

impl Counts {
    /// A run in which little was answered proves little.
    pub const fn are_enough(&self) -> bool {
        self.ok >= self.unknown + self.failed
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            ok,
            unknown,
            failed,
        } = self;
        write!(f, "{ok} ok, {unknown} unknown, {failed} failed")
    }
}

/// A call with its answer, or without.
pub fn call(
    (client, key, called): (u32, &str, u64),
    op: Op,
    returned: Option<(u64, Outcome)>,
) -> Call {
    Call {
        client,
        key: key.to_owned(),
        called,
        returned,
        op,
    }
}

#[test]
fn a_stale_read_is_found() {
    let history = History::new();
    let write = |at, value| {
        let returned = Some((at + 1, Outcome::Written));
        call((1, "k", at), Op::Write(value), returned)
    };
    let read = call((2, "k", 10), Op::Read, Some((11, Outcome::Read(Some(1)))));
    history.ended(Ended::Ok, [write(1, 1)]);
    history.ended(Ended::Ok, [read]);
    assert_eq!(history.check(), Ok(2));
    history.ended(Ended::Ok, [write(5, 2)]);
    assert!(history.check().unwrap_err().contains("not linearizable"));
}
