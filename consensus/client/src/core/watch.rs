//! Following the facts: which node to watch, when to leave it, and what its frames mean.
//!
//! One node is watched at a time. It is left when it is silent for longer than [`SILENCE`], or when
//! it has not heard the leader for longer than [`STALE`] and a look at the others finds a fresher
//! one; when all are stale alike there is nothing to gain by moving. The next node continues from
//! the revision that is held. Facts are never taken back: an older revision is passed over, and
//! those of another cluster are refused.

use std::sync::Arc;
use std::time::Duration;

use forebay_link::Backoff;
use forebay_proto::wire::control as wire;
use forebay_proto::{ClusterId, Now, Revision};
use rand::rngs::StdRng;
use wire::watch_frame::Frame;

use super::facts::{Facts, FactsError};

/// A node that sends nothing for this long is left; heartbeats come four times as often.
pub const SILENCE: Duration = Duration::from_secs(1);

/// A node that has not heard the leader for this long may be behind.
pub const STALE: Duration = Duration::from_secs(1);

/// Between two looks at the other nodes.
const SCOUT_EVERY: Duration = Duration::from_secs(1);

/// How much fresher another node has to be.
const FRESHER_BY: Duration = Duration::from_millis(500);

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Open a watch at this node, in place of the one before.
    Dial {
        /// Where.
        address: String,
        /// From where on.
        from: wire::Watch,
    },
    /// Drop the watch: the node is silent.
    Leave,
    /// Ask all nodes how long ago they heard the leader; the answers go to [`Watch::scouted`].
    Scout,
    /// Wait for a frame, at most until then.
    Wait(Now),
}

/// Why facts or a node are not used. What is held stays in use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchProblem {
    /// The node speaks for another cluster.
    #[error(
        "{address} belongs to cluster {found}, but this process holds facts of cluster {held}: check --control; to join {found} give this process another data directory, or delete what the old cluster left in this one"
    )]
    WrongCluster {
        /// Who.
        address: String,
        /// The cluster that it speaks for.
        found: ClusterId,
        /// The cluster whose facts are held.
        held: ClusterId,
    },
    /// The facts cannot be used.
    #[error(
        "the facts of {address} at {revision} cannot be used, those before stay in use: {error}"
    )]
    Unusable {
        /// Who sent them.
        address: String,
        /// Which.
        revision: Revision,
        /// What is wrong with them.
        error: FactsError,
    },
    /// The node broke the protocol.
    #[error("{address} broke the watch protocol: {problem}")]
    Protocol {
        /// Who.
        address: String,
        /// What it did.
        problem: &'static str,
    },
    /// The node cannot be watched.
    #[error("{address} cannot be watched: {problem}")]
    Unavailable {
        /// Who.
        address: String,
        /// Why.
        problem: String,
    },
    /// It was silent for too long.
    #[error("{address} was silent for more than a second")]
    Silent {
        /// Who.
        address: String,
    },
}

#[derive(Clone, Debug)]
enum Phase {
    Idle {
        until: Now,
    },
    Watching {
        address: String,
        /// When its last frame came.
        heard: Now,
        /// How long ago it had heard the leader then.
        leader_heard: Duration,
        scouted: Option<Now>,
    },
}

/// Follows the facts. See the module.
#[derive(Debug)]
pub struct Watch {
    held: Option<Arc<Facts>>,
    phase: Phase,
    /// Who was watched last.
    last: Option<String>,
    /// Who should be next.
    preferred: Option<String>,
    backoff: Backoff,
    rng: StdRng,
}

impl Watch {
    /// Begins with what the disk held.
    #[must_use]
    pub fn new(held: Option<Arc<Facts>>, rng: StdRng) -> Self {
        Self {
            held,
            phase: Phase::Idle {
                until: Now::default(),
            },
            last: None,
            preferred: None,
            backoff: Backoff::new(Duration::from_millis(20), Duration::from_secs(2)),
            rng,
        }
    }

    /// The newest facts.
    #[must_use]
    pub const fn held(&self) -> Option<&Arc<Facts>> {
        self.held.as_ref()
    }

    /// Which node is watched.
    #[must_use]
    pub fn watching(&self) -> Option<&str> {
        match &self.phase {
            Phase::Idle { .. } => None,
            Phase::Watching { address, .. } => Some(address),
        }
    }

    /// How old the held facts may be: since the watched node heard the leader. `None`: unknown.
    #[must_use]
    pub fn age(&self, now: Now) -> Option<Duration> {
        match &self.phase {
            Phase::Idle { .. } => None,
            Phase::Watching {
                heard,
                leader_heard,
                ..
            } => Some(now.since(*heard) + *leader_heard),
        }
    }

    /// What to do next, given every address there is.
    pub fn next(&mut self, now: Now, addresses: &[String]) -> Step {
        match &mut self.phase {
            Phase::Idle { until } if now < *until => Step::Wait(*until),
            Phase::Idle { .. } => self.dial(now, addresses),
            Phase::Watching { heard, .. } if now.since(*heard) >= SILENCE => {
                self.leave(now);
                Step::Leave
            }
            Phase::Watching {
                heard,
                leader_heard,
                scouted,
                ..
            } => {
                let silent_at = *heard + SILENCE;
                if *leader_heard <= STALE {
                    return Step::Wait(silent_at);
                }
                match scouted {
                    Some(at) if now.since(*at) < SCOUT_EVERY => {
                        Step::Wait(silent_at.min(*at + SCOUT_EVERY))
                    }
                    Some(_) | None => {
                        *scouted = Some(now);
                        Step::Scout
                    }
                }
            }
        }
    }

    fn dial(&mut self, now: Now, addresses: &[String]) -> Step {
        let after_last = self
            .last
            .as_ref()
            .and_then(|last| addresses.iter().position(|address| address == last))
            .map_or_else(
                || rand::Rng::random_range(&mut self.rng, 0..addresses.len().max(1)),
                |position| position + 1,
            );
        let next = addresses.get(after_last % addresses.len().max(1)).cloned();
        let Some(address) = self.preferred.take().or(next) else {
            let until = now + SCOUT_EVERY;
            self.phase = Phase::Idle { until };
            return Step::Wait(until);
        };
        self.last = Some(address.clone());
        self.phase = Phase::Watching {
            address: address.clone(),
            heard: now,
            leader_heard: Duration::ZERO,
            scouted: None,
        };
        let held = self.held.as_ref();
        Step::Dial {
            address,
            from: wire::Watch {
                cluster_id: held
                    .map(|facts| facts.cluster_id.to_wire())
                    .unwrap_or_default(),
                revision: held.map_or(0, |facts| facts.revision.0),
            },
        }
    }

    fn leave(&mut self, now: Now) {
        let until = now + self.backoff.next(&mut self.rng);
        self.phase = Phase::Idle { until };
    }

    /// The watch ended, or could not be opened.
    pub fn failed(&mut self, now: Now) {
        self.leave(now);
    }

    fn check_cluster(&self, address: &str, found: ClusterId) -> Result<(), WatchProblem> {
        match &self.held {
            Some(facts) if facts.cluster_id != found => Err(WatchProblem::WrongCluster {
                address: address.into(),
                found,
                held: facts.cluster_id,
            }),
            Some(_) | None => Ok(()),
        }
    }

    /// Takes a frame of the watched node and returns the facts if they changed.
    ///
    /// # Errors
    ///
    /// Returns why the frame cannot be used; then drop the watch. What is held stays.
    pub fn handle(
        &mut self,
        now: Now,
        frame: wire::WatchFrame,
    ) -> Result<Option<Arc<Facts>>, WatchProblem> {
        let Phase::Watching { address, heard, .. } = &mut self.phase else {
            return Ok(None);
        };
        *heard = now;
        let address = address.clone();
        let taken = self.take(&address, frame.frame);
        match &taken {
            Ok(_) => self.backoff.reset(),
            Err(_) => self.leave(now),
        }
        taken
    }

    fn take(
        &mut self,
        address: &str,
        frame: Option<Frame>,
    ) -> Result<Option<Arc<Facts>>, WatchProblem> {
        let protocol = |problem| WatchProblem::Protocol {
            address: address.into(),
            problem,
        };
        let unusable = |revision, error| WatchProblem::Unusable {
            address: address.into(),
            revision: Revision(revision),
            error,
        };
        let next = match frame.ok_or_else(|| protocol("an unknown frame"))? {
            Frame::Heartbeat(beat) => {
                if let Phase::Watching { leader_heard, .. } = &mut self.phase {
                    *leader_heard = Duration::from_millis(beat.leader_heard_ms);
                }
                return Ok(None);
            }
            Frame::Snapshot(wire) => {
                let revision = wire.revision;
                let next = Facts::from_wire(wire).map_err(|error| unusable(revision, error))?;
                self.check_cluster(address, next.cluster_id)?;
                next
            }
            Frame::Delta(delta) => {
                let held = self
                    .held
                    .as_ref()
                    .ok_or_else(|| protocol("a delta before a snapshot"))?;
                let revision = delta.revision;
                if revision <= held.revision.0 {
                    return Ok(None);
                }
                held.after(delta)
                    .map_err(|error| unusable(revision, error))?
            }
        };
        let newer = |held: &Arc<Facts>| next.revision > held.revision;
        if !self.held.as_ref().is_none_or(newer) {
            return Ok(None);
        }
        let next = Arc::new(next);
        self.held = Some(next.clone());
        Ok(Some(next))
    }

    /// Takes what the other nodes said of when they heard the leader; returns whether to move.
    pub fn scouted(&mut self, now: Now, found: &[(String, Duration)]) -> bool {
        let Phase::Watching {
            address,
            leader_heard,
            ..
        } = &self.phase
        else {
            return false;
        };
        let fresher = found
            .iter()
            .filter(|(other, age)| other != address && *age + FRESHER_BY < *leader_heard)
            .min_by_key(|(_, age)| *age);
        let Some((fresher, _)) = fresher else {
            return false;
        };
        self.preferred = Some(fresher.clone());
        self.phase = Phase::Idle { until: now };
        true
    }
}

#[cfg(test)]
mod tests;
