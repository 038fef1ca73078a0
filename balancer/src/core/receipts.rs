//! The receipts of the last decisions, kept for whoever wants to see or replay them.
//!
//! To explain a decision takes up to 2.5 times as long as to make it, which is still microseconds. Only
//! those by which a request was placed are kept; what waits is tried again with every change of the
//! fleet, and would push all else out. Neither text nor keys are in them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};

use forebay_proto::{Incarnation, Millis, WorkerId};
use forebay_scheduler::{Outcome, Packed, Receipt};
use serde_json::{Value, json};

/// What all kept receipts may take, in bytes; beyond it the oldest go, however few were asked for.
pub(crate) const MOST_BYTES: usize = 256 << 20;

/// What one takes beside its packed form and its id: the entry, counts of references, the allocator's own.
const OVERHEAD_BYTES: usize = 192;

/// Receipts in one answer.
pub(crate) const MOST_SHOWN: usize = 1_000;

/// Looked through under one lock: some tens of microseconds.
const BLOCK: usize = 4_096;

/// One decision by which a request was placed.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Counts what was kept since the start: a gap between two readings shows.
    pub(crate) number: u64,
    pub(crate) request_id: Arc<str>,
    /// Wall clock time of the decision.
    pub(crate) at: Millis,
    pub(crate) packed: Packed,
    chosen: Option<Incarnation>,
    ended: OnceLock<&'static str>,
}

impl Kept {
    /// What became of the placement; what is said first holds.
    pub(crate) fn end(&self, how: &'static str) {
        let _ = self.ended.set(how);
    }

    /// None: it is under way, or its client left.
    pub(crate) fn ended(&self) -> Option<&'static str> {
        self.ended.get().copied()
    }

    fn bytes(&self) -> usize {
        self.packed.len() + self.request_id.len() + OVERHEAD_BYTES
    }
}

/// The last so many decisions; each further one takes the oldest ones' place.
#[derive(Debug)]
pub(crate) struct Receipts {
    most: usize,
    most_bytes: usize,
    bytes: usize,
    newest: u64,
    kept: VecDeque<Arc<Kept>>,
}

impl Receipts {
    /// Keeps at most so many; with 0 nothing is kept.
    pub(crate) const fn new(most: usize, most_bytes: usize) -> Self {
        Self {
            most,
            most_bytes,
            bytes: 0,
            newest: 0,
            kept: VecDeque::new(),
        }
    }

    pub(crate) fn keep(
        &mut self,
        request_id: &Arc<str>,
        at: Millis,
        (outcome, packed): (Outcome, Packed),
    ) -> Option<Arc<Kept>> {
        if self.most == 0 {
            return None;
        }
        self.newest += 1;
        let kept = Arc::new(Kept {
            number: self.newest,
            request_id: request_id.clone(),
            at,
            packed,
            chosen: match outcome {
                Outcome::Chosen(incarnation) => Some(incarnation),
                Outcome::Nobody(_) => None,
            },
            ended: OnceLock::new(),
        });
        self.bytes += kept.bytes();
        self.kept.push_back(kept.clone());
        while self.kept.len() > self.most || (self.bytes > self.most_bytes && self.kept.len() > 1) {
            let oldest = self.kept.pop_front().expect("there are more than one");
            self.bytes -= oldest.bytes();
        }
        Some(kept)
    }

    /// How many there are, and what they take in bytes.
    #[cfg(test)]
    fn size(&self) -> (usize, usize) {
        (self.kept.len(), self.bytes)
    }

    /// Up to [`BLOCK`] of those before number `below`, the newest first.
    fn block(&self, below: u64) -> Vec<Arc<Kept>> {
        let first = self.kept.front().map_or(0, |kept| kept.number);
        let end = usize::try_from(below.saturating_sub(first)).unwrap_or(usize::MAX);
        let end = end.min(self.kept.len());
        let block = self.kept.range(end.saturating_sub(BLOCK)..end);
        block.rev().cloned().collect()
    }
}

/// Which receipts somebody wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Of this request only.
    pub(crate) request: Option<String>,
    /// Of placements on this worker only, by its name.
    pub(crate) worker: Option<String>,
    /// The newest so many of them.
    pub(crate) last: usize,
}

impl Wanted {
    /// Reads the query of a page's address.
    ///
    /// # Errors
    ///
    /// Says which part of it is not understood.
    pub(crate) fn parse(query: &str) -> Result<Self, String> {
        let mut wanted = Self {
            request: None,
            worker: None,
            last: MOST_SHOWN,
        };
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            if value.is_empty() || !value.bytes().all(plain) {
                return Err(format!(
                    "{key} has no value of letters, digits, `.`, `_` and `-`"
                ));
            }
            match key {
                "request" => wanted.request = Some(value.to_owned()),
                "worker" => wanted.worker = Some(value.to_owned()),
                "last" => {
                    let last = value
                        .parse()
                        .ok()
                        .filter(|last| (1..=MOST_SHOWN).contains(last));
                    let wrong = || format!("last is a number from 1 to {MOST_SHOWN}");
                    wanted.last = last.ok_or_else(wrong)?;
                }
                _ => return Err("there are request, worker and last".to_owned()),
            }
        }
        Ok(wanted)
    }

    /// Looks for them, newest last. `receipts` is called for each part of the ring, so that nobody who
    /// keeps one waits for all to be looked through; `is` says whether an incarnation is the worker's.
    pub(crate) fn find(
        &self,
        mut receipts: impl FnMut(&mut dyn FnMut(&Receipts)),
        is: impl Fn(Incarnation) -> bool,
    ) -> Vec<Arc<Kept>> {
        let (mut found, mut below) = (VecDeque::new(), u64::MAX);
        loop {
            let mut block = Vec::new();
            receipts(&mut |receipts| block = receipts.block(below));
            let Some(oldest) = block.last() else {
                break;
            };
            below = oldest.number;
            for kept in block {
                let request = self.request.as_deref();
                let asked = request.is_none_or(|request| *request == *kept.request_id);
                if asked && (self.worker.is_none() || kept.chosen.is_some_and(&is)) {
                    found.push_front(kept);
                    if found.len() == self.last {
                        return found.into();
                    }
                }
            }
        }
        found.into()
    }
}

/// A receipt as it is shown, with the names of the workers that it speaks of.
pub(crate) fn shown(kept: &Kept, receipt: &Receipt, names: &BTreeMap<WorkerId, String>) -> Value {
    json!({
        "number": kept.number,
        "request_id": &*kept.request_id,
        "at_ms": kept.at.0,
        "ended": kept.ended(),
        "workers": named(receipt, names),
        "receipt": receipt,
    })
}

/// Names by id, of the workers that a receipt speaks of.
pub(crate) fn named(receipt: &Receipt, names: &BTreeMap<WorkerId, String>) -> Value {
    let considered = receipt.considered.iter().map(|one| one.incarnation.worker);
    let drawn = receipt.drawn.iter().map(|(drawn, _)| drawn.worker);
    let tried = receipt.asked.tried.iter().copied();
    let named = considered.chain(drawn).chain(tried).filter_map(|id| {
        let name = names.get(&id)?;
        Some((id.0.to_string(), Value::from(name.as_str())))
    });
    named.collect::<serde_json::Map<_, _>>().into()
}

#[cfg(test)]
#[path = "receipts_tests.rs"]
mod tests;
