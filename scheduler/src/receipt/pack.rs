//! Receipts in few bytes, so that a balancer can keep the last hundred thousand of them in memory.
//!
//! What follows from the rest is left out and made again: predictions, scores, feasibility. A number of
//! 64 bits takes as many bytes as it has up to its last one that is not zero. This form lives in one
//! process only; on the wire and in files a receipt is JSON.

mod read;
mod write;

use super::Receipt;
use crate::policy;
use read::Reader;
use write::Writer;

/// A receipt that takes little room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed(Box<[u8]>);

impl Packed {
    /// How much room it takes, in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing in it, which no receipt is.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The receipt as it was; `None`: it is of a policy that this version does not have.
    #[must_use]
    pub fn receipt(&self) -> Option<Receipt> {
        let mut receipt = Reader(&self.0).receipt()?;
        receipt.predict()?;
        Some(receipt)
    }
}

impl Receipt {
    /// Takes little room.
    #[must_use]
    pub fn packed(&self) -> Packed {
        let mut writer = Writer(Vec::with_capacity(256 + 128 * self.considered.len()));
        writer.receipt(self);
        Packed(writer.0.into_boxed_slice())
    }

    /// Fills in what follows from the rest.
    fn predict(&mut self) -> Option<()> {
        let policy = policy::named(&self.policy)?;
        let request = self.asked.request();
        let targets = request.targets;
        let mut scores = Vec::with_capacity(self.considered.len());
        for one in &mut self.considered {
            one.candidate.predict(&request);
            one.feasible = one.candidate.terms.feasible(&targets);
        }
        let candidates: Vec<_> = self.considered.iter().map(|one| one.candidate).collect();
        policy.scores(&request, &candidates, &self.field(), &mut scores);
        for (one, score) in self.considered.iter_mut().zip(scores) {
            one.score = score;
        }
        Some(())
    }
}

const CHOSEN: u8 = 0;
const UNKNOWN_MODEL: u8 = 1;
const NO_CAPACITY: u8 = 2;
const BUSY: u8 = 3;
