//! `forebay dev`: a whole fleet on this machine, each role a process as in production.
//!
//! The supervisor keeps what the fleet is in its data directory ([`layout`], [`material`]), starts
//! every role as a child process of this binary ([`child`]), founds the cluster once and waits
//! until requests are served ([`start`]), and then only watches ([`supervise`]): it tells who died
//! and how to start it again.

mod again;
mod child;
mod hints;
mod layout;
mod material;
mod ports;
mod run_file;
mod start;
mod supervise;

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};

use forebay_proto::config::POLICIES;
use forebay_scheduler::model::PROFILES;

use crate::exit::{CliError, Exit};
use crate::output::{result, say};
use supervise::{Supervisor, Until};

/// Options of `forebay dev`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  forebay dev\n  forebay dev --control 3 --balancers 2 --workers 4\n\nIt prints how to send requests. Processes, with their ids and addresses, are in run.json in the data directory, logs in logs/. A process that died stays dead, so that its absence can be watched: `forebay dev start NAME` (or SIGHUP to the supervisor, for all) starts it again, and --restart makes it do so by itself. The same data directory resumes the same cluster.\n\nFOREBAY_LOG and FOREBAY_LOG_FORMAT are passed on to the processes."
)]
pub(crate) struct DevArgs {
    /// Control nodes: 1, or 3 to survive the loss of one. Default: 1, or what the data directory
    /// has.
    #[arg(long, value_name = "N", value_parser = ["1", "3"])]
    control: Option<String>,
    /// Balancers, on as many consecutive ports.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    balancers: u16,
    /// Workers, each an agent and an emulated engine.
    #[arg(long, value_name = "N", default_value_t = 2, conflicts_with = "engines", value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: u16,
    /// Where the first balancer takes requests.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Where the fleet keeps its state; remove it to begin anew.
    #[arg(long, value_name = "DIR", default_value = "forebay-data")]
    data_dir: PathBuf,
    /// How requests are placed; written into the fleet's configuration. Default: as it is there.
    #[arg(long, value_name = "NAME", value_parser = POLICIES)]
    policy: Option<String>,
    /// How long balancers hold a stream's status line back for its first byte, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 15_000)]
    hold_headers_ms: u32,
    /// Receipts of decisions that each balancer keeps for `forebay explain`.
    #[arg(
        long,
        value_name = "N",
        default_value_t = crate::roles::balancer::RECEIPTS,
        value_parser = clap::value_parser!(u32).range(..=crate::roles::balancer::MOST_RECEIPTS)
    )]
    receipts: u32,
    /// Start a process that died again, after a pause that grows while it keeps dying.
    #[arg(long)]
    restart: bool,
    #[command(flatten)]
    engine: EngineOptions,
    #[command(subcommand)]
    verb: Option<DevVerb>,
}

/// What can be asked of a fleet that runs.
#[derive(Debug, Subcommand)]
enum DevVerb {
    /// Start processes that died again.
    Start(again::StartArgs),
}

/// How the engines behave.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engines")]
struct EngineOptions {
    /// An engine that runs already, http://HOST:PORT, to put a worker in front of; give it again for more.
    /// There are no emulated ones then, and what follows is not for it, but for --engine-stall-ms.
    #[arg(
        id = "engines",
        long = "engine",
        value_name = "URL",
        value_delimiter = ','
    )]
    urls: Vec<String>,
    /// How long an engine with requests may make no progress, in milliseconds (see `forebay agent`).
    #[arg(long, value_name = "MS", default_value_t = 60_000)]
    engine_stall_ms: u32,
    /// Name under which they serve their model.
    #[arg(long, value_name = "NAME", default_value = "emulated")]
    model: String,
    /// The server whose latency they have.
    #[arg(
        long,
        value_name = "NAME",
        default_value = PROFILES[0].0,
        value_parser = crate::roles::engine::profile_name
    )]
    profile: String,
    /// Requests that one runs at once.
    #[arg(long, value_name = "N", default_value_t = 256)]
    engine_slots: u32,
    /// Tokens that the KV cache of one holds.
    #[arg(long, value_name = "TOKENS", default_value_t = 3_000_000, value_parser = kv_tokens)]
    engine_kv_tokens: u64,
    /// Divides all their times: 10 is ten times as fast.
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = crate::verbs::replay::speed)]
    engine_speed: f64,
    /// Tokens that prompt and answer may have together.
    #[arg(long, value_name = "TOKENS", default_value_t = 1 << 20)]
    engine_max_context: u32,
    /// They publish their caches' events, so that agents know exactly what is cached, as with vLLM.
    #[arg(long)]
    kv_events: bool,
    /// Batches of events that one can tell again.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 10_000,
        requires = "kv_events"
    )]
    kv_buffer: u32,
    /// They die of a request with `seed`, as some real ones do: to see what a fleet makes of it.
    #[arg(long)]
    engines_die_of_seed: bool,
}

impl EngineOptions {
    /// How many workers there are in front of engines that run already; none: they are emulated.
    fn workers(&self) -> Option<u16> {
        let workers = u16::try_from(self.urls.len()).unwrap_or(u16::MAX);
        (workers > 0).then_some(workers)
    }
}

/// At least one block of an engine; as much as a configuration file can say.
pub(crate) fn kv_tokens(text: &str) -> Result<u64, String> {
    let tokens: u64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (16..=i64::MAX.unsigned_abs()).contains(&tokens) {
        return Ok(tokens);
    }
    Err("must be at least 16".to_owned())
}

/// Why `dev` does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DevError {
    /// Another supervisor has the data directory.
    #[error(
        "{dir} is in use by another `forebay dev`{who}: stop it, or give this one another --data-dir",
        dir = dir.display()
    )]
    Locked {
        /// The data directory.
        dir: PathBuf,
        /// Its process, in parentheses, if it said so.
        who: String,
    },
    /// The data directory cannot be used.
    #[error(
        "cannot write in the data directory {dir}: {error}; make it writable and free some space, or give another one by --data-dir",
        dir = dir.display()
    )]
    DataDir {
        /// The data directory.
        dir: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// A client port is not free.
    #[error(
        "{address} is taken or cannot be listened on ({error}): stop what has it, or give another address by --listen; nothing was started"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: std::io::Error,
    },
    /// There are not as many ports as balancers.
    #[error("--listen {0} leaves no room for {1} consecutive ports: choose a lower port")]
    Ports(SocketAddr, u16),
    /// A member's address cannot change, and somebody has it.
    #[error(
        "the port of control node {name}, {address}, is taken, and a member's address does not change: stop what has it, or begin anew with another --data-dir"
    )]
    ControlPort {
        /// The node.
        name: String,
        /// Its address.
        address: SocketAddr,
    },
    /// No port is free.
    #[error("no free port was found on 127.0.0.1 between 20000 and 32000: close some programs")]
    NoPort,
    /// The cluster has another size.
    #[error(
        "{dir} holds a cluster with {found} control nodes, not {asked}: leave --control out to resume it, or begin anew with another --data-dir"
    )]
    OtherSize {
        /// The data directory.
        dir: PathBuf,
        /// Its size.
        found: usize,
        /// What was asked for.
        asked: usize,
    },
    /// The directory's own record cannot be used.
    #[error("{path} is not a fleet of this version: {problem}; begin anew with another --data-dir")]
    Layout {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A process ended before the fleet was up.
    #[error(
        "{name} (pid {pid}) {how} before the fleet was up; the last lines of {log}:\n{tail}",
        log = log.display()
    )]
    Died {
        /// Which.
        name: String,
        /// Its process.
        pid: i32,
        /// How it ended.
        how: String,
        /// Its log.
        log: PathBuf,
        /// The end of it.
        tail: String,
    },
    /// A process cannot be started.
    #[error("cannot start {name}: {error}")]
    Spawn {
        /// Which.
        name: String,
        /// What the system says.
        error: std::io::Error,
    },
    /// The fleet does not come up.
    #[error("the fleet is not ready after {seconds} s: {reasons}; its logs are in {logs}", logs = logs.display())]
    NotReady {
        /// How long was waited.
        seconds: u64,
        /// What it waits for.
        reasons: String,
        /// Where to look.
        logs: PathBuf,
    },
}

impl DevError {
    /// What scripts see.
    pub(crate) const fn exit(&self) -> Exit {
        match self {
            Self::Locked { .. } | Self::OtherSize { .. } => Exit::Conflict,
            Self::Ports(..) => Exit::Usage,
            Self::NotReady { .. } => Exit::TimedOut,
            Self::Listen { .. }
            | Self::DataDir { .. }
            | Self::ControlPort { .. }
            | Self::NoPort
            | Self::Layout { .. }
            | Self::Died { .. }
            | Self::Spawn { .. } => Exit::Failed,
        }
    }
}

/// Runs `forebay dev` until it is asked to stop.
pub(crate) fn run(args: &DevArgs) -> Result<(), CliError> {
    if let Some(DevVerb::Start(args)) = &args.verb {
        return again::run(args);
    }
    let dir = data_dir(&args.data_dir)?;
    let _lock = lock(&dir)?;
    let listen = ports::consecutive(args.listen, args.balancers)?;
    let asked = layout::Asked {
        control: args
            .control
            .as_deref()
            .map(|n| if n == "3" { 3 } else { 1 }),
        balancers: args.balancers,
        workers: args.engine.workers().unwrap_or(args.workers),
    };
    let mut fleet = layout::Fleet::open(&dir, &asked)?;
    let balancers = material::Balancers {
        hold_headers_ms: args.hold_headers_ms,
        receipts: args.receipts,
    };
    let plans = material::prepare(&dir, &fleet, &listen, &args.engine, &balancers)?;
    fleet.save(&dir)?;
    let program = hints::program();
    // The children die with the thread that starts them: this one, which lives as long as we do.
    crate::roles::thread()?.block_on(async {
        let mut supervisor = Supervisor::new(&dir, plans, args.restart, &program)?;
        let up = come_up(&mut supervisor, &dir, &mut fleet, &listen, args).await;
        match up {
            Ok(Until::Done(())) => {
                // Engines that ran before have names of their own.
                let served = match args.engine.urls.is_empty() {
                    true => None,
                    false => start::served(&hints::base_url(listen[0])).await,
                };
                let hints = hints::Hints {
                    dir: &dir,
                    listen: &listen,
                    model: served.as_deref().unwrap_or(&args.engine.model),
                    program: &program,
                };
                result(&hints.text());
                say("the fleet is up; Ctrl-C stops it");
                supervisor.watch().await;
            }
            Ok(Until::AskedToStop) => {}
            Err(error) => {
                supervisor.stop().await;
                return Err(error);
            }
        }
        supervisor.stop().await;
        say("stopped");
        Ok(())
    })
}

async fn come_up(
    supervisor: &mut Supervisor,
    dir: &Path,
    fleet: &mut layout::Fleet,
    listen: &[SocketAddr],
    args: &DevArgs,
) -> Result<Until<()>, CliError> {
    say(&format!(
        "starting {}, {} and {} in {}",
        counted(fleet.control.len(), "control node"),
        counted(listen.len(), "balancer"),
        counted(fleet.workers_asked(), "worker"),
        dir.display()
    ));
    let first = |role: &str| matches!(role, "control" | "engine");
    supervisor.start_all(|plan| first(plan.role))?;
    if !fleet.initialised {
        let founding = start::found(dir, FOUNDING_TIME);
        match supervisor.meanwhile(founding).await? {
            Until::Done(()) => {}
            Until::AskedToStop => return Ok(Until::AskedToStop),
        }
        fleet.initialised = true;
        fleet.save(dir)?;
    }
    if let Some(policy) = &args.policy {
        let applying = start::policy(dir, policy, FOUNDING_TIME);
        if let Until::AskedToStop = supervisor.meanwhile(applying).await? {
            return Ok(Until::AskedToStop);
        }
    }
    supervisor.start_all(|plan| plan.role == "balancer")?;
    if let Until::AskedToStop = in_order(supervisor, dir, fleet).await? {
        return Ok(Until::AskedToStop);
    }
    supervisor.start_all(|_| true)?;
    let wanted = start::Wanted {
        balancers: fleet.balancer_admins(listen.len()),
        workers: fleet.worker_names(),
        engines: args.engine.urls.clone(),
    };
    supervisor
        .meanwhile(start::ready(dir, wanted, READY_TIME))
        .await
}

/// Starts agents that the cluster does not know yet one after the other: ids are given in the order
/// of registration, and `w2` should not be the worker whose incarnations are called `w1.…`. It is
/// for the reader's eyes only, so whoever is late is not waited for.
async fn in_order(
    supervisor: &mut Supervisor,
    dir: &Path,
    fleet: &layout::Fleet,
) -> Result<Until<()>, CliError> {
    let until = tokio::time::Instant::now() + ORDER_TIME;
    let registry = start::Registry::open(dir)?;
    for name in fleet.worker_names() {
        match supervisor.meanwhile(registry.has(&name)).await? {
            Until::Done(true) => continue,
            Until::Done(false) => {}
            Until::AskedToStop => return Ok(Until::AskedToStop),
        }
        supervisor.start_all(|plan| plan.role == "agent" && plan.name == name)?;
        match supervisor.meanwhile(registry.gets(&name, until)).await? {
            Until::Done(true) => {}
            Until::Done(false) => break,
            Until::AskedToStop => return Ok(Until::AskedToStop),
        }
    }
    Ok(Until::Done(()))
}

fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn data_dir(dir: &Path) -> Result<PathBuf, CliError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .and_then(|()| dir.canonicalize())
        .map_err(|error| {
            DevError::DataDir {
                dir: dir.into(),
                error,
            }
            .into()
        })
}

/// Held as long as the supervisor lives; the kernel gives it up with the process.
fn lock(dir: &Path) -> Result<File, CliError> {
    let path = dir.join("dev.lock");
    let wrong = |error| DevError::DataDir {
        dir: dir.into(),
        error,
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(wrong)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let _ = (&file).take(16).read_to_string(&mut pid);
            let pid = pid.trim().parse::<u32>();
            let who = pid.map_or_else(|_| String::new(), |pid| format!(" (pid {pid})"));
            let dir = dir.into();
            return Err(DevError::Locked { dir, who }.into());
        }
        Err(TryLockError::Error(error)) => return Err(wrong(error).into()),
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(wrong)?;
    Ok(file)
}

/// Replaces a file as a whole: a reader sees the old one or the new one.
fn write_whole(path: &Path, text: &str) -> Result<(), CliError> {
    let wrong = |error| CliError::File {
        path: path.into(),
        error,
    };
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)
        .map_err(wrong)?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| std::fs::rename(&beside, path))
        .map_err(wrong)
}

const FOUNDING_TIME: Duration = Duration::from_secs(30);
/// Many times what 64 agents need to register one by one.
const ORDER_TIME: Duration = Duration::from_secs(10);
const READY_TIME: Duration = Duration::from_secs(60);
