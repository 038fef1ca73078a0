//! Drains as checked types: workers that take nothing new and finish what they have.

use std::fmt;
use std::str::FromStr;

use crate::ids::{IdError, WorkerId, check_name};
use crate::units::Millis;
use crate::wire::fleet as wire;

/// A drain, named by the log index of the command that began it and printed as `d812`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DrainId(pub u64);

impl fmt::Display for DrainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "d{}", self.0)
    }
}

impl FromStr for DrainId {
    type Err = String;

    /// Reads `d812`.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = text
            .strip_prefix('d')
            .and_then(|digits| digits.parse().ok());
        number
            .map(Self)
            .ok_or_else(|| format!("{text} is no drain, such as d812"))
    }
}

/// How far a drain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainPhase {
    /// Agreed; an agent has not said yet that it refuses what is new.
    Committed,
    /// Every agent refuses what is new; something still runs.
    InForce,
    /// Nothing runs any more.
    Drained,
    /// Called off by an operator.
    Cancelled,
}

impl DrainPhase {
    /// Its name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::InForce => "in_force",
            Self::Drained => "drained",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What becomes of what still runs at the deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDeadline {
    /// It goes on.
    Wait,
    /// It is ended with a typed error.
    Cancel,
}

impl OnDeadline {
    /// Its name in JSON and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Cancel => "cancel",
        }
    }

    /// As it stands on the wire; `None` for what this version does not know.
    #[must_use]
    pub const fn from_wire(wire: wire::OnDeadline) -> Option<Self> {
        match wire {
            wire::OnDeadline::Unspecified => None,
            wire::OnDeadline::Wait => Some(Self::Wait),
            wire::OnDeadline::Cancel => Some(Self::Cancel),
        }
    }

    /// For the wire.
    #[must_use]
    pub const fn to_wire(self) -> wire::OnDeadline {
        match self {
            Self::Wait => wire::OnDeadline::Wait,
            Self::Cancel => wire::OnDeadline::Cancel,
        }
    }
}

/// One worker of a drain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainedWorker {
    /// Its name.
    pub name: String,
    /// Its id: a later worker of the same name is none of this drain's.
    pub id: WorkerId,
    /// Cell time at which its agent's word was agreed that it refuses what is new.
    pub in_force: Option<Millis>,
    /// Cell time at which its agent's word was agreed that nothing runs.
    pub drained: Option<Millis>,
}

/// A drain, as agreed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drain {
    /// Its id.
    pub id: DrainId,
    /// How far it is.
    pub phase: DrainPhase,
    /// What becomes of what still runs at the deadline.
    pub on_deadline: OnDeadline,
    /// Cell time at which it began.
    pub began: Millis,
    /// Cell time of its deadline, if it has one.
    pub deadline: Option<Millis>,
    /// Cell time at which it was in force on all of its workers.
    pub in_force: Option<Millis>,
    /// Cell time at which it was drained or called off.
    pub ended: Option<Millis>,
    /// Its deadline passed before it was drained.
    pub overdue: bool,
    /// Identity of who began it.
    pub actor: String,
    /// Why; empty when nobody said.
    pub reason: String,
    /// Its workers, by name.
    pub workers: Vec<DrainedWorker>,
}

impl Drain {
    /// Whether it goes on.
    #[must_use]
    pub const fn is_active(&self) -> bool {
        self.ended.is_none()
    }

    /// The drain as it stands on the wire.
    ///
    /// # Errors
    ///
    /// Returns [`IdError`] when its id, a phase or a worker is none.
    pub fn from_wire(wire: wire::Drain) -> Result<Self, IdError> {
        let missing = |kind| IdError::Missing { kind };
        if wire.id == 0 {
            return Err(missing("drain id"));
        }
        let phase = match wire.phase() {
            wire::DrainPhase::Unspecified => return Err(missing("drain phase")),
            wire::DrainPhase::Committed => DrainPhase::Committed,
            wire::DrainPhase::InForce => DrainPhase::InForce,
            wire::DrainPhase::Drained => DrainPhase::Drained,
            wire::DrainPhase::Cancelled => DrainPhase::Cancelled,
        };
        let on_deadline = OnDeadline::from_wire(wire.on_deadline())
            .ok_or_else(|| missing("drain's choice at the deadline"))?;
        let workers = wire.workers.into_iter().map(|worker| {
            check_name("worker", &worker.name)?;
            Ok(DrainedWorker {
                name: worker.name,
                id: WorkerId(worker.id),
                in_force: time(worker.in_force_ms),
                drained: time(worker.drained_ms),
            })
        });
        Ok(Self {
            id: DrainId(wire.id),
            phase,
            on_deadline,
            began: Millis(wire.began_ms),
            deadline: time(wire.deadline_ms),
            in_force: time(wire.in_force_ms),
            ended: time(wire.ended_ms),
            overdue: wire.overdue,
            actor: wire.actor,
            reason: wire.reason,
            workers: workers.collect::<Result<_, IdError>>()?,
        })
    }

    /// The drain for the wire.
    #[must_use]
    pub fn to_wire(&self) -> wire::Drain {
        let phase = match self.phase {
            DrainPhase::Committed => wire::DrainPhase::Committed,
            DrainPhase::InForce => wire::DrainPhase::InForce,
            DrainPhase::Drained => wire::DrainPhase::Drained,
            DrainPhase::Cancelled => wire::DrainPhase::Cancelled,
        };
        let ms = |time: Option<Millis>| time.map_or(0, |time| time.0);
        wire::Drain {
            id: self.id.0,
            phase: phase.into(),
            on_deadline: self.on_deadline.to_wire().into(),
            began_ms: self.began.0,
            deadline_ms: ms(self.deadline),
            in_force_ms: ms(self.in_force),
            ended_ms: ms(self.ended),
            overdue: self.overdue,
            actor: self.actor.clone(),
            reason: self.reason.clone(),
            workers: self
                .workers
                .iter()
                .map(|worker| wire::DrainedWorker {
                    name: worker.name.clone(),
                    id: worker.id.0,
                    in_force_ms: ms(worker.in_force),
                    drained_ms: ms(worker.drained),
                })
                .collect(),
        }
    }
}

/// Cell time is never zero once a leader stamped anything.
const fn time(ms: u64) -> Option<Millis> {
    if ms == 0 { None } else { Some(Millis(ms)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_reads_back_as_it_was_written() {
        let drain = Drain {
            id: DrainId(812),
            phase: DrainPhase::InForce,
            on_deadline: OnDeadline::Cancel,
            began: Millis(5),
            deadline: Some(Millis(9)),
            in_force: Some(Millis(7)),
            ended: None,
            overdue: true,
            actor: "operator/admin/alice".into(),
            reason: "new driver".into(),
            workers: vec![DrainedWorker {
                name: "w1".into(),
                id: WorkerId(3),
                in_force: Some(Millis(7)),
                drained: None,
            }],
        };
        assert_eq!(Drain::from_wire(drain.to_wire()), Ok(drain));
        assert!(Drain::from_wire(wire::Drain::default()).is_err());
    }

    #[test]
    fn a_drain_is_named_by_a_letter_and_its_number() {
        assert_eq!("d812".parse(), Ok(DrainId(812)));
        assert_eq!(DrainId(812).to_string(), "d812");
        for bad in ["", "812", "d", "dx", "d-1", "w1"] {
            assert!(bad.parse::<DrainId>().is_err(), "{bad}");
        }
    }
}
