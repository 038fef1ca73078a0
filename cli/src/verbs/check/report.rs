//! What was checked and found.

use serde::Serialize;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    /// As it should be.
    Ok,
    /// It works, and somebody should know.
    Warn,
    /// Something does not work, or soon will not.
    Fail,
    /// It cannot be seen from here.
    Skipped,
}

/// One check.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Check {
    /// A contract: scripts may look for it.
    pub(super) id: &'static str,
    pub(super) status: Status,
    /// What was found.
    pub(super) what: String,
    /// What to do; empty where nothing is.
    pub(super) hint: String,
}

/// All checks, in their order.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    schema_version: u32,
    pub(super) ok: bool,
    pub(super) failed: usize,
    pub(super) warned: usize,
    pub(super) skipped: usize,
    pub(super) checks: Vec<Check>,
}

impl Report {
    /// Fails with all problems, if there are any; else it is as `fine` says.
    pub(super) fn fail(
        &mut self,
        id: &'static str,
        problems: &[String],
        fine: impl Into<String>,
        hint: &str,
    ) {
        self.judge(id, Status::Fail, problems, fine, hint);
    }

    /// As [`Report::fail`], for what works all the same.
    pub(super) fn warn(
        &mut self,
        id: &'static str,
        problems: &[String],
        fine: impl Into<String>,
        hint: &str,
    ) {
        self.judge(id, Status::Warn, problems, fine, hint);
    }

    /// It cannot be seen.
    pub(super) fn skip(&mut self, id: &'static str, why: &str) {
        self.checks.push(Check {
            id,
            status: Status::Skipped,
            what: why.to_owned(),
            hint: String::new(),
        });
    }

    fn judge(
        &mut self,
        id: &'static str,
        bad: Status,
        problems: &[String],
        fine: impl Into<String>,
        hint: &str,
    ) {
        let (status, what, hint) = match problems {
            [] => (Status::Ok, fine.into(), String::new()),
            problems => (bad, shortened(problems), hint.to_owned()),
        };
        self.checks.push(Check {
            id,
            status,
            what,
            hint,
        });
    }

    /// Counts.
    pub(super) fn done(mut self) -> Self {
        let count = |status| {
            self.checks
                .iter()
                .filter(|one| one.status == status)
                .count()
        };
        let (failed, warned, skipped) = (
            count(Status::Fail),
            count(Status::Warn),
            count(Status::Skipped),
        );
        self.schema_version = 1;
        self.ok = failed == 0;
        (self.failed, self.warned, self.skipped) = (failed, warned, skipped);
        self
    }

    /// For people: what is wrong first; the rest if `all` is wanted.
    pub(super) fn page(&self, all: bool) -> String {
        let shown = |check: &&Check| all || matches!(check.status, Status::Fail | Status::Warn);
        let mut checks: Vec<&Check> = self.checks.iter().filter(shown).collect();
        checks.sort_by_key(|check| match check.status {
            Status::Fail => 0,
            Status::Warn => 1,
            Status::Ok => 2,
            Status::Skipped => 3,
        });
        let lines = checks.iter().map(|check| {
            let word = match check.status {
                Status::Ok => "ok",
                Status::Warn => "warn",
                Status::Fail => "FAIL",
                Status::Skipped => "skipped",
            };
            let mut line = format!("{word:<8} {:<23} {}", check.id, check.what);
            if !check.hint.is_empty() {
                line += &format!("\n         {}", check.hint);
            }
            line
        });
        let summary = format!(
            "{} checks: {} failed, {} warned, {} skipped",
            self.checks.len(),
            self.failed,
            self.warned,
            self.skipped
        );
        if checks.is_empty() {
            return summary;
        }
        format!("{}\n\n{summary}", lines.collect::<Vec<_>>().join("\n"))
    }
}

/// Of many problems of one kind the first few tell the story.
fn shortened(problems: &[String]) -> String {
    let mut shown: Vec<String> = problems.iter().take(MOST_TOLD).cloned().collect();
    if problems.len() > MOST_TOLD {
        shown.push(format!("and {} more", problems.len() - MOST_TOLD));
    }
    shown.join("; ")
}

const MOST_TOLD: usize = 8;
