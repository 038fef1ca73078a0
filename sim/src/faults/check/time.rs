//! Cell time never goes back, and never runs ahead of the clocks that drive it (I8).

use std::collections::BTreeMap;

use forebay_proto::Millis;

use super::super::host::{Batch, WALL_CLOCK};
use super::{Held, Violation};

const NAME: &str = "cell-time";

#[derive(Default)]
pub(crate) struct CellTime {
    /// By index.
    times: BTreeMap<u64, u64>,
    /// What clocks jumped ahead in all.
    jumped_ms: u64,
}

impl CellTime {
    pub(crate) fn jumped(&mut self, by_ms: u64) {
        self.jumped_ms += by_ms;
    }

    pub(crate) fn batch(&mut self, batch: &Batch, now_us: u64) -> Held {
        let time = batch.cell_time.0;
        let before = self.times.range(..batch.applied).next_back();
        if let Some((index, before)) = before
            && *before > time
        {
            let detail = format!("{before} at index {index}, {time} at {}", batch.applied);
            return Err(Violation::new(NAME, detail));
        }
        self.times.insert(batch.applied, time);
        let Millis(start) = WALL_CLOCK;
        let most = start + now_us / 1_000 * 102 / 100 + self.jumped_ms + 1_000;
        if time > most {
            let detail = format!("{time} at index {}, at most {most} passed", batch.applied);
            return Err(Violation::new(NAME, detail));
        }
        Ok(())
    }
}
