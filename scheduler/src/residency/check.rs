//! Whether predictions of cached tokens come true.

use std::collections::VecDeque;

use super::Grade;

/// Answers that are looked back at.
const WINDOW: usize = 100;
/// So many predictions of too much, of a full window, are too many.
const TOO_MANY: usize = 5;
/// Back to the better grade at no more than these.
const FEW: usize = 2;
/// Answers in a row without a count of cached tokens.
const SILENT: u32 = 20;

/// What a look at the newest answers says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing changed.
    Same,
    /// Predictions are good again.
    Restored,
    /// The engine had less than was predicted, too often.
    Overpredicted,
    /// The engine does not say how much it had.
    Silent,
}

/// Watches one worker's predictions. See [`SelfCheck::observe`].
#[derive(Clone, Debug)]
pub struct SelfCheck {
    recent: VecDeque<bool>,
    silent: u32,
    grade: Grade,
    predicted: u64,
    reported: u64,
}

impl Default for SelfCheck {
    fn default() -> Self {
        Self {
            recent: VecDeque::with_capacity(WINDOW),
            silent: 0,
            grade: Grade::Inferred,
            predicted: 0,
            reported: 0,
        }
    }
}

impl SelfCheck {
    /// The grade that the predictions have earned.
    #[must_use]
    pub const fn grade(&self) -> Grade {
        self.grade
    }

    /// What is believed before the first answer; says whether it is news. Once an answer came, answers tell.
    pub fn expect(&mut self, first: Grade) -> bool {
        let news = self.grade != first && self.recent.is_empty() && self.silent == 0;
        if news {
            self.grade = first;
        }
        news
    }

    /// Tokens predicted and reported so far, over the answers that reported.
    #[must_use]
    pub const fn totals(&self) -> (u64, u64) {
        (self.predicted, self.reported)
    }

    /// An answer ended: so much of its prompt was predicted to be cached, and so much was, if the
    /// engine says. Predictions may be `tolerance` above.
    pub fn observe(&mut self, predicted: u32, reported: Option<u32>, tolerance: u32) -> Verdict {
        let Some(reported) = reported else {
            self.silent = self.silent.saturating_add(1);
            if self.silent >= SILENT && self.grade != Grade::Blind {
                self.grade = Grade::Blind;
                return Verdict::Silent;
            }
            return Verdict::Same;
        };
        self.silent = 0;
        self.predicted += u64::from(predicted);
        self.reported += u64::from(reported);
        if self.recent.len() >= WINDOW {
            self.recent.pop_front();
        }
        self.recent
            .push_back(predicted > reported.saturating_add(tolerance));
        let wrong = self.recent.iter().filter(|wrong| **wrong).count();
        match self.grade {
            Grade::Blind if wrong <= FEW && self.recent.len() >= SILENT as usize => {
                self.grade = Grade::Inferred;
                Verdict::Restored
            }
            Grade::Inferred | Grade::Exact if wrong > TOO_MANY && self.recent.len() >= WINDOW => {
                self.grade = Grade::Blind;
                Verdict::Overpredicted
            }
            _ => Verdict::Same,
        }
    }

    /// The cache was lost: what was predicted of it says nothing of the new one.
    pub fn reset(&mut self) {
        self.recent.clear();
        self.silent = 0;
    }
}
