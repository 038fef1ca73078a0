//! The engine's process, where the agent runs it: started, started again when it ends or hangs, and ended with
//! the agent, after what ran on it.
//!
//! It runs in a process group of its own and outlives an agent that dies: the agent's next start finds it by
//! the record in its data directory and goes on with it, cache and all.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use forebay_link::Backoff;
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::Instant;

use super::tasks::OwnedTask;

/// From an end to the next start.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// One that ran for so long starts again at once.
const GOOD_LIFE: Duration = Duration::from_secs(300);
/// What an engine that hangs gets before it is killed.
const HUNG_PATIENCE: Duration = Duration::from_secs(5);
/// What an engine that is asked to end gets: vLLM takes 6 to 9 s.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at a process that is not our child.
const LOOK: Duration = Duration::from_millis(200);

/// How an engine is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Running {
    /// For a shell, which it replaces.
    pub(super) command: String,
    /// How long it may take until it answers for the first time.
    pub(super) start: Duration,
    /// How long it may not answer later.
    pub(super) silence: Duration,
}

/// Runs one engine.
#[derive(Debug)]
pub(super) struct Lifecycle {
    how: Running,
    process: Mutex<Option<Process>>,
    /// The process that is to be started again; 0: none.
    restart: watch::Sender<i32>,
    stopping: watch::Sender<bool>,
    ended: watch::Sender<bool>,
    task: Mutex<Option<OwnedTask>>,
}

/// A process that runs, and what was heard of it.
#[derive(Clone, Debug)]
struct Process {
    record: Record,
    since: Instant,
    answered: Option<Instant>,
}

/// What is kept on disk, so that the next start of the agent finds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    pid: i32,
    /// When it started, in the kernel's ticks since boot: a pid alone may be another process's.
    started: u64,
    boot: String,
    command: String,
}

/// A process as it is waited for.
enum Handle {
    Ours(Child),
    /// Of an earlier start of the agent.
    Found,
}

/// Why a process is not waited for any more.
enum Over {
    Ended(String),
    Hangs,
    Stopping,
}

impl Lifecycle {
    pub(super) fn new(how: Running) -> Arc<Self> {
        Arc::new(Self {
            how,
            process: Mutex::default(),
            restart: watch::Sender::new(0),
            stopping: watch::Sender::new(false),
            ended: watch::Sender::new(true),
            task: Mutex::default(),
        })
    }

    /// Begins: the data directory is ours.
    pub(super) fn begin(self: &Arc<Self>, directory: &Path) {
        self.ended.send_replace(false);
        let (lifecycle, record) = (self.clone(), directory.join("engine.json"));
        let keeping = async move {
            lifecycle.keep(&record).await;
            lifecycle.ended.send_replace(true);
        };
        *self.task.lock() = Some(OwnedTask::spawn(keeping));
    }

    /// Names the process; none while none runs.
    pub(super) fn identity(&self) -> Option<String> {
        let process = self.process.lock();
        let record = process.as_ref().map(|process| &process.record);
        record.map(|record| {
            let Record {
                pid, started, boot, ..
            } = record;
            format!("process {pid} since {started} of {boot}")
        })
    }

    /// The engine answered.
    pub(super) fn answers(&self) {
        if let Some(process) = &mut *self.process.lock() {
            process.answered = Some(Instant::now());
        }
    }

    /// The engine did not answer: after a while it is started again.
    pub(super) fn is_late(&self) {
        let now = Instant::now();
        let late = self.process.lock().as_ref().is_some_and(|process| {
            let (since, most) = match process.answered {
                Some(answered) => (answered, self.how.silence),
                None => (process.since, self.how.start),
            };
            now.duration_since(since) >= most
        });
        if late {
            self.hangs();
        }
    }

    /// The engine makes no progress: it is started again.
    pub(super) fn hangs(&self) {
        let pid = self
            .process
            .lock()
            .as_ref()
            .map(|process| process.record.pid);
        if let Some(pid) = pid {
            self.restart.send_replace(pid);
        }
    }

    /// Ends the engine, and waits until it is gone.
    pub(super) async fn stop(&self) {
        self.stopping.send_replace(true);
        let mut ended = self.ended.subscribe();
        // The sender lives as long as this.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    async fn keep(&self, file: &Path) {
        let mut rng = StdRng::from_os_rng();
        let mut backoff = Backoff::new(SHORTEST_PAUSE, LONGEST_PAUSE);
        let mut found = self.found(file).await;
        while !*self.stopping.borrow() {
            let (mut handle, record) = match found.take() {
                Some(record) => {
                    tracing::info!(pid = record.pid, "the engine runs on from before");
                    (Handle::Found, record)
                }
                None => match self.start(file) {
                    Ok(started) => started,
                    Err(error) => {
                        tracing::warn!(%error, command = self.how.command, "the engine cannot be started");
                        self.pause(backoff.next(&mut rng)).await;
                        continue;
                    }
                },
            };
            let pid = record.pid;
            let since = Instant::now();
            self.restart.send_replace(0);
            *self.process.lock() = Some(Process {
                record: record.clone(),
                since,
                answered: None,
            });
            let over = self.watch(&mut handle, &record).await;
            let patience = match &over {
                Over::Ended(_) => Duration::ZERO,
                Over::Hangs => HUNG_PATIENCE,
                Over::Stopping => STOP_PATIENCE,
            };
            // Its group as well, when it has ended: a part of an engine without the rest holds memory and port.
            end(&mut handle, &record, patience).await;
            *self.process.lock() = None;
            let _ = std::fs::remove_file(file);
            if since.elapsed() >= GOOD_LIFE {
                backoff.reset();
            }
            match over {
                Over::Stopping => tracing::info!(pid, "the engine was ended"),
                Over::Hangs => {
                    tracing::warn!(pid, "the engine hangs: it was killed and is started again");
                }
                Over::Ended(how) => {
                    tracing::warn!(pid, how, "the engine ended: it is started again");
                }
            }
            self.pause(backoff.next(&mut rng)).await;
        }
    }

    /// The engine of an earlier start of the agent, if it is the one that is wanted; another one is ended.
    async fn found(&self, file: &Path) -> Option<Record> {
        let record = Record::read(file)?;
        if record.command == self.how.command {
            return Some(record);
        }
        tracing::info!(
            pid = record.pid,
            command = record.command,
            "the engine that runs is of another command: it is ended"
        );
        end(&mut Handle::Found, &record, STOP_PATIENCE).await;
        None
    }

    fn start(&self, file: &Path) -> std::io::Result<(Handle, Record)> {
        let mut command = Command::new("/bin/sh");
        command
            .arg("-c")
            .arg(format!("exec {}", self.how.command))
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::from(std::io::stderr().as_fd().try_clone_to_owned()?));
        for (name, _) in std::env::vars_os() {
            // They are ours.
            if name.to_string_lossy().starts_with("FOREBAY_") {
                command.env_remove(name);
            }
        }
        let child = command.spawn()?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| std::io::Error::other("it ended at once"))?;
        let record = Record {
            pid,
            started: started(pid).unwrap_or_default(),
            boot: boot(),
            command: self.how.command.clone(),
        };
        if let Err(error) = record.write(file) {
            tracing::warn!(%error, file = %file.display(), "a next start of this agent will not find the engine");
        }
        tracing::info!(pid, command = self.how.command, "the engine is started");
        Ok((Handle::Ours(child), record))
    }

    async fn watch(&self, handle: &mut Handle, record: &Record) -> Over {
        let mut stopping = self.stopping.subscribe();
        let mut restart = self.restart.subscribe();
        tokio::select! {
            how = handle.ended(record) => Over::Ended(how),
            _ = restart.wait_for(|pid| *pid == record.pid) => Over::Hangs,
            _ = stopping.wait_for(|stopping| *stopping) => Over::Stopping,
        }
    }

    async fn pause(&self, pause: Duration) {
        let mut stopping = self.stopping.subscribe();
        // Either will do.
        let _ = tokio::time::timeout(pause, stopping.wait_for(|stopping| *stopping)).await;
    }
}

impl Handle {
    /// Returns when the process is gone, and how it went.
    async fn ended(&mut self, record: &Record) -> String {
        match self {
            Self::Ours(child) => match child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            },
            Self::Found => {
                while record.runs() {
                    tokio::time::sleep(LOOK).await;
                }
                "nobody knows how".to_owned()
            }
        }
    }
}

/// Asks the process to end, and kills what is left of its group after a while.
async fn end(handle: &mut Handle, record: &Record, patience: Duration) {
    let Some(group) = Pid::from_raw(record.pid) else {
        return;
    };
    if !patience.is_zero() {
        // Itself only: it ends its parts when what runs on them is through. What is gone needs no signal.
        let _ = kill_process(group, Signal::TERM);
        if tokio::time::timeout(patience, handle.ended(record))
            .await
            .is_err()
        {
            tracing::warn!(pid = record.pid, "the engine does not end: it is killed");
        }
    }
    let _ = kill_process_group(group, Signal::KILL);
    let _ = tokio::time::timeout(HUNG_PATIENCE, handle.ended(record)).await;
}

impl Record {
    /// That of a process which runs.
    fn read(file: &Path) -> Option<Self> {
        let text = std::fs::read(file).ok()?;
        let record: Self = serde_json::from_slice(&text).ok()?;
        record.runs().then_some(record)
    }

    fn write(&self, file: &Path) -> std::io::Result<()> {
        let beside: PathBuf = file.with_extension("json.new");
        std::fs::write(&beside, serde_json::to_vec(self)?)?;
        std::fs::rename(&beside, file)
    }

    fn runs(&self) -> bool {
        self.boot == boot() && started(self.pid) == Some(self.started)
    }
}

/// When a process started; none when there is none, or only what its parent has not taken note of.
fn started(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it may have spaces and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    (state != "Z").then_some(started)
}

fn boot() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    boot.unwrap_or_default().trim().to_owned()
}
