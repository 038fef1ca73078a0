//! Every node applies the same entries in the same order with the same results, once each, and none
//! goes back (I2, I3, I4): committed is for ever.

use std::collections::BTreeMap;

use forebay_proto::NodeId;
use prost::Message as _;

use super::super::host::Batch;
use super::{Held, Violation};

const NAME: &str = "agreement";

#[derive(Default)]
pub(crate) struct Agreement {
    /// By index: the term, and a checksum of what came of it.
    entries: BTreeMap<u64, (u64, u32)>,
    /// By index: a checksum of the facts after it.
    facts: BTreeMap<u64, u32>,
    /// By index: the hash of the whole state.
    states: BTreeMap<u64, [u8; 32]>,
    /// By node: what its process has applied.
    applied: BTreeMap<NodeId, u64>,
}

/// What this batch shows for the first time.
pub(crate) struct News {
    /// Positions in the batch's outputs.
    pub(crate) outputs: Vec<usize>,
}

impl Agreement {
    /// A process began: it applies again from its snapshot on.
    pub(crate) fn started(&mut self, node: NodeId) {
        self.applied.remove(&node);
    }

    /// A batch was applied.
    pub(crate) fn batch(&mut self, node: NodeId, batch: &Batch) -> Result<News, Violation> {
        let before = self.applied.insert(node, batch.applied).unwrap_or(0);
        if batch.applied < before {
            let detail = format!("{node} went from index {before} back to {}", batch.applied);
            return Err(Violation::new(NAME, detail));
        }
        let mut last = before;
        let mut news = News { outputs: vec![] };
        for (position, (index, term, applied)) in batch.outputs.iter().enumerate() {
            if *index <= last && before > 0 {
                let detail = format!("{node} applied index {index} after {last}");
                return Err(Violation::new(NAME, detail));
            }
            last = *index;
            let mut bytes = applied.outcome.encode_to_vec();
            if let Some(delta) = &applied.delta {
                bytes.extend(delta.encode_to_vec());
            }
            let seen = (*term, crc32c::crc32c(&bytes));
            match self.entries.get(index) {
                None => {
                    self.entries.insert(*index, seen);
                    news.outputs.push(position);
                }
                Some(first) if *first == seen => {}
                Some(first) => {
                    let detail = format!(
                        "{node} applied another entry at {index} than others: {seen:?}, not {first:?}"
                    );
                    return Err(Violation::new(NAME, detail));
                }
            }
        }
        let facts = crc32c::crc32c(&batch.facts.encode_to_vec());
        same(&mut self.facts, node, batch.applied, facts, "facts")?;
        if let Some(hash) = batch.state_hash {
            same(&mut self.states, node, batch.applied, hash, "state")?;
        }
        Ok(news)
    }

    /// The newest index with an earlier term that anyone has applied.
    pub(crate) fn newest_before(&self, term: u64) -> u64 {
        let mut before = self.entries.iter().rev();
        before
            .find(|(_, (of, _))| *of < term)
            .map_or(0, |(index, _)| *index)
    }
}

fn same<T: PartialEq>(
    known: &mut BTreeMap<u64, T>,
    node: NodeId,
    index: u64,
    here: T,
    what: &str,
) -> Held {
    match known.get(&index) {
        Some(there) if *there != here => {
            let detail = format!("{node} has another {what} at index {index} than others");
            Err(Violation::new(NAME, detail))
        }
        Some(_) => Ok(()),
        None => {
            known.insert(index, here);
            Ok(())
        }
    }
}
