//! `forebay sim fleet`: placement rules on a trace, in virtual time.

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use forebay_scheduler::model::Profile;
use forebay_scheduler::policy;
use forebay_sim::fleet::{
    Check, Contender, Fault, Fluid, Order, Rates, Reports, Result as Ran, Setup, Slo, Spread,
    Workload, fluid, pictures, runs_of, runs_of_pictures, study,
};
use forebay_sim::trace::{Options, SAMPLES, Sample, Trace};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::exit::CliError;
use crate::output::{self, OutputArgs};

mod charts;
mod page;

/// Searches look no higher than so many times the fluid bound.
const ABOVE_THE_BOUND: f64 = 1.05;
const MAX_WORKERS: i64 = 4_096;
/// Pictures are means over the first seeds, so many at most.
const SEEDS_OF_PICTURES: usize = 3;

/// Options of `forebay sim fleet`.
#[derive(Debug, Args)]
pub(super) struct FleetArgs {
    /// JSON lines, gzipped or not, or the name of a sample that ships with Forebay:
    /// mooncake-conversation, agentic-coding, lmcache-agents, azure-2023-code or azure-2023-conv.
    #[arg(long, value_name = "TRACE", default_value = "mooncake-conversation")]
    trace: PathBuf,
    /// Take the first N requests only.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Tokens of one KV block of the trace; default: from the manifest.json beside it, else 512.
    #[arg(long, value_name = "TOKENS")]
    block_size: Option<u32>,
    /// Workers of the fleet.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=MAX_WORKERS))]
    workers: u32,
    /// Balancers; requests go to one of them, as their number says.
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    balancers: u16,
    /// Workers report to each balancer so often. 0: every decision sees them as they are.
    #[arg(long, value_name = "MS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=60_000))]
    staleness_ms: u64,
    /// How workers report: every so often (as --staleness-ms says), or as agents do, soon after a change to
    /// the balancers that used them lately and else every 250 ms.
    #[arg(long, value_enum, default_value_t = Reporting::Periodic, conflicts_with_all = ["staleness_ms"])]
    reports: Reporting,
    /// What stands between a placement by forebay and an old view: nothing; the agent's veto; and, after a
    /// refusal, questions to the best few (as balancers do); or questions before each placement; and places
    /// kept for those who asked.
    #[arg(long, value_enum, default_value_t = Checking::Ask)]
    check: Checking,
    /// Share of the reports that are lost.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    report_loss: f64,
    /// Placement rules, the one that the others are compared with first; or "all".
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "forebay,longest-prefix,least-requests"
    )]
    policies: Vec<String>,
    /// Who orders what waits at a worker. "published": the agent for forebay, and the engine, first come,
    /// first served, for the others, as their authors run them. "both" adds each of these with the agent's
    /// queue.
    #[arg(long, value_enum, default_value_t = Queues::Published)]
    queues: Queues,
    /// Offer so many requests a second; 1.5x: so many times as many as were recorded. Default: 1x.
    #[arg(long, value_name = "RATE", conflicts_with = "search")]
    rate: Option<Rate>,
    /// Find the highest rates at which 90 % and 99 % of all requests keep both targets.
    #[arg(long)]
    search: bool,
    /// Halvings of --search; each costs two runs a seed.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(4..=20))]
    steps: u32,
    /// Spread arrivals inside the quantum to which the trace's timestamps were rounded (Mooncake: 3 s).
    /// This is the default.
    #[arg(long, conflicts_with = "burst")]
    jitter: bool,
    /// Let all requests of one quantum arrive at one instant.
    #[arg(long)]
    burst: bool,
    /// Runs that differ by chance alone; figures are means over them, with intervals.
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
    /// The first seed.
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    /// What every request is promised.
    #[arg(long, value_name = "TARGETS", default_value = "ttft=1000ms+0.25ms/token,tpot=150ms", value_parser = slo)]
    slo: Slo,
    /// How fast an engine is: llama-70b-h100-tp4, llama-70b-h100-tp8, llama-70b-a100-tp2 or llama-8b-a100.
    #[arg(long, value_name = "NAME", default_value = "llama-70b-h100-tp4", value_parser = profile)]
    profile: Profile,
    /// Blocks of a worker's cache, and the tokens of one.
    #[arg(long, value_name = "BLOCKSxTOKENS", default_value = "6000x512", value_parser = kv_tokens)]
    kv_blocks: u64,
    /// Engines are faster or slower than the profile by up to this share, and nobody is told.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    speeds: f64,
    /// Give hot families homes, by what agents say of them every ten seconds, as a leader does.
    #[arg(long)]
    homes: bool,
    /// What goes wrong: crash:3@120+60 (the third worker, after 120 s, for 60 s), drain:1@300,
    /// slow:2@0*0.5. May be given again.
    #[arg(long, value_name = "FAULT")]
    fail: Vec<Fault>,
    /// Write one page of pictures that needs nothing else. Takes some 26 runs a policy and 48 more, for
    /// each of up to three seeds.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Queues {
    Published,
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Reporting {
    Periodic,
    Deployed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Checking {
    Nothing,
    Veto,
    Ask,
    AskFirst,
    Reserve,
}

/// Requests a second, or times the trace's own.
#[derive(Clone, Copy, Debug)]
enum Rate {
    Requests(f64),
    Times(f64),
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, make): (&str, fn(f64) -> Self) = match text.strip_suffix('x') {
            Some(times) => (times, Self::Times),
            None => (text, Self::Requests),
        };
        match number.parse() {
            Ok(rate) if (1e-3..=1e6).contains(&rate) => Ok(make(rate)),
            _ => Err(
                "give requests a second, such as 4.5, or times the trace's rate, such as 1.5x"
                    .into(),
            ),
        }
    }
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..1.0).contains(share));
    share.ok_or_else(|| "give a share from 0 up to 1, such as 0.05".into())
}

fn profile(name: &str) -> Result<Profile, String> {
    Profile::named(name).ok_or_else(|| {
        let names: Vec<&str> = forebay_scheduler::model::PROFILES
            .iter()
            .map(|(name, _)| *name)
            .collect();
        format!(
            "there is no such profile; the profiles are {}",
            names.join(", ")
        )
    })
}

fn kv_tokens(text: &str) -> Result<u64, String> {
    let parsed = text.split_once('x').and_then(|(blocks, tokens)| {
        let (blocks, tokens): (u64, u64) = (blocks.parse().ok()?, tokens.parse().ok()?);
        blocks
            .checked_mul(tokens)
            .filter(|tokens| (1..=1 << 40).contains(tokens))
    });
    parsed.ok_or_else(|| "give blocks and the tokens of one, such as 6000x512".into())
}

fn slo(text: &str) -> Result<Slo, String> {
    let ms = |text: &str| {
        let number = text.strip_suffix("ms")?.parse::<f64>().ok()?;
        (0.0..=1e9).contains(&number).then_some(number)
    };
    let parsed = || {
        let (ttft, tpot) = text.strip_prefix("ttft=")?.split_once(",tpot=")?;
        let (ttft, each) = ttft.split_once('+').unwrap_or((ttft, "0ms/token"));
        Some(Slo {
            ttft_ms: ms(ttft)?,
            ttft_ms_per_token: ms(each.strip_suffix("/token")?)?,
            tpot_ms: ms(tpot)?,
        })
    };
    parsed().ok_or_else(|| "give both targets, such as ttft=1000ms+0.25ms/token,tpot=150ms".into())
}

/// The result, as programs read it.
#[derive(Serialize)]
pub(super) struct Report {
    schema_version: u32,
    trace: String,
    requests: usize,
    /// Requests a second, as recorded.
    trace_rate: f64,
    workers: u32,
    balancers: u16,
    staleness_ms: u64,
    /// What became of rounded timestamps.
    arrivals: &'static str,
    seeds: u64,
    /// Requests a second that no placement can exceed.
    fluid_bound: f64,
    /// Share of the prompts' tokens that one pooled cache would hold.
    fluid_hit_ratio: f64,
    /// By name, each with its authors' order of what waits.
    policies: Named,
    /// The published ones before our queue; only with --queues both.
    #[serde(skip_serializing_if = "Option::is_none")]
    with_our_queue: Option<Named>,
}

/// Results in the order in which they were asked for.
struct Named(Vec<(&'static str, Ran)>);

impl Serialize for Named {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.0.iter().map(|(name, ran)| (name, ran)))
    }
}

impl Report {
    /// Name, whether it is a published rule before our queue, and result, in the order in which they ran.
    fn results(&self) -> impl Iterator<Item = (&'static str, bool, &Ran)> {
        let published = self
            .policies
            .0
            .iter()
            .map(|(name, ran)| (*name, false, ran));
        let ours = self.with_our_queue.iter().flat_map(|named| &named.0);
        published.chain(ours.map(|(name, ran)| (*name, true, ran)))
    }
}

pub(super) fn run(args: &FleetArgs) -> Result<(), CliError> {
    if let Some(path) = &args.report {
        can_be_written(path)?;
    }
    let (load, setup) = (Workload::new(&args.read()?), args.setup()?);
    let bound = fluid(&load, &setup);
    let rates = args.rates(&load, &bound);
    let published: Vec<Contender> = args.contenders()?;
    let mut contenders = published.clone();
    if args.queues == Queues::Both {
        let theirs = published.iter().filter(|one| one.order == Order::Fcfs);
        contenders.extend(theirs.map(|one| Contender {
            order: Order::Slack,
            ..*one
        }));
    }
    let seeds: Vec<u64> = (0..args.seeds).map(|number| args.seed + number).collect();
    let bar = bar(runs_of(contenders.len(), seeds.len(), rates));
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let ran = study(&load, &setup, &contenders, rates, &seeds, threads, &|| {
        bar.inc(1);
    });
    let drawn = args.report.as_ref().map(|path| {
        let seeds = &seeds[..seeds.len().min(SEEDS_OF_PICTURES)];
        let more = runs_of_pictures(contenders.len(), seeds.len());
        bar.set_length(bar.position() + more as u64);
        let studied = (&contenders[..], &ran[..]);
        let drawn = pictures(&load, &setup, studied, seeds, threads, &|| bar.inc(1));
        (path, drawn)
    });
    bar.finish_and_clear();
    let mut named = contenders.iter().map(|one| one.policy.name()).zip(ran);
    let report = Report {
        schema_version: 1,
        trace: args.trace.display().to_string(),
        requests: load.len(),
        trace_rate: load.rate(),
        workers: args.workers,
        balancers: args.balancers,
        staleness_ms: args.staleness_ms,
        arrivals: if args.burst { "burst" } else { "jitter" },
        seeds: args.seeds,
        fluid_bound: bound.bound,
        fluid_hit_ratio: bound.hit_ratio,
        policies: Named(named.by_ref().take(published.len()).collect()),
        with_our_queue: (args.queues == Queues::Both).then(|| Named(named.collect())),
    };
    if let Some((path, drawn)) = drawn {
        let page = page::page(&report, &drawn, &args.about(&report));
        std::fs::write(path, page).map_err(|error| unwritable(path, &error))?;
    }
    args.output.print(&report, || table(&report));
    Ok(())
}

/// Says so before the runs, not after them.
fn can_be_written(path: &Path) -> Result<(), CliError> {
    let mut options = std::fs::OpenOptions::new();
    let opened = options.write(true).create(true).truncate(false).open(path);
    opened.map(drop).map_err(|error| unwritable(path, &error))
}

fn unwritable(path: &Path, error: &std::io::Error) -> CliError {
    CliError::usage(format!("--report {}: {error}", path.display()))
}

impl FleetArgs {
    fn read(&self) -> Result<Trace, CliError> {
        let limit = self.limit.map(|limit| limit as usize);
        let sample = self.trace.to_str().and_then(Sample::named);
        match sample.filter(|_| !self.trace.exists()) {
            Some(sample) => Ok(sample.read(limit)?),
            None if !self.trace.exists() && self.trace.components().count() == 1 => {
                let names = SAMPLES.map(|sample| sample.name).join(", ");
                Err(CliError::usage(format!(
                    "{} is neither a file nor a sample; the samples are {names}",
                    self.trace.display()
                )))
            }
            None => {
                let options = Options {
                    limit,
                    block_tokens: self.block_size,
                };
                Ok(Trace::open(&self.trace, options)?)
            }
        }
    }

    fn setup(&self) -> Result<Setup, CliError> {
        if let Some(fault) = self.fail.iter().find(|fault| fault.worker >= self.workers) {
            let problem = format!(
                "--fail names worker {}, and there are {}",
                fault.worker + 1,
                self.workers
            );
            return Err(CliError::usage(problem));
        }
        Ok(Setup {
            workers: self.workers,
            balancers: self.balancers,
            reports: match self.reports {
                Reporting::Periodic => Reports::every(Duration::from_millis(self.staleness_ms)),
                Reporting::Deployed => Reports::Deployed,
            },
            check: match self.check {
                Checking::Nothing => Check::Nothing,
                Checking::Veto => Check::Veto,
                Checking::Ask => Check::Ask,
                Checking::AskFirst => Check::AskFirst,
                Checking::Reserve => Check::Reserve,
            },
            report_loss: self.report_loss,
            profile: self.profile,
            speed_spread: self.speeds,
            kv_tokens: self.kv_blocks,
            slo: self.slo,
            spread: if self.burst {
                Spread::Burst
            } else {
                Spread::Jitter
            },
            homes: self.homes,
            faults: self.fail.clone(),
            ..Setup::default()
        })
    }

    fn about(&self, report: &Report) -> page::About {
        let words: Vec<String> = std::env::args().skip(1).map(|word| quoted(&word)).collect();
        let named = forebay_scheduler::model::PROFILES;
        let profile = named.iter().find(|(_, profile)| *profile == self.profile);
        let Slo {
            ttft_ms,
            ttft_ms_per_token,
            tpot_ms,
        } = self.slo;
        let each = match ttft_ms_per_token {
            0.0 => String::new(),
            each => format!(" + {each} ms a prompt token"),
        };
        let reports = match (self.reports, self.staleness_ms) {
            (Reporting::Deployed, _) => "soon after a change".into(),
            (Reporting::Periodic, 0) => "always fresh".into(),
            (Reporting::Periodic, ms) => format!("every {ms} ms"),
        };
        let trace = self.trace.file_name().unwrap_or(self.trace.as_os_str());
        let trace = trace.to_string_lossy().into_owned();
        let mut facts = vec![
            ("Requests", format!("{} of {trace}", report.requests)),
            (
                "Arrivals",
                format!(
                    "{}; recorded at {:.2}/s",
                    report.arrivals, report.trace_rate
                ),
            ),
            ("Workers", self.workers.to_string()),
            (
                "Engine",
                profile.map_or("custom", |(name, _)| name).to_owned(),
            ),
            (
                "Cache of a worker",
                format!("{:.2} million tokens", self.kv_blocks as f64 / 1e6),
            ),
            ("Balancers", self.balancers.to_string()),
            ("Reports", reports),
            (
                "Targets",
                format!("TTFT {ttft_ms} ms{each}, TPOT {tpot_ms} ms"),
            ),
            ("Seeds", format!("{} from {}", self.seeds, self.seed)),
            (
                "Fluid bound",
                format!(
                    "{:.2} requests/s, {:.1} % cached",
                    report.fluid_bound,
                    report.fluid_hit_ratio * 100.0
                ),
            ),
        ];
        if self.report_loss > 0.0 {
            facts.push(("Reports lost", format!("{:.1} %", self.report_loss * 100.0)));
        }
        if self.speeds > 0.0 {
            facts.push((
                "Engines differ by",
                format!("up to {:.1} %", self.speeds * 100.0),
            ));
        }
        if !self.fail.is_empty() {
            facts.push(("Faults", format!("{}, see the command", self.fail.len())));
        }
        page::About {
            command: format!("forebay {}", words.join(" ")),
            trace,
            facts,
            searched: self.search,
        }
    }

    fn rates(&self, load: &Workload, bound: &Fluid) -> Rates {
        if self.search {
            return Rates::Search {
                most: ABOVE_THE_BOUND * bound.bound,
                steps: self.steps,
            };
        }
        Rates::Fixed(match self.rate {
            None => load.rate(),
            Some(Rate::Times(times)) => times * load.rate(),
            Some(Rate::Requests(rate)) => rate,
        })
    }

    fn contenders(&self) -> Result<Vec<Contender>, CliError> {
        if self.policies == ["all"] {
            return Ok(policy::ALL
                .into_iter()
                .map(Contender::as_published)
                .collect());
        }
        let named = |name: &String| {
            policy::named(name)
                .map(Contender::as_published)
                .ok_or_else(|| {
                    let names: Vec<&str> = policy::ALL.iter().map(|one| one.name()).collect();
                    CliError::usage(format!(
                        "there is no policy {name}; the policies are {}",
                        names.join(", ")
                    ))
                })
        };
        self.policies.iter().map(named).collect()
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |one: char| one.is_ascii_alphanumeric() || "-_./,:=+@%".contains(one);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn bar(runs: usize) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(runs as u64), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} runs, {eta} left");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn table(report: &Report) -> String {
    let mut text = format!(
        "{} requests, {} workers, fluid bound {:.2} requests/s with {:.1} % of tokens cached\n\n{}",
        report.requests,
        report.workers,
        report.fluid_bound,
        report.fluid_hit_ratio * 100.0,
        rows(&report.policies)
    );
    if let Some(with_our_queue) = &report.with_our_queue {
        text.push_str(&format!("\n\nwith our queue\n\n{}", rows(with_our_queue)));
    }
    text
}

fn rows(named: &Named) -> String {
    let head = [
        "POLICY", "AT 90 %", "AT 99 %", "RATE", "KEPT", "CACHED", "TTFT P50", "TTFT P99",
        "TPOT P99", "MAX/MEAN",
    ];
    output::table(
        head,
        named.0.iter().map(|(name, ran)| {
            let share = |share: &Option<forebay_sim::fleet::Estimate>| match share {
                None => String::new(),
                Some(share) => match share.ci95 {
                    None => format!("{:.3}", share.mean),
                    Some(ci95) => format!("{:.3} ±{ci95:.3}", share.mean),
                },
            };
            let figures = &ran.figures;
            [
                (*name).to_owned(),
                share(&ran.of_bound90),
                share(&ran.of_bound99),
                format!("{:.2}/s", figures.rate),
                format!("{:.1} %", figures.attainment * 100.0),
                format!("{:.1} %", figures.hit_ratio * 100.0),
                format!("{:.0} ms", figures.ttft_p50_ms),
                format!("{:.0} ms", figures.ttft_p99_ms),
                format!("{:.0} ms", figures.tpot_p99_ms),
                format!("{:.2}", figures.max_over_mean),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_as_they_are_shown() {
        assert_eq!(
            slo("ttft=1000ms+0.25ms/token,tpot=150ms"),
            Ok(Slo::default())
        );
        let plain = slo("ttft=500ms,tpot=50ms").unwrap();
        assert_eq!(
            (plain.ttft_ms, plain.ttft_ms_per_token, plain.tpot_ms),
            (500.0, 0.0, 50.0)
        );
        for wrong in [
            "",
            "ttft=1s,tpot=1ms",
            "ttft=1ms",
            "ttft=-1ms,tpot=1ms",
            "ttft=NaNms,tpot=1ms",
        ] {
            assert!(slo(wrong).unwrap_err().contains("give both targets"));
        }
    }

    #[test]
    fn a_cache_is_blocks_of_tokens() {
        assert_eq!(kv_tokens("6000x512"), Ok(3_072_000));
        for wrong in ["", "6000", "x", "0x512", "99999999999x99999999999"] {
            assert!(kv_tokens(wrong).is_err());
        }
    }
}
