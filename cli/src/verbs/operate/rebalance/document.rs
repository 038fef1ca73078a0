//! A plan as a document: names in place of ids, so that people can read it and another day's fleet is not
//! mistaken for the one that it was made for.

use std::collections::BTreeMap;
use std::path::Path;

use forebay_control_client::Facts;
use forebay_proto::wire::control::Planned;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{ClusterId, Family, WorkerId};
use serde::{Deserialize, Serialize};

use crate::exit::{CliError, Exit};
use crate::output::table;

/// Largest plan file that is read.
const MAX_BYTES: u64 = 4 << 20;

/// The busiest is busier than the mean by no more than this: nobody calls that uneven.
const EVEN: f64 = 0.1;

/// What a rebalance would move, and what it would be good for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) schema_version: u32,
    pub(super) cluster_id: ClusterId,
    pub(super) pool: String,
    /// Of the facts that it was made from.
    pub(super) revision: u64,
    /// Cell time at which it was made, in milliseconds since 1970.
    pub(super) planned_ms: u64,
    pub(super) moves: Vec<PlannedMove>,
    /// As replayed with the homes as they are.
    pub(super) before: Forecast,
    /// As replayed with the homes as they would be.
    pub(super) after: Forecast,
    /// As it was in truth.
    pub(super) measured: Forecast,
    /// Workers without a record: they are in no forecast.
    pub(super) silent: Vec<String>,
    /// Families that the moves are about.
    pub(super) families: Vec<FamilyRow>,
}

/// One family gets a home, or gives one up, or both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PlannedMove {
    /// The fingerprint that names it, in hexadecimal digits.
    pub(super) family: String,
    pub(super) from: Option<String>,
    pub(super) to: Option<String>,
}

/// What a stretch of arrivals makes of workers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Forecast {
    /// Cached tokens of all prompt tokens, 0 to 1.
    pub(super) hit_ratio: f64,
    /// First tokens in time, 0 to 1.
    pub(super) in_time: f64,
    pub(super) arrivals: u32,
    pub(super) window_ms: u64,
    pub(super) workers: Vec<WorkerLoad>,
}

impl Forecast {
    /// Whether the busiest worker has little more to do than the mean.
    fn is_even(&self) -> bool {
        let loads = self.workers.iter().map(|worker| worker.load);
        let (sum, most) = loads.fold((0.0, 0.0_f64), |(sum, most), load| {
            (sum + load, most.max(load))
        });
        most * self.workers.len() as f64 <= sum * (1.0 + EVEN)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct WorkerLoad {
    pub(super) name: String,
    /// 1: always busy.
    pub(super) load: f64,
    pub(super) arrivals: u32,
}

/// A family as a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FamilyRow {
    pub(super) name: String,
    pub(super) pool: String,
    /// Length of the path that it is.
    pub(super) tokens: u32,
    pub(super) homes: Vec<String>,
    /// Tokens a second that need no prefill where it is held.
    pub(super) saves: u32,
    /// Milliseconds of one worker a second that its requests take.
    pub(super) takes: u32,
    /// Its homes were chosen by a rebalance or a drain.
    pub(super) pinned: bool,
}

/// Names of workers by id.
pub(super) struct Names(BTreeMap<WorkerId, String>);

impl Names {
    pub(super) fn of(facts: &Facts) -> Self {
        let workers = facts.workers.values();
        Self(workers.map(|one| (one.id, one.name.clone())).collect())
    }

    /// Its name; the id of one that was removed.
    pub(super) fn name(&self, id: WorkerId) -> String {
        let name = self.0.get(&id).cloned();
        name.unwrap_or_else(|| id.to_string())
    }

    fn id(&self, name: &str) -> Option<u32> {
        let mut known = self.0.iter();
        known.find(|(_, known)| *known == name).map(|(id, _)| id.0)
    }

    fn some(&self, id: u32) -> Option<String> {
        (id != 0).then(|| self.name(WorkerId(id)))
    }

    pub(super) fn moved(&self, one: &wire::Move) -> PlannedMove {
        PlannedMove {
            family: format!("{:016x}", one.chunk),
            from: self.some(one.from),
            to: self.some(one.to),
        }
    }

    pub(super) fn forecast(&self, told: &wire::Forecast) -> Forecast {
        let workers = told.workers.iter().map(|one| WorkerLoad {
            name: self.name(WorkerId(one.worker)),
            load: f64::from(one.load) / 1e3,
            arrivals: one.arrivals,
        });
        Forecast {
            hit_ratio: f64::from(told.hit_ratio) / 1e3,
            in_time: f64::from(told.in_time) / 1e3,
            arrivals: told.arrivals,
            window_ms: told.window_ms,
            workers: workers.collect(),
        }
    }

    pub(super) fn family(&self, family: &Family) -> FamilyRow {
        FamilyRow {
            name: family.name(),
            pool: family.pool.clone(),
            tokens: family.tokens,
            homes: family.homes.iter().map(|home| self.name(*home)).collect(),
            saves: family.saves,
            takes: family.takes,
            pinned: family.pinned,
        }
    }

    /// The forecast for the wire, without workers that are gone.
    fn told(&self, forecast: &Forecast) -> wire::Forecast {
        let workers = forecast.workers.iter().filter_map(|one| {
            Some(wire::WorkerForecast {
                worker: self.id(&one.name)?,
                load: thousandths(one.load),
                arrivals: one.arrivals,
            })
        });
        wire::Forecast {
            workers: workers.collect(),
            hit_ratio: thousandths(forecast.hit_ratio),
            in_time: thousandths(forecast.in_time),
            arrivals: forecast.arrivals,
            window_ms: forecast.window_ms,
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
pub(super) fn thousandths(share: f64) -> u32 {
    (share * 1e3).round() as u32
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

impl Plan {
    pub(super) fn of(facts: &Facts, pool: &str, planned: &Planned) -> Self {
        let names = Names::of(facts);
        let forecast = |told: &Option<wire::Forecast>| {
            names.forecast(told.as_ref().unwrap_or(&wire::Forecast::default()))
        };
        let families = planned.families.iter().cloned();
        let families = families.filter_map(|family| Family::from_wire(family).ok());
        Self {
            schema_version: 1,
            cluster_id: facts.cluster_id,
            pool: pool.into(),
            revision: planned.revision,
            planned_ms: facts.cell_time.0,
            moves: planned.moves.iter().map(|one| names.moved(one)).collect(),
            before: forecast(&planned.before),
            after: forecast(&planned.after),
            measured: forecast(&planned.measured),
            silent: planned.silent.clone(),
            families: families.map(|family| names.family(&family)).collect(),
        }
    }

    /// The command that carries it out.
    ///
    /// # Errors
    ///
    /// Says what of it is of another cluster, of workers that are gone, or no plan.
    pub(super) fn command(&self, facts: &Facts) -> Result<wire::StartRebalance, CliError> {
        if self.cluster_id != facts.cluster_id {
            let problem = format!(
                "the plan is of cluster {}, and this cluster is {}",
                self.cluster_id, facts.cluster_id
            );
            return Err(CliError::because(Exit::Conflict, problem));
        }
        let names = Names::of(facts);
        let id = |name: &Option<String>| {
            match name {
            None => Ok(0),
            Some(name) => names.id(name).ok_or_else(|| {
                let problem = format!(
                    "worker {name} is not registered any more: plan again with `forebay rebalance plan`"
                );
                CliError::because(Exit::Conflict, problem)
            }),
        }
        };
        let moves = self.moves.iter().map(|one| {
            let chunk = u64::from_str_radix(&one.family, 16);
            let chunk = chunk.map_err(|_| {
                CliError::usage(format!("{} is no family: this is no plan", one.family))
            })?;
            Ok(wire::Move {
                chunk,
                from: id(&one.from)?,
                to: id(&one.to)?,
            })
        });
        Ok(wire::StartRebalance {
            pool: self.pool.clone(),
            moves: moves.collect::<Result<_, CliError>>()?,
            before: Some(names.told(&self.before)),
            after: Some(names.told(&self.after)),
            ..wire::StartRebalance::default()
        })
    }

    pub(super) fn read(path: &Path) -> Result<Self, CliError> {
        let refused = |problem: String| {
            let problem = format!("{}: {problem}", path.display());
            CliError::because(Exit::Usage, problem)
        };
        let metadata = std::fs::metadata(path).map_err(|error| refused(error.to_string()))?;
        if metadata.len() > MAX_BYTES {
            return Err(refused(format!("is larger than {MAX_BYTES} bytes")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| refused(error.to_string()))?;
        let plan: Self =
            serde_json::from_str(&text).map_err(|error| refused(format!("is no plan: {error}")))?;
        if plan.schema_version != 1 {
            let problem = format!("has schema version {}, not 1", plan.schema_version);
            return Err(refused(problem));
        }
        Ok(plan)
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), CliError> {
        let text = serde_json::to_string_pretty(self).expect("strings and numbers serialise");
        std::fs::write(path, text + "\n").map_err(|error| {
            CliError::because(Exit::Failed, format!("{}: {error}", path.display()))
        })
    }

    /// Where it is written when nobody says it.
    pub(super) fn file_name(&self) -> String {
        format!("rebalance-{}-r{}.json", self.pool, self.revision)
    }

    pub(super) fn page(&self) -> String {
        let (before, after) = (&self.before, &self.after);
        if before.arrivals == 0 {
            let pool = &self.pool;
            return format!("pool {pool}: nothing was recorded, so there is nothing to plan from");
        }
        let moves = match (self.moves.is_empty(), before.is_even()) {
            (false, _) => self.moves_page(),
            (true, true) => "already balanced: nothing to move".to_owned(),
            (true, false) => {
                "nothing to move: no home would make the busiest worker less busy".into()
            }
        };
        format!(
            "pool {}: {} requests of the last {} s\n\n{}\n\nhit ratio   {} -> {}\nin time     {} -> {}\n\n{moves}",
            self.pool,
            before.arrivals,
            before.window_ms.div_ceil(1_000),
            compared(before, after),
            percent(before.hit_ratio),
            percent(after.hit_ratio),
            percent(before.in_time),
            percent(after.in_time),
        )
    }

    fn moves_page(&self) -> String {
        let rows = self.moves.iter().enumerate().map(|(at, one)| {
            let known = self.families.iter().find(|known| known.name == one.family);
            [
                (at + 1).to_string(),
                one.family.clone(),
                known.map_or_else(String::new, |known| known.tokens.to_string()),
                one.from.clone().unwrap_or_default(),
                one.to.clone().unwrap_or_default(),
            ]
        });
        table(["MOVE", "FAMILY", "TOKENS", "FROM", "TO"], rows)
    }
}

/// Loads before and after, a worker a row.
fn compared(before: &Forecast, after: &Forecast) -> String {
    let rows = before.workers.iter().map(|worker| {
        let then = after.workers.iter().find(|one| one.name == worker.name);
        [
            worker.name.clone(),
            percent(worker.load),
            then.map_or_else(String::new, |then| percent(then.load)),
            worker.arrivals.to_string(),
            then.map_or_else(String::new, |then| then.arrivals.to_string()),
        ]
    });
    table(["WORKER", "LOAD", "THEN", "REQUESTS", "THEN"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn plan() -> Plan {
        let forecast = |load: f64| Forecast {
            hit_ratio: 0.812,
            in_time: 0.95,
            arrivals: 600,
            window_ms: 300_000,
            workers: vec![WorkerLoad {
                name: "w1".into(),
                load,
                arrivals: 600,
            }],
        };
        Plan {
            schema_version: 1,
            cluster_id: ClusterId([1; 16]),
            pool: "default".into(),
            revision: 90,
            planned_ms: 5,
            moves: vec![PlannedMove {
                family: "000000000000feed".into(),
                from: None,
                to: Some("w2".into()),
            }],
            before: forecast(0.644),
            after: forecast(0.322),
            measured: forecast(0.65),
            silent: vec![],
            families: vec![],
        }
    }

    #[test]
    fn a_plan_that_was_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(plan().file_name());
        assert!(path.ends_with("rebalance-default-r90.json"));
        plan().write(&path).unwrap();
        assert_eq!(Plan::read(&path).unwrap(), plan());
        for (text, says) in [
            ("{}", "is no plan"),
            ("", "is no plan"),
            ("[1]", "is no plan"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Plan::read(&path).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
            assert_eq!(error.exit(), Exit::Usage);
        }
        let other = Plan {
            schema_version: 2,
            ..plan()
        };
        other.write(&path).unwrap();
        assert!(Plan::read(&path).is_err());
        assert!(Plan::read(&dir.path().join("none")).is_err());
    }

    #[test]
    fn a_page_shows_loads_before_and_after_or_says_that_all_is_well() {
        let page = plan().page();
        for part in [
            "64.4 %",
            "32.2 %",
            "81.2 % -> 81.2 %",
            "000000000000feed",
            "w2",
        ] {
            assert!(page.contains(part), "{page}");
        }
        let mut idle = plan();
        idle.moves.clear();
        assert!(idle.page().contains("already balanced"));
        idle.before.workers.push(WorkerLoad {
            name: "w2".into(),
            load: 0.1,
            arrivals: 9,
        });
        assert!(idle.page().contains("no home would make"));
        idle.before.arrivals = 0;
        assert!(idle.page().contains("nothing was recorded"));
    }
}
