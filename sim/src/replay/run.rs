//! The loop of a replay: sends what is due, counts what comes back.
#![allow(clippy::disallowed_methods)] // a rim: it keeps time with tokio's clock

use super::client::{Client, Target};
use super::plan::{Options, Plan, Planned};
use super::reply::Fault;
use super::report::{OneRequest, Outcome, Report, Tally};
use super::{Config, Progress, ReplayError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// Replays a trace to its end. `progress` is called ten times a second and once at the end;
/// dropping the future cancels what is in flight.
///
/// # Errors
///
/// Only what keeps the replay from starting: errors of requests are in the report.
pub async fn run(config: Config, progress: impl FnMut(Progress)) -> Result<Report, ReplayError> {
    run_each(config, progress, |_| {}).await
}

/// As [`run`]; `each` is told of every request when it is over.
///
/// # Errors
///
/// As [`run`].
pub async fn run_each(
    config: Config,
    mut progress: impl FnMut(Progress),
    mut each: impl FnMut(OneRequest),
) -> Result<Report, ReplayError> {
    let targets = checked_targets(&config)?;
    let client = Client::new(config.api_key.as_ref(), config.timeout)?;
    let model = match config.model {
        Some(model) => model,
        None => client.first_model(&targets[0]).await?,
    };
    let options = Options {
        model,
        speed: config.speed,
        limit: config.limit,
        jitter: config.jitter,
        endpoint: config.endpoint,
        verify: config.verify,
    };
    let plan = Plan::new(config.trace, options);
    let total = plan.len() as u64;
    let mut making = JoinSet::new();
    let mut plan = made_ahead(&mut making, plan);
    let mut next = plan.recv().await;
    if next.is_none() {
        return Err(ReplayError::NoRequests);
    }

    let mut tally = Tally::new();
    let mut in_flight = JoinSet::new();
    let start = Instant::now();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    while next.is_some() || !in_flight.is_empty() {
        let due = start.checked_add(next.as_ref().map_or(Duration::ZERO, |next| next.start));
        let due = due.unwrap_or(start + FAR);
        tokio::select! {
            () = sleep_until(due), if next.is_some() => {
                let Some(planned) = next.take() else { continue };
                if in_flight.len() < config.max_in_flight {
                    let target = targets[planned.index as usize % targets.len()].clone();
                    in_flight.spawn(client.clone().send(target, planned, due));
                } else {
                    let outcome = not_sent(planned.index, planned.start);
                    each(outcome.line());
                    tally.record(outcome);
                }
                next = plan.recv().await;
            }
            Some(joined) = in_flight.join_next(), if !in_flight.is_empty() => {
                let outcome = outcome(joined);
                each(outcome.line());
                tally.record(outcome);
            }
            _ = ticks.tick() => progress(now(&tally, total, in_flight.len(), start)),
        }
    }
    progress(now(&tally, total, 0, start));
    Ok(tally.report(start.elapsed()))
}

fn checked_targets(config: &Config) -> Result<Vec<Target>, ReplayError> {
    if config.targets.is_empty() {
        return Err(ReplayError::NoTarget);
    }
    if !(config.speed.is_finite() && config.speed > 0.0) {
        return Err(ReplayError::Speed(config.speed));
    }
    if config.max_in_flight == 0 {
        return Err(ReplayError::NoneInFlight);
    }
    config
        .targets
        .iter()
        .map(|target| Target::parse(target, config.endpoint))
        .collect()
}

/// Makes bodies ahead of time on another thread: a long one takes longer than may pass between
/// two requests.
fn made_ahead(making: &mut JoinSet<()>, plan: Plan) -> mpsc::Receiver<Planned> {
    let (sender, receiver) = mpsc::channel(MADE_AHEAD);
    making.spawn_blocking(move || {
        for planned in plan {
            if sender.blocking_send(planned).is_err() {
                return; // the replay was dropped
            }
        }
    });
    receiver
}

fn outcome(joined: Result<Outcome, JoinError>) -> Outcome {
    match joined {
        Ok(outcome) => outcome,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => not_sent(0, Duration::ZERO), // only a runtime that shuts down cancels what is in flight
        },
    }
}

fn not_sent(index: u64, intended: Duration) -> Outcome {
    Outcome {
        index,
        intended,
        lag: None,
        worker: None,
        attempts: None,
        result: Err(Fault::ours(None, "in_flight_limit")),
    }
}

fn now(tally: &Tally, total: u64, in_flight: usize, start: Instant) -> Progress {
    Progress {
        total,
        done: tally.requests(),
        in_flight: in_flight as u64,
        errors: tally.errors(),
        elapsed: start.elapsed(),
    }
}

const TICK: Duration = Duration::from_millis(100);
/// Bodies of tens of KiB as a rule, of a few MiB at worst.
const MADE_AHEAD: usize = 32;
const FAR: Duration = Duration::from_secs(10 * 366 * 24 * 3600);
