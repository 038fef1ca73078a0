//! A command takes effect at most once, however often it is sent (I6).

use std::collections::BTreeMap;

use forebay_proto::wire::fleet as wire;

use super::{Held, Violation};

#[derive(Default)]
pub(crate) struct Once {
    /// By reason, which is unique for each command: where it was applied.
    applied: BTreeMap<String, u64>,
}

impl Once {
    pub(crate) fn audited(&mut self, entry: &wire::AuditEntry) -> Held {
        if !entry.reason.contains('#') {
            return Ok(());
        }
        let first = *self
            .applied
            .entry(entry.reason.clone())
            .or_insert(entry.index);
        if first == entry.index {
            return Ok(());
        }
        let detail = format!(
            "{} ({} {}) was applied at {first} and at {}",
            entry.reason, entry.action, entry.target, entry.index
        );
        Err(Violation::new("exactly-once", detail))
    }
}
