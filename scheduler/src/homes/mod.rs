//! Prefix homes: which workers are to hold what many conversations share.
//!
//! A family is a path of chunks after which conversations part ([`Family`]). Agents say how often theirs
//! are asked for and what that takes; [`assign`] makes of it, on the leader, a bounded table of the hottest,
//! each with as many homes as its load needs. A home is where a copy is to be, not where requests have to
//! go: that stays the decision of the rule.

pub mod table;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use forebay_proto::wire::control::{FamilyHeat, Heat};
use forebay_proto::{Family, WorkerId};

/// Families of one cell.
pub const MAX_FAMILIES: usize = 256;
/// Homes of one family.
pub const MAX_HOMES: usize = 16;

/// Changes of one step, so that a cell whose load turns over is not told everything at once.
const MAX_CHANGES: usize = 32;
/// A family becomes one when holding it saves so many tokens a second of prefill: about a hundredth of what
/// one worker prefills. It stays one down to half of that.
const LEAST_SAVED: f64 = 200.0;
/// What one home carries of its family, in milliseconds of a worker a second: beyond that, what else the
/// worker has would wait for it.
const PER_HOME: f64 = 600.0;
/// A home more than needed stays until the load is so many times smaller.
const PATIENCE: f64 = 1.5;
/// Nothing is concluded for a pool of which more than one worker in so many says nothing.
const ONE_IN: usize = 5;

/// One worker, as the leader knows it.
#[derive(Clone, Debug)]
pub struct Said {
    /// Who.
    pub worker: WorkerId,
    /// Of which pool.
    pub pool: String,
    /// It serves, and is to go on.
    pub ready: bool,
    /// What it said lately; none: nothing.
    pub heat: Option<Heat>,
}

/// What is to become of the table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// New families, and those with other homes, the hottest first.
    pub put: Vec<Family>,
    /// Those that are none any more, by their chunk.
    pub remove: Vec<u64>,
}

impl Changes {
    /// Whether all stays as it is.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.put.is_empty() && self.remove.is_empty()
    }
}

/// A family, as all who were asked for it say together.
struct Warm {
    family: Family,
    parent: u64,
    /// Requests a second, those of families below it included, and the time that they take.
    arrivals: f64,
    takes: f64,
    /// Requests a second that belong to no hot family below.
    own: f64,
    /// Who was asked for it, and how often; whether it holds it.
    asked: BTreeMap<WorkerId, (f64, bool)>,
}

impl Warm {
    fn saved(&self) -> f64 {
        self.own * f64::from(self.family.tokens)
    }

    /// What its own requests take.
    fn load(&self) -> f64 {
        self.takes * self.own / self.arrivals.max(f64::MIN_POSITIVE)
    }
}

/// A pool's workers that may be homes, with the load that they have and will have.
struct Pool {
    loads: BTreeMap<WorkerId, f64>,
    /// Enough of them say something.
    heard: bool,
}

/// What is to become of a table of families, by what workers said.
///
/// Homes stay where they are while their workers do. Where there are too few, those come first that hold
/// the family and are asked for it most, then the least loaded. A family that a rebalance or a drain pinned
/// only gains homes.
#[must_use]
pub fn assign(held: &BTreeMap<u64, Family>, said: &[Said]) -> Changes {
    let mut pools = pools(said);
    let mut hot = hot(held, warm(said));
    hot.sort_by(|one, other| {
        let by_heat = other.saved().total_cmp(&one.saved());
        by_heat.then(one.family.chunk.cmp(&other.family.chunk))
    });
    hot.truncate(MAX_FAMILIES);
    let mut changes = Changes::default();
    let mut stays: BTreeSet<u64> = BTreeSet::new();
    for mut warm in hot {
        stays.insert(warm.family.chunk);
        let Some(pool) = pools.get_mut(&warm.family.pool) else {
            continue;
        };
        let before = held.get(&warm.family.chunk);
        settle(&mut warm, before, pool);
        let moved = before.is_none_or(|before| before.homes != warm.family.homes);
        if moved && changes.put.len() < MAX_CHANGES {
            changes.put.push(warm.family);
        }
    }
    for (chunk, family) in held {
        let Some(pool) = pools.get_mut(&family.pool) else {
            // None of its workers is left.
            changes.remove.push(*chunk);
            continue;
        };
        if stays.contains(chunk) {
            continue;
        }
        if pool.heard {
            changes.remove.push(*chunk);
        } else if family
            .homes
            .iter()
            .any(|home| !pool.loads.contains_key(home))
        {
            changes.put.extend(replaced(family, pool));
        }
    }
    changes.remove.truncate(MAX_CHANGES);
    changes
}

fn pools(said: &[Said]) -> BTreeMap<String, Pool> {
    let mut pools: BTreeMap<String, Pool> = BTreeMap::new();
    for one in said.iter().filter(|one| one.ready) {
        let pool = pools.entry(one.pool.clone()).or_insert_with(|| Pool {
            loads: BTreeMap::new(),
            heard: false,
        });
        let load = one.heat.as_ref().map_or(0.0, |heat| heat.takes.into());
        pool.loads.insert(one.worker, load);
    }
    for (name, pool) in &mut pools {
        let ready = said.iter().filter(|one| one.ready && one.pool == *name);
        let silent = ready.filter(|one| one.heat.is_none()).count();
        pool.heard = silent * ONE_IN <= pool.loads.len();
    }
    pools
}

/// All families that anybody speaks of.
fn warm(said: &[Said]) -> BTreeMap<u64, Warm> {
    let mut warm: BTreeMap<u64, Warm> = BTreeMap::new();
    for one in said {
        let families = one.heat.iter().flat_map(|heat| &heat.families);
        for heat in families.filter(|heat| is_family(heat)) {
            let entry = warm.entry(heat.chunk).or_insert_with(|| Warm {
                family: Family {
                    pool: one.pool.clone(),
                    chunk: heat.chunk,
                    key_epoch: heat.key_epoch,
                    chunks: heat.chunks,
                    tokens: heat.tokens,
                    homes: Vec::new(),
                    saves: 0,
                    takes: 0,
                    pinned: false,
                },
                parent: heat.parent,
                arrivals: 0.0,
                takes: 0.0,
                own: 0.0,
                asked: BTreeMap::new(),
            });
            let arrivals = f64::from(heat.arrivals) / 1e3;
            // Who says most of it knows its length best.
            let most = entry.asked.values().all(|(other, _)| arrivals > *other);
            if most {
                entry.family.tokens = heat.tokens;
                entry.parent = heat.parent;
            }
            entry.arrivals += arrivals;
            entry.takes += f64::from(heat.takes);
            entry.asked.insert(one.worker, (arrivals, heat.held));
        }
    }
    warm
}

const fn is_family(heat: &FamilyHeat) -> bool {
    heat.chunk != 0 && heat.chunks != 0 && heat.parent != heat.chunk
}

/// Those for which holding them saves enough by requests of their own, which belong to no hotter one below.
fn hot(held: &BTreeMap<u64, Family>, mut warm: BTreeMap<u64, Warm>) -> Vec<Warm> {
    // The longest first: each says to the one above what it and those below it take away.
    let mut order: Vec<(u32, u64)> = warm
        .iter()
        .map(|(chunk, warm)| (warm.family.chunks, *chunk))
        .collect();
    order.sort_unstable_by(|one, other| other.cmp(one));
    let mut claimed: BTreeMap<u64, f64> = BTreeMap::new();
    let mut hot = Vec::new();
    for (chunks, chunk) in order {
        let Some(mut one) = warm.remove(&chunk) else {
            continue;
        };
        let below = claimed.remove(&chunk).unwrap_or_default();
        one.own = (one.arrivals - below).max(0.0);
        let stays = held.contains_key(&chunk);
        let least = if stays {
            LEAST_SAVED / 2.0
        } else {
            LEAST_SAVED
        };
        let is_hot = one.saved() >= least;
        let passes_up = if is_hot { one.arrivals } else { below };
        // A parent that is no shorter would be a loop.
        if warm
            .get(&one.parent)
            .is_some_and(|parent| parent.family.chunks < chunks)
        {
            *claimed.entry(one.parent).or_default() += passes_up;
        }
        if is_hot {
            hot.push(one);
        }
    }
    hot
}

/// Gives a hot family its homes.
fn settle(warm: &mut Warm, before: Option<&Family>, pool: &mut Pool) {
    let load = warm.load();
    let mut homes: Vec<WorkerId> = before.map_or_else(Vec::new, |before| before.homes.clone());
    homes.retain(|home| pool.loads.contains_key(home));
    let pinned = before.is_some_and(|before| before.pinned);
    let most = MAX_HOMES.min(pool.loads.len());
    let needed = degree(load).min(most);
    let enough = degree(load * PATIENCE).min(most);
    let asked = |worker: &WorkerId| warm.asked.get(worker).map_or(0.0, |(asked, _)| *asked);
    while homes.len() > enough && !pinned && pool.heard {
        let least = homes
            .iter()
            .copied()
            .min_by(|one, other| asked(one).total_cmp(&asked(other)).then(other.cmp(one)));
        homes.retain(|home| Some(*home) != least);
    }
    while homes.len() < needed {
        let holds = |worker: &WorkerId| warm.asked.get(worker).is_some_and(|(_, held)| *held);
        let free = pool.loads.iter().filter(|(one, _)| !homes.contains(one));
        let next = free.min_by(|(one, load), (other, others)| {
            let by_copy = holds(other).cmp(&holds(one));
            let by_asked = if holds(one) && holds(other) {
                asked(other).total_cmp(&asked(one))
            } else {
                load.total_cmp(others)
            };
            by_copy.then(by_asked).then(one.cmp(other))
        });
        let Some(next) = next.map(|(next, _)| *next) else {
            break;
        };
        if !holds(&next) {
            // It will get its part of the family's load.
            *pool.loads.entry(next).or_default() += load / needed as f64;
        }
        homes.push(next);
    }
    homes.sort_unstable();
    warm.family.homes = homes;
    warm.family.pinned = pinned;
    warm.family.saves = whole(warm.saved());
    warm.family.takes = whole(load);
}

/// A family of a pool that says too little, with homes in place of those that are gone.
fn replaced(family: &Family, pool: &mut Pool) -> Option<Family> {
    let mut homes = family.homes.clone();
    homes.retain(|home| pool.loads.contains_key(home));
    while homes.len() < family.homes.len().min(pool.loads.len()) {
        let free = pool.loads.iter().filter(|(one, _)| !homes.contains(one));
        let next = free.min_by(|(_, load), (_, others)| load.total_cmp(others))?;
        let next = *next.0;
        let part = f64::from(family.takes) / family.homes.len().max(1) as f64;
        *pool.loads.entry(next).or_default() += part;
        homes.push(next);
    }
    homes.sort_unstable();
    (homes != family.homes).then(|| Family {
        homes,
        ..family.clone()
    })
}

/// How many homes a family of this load needs.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
fn degree(load: f64) -> usize {
    ((load / PER_HOME).ceil() as usize).max(1)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
fn whole(value: f64) -> u32 {
    value.round() as u32
}
