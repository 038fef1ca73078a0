//! A drain as it goes on: progress for people, events for programs, and how it ends.

use std::time::Duration;

use forebay_proto::wire::control::HeldLeases;
use forebay_proto::{Drain, DrainId, DrainPhase, OnDeadline};
use serde::Serialize;
use tokio::time::Instant;

use super::listed;
use super::report::Report;
use crate::exit::{CliError, Exit};
use crate::output::{Output, OutputArgs, line, say};
use crate::verbs::ask::Asked;

/// Between two looks at what agents said: they say it once a second.
const LOOK: Duration = Duration::from_secs(1);
/// What stays the same is said again no sooner.
const SAY_AGAIN: Duration = Duration::from_secs(5);
/// When as much is in flight as before for so long, whoever holds it is named.
const STALLED: Duration = Duration::from_secs(15);
/// Without news of the control plane for longer, nobody can say how the drain goes.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is still under way on the workers of a drain, by their agents' newest words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Progress {
    in_flight: u64,
    oldest_s: u64,
    tokens_left: u64,
    eta_s: u64,
    /// Workers that their leader has not heard for ten seconds.
    silent: Vec<String>,
    /// The oldest requests.
    #[serde(skip)]
    ids: Vec<String>,
}

impl Progress {
    fn of(held: &HeldLeases) -> Self {
        let mut progress = Self::default();
        let seconds = |ms: u64| ms.div_ceil(1_000);
        for agent in &held.agents {
            if agent.heard_ms.is_none_or(|ms| ms > 10_000) {
                progress.silent.push(agent.name.clone());
            }
            let Some(work) = &agent.work else { continue };
            progress.in_flight += u64::from(work.in_flight);
            progress.oldest_s = progress.oldest_s.max(seconds(work.oldest_ms));
            progress.tokens_left = progress.tokens_left.saturating_add(work.tokens_left);
            progress.eta_s = progress.eta_s.max(seconds(work.eta_ms));
            let ids = work.oldest.iter();
            progress
                .ids
                .extend(ids.map(|id| format!("{id} on {}", agent.name)));
        }
        progress
    }

    fn line(&self) -> String {
        let mut line = format!(
            "{} in flight, the oldest for {} s",
            self.in_flight, self.oldest_s
        );
        if self.in_flight > 0 && self.tokens_left > 0 {
            line += &format!(", about {} tokens left", self.tokens_left);
        }
        if self.in_flight > 0 && self.eta_s > 0 {
            line += &format!(", done in about {} s", self.eta_s);
        }
        if !self.silent.is_empty() {
            line += &format!("; not heard: {}", listed(&self.silent));
        }
        line
    }
}

/// One line of `--output jsonl` before the result.
#[derive(Serialize)]
struct Event<'a> {
    event: &'static str,
    id: String,
    phase: &'a str,
    #[serde(flatten)]
    progress: &'a Progress,
}

/// What was said last, so that nothing is said twice and a standstill is noticed.
struct Teller {
    said: Option<(&'static str, Progress)>,
    said_at: Instant,
    /// The least that was in flight, and since when.
    least: (u64, Instant),
}

impl Teller {
    fn new(now: Instant) -> Self {
        Self {
            said: None,
            said_at: now,
            least: (u64::MAX, now),
        }
    }

    /// Lines to say now.
    fn tell(&mut self, now: Instant, phase: &'static str, progress: &Progress) -> Vec<String> {
        let mut lines = vec![];
        let news = match &self.said {
            None => true,
            Some((said, _)) if *said != phase => true,
            Some((_, said)) => {
                let changed =
                    said.in_flight != progress.in_flight || said.silent != progress.silent;
                changed || now - self.said_at >= SAY_AGAIN
            }
        };
        if news {
            lines.push(format!("{phase}: {}", progress.line()));
            self.said = Some((phase, progress.clone()));
            self.said_at = now;
        }
        if progress.in_flight < self.least.0 {
            self.least = (progress.in_flight, now);
        } else if progress.in_flight > 0 && now - self.least.1 >= STALLED {
            lines.push(format!(
                "as much is in flight as {} s ago; it is held by {}",
                STALLED.as_secs(),
                if progress.ids.is_empty() {
                    "requests that were not named yet".to_owned()
                } else {
                    listed(&progress.ids)
                }
            ));
            self.least.1 = now;
        }
        lines
    }
}

/// Follows a drain until it is over, overdue without anything that ends it, or not waited for any more.
pub(super) async fn follow(
    asked: &Asked,
    id: DrainId,
    wait_timeout: Option<Duration>,
    output: OutputArgs,
) -> Result<(), CliError> {
    let began = Instant::now();
    let mut watching = asked.client.spawn_watch(None);
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut teller = Teller::new(began);
    let mut heard = began;
    let mut last: Option<Drain> = None;
    // Whether it was so at first: then that is no news to wait for.
    let mut overdue = None;
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    loop {
        let looked = tokio::select! {
            changed = watching.facts.changed() => {
                changed.map_err(|_| gone(id))?;
                false
            }
            _ = looks.tick() => true,
            _ = &mut interrupted => return Err(detached(id, last.as_ref(), "detached", output)),
        };
        let facts = watching.facts.borrow_and_update().clone();
        if let Some(facts) = facts {
            match facts.drains.get(&id) {
                Some(drain) => {
                    let late = *overdue.get_or_insert(drain.overdue);
                    last = Some(drain.clone());
                    if let Some(over) = over(drain, late) {
                        let report = Report::of(drain);
                        output.print(&report, || report.page());
                        return over;
                    }
                }
                // The node that is watched is behind; patience ends all the same.
                None if facts.revision.0 < id.0 => {}
                None => return Err(gone(id)),
            }
        }
        if !looked {
            continue;
        }
        if let Some(limit) = wait_timeout
            && began.elapsed() >= limit
        {
            let what = format!("not over after {} s", limit.as_secs());
            return Err(detached(id, last.as_ref(), &what, output));
        }
        let fresh = watching.status.borrow().fresh_at;
        heard = heard.max(fresh.unwrap_or(began));
        if heard.elapsed() > PATIENCE.max(asked.timeout) {
            return Err(CliError::because(
                Exit::Unreachable,
                format!(
                    "nothing was heard of the control plane for {} s; {id} goes on as soon as it has a quorum: forebay drain watch {id}",
                    heard.elapsed().as_secs()
                ),
            ));
        }
        if let Some(drain) = &last {
            let names: Vec<String> = drain.workers.iter().map(|one| one.name.clone()).collect();
            // While there is no leader nobody can say it.
            if let Ok(held) = asked.client.holders(&names, LOOK).await {
                tell(&mut teller, drain, &Progress::of(&held), output);
            }
        }
    }
}

fn tell(teller: &mut Teller, drain: &Drain, progress: &Progress, output: OutputArgs) {
    let phase = Report::of(drain).state;
    for said in teller.tell(Instant::now(), phase, progress) {
        say(&format!("{} {said}", drain.id));
    }
    if output.output == Output::Jsonl {
        line(&Event {
            event: "progress",
            id: drain.id.to_string(),
            phase,
            progress,
        });
    }
}

/// How it ended, if it did. Its deadline is news unless it had passed before.
fn over(drain: &Drain, passed_before: bool) -> Option<Result<(), CliError>> {
    let id = drain.id;
    match drain.phase {
        DrainPhase::Drained => {
            if drain.overdue && drain.on_deadline == OnDeadline::Cancel {
                say("its deadline passed: what still ran was ended with an error");
            }
            Some(Ok(()))
        }
        DrainPhase::Cancelled => Some(Err(CliError::because(
            Exit::Conflict,
            format!("{id} was called off: see `forebay workers`"),
        ))),
        DrainPhase::Committed | DrainPhase::InForce
            if drain.overdue && !passed_before && drain.on_deadline == OnDeadline::Wait =>
        {
            Some(Err(CliError::because(
                Exit::TimedOut,
                format!(
                    "the deadline of {id} passed and something still runs; it goes on: forebay drain watch {id} waits on, forebay drain cancel {id} calls it off"
                ),
            )))
        }
        DrainPhase::Committed | DrainPhase::InForce => None,
    }
}

fn detached(id: DrainId, last: Option<&Drain>, what: &str, output: OutputArgs) -> CliError {
    if let Some(drain) = last {
        let report = Report::of(drain);
        output.print(&report, || report.page());
    }
    CliError::because(
        Exit::TimedOut,
        format!(
            "{what}: {id} goes on without this command; forebay drain watch {id} follows it again"
        ),
    )
}

fn gone(id: DrainId) -> CliError {
    CliError::because(
        Exit::NotFound,
        format!("there is no drain {id} any more: see `forebay drain status`"),
    )
}

#[cfg(test)]
mod tests {
    use forebay_proto::wire::control::{Holder, Work};

    use super::*;

    fn held(in_flight: u32, id: &str) -> HeldLeases {
        let agent = |name: &str, in_flight, heard| Holder {
            name: name.into(),
            heard_ms: Some(heard),
            applied_revision: 0,
            work: Some(Work {
                in_flight,
                queued: 0,
                oldest_ms: 41_200,
                tokens_left: 100,
                eta_ms: 2_500,
                oldest: vec![id.into()],
            }),
        };
        HeldLeases {
            agents: vec![agent("w1", in_flight, 100), agent("w2", 0, 12_000)],
            balancers: vec![],
        }
    }

    #[test]
    fn progress_is_the_sum_of_what_agents_said() {
        let progress = Progress::of(&held(3, "r1"));
        assert_eq!(
            progress.line(),
            "3 in flight, the oldest for 42 s, about 200 tokens left, done in about 3 s; not heard: w2"
        );
    }

    #[test]
    fn news_are_said_at_once_and_a_standstill_names_who_holds_it() {
        let now = Instant::now();
        let mut teller = Teller::new(now);
        let mut at = |s: u64, in_flight| {
            let progress = Progress::of(&held(in_flight, "req-7"));
            teller
                .tell(now + Duration::from_secs(s), "in_force", &progress)
                .len()
        };
        assert_eq!(at(0, 3), 1);
        assert_eq!(at(1, 3), 0, "the same");
        assert_eq!(at(2, 2), 1);
        assert_eq!(at(6, 2), 0);
        assert_eq!(at(7, 2), 1, "still");
        assert_eq!(at(17, 2), 2, "for 15 s");
        assert_eq!(at(18, 2), 0);
        let mut teller = Teller::new(now);
        let progress = Progress::of(&held(1, "req-7"));
        teller.tell(now, "in_force", &progress);
        let lines = teller.tell(now + STALLED, "in_force", &progress);
        assert!(lines[1].contains("req-7 on w1"), "{lines:?}");
    }
}
