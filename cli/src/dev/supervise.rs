//! The loop: who died is told and, if asked for, started again; who stops is stopped in order.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::Signal;
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::child::{self, Plan};
use super::run_file::{self, Process, RunFile};
use super::{DevError, again};
use crate::exit::CliError;
use crate::output::say;

/// The processes of the fleet, and what may happen to them.
pub(super) struct Supervisor {
    dir: PathBuf,
    exe: PathBuf,
    children: Vec<Supervised>,
    restart: bool,
    ended: mpsc::Receiver<Ended>,
    tell: mpsc::Sender<Ended>,
    term: Signals,
    int: Signals,
    hup: Signals,
    terminal: bool,
    /// How a shell finds this program.
    program: String,
}

/// One process, dead or alive.
struct Supervised {
    plan: Plan,
    state: State,
    /// Since it was started the last time.
    started: Instant,
    /// How often it died soon after its start, in a row.
    soon: u32,
}

enum State {
    /// Not started yet.
    Planned,
    /// Its pid.
    Runs(i32),
    /// How it ended, and when it is started again by itself.
    Dead {
        pid: i32,
        how: String,
        again: Option<Instant>,
    },
}

/// A process that ended.
struct Ended {
    index: usize,
    pid: i32,
    status: std::io::Result<ExitStatus>,
}

/// What ended a wait.
pub(super) enum Until<T> {
    /// What was waited for.
    Done(T),
    /// The user.
    AskedToStop,
}

enum Event {
    Ended(Ended),
    Stop,
    Hangup,
    Due,
}

impl Supervisor {
    /// Prepares to run these; none is started yet.
    pub(super) fn new(
        dir: &Path,
        plans: Vec<Plan>,
        restart: bool,
        program: &str,
    ) -> Result<Self, CliError> {
        let system = |what| move |error| CliError::System { what, error };
        let listen = |kind| signal(kind).map_err(system("cannot listen to signals"));
        let (tell, ended) = mpsc::channel(plans.len().max(1));
        let planned = |plan| Supervised {
            plan,
            state: State::Planned,
            started: Instant::now(),
            soon: 0,
        };
        Ok(Self {
            dir: dir.into(),
            exe: std::env::current_exe().map_err(system("cannot find this program's own file"))?,
            children: plans.into_iter().map(planned).collect(),
            restart,
            ended,
            tell,
            term: listen(SignalKind::terminate())?,
            int: listen(SignalKind::interrupt())?,
            hup: listen(SignalKind::hangup())?,
            terminal: has_terminal(),
            program: program.into(),
        })
    }

    /// Starts all that were planned and are wanted.
    pub(super) fn start_all(&mut self, wanted: impl Fn(&Plan) -> bool) -> Result<(), CliError> {
        for index in 0..self.children.len() {
            let child = &self.children[index];
            if matches!(child.state, State::Planned) && wanted(&child.plan) {
                self.start(index)?;
            }
        }
        self.write_run_file()
    }

    /// Waits for `work` while all that were started have to live.
    pub(super) async fn meanwhile<T>(
        &mut self,
        work: impl Future<Output = Result<T, CliError>>,
    ) -> Result<Until<T>, CliError> {
        tokio::pin!(work);
        loop {
            let event = tokio::select! {
                done = &mut work => return done.map(Until::Done),
                event = self.event() => event,
            };
            match event {
                Event::Stop => return Ok(Until::AskedToStop),
                Event::Ended(ended) => {
                    let (index, pid) = (ended.index, ended.pid);
                    let how = self.bury(ended);
                    let plan = &self.children[index].plan;
                    return Err(DevError::Died {
                        name: plan.name.clone(),
                        pid,
                        how,
                        log: plan.log.clone(),
                        tail: child::tail(&plan.log),
                    }
                    .into());
                }
                Event::Hangup | Event::Due => {}
            }
        }
    }

    /// Watches until the user asks to stop.
    pub(super) async fn watch(&mut self) {
        loop {
            match self.event().await {
                Event::Stop => return,
                Event::Ended(ended) => self.died(ended),
                Event::Hangup => {
                    let asked = again::asked(&self.dir);
                    self.start_dead(|name, _| {
                        asked
                            .as_ref()
                            .is_none_or(|names| names.iter().any(|asked| asked == name))
                    });
                }
                Event::Due => {
                    let now = Instant::now();
                    self.start_dead(|_, again| again.is_some_and(|again| again <= now));
                }
            }
            if let Err(error) = self.write_run_file() {
                say(&format!("error: {error}"));
            }
        }
    }

    /// Stops all: who takes requests first, then who serves them; who does not stop is killed.
    pub(super) async fn stop(&mut self) {
        let start = Instant::now();
        self.stop_some(
            |role| matches!(role, "balancer" | "agent"),
            start + FIRST_STOP,
        )
        .await;
        self.stop_some(|_| true, start + STOP).await;
        self.signal_all(Signal::KILL, |_| true);
        while self.any_runs(|_| true) {
            match timeout(REAP, self.ended.recv()).await {
                Ok(Some(ended)) => {
                    self.bury(ended);
                }
                Ok(None) | Err(_) => break,
            }
        }
        run_file::remove(&self.dir);
    }

    async fn stop_some(&mut self, which: impl Fn(&str) -> bool, until: Instant) {
        self.signal_all(Signal::TERM, &which);
        while self.any_runs(&which) {
            tokio::select! {
                Some(ended) = self.ended.recv() => {
                    self.bury(ended);
                }
                // Asked twice: at once.
                _ = self.int.recv() => self.signal_all(Signal::KILL, |_| true),
                _ = self.term.recv() => self.signal_all(Signal::KILL, |_| true),
                () = sleep_until(until) => return,
            }
        }
    }

    async fn event(&mut self) -> Event {
        let due = self.children.iter().filter_map(|child| match child.state {
            State::Dead { again, .. } => again,
            State::Planned | State::Runs(_) => None,
        });
        let due = due.min();
        tokio::select! {
            Some(ended) = self.ended.recv() => Event::Ended(ended),
            _ = self.term.recv() => Event::Stop,
            _ = self.int.recv() => Event::Stop,
            _ = self.hup.recv() => {
                // A terminal that was closed says it by the same signal.
                if self.terminal && !has_terminal() { Event::Stop } else { Event::Hangup }
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => Event::Due,
        }
    }

    fn start(&mut self, index: usize) -> Result<i32, DevError> {
        let child = &mut self.children[index];
        let mut process = child.plan.start(&self.exe)?;
        let pid = process.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.expect("a process that was not waited for has an id");
        child.state = State::Runs(pid);
        child.started = Instant::now();
        let tell = self.tell.clone();
        tokio::spawn(async move {
            let status = process.wait().await;
            // Nobody listens any more when the supervisor itself ends.
            let _ = tell.send(Ended { index, pid, status }).await;
        });
        Ok(pid)
    }

    /// Notes an end and says how it was.
    fn bury(&mut self, ended: Ended) -> String {
        let how = match ended.status {
            Ok(status) => child::describe(status),
            Err(error) => format!("was lost: {error}"),
        };
        let child = &mut self.children[ended.index];
        child.state = State::Dead {
            pid: ended.pid,
            how: how.clone(),
            again: None,
        };
        how
    }

    fn died(&mut self, ended: Ended) {
        let (index, pid) = (ended.index, ended.pid);
        let how = self.bury(ended);
        let child = &mut self.children[index];
        let what = format!("{} {} (pid {pid}) {how}", child.plan.role, child.plan.name);
        if !self.restart {
            let (name, dir, program) = (&child.plan.name, self.dir.display(), &self.program);
            say(&format!(
                "{what}; start it again: {program} dev start {name} --data-dir {dir}"
            ));
            return;
        }
        child.soon = match child.started.elapsed() {
            lived if lived >= LONG_LIFE => 0,
            _ => child.soon + 1,
        };
        let pause = pause(child.soon);
        say(&format!(
            "{what}; it is started again in {:.1} s",
            pause.as_secs_f64()
        ));
        child.state = State::Dead {
            pid,
            how,
            again: Some(Instant::now() + pause),
        };
    }

    fn start_dead(&mut self, wanted: impl Fn(&str, Option<Instant>) -> bool) {
        for index in 0..self.children.len() {
            let child = &self.children[index];
            match child.state {
                State::Dead { again, .. } if wanted(&child.plan.name, again) => {}
                State::Dead { .. } | State::Planned | State::Runs(_) => continue,
            }
            match self.start(index) {
                Ok(pid) => {
                    let plan = &self.children[index].plan;
                    say(&format!(
                        "{} {} runs again (pid {pid})",
                        plan.role, plan.name
                    ));
                }
                Err(error) => say(&format!("error: {error}")),
            }
        }
    }

    fn signal_all(&self, what: Signal, which: impl Fn(&str) -> bool) {
        for child in self.children.iter().filter(|child| which(child.plan.role)) {
            if let State::Runs(pid) = child.state {
                child::signal(pid, what);
            }
        }
    }

    fn any_runs(&self, which: impl Fn(&str) -> bool) -> bool {
        let mut wanted = self.children.iter().filter(|child| which(child.plan.role));
        wanted.any(|child| matches!(child.state, State::Runs(_)))
    }

    fn write_run_file(&self) -> Result<(), CliError> {
        let processes = self.children.iter().filter_map(|child| {
            let (pid, ended) = match &child.state {
                State::Planned => return None,
                State::Runs(pid) => (*pid, None),
                State::Dead { pid, how, .. } => (*pid, Some(how.as_str())),
            };
            Some(Process {
                role: child.plan.role,
                name: &child.plan.name,
                pid,
                running: ended.is_none(),
                addresses: &child.plan.addresses,
                log: &child.plan.log,
                command: child.plan.argv(&self.exe),
                ended,
            })
        });
        RunFile {
            schema_version: 1,
            supervisor_pid: std::process::id(),
            processes: processes.collect(),
        }
        .write(&self.dir)
    }
}

/// Whether somebody may type Ctrl-C.
fn has_terminal() -> bool {
    std::fs::File::open("/dev/tty").is_ok()
}

/// The pause before a process that died soon `soon` times in a row is started again.
fn pause(soon: u32) -> Duration {
    (LEAST_PAUSE * 2u32.saturating_pow(soon.min(10))).min(MOST_PAUSE)
}

const LEAST_PAUSE: Duration = Duration::from_millis(250);
const MOST_PAUSE: Duration = Duration::from_secs(30);
const LONG_LIFE: Duration = Duration::from_secs(30);
const FIRST_STOP: Duration = Duration::from_secs(3);
const STOP: Duration = Duration::from_secs(5);
const REAP: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_grows_and_is_bounded() {
        assert_eq!(pause(0), LEAST_PAUSE);
        assert!(pause(1) > pause(0));
        assert_eq!(pause(u32::MAX), MOST_PAUSE);
    }
}
