//! `forebay replay`: a real trace through an endpoint, open loop.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use forebay_sim::replay::{self, ApiKey, Percentiles, Progress, Report};
use forebay_sim::trace::{Options, Trace};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, say, table};

/// Options of `forebay replay`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay replay --limit 200\n  forebay replay trace.jsonl.gz --target http://10.0.0.5:8080 --speed 2 --output json\n\nWhat is measured: every request has an intended start, the trace's own divided by --speed, and is sent then, whether or not earlier ones were answered. \"first token\" and \"end to end\" count from that intended start, so that a slow fleet cannot hide by delaying the generator; \"between tokens\" is each request's mean after its first token; \"send lag\" is how much later than intended requests were sent, which is this machine's doing, not the fleet's. All are of good answers only, in milliseconds.\n\nThe shipped sample is the first 400 requests (141 s) of the conversation trace of Mooncake (Qin et al., FAST 2025), Apache-2.0: lengths, times and shared blocks, no text. The texts sent are made up to match.\n\nExits with 1 when a request had an error, with 7 when the target does not answer."
)]
pub(crate) struct ReplayArgs {
    /// JSON lines, gzipped or not; default: the sample of a real trace that ships with Forebay.
    #[arg(value_name = "TRACE")]
    trace: Option<PathBuf>,
    /// Base URL to send to, without TLS; give it again and requests take turns.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    target: Vec<String>,
    /// Send the first N requests only.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// How many times faster than recorded: 2 is twice the requests a second.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    speed: f64,
    /// The model to ask for; default: the first that the target lists.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Sent as the bearer token.
    #[arg(
        long,
        value_name = "KEY",
        env = "FOREBAY_API_KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,
    /// Seconds that one request may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 600,
          value_parser = clap::value_parser!(u64).range(1..))]
    request_timeout: u64,
    /// Requests that may be unanswered at once; what is due beyond is an error.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    max_in_flight: usize,
    /// Check every answer's text, which only the emulated engine makes predictable.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `forebay replay`.
pub(crate) fn run(args: ReplayArgs) -> Result<(), CliError> {
    let limit = args.limit.map(|limit| limit as usize);
    let trace = match &args.trace {
        None => Trace::sample(limit)?,
        Some(path) => Trace::open(
            path,
            Options {
                limit,
                ..Options::default()
            },
        )?,
    };
    let config = replay::Config {
        trace,
        targets: args.target,
        speed: args.speed,
        limit,
        model: args.model,
        api_key: args.api_key.map(ApiKey),
        timeout: Duration::from_secs(args.request_timeout),
        max_in_flight: args.max_in_flight,
        verify: args.verify,
    };
    let mut shown = Shown::new();
    let report = crate::roles::threads()?
        .block_on(replay::run(config, |progress| shown.update(progress)))?;
    shown.clear();
    args.output.print(&report, || page(&report));
    if report.errors > 0 {
        return Err(CliError::because(
            Exit::Failed,
            format!(
                "{} of {} requests had errors",
                report.errors, report.requests
            ),
        ));
    }
    Ok(())
}

/// Progress on stderr: a bar on a terminal, else a line now and then.
struct Shown {
    bar: Option<ProgressBar>,
    next_line: Duration,
}

impl Shown {
    fn new() -> Self {
        let bar = std::io::IsTerminal::is_terminal(&std::io::stderr()).then(|| {
            let style = ProgressStyle::with_template(
                "{wide_bar} {pos}/{len} requests, {msg}, {elapsed} elapsed, {eta} left",
            )
            .expect("the template is a constant");
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
        });
        Self {
            bar,
            next_line: LINE_EVERY,
        }
    }

    fn update(&mut self, progress: Progress) {
        let Progress {
            total,
            done,
            in_flight,
            errors,
            elapsed,
        } = progress;
        match &self.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(format!("{in_flight} in flight, {errors} errors"));
            }
            None if elapsed >= self.next_line => {
                self.next_line = elapsed + LINE_EVERY;
                say(&format!(
                    "{done}/{total} requests, {in_flight} in flight, {errors} errors after {} s",
                    elapsed.as_secs()
                ));
            }
            None => {}
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

const LINE_EVERY: Duration = Duration::from_secs(5);

fn page(report: &Report) -> String {
    let mut text = format!(
        "requests  {}\nerrors    {}\nduration  {:.1} s\ntokens    {} in, {} out{}\n\n",
        report.requests,
        report.errors,
        report.duration_s,
        report.input_tokens,
        report.output_tokens,
        report
            .cached_token_ratio
            .map_or_else(String::new, |ratio| format!(
                ", {:.1} % cached",
                ratio * 100.0
            )),
    );
    let row = |name: &str, p: &Percentiles| [name.to_owned(), ms(p.p50), ms(p.p90), ms(p.p99)];
    text += &table(
        ["LATENCY (ms)", "P50", "P90", "P99"],
        [
            row("first token", &report.ttft_ms),
            row("between tokens", &report.tpot_ms),
            row("end to end", &report.e2e_ms),
            [
                "send lag".into(),
                String::new(),
                String::new(),
                ms(report.send_lag_ms.p99),
            ],
        ],
    );
    if !report.workers.is_empty() {
        let named: u64 = report.workers.values().sum();
        let unnamed = report.requests.saturating_sub(named);
        let rows = report
            .workers
            .iter()
            .map(|(w, n)| [w.clone(), n.to_string()])
            .chain((unnamed > 0).then(|| ["(not named)".into(), unnamed.to_string()]));
        text += &format!("\n\n{}", table(["WORKER", "REQUESTS"], rows));
    }
    if !report.errors_by.is_empty() {
        let rows = report.errors_by.iter().map(|error| {
            let status = error.status.map_or_else(String::new, |s| s.to_string());
            [status, error.code.clone(), error.count.to_string()]
        });
        text += &format!("\n\n{}", table(["STATUS", "ERROR", "COUNT"], rows));
    }
    text
}

fn ms(value: Option<f64>) -> String {
    value.map_or_else(String::new, |ms| format!("{ms:.1}"))
}
