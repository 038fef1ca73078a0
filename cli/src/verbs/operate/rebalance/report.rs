//! A rebalance as a result: for people in a line, for programs as a document.

use forebay_control_client::Facts;
use forebay_proto::{Millis, Rebalance, RebalancePhase};
use serde::Serialize;

use super::document::{FamilyRow, Forecast, Names, PlannedMove};
use crate::output::table;

/// A rebalance as a result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Report {
    schema_version: u32,
    pub(super) id: String,
    pool: String,
    /// moving, done, stopped or cancelled.
    pub(super) state: &'static str,
    /// Why it stopped by itself; else empty.
    pub(super) stopped: String,
    /// Moves that are made.
    done: u32,
    moves: Vec<PlannedMove>,
    interval_ms: u32,
    /// It stops when a smaller share of first tokens is in time; 0: it does not.
    stop_below: f64,
    began_ms: u64,
    /// From its beginning to its end, in cell time.
    took_ms: Option<u64>,
    actor: String,
    reason: String,
    before: Forecast,
    /// As predicted.
    pub(super) after: Forecast,
    /// After all moves, over some time; absent: not looked at.
    pub(super) measured: Option<Forecast>,
}

impl Report {
    pub(super) fn of(facts: &Facts, rebalance: &Rebalance) -> Self {
        let names = Names::of(facts);
        let took = |ended: Millis| ended.0.saturating_sub(rebalance.began.0);
        let moves = rebalance.moves.iter().map(|one| one.to_wire());
        Self {
            schema_version: 1,
            id: rebalance.id.to_string(),
            pool: rebalance.pool.clone(),
            state: rebalance.phase.name(),
            stopped: rebalance.stopped.clone(),
            done: rebalance.done,
            moves: moves.map(|one| names.moved(&one)).collect(),
            interval_ms: rebalance.interval_ms,
            stop_below: f64::from(rebalance.stop_below) / 1e3,
            began_ms: rebalance.began.0,
            took_ms: rebalance.ended.map(took),
            actor: rebalance.actor.clone(),
            reason: rebalance.reason.clone(),
            before: names.forecast(&rebalance.before.to_wire()),
            after: names.forecast(&rebalance.after.to_wire()),
            measured: None,
        }
    }

    pub(super) fn pool(&self) -> &str {
        &self.pool
    }

    /// Such as `r812 moving: 2 of 5 moves in pool default`.
    pub(super) fn line(&self) -> String {
        let moves = self.moves.len();
        let why = if self.stopped.is_empty() {
            String::new()
        } else {
            format!(" ({})", self.stopped)
        };
        format!(
            "{} {}: {} of {moves} moves in pool {}{why}",
            self.id, self.state, self.done, self.pool
        )
    }

    /// The moves from `after` on that are made, in words.
    pub(super) fn made(&self, after: u32) -> Vec<String> {
        let made = self.moves.iter().enumerate().take(self.done as usize);
        made.skip(after as usize)
            .map(|(at, one)| {
                let end = |word: &str, name: &Option<String>| {
                    name.as_ref()
                        .map_or_else(String::new, |name| format!(" {word} {name}"))
                };
                format!(
                    "move {} of {}: family {}{}{}",
                    at + 1,
                    self.moves.len(),
                    one.family,
                    end("from", &one.from),
                    end("to", &one.to)
                )
            })
            .collect()
    }
}

/// A rebalance in a line.
pub(crate) fn rebalance_line(rebalance: &Rebalance) -> String {
    let stopped = match rebalance.phase {
        RebalancePhase::Stopped => format!(" ({})", rebalance.stopped),
        RebalancePhase::Moving | RebalancePhase::Done | RebalancePhase::Cancelled => String::new(),
    };
    format!(
        "{} {}: {} of {} moves in pool {}{stopped}",
        rebalance.id,
        rebalance.phase.name(),
        rebalance.done,
        rebalance.moves.len(),
        rebalance.pool
    )
}

pub(super) fn page(rebalances: &[Report]) -> String {
    if rebalances.is_empty() {
        return "no rebalances".into();
    }
    let rows = rebalances.iter().map(|one| {
        let took = one.took_ms.map(|ms| format!("{} s", ms.div_ceil(1_000)));
        [
            one.id.clone(),
            one.pool.clone(),
            one.state.to_owned(),
            format!("{}/{}", one.done, one.moves.len()),
            took.unwrap_or_default(),
            one.actor.clone(),
            one.reason.clone(),
            one.stopped.clone(),
        ]
    });
    table(
        [
            "REBALANCE",
            "POOL",
            "STATE",
            "MOVED",
            "AFTER",
            "ACTOR",
            "REASON",
            "STOPPED BECAUSE",
        ],
        rows,
    )
}

/// Families, the most asked for first.
pub(super) fn families(facts: &Facts, pool: Option<&str>) -> Vec<FamilyRow> {
    let names = Names::of(facts);
    let families = facts.families.values();
    let families = families.filter(|family| pool.is_none_or(|pool| pool == family.pool));
    let mut rows: Vec<FamilyRow> = families.map(|family| names.family(family)).collect();
    rows.sort_by(|one, other| {
        let by_load = other.takes.cmp(&one.takes);
        by_load.then_with(|| one.name.cmp(&other.name))
    });
    rows
}

pub(super) fn families_page(families: &[FamilyRow]) -> String {
    if families.is_empty() {
        return "no families have homes".into();
    }
    let rows = families.iter().map(|one| {
        [
            one.name.clone(),
            one.pool.clone(),
            one.tokens.to_string(),
            one.homes.join(","),
            format!("{:.1} %", f64::from(one.takes) / 10.0),
            one.saves.to_string(),
            if one.pinned { "yes" } else { "no" }.to_owned(),
        ]
    });
    table(
        [
            "FAMILY", "POOL", "TOKENS", "HOMES", "LOAD", "SAVES", "PINNED",
        ],
        rows,
    )
}
