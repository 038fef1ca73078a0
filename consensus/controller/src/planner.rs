//! Plans of rebalances, for the control node: from its words to the scheduler's, and back.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use forebay_consensus::server::{Candidate, Planner, Question};
use forebay_proto::wire::control;
use forebay_proto::wire::fleet::Forecast;
use forebay_proto::wire::work::LatencyModel;
use forebay_proto::{Family, Millis, WorkerId};
use forebay_scheduler::model::Profile;
use forebay_scheduler::rebalance::{Record, Situation, plan};

/// Makes plans by replaying what agents recorded.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rebalancer;

impl Planner for Rebalancer {
    #[allow(clippy::disallowed_methods)] // it says how long it took
    fn plan(&self, question: Question) -> control::Planned {
        let (began, pool) = (Instant::now(), question.pool.clone());
        let planned = planned(question);
        tracing::info!(
            pool,
            moves = planned.moves.len(),
            took_ms = began.elapsed().as_millis(),
            "a rebalance was planned"
        );
        planned
    }
}

fn planned(question: Question) -> control::Planned {
    let window = window(&question);
    let holders = holders(&question.workers);
    let in_time = in_time(&question.workers);
    let families = question.families.into_iter();
    let families: BTreeMap<u64, Family> = families
        .filter_map(|family| Family::from_wire(family).ok())
        .map(|family| (family.chunk, family))
        .collect();
    let records = question.workers.into_iter();
    let records: Vec<Record> = records.filter_map(|one| record(one, window)).collect();
    let situation = Situation {
        families: &families,
        holders: &holders,
        records: &records,
        window,
    };
    let most = usize::try_from(question.most_moves).unwrap_or(usize::MAX);
    let planned = plan(&situation, most);
    control::Planned {
        moves: planned.moves.iter().map(|one| one.to_wire()).collect(),
        before: Some(planned.before.to_wire()),
        after: Some(planned.after.to_wire()),
        // Records do not say when a first token came; agents say how many were in time.
        measured: Some(Forecast {
            in_time,
            ..planned.measured.to_wire()
        }),
        ..control::Planned::default()
    }
}

/// As far back as was asked for, or as far as any record goes. Who came later had nothing to do before.
fn window(question: &Question) -> Millis {
    let records = question
        .workers
        .iter()
        .filter_map(|one| one.record.as_ref());
    let longest = records.map(|record| record.window_ms).max().unwrap_or(0);
    Millis(question.window.0.min(longest).max(1))
}

/// First tokens in time, as agents said lately, in thousandths; all of none are.
fn in_time(workers: &[Candidate]) -> u32 {
    let heats = workers.iter().filter_map(|one| one.heat.as_ref());
    let (all, kept) = heats.fold((0_u64, 0_u64), |(all, kept), heat| {
        let (first, in_time) = (heat.first_tokens, heat.in_time);
        (all + u64::from(first), kept + u64::from(in_time))
    });
    let share = (kept * 1_000).checked_div(all).unwrap_or(1_000);
    u32::try_from(share.min(1_000)).unwrap_or(1_000)
}

/// Who says that it holds which family.
fn holders(workers: &[Candidate]) -> BTreeMap<u64, BTreeSet<WorkerId>> {
    let mut holders: BTreeMap<u64, BTreeSet<_>> = BTreeMap::new();
    for one in workers {
        let families = one.heat.iter().flat_map(|heat| &heat.families);
        for family in families.filter(|family| family.held) {
            holders.entry(family.chunk).or_default().insert(one.worker);
        }
    }
    holders
}

/// `None` of who recorded nothing, or whose speed is none: it can be neither relieved nor relied on.
#[allow(clippy::cast_possible_truncation)] // as a report carries it
fn record(one: Candidate, window: Millis) -> Option<Record> {
    let told = one.record?;
    let model = told.model?;
    let single = |value: f64| value as f32;
    let profile = Profile::from_wire(&LatencyModel {
        floor_ms: single(model.floor_ms),
        base_ms: single(model.base_ms),
        token_us: single(model.token_ms * 1e3),
        context_ns: single(model.context_ms * 1e6),
        pair_ps: single(model.pair_ms * 1e9),
        chunk_tokens: model.chunk_tokens,
    })?;
    let mut arrivals = told.arrivals;
    arrivals.retain(|arrival| arrival.ms_ago <= window.0);
    Some(Record {
        worker: one.worker,
        profile,
        one_in: told.one_in.max(1),
        arrivals,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const TOKENS: u32 = 8_192;

    fn model() -> control::Model {
        let profile = Profile::default();
        control::Model {
            floor_ms: profile.floor_ms,
            base_ms: profile.base_ms,
            token_ms: profile.token_ms,
            context_ms: profile.context_ms,
            pair_ms: profile.pair_ms,
            chunk_tokens: profile.chunk_tokens,
        }
    }

    /// Two requests a second for five minutes.
    fn arrivals() -> Vec<control::Arrival> {
        (0..600)
            .map(|at| control::Arrival {
                ms_ago: at * 500,
                family: 7,
                family_tokens: TOKENS,
                conversation: at + 1,
                prompt_tokens: TOKENS + 1_500,
                cached_tokens: TOKENS,
                output_tokens: 200,
                ttft_target_ms: 3_000,
            })
            .collect()
    }

    fn candidate(id: u32, record: Option<control::Arrivals>) -> Candidate {
        let held = control::FamilyHeat {
            chunk: 7,
            held: id == 1,
            ..control::FamilyHeat::default()
        };
        Candidate {
            worker: WorkerId(id),
            name: format!("w{id}"),
            heat: Some(Arc::new(control::Heat {
                families: vec![held],
                ..control::Heat::default()
            })),
            record,
        }
    }

    fn told(arrivals: Vec<control::Arrival>, window_ms: u64) -> control::Arrivals {
        control::Arrivals {
            arrivals,
            one_in: 1,
            window_ms,
            model: Some(model()),
            ..control::Arrivals::default()
        }
    }

    fn question(workers: Vec<Candidate>) -> Question {
        let family = Family {
            pool: "p".into(),
            chunk: 7,
            key_epoch: 1,
            chunks: 128,
            tokens: TOKENS,
            homes: vec![WorkerId(1)],
            saves: 1,
            takes: 1,
            pinned: false,
        };
        Question {
            pool: "p".into(),
            window: Millis(300_000),
            most_moves: 8,
            families: vec![family.to_wire()],
            workers,
        }
    }

    fn loads(forecast: Option<&forebay_proto::wire::fleet::Forecast>) -> Vec<u32> {
        let workers = &forecast.unwrap().workers;
        workers.iter().map(|worker| worker.load).collect()
    }

    #[test]
    fn a_hot_family_moves_to_workers_that_recorded_something_and_no_others() {
        let mut workers = vec![candidate(1, Some(told(arrivals(), 300_000)))];
        workers.push(candidate(2, Some(told(vec![], 300_000))));
        workers.push(candidate(3, None));
        let planned = planned(question(workers));
        let targets: Vec<u32> = planned.moves.iter().map(|one| one.to).collect();
        assert_eq!(targets, [2]);
        let (before, after) = (
            loads(planned.before.as_ref()),
            loads(planned.after.as_ref()),
        );
        assert!(
            2 * before[0] > 3 * after[0].max(after[1]),
            "{before:?} {after:?}"
        );
        let window_ms = planned.measured.unwrap().window_ms;
        assert!((290_000..=300_000).contains(&window_ms), "{window_ms}");
    }

    #[test]
    fn what_was_in_time_is_what_agents_said() {
        let said = |first_tokens, in_time| {
            let heat = control::Heat {
                first_tokens,
                in_time,
                ..control::Heat::default()
            };
            Candidate {
                heat: Some(Arc::new(heat)),
                ..candidate(1, Some(told(arrivals(), 300_000)))
            }
        };
        let measured = |workers| planned(question(workers)).measured.unwrap().in_time;
        assert_eq!(measured(vec![said(10, 8), said(10, 9)]), 850);
        assert_eq!(measured(vec![said(0, 0)]), 1_000);
    }

    #[test]
    fn loads_are_of_the_time_that_records_cover() {
        let of = |window_ms: u64| {
            let mut recorded = arrivals();
            recorded.retain(|one| one.ms_ago < window_ms);
            let workers = vec![candidate(1, Some(told(recorded, window_ms)))];
            loads(planned(question(workers)).measured.as_ref())[0]
        };
        let (short, long) = (f64::from(of(60_000)), f64::from(of(300_000)));
        assert!((short / long - 1.0).abs() < 0.05, "{short} {long}");
    }

    #[test]
    fn who_says_no_speed_is_left_out() {
        let mut slow = told(arrivals(), 300_000);
        slow.model = Some(control::Model {
            token_ms: f64::NAN,
            ..model()
        });
        let planned = planned(question(vec![candidate(1, Some(slow))]));
        assert_eq!(
            (planned.moves.len(), loads(planned.before.as_ref())),
            (0, vec![])
        );
    }
}
