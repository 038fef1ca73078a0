//! When a request is placed again: three counters, so that a fault cannot become a storm.
//!
//! *Refused before start*: free, but the number is limited, and after a few the worker has to queue
//! it. *Failed before the first byte*: engine time was spent, so a pool's budget pays. *Recovery
//! after a worker's death*: once a request, since deaths come with many victims at once and none of
//! them is at fault. After the first byte nothing is placed again.

use std::collections::VecDeque;

/// Placements of one request, whatever happens to them.
pub(crate) const MAX_PLACEMENTS: u32 = 64;

/// Retries that a budget pays for one request.
const MAX_PAID: u32 = 2;

/// What became of a placement that did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The agent did not take it, or its engine was never asked.
    NotStarted,
    /// The engine or the agent failed while it had the request.
    Failed,
    /// The worker is gone.
    WorkerLost,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Place it again; the worker has to queue it if it is full.
    Again { must_queue: bool },
    /// Tell the client.
    GiveUp,
}

/// The counters of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attempts {
    refused: u32,
    paid: u32,
    recovered: u32,
}

impl Attempts {
    /// Placements before the next one.
    pub(crate) const fn number(self) -> u32 {
        self.refused + self.paid + self.recovered
    }

    /// Decides what follows a failure before the first byte.
    pub(crate) fn after(
        &mut self,
        failure: Failure,
        max_refusals: u32,
        budget: &mut Budget,
    ) -> Next {
        if self.number() + 1 >= MAX_PLACEMENTS {
            return Next::GiveUp;
        }
        match failure {
            Failure::NotStarted => self.refused += 1,
            Failure::WorkerLost if self.recovered == 0 => self.recovered += 1,
            Failure::WorkerLost | Failure::Failed => {
                if self.paid >= MAX_PAID || !budget.pay() {
                    return Next::GiveUp;
                }
                self.paid += 1;
            }
        }
        Next::Again {
            must_queue: self.refused >= max_refusals,
        }
    }
}

/// What one pool may spend on retries: three, and one for every ten requests admitted in the last
/// two windows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Admitted and spent, per window; the last is the current one.
    windows: VecDeque<(u64, u64)>,
}

const WINDOWS: usize = 2;
const RESERVE: u64 = 3;
const REQUESTS_A_RETRY: u64 = 10;

impl Budget {
    /// Counts one request.
    pub(crate) fn admit(&mut self) {
        self.current().0 += 1;
    }

    /// Begins a new window; older ones than the last are forgotten.
    pub(crate) fn turn(&mut self) {
        self.windows.push_back((0, 0));
        while self.windows.len() > WINDOWS {
            self.windows.pop_front();
        }
    }

    fn pay(&mut self) -> bool {
        let (admitted, spent) = self
            .windows
            .iter()
            .fold((0, 0), |(a, s), (admitted, spent)| {
                (a + admitted, s + spent)
            });
        let affordable = spent < RESERVE + admitted / REQUESTS_A_RETRY;
        if affordable {
            self.current().1 += 1;
        }
        affordable
    }

    fn current(&mut self) -> &mut (u64, u64) {
        if self.windows.is_empty() {
            self.windows.push_back((0, 0));
        }
        self.windows.back_mut().expect("one was just pushed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a row of letters (n: not started, f: failed, l: worker lost) and writes what follows each
    /// (a: again, q: again, to be queued, x: give up).
    fn run(failures: &str, max_refusals: u32, budget: &mut Budget) -> String {
        let mut attempts = Attempts::default();
        failures
            .chars()
            .map(|letter| {
                let failure = match letter {
                    'n' => Failure::NotStarted,
                    'f' => Failure::Failed,
                    'l' => Failure::WorkerLost,
                    other => panic!("{other}"),
                };
                match attempts.after(failure, max_refusals, budget) {
                    Next::Again { must_queue: false } => 'a',
                    Next::Again { must_queue: true } => 'q',
                    Next::GiveUp => 'x',
                }
            })
            .collect()
    }

    fn check(failures: &str, max_refusals: u32, expected: &str) {
        assert_eq!(
            run(failures, max_refusals, &mut Budget::default()),
            expected,
            "{failures} with {max_refusals}"
        );
    }

    #[test]
    fn refusals_are_free_until_the_worker_has_to_queue_it() {
        check("nnnn", 2, "aqqq");
        check("n", 0, "q");
        check("nnn", 8, "aaa");
    }

    #[test]
    fn failures_are_paid_twice_at_most_and_a_death_is_recovered_from_once() {
        check("fff", 2, "aax");
        check("l", 2, "a");
        check("lfff", 2, "aaax");
        check("lll", 2, "aaa");
        check("llll", 2, "aaax");
        check("nfl", 2, "aaa");
    }

    #[test]
    fn placements_are_bounded_whatever_happens() {
        let told = run(&"n".repeat(70), 2, &mut Budget::default());
        assert_eq!(told.find('x'), Some(MAX_PLACEMENTS as usize - 1));
    }

    #[test]
    fn a_pool_pays_three_and_a_tenth_of_what_it_admits() {
        let mut budget = Budget::default();
        let paid = |budget: &mut Budget| (0..1_000).filter(|_| budget.pay()).count();
        assert_eq!(paid(&mut budget), 3);
        (0..100).for_each(|_| budget.admit());
        assert_eq!(paid(&mut budget), 10);
        budget.turn();
        assert_eq!(paid(&mut budget), 0);
        budget.turn();
        assert_eq!(paid(&mut budget), 3);
    }
}
