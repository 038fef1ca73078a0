//! What a node does while it leads, without its clock: leases, cell time, and the stamp on every
//! proposal.
//!
//! A reign begins when all that was agreed before the election is applied here; until then a leader
//! can judge nothing. Cell time goes on from the newest time in the facts by the leader's own
//! monotonic clock, so it never depends on what a wall clock says, and never goes back.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_proto::wire::control;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Incarnation, Millis, Now};
use prost::Message;
use wire::command::Action;

use super::lease::{Leases, RenewError};
use crate::bug::{Bug, on};
use crate::node::Role;
use crate::replica::Status;

/// One term of leading, from when everything of the terms before it is applied here.
#[derive(Debug, Default)]
pub struct Reign {
    /// The term, while this node leads.
    term: Option<u64>,
    leases: Leases,
    /// Revision of the facts that the leases follow.
    followed: u64,
    /// Cell time when the reign began, and when that was.
    cell_time: Millis,
    began: Now,
}

/// A proposal before the leader's stamp.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Who asks.
    pub actor: wire::Actor,
    /// The client's id, 16 bytes.
    pub client: Bytes,
    /// Its own number of the command; 0 is the leader's own.
    pub sequence: u64,
    /// The encoded command.
    pub command: Bytes,
    /// Why, for the audit.
    pub reason: String,
    /// The worker whose registration it asks for.
    pub registers: Option<String>,
    /// It takes capacity away, and is judged by how busy workers are.
    pub takes_capacity: bool,
}

impl Reign {
    /// The term, while this node leads.
    #[must_use]
    pub const fn term(&self) -> Option<u64> {
        self.term
    }

    /// Who was heard lately; means nothing unless this node leads.
    #[must_use]
    pub const fn leases(&self) -> &Leases {
        &self.leases
    }

    /// Begins or ends the reign, or keeps the leases with the facts. Returns whether the term is
    /// another one. `wall_clock` is asked once in the life of a cell: its time begins there, so that
    /// an audit reads as dates do; from then on only monotonic clocks move it.
    pub fn settle(
        &mut self,
        now: Now,
        leads: Option<u64>,
        facts: &wire::Facts,
        wall_clock: impl FnOnce() -> Millis,
    ) -> bool {
        if self.term == leads {
            if leads.is_some() {
                self.follow(now, facts);
            }
            return false;
        }
        self.term = leads;
        if on(Bug::OldLeases) {
            self.leases.follow(now, alive(facts));
        } else {
            self.leases.became_leader(now, alive(facts));
        }
        self.followed = facts.revision;
        self.cell_time = Millis(facts.cell_time_ms);
        self.began = now;
        if facts.cell_time_ms == 0 || on(Bug::CellTimeRestarts) {
            self.cell_time = wall_clock();
        }
        true
    }

    /// Keeps the leases with the facts; most of what wakes the leader changes no fact.
    fn follow(&mut self, now: Now, facts: &wire::Facts) {
        if self.followed != facts.revision {
            self.leases.follow(now, alive(facts));
            self.followed = facts.revision;
        }
    }

    /// The cell's time, by the leader's clock; means nothing unless this node leads.
    #[must_use]
    pub fn cell_time(&self, now: Now) -> Millis {
        Millis(self.cell_time.0 + Millis::from_duration(now.since(self.began)).0)
    }

    /// The log entry for what somebody asked; `None` unless this node leads.
    #[must_use]
    pub fn stamp(&self, now: Now, asked: Asked) -> Option<Bytes> {
        self.term?;
        let evidence = wire::Evidence {
            age_ms: 0,
            renewed_ms_ago: asked
                .registers
                .and_then(|name| self.leases.renewed_ago(now, &name))
                .map(|ago| Millis::from_duration(ago).0),
            loads: if asked.takes_capacity {
                self.leases.loads(now)
            } else {
                Vec::new()
            },
        };
        let proposal = wire::Proposal {
            at_ms: self.cell_time(now).0,
            actor: Some(asked.actor),
            client: asked.client,
            sequence: asked.sequence,
            command: asked.command,
            reason: asked.reason,
            evidence: Some(evidence),
        };
        Some(proposal.encode_to_vec().into())
    }

    /// Takes a renewal, if this node leads.
    pub fn renewed(
        &mut self,
        now: Now,
        facts: impl FnOnce() -> Arc<wire::Facts>,
        renew: impl Fn(&mut Leases, Now) -> Result<Duration, RenewError>,
    ) -> Option<Result<Duration, RenewError>> {
        self.term?;
        let taken = renew(&mut self.leases, now);
        if taken != Err(RenewError::NotRegistered) {
            return Some(taken);
        }
        // Registered a moment ago, perhaps.
        self.follow(now, &facts());
        Some(renew(&mut self.leases, now))
    }

    /// A process registered as this incarnation just now, so it lives.
    pub fn registered(&mut self, now: Now, name: &str, incarnation: Incarnation) {
        if self.term.is_some() {
            self.leases.registered(now, name, incarnation);
        }
    }
}

/// What an agent says of itself with a renewal, and whether the facts say otherwise.
#[must_use]
pub fn said(
    worker: &wire::Worker,
    incarnation: Incarnation,
    renew: &control::Renew,
) -> (wire::ObserveWorker, bool) {
    let acknowledges = worker.acknowledged_revision < worker.desired_revision
        && renew.applied_revision >= worker.desired_revision;
    // A state that this version does not know changes nothing, but it is a sign of life.
    let observed = match renew.observed() {
        wire::Observed::Unspecified => worker.observed,
        known => known.into(),
    };
    let is_news = worker.observed != observed || worker.lost || acknowledges;
    let said = wire::ObserveWorker {
        incarnation: Some(incarnation.to_wire()),
        observed,
        acknowledged_revision: renew.applied_revision,
    };
    (said, is_news)
}

/// Whether a command takes capacity away, so that how busy workers are is evidence for it.
#[must_use]
pub const fn takes_capacity(action: &Action) -> bool {
    matches!(action, Action::SetDesiredOf(_) | Action::StartDrain(_))
}

/// The term that a node was elected in, while it leads.
#[must_use]
pub fn elected(status: &Status) -> Option<u64> {
    (status.role == Role::Leader).then_some(status.term)
}

/// The term in which this node leads and has applied all that was agreed before.
///
/// `election` keeps the term it was elected in and where its log ended when that was first seen: its
/// first entry is in that log, and all that was agreed before lies ahead of it. The facts are
/// published before the status says that they are applied.
pub fn begun(election: &mut Option<(u64, u64)>, status: &Status) -> Option<u64> {
    let known = elected(status).map(|term| match *election {
        Some(known) if known.0 == term => known,
        Some(_) | None => (term, status.last_index),
    });
    *election = known;
    known
        .filter(|(_, end)| status.applied >= *end || on(Bug::ReignTooEarly))
        .map(|(term, _)| term)
}

/// Workers whose agents should be heard.
fn alive(facts: &wire::Facts) -> impl Iterator<Item = (String, Incarnation)> {
    facts
        .workers
        .iter()
        .filter(|worker| !worker.departed)
        .filter_map(|worker| {
            let incarnation = Incarnation::from_wire(worker.incarnation.as_ref()).ok()?;
            Some((worker.name.clone(), incarnation))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reign_begins_when_the_entries_before_it_and_its_own_first_one_are_applied() {
        let mut election = None;
        for (role, term, last_index, applied, reigns) in [
            (Role::Follower, 3, 10, 8, None),
            (Role::Leader, 4, 11, 8, None),
            (Role::Leader, 4, 11, 10, None),
            (Role::Leader, 4, 11, 11, Some(4)),
            (Role::Leader, 4, 20, 15, Some(4)),
            (Role::Follower, 5, 20, 15, None),
            (Role::Leader, 6, 21, 20, None),
            (Role::Leader, 6, 21, 21, Some(6)),
            (Role::Leader, 8, 23, 21, None),
            (Role::Leader, 8, 23, 23, Some(8)),
        ] {
            let status = Status {
                role,
                term,
                last_index,
                applied,
                ..Status::default()
            };
            assert_eq!(begun(&mut election, &status), reigns, "{status:?}");
        }
    }
}
