//! `forebay replay`: a real trace through an endpoint, open loop.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use forebay_sim::replay::{self, ApiKey, Endpoint, OneRequest, Percentiles, Progress, Report};
use forebay_sim::trace::{Options, SAMPLES, Sample, Trace};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, say, table};

/// Options of `forebay replay`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay replay --limit 200\n  forebay replay agentic-coding --limit 50\n  forebay replay trace.jsonl.gz --target http://10.0.0.5:8080 --speed 2 --output json\n\nWhat is measured: every request has an intended start, the trace's own divided by --speed, and is sent then, whether or not earlier ones were answered. \"first token\" and \"end to end\" count from that intended start, so that a slow fleet cannot hide by delaying the generator; \"between tokens\" is each request's mean after its first token; \"send lag\" is how much later than intended requests were sent, which is this machine's doing, not the fleet's. All are of good answers only, in milliseconds.\n\nAnswers \"not named\" came by no worker that the client could see: their stream had to begin (--hold-headers-ms of the balancer) before their first token, or their key has no debug.\n\nThe shipped samples are the first 300 or 400 requests of public traces (sim/data/README.md has sources and licences): lengths, times and shared blocks, no text. The texts sent are made up to match.\n\nExits with 1 when a request had an error, with 7 when the target does not answer."
)]
pub(crate) struct ReplayArgs {
    #[command(flatten)]
    trace: TraceArgs,
    /// Base URL to send to, without TLS; give it again and requests take turns.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    target: Vec<String>,
    /// How many times faster than recorded: 2 is twice the requests a second.
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = speed)]
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
    /// Write a line of JSON for each request: worker, times in ms, tokens.
    #[arg(long, value_name = "FILE")]
    per_request: Option<PathBuf>,
    /// Check every answer's text, which only the emulated engine makes predictable.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Which requests are sent, and as what.
#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    /// JSON lines, gzipped or not, or the name of a sample that ships with Forebay:
    /// mooncake-conversation (the default), agentic-coding, lmcache-agents, azure-2023-code or
    /// azure-2023-conv.
    #[arg(value_name = "TRACE")]
    trace: Option<PathBuf>,
    /// Send the first N requests only.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Tokens of one KV block of the trace; default: from the manifest.json beside it, else 512.
    #[arg(long, value_name = "TOKENS")]
    block_size: Option<u32>,
    /// Spread arrivals inside the quantum to which the trace's timestamps were rounded (Mooncake: 3 s).
    #[arg(long)]
    jitter: bool,
    /// Which arrivals --jitter draws.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Send prompts as chats or as completions.
    #[arg(long, value_name = "KIND", value_enum, default_value_t = Kind::Chat)]
    endpoint: Kind,
}

/// What prompts are sent as.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    Chat,
    Completions,
}

impl TraceArgs {
    /// The name of what is sent.
    pub(crate) fn name(&self) -> String {
        let path = self.trace.as_ref();
        path.map_or_else(
            || SAMPLES[0].name.to_owned(),
            |path| path.display().to_string(),
        )
    }

    /// Reads the trace; targets are to be named yet.
    pub(crate) fn config(&self) -> Result<replay::Config, CliError> {
        let limit = self.limit.map(|limit| limit as usize);
        let name = self.trace.as_ref().and_then(|path| path.to_str());
        let sample = match &self.trace {
            None => Some(&SAMPLES[0]),
            Some(path) if path.exists() || !is_bare_name(path) => None,
            Some(path) => Some(name.and_then(Sample::named).ok_or_else(|| {
                let names = SAMPLES.map(|sample| sample.name).join(", ");
                CliError::usage(format!(
                    "{} is neither a file nor a sample; the samples are {names}",
                    path.display()
                ))
            })?),
        };
        let mut trace = match (sample, &self.trace) {
            (Some(sample), _) => sample.read(limit)?,
            (None, Some(path)) => Trace::open(
                path,
                Options {
                    limit,
                    block_tokens: self.block_size,
                },
            )?,
            (None, None) => Trace::sample(limit)?,
        };
        if let Some(block_size) = self.block_size {
            trace.block_tokens = block_size;
        }
        Ok(replay::Config {
            limit,
            jitter: self.jitter.then_some(self.seed),
            endpoint: match self.endpoint {
                Kind::Chat => Endpoint::Chat,
                Kind::Completions => Endpoint::Completions,
            },
            targets: Vec::new(),
            ..replay::Config::new(trace, String::new())
        })
    }
}

/// Whether it cannot be anything but a sample's name or a mistake in one.
fn is_bare_name(path: &Path) -> bool {
    path.extension().is_none() && path.components().count() == 1
}

/// How many times faster: a number greater than 0.
pub(crate) fn speed(text: &str) -> Result<f64, String> {
    let speed: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if speed.is_finite() && speed > 0.0 {
        return Ok(speed);
    }
    Err("must be greater than 0".to_owned())
}

/// Writes a line for each request.
pub(crate) struct Lines {
    path: PathBuf,
    file: std::io::BufWriter<std::fs::File>,
    problem: Option<std::io::Error>,
}

impl Lines {
    pub(crate) fn create(path: &Path) -> Result<Self, CliError> {
        let file = std::fs::File::create(path).map_err(|error| CliError::File {
            path: path.into(),
            error,
        })?;
        Ok(Self {
            path: path.into(),
            file: std::io::BufWriter::new(file),
            problem: None,
        })
    }

    pub(crate) fn write(&mut self, request: &OneRequest) {
        if self.problem.is_none() {
            let line = serde_json::to_string(request).expect("plain data serialises");
            self.problem = writeln!(self.file, "{line}").err();
        }
    }

    pub(crate) fn finish(mut self) -> Result<(), CliError> {
        let problem = self.problem.take().or(self.file.flush().err());
        problem.map_or(Ok(()), |error| {
            Err(CliError::File {
                path: self.path.clone(),
                error,
            })
        })
    }
}

/// Runs `forebay replay`.
pub(crate) fn run(args: ReplayArgs) -> Result<(), CliError> {
    let config = replay::Config {
        targets: args.target,
        speed: args.speed,
        model: args.model,
        api_key: args.api_key.map(ApiKey),
        timeout: Duration::from_secs(args.request_timeout),
        max_in_flight: args.max_in_flight,
        verify: args.verify,
        ..args.trace.config()?
    };
    let mut lines = args.per_request.as_deref().map(Lines::create).transpose()?;
    let mut shown = Shown::new();
    let report = crate::roles::threads()?.block_on(replay::run_each(
        config,
        |progress| shown.update(progress),
        |request| {
            if let Some(lines) = &mut lines {
                lines.write(&request);
            }
        },
    ))?;
    shown.clear();
    if let Some(lines) = lines {
        lines.finish()?;
    }
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
pub(crate) struct Shown {
    bar: Option<ProgressBar>,
    next_line: Duration,
}

impl Shown {
    pub(crate) fn new() -> Self {
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

    pub(crate) fn update(&mut self, progress: Progress) {
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
                let seconds = elapsed.as_secs();
                let left = left(done, total, elapsed);
                say(&format!(
                    "{done}/{total} requests, {in_flight} in flight, {errors} errors after {seconds} s{left}"
                ));
            }
            None => {}
        }
    }

    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How long the rest takes at the pace so far; nothing before there is one.
fn left(done: u64, total: u64, elapsed: Duration) -> String {
    if done == 0 {
        return String::new();
    }
    let left = elapsed.as_secs_f64() / done as f64 * total.saturating_sub(done) as f64;
    format!(", about {left:.0} s left")
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

pub(crate) fn ms(value: Option<f64>) -> String {
    value.map_or_else(String::new, |ms| format!("{ms:.1}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_once_something_is_done() {
        let five = Duration::from_secs(5);
        assert_eq!(left(0, 50, five), "");
        assert_eq!(left(10, 50, five), ", about 20 s left");
        assert_eq!(left(50, 50, five), ", about 0 s left");
    }
}
