//! `forebay agent`: stands beside one engine, registers it, and runs what balancers place.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use forebay_worker_agent::Config;

use super::ProcessArgs;
use crate::context::{CellArgs, check_control};
use crate::exit::CliError;
use crate::settings::required;

/// Options of `forebay agent`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay agent --engine http://127.0.0.1:8000 --advertise gpu7:7420 --control c1:7400,c2:7400,c3:7400 --data-dir /var/lib/forebay --ca ca.pem --cert w1.pem --key w1-key.pem"
)]
pub(crate) struct AgentArgs {
    /// The worker's name; default: the name in the certificate, which it must be.
    #[arg(long, env = "FOREBAY_NAME")]
    name: Option<String>,
    /// Where balancers reach it (UDP).
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "0.0.0.0:7420",
        env = "FOREBAY_LISTEN"
    )]
    listen: SocketAddr,
    /// HOST:PORT that balancers dial; default: --listen, when that is one address.
    #[arg(long, value_name = "ADDRESS", env = "FOREBAY_ADVERTISE")]
    advertise: Option<String>,
    /// Where its health and metrics are (TCP); they are not for everybody.
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1:7421",
        env = "FOREBAY_ADMIN"
    )]
    admin: SocketAddr,
    /// Where it keeps its incarnation and the last facts. Losing it makes a restart a new worker.
    #[arg(long, value_name = "DIR", env = "FOREBAY_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// The engine's OpenAI API: http://HOST:PORT.
    #[arg(
        long,
        visible_alias = "engine-url",
        value_name = "URL",
        env = "FOREBAY_ENGINE"
    )]
    engine: Option<String>,
    /// What the engine is: vllm, sglang, llama.cpp, openai (any other), or auto, by what it answers. It
    /// says what is changed of bodies and answers (see docs/engines.md); with openai nothing is.
    #[arg(
        long,
        value_name = "KIND",
        default_value = "auto",
        env = "FOREBAY_ENGINE_KIND"
    )]
    engine_kind: String,
    /// Only requests of this tenant are taken; *: everybody's. Default: everybody's, but an engine that
    /// keeps no caches apart (llama.cpp) serves one tenant, the first that asks.
    #[arg(long, value_name = "TENANT", env = "FOREBAY_TENANT")]
    tenant: Option<String>,
    /// Tell the engine when each first token is due, as its priority. Only for a vLLM that was started
    /// with --scheduling-policy priority.
    #[arg(long, env = "FOREBAY_ENGINE_PRIORITY")]
    engine_priority: bool,
    /// Run the engine by this command: it is started (by /bin/sh), started again when it ends or hangs, and
    /// ended with the agent, after what ran on it. It has to serve at --engine. It outlives an agent that
    /// dies, whose next start goes on with it. Default: the engine is there already.
    #[arg(long, value_name = "COMMAND", env = "FOREBAY_ENGINE_COMMAND")]
    engine_command: Option<String>,
    /// How long an engine that is started may take until it answers, in milliseconds; then it is started
    /// again.
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 900_000,
        env = "FOREBAY_ENGINE_START_MS"
    )]
    engine_start_ms: u64,
    /// How long an engine with requests may make no progress, in milliseconds: no piece of an answer, and no
    /// change of its own counters. Then what runs on it fails, and it gets nothing more until it made a
    /// token. Longer than the longest prefill takes.
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 60_000,
        env = "FOREBAY_ENGINE_STALL_MS"
    )]
    engine_stall_ms: u64,
    /// Where the engine publishes its cache's events: ipc://PATH or tcp://127.0.0.1:PORT, with @ in front
    /// where the agent listens and the engine connects. auto: where a vLLM says; off: they are not followed,
    /// and what the cache holds is guessed.
    #[arg(
        long,
        value_name = "ENDPOINT",
        default_value = "auto",
        env = "FOREBAY_KV_EVENTS"
    )]
    kv_events: String,
    /// Where the engine tells events again that were missed (its replay_endpoint), with --kv-events.
    #[arg(long, value_name = "ENDPOINT", env = "FOREBAY_KV_REPLAY")]
    kv_replay: Option<String>,
    /// The model's tokenizer.json, or its directory: the bytes of each token, by which events are
    /// understood; default: the directory that a vLLM on this host says it serves.
    #[arg(long, value_name = "PATH", env = "FOREBAY_TOKENIZER")]
    tokenizer: Option<PathBuf>,
    /// The pool it belongs to: a set of interchangeable workers in the fleet's configuration.
    #[arg(long, default_value = "default", env = "FOREBAY_POOL")]
    pool: String,
    /// Requests the engine runs at once; default: 64, or as many as it says it runs, if that is fewer.
    #[arg(long, value_name = "N", env = "FOREBAY_SLOTS")]
    slots: Option<u32>,
    /// Requests that wait beyond them; default: as many as slots.
    #[arg(long, value_name = "N", env = "FOREBAY_QUEUE_LIMIT")]
    queue_limit: Option<u32>,
    /// Longest context that the engine takes, in tokens; 0: as it says.
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 0,
        env = "FOREBAY_MAX_CONTEXT"
    )]
    max_context: u32,
    /// Tokens that the engine's KV cache holds; 0: as it says.
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 0,
        env = "FOREBAY_KV_TOKENS"
    )]
    kv_tokens: u64,
    /// The latency profile that comes nearest to the engine: llama-70b-h100-tp4, llama-70b-h100-tp8,
    /// llama-70b-a100-tp2 or llama-8b-a100. Without one balancers assume the first.
    #[arg(long, value_name = "NAME", env = "FOREBAY_PROFILE")]
    profile: Option<String>,
    /// How many times as fast as its profile the engine is.
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        env = "FOREBAY_PROFILE_SPEED"
    )]
    profile_speed: f64,
    /// Type of its GPUs.
    #[arg(
        long,
        value_name = "TYPE",
        default_value = "",
        env = "FOREBAY_GPU_TYPE"
    )]
    gpu_type: String,
    /// Number of its GPUs.
    #[arg(long, value_name = "N", default_value_t = 0, env = "FOREBAY_GPU_COUNT")]
    gpu_count: u32,
    /// Revision of the model's weights.
    #[arg(long, default_value = "", env = "FOREBAY_REVISION")]
    revision: String,
    /// Where it stands.
    #[arg(long, default_value = "", env = "FOREBAY_ZONE")]
    zone: String,
    /// A label for operators; give it again for more. In a file: a table `label`.
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', env = "FOREBAY_LABEL", value_parser = label)]
    label: Vec<(String, String)>,
    /// Take the name over from a process that is known to be gone.
    #[arg(long, env = "FOREBAY_TAKEOVER")]
    takeover: bool,
    /// How long a stop waits for requests that run, in milliseconds.
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 30_000,
        env = "FOREBAY_DRAIN_TIMEOUT_MS"
    )]
    drain_timeout_ms: u64,
    #[command(flatten)]
    cell: CellArgs,
    #[command(flatten)]
    process: ProcessArgs,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        Some(_) | None => Err("is not KEY=VALUE".into()),
    }
}

/// Runs an agent until it is asked to stop.
pub(crate) fn run(args: AgentArgs) -> Result<(), CliError> {
    check_control(&args.cell.control)?;
    let config = Config {
        name: args.name,
        listen: args.listen,
        advertise: args.advertise,
        admin: Some(args.admin),
        engine_url: required("engine", args.engine)?,
        engine_kind: args.engine_kind,
        tenant: args.tenant,
        engine_priority: args.engine_priority,
        engine_command: args.engine_command,
        engine_start_ms: args.engine_start_ms,
        engine_stall_ms: args.engine_stall_ms,
        kv_events: args.kv_events,
        kv_replay: args.kv_replay,
        tokenizer: args.tokenizer,
        pool: args.pool,
        slots: args.slots,
        queue_limit: args.queue_limit,
        max_context_tokens: args.max_context,
        kv_tokens: args.kv_tokens,
        profile: args.profile,
        profile_speed: args.profile_speed,
        zone: args.zone,
        labels: args.label.into_iter().collect(),
        gpu_type: args.gpu_type,
        gpu_count: args.gpu_count,
        revision: args.revision,
        control: args.cell.control,
        data_dir: required("data-dir", args.data_dir)?,
        credentials: args.cell.certificate.paths()?,
        takeover: args.takeover,
        drain_timeout_ms: args.drain_timeout_ms,
    };
    args.process.enter()?;
    // One engine is all that it carries: more threads would only wake each other.
    super::thread()?.block_on(async {
        let stop = super::asked_to_stop()?;
        Ok(forebay_worker_agent::run(config, stop).await?)
    })
}
