//! What must hold, one invariant a file. Each sees what happens and says what broke.

mod acknowledged;
mod agreement;
mod audit;
mod drains;
mod durable;
mod election;
mod force;
mod homes;
mod incarnation;
mod lease;
mod liveness;
mod members;
mod once;
mod reign;
mod suspects;
mod time;
mod watch;

use std::fmt;

use serde::Serialize;

pub(super) use acknowledged::Acknowledged;
pub(super) use agreement::Agreement;
pub(super) use audit::Audit;
pub(super) use drains::Drains;
pub(super) use durable::Durable;
pub(super) use election::Election;
pub(super) use force::InForce;
pub(super) use homes::Homes;
pub(super) use incarnation::Incarnations;
pub(super) use lease::Leases;
pub(super) use liveness::{Liveness, NodeRest, Rest};
pub(super) use members::GroupIsFleet;
pub(super) use once::Once;
pub(super) use reign::ReignBegins;
pub(super) use suspects::Suspects;
pub(super) use time::CellTime;
pub(super) use watch::Watchers;

/// An invariant that did not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Its name.
    pub invariant: &'static str,
    /// What was seen.
    pub detail: String,
}

impl Violation {
    pub(super) fn new(invariant: &'static str, detail: impl Into<String>) -> Self {
        Self {
            invariant,
            detail: detail.into(),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.invariant, self.detail)
    }
}

/// What a check says.
pub(super) type Held = Result<(), Violation>;

/// All checks that look on while the world runs.
#[derive(Default)]
pub(super) struct Checks {
    pub(super) election: Election,
    pub(super) agreement: Agreement,
    pub(super) durable: Durable,
    pub(super) acknowledged: Acknowledged,
    pub(super) once: Once,
    pub(super) incarnations: Incarnations,
    pub(super) leases: Leases,
    pub(super) group: GroupIsFleet,
    pub(super) reign: ReignBegins,
    pub(super) time: CellTime,
    pub(super) audit: Audit,
    pub(super) watchers: Watchers,
    pub(super) force: InForce,
    pub(super) drains: Drains,
    pub(super) homes: Homes,
    pub(super) suspects: Suspects,
}
