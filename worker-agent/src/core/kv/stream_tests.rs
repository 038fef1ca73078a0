//! What is applied, asked for and lost, by scripts.

use std::time::Duration;

use forebay_proto::Now;

use super::event::{Batch, Event, Place};
use super::stream::{Counts, MAX_WAITING, MAX_WAITING_BYTES, Step, Stream};

const fn at(ms: u64) -> Now {
    Now::at(Duration::from_millis(ms))
}

/// A batch that can be told from others.
fn batch(seq: u64) -> Batch {
    let place = Place {
        gpu: true,
        group: 0,
    };
    Batch {
        at: 0.0,
        events: vec![Event::Removed {
            hashes: vec![seq],
            place,
        }],
    }
}

/// Carries out `live N`, `told N`, `end`, `ask`, `late`, `connect`, and says what followed.
fn check(mut stream: Stream, script: &str, expected: &str) {
    let mut out = Vec::new();
    let mut ms = 0;
    for line in script.split(", ") {
        let mut steps = Vec::new();
        let (verb, number) = line.split_once(' ').unwrap_or((line, "0"));
        let seq = number.parse().unwrap();
        match verb {
            "live" => stream.live(seq, batch(seq), &mut steps),
            "told" => stream.replayed(at(ms), seq, batch(seq), &mut steps),
            "end" => stream.replay_end(&mut steps),
            "bad" => stream.garbled(seq, false, &mut steps),
            "badly" => stream.garbled(seq, true, &mut steps),
            "connect" => stream.interrupted(),
            "late" => {
                ms += 2_000;
                stream.pass(at(ms), &mut steps);
            }
            "ask" => match stream.ask(at(ms)) {
                Some(from) => out.push(format!("from {from}")),
                None => out.push("nothing".to_owned()),
            },
            _ => panic!("{line}"),
        }
        out.extend(steps.into_iter().map(|step| match step {
            Step::Apply(batch) => match &batch.events[0] {
                Event::Removed { hashes, .. } => hashes[0].to_string(),
                other => panic!("{other:?}"),
            },
            Step::Lost => "lost".to_owned(),
            Step::Restarted => "restarted".to_owned(),
            Step::Complete => "complete".to_owned(),
        }));
    }
    assert_eq!(out.join(" "), expected, "{script}");
}

fn new() -> Stream {
    Stream::behind(None, true, Counts::default())
}

fn after(last: u64) -> Stream {
    Stream::behind(Some(last), true, Counts::default())
}

fn alone() -> Stream {
    Stream::behind(None, false, Counts::default())
}

#[test]
fn a_new_stream_asks_for_all_that_was() {
    check(
        new(),
        "ask, told 0, told 1, end, live 2, live 3",
        "from 0 0 1 complete 2 3",
    );
    check(
        new(),
        "ask, end, live 0, live 1",
        "from 0 complete complete 0 1",
    );
    check(
        new(),
        "ask, live 2, live 3, told 0, told 1, told 2, end, live 4",
        "from 0 0 1 2 complete 3 4",
    );
    check(new(), "live 0, ask, end", "from 0 complete 0");
    check(
        new(),
        "ask, told 0, told 1, end, live 1, live 2",
        "from 0 0 1 complete 2",
    );
}

#[test]
fn an_answer_that_begins_late_is_a_loss() {
    check(
        new(),
        "ask, told 12, told 13, end, live 14",
        "from 0 lost 12 13 14",
    );
    check(
        after(4),
        "ask, told 9, told 10, end, live 11",
        "from 5 lost 9 10 11",
    );
    check(after(4), "ask, live 7, end, live 8", "from 5 lost 7 8");
    check(after(4), "ask, told 5, told 7, end", "from 5 5 lost 7");
}

#[test]
fn a_gap_is_asked_for_and_what_waited_follows() {
    check(
        after(4),
        "ask, end, live 5, live 8, ask, live 9, told 6, told 7, told 8, end, live 10",
        "from 5 5 from 6 6 7 8 9 10",
    );
    // One more gap while the first is asked for.
    check(
        after(4),
        "ask, end, live 6, ask, live 9, told 5, told 6, end, ask, told 7, told 8, told 9, end",
        "from 5 from 5 5 6 from 7 7 8 9",
    );
}

#[test]
fn numbers_that_go_back_are_another_process() {
    check(
        after(4),
        "ask, end, live 5, live 0, ask, told 0, end, live 1",
        "from 5 5 restarted from 0 0 complete 1",
    );
    check(after(4), "ask, end, live 4, ask", "from 5 restarted from 0");
    check(
        after(4),
        "ask, end, connect, ask, end, live 3, ask, told 0, told 1, told 2, told 3, end",
        "from 5 from 5 restarted from 0 0 1 2 3 complete",
    );
}

#[test]
fn an_answer_that_does_not_come_is_asked_for_again_and_given_up() {
    check(
        after(4),
        "ask, live 6, late, ask, late, ask, late, live 7",
        "from 5 from 5 from 5 lost 6 7",
    );
    check(
        after(4),
        "ask, late, ask, told 5, end, live 6",
        "from 5 from 5 5 6",
    );
}

#[test]
fn without_anybody_to_ask_a_gap_is_a_loss() {
    check(alone(), "live 0, live 1, live 3", "complete 0 1 lost 3");
    check(alone(), "live 3, live 4", "lost 3 4");
    check(alone(), "ask", "nothing");
    check(
        alone(),
        "live 0, connect, live 1, live 0",
        "complete 0 1 restarted complete 0",
    );
}

#[test]
fn what_cannot_be_read_is_asked_for_once_more() {
    check(
        after(4),
        "ask, end, bad 5, ask, live 6, told 5, told 6, end, live 7",
        "from 5 from 5 5 6 7",
    );
    check(
        after(4),
        "ask, end, bad 5, ask, badly 5, told 6, end, live 7",
        "from 5 from 5 lost 6 7",
    );
    check(new(), "ask, badly 0, told 1, end", "from 0 lost 1");
    check(alone(), "live 0, bad 1, live 2", "complete 0 lost 2");
}

#[test]
fn answers_that_nobody_asked_for_are_passed_over() {
    check(after(4), "told 9, end, ask, end", "from 5");
}

#[test]
fn what_waits_is_bounded_in_number_and_bytes_and_what_was_dropped_is_asked_for() {
    let large = |seq| Batch {
        events: vec![Event::Removed {
            hashes: vec![seq; (1 << 20) / 8],
            place: Place {
                gpu: true,
                group: 0,
            },
        }],
        ..Batch::default()
    };
    let (mut stream, mut steps) = (new(), Vec::new());
    assert_eq!(stream.ask(at(0)), Some(0));
    for seq in 1..1_000 {
        stream.live(seq, large(seq), &mut steps);
        assert!(stream.waiting().1 <= MAX_WAITING_BYTES);
    }
    assert!(stream.waiting().1 > MAX_WAITING_BYTES / 4, "some wait");
    let many = 1_000 + 2 * MAX_WAITING as u64;
    for seq in 1_000..many {
        stream.live(seq, batch(seq), &mut steps);
        assert!(stream.waiting().0 <= MAX_WAITING);
    }
    assert_eq!(steps, []);
    // Of those that were told again all are applied, and then what waited.
    stream.replayed(at(1), 0, batch(0), &mut steps);
    stream.replay_end(&mut steps);
    assert_eq!(stream.ask(at(2)), Some(1), "what was dropped is missing");
    for seq in 1..many {
        stream.replayed(at(3), seq, batch(seq), &mut steps);
    }
    stream.replay_end(&mut steps);
    assert_eq!((stream.last(), stream.waiting()), (Some(many - 1), (0, 0)));
    let losses = steps.iter().filter(|step| **step == Step::Lost);
    assert_eq!(losses.count(), 0);
}
