//! Which homes are to be warmed by a copy of a live request, and what the copy says.
//!
//! Only families whose homes a drain or a rebalance chose, each home once, from a request of the family that was
//! placed elsewhere: nobody else has the text. Bounded by the families of the facts and their homes.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_proto::{Now, WorkerId};
use forebay_scheduler::homes::table::Table;
use forebay_scheduler::index::Hit;
use forebay_scheduler::json::{Scanner, Span, Unreadable, says};

/// Until a home is tried again after it did not take a copy, or the copy was cut off.
const AGAIN: Duration = Duration::from_secs(5);

/// A home of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Home {
    pub(crate) chunk: u64,
    pub(crate) worker: WorkerId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    UnderWay,
    Done,
    Not(Now),
}

/// What was done for each home.
#[derive(Debug, Default)]
pub(crate) struct Shadows(BTreeMap<Home, State>);

impl Shadows {
    /// Forgets homes that are none any more: should one become a home again, it is warmed again.
    pub(crate) fn facts(&mut self, table: &Table) {
        self.0
            .retain(|home, _| table.is_home(home.chunk, home.worker));
    }

    /// The home that a request with this path, which was placed on `placed`, is to warm; it is under way from
    /// here on.
    pub(crate) fn due(
        &mut self,
        now: Now,
        table: &Table,
        path: &[u64],
        hits: &[Hit],
        placed: WorkerId,
    ) -> Option<Home> {
        for family in table.all_of(path).filter(|family| family.pinned) {
            for worker in family.homes.iter().filter(|home| **home != placed) {
                let home = Home {
                    chunk: family.chunk,
                    worker: *worker,
                };
                let hit = hits.iter().find(|hit| hit.worker == *worker);
                if hit.is_some_and(|hit| hit.chunks >= family.chunks) {
                    continue;
                }
                let state = self.0.get(&home).copied();
                let is_due = match state {
                    None => true,
                    Some(State::Not(since)) => now.since(since) >= AGAIN,
                    Some(State::UnderWay | State::Done) => false,
                };
                if is_due {
                    self.0.insert(home, State::UnderWay);
                    return Some(home);
                }
            }
        }
        None
    }

    /// A copy is over: the home has it, or not.
    pub(crate) fn over(&mut self, now: Now, home: Home, done: bool) {
        if let Some(state) = self.0.get_mut(&home) {
            *state = if done { State::Done } else { State::Not(now) };
        }
    }
}

/// Members that say how much is to be answered, and how.
const OF_THE_ANSWER: [&[u8]; 8] = [
    b"max_tokens",
    b"max_completion_tokens",
    b"min_tokens",
    b"stream",
    b"stream_options",
    b"n",
    b"best_of",
    b"echo",
];
const ONE_TOKEN: &[u8] = br#""max_tokens":1,"stream":false"#;

/// The same prompt, to be answered by one token in one piece.
///
/// # Errors
///
/// The body is no JSON object.
pub(crate) fn body(body: &[u8]) -> Result<Vec<u8>, Unreadable> {
    let mut kept: Vec<Span> = Vec::new();
    let mut scanner = Scanner::new(body);
    scanner.object(|key, value| {
        let span = value.skip()?;
        let raw = &body[key.from..key.to];
        if !OF_THE_ANSWER.iter().any(|name| says(raw, name)) {
            kept.push(Span {
                from: key.from - 1,
                to: span.to,
            });
        }
        Ok(())
    })?;
    scanner.end()?;
    let mut copy = Vec::with_capacity(body.len() + ONE_TOKEN.len() + 2);
    copy.push(b'{');
    for member in kept {
        copy.extend_from_slice(&body[member.from..member.to]);
        copy.push(b',');
    }
    copy.extend_from_slice(ONE_TOKEN);
    copy.push(b'}');
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use forebay_proto::Family;

    use super::*;

    fn family(chunk: u64, chunks: u32, homes: &[u32], pinned: bool) -> Family {
        Family {
            pool: "p".into(),
            chunk,
            key_epoch: 1,
            chunks,
            tokens: chunks * 64,
            homes: homes.iter().copied().map(WorkerId).collect(),
            saves: 0,
            takes: 0,
            pinned,
        }
    }

    fn at(secs: u64) -> Now {
        Now::at(Duration::from_secs(secs))
    }

    fn holds(worker: u32, chunks: u32) -> Hit {
        Hit {
            worker: WorkerId(worker),
            chunks,
            tokens: chunks * 64,
        }
    }

    #[test]
    fn each_home_of_a_pinned_family_is_warmed_once() {
        let table = Table::new(&[family(12, 2, &[1, 3], true), family(14, 4, &[2], false)]);
        let path = [11, 12, 13, 14, 15];
        let mut shadows = Shadows::default();
        let mut due = |now, hits: &[Hit], placed| {
            let home = shadows.due(at(now), &table, &path, hits, WorkerId(placed));
            home.map(|home| (home.chunk, home.worker.0))
        };
        // The one that holds it needs no copy, nor the one that the request is on; 14 is not pinned.
        assert_eq!(due(1, &[holds(1, 2)], 3), None);
        assert_eq!(due(1, &[holds(1, 1)], 3), Some((12, 1)));
        assert_eq!(
            due(1, &[], 7),
            Some((12, 3)),
            "one is under way to the other"
        );
        assert_eq!(due(1, &[], 7), None);
        let home = |worker| Home {
            chunk: 12,
            worker: WorkerId(worker),
        };
        shadows.over(at(2), home(1), true);
        shadows.over(at(2), home(3), false);
        let mut due = |now| {
            let home = shadows.due(at(now), &table, &path, &[], WorkerId(7));
            home.map(|home| home.worker.0)
        };
        assert_eq!(due(6), None);
        assert_eq!(due(7), Some(3), "it is tried again after a while");
        // What is no home any more is forgotten, and may become one again.
        shadows.facts(&Table::new(&[family(12, 2, &[3], true)]));
        shadows.over(at(8), home(1), true);
        let home = shadows.due(at(9), &table, &path, &[], WorkerId(7));
        assert_eq!(home.map(|home| home.worker.0), Some(1));
        assert_eq!(shadows.due(at(9), &table, &[11], &[], WorkerId(7)), None);
    }

    #[test]
    fn a_copy_is_the_same_prompt_answered_by_one_token() {
        let check = |text: &str, expected: &str| {
            let copy = body(text.as_bytes()).map(|copy| String::from_utf8(copy).unwrap());
            assert_eq!(copy.ok().as_deref(), Some(expected), "{text}");
        };
        check("{}", r#"{"max_tokens":1,"stream":false}"#);
        check(
            r#" {"model": "m", "stream" : true, "messages":[{"stream":true,"n":2}], "n":3,"max_tokens":400 } "#,
            r#"{"model": "m","messages":[{"stream":true,"n":2}],"max_tokens":1,"stream":false}"#,
        );
        check(
            r#"{"stream_options":{"include_usage":true},"prompt":"a \"b\" {","max_completion_tokens":9,"best_of":2,"min_tokens":5,"echo":true,"temperature":0.5}"#,
            r#"{"prompt":"a \"b\" {","temperature":0.5,"max_tokens":1,"stream":false}"#,
        );
        // Escaped in a key it is the same member.
        check(
            "{\"str\\u0065am\":true}",
            r#"{"max_tokens":1,"stream":false}"#,
        );
        assert!(body(b"[1]").is_err() && body(b"{\"a\":1} x").is_err());
    }
}
