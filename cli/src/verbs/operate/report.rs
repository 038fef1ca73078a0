//! A drain as a result: for people in a line, for programs as a document.

use forebay_proto::{Drain, DrainPhase, Millis};
use serde::Serialize;

use super::listed;

/// A drain as a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Report {
    schema_version: u32,
    pub(super) id: String,
    /// committed, in_force, drained, cancelled, or overdue: its deadline passed and something runs.
    pub(super) state: &'static str,
    /// From the command to the last agent's word that it refuses what is new, in cell time.
    pub(super) in_force_ms: Option<u64>,
    /// From the command to the last agent's word that nothing runs.
    pub(super) drained_ms: Option<u64>,
    deadline_ms: Option<u64>,
    on_deadline: &'static str,
    overdue: bool,
    pub(super) actor: String,
    pub(super) reason: String,
    pub(super) workers: Vec<WorkerReport>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct WorkerReport {
    name: String,
    in_force_ms: Option<u64>,
    pub(super) drained_ms: Option<u64>,
}

impl Report {
    pub(super) fn of(drain: &Drain) -> Self {
        let after = |time: Option<Millis>| time.map(|time| time.0.saturating_sub(drain.began.0));
        let state = match drain.phase {
            DrainPhase::Committed | DrainPhase::InForce if drain.overdue => "overdue",
            phase => phase.name(),
        };
        let drained = drain.ended.filter(|_| drain.phase == DrainPhase::Drained);
        Self {
            schema_version: 1,
            id: drain.id.to_string(),
            state,
            in_force_ms: after(drain.in_force),
            drained_ms: after(drained),
            deadline_ms: after(drain.deadline),
            on_deadline: drain.on_deadline.name(),
            overdue: drain.overdue,
            actor: drain.actor.clone(),
            reason: drain.reason.clone(),
            workers: drain
                .workers
                .iter()
                .map(|worker| WorkerReport {
                    name: worker.name.clone(),
                    in_force_ms: after(worker.in_force),
                    drained_ms: after(worker.drained),
                })
                .collect(),
        }
    }

    /// Its workers, such as `d812 in_force: w1, w2`.
    fn line(&self) -> String {
        let names: Vec<String> = self.workers.iter().map(|one| one.name.clone()).collect();
        format!("{} {}: {}", self.id, self.state, listed(&names))
    }

    pub(super) fn page(&self) -> String {
        let ms = |what: &str, ms: Option<u64>| {
            ms.map_or_else(String::new, |ms| format!(", {what} after {ms} ms"))
        };
        let in_force = ms("in force", self.in_force_ms);
        let drained = ms("drained", self.drained_ms);
        format!("{}{in_force}{drained}", self.line())
    }
}

/// A drain in a line.
pub(crate) fn drain_line(drain: &Drain) -> String {
    Report::of(drain).line()
}
