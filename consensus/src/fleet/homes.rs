//! Prefix homes: which workers are to hold what many conversations share.
//!
//! Which families there are follows their heat, which is observed and not agreed: the leader's controller
//! proposes what changes ([`Fleet::assign_homes`]), made from facts of some revision and refused when a
//! home changed since. What no leader has to be there for is that homes leave workers that take nothing:
//! that happens in the very entry that says so ([`Fleet::vacate`]), by integers that are in the state.
//!
//! A home is a worker of the family's pool that is wanted ready, at every revision.

use std::collections::{BTreeMap, BTreeSet};

use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{Family, Revision, WorkerId};
use wire::Desired;
use wire::change::Change;

use super::members::HOMES_LEVEL;
use super::{Effect, Fleet, Worker};
use crate::bug::{Bug, on};

/// Families of one cell.
pub const MAX_FAMILIES: usize = 256;

/// Homes of one family.
pub const MAX_HOMES: usize = 16;

impl Fleet {
    pub(super) fn assign_homes(
        &mut self,
        at: Revision,
        command: wire::AssignHomes,
    ) -> Result<Effect, Refusal> {
        self.needs(HOMES_LEVEL)?;
        for (path, length) in [
            ("assign_homes.put", command.put.len()),
            ("assign_homes.remove", command.remove.len()),
        ] {
            if length > MAX_FAMILIES {
                let problem = format!("has {length} families, at most {MAX_FAMILIES} fit");
                return Err(Refusal::invalid(path, problem));
            }
        }
        if command.as_of < self.homes_revision.0 {
            let what = format!(
                "homes changed at {}, this was made from r{}",
                self.homes_revision, command.as_of
            );
            return Err(Refusal::PlanStale { what });
        }
        let moving = self.moving();
        let mut next = self.families.clone();
        for chunk in &command.remove {
            if !moving.contains(chunk) {
                next.remove(chunk);
            }
        }
        for family in command.put {
            let family = self.assigned(family, &moving)?;
            if family.homes.is_empty() {
                next.remove(&family.chunk);
            } else {
                next.insert(family.chunk, family);
            }
        }
        if next.len() > MAX_FAMILIES {
            return Err(Refusal::Full {
                what: "families".into(),
                limit: MAX_FAMILIES as u64,
            });
        }
        let changes = self.rehomed(at, next).into_iter().collect();
        Ok(Effect {
            changes,
            ..Effect::default()
        })
    }

    /// A family as it is put: with homes that may be, and those that it may not lose.
    fn assigned(&self, put: wire::Family, moving: &BTreeSet<u64>) -> Result<Family, Refusal> {
        let path = "assign_homes.put";
        if put.homes.len() > MAX_HOMES {
            let problem = format!("has {} homes, at most {MAX_HOMES} fit", put.homes.len());
            return Err(Refusal::invalid(path, problem));
        }
        let put =
            Family::from_wire(put).map_err(|error| Refusal::invalid(path, error.to_string()))?;
        if !self.config.pools.contains(&put.pool) {
            return Err(Refusal::UnknownPool { pool: put.pool });
        }
        let held = self.families.get(&put.chunk);
        if held.is_some_and(|held| held.pool != put.pool) {
            let problem = format!("{} is of another pool", put.name());
            return Err(Refusal::invalid(path, problem));
        }
        let had: &[WorkerId] = held.map_or(&[], |held| &held.homes);
        let pinned = held.is_some_and(|held| held.pinned);
        let serving: BTreeSet<WorkerId> = self
            .workers
            .values()
            .filter(|worker| worker.spec.pool == put.pool && worker.serves())
            .map(|worker| worker.id)
            .collect();
        let homes = if moving.contains(&put.chunk) {
            had.to_vec()
        } else {
            // Who was lost may stay a home, and may go even where none is taken away.
            let kept = had
                .iter()
                .filter(|home| put.homes.contains(home) || (pinned && serving.contains(home)));
            let gained = put
                .homes
                .iter()
                .filter(|home| !had.contains(home) && serving.contains(home));
            let mut homes: Vec<WorkerId> = kept.chain(gained).copied().collect();
            homes.truncate(MAX_HOMES);
            homes.sort_unstable();
            homes
        };
        Ok(Family {
            homes,
            pinned,
            ..put
        })
    }

    /// Takes these families for the agreed ones; says what that changes.
    pub(super) fn rehomed(&mut self, at: Revision, next: BTreeMap<u64, Family>) -> Option<Change> {
        let put = next
            .values()
            .filter(|family| self.families.get(&family.chunk) != Some(family))
            .map(Family::to_wire)
            .collect();
        let removed = self.families.keys();
        let removed = removed.filter(|chunk| !next.contains_key(chunk));
        let changes = wire::FamilyChanges {
            put,
            removed: removed.copied().collect(),
        };
        if changes.put.is_empty() && changes.removed.is_empty() {
            return None;
        }
        self.families = next;
        self.homes_revision = at;
        Some(Change::Families(changes))
    }

    /// Takes homes off workers that are gone, in another pool, or not wanted ready any more.
    ///
    /// For each of the last kind the family gets the ready worker that least is asked of as a home, the
    /// hottest family first, and is pinned: what was moved there is to stay.
    pub(super) fn vacate(&mut self, at: Revision) -> Option<Change> {
        if self.families.is_empty() || on(Bug::HomesStay) {
            return None;
        }
        let by_id: BTreeMap<WorkerId, &Worker> = self
            .workers
            .values()
            .map(|worker| (worker.id, worker))
            .collect();
        let of_pool = |home: &WorkerId, pool: &str| {
            let worker = by_id.get(home).copied();
            worker.filter(|worker| worker.spec.pool == pool)
        };
        let stays = |home: &WorkerId, pool: &str| {
            of_pool(home, pool).is_some_and(|worker| worker.desired == Desired::Ready)
        };
        let all_stay = |family: &&Family| family.homes.iter().all(|h| stays(h, &family.pool));
        let mut leaving: Vec<&Family> = self
            .families
            .values()
            .filter(|family| !all_stay(family))
            .collect();
        if leaving.is_empty() {
            return None;
        }
        leaving.sort_by_key(|family| (std::cmp::Reverse(family.takes), family.chunk));
        let mut next = self.families.clone();
        let mut asked = asked(next.values());
        for family in leaving {
            let mut moved = family.clone();
            moved.homes.retain(|home| stays(home, &family.pool));
            let gone = family.homes.iter().filter(|h| !stays(h, &family.pool));
            for leaver in gone.filter_map(|home| of_pool(home, &family.pool)) {
                moved.pinned = true;
                let stands_in = by_id.values().filter(|worker| {
                    worker.spec.pool == family.pool
                        && worker.is_ready()
                        && !moved.homes.contains(&worker.id)
                        && leaver.spec.models.iter().all(|m| worker.spec.serves(m))
                });
                let least = stands_in
                    .min_by_key(|worker| (asked.get(&worker.id).copied().unwrap_or(0), worker.id));
                if let Some(worker) = least {
                    moved.homes.push(worker.id);
                    moved.homes.sort_unstable();
                    *asked.entry(worker.id).or_default() += share(family);
                }
            }
            if moved.homes.is_empty() {
                next.remove(&family.chunk);
            } else {
                next.insert(family.chunk, moved);
            }
        }
        self.rehomed(at, next)
    }
}

/// What is asked of each worker by the families whose home it is, each an even part of its family's.
fn asked<'a>(families: impl Iterator<Item = &'a Family>) -> BTreeMap<WorkerId, u64> {
    let mut asked = BTreeMap::new();
    for family in families {
        for home in &family.homes {
            *asked.entry(*home).or_default() += share(family);
        }
    }
    asked
}

fn share(family: &Family) -> u64 {
    u64::from(family.takes) / family.homes.len().max(1) as u64
}
