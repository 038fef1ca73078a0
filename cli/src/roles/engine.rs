//! `forebay engine`: an emulated inference engine.

use std::net::SocketAddr;

use clap::Args;
use forebay_sim::engine::{self, Config};

use super::ProcessArgs;
use crate::exit::CliError;

/// Options of `forebay engine`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay engine --listen 127.0.0.1:8000 --model emulated --ttft-ms 50 --tpot-ms 20"
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
    #[arg(long, value_name = "N", default_value_t = 64, env = "FOREBAY_SLOTS")]
    pub(crate) slots: usize,
    /// Requests that wait beyond them; more are refused.
    #[arg(long, value_name = "N", default_value_t = 256, env = "FOREBAY_QUEUE")]
    pub(crate) queue: usize,
    /// Milliseconds to the first token of an empty prompt.
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 20.0,
        env = "FOREBAY_TTFT_MS"
    )]
    pub(crate) ttft_ms: f64,
    /// Prompt tokens prefilled a second, for each request on its own.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 10_000.0,
        env = "FOREBAY_PREFILL_TOKENS_PER_S"
    )]
    pub(crate) prefill_tokens_per_s: f64,
    /// Milliseconds from token to token.
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 20.0,
        env = "FOREBAY_TPOT_MS"
    )]
    pub(crate) tpot_ms: f64,
    /// Divides all times: 10 is ten times as fast.
    #[arg(long, value_name = "X", default_value_t = 1.0, env = "FOREBAY_SPEED")]
    pub(crate) speed: f64,
    /// Tokens that prompt and answer may have together.
    #[arg(long, value_name = "TOKENS", default_value_t = 1 << 20, env = "FOREBAY_MAX_CONTEXT")]
    pub(crate) max_context: u64,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
}

/// Runs the engine until it is asked to stop.
pub(crate) fn run(args: EngineArgs) -> Result<(), CliError> {
    args.process.enter()?;
    let config = Config {
        listen: args.listen,
        models: args.model,
        slots: args.slots,
        queue: args.queue,
        ttft_ms: args.ttft_ms,
        prefill_tokens_per_s: args.prefill_tokens_per_s,
        tpot_ms: args.tpot_ms,
        speed: args.speed,
        max_context_tokens: args.max_context,
    };
    super::threads()?.block_on(async {
        let stop = super::asked_to_stop()?;
        let models = config.models.join(", ");
        let ready = |at| tracing::info!("engine ready: {models} on http://{at}");
        Ok(engine::serve(config, ready, stop).await?)
    })
}
