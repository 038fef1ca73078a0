//! Verbs that take workers out of service, bring them back and even out their load: which workers, the
//! question before it, and who has applied it.

mod cordon;
mod drain;
mod follow;
mod quarantine;
mod rebalance;
mod report;

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::time::Duration;

use clap::Args;
use forebay_control_client::{ClientError, Done, Facts};
use forebay_proto::Revision;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::control::HeldLeases;
use forebay_proto::wire::fleet::command::Action;
use serde::Serialize;
use tokio::time::Instant;

pub(crate) use cordon::{CordonArgs, UncordonArgs, cordon, uncordon};
pub(crate) use drain::{DrainArgs, run as drain};
pub(crate) use quarantine::{QuarantineArgs, run as quarantine};
pub(crate) use rebalance::{HomesArgs, RebalanceArgs, homes, rebalance_line, run as rebalance};
pub(crate) use report::drain_line;

use super::ask::Asked;
use crate::context::ContextArgs;
use crate::exit::{CliError, Exit};
use crate::output::OutputArgs;

/// A leader that was just elected has not heard how busy workers are: it is asked again for so long.
const HEARING: Duration = Duration::from_secs(3);
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// A balancer that was silent for longer than its lease is not reachable; for longer than this it was
/// taken away.
const LEASE: Duration = Duration::from_secs(3);
const GONE: Duration = Duration::from_secs(60);

/// Which workers.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Workers")]
struct Selection {
    /// Names of workers.
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// All workers of this pool.
    #[arg(long, value_name = "POOL", conflicts_with = "names")]
    pool: Option<String>,
    /// All workers of this zone.
    #[arg(long, value_name = "ZONE", conflicts_with = "names")]
    zone: Option<String>,
    /// All workers with this label, KEY=VALUE; repeated, with all of them.
    #[arg(long = "label", value_name = "KEY=VALUE", conflicts_with = "names", value_parser = label)]
    labels: Vec<(String, String)>,
}

/// What all of these verbs take.
#[derive(Clone, Debug, Args)]
struct ChangeArgs {
    /// Say what would happen, by the same guards, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Do not ask before it.
    #[arg(long, short)]
    yes: bool,
    /// Why, for the audit.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

/// Whether to stay until it is done.
#[derive(Clone, Copy, Debug, Args)]
struct WaitArgs {
    /// Wait until it is done; the default.
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Return as soon as it is agreed.
    #[arg(long, overrides_with = "wait")]
    no_wait: bool,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("is no label, such as rack=b7".into()),
    }
}

impl Selection {
    /// Whether workers are meant by what they are, so that more may be than the operator has in mind.
    const fn is_by_selector(&self) -> bool {
        self.pool.is_some() || self.zone.is_some() || !self.labels.is_empty()
    }

    /// Refuses what means no worker, whoever answers.
    fn check(&self) -> Result<(), CliError> {
        if self.names.is_empty() && !self.is_by_selector() {
            return Err(CliError::usage(
                "no worker is named: give names, or --pool, --zone or --label",
            ));
        }
        Ok(())
    }

    /// The names that are meant; those that were given are judged by the fleet.
    fn names(&self, facts: &Facts) -> Result<Vec<String>, CliError> {
        if !self.names.is_empty() {
            let mut names = self.names.clone();
            names.sort();
            names.dedup();
            return Ok(names);
        }
        let selected = facts.workers.values().filter(|worker| {
            let spec = &worker.spec;
            let has = |(key, value): &(String, String)| spec.labels.get(key) == Some(value);
            !worker.departed
                && self.pool.as_ref().is_none_or(|pool| *pool == spec.pool)
                && self.zone.as_ref().is_none_or(|zone| *zone == spec.zone)
                && self.labels.iter().all(has)
        });
        let names: Vec<String> = selected.map(|worker| worker.name.clone()).collect();
        if names.is_empty() {
            return Err(CliError::because(
                Exit::NotFound,
                "no worker is like that: see `forebay workers --output json`",
            ));
        }
        Ok(names)
    }
}

/// Asks on a terminal whether to go on; without one only `--yes` does.
fn confirm(change: &ChangeArgs, question: &str) -> Result<(), CliError> {
    if change.yes || change.dry_run {
        return Ok(());
    }
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return Err(CliError::usage(format!(
            "{question} There is no terminal to ask at: give --yes, or look first with --dry-run"
        )));
    }
    let _ = write!(std::io::stderr(), "{question} [y/N] ");
    let mut answer = String::new();
    let _ = std::io::stdin().lock().read_line(&mut answer);
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(CliError::because(
        Exit::Failed,
        "not confirmed: nothing was changed",
    ))
}

/// Proposes what takes capacity away, again for as long as the leader is new and has heard nobody.
async fn propose(asked: &Asked, action: &Action, reason: &str) -> Result<Done, CliError> {
    let until = Instant::now() + HEARING.min(asked.timeout);
    loop {
        match asked
            .client
            .propose(action.clone(), reason, asked.timeout)
            .await
        {
            Err(ClientError::Refused(Refusal::CapacityUnknown { .. }))
                if Instant::now() < until =>
            {
                tokio::time::sleep(ASK_AGAIN).await;
            }
            other => return Ok(other?),
        }
    }
}

/// How many balancers work by a revision: information, since the worker's own agent is what counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Balancers {
    total: usize,
    applied: usize,
    unreachable: Vec<Unreachable>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Unreachable {
    name: String,
    silent_ms: u64,
}

impl Balancers {
    fn of(held: &HeldLeases, revision: Revision) -> Self {
        let ms = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let known = held
            .balancers
            .iter()
            .filter(|one| one.heard_ms.is_some_and(|heard| heard < ms(GONE)));
        let (there, silent): (Vec<_>, Vec<_>) =
            known.partition(|one| one.heard_ms.is_some_and(|heard| heard < ms(LEASE)));
        let applied = there
            .iter()
            .filter(|one| one.applied_revision >= revision.0);
        Self {
            total: there.len() + silent.len(),
            applied: applied.count(),
            unreachable: silent
                .into_iter()
                .map(|one| Unreachable {
                    name: one.name.clone(),
                    silent_ms: one.heard_ms.unwrap_or_default(),
                })
                .collect(),
        }
    }

    /// Such as `balancers 2/3 applied, b3 unreachable 4 s`.
    fn line(&self) -> String {
        let mut line = format!("balancers {}/{} applied", self.applied, self.total);
        for one in &self.unreachable {
            line += &format!(", {} unreachable {} s", one.name, one.silent_ms / 1_000);
        }
        line
    }
}

/// Who of the balancers has it; nothing where the leader cannot say.
async fn balancers(asked: &Asked, revision: Revision) -> Option<Balancers> {
    let held = asked.client.holders(&[], asked.timeout).await.ok()?;
    Some(Balancers::of(&held, revision))
}

/// Names in a sentence, not too many.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>();
    let more = names.len().saturating_sub(SHOWN);
    if more == 0 {
        shown.join(", ")
    } else {
        format!("{} and {more} more", shown.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use forebay_proto::wire::control::Holder;

    use super::*;

    #[test]
    fn a_balancer_counts_while_it_is_heard_and_is_named_for_a_minute_after() {
        let holder = |name: &str, heard_ms, applied_revision| Holder {
            name: name.into(),
            heard_ms,
            applied_revision,
            work: None,
        };
        let held = HeldLeases {
            agents: vec![],
            balancers: vec![
                holder("b1", Some(500), 812),
                holder("b2", Some(900), 811),
                holder("b3", Some(4_200), 812),
                holder("b4", Some(3_600_000), 700),
                holder("b5", None, 0),
            ],
        };
        let balancers = Balancers::of(&held, Revision(812));
        assert_eq!(
            balancers.line(),
            "balancers 1/3 applied, b3 unreachable 4 s"
        );
    }

    #[test]
    fn a_label_has_a_key_and_a_value() {
        assert_eq!(label("rack=b7"), Ok(("rack".into(), "b7".into())));
        assert_eq!(label("rack="), Ok(("rack".into(), String::new())));
        assert!(label("rack").is_err() && label("=b7").is_err());
    }

    #[test]
    fn many_names_are_not_all_said() {
        let names: Vec<String> = (0..10).map(|i| format!("w{i}")).collect();
        assert_eq!(listed(&names[..2]), "w0, w1");
        assert!(listed(&names).ends_with("w7 and 2 more"));
    }
}
