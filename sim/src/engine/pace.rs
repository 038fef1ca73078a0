//! When the emulated engine says each token, and who has to wait for a slot.
//!
//! A deliberately small model: a request's first token comes a base time plus its prefill after it
//! starts, the others at a fixed interval, and running requests do not slow each other down. Beyond
//! the slots requests wait in arrival order; beyond the queue they are refused.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

/// How fast the engine is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// From start to first token of an empty prompt.
    pub ttft: Duration,
    /// Prompt tokens that are prefilled in a second.
    pub prefill_tokens_per_s: f64,
    /// From token to token.
    pub tpot: Duration,
    /// Divides every time above.
    pub speed: f64,
}

impl Pace {
    /// From the start of a request to its `index`th token, from 0.
    ///
    /// Computed from the start each time, so that rounding does not add up.
    #[must_use]
    pub fn due(&self, prompt_tokens: u64, index: u64) -> Duration {
        let prefill = prompt_tokens as f64 / self.prefill_tokens_per_s;
        let decode = self.tpot.as_secs_f64() * index as f64;
        let real = self.ttft.as_secs_f64() + prefill + decode;
        Duration::try_from_secs_f64(real / self.speed)
            .unwrap_or(FOREVER)
            .min(FOREVER)
    }
}

const FOREVER: Duration = Duration::from_secs(366 * 24 * 3600);

/// Names a request in the [`Line`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(u64);

/// What became of an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It runs.
    Runs(Ticket),
    /// It waits for a slot.
    Waits(Ticket),
    /// The queue is full.
    Refused,
}

/// Who runs and who waits, first come, first served.
#[derive(Debug)]
pub struct Line {
    slots: usize,
    queue: usize,
    running: HashSet<Ticket>,
    waiting: VecDeque<Ticket>,
    next: u64,
}

impl Line {
    /// `slots` may run and `queue` more may wait.
    #[must_use]
    pub fn new(slots: usize, queue: usize) -> Line {
        Line {
            slots,
            queue,
            running: HashSet::new(),
            waiting: VecDeque::new(),
            next: 0,
        }
    }

    /// A request arrives.
    pub fn arrive(&mut self) -> Arrival {
        let ticket = Ticket(self.next);
        if self.running.len() < self.slots {
            self.next += 1;
            self.running.insert(ticket);
            Arrival::Runs(ticket)
        } else if self.waiting.len() < self.queue {
            self.next += 1;
            self.waiting.push_back(ticket);
            Arrival::Waits(ticket)
        } else {
            Arrival::Refused
        }
    }

    /// A request is done or gone, running or not; returns the one that runs in its place.
    pub fn leave(&mut self, ticket: Ticket) -> Option<Ticket> {
        if !self.running.remove(&ticket) {
            self.waiting.retain(|waiting| *waiting != ticket);
            return None;
        }
        let next = self.waiting.pop_front()?;
        self.running.insert(next);
        Some(next)
    }

    /// How many run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// How many wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pace(speed: f64) -> Pace {
        let ms = Duration::from_millis;
        Pace {
            ttft: ms(20),
            prefill_tokens_per_s: 10_000.0,
            tpot: ms(10),
            speed,
        }
    }

    #[test]
    fn a_token_is_due_by_its_place_alone() {
        let ms = Duration::from_millis;
        assert_eq!(pace(1.0).due(0, 0), ms(20));
        assert_eq!(pace(1.0).due(1000, 0), ms(120));
        assert_eq!(pace(1.0).due(1000, 100), ms(1120));
        assert_eq!(pace(10.0).due(1000, 100), ms(112));
        assert_eq!(pace(1e-300).due(1000, 100), FOREVER);
    }

    #[test]
    fn a_slot_goes_to_who_waited_longest() {
        let mut line = Line::new(1, 2);
        let Arrival::Runs(first) = line.arrive() else {
            panic!()
        };
        let Arrival::Waits(second) = line.arrive() else {
            panic!()
        };
        let Arrival::Waits(third) = line.arrive() else {
            panic!()
        };
        assert_eq!(line.arrive(), Arrival::Refused);
        assert_eq!(line.leave(second), None);
        assert_eq!((line.running(), line.waiting()), (1, 1));
        assert_eq!(line.leave(first), Some(third));
        assert_eq!(line.leave(first), None, "leaving twice changes nothing");
        assert_eq!(line.leave(third), None);
        assert_eq!((line.running(), line.waiting()), (0, 0));
    }

    proptest! {
        #[test]
        fn slots_are_never_exceeded_nor_idle(moves in proptest::collection::vec(0_usize..8, 0..200)) {
            let mut line = Line::new(3, 4);
            let mut present = Vec::new();
            for step in moves {
                if step < 4 {
                    match line.arrive() {
                        Arrival::Runs(ticket) | Arrival::Waits(ticket) => present.push(ticket),
                        Arrival::Refused => prop_assert_eq!(present.len(), 7),
                    }
                } else if !present.is_empty() {
                    line.leave(present.remove(step % present.len()));
                }
                prop_assert_eq!(line.running(), present.len().min(3));
                prop_assert_eq!(line.running() + line.waiting(), present.len());
            }
        }
    }
}
