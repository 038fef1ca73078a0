//! `forebay raft check-perf`: whether the control plane keeps up with a rate of writes.
//!
//! What is written are entries of the log that no version takes for a command: they cost what any other
//! costs, and change nothing. Nothing has to be cleaned up.

use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tokio::time::Instant;

use crate::context::ContextArgs;
use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, say, table};
use crate::verbs::ask::Asked;

/// Options of `forebay raft check-perf`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay raft check-perf\n  forebay raft check-perf --rate 200 --seconds 60 --output json\n\nPASS or FAIL: at least 90 % of the rate is agreed on without an error, and the slowest of a hundred takes no longer than --p99-ms, as this command sees it. Exits with 1 on FAIL. Changes of the fleet go on meanwhile and share the disk with it; no fact and no entry of the audit comes of it."
)]
pub(crate) struct CheckPerfArgs {
    /// Writes a second.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: u32,
    /// For how long.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Bytes of one write.
    #[arg(long, value_name = "BYTES", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    bytes: u32,
    /// Milliseconds that the slowest of a hundred may take.
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    p99_ms: u32,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

/// Share of the rate that has to be reached, in percent.
const LEAST_PERCENT: u64 = 90;
/// Writes under way at a time; at that many the next one waits.
const MOST_UNDER_WAY: usize = 128;

#[derive(Debug, Serialize)]
struct Report {
    schema_version: u32,
    pass: bool,
    asked_per_second: u32,
    reached_per_second: f64,
    writes: usize,
    failed: usize,
    bytes: u32,
    /// As this command saw it.
    seen: Quantiles,
    /// From the leader's proposal to its commit: its disk, and that of the fastest others.
    committed: Quantiles,
    problems: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Quantiles {
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

impl Quantiles {
    fn of(mut taken: Vec<Duration>) -> Self {
        taken.sort_unstable();
        let at = |percent: usize| {
            let position = (taken.len() * percent).div_ceil(100).saturating_sub(1);
            taken.get(position).map_or(0.0, |one| ms(*one))
        };
        Self {
            p50_ms: at(50),
            p99_ms: at(99),
            max_ms: at(100),
        }
    }
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Runs `forebay raft check-perf`.
pub(super) fn run(args: &CheckPerfArgs) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        // The first write finds the leader and says what is wrong; it is not counted.
        asked.client.measure(args.bytes, asked.timeout).await?;
        say(&format!(
            "{} writes of {} bytes a second for {} s",
            args.rate, args.bytes, args.seconds
        ));
        let report = measure(args, &asked).await;
        args.output.print(&report, || page(&report));
        if report.pass {
            return Ok(());
        }
        Err(CliError::because(Exit::Failed, report.problems.join("; ")))
    })
}

async fn measure(args: &CheckPerfArgs, asked: &Asked) -> Report {
    let mut under_way = tokio::task::JoinSet::new();
    let (mut seen, mut committed, mut failed) = (vec![], vec![], 0);
    let mut problem = None;
    let mut take = |done: Result<Result<(Duration, Duration), String>, _>| match done {
        Ok(Ok((whole, commit))) => {
            seen.push(whole);
            committed.push(commit);
        }
        Ok(Err(error)) => {
            failed += 1;
            problem.get_or_insert(error);
        }
        Err(_) => failed += 1,
    };
    let began = Instant::now();
    for number in 0..args.rate * args.seconds {
        let due = began + Duration::from_secs(1) * number / args.rate;
        while under_way.len() >= MOST_UNDER_WAY || Instant::now() < due {
            tokio::select! {
                Some(done) = under_way.join_next() => take(done),
                () = tokio::time::sleep_until(due), if under_way.len() < MOST_UNDER_WAY => {}
            }
        }
        let (client, bytes, timeout) = (asked.client.clone(), args.bytes, asked.timeout);
        under_way.spawn(async move {
            let asked_at = Instant::now();
            let commit = client.measure(bytes, timeout).await;
            commit
                .map(|commit| (asked_at.elapsed(), commit))
                .map_err(|error| error.to_string())
        });
    }
    while let Some(done) = under_way.join_next().await {
        take(done);
    }
    verdict(args, began.elapsed(), (seen, committed), (failed, problem))
}

fn verdict(
    args: &CheckPerfArgs,
    took: Duration,
    (seen, committed): (Vec<Duration>, Vec<Duration>),
    (failed, problem): (usize, Option<String>),
) -> Report {
    let writes = seen.len();
    // The last ones are asked at the end of the time and answered after it.
    let took = took.as_secs_f64().max(f64::from(args.seconds));
    let reached = writes as f64 / took;
    let seen = Quantiles::of(seen);
    let mut problems = vec![];
    if reached * 100.0 < f64::from(args.rate) * LEAST_PERCENT as f64 {
        problems.push(format!(
            "{reached:.1} writes a second, {LEAST_PERCENT} % of {} are needed",
            args.rate
        ));
    }
    if seen.p99_ms > f64::from(args.p99_ms) {
        problems.push(format!(
            "the slowest of a hundred takes {:.1} ms, {} ms are allowed: look at the disks of the control nodes and the network between",
            seen.p99_ms, args.p99_ms
        ));
    }
    if failed > 0 {
        let first = problem.map_or_else(String::new, |problem| format!(": {problem}"));
        problems.push(format!("{failed} writes failed{first}"));
    }
    Report {
        schema_version: 1,
        pass: problems.is_empty(),
        asked_per_second: args.rate,
        reached_per_second: (reached * 10.0).round() / 10.0,
        writes,
        failed,
        bytes: args.bytes,
        seen,
        committed: Quantiles::of(committed),
        problems,
    }
}

fn page(report: &Report) -> String {
    let row = |name: &str, of: Quantiles| {
        let text = |ms: f64| format!("{ms:.1} ms");
        [
            name.to_owned(),
            text(of.p50_ms),
            text(of.p99_ms),
            text(of.max_ms),
        ]
    };
    let rows = [row("seen", report.seen), row("committed", report.committed)];
    format!(
        "{}  {:.1} of {} writes a second, {} failed\n\n{}",
        if report.pass { "PASS" } else { "FAIL" },
        report.reached_per_second,
        report.asked_per_second,
        report.failed,
        table(["LATENCY", "P50", "P99", "MAX"], rows)
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: CheckPerfArgs,
    }

    fn check(writes: usize, each: u64, took: u64, failed: usize, says: &[&str]) {
        let line = Line::parse_from(["x", "--rate", "100", "--seconds", "10"]);
        let taken = vec![Duration::from_millis(each); writes];
        let both = (taken.clone(), taken);
        let report = verdict(&line.args, Duration::from_secs(took), both, (failed, None));
        assert_eq!(report.pass, says.is_empty(), "{report:?}");
        assert_eq!(report.problems.len(), says.len(), "{report:?}");
        for (problem, text) in report.problems.iter().zip(says) {
            assert!(problem.contains(text), "{problem}");
        }
    }

    #[test]
    fn it_passes_when_rate_and_latency_hold_and_says_what_does_not() {
        check(1_000, 5, 10, 0, &[]);
        check(900, 5, 10, 0, &[]);
        check(899, 5, 10, 0, &["89.9 writes a second"]);
        check(1_000, 5, 12, 0, &["83.3 writes a second"]);
        check(1_000, 101, 10, 0, &["101.0 ms"]);
        check(999, 5, 10, 1, &["1 writes failed"]);
        check(0, 0, 10, 1_000, &["0.0 writes", "1000 writes failed"]);
    }

    #[test]
    fn the_slowest_of_a_hundred_is_the_ninety_ninth() {
        let taken = (1..=100).rev().map(Duration::from_millis).collect();
        let quantiles = Quantiles::of(taken);
        assert_eq!(
            (quantiles.p50_ms, quantiles.p99_ms, quantiles.max_ms),
            (50.0, 99.0, 100.0)
        );
        assert_eq!(Quantiles::of(vec![]), Quantiles::default());
    }
}
