//! `forebay explain`: why a request went where it went, or where it would go.

mod page;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Args;
use forebay_proto::Incarnation;
use forebay_scheduler::{Outcome, Receipt};
use futures::future::join_all;
use serde::{Deserialize, Serialize};

use crate::context::ContextArgs;
use crate::exit::{CliError, Exit};
use crate::http::{self, Answer, Sent};
use crate::output::{OutputArgs, say};

/// Options of `forebay explain`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay explain 0f3c…                         the request with this x-request-id\n  forebay explain --worker w3 --last 5          what was placed on w3 last\n  forebay explain 0f3c… --replay                made again here: the same choice?\n  forebay explain --what-if request.json        where it would go now, without being sent\n  forebay explain 0f3c… --balancer http://10.0.0.7:7411\n\nBalancers are those of `[balancers]` in the context file (`b1 = \"http://HOST:7411\"`, their --admin), or of --balancer. Each keeps the receipts of its last 100,000 placements (--receipts). --what-if asks a balancer on its clients' port, with a key that has `debug`.\n\nExits with 5 when nobody has such a placement, with 7 when that cannot be said because a balancer does not answer, with 1 when --replay makes another choice."
)]
pub(crate) struct ExplainArgs {
    /// The request, by the `x-request-id` of its answer.
    #[arg(
        value_name = "REQUEST_ID",
        required_unless_present_any = ["worker", "what_if"],
        conflicts_with_all = ["worker", "what_if"]
    )]
    request: Option<String>,
    /// The last placements on this worker.
    #[arg(long, value_name = "NAME", conflicts_with = "what_if")]
    worker: Option<String>,
    /// How many of them, of each balancer.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "worker",
          value_parser = clap::value_parser!(u32).range(1..=1_000))]
    last: u32,
    /// A request's body (JSON); it is placed and not sent.
    #[arg(long, value_name = "FILE")]
    what_if: Option<PathBuf>,
    /// Make each decision again, here, from what its receipt holds.
    #[arg(long)]
    replay: bool,
    /// Read receipts from a file of JSON lines, as /debug/receipts shows them, and ask nobody.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["what_if", "balancer"])]
    from: Option<PathBuf>,
    /// Admin URL of a balancer to ask; give it again for more. Default: those of the context.
    #[arg(long, value_name = "URL")]
    balancer: Vec<String>,
    /// Where --what-if asks: a balancer's URL for clients. Default: the first of the context.
    #[arg(long, value_name = "URL", requires = "what_if")]
    target: Option<String>,
    /// With --what-if: sent as the bearer token.
    #[arg(
        long,
        value_name = "KEY",
        env = "FOREBAY_API_KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

/// One decision, as a balancer shows it.
#[derive(Debug, Serialize, Deserialize)]
struct Placement {
    /// Which balancer's.
    #[serde(default)]
    balancer: String,
    /// Counts that balancer's placements; absent: it was only asked what it would do.
    #[serde(default)]
    number: Option<u64>,
    request_id: String,
    at_ms: u64,
    /// What became of it; null: it is under way, its client left, or it was not sent.
    #[serde(default)]
    ended: Option<String>,
    /// Only for what was not sent: requests of the pool that wait already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    waiting_before: Option<u64>,
    /// Names by id, of the workers in the receipt.
    workers: BTreeMap<String, String>,
    receipt: Receipt,
    /// What came out when the decision was made again here.
    #[serde(default, skip_deserializing, skip_serializing_if = "Option::is_none")]
    replayed: Option<Replayed>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Replayed {
    same: bool,
    /// Null: this version does not have the policy.
    outcome: Option<Outcome>,
}

#[derive(Debug, Serialize)]
struct Explained {
    schema_version: u32,
    /// Oldest first.
    placements: Vec<Placement>,
    /// Balancers that could not be asked, and why.
    problems: BTreeMap<String, String>,
    /// How long the answers took.
    asked_ms: u64,
}

impl Placement {
    fn name(&self, incarnation: Incarnation) -> String {
        let id = incarnation.worker.0.to_string();
        let name = self.workers.get(&id).cloned();
        name.unwrap_or_else(|| incarnation.worker.to_string())
    }

    fn replay(&mut self) {
        let outcome = self.receipt.replay();
        self.replayed = Some(Replayed {
            same: outcome == Some(self.receipt.outcome),
            outcome,
        });
    }
}

/// Runs `forebay explain`.
pub(crate) fn run(args: &ExplainArgs) -> Result<(), CliError> {
    let began = Instant::now();
    let (mut placements, problems) = if let Some(file) = &args.what_if {
        (vec![what_if(args, file)?], BTreeMap::new())
    } else if let Some(file) = &args.from {
        (from_file(args, file)?, BTreeMap::new())
    } else {
        from_balancers(args)?
    };
    let asked_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    if placements.is_empty() {
        return Err(nothing(args, &problems));
    }
    placements.sort_by_key(|placement| (placement.at_ms, placement.number));
    if args.replay {
        placements.iter_mut().for_each(Placement::replay);
    }
    for (balancer, problem) in &problems {
        say(&format!("balancer {balancer} was not heard: {problem}"));
    }
    let explained = Explained {
        schema_version: 1,
        placements,
        problems,
        asked_ms,
    };
    args.output
        .print(&explained, || page::page(&explained.placements));
    let differ = |placement: &&Placement| placement.replayed.is_some_and(|again| !again.same);
    match explained.placements.iter().filter(differ).count() {
        0 => Ok(()),
        count => Err(CliError::because(
            Exit::Failed,
            format!(
                "{count} decisions came out otherwise when they were made again: is this the balancer's version?"
            ),
        )),
    }
}

fn nothing(args: &ExplainArgs, problems: &BTreeMap<String, String>) -> CliError {
    let what = match (&args.request, &args.worker) {
        (Some(request), _) => format!("no placement of request {request}"),
        (None, Some(worker)) => format!("no placement on worker {worker}"),
        (None, None) => "no placement".into(),
    };
    if problems.is_empty() {
        let why = "it is older than the last 100,000 (--receipts of the balancer), was never placed, or went through a balancer that is not asked";
        return CliError::because(Exit::NotFound, format!("{what} is kept: {why}"));
    }
    // Each has heard of everybody who is registered.
    if let Some(worker) = &args.worker
        && problems
            .values()
            .all(|problem| problem.starts_with(UNKNOWN_WORKER))
    {
        let message = format!("there is no worker {worker}: see `forebay workers`");
        return CliError::because(Exit::NotFound, message);
    }
    let said: Vec<String> = problems
        .iter()
        .map(|(balancer, problem)| format!("{balancer}: {problem}"))
        .collect();
    CliError::because(
        Exit::Unreachable,
        format!(
            "{what} was found where somebody answered; not heard: {}",
            said.join("; ")
        ),
    )
}

/// How a balancer says that.
const UNKNOWN_WORKER: &str = "there is no worker";

type Found = (Vec<Placement>, BTreeMap<String, String>);

fn from_balancers(args: &ExplainArgs) -> Result<Found, CliError> {
    let balancers = balancers(&args.balancer, &args.context)?;
    let patience = Duration::from_secs(args.context.timeout);
    let path = match (&args.request, &args.worker) {
        (Some(request), _) => format!("/debug/receipts?request={}", plain(request)?),
        (None, Some(worker)) => {
            let worker = plain(worker)?;
            format!("/debug/receipts?worker={worker}&last={}", args.last)
        }
        (None, None) => return Err(CliError::usage("give a REQUEST_ID or --worker")),
    };
    let asked = balancers.iter().map(async |(name, url)| {
        let answer = http::get(url, &path, patience).await;
        (name.clone(), answer.map_err(|error| error.to_string()))
    });
    let answers = crate::roles::thread()?.block_on(join_all(asked));
    let (mut placements, mut problems) = (Vec::new(), BTreeMap::new());
    for (name, answer) in answers {
        match answer.and_then(|answer| read(&name, &answer)) {
            Ok(found) => placements.extend(found),
            Err(problem) => {
                problems.insert(name, problem);
            }
        }
    }
    Ok((placements, problems))
}

/// Names and admin URLs of the balancers to ask.
pub(crate) fn balancers(
    given: &[String],
    context: &ContextArgs,
) -> Result<Vec<(String, String)>, CliError> {
    let known = if given.is_empty() {
        context.urls()?.balancers.into_iter().collect()
    } else {
        given.iter().map(|url| (url.clone(), url.clone())).collect()
    };
    let known: Vec<(String, String)> = known;
    for (_, url) in &known {
        http::check(url).map_err(|error| of_http(&error))?;
    }
    if known.is_empty() {
        let message = "no balancer is known: give --balancer http://HOST:7411 (its --admin), or a table [balancers] in the context file";
        return Err(CliError::usage(message));
    }
    Ok(known)
}

fn plain(text: &str) -> Result<&str, CliError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if !text.is_empty() && text.bytes().all(allowed) {
        return Ok(text);
    }
    Err(CliError::usage(format!(
        "{text:?} is neither a request's id nor a worker's name: these have letters, digits, `.`, `_` and `-`"
    )))
}

fn read(balancer: &str, answer: &Answer) -> Result<Vec<Placement>, String> {
    if answer.status != 200 {
        return Err(answer.problem());
    }
    let mut placements = lines(&answer.body)?;
    for placement in &mut placements {
        balancer.clone_into(&mut placement.balancer);
    }
    Ok(placements)
}

fn lines(text: &[u8]) -> Result<Vec<Placement>, String> {
    let lines = text.split(|byte| *byte == b'\n');
    let lines = lines.zip(1..).filter(|(line, _)| !line.is_empty());
    lines
        .map(|(line, number): (_, u64)| {
            let read = serde_json::from_slice(line);
            read.map_err(|error| format!("line {number} is not a receipt: {error}"))
        })
        .collect()
}

fn from_file(args: &ExplainArgs, file: &PathBuf) -> Result<Vec<Placement>, CliError> {
    let text = file_at(file)?;
    let mut placements = lines(&text)
        .map_err(|problem| CliError::usage(format!("{}: {problem}", file.display())))?;
    placements.retain(|placement| match (&args.request, &args.worker) {
        (Some(request), _) => placement.request_id == *request,
        (None, Some(worker)) => match placement.receipt.outcome {
            Outcome::Chosen(chosen) => placement.name(chosen) == *worker,
            Outcome::Nobody(_) => false,
        },
        (None, None) => true,
    });
    if args.worker.is_some() {
        let most = usize::try_from(args.last).unwrap_or(usize::MAX);
        placements.drain(..placements.len().saturating_sub(most));
    }
    Ok(placements)
}

fn what_if(args: &ExplainArgs, file: &PathBuf) -> Result<Placement, CliError> {
    let body = file_at(file)?;
    let asked: serde_json::Value = serde_json::from_slice(&body).map_err(|error| {
        CliError::usage(format!("{}: not a request's body: {error}", file.display()))
    })?;
    let has = |key: &str| asked.get(key).is_some();
    let path = match (has("messages"), has("prompt"), has("input")) {
        (true, ..) => "/v1/chat/completions",
        (false, true, _) => "/v1/completions",
        (false, false, true) => "/v1/embeddings",
        (false, false, false) => {
            let message = "not a request's body: it has neither `messages`, `prompt` nor `input`";
            return Err(CliError::usage(format!("{}: {message}", file.display())));
        }
    };
    let endpoints = args.context.urls()?.endpoints;
    let target = args.target.clone();
    let target = target.or_else(|| endpoints.values().next().cloned());
    let target = target.ok_or_else(|| {
        CliError::usage("no balancer is known: give --target http://HOST:8080, or a table [endpoints] in the context file")
    })?;
    let sent = Sent {
        body: Some(Bytes::from(body)),
        key: args.api_key.as_deref(),
        header: Some(("x-forebay-what-if", "1")),
    };
    let patience = Duration::from_secs(args.context.timeout);
    let asking = http::ask(&target, path, sent, patience);
    let answer = crate::roles::thread()?.block_on(asking);
    let answer = answer.map_err(|error| of_http(&error))?;
    if answer.status != 200 {
        let exit = match answer.status {
            401 | 403 => Exit::Unauthorized,
            404 => Exit::NotFound,
            _ => Exit::Failed,
        };
        let message = format!("{target} would not take it: {}", answer.problem());
        return Err(CliError::because(exit, message));
    }
    let mut placement: Placement = serde_json::from_slice(&answer.body).map_err(|error| {
        let message = format!("{target} is of a version that does not explain what it would do, and may have served the request: {error}");
        CliError::because(Exit::Failed, message)
    })?;
    placement.balancer = target;
    Ok(placement)
}

fn of_http(error: &http::HttpError) -> CliError {
    let exit = match error {
        http::HttpError::Url(_) => Exit::Usage,
        http::HttpError::Unreachable { .. } => Exit::Unreachable,
    };
    CliError::because(exit, error.to_string())
}

fn file_at(path: &PathBuf) -> Result<Vec<u8>, CliError> {
    std::fs::read(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            CliError::because(Exit::NotFound, format!("{}: no such file", path.display()))
        }
        _ => CliError::File {
            path: path.clone(),
            error,
        },
    })
}
