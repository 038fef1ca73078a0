//! A home is a worker of its family's pool that is wanted ready, at every revision; a pool has one rebalance
//! at a time, which is not lost, goes one way, makes each of its moves once and in their order, not too
//! fast, and goes on whoever leads.

use std::collections::BTreeMap;

use forebay_consensus::fleet::{MAX_FAMILIES, MAX_HOMES};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet as wire;
use wire::change::Change;
use wire::{Desired, RebalancePhase};

use super::{Held, Violation};

const NAME: &str = "homes-are-kept";

/// The leader's controller has so long for a move that is due, in cell time.
const STEPPED_MS: u64 = 15_000;

#[derive(Default)]
pub(crate) struct Homes {
    /// Id, pool and what is wanted, by name.
    workers: BTreeMap<String, (u32, String, Desired)>,
    families: BTreeMap<u64, wire::Family>,
    /// As of which revision, by pool.
    rebalances: BTreeMap<String, (u64, wire::Rebalance)>,
    /// Moves that were made.
    pub(crate) moved: u64,
}

fn broken(detail: String) -> Held {
    Err(Violation::new(NAME, detail))
}

impl Homes {
    /// A delta that was agreed on, in order.
    pub(crate) fn delta(&mut self, delta: &wire::Delta) -> Held {
        let before = self.families.clone();
        let mut news = vec![];
        for change in &delta.changes {
            match &change.change {
                Some(Change::WorkerPut(worker)) => {
                    let spec = WorkerSpec::from_wire(&worker.spec);
                    let pool = spec.map_or_else(|_| String::new(), |spec| spec.pool);
                    let known = (worker.id, pool, worker.desired());
                    self.workers.insert(worker.name.clone(), known);
                }
                Some(Change::WorkerRemoved(name)) => {
                    self.workers.remove(name);
                }
                Some(Change::Families(families)) => {
                    for chunk in &families.removed {
                        self.families.remove(chunk);
                    }
                    for family in &families.put {
                        self.families.insert(family.chunk, family.clone());
                    }
                }
                Some(Change::RebalancePut(rebalance)) => news.push(rebalance),
                Some(Change::RebalanceForgotten(pool)) => {
                    self.rebalances.remove(pool);
                }
                _ => {}
            }
        }
        self.homes_fit(delta.revision)?;
        for rebalance in news {
            self.put(delta.revision, &before, rebalance)?;
        }
        Ok(())
    }

    fn homes_fit(&self, revision: u64) -> Held {
        if self.families.len() > MAX_FAMILIES {
            return broken(format!("{} families", self.families.len()));
        }
        for family in self.families.values() {
            let fits = |home: &u32| {
                let mut workers = self.workers.values();
                workers.any(|(id, pool, desired)| {
                    id == home && *pool == family.pool && *desired == Desired::Ready
                })
            };
            let sound = (1..=MAX_HOMES).contains(&family.homes.len())
                && family.homes.is_sorted_by(|one, other| one < other)
                && family.homes.iter().all(fits);
            if !sound {
                return broken(format!("{family:?} at r{revision} of {:?}", self.workers));
            }
        }
        Ok(())
    }

    fn put(
        &mut self,
        revision: u64,
        before: &BTreeMap<u64, wire::Family>,
        now: &wire::Rebalance,
    ) -> Held {
        let known = self.rebalances.get(&now.pool).map(|(_, known)| known);
        match known {
            Some(was) if was.id == now.id => {
                let forward = was.ended_ms == 0
                    && was.moves == now.moves
                    && was.began_ms == now.began_ms
                    && (was.done..=was.done + 1).contains(&now.done);
                if !forward {
                    return broken(format!("{was:?} became {now:?}"));
                }
                if now.done > was.done {
                    let interval = u64::from(now.interval_ms);
                    let early = was.moved_ms > 0 && now.moved_ms < was.moved_ms + interval;
                    if early || !self.is_made(before, &now.moves[was.done as usize]) {
                        return broken(format!("move {} of {now:?}", was.done));
                    }
                    self.moved += 1;
                }
            }
            Some(was) if was.ended_ms == 0 => {
                return broken(format!("{was:?} made way for {now:?}"));
            }
            Some(_) | None if now.done > 0 || now.ended_ms > 0 => {
                return broken(format!("{now:?} began in its midst"));
            }
            Some(_) | None => {}
        }
        let all = now.done as usize == now.moves.len();
        if all != (now.phase() == RebalancePhase::Done) {
            return broken(format!("{now:?} is over or is not"));
        }
        let held = (revision, now.clone());
        self.rebalances.insert(now.pool.clone(), held);
        Ok(())
    }

    /// Whether the families differ by this move.
    fn is_made(&self, before: &BTreeMap<u64, wire::Family>, one: &wire::Move) -> bool {
        let (Some(was), Some(now)) = (before.get(&one.chunk), self.families.get(&one.chunk)) else {
            return false;
        };
        let mut homes = was.homes.clone();
        homes.retain(|home| *home != one.from);
        homes.extend((one.to > 0).then_some(one.to));
        homes.sort_unstable();
        homes == now.homes && now.pinned
    }

    /// What a node holds after a batch.
    pub(crate) fn held(&self, facts: &wire::Facts) -> Held {
        for (revision, known) in self.rebalances.values() {
            let held = facts.rebalances.iter().any(|held| held.pool == known.pool);
            if facts.revision >= *revision && !held {
                return broken(format!(
                    "r{} is not in the facts at r{}",
                    known.id, facts.revision
                ));
            }
        }
        Ok(())
    }

    /// The rebalance under way.
    pub(crate) fn active(&self) -> Option<u64> {
        let mut known = self.rebalances.values();
        let active = known.find(|(_, known)| known.ended_ms == 0);
        active.map(|(_, known)| known.id)
    }

    /// A move that is possible by what was agreed: of the `n`th family, to the `n`th worker.
    pub(crate) fn possible(&self, n: usize) -> Option<wire::Move> {
        let family = self.families.values().nth(n % self.families.len().max(1))?;
        let pool = self.workers.values();
        let mut free = pool.filter(|(id, pool, desired)| {
            *pool == family.pool && *desired == Desired::Ready && !family.homes.contains(id)
        });
        let free_count = free.clone().count().max(1);
        let (to, _, _) = free.nth(n % free_count)?;
        let from = family
            .homes
            .first()
            .copied()
            .filter(|_| n.is_multiple_of(2));
        Some(wire::Move {
            chunk: family.chunk,
            from: from.unwrap_or(0),
            to: *to,
        })
    }

    /// What the leader holds in the end.
    pub(crate) fn at_rest(facts: &wire::Facts) -> Held {
        for one in facts.rebalances.iter().filter(|one| one.ended_ms == 0) {
            let due = one.began_ms.max(one.moved_ms) + u64::from(one.interval_ms);
            if due + STEPPED_MS < facts.cell_time_ms {
                return broken(format!("nobody goes on with {one:?}"));
            }
        }
        Ok(())
    }
}
