//! Whether a history of calls could have come from one register a key, taking one call at a time.
//!
//! The search of Wing and Gong ("Testing and Verifying Concurrent Objects", 1993) with Lowe's memory of
//! positions already seen ("Testing for linearizability", 2017), a key at a time, since a history is
//! linearizable iff each key's part is (Herlihy and Wing, 1990). A call without an answer may take
//! effect at any later time, or never.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;

/// What a caller asked of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// What it holds.
    Read,
    /// To hold this.
    Write(u64),
    /// To hold `new` if it held `expected`.
    CompareAndSet {
        /// `None`: nothing was ever written.
        expected: Option<u64>,
        /// What it holds then.
        new: u64,
    },
}

/// What a caller was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It holds this; `None`: nothing was ever written.
    Read(Option<u64>),
    /// It was written.
    Written,
    /// It held what was expected, and was set.
    Set,
    /// It held something else, and was left alone.
    Conflict,
}

/// One call of the history.
#[derive(Clone, Debug)]
pub struct Call {
    /// Who called.
    pub client: u32,
    /// Which register.
    pub key: String,
    /// When, in any unit.
    pub called: u64,
    /// When it was answered, and what was said; `None`: never.
    pub returned: Option<(u64, Outcome)>,
    /// What was asked.
    pub op: Op,
}

/// What the check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is an order that explains every answer.
    Linearizable {
        /// So many calls were put in order.
        calls: usize,
    },
    /// There is none.
    Violation {
        /// For this key.
        key: String,
        /// Calls around the first answer that no order explains.
        calls: Vec<String>,
    },
    /// The search was cut off.
    GaveUp {
        /// At this key.
        key: String,
    },
}

/// Checks a history; each key may take `max_steps` steps of the search.
#[must_use]
pub fn check(calls: Vec<Call>, max_steps: u64) -> Verdict {
    let mut keys: BTreeMap<String, Vec<Call>> = BTreeMap::new();
    let count = calls.len();
    for call in calls {
        // A read without an answer says nothing.
        if call.returned.is_some() || call.op != Op::Read {
            keys.entry(call.key.clone()).or_default().push(call);
        }
    }
    for (key, mut calls) in keys {
        calls.sort_by_key(|call| call.called);
        match Search::new(&calls).run(max_steps) {
            Found::Order => {}
            Found::None { deepest } => {
                let around = calls.iter().skip(deepest.saturating_sub(6)).take(14);
                let calls = around.map(|call| format!("{call:?}")).collect();
                return Verdict::Violation { key, calls };
            }
            Found::TooManySteps => return Verdict::GaveUp { key },
        }
    }
    Verdict::Linearizable { calls: count }
}

/// What a register holds after this call, if it may be the next one.
fn next(held: Option<u64>, call: &Call) -> Option<Option<u64>> {
    let outcome = call.returned.map(|(_, outcome)| outcome);
    match (call.op, outcome) {
        (Op::Read, Some(Outcome::Read(value))) => (value == held).then_some(held),
        (Op::Write(value), Some(Outcome::Written) | None) => Some(Some(value)),
        (Op::CompareAndSet { expected, new }, Some(Outcome::Set) | None) => {
            (expected == held).then_some(Some(new))
        }
        (Op::CompareAndSet { expected, .. }, Some(Outcome::Conflict)) => {
            (expected != held).then_some(held)
        }
        // An answer that does not belong to the question explains nothing.
        (_, _) => None,
    }
}

struct Search<'a> {
    calls: &'a [Call],
    /// Calls already in the order.
    taken: Vec<u64>,
    /// Calls with an answer that are not.
    left: usize,
    seen: HashSet<(Vec<u64>, Option<u64>)>,
    deepest: usize,
}

enum Found {
    Order,
    None { deepest: usize },
    TooManySteps,
}

/// A choice of the search: this call came next, and the register held that before.
struct Choice {
    call: usize,
    before: Option<u64>,
}

impl<'a> Search<'a> {
    fn new(calls: &'a [Call]) -> Self {
        Self {
            calls,
            taken: vec![0; calls.len().div_ceil(64)],
            left: calls.iter().filter(|call| call.returned.is_some()).count(),
            seen: HashSet::new(),
            deepest: 0,
        }
    }

    fn is_taken(&self, call: usize) -> bool {
        self.taken[call / 64] >> (call % 64) & 1 == 1
    }

    fn flip(&mut self, call: usize) {
        self.taken[call / 64] ^= 1 << (call % 64);
    }

    fn run(mut self, max_steps: u64) -> Found {
        let (mut held, mut from) = (None, 0);
        let mut choices: Vec<Choice> = Vec::new();
        let mut steps = 0;
        while self.left > 0 {
            steps += 1;
            if steps > max_steps {
                return Found::TooManySteps;
            }
            if let Some((call, after)) = self.candidate(held, from) {
                let answered = self.calls[call].returned.is_some();
                self.flip(call);
                if self.seen.insert((self.taken.clone(), after)) {
                    self.left -= usize::from(answered);
                    self.deepest = self.deepest.max(call);
                    choices.push(Choice { call, before: held });
                    (held, from) = (after, 0);
                } else {
                    self.flip(call);
                    from = call + 1;
                }
                continue;
            }
            let Some(Choice { call, before }) = choices.pop() else {
                return Found::None {
                    deepest: self.deepest,
                };
            };
            self.flip(call);
            self.left += usize::from(self.calls[call].returned.is_some());
            (held, from) = (before, call + 1);
        }
        Found::Order
    }

    /// The first call from `from` on that may come next: nothing else was answered before it was made.
    fn candidate(&self, held: Option<u64>, from: usize) -> Option<(usize, Option<u64>)> {
        let mut first_answer = u64::MAX;
        for (position, call) in self.calls.iter().enumerate() {
            if call.called > first_answer {
                break;
            }
            if self.is_taken(position) {
                continue;
            }
            if let Some((at, _)) = call.returned {
                first_answer = first_answer.min(at);
            }
            if position >= from
                && let Some(after) = next(held, call)
            {
                return Some((position, after));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `client from-to call`, one a line; `to` is `?` where there was no answer.
    fn history(text: &str) -> Vec<Call> {
        let value = |text: &str| text.parse::<u64>().ok();
        text.lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let (called, returned) = words[1].split_once('-').unwrap();
                let (op, outcome) = match words[2..] {
                    ["read", held] => (Op::Read, Outcome::Read(value(held))),
                    ["write", new] => (Op::Write(value(new).unwrap()), Outcome::Written),
                    [how @ ("set" | "conflict"), expected, new] => {
                        let (expected, new) = (value(expected), value(new).unwrap());
                        let outcome = if how == "set" {
                            Outcome::Set
                        } else {
                            Outcome::Conflict
                        };
                        (Op::CompareAndSet { expected, new }, outcome)
                    }
                    _ => panic!("{line}"),
                };
                Call {
                    client: words[0].parse().unwrap(),
                    key: "k".into(),
                    called: called.parse().unwrap(),
                    returned: returned.parse().ok().map(|at| (at, outcome)),
                    op,
                }
            })
            .collect()
    }

    fn holds(text: &str) -> bool {
        match check(history(text), 100_000) {
            Verdict::Linearizable { .. } => true,
            Verdict::Violation { .. } => false,
            Verdict::GaveUp { key } => panic!("gave up at {key}"),
        }
    }

    #[test]
    fn a_read_sees_what_was_written_before_it_and_nothing_older() {
        assert!(holds("1 1-2 write 5\n 2 3-4 read 5"));
        assert!(!holds("1 1-2 write 5\n 2 3-4 read -"));
        assert!(!holds("1 1-2 write 5\n 1 3-4 write 6\n 2 5-6 read 5"));
        assert!(!holds("1 1-2 write 5\n 2 3-4 read 7"));
    }

    #[test]
    fn calls_at_the_same_time_may_have_any_order_but_one() {
        assert!(holds("1 1-9 write 5\n 2 2-3 read -\n 2 4-5 read 5"));
        assert!(!holds("1 1-9 write 5\n 2 2-3 read 5\n 2 4-5 read -"));
        assert!(holds("1 1-9 write 5\n 2 1-9 write 6\n 3 10-11 read 5"));
        assert!(!holds(
            "1 1-9 write 5\n 2 1-9 write 6\n 3 10-11 read 5\n 3 12-13 read 6"
        ));
    }

    #[test]
    fn of_two_who_expect_the_same_one_is_set() {
        assert!(holds("1 1-9 set - 5\n 2 1-9 conflict - 6\n 3 10-11 read 5"));
        assert!(!holds("1 1-9 set - 5\n 2 1-9 set - 6"));
        assert!(!holds("1 1-2 conflict - 6"));
    }

    #[test]
    fn a_call_without_an_answer_happens_late_or_never() {
        assert!(holds("1 1-? write 5\n 2 3-4 read -\n 2 5-6 read -"));
        assert!(holds("1 1-? write 5\n 2 3-4 read -\n 2 5-6 read 5"));
        assert!(!holds("1 1-? write 5\n 2 3-4 read 5\n 2 5-6 read -"));
        assert!(!holds("1 7-? write 5\n 2 3-4 read 5"));
    }

    /// Every order of a few calls, tried one by one.
    fn holds_by_trying(calls: &[Call]) -> bool {
        fn go(calls: &[Call], taken: u32, held: Option<u64>) -> bool {
            let left = |position: &usize| taken >> position & 1 == 0;
            let mut open = (0..calls.len()).filter(left);
            if open.clone().all(|at| calls[at].returned.is_none()) {
                return true;
            }
            open.any(|at| {
                let none_before = (0..calls.len()).filter(left).all(|other| {
                    calls[other]
                        .returned
                        .is_none_or(|(end, _)| end >= calls[at].called)
                });
                let after = next(held, &calls[at]).filter(|_| none_before);
                after.is_some_and(|after| go(calls, taken | 1 << at, after))
            })
        }
        go(calls, 0, None)
    }

    #[test]
    fn the_search_agrees_with_trying_every_order() {
        use rand::{Rng as _, SeedableRng as _};
        let mut rng = rand::rngs::StdRng::seed_from_u64(11);
        let mut verdicts = [0; 2];
        for _ in 0..4_000 {
            let calls: Vec<Call> = (0..rng.random_range(1..7))
                .map(|client| {
                    let called = rng.random_range(0..12);
                    let value = rng.random_range(0..3);
                    let held = rng.random_bool(0.8).then(|| rng.random_range(0..3));
                    let (op, outcome) = match rng.random_range(0..4) {
                        0 => (Op::Write(value), Outcome::Written),
                        1 | 2 => (Op::Read, Outcome::Read(held)),
                        _ => {
                            let op = Op::CompareAndSet {
                                expected: held,
                                new: value,
                            };
                            let set = rng.random_bool(0.5);
                            (op, if set { Outcome::Set } else { Outcome::Conflict })
                        }
                    };
                    let answered = op == Op::Read || rng.random_bool(0.8);
                    let at = called + rng.random_range(0..8);
                    Call {
                        client,
                        key: "k".into(),
                        called,
                        returned: answered.then_some((at, outcome)),
                        op,
                    }
                })
                .collect();
            let expected = holds_by_trying(&calls);
            verdicts[usize::from(expected)] += 1;
            let found = matches!(check(calls.clone(), 100_000), Verdict::Linearizable { .. });
            assert_eq!(found, expected, "{calls:?}");
        }
        assert!(verdicts.iter().all(|count| *count > 400), "{verdicts:?}");
    }
}
