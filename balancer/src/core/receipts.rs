//! The receipts of the last decisions, kept for whoever wants to see or replay them.
//!
//! None are kept unless asked for: to explain a decision takes up to 2.5 times as long as to make it,
//! and up to 15 kB. Only those
//! by which a request was placed are kept; what waits is tried again with every change of the fleet,
//! and would push all else out. Neither text nor keys are in them.

use std::collections::VecDeque;
use std::sync::Arc;

use forebay_scheduler::Receipt;

/// One decision by which a request was placed.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Counts what was kept since the start: a gap between two readings shows.
    pub(crate) number: u64,
    pub(crate) request_id: Arc<str>,
    pub(crate) receipt: Receipt,
}

/// The last so many decisions; each further one takes the oldest one's place.
#[derive(Debug)]
pub(crate) struct Receipts {
    most: usize,
    newest: u64,
    kept: VecDeque<Arc<Kept>>,
}

impl Receipts {
    /// Keeps at most so many; with 0 nothing is to be explained.
    pub(crate) const fn new(most: usize) -> Self {
        Self {
            most,
            newest: 0,
            kept: VecDeque::new(),
        }
    }

    pub(crate) const fn are_kept(&self) -> bool {
        self.most > 0
    }

    pub(crate) fn keep(&mut self, request_id: &Arc<str>, receipt: Receipt) {
        if self.most == 0 {
            return;
        }
        if self.kept.len() >= self.most {
            self.kept.pop_front();
        }
        self.newest += 1;
        self.kept.push_back(Arc::new(Kept {
            number: self.newest,
            request_id: request_id.clone(),
            receipt,
        }));
    }

    /// All that are kept, newest last.
    pub(crate) fn all(&self) -> Vec<Arc<Kept>> {
        self.kept.iter().cloned().collect()
    }
}
