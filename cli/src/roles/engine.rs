//! `forebay engine`: an emulated inference engine.

use std::net::SocketAddr;

use clap::Args;
use forebay_scheduler::model::{PROFILES, Profile};
use forebay_sim::engine::{self, Config, KvEvents};

use super::ProcessArgs;
use crate::exit::CliError;

/// Options of `forebay engine`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay engine --listen 127.0.0.1:8000 --model emulated --profile llama-8b-a100 --speed 10"
)]
pub(crate) struct EngineArgs {
    /// Where to listen; port 0 takes a free one.
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1:8000",
        env = "FOREBAY_LISTEN"
    )]
    pub(crate) listen: SocketAddr,
    /// A name to serve the model under; give it again for more names.
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        default_value = "emulated",
        env = "FOREBAY_MODEL"
    )]
    pub(crate) model: Vec<String>,
    /// Requests that run at once.
    #[arg(long, value_name = "N", default_value_t = 256, env = "FOREBAY_SLOTS")]
    pub(crate) slots: usize,
    /// Requests that wait beyond them; more are refused.
    #[arg(long, value_name = "N", default_value_t = 4_096, env = "FOREBAY_QUEUE")]
    pub(crate) queue: usize,
    /// The server whose latency is emulated.
    #[arg(
        long,
        value_name = "NAME",
        default_value = PROFILES[0].0,
        value_parser = profile_name,
        env = "FOREBAY_PROFILE"
    )]
    pub(crate) profile: String,
    /// Divides all times: 10 is ten times as fast.
    #[arg(long, value_name = "X", default_value_t = 1.0, env = "FOREBAY_SPEED")]
    pub(crate) speed: f64,
    /// Tokens that the KV cache holds.
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 3_000_000,
        env = "FOREBAY_KV_TOKENS"
    )]
    pub(crate) kv_tokens: u64,
    /// Tokens of one block of the cache.
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 16,
        env = "FOREBAY_BLOCK_TOKENS"
    )]
    pub(crate) block_tokens: u32,
    /// Tokens that prompt and answer may have together.
    #[arg(long, value_name = "TOKENS", default_value_t = 1 << 20, env = "FOREBAY_MAX_CONTEXT")]
    pub(crate) max_context: u64,
    /// Where to publish the cache's events, as vLLM does: ipc://PATH or tcp://127.0.0.1:PORT.
    #[arg(long, value_name = "ENDPOINT", env = "FOREBAY_KV_EVENTS")]
    pub(crate) kv_events: Option<String>,
    /// Where to tell events again that were missed.
    #[arg(
        long,
        value_name = "ENDPOINT",
        requires = "kv_events",
        env = "FOREBAY_KV_REPLAY"
    )]
    pub(crate) kv_replay: Option<String>,
    /// Batches of events that can be told again.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 10_000,
        env = "FOREBAY_KV_BUFFER"
    )]
    pub(crate) kv_buffer: usize,
    /// Die of a request with `seed` once its prompt is prefilled, as some real engines do.
    #[arg(long, env = "FOREBAY_DIE_OF_SEED")]
    pub(crate) die_of_seed: bool,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
}

/// A latency profile's name, checked.
pub(crate) fn profile_name(text: &str) -> Result<String, String> {
    let names = PROFILES.map(|(name, _)| name);
    if names.contains(&text) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "there is no such profile; there are {}",
        names.join(", ")
    ))
}

/// Runs the engine until it is asked to stop.
pub(crate) fn run(args: EngineArgs) -> Result<(), CliError> {
    args.process.enter()?;
    let config = Config {
        listen: args.listen,
        models: args.model,
        slots: args.slots,
        queue: args.queue,
        profile: Profile::named(&args.profile).unwrap_or_default(),
        kv_tokens: args.kv_tokens,
        block_tokens: args.block_tokens,
        speed: args.speed,
        max_context_tokens: args.max_context,
        kv_events: args.kv_events.map(|endpoint| KvEvents {
            endpoint,
            replay: args.kv_replay,
            buffer: args.kv_buffer,
        }),
        dies_of_seed: args.die_of_seed,
    };
    super::threads()?.block_on(async {
        let stop = super::asked_to_stop()?;
        let models = config.models.join(", ");
        let ready = |at| tracing::info!("engine ready: {models} on http://{at}");
        Ok(engine::serve(config, ready, stop).await?)
    })
}
