//! Which moves to make: those that make the busiest worker less busy, one after the other.

use std::borrow::Cow;
use std::collections::BTreeMap;

use forebay_proto::wire::control::Arrival;
use forebay_proto::{Family, Forecast, Move, WorkerId};

use super::replay::{Played, Stage};
use super::{MAX_ARRIVALS, Planned, Record, Situation, imbalance};
use crate::homes::MAX_HOMES;

/// The busiest is busier than the mean by less than this: balanced.
const BALANCED: f64 = 0.1;
/// In thousandths of a worker's time: of so little nothing is worth a move.
const LEAST_LOAD: u32 = 50;
/// A move makes the busiest less busy by at least this share of the mean.
const LEAST_GAIN: f64 = 0.03;
/// Tokens of prompts that all moves together may lose of the cached ones, in thousandths.
const MOST_LOST: u32 = 30;
/// Families of the busiest worker that are tried for each move, and workers that they are tried on.
const FAMILIES: usize = 4;
const TARGETS: usize = 2;
/// Requests that all replays of a plan may place: two or three seconds of one core, whatever the pool's size.
const EFFORT: usize = 500_000;
/// Of more workers than this the busiest and the least busy are looked at, as many of each: between those
/// something can be moved, and a decision takes as long as there are workers.
const MOST_WORKERS: usize = 64;

/// The moves of a plan, at most so many, with what they are good for.
#[must_use]
pub fn plan(situation: &Situation<'_>, most_moves: usize) -> Planned {
    let tries = (most_moves.max(1) * FAMILIES * TARGETS).min(64) + 1;
    let most = (EFFORT / tries).clamp(1, MAX_ARRIVALS);
    let records = looked_at(situation.records);
    let stage = Stage::new(&records, situation.holders, situation.window, most);
    let before = stage.play(situation.families);
    let mut table = situation.families.clone();
    let mut now = Played {
        forecast: before.forecast.clone(),
        by_family: before.by_family.clone(),
    };
    let mut moves = Vec::new();
    let mut left = EFFORT.saturating_sub(stage.len());
    while moves.len() < most_moves && !is_balanced(&now.forecast) {
        let tried = candidates(&now, &table).into_iter().filter_map(|one| {
            left = left.checked_sub(stage.len())?;
            let table = moved(&table, &one)?;
            let played = stage.play(&table);
            Some((one, table, played))
        });
        let best = tried.min_by(|(_, _, one), (_, _, other)| {
            busiest(&one.forecast).cmp(&busiest(&other.forecast))
        });
        let Some((one, with, played)) = best else {
            break;
        };
        let gain = f64::from(busiest(&now.forecast)) - f64::from(busiest(&played.forecast));
        let kept = played.forecast.hit_ratio + MOST_LOST >= before.forecast.hit_ratio;
        if gain < LEAST_GAIN * mean(&now.forecast) || !kept {
            break;
        }
        moves.push(one);
        (table, now) = (with, played);
    }
    Planned {
        moves,
        measured: stage.measured(),
        before: before.forecast,
        after: now.forecast,
    }
}

/// The records of those between whom something is to be moved.
fn looked_at(records: &[Record]) -> Cow<'_, [Record]> {
    if records.len() <= MOST_WORKERS {
        return Cow::Borrowed(records);
    }
    let work_ms = |record: &Record| {
        let one = |arrival: &Arrival| {
            let cached = f64::from(arrival.cached_tokens.min(arrival.prompt_tokens));
            let uncached = f64::from(arrival.prompt_tokens) - cached;
            let output = arrival.output_tokens.into();
            record.profile.work_ms(cached, uncached, output)
        };
        let work_ms: f64 = record.arrivals.iter().map(one).sum();
        work_ms * f64::from(record.one_in.max(1))
    };
    let mut by_work: Vec<(f64, &Record)> = records.iter().map(|one| (work_ms(one), one)).collect();
    by_work.sort_by(|(one, first), (other, second)| {
        one.total_cmp(other).then(first.worker.cmp(&second.worker))
    });
    let least = &by_work[..MOST_WORKERS / 2];
    let busiest = &by_work[by_work.len() - MOST_WORKERS / 2..];
    let both = least.iter().chain(busiest);
    both.map(|(_, record)| (*record).clone()).collect()
}

/// Whether there is nothing that a move could make better.
pub(super) fn is_balanced(forecast: &Forecast) -> bool {
    imbalance(forecast) <= BALANCED || busiest(forecast) < LEAST_LOAD
}

fn busiest(forecast: &Forecast) -> u32 {
    let loads = forecast.workers.iter().map(|worker| worker.load);
    loads.max().unwrap_or(0)
}

fn mean(forecast: &Forecast) -> f64 {
    let sum: f64 = forecast.workers.iter().map(|one| f64::from(one.load)).sum();
    sum / forecast.workers.len().max(1) as f64
}

/// The families that keep the busiest worker busy, each to the least busy ones.
fn candidates(now: &Played, table: &BTreeMap<u64, Family>) -> Vec<Move> {
    let mut by_load: Vec<_> = now.forecast.workers.clone();
    by_load.sort_by_key(|one| (one.load, one.worker));
    let Some(from) = by_load.pop().map(|busiest| busiest.worker) else {
        return Vec::new();
    };
    let mut families: Vec<(u64, f64)> = now
        .by_family
        .iter()
        .filter(|((family, worker), _)| *worker == from && table.contains_key(family))
        .map(|((family, _), work_ms)| (*family, *work_ms))
        .collect();
    families.sort_by(|one, other| other.1.total_cmp(&one.1).then(one.0.cmp(&other.0)));
    let mut moves = Vec::new();
    for (chunk, _) in families.into_iter().take(FAMILIES) {
        let homes = &table[&chunk].homes;
        let free = by_load.iter().map(|one| one.worker);
        let free = free.filter(|worker| !homes.contains(worker));
        moves.extend(free.take(TARGETS).map(|to| Move {
            chunk,
            from: gives_up(&table[&chunk], from),
            to: Some(to),
        }));
    }
    moves
}

/// Who gives the family up for a new home: the busiest, if what is left is enough for it.
fn gives_up(family: &Family, busiest: WorkerId) -> Option<WorkerId> {
    let full = family.homes.len() >= MAX_HOMES;
    (full && family.homes.contains(&busiest)).then_some(busiest)
}

/// The table after a move; `None`: it is not possible.
fn moved(table: &BTreeMap<u64, Family>, one: &Move) -> Option<BTreeMap<u64, Family>> {
    let mut table = table.clone();
    let family = table.get_mut(&one.chunk)?;
    family.homes.retain(|home| Some(*home) != one.from);
    family.homes.extend(one.to);
    family.homes.sort_unstable();
    family.homes.dedup();
    family.pinned = true;
    (family.homes.len() <= MAX_HOMES).then_some(table)
}
