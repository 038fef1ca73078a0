//! The audit is one unbroken chain, the same on all nodes (I22).

use std::collections::BTreeMap;

use forebay_consensus::fleet::audit::verify;

use super::super::host::Batch;
use super::{Held, Violation};

const NAME: &str = "audit-chain";

#[derive(Default)]
pub(crate) struct Audit {
    /// The head after so many entries.
    heads: BTreeMap<u64, [u8; 32]>,
}

impl Audit {
    pub(crate) fn batch(&mut self, batch: &Batch) -> Held {
        let (count, head) = (batch.audit_count, batch.audit_head);
        let known = *self.heads.entry(count).or_insert(head);
        if known != head {
            let detail = format!("two chains of {count} entries");
            return Err(Violation::new(NAME, detail));
        }
        if batch.audit.is_empty() {
            return Ok(());
        }
        verify(&batch.audit, &head).map_err(|broken| Violation::new(NAME, broken.to_string()))
    }
}
