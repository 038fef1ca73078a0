//! Who is held to have killed an engine, as a story of placements; and that suspects are prefilled alone.

use std::collections::BTreeMap;

use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Now, Revision};

use super::MOST_VICTIMS;
use crate::core::tests::{SETTINGS, at, ms, offer, open_with};
use crate::core::*;

struct Story {
    core: Core,
    now: Now,
    ids: BTreeMap<char, PlacementId>,
}

impl Story {
    fn new() -> Self {
        let settings = Settings {
            slots: 8,
            queue_limit: 8,
            ..SETTINGS
        };
        Self {
            core: open_with(settings),
            now: at(1),
            ids: BTreeMap::new(),
        }
    }

    /// `a+`: a comes, capitals are suspected; `a.`: its first token; `a!`: it breaks off; `a=`: it ends well; `a?`: its
    /// client leaves; `~`: eleven seconds pass; `X`: the engine is gone; `drain`: the worker drains.
    fn tell(&mut self, story: &str) {
        for step in story.split_whitespace() {
            match step {
                "X" => {
                    self.core.engine_died(self.now);
                    self.core.engine_down(self.now);
                }
                "~" => self.now = self.now + ms(11_000),
                "drain" => self.core.facts(self.now, Desired::Draining, Revision(9)),
                step => {
                    let letter = step.chars().next().unwrap();
                    self.happens(letter, &step[1..]);
                }
            }
        }
    }

    fn happens(&mut self, letter: char, what: &str) {
        let known = self.ids.get(&letter).copied();
        match what {
            "+" => {
                let named = Named {
                    key: letter.to_ascii_lowercase() as u64,
                    key_epoch: 1,
                    tenant: "t".into(),
                    model: "m".into(),
                    shape: String::new(),
                    suspected: letter.is_ascii_uppercase(),
                };
                let offer = Offer {
                    named: Some(named),
                    must_queue: true,
                    ..offer()
                };
                let id = self.core.place(self.now, &offer).unwrap().id;
                self.ids.insert(letter, id);
            }
            "." => self.core.first_byte(self.now, known.unwrap()),
            "!" => {
                self.core.broke_off(self.now, known.unwrap());
            }
            "=" => drop(self.core.end(self.now, known.unwrap(), End::Complete)),
            "?" => drop(self.core.end(self.now, known.unwrap(), End::Cancelled)),
            "-" => drop(self.core.end(self.now, known.unwrap(), End::EngineFailed)),
            other => panic!("{other}"),
        }
    }

    /// `2: a666 b333`: two were on it, and so much is held against each.
    fn death(&mut self) -> String {
        let Some(death) = self.core.untold_death().cloned() else {
            return String::new();
        };
        self.core.told_of(&death);
        let accused = death.accused.iter().map(|(named, share)| {
            let letter = char::from(u8::try_from(named.key).unwrap());
            format!(" {letter}{share}")
        });
        format!("{}:{}", death.in_flight, accused.collect::<String>())
    }
}

fn check(story: &str, expected: &str) {
    let mut told = Story::new();
    told.tell(story);
    assert_eq!(told.death(), expected, "{story}");
    assert_eq!(told.death(), "", "{story}");
}

#[test]
fn what_was_on_it_shares_the_blame() {
    check("a+ a! X", "1: a1000");
    check("a+ b+ a! X", "2: a500 b500");
    check("a+ b+ a. b! X", "2: b666 a333");
}

#[test]
fn whoever_breaks_off_first_does_not_hide_the_others() {
    check("a+ b+ c+ a! a- b! b- c! c- X", "3: a333 b333 c333");
    check("a+ b+ a! a- X b! b-", "2: a500 b500");
}

#[test]
fn what_ends_well_or_is_left_in_between_is_taken_off() {
    check("a+ b+ c+ a! b= c? X", "1: a1000");
    check("a+ b+ a! a- b= c+ X", "1: a1000");
}

#[test]
fn an_engine_that_nothing_broke_off_on_is_not_held_against_anybody() {
    check("a+ X", "");
    check("X", "");
    check("a+ a! a- ~ X", "");
    check("a+ a! a- ~ b+ b! X", "1: b1000");
}

#[test]
fn a_death_that_is_explained_is_held_against_nobody() {
    check("a+ drain a! X", "");
}

#[test]
fn each_of_them_can_be_told_its_share_and_the_death_counts_once() {
    let mut story = Story::new();
    story.tell("a+ b+ a. a! b! X");
    let share = |story: &Story, letter| story.core.share_of(story.ids[&letter]);
    assert_eq!(share(&story, 'a'), Some(333));
    assert_eq!(share(&story, 'b'), Some(666));
    story.tell("b! b- X");
    assert_eq!(story.core.engine_deaths(), 1);
    assert_eq!(share(&story, 'b'), Some(666));
}

#[test]
fn suspects_that_run_well_are_told_once_and_nobody_else_is() {
    let mut story = Story::new();
    story.tell("A+ A. A= b+ b. b= C+ C?");
    assert_eq!(story.core.take_cleared(), [u64::from(b'a')]);
    assert!(story.core.take_cleared().is_empty());
}

/// Who has a slot after the story.
fn running(story: &str, expected: u32) {
    let mut told = Story::new();
    told.tell(story);
    assert_eq!(told.core.running(), expected, "{story}");
}

#[test]
fn a_suspect_is_prefilled_alone() {
    running("a+ b+ c+", 3);
    running("a+ B+", 1);
    running("a+ B+ a.", 2);
    running("A+ b+ c+", 1);
    running("A+ b+ c+ A.", 3);
    running("A+ B+ A= ", 1);
    running("a+ a. b+ b. C+", 3);
}

#[test]
fn a_suspect_whose_first_token_is_not_seen_holds_the_others_up_for_two_seconds() {
    let mut story = Story::new();
    story.tell("A+ b+");
    assert_eq!(story.core.next_deadline(), Some(story.now + ms(2_000)));
    story.core.expire(story.now + ms(1_999));
    assert_eq!(story.core.running(), 1);
    story.core.expire(story.now + ms(2_000));
    assert_eq!(story.core.running(), 2);
}

#[test]
fn who_was_alone_and_suspected_has_more_than_the_whole_death() {
    check("a+ a. B+ B! X", "2: b1500 a333");
}

#[test]
fn an_engine_that_fails_at_once_again_and_again_fills_nothing() {
    let mut story = Story::new();
    for _ in 0..2 * MOST_VICTIMS {
        story.tell("a+ a! a-");
        assert!(story.core.deaths.victims.len() <= MOST_VICTIMS + 8);
    }
    story.tell("b+ b! X");
    assert_eq!(story.core.engine_deaths(), 1);
    assert!(story.core.share_of(story.ids[&'b']).is_some());
}
