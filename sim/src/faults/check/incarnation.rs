//! A worker's incarnation only rises (I9): an older start never takes the place of a newer one.

use std::collections::BTreeMap;

use forebay_proto::Incarnation;
use forebay_proto::wire::fleet as wire;
use wire::change::Change;

use super::{Held, Violation};

#[derive(Default)]
pub(crate) struct Incarnations {
    newest: BTreeMap<u32, Incarnation>,
}

impl Incarnations {
    /// A delta that was agreed on, in order.
    pub(crate) fn delta(&mut self, delta: &wire::Delta) -> Held {
        for change in &delta.changes {
            let Some(Change::WorkerPut(worker)) = &change.change else {
                continue;
            };
            let Ok(incarnation) = Incarnation::from_wire(worker.incarnation.as_ref()) else {
                continue;
            };
            let newest = self.newest.entry(worker.id).or_insert(incarnation);
            if incarnation < *newest {
                let detail = format!(
                    "{} went from {newest} back to {incarnation} at {}",
                    worker.name, delta.revision
                );
                return Err(Violation::new("incarnations-rise", detail));
            }
            *newest = incarnation;
        }
        Ok(())
    }
}
