//! A rebalance as it goes on, how it ends, and whether it was worth what was predicted.

use std::time::Duration;

use forebay_control_client::Facts;
use forebay_proto::{Millis, Rebalance, RebalanceId, RebalancePhase};
use serde::Serialize;
use tokio::time::Instant;

use super::document::{Names, percent};
use super::report::Report;
use crate::exit::{CliError, Exit};
use crate::output::{Output, OutputArgs, line, say, table};
use crate::verbs::ask::Asked;

/// Between two looks at the clock.
const LOOK: Duration = Duration::from_secs(1);
/// Without news of the control plane for longer, nobody can say how it goes.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a plan may take: agents are asked first.
pub(super) const PLANNING: Duration = Duration::from_secs(10);

/// One line of `--output jsonl` before the result.
#[derive(Serialize)]
struct Event<'a> {
    event: &'static str,
    id: &'a str,
    what: &'a str,
}

/// How long to stay.
pub(super) struct Stay {
    /// Not longer than this.
    pub(super) at_most: Option<Duration>,
    /// So long after the last move, to measure what came of it; none: not at all.
    pub(super) measure: Option<Duration>,
}

/// Follows a rebalance until it is over, or not waited for any more.
pub(super) async fn follow(
    asked: &Asked,
    id: RebalanceId,
    stay: Stay,
    output: OutputArgs,
) -> Result<(), CliError> {
    let began = Instant::now();
    let mut watching = asked.client.spawn_watch(None);
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut heard = began;
    let mut told = 0;
    let mut last: Option<Report> = None;
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            changed = watching.facts.changed() => changed.map_err(|_| gone(id))?,
            _ = looks.tick() => {}
            _ = &mut interrupted => return Err(detached(id, last, "detached", output)),
        }
        let facts = watching.facts.borrow_and_update().clone();
        if let Some(facts) = facts {
            match facts.rebalances.get(&id) {
                Some(rebalance) => {
                    let report = Report::of(&facts, rebalance);
                    tell(&report, told, output);
                    told = rebalance.done;
                    if !rebalance.is_active() {
                        return over(asked, &facts, rebalance, &stay, output).await;
                    }
                    last = Some(report);
                }
                // The node that is watched is behind; patience ends all the same.
                None if facts.revision.0 < id.0 => {}
                None => return Err(gone(id)),
            }
        }
        if let Some(limit) = stay.at_most
            && began.elapsed() >= limit
        {
            let what = format!("not over after {} s", limit.as_secs());
            return Err(detached(id, last, &what, output));
        }
        let fresh = watching.status.borrow().fresh_at;
        heard = heard.max(fresh.unwrap_or(began));
        if heard.elapsed() > PATIENCE.max(asked.timeout) {
            let silent = heard.elapsed().as_secs();
            return Err(CliError::because(
                Exit::Unreachable,
                format!(
                    "nothing was heard of the control plane for {silent} s; {id} goes on as soon as it has a quorum: forebay rebalance status"
                ),
            ));
        }
    }
}

/// Says the moves that were made since.
fn tell(report: &Report, told: u32, output: OutputArgs) {
    for made in report.made(told) {
        say(&format!("{} {made}", report.id));
        if output.output == Output::Jsonl {
            line(&Event {
                event: "move",
                id: &report.id,
                what: &made,
            });
        }
    }
}

async fn over(
    asked: &Asked,
    facts: &Facts,
    rebalance: &Rebalance,
    stay: &Stay,
    output: OutputArgs,
) -> Result<(), CliError> {
    let mut report = Report::of(facts, rebalance);
    let id = rebalance.id;
    let ended = match rebalance.phase {
        RebalancePhase::Moving | RebalancePhase::Done => {
            if let Some(time) = stay.measure {
                measure(asked, facts, &mut report, time).await;
            }
            Ok(())
        }
        RebalancePhase::Stopped => Err(CliError::because(
            Exit::Failed,
            format!(
                "{id} stopped by itself: {}; what was moved stays",
                rebalance.stopped
            ),
        )),
        RebalancePhase::Cancelled => Err(CliError::because(
            Exit::Conflict,
            format!("{id} was called off; what was moved stays"),
        )),
    };
    output.print(&report, || finished(&report));
    ended
}

/// Looks at what came of it. That this fails changes nothing of the rebalance.
async fn measure(asked: &Asked, facts: &Facts, report: &mut Report, time: Duration) {
    let rebalance = &report.id;
    say(&format!(
        "{rebalance} all moves are made; measuring for {} s",
        time.as_secs()
    ));
    tokio::time::sleep(time).await;
    let window = Millis::from_duration(time);
    let planned = asked.client.plan(report.pool(), window, 1, PLANNING).await;
    match planned {
        Ok(planned) => {
            let told = planned.measured.unwrap_or_default();
            report.measured = Some(Names::of(facts).forecast(&told));
        }
        Err(error) => say(&format!("what came of it could not be measured: {error}")),
    }
}

fn finished(report: &Report) -> String {
    let Some(measured) = &report.measured else {
        return report.line();
    };
    let predicted = &report.after;
    let rows = predicted.workers.iter().map(|worker| {
        let now = measured.workers.iter().find(|one| one.name == worker.name);
        [
            worker.name.clone(),
            percent(worker.load),
            now.map_or_else(String::new, |now| percent(now.load)),
        ]
    });
    format!(
        "{}\n\n{}\n\nhit ratio   {} predicted, {} measured\nin time     {} predicted, {} measured",
        report.line(),
        table(["WORKER", "PREDICTED", "MEASURED"], rows),
        percent(predicted.hit_ratio),
        percent(measured.hit_ratio),
        percent(predicted.in_time),
        percent(measured.in_time),
    )
}

fn detached(id: RebalanceId, last: Option<Report>, what: &str, output: OutputArgs) -> CliError {
    if let Some(report) = last {
        output.print(&report, || report.line());
    }
    CliError::because(
        Exit::TimedOut,
        format!(
            "{what}: {id} goes on without this command; forebay rebalance status shows it, forebay rebalance cancel {id} calls it off"
        ),
    )
}

fn gone(id: RebalanceId) -> CliError {
    CliError::because(
        Exit::NotFound,
        format!("there is no rebalance {id} any more: see `forebay rebalance status`"),
    )
}
