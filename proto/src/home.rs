//! Prefix homes and rebalances as checked types: which workers are to hold what many conversations share.

use std::fmt;
use std::str::FromStr;

use crate::ids::{IdError, WorkerId};
use crate::units::Millis;
use crate::wire::fleet as wire;

/// A path of chunks that several conversations share, and the workers that are to hold it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    /// The pool that its requests go to.
    pub pool: String,
    /// Fingerprint of the path's last chunk, which names the family.
    pub chunk: u64,
    /// Epoch of the key that it was made with.
    pub key_epoch: u32,
    /// Length of the path in chunks.
    pub chunks: u32,
    /// Length of the path in tokens.
    pub tokens: u32,
    /// Who is to hold it, ascending.
    pub homes: Vec<WorkerId>,
    /// Tokens a second that need no prefill where it is held, when it was last assigned.
    pub saves: u32,
    /// Time that its requests take, in milliseconds of one worker a second, then.
    pub takes: u32,
    /// Its homes were chosen by a rebalance or a drain: the leader adds some, and takes none away.
    pub pinned: bool,
}

impl Family {
    /// The family as it stands on the wire; its homes in order and once each.
    ///
    /// # Errors
    ///
    /// Returns [`IdError`] when it has no name, length or pool.
    pub fn from_wire(wire: wire::Family) -> Result<Self, IdError> {
        if wire.chunk == 0 || wire.chunks == 0 || wire.pool.is_empty() {
            return Err(IdError::Missing { kind: "family" });
        }
        let mut homes: Vec<WorkerId> = wire.homes.into_iter().map(WorkerId).collect();
        homes.sort_unstable();
        homes.dedup();
        Ok(Self {
            pool: wire.pool,
            chunk: wire.chunk,
            key_epoch: wire.key_epoch,
            chunks: wire.chunks,
            tokens: wire.tokens,
            homes,
            saves: wire.saves,
            takes: wire.takes,
            pinned: wire.pinned,
        })
    }

    /// The family for the wire.
    #[must_use]
    pub fn to_wire(&self) -> wire::Family {
        wire::Family {
            pool: self.pool.clone(),
            chunk: self.chunk,
            key_epoch: self.key_epoch,
            chunks: self.chunks,
            tokens: self.tokens,
            homes: self.homes.iter().map(|home| home.0).collect(),
            saves: self.saves,
            takes: self.takes,
            pinned: self.pinned,
        }
    }

    /// Its name as operators see it: the fingerprint in hexadecimal digits.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{:016x}", self.chunk)
    }
}

/// One family gets a home, or gives one up, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Names the family.
    pub chunk: u64,
    /// Who is no home any more.
    pub from: Option<WorkerId>,
    /// Who becomes one.
    pub to: Option<WorkerId>,
}

impl Move {
    /// The move as it stands on the wire.
    ///
    /// # Errors
    ///
    /// Returns [`IdError`] when it names no family or changes nothing.
    pub fn from_wire(wire: wire::Move) -> Result<Self, IdError> {
        let worker = |id: u32| (id != 0).then_some(WorkerId(id));
        let read = Self {
            chunk: wire.chunk,
            from: worker(wire.from),
            to: worker(wire.to),
        };
        if read.chunk == 0 || read.from == read.to {
            return Err(IdError::Missing { kind: "move" });
        }
        Ok(read)
    }

    /// The move for the wire.
    #[must_use]
    pub fn to_wire(self) -> wire::Move {
        let id = |worker: Option<WorkerId>| worker.map_or(0, |worker| worker.0);
        wire::Move {
            chunk: self.chunk,
            from: id(self.from),
            to: id(self.to),
        }
    }
}

/// What a stretch of recorded arrivals makes of workers, as measured or as predicted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forecast {
    /// By id.
    pub workers: Vec<WorkerForecast>,
    /// Cached tokens of all prompt tokens, in thousandths.
    pub hit_ratio: u32,
    /// First tokens in time, in thousandths.
    pub in_time: u32,
    /// Requests.
    pub arrivals: u32,
    /// Length of the stretch.
    pub window: Millis,
}

/// What it makes of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerForecast {
    /// Who.
    pub worker: WorkerId,
    /// Milliseconds of work a second: 1000 is one that is always busy.
    pub load: u32,
    /// Requests.
    pub arrivals: u32,
}

impl Forecast {
    /// The forecast as it stands on the wire.
    #[must_use]
    pub fn from_wire(wire: wire::Forecast) -> Self {
        let worker = |one: wire::WorkerForecast| WorkerForecast {
            worker: WorkerId(one.worker),
            load: one.load,
            arrivals: one.arrivals,
        };
        Self {
            workers: wire.workers.into_iter().map(worker).collect(),
            hit_ratio: wire.hit_ratio,
            in_time: wire.in_time,
            arrivals: wire.arrivals,
            window: Millis(wire.window_ms),
        }
    }

    /// The forecast for the wire.
    #[must_use]
    pub fn to_wire(&self) -> wire::Forecast {
        let worker = |one: &WorkerForecast| wire::WorkerForecast {
            worker: one.worker.0,
            load: one.load,
            arrivals: one.arrivals,
        };
        wire::Forecast {
            workers: self.workers.iter().map(worker).collect(),
            hit_ratio: self.hit_ratio,
            in_time: self.in_time,
            arrivals: self.arrivals,
            window_ms: self.window.0,
        }
    }
}

/// A rebalance, named by the log index of the command that began it and printed as `r812`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RebalanceId(pub u64);

impl fmt::Display for RebalanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

impl FromStr for RebalanceId {
    type Err = String;

    /// Reads `r812`.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = text
            .strip_prefix('r')
            .and_then(|digits| digits.parse().ok());
        number
            .map(Self)
            .ok_or_else(|| format!("{text} is no rebalance, such as r812"))
    }
}

/// How far a rebalance is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RebalancePhase {
    /// Its moves are made, one at a time.
    Moving,
    /// All of them are.
    Done,
    /// It stopped by itself: promises were kept less often, or a move was not possible any more.
    Stopped,
    /// Called off by an operator. What was moved stays.
    Cancelled,
}

impl RebalancePhase {
    /// Its name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Moving => "moving",
            Self::Done => "done",
            Self::Stopped => "stopped",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A rebalance, as agreed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebalance {
    /// Its id.
    pub id: RebalanceId,
    /// How far it is.
    pub phase: RebalancePhase,
    /// Which pool's homes it moves.
    pub pool: String,
    /// In their order.
    pub moves: Vec<Move>,
    /// How many of them are made.
    pub done: u32,
    /// What was predicted of the homes as they were.
    pub before: Forecast,
    /// What was predicted of them after all moves.
    pub after: Forecast,
    /// Between two moves.
    pub interval_ms: u32,
    /// It stops when fewer first tokens than this are in time, in thousandths; 0: it does not.
    pub stop_below: u32,
    /// Cell time at which it began.
    pub began: Millis,
    /// Cell time of the newest move.
    pub moved: Option<Millis>,
    /// Cell time at which it was over.
    pub ended: Option<Millis>,
    /// Identity of who began it.
    pub actor: String,
    /// Why; empty when nobody said.
    pub reason: String,
    /// Why it stopped by itself; else empty.
    pub stopped: String,
}

impl Rebalance {
    /// Whether it goes on.
    #[must_use]
    pub const fn is_active(&self) -> bool {
        self.ended.is_none()
    }

    /// The rebalance as it stands on the wire.
    ///
    /// # Errors
    ///
    /// Returns [`IdError`] when its id, phase, pool or a move is none.
    pub fn from_wire(wire: wire::Rebalance) -> Result<Self, IdError> {
        let missing = |kind| IdError::Missing { kind };
        if wire.id == 0 || wire.pool.is_empty() {
            return Err(missing("rebalance"));
        }
        let phase = match wire.phase() {
            wire::RebalancePhase::Unspecified => return Err(missing("rebalance phase")),
            wire::RebalancePhase::Moving => RebalancePhase::Moving,
            wire::RebalancePhase::Done => RebalancePhase::Done,
            wire::RebalancePhase::Stopped => RebalancePhase::Stopped,
            wire::RebalancePhase::Cancelled => RebalancePhase::Cancelled,
        };
        let moves = wire.moves.into_iter().map(Move::from_wire);
        Ok(Self {
            id: RebalanceId(wire.id),
            phase,
            pool: wire.pool,
            moves: moves.collect::<Result<_, _>>()?,
            done: wire.done,
            before: Forecast::from_wire(wire.before.unwrap_or_default()),
            after: Forecast::from_wire(wire.after.unwrap_or_default()),
            interval_ms: wire.interval_ms,
            stop_below: wire.stop_below,
            began: Millis(wire.began_ms),
            moved: time(wire.moved_ms),
            ended: time(wire.ended_ms),
            actor: wire.actor,
            reason: wire.reason,
            stopped: wire.stopped,
        })
    }

    /// The rebalance for the wire.
    #[must_use]
    pub fn to_wire(&self) -> wire::Rebalance {
        let phase = match self.phase {
            RebalancePhase::Moving => wire::RebalancePhase::Moving,
            RebalancePhase::Done => wire::RebalancePhase::Done,
            RebalancePhase::Stopped => wire::RebalancePhase::Stopped,
            RebalancePhase::Cancelled => wire::RebalancePhase::Cancelled,
        };
        let ms = |time: Option<Millis>| time.map_or(0, |time| time.0);
        wire::Rebalance {
            id: self.id.0,
            phase: phase.into(),
            pool: self.pool.clone(),
            moves: self.moves.iter().map(|one| one.to_wire()).collect(),
            done: self.done,
            before: Some(self.before.to_wire()),
            after: Some(self.after.to_wire()),
            interval_ms: self.interval_ms,
            stop_below: self.stop_below,
            began_ms: self.began.0,
            moved_ms: ms(self.moved),
            ended_ms: ms(self.ended),
            actor: self.actor.clone(),
            reason: self.reason.clone(),
            stopped: self.stopped.clone(),
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

    fn family() -> Family {
        Family {
            pool: "p".into(),
            chunk: 0xfeed,
            key_epoch: 1,
            chunks: 16,
            tokens: 1_024,
            homes: vec![WorkerId(1), WorkerId(3)],
            saves: 400,
            takes: 700,
            pinned: true,
        }
    }

    #[test]
    fn a_family_reads_back_as_it_was_written_with_its_homes_in_order() {
        let family = family();
        assert_eq!(Family::from_wire(family.to_wire()), Ok(family.clone()));
        let mut unsorted = family.to_wire();
        unsorted.homes = vec![3, 1, 3];
        assert_eq!(Family::from_wire(unsorted), Ok(family.clone()));
        assert_eq!(family.name(), "000000000000feed");
        assert!(Family::from_wire(wire::Family::default()).is_err());
    }

    #[test]
    fn a_rebalance_reads_back_as_it_was_written() {
        let rebalance = Rebalance {
            id: RebalanceId(9),
            phase: RebalancePhase::Stopped,
            pool: "p".into(),
            moves: vec![Move {
                chunk: 7,
                from: None,
                to: Some(WorkerId(2)),
            }],
            done: 1,
            before: Forecast::default(),
            after: Forecast {
                hit_ratio: 812,
                ..Default::default()
            },
            interval_ms: 2_000,
            stop_below: 900,
            began: Millis(5),
            moved: Some(Millis(6)),
            ended: None,
            actor: "operator/admin/alice".into(),
            reason: "hot".into(),
            stopped: "late".into(),
        };
        assert_eq!(Rebalance::from_wire(rebalance.to_wire()), Ok(rebalance));
        assert!(Rebalance::from_wire(wire::Rebalance::default()).is_err());
        assert!(Move::from_wire(wire::Move::default()).is_err());
        assert_eq!("r812".parse(), Ok(RebalanceId(812)));
        for bad in ["", "812", "r", "d812", "r-1"] {
            assert!(bad.parse::<RebalanceId>().is_err(), "{bad}");
        }
    }
}
