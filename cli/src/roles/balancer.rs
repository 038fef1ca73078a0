//! `forebay balancer`: takes clients' requests and places them on workers.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use forebay_balancer::{Config, TlsPaths};

use super::ProcessArgs;
use crate::context::{CellArgs, check_control};
use crate::exit::CliError;
use crate::settings::required;

/// Options of `forebay balancer`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay balancer --control c1:7400,c2:7400,c3:7400 --keys keys.toml --data-dir /var/lib/forebay --ca ca.pem --cert b1.pem --key b1-key.pem"
)]
pub(crate) struct BalancerArgs {
    /// Where clients' requests arrive (TCP).
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "0.0.0.0:8080",
        env = "FOREBAY_LISTEN"
    )]
    listen: SocketAddr,
    /// Where its health and metrics are (TCP); they are not for everybody.
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1:7411",
        env = "FOREBAY_ADMIN"
    )]
    admin: SocketAddr,
    /// Where it keeps the last facts, to serve without a control plane.
    #[arg(long, value_name = "DIR", env = "FOREBAY_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// TOML file of API keys, read again when it changes: [[keys]] with sha256 and tenant (from
    /// `forebay keys hash`), and optionally models, requests_per_minute, max_parallel and debug.
    #[arg(long, value_name = "FILE", env = "FOREBAY_KEYS")]
    keys: Option<PathBuf>,
    /// Take any API key, and none, as this tenant's; for development.
    #[arg(long, value_name = "NAME", env = "FOREBAY_ANY_KEY_TENANT")]
    any_key_tenant: Option<String>,
    /// Certificate for clients, as PEM, with those that signed it; read again when it changes.
    /// Without it clients speak plain HTTP.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_key",
        env = "FOREBAY_TLS_CERT"
    )]
    tls_cert: Option<PathBuf>,
    /// Its key, as PEM.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_cert",
        env = "FOREBAY_TLS_KEY"
    )]
    tls_key: Option<PathBuf>,
    /// Longest request body in bytes.
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 33_554_432,
        env = "FOREBAY_MAX_BODY_BYTES"
    )]
    max_body_bytes: u64,
    /// How long the status line waits for the engine's first byte, so that a failure keeps a real
    /// status, in milliseconds.
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 15_000,
        env = "FOREBAY_HOLD_HEADERS_MS"
    )]
    hold_headers_ms: u64,
    /// How long a stop waits for requests that run, in milliseconds.
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 30_000,
        env = "FOREBAY_DRAIN_TIMEOUT_MS"
    )]
    drain_timeout_ms: u64,
    /// Receipts of its last decisions that it keeps for `forebay explain`, in at most 256 MiB. A decision
    /// costs some microseconds more with them. 0: none.
    #[arg(
        long,
        value_name = "N",
        default_value_t = RECEIPTS,
        value_parser = clap::value_parser!(u32).range(..=MOST_RECEIPTS),
        env = "FOREBAY_RECEIPTS"
    )]
    receipts: u32,
    #[command(flatten)]
    cell: CellArgs,
    #[command(flatten)]
    process: ProcessArgs,
}

/// As many as fit when each has the inputs of 16 workers.
pub(crate) const RECEIPTS: u32 = 100_000;
pub(crate) const MOST_RECEIPTS: i64 = 1_000_000;

/// Runs a balancer until it is asked to stop.
pub(crate) fn run(args: BalancerArgs) -> Result<(), CliError> {
    check_control(&args.cell.control)?;
    let config = Config {
        listen: args.listen,
        admin: Some(args.admin),
        control: args.cell.control,
        data_dir: required("data-dir", args.data_dir)?,
        credentials: args.cell.certificate.paths()?,
        keys: args.keys,
        any_key_tenant: args.any_key_tenant,
        tls: args
            .tls_cert
            .zip(args.tls_key)
            .map(|(cert, key)| TlsPaths { cert, key }),
        max_body_bytes: args.max_body_bytes,
        hold_headers_ms: args.hold_headers_ms,
        drain_timeout_ms: args.drain_timeout_ms,
        receipts: usize::try_from(args.receipts).unwrap_or(usize::MAX),
    };
    args.process.enter()?;
    super::threads()?.block_on(async {
        let stop = super::asked_to_stop()?;
        Ok(forebay_balancer::run(config, stop).await?)
    })
}
