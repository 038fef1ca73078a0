//! A worker's load, as its own agent reports it.

use std::time::Duration;

use forebay_proto::ids::IdError;
use forebay_proto::wire::work as wire;
use forebay_proto::{Incarnation, Millis, Revision};

use crate::lineup::Lineup;
use crate::model::{Backlog, Profile, Residuals};

/// Whether a worker takes new placements, by its agent's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Acceptance {
    /// It does.
    Open,
    /// An operator cordoned it.
    Cordoned,
    /// An operator drains it.
    Draining,
    /// Its engine does not answer.
    EngineDown,
    /// It has not got its facts or its engine yet.
    Joining,
}

/// State of one worker at one moment. The newest `seq` of an incarnation wins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Who reports.
    pub incarnation: Incarnation,
    /// Counts up with every change that a report may show.
    pub seq: u64,
    /// Whether it takes placements.
    pub acceptance: Acceptance,
    /// Requests on the engine.
    pub running: u32,
    /// Requests in the agent's own queue.
    pub queued: u32,
    /// Requests that run at once.
    pub slots: u32,
    /// Requests that may wait in the agent's queue.
    pub queue_limit: u32,
    /// Mean time a recent request held its slot; zero: none finished yet.
    pub service: Duration,
    /// Facts the agent has applied.
    pub facts_revision: Revision,
    /// It reports at least this often.
    pub interval: Duration,
    /// What it has before it, in tokens.
    pub backlog: Backlog,
    /// How fast it is, where that is known.
    pub model: Option<Profile>,
    /// How well that predicts.
    pub residuals: Residuals,
}

/// A report that says nothing usable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Who reports is missing.
    #[error(transparent)]
    Id(#[from] IdError),
    /// An acceptance this build does not know.
    #[error("unknown acceptance {0}")]
    Acceptance(i32),
}

impl Load {
    /// Reads a report.
    ///
    /// # Errors
    ///
    /// Returns what is missing or unknown.
    pub fn from_wire(report: &wire::LoadReport) -> Result<Self, LoadError> {
        use wire::Acceptance as Wire;
        let acceptance = match Wire::try_from(report.acceptance) {
            Ok(Wire::Open) => Acceptance::Open,
            Ok(Wire::Cordoned) => Acceptance::Cordoned,
            Ok(Wire::Draining) => Acceptance::Draining,
            Ok(Wire::EngineDown) => Acceptance::EngineDown,
            Ok(Wire::Joining) => Acceptance::Joining,
            Ok(Wire::Unspecified) | Err(_) => {
                return Err(LoadError::Acceptance(report.acceptance));
            }
        };
        Ok(Self {
            incarnation: Incarnation::from_wire(report.incarnation.as_ref())?,
            seq: report.seq,
            acceptance,
            running: report.running,
            queued: report.queued,
            slots: report.slots,
            queue_limit: report.queue_limit,
            service: Duration::from_millis(report.service_ms.into()),
            facts_revision: Revision(report.facts_revision),
            interval: Duration::from_millis(report.interval_ms.into()),
            backlog: Backlog {
                pending_tokens: report.pending_tokens as f64,
                pending_pairs: report.pending_pairs as f64,
                decodes: report.decodes.into(),
                context_tokens: report.context_tokens as f64,
                lineup: Lineup::from_wire(&report.lineup_ms),
            },
            model: report.model.as_ref().and_then(Profile::from_wire),
            residuals: Residuals::from_wire(report.ttft_p50, report.ttft_p95),
        })
    }

    /// The report for the wire.
    #[must_use]
    pub fn to_wire(&self) -> wire::LoadReport {
        let acceptance = match self.acceptance {
            Acceptance::Open => wire::Acceptance::Open,
            Acceptance::Cordoned => wire::Acceptance::Cordoned,
            Acceptance::Draining => wire::Acceptance::Draining,
            Acceptance::EngineDown => wire::Acceptance::EngineDown,
            Acceptance::Joining => wire::Acceptance::Joining,
        };
        wire::LoadReport {
            incarnation: Some(self.incarnation.to_wire()),
            seq: self.seq,
            acceptance: acceptance.into(),
            running: self.running,
            queued: self.queued,
            slots: self.slots,
            queue_limit: self.queue_limit,
            service_ms: Millis::from_duration(self.service).wire(),
            facts_revision: self.facts_revision.0,
            interval_ms: Millis::from_duration(self.interval).wire(),
            pending_tokens: whole(self.backlog.pending_tokens),
            pending_pairs: whole(self.backlog.pending_pairs),
            decodes: u32::try_from(whole(self.backlog.decodes)).unwrap_or(u32::MAX),
            context_tokens: whole(self.backlog.context_tokens),
            model: self.model.map(|model| model.to_wire()),
            ttft_p50: Some(short(self.residuals.ttft_p50)),
            ttft_p95: Some(short(self.residuals.ttft_p95)),
            lineup_ms: self.backlog.lineup.to_wire(),
        }
    }
}

#[allow(clippy::cast_possible_truncation)] // seven digits are more than is known
const fn short(value: f64) -> f32 {
    value as f32
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates, as it should
fn whole(value: f64) -> u64 {
    value.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_well_a_model_predicts_survives_the_wire_and_nonsense_does_not() {
        let read = |p50, p95| Residuals::from_wire(p50, p95);
        let told = read(Some(1.5), Some(2.0));
        assert_eq!((told.ttft_p50, told.ttft_p95), (1.5, 2.0));
        for (p50, p95) in [
            (None, None),
            (Some(1.0), None),
            (Some(f32::NAN), Some(1.0)),
            (Some(1.0), Some(f32::INFINITY)),
            (Some(0.0), Some(1.0)),
            (Some(-1.0), Some(1.0)),
            (Some(2.0), Some(1.0)),
        ] {
            assert_eq!(read(p50, p95), Residuals::default(), "{p50:?} {p95:?}");
        }
    }
}
