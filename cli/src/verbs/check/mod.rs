//! `forebay check`: everything that can be wrong and be seen from here, each with what to do about it.

mod control;
mod credentials;
mod processes;
mod report;
mod workers;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::Args;
use forebay_consensus::fleet::archive::Tail;
use forebay_consensus::fleet::audit::KEPT_ENTRIES;
use forebay_control_client::Facts;

use super::ask::{Asked, Node, of_read};
use crate::context::{Context, ContextArgs, Urls};
use crate::exit::{CliError, Exit};
use crate::http;
use crate::look::{self, Process};
use crate::output::OutputArgs;
use report::Report;

/// Options of `forebay check`.
#[derive(Debug, Args)]
#[command(
    after_help = "Looks at the context, our certificate, the control nodes, the facts, workers, agents and balancers, changes nothing, and needs less than ten seconds however much is down. Processes are those of the tables [balancers], [agents], [control_nodes] and [endpoints] in the context file; what they name none of is skipped.\n\nExits with 1 when a check failed; warnings are none."
)]
pub(crate) struct CheckArgs {
    /// A keys file of balancers to check, too.
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// Show also what is as it should be.
    #[arg(long, short)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

/// All that was looked at.
struct Seen {
    /// Milliseconds since 1970, by this machine.
    now_ms: u64,
    /// Whom to ask and as whom; else what is wrong with that.
    context: Result<credentials::Ours, CliError>,
    urls: Urls,
    keys: Option<(PathBuf, Result<usize, String>)>,
    /// `None`: nobody could be asked.
    facts: Option<Result<Facts, String>>,
    audit: Option<Result<Tail, String>>,
    /// Control nodes, and again a second later.
    nodes: Vec<Node>,
    again: Vec<Node>,
    balancers: Vec<Process>,
    agents: Vec<Process>,
    control_nodes: Vec<Process>,
    /// By name: what the clients' port answers.
    endpoints: Vec<(String, Result<(), String>)>,
}

/// Longer than an election takes.
const READ_TIME: Duration = Duration::from_secs(4);
/// For each page of a process.
const LOOK_TIME: Duration = Duration::from_millis(1_500);
/// Between two looks at the control nodes' terms.
const PAUSE: Duration = Duration::from_secs(1);

/// Runs `forebay check`.
pub(crate) fn run(args: &CheckArgs) -> Result<(), CliError> {
    let seen = crate::roles::thread()?.block_on(look(args));
    let mut report = Report::default();
    credentials::check(&seen, &mut report);
    control::check(&seen, &mut report);
    workers::check(&seen, &mut report);
    processes::check(&seen, &mut report);
    let report = report.done();
    args.output.print(&report, || report.page(args.all));
    match report.failed {
        0 => Ok(()),
        failed => Err(CliError::because(
            Exit::Failed,
            format!("{failed} of {} checks failed", report.checks.len()),
        )),
    }
}

async fn look(args: &CheckArgs) -> Seen {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now_ms = u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX);
    let mut seen = Seen {
        now_ms,
        context: Err(CliError::usage("not looked at")),
        urls: args.context.urls().unwrap_or_default(),
        keys: args.keys.clone().map(|path| {
            let unread = |error| format!("{}: {error}", path.display());
            let text = std::fs::read_to_string(&path).map_err(unread);
            let counted = text.and_then(|text| {
                forebay_balancer::count_keys(&path, &text).map_err(|error| error.to_string())
            });
            (path, counted)
        }),
        facts: None,
        audit: None,
        nodes: Vec::new(),
        again: Vec::new(),
        balancers: Vec::new(),
        agents: Vec::new(),
        control_nodes: Vec::new(),
        endpoints: Vec::new(),
    };
    let asked = match args.context.resolve() {
        Ok(context) => ask(&mut seen, context),
        Err(error) => {
            seen.context = Err(error);
            None
        }
    };
    // Balancers are looked at after the facts were read, and so know them or are late.
    let facts = async {
        let facts = match &asked {
            Some(asked) => Some(asked.client.read(READ_TIME).await.map_err(of_read)),
            None => None,
        };
        let urls = &seen.urls;
        let processes = futures::join!(
            look::processes(&urls.balancers, LOOK_TIME),
            look::processes(&urls.agents, LOOK_TIME),
            look::processes(&urls.control_nodes, LOOK_TIME),
            endpoints(urls),
            audit(
                asked.as_ref(),
                facts.as_ref().and_then(|facts| facts.as_ref().ok())
            ),
        );
        (facts, processes)
    };
    let nodes = async {
        let Some(asked) = &asked else {
            return (Vec::new(), Vec::new());
        };
        let nodes = asked.nodes().await;
        tokio::time::sleep(PAUSE).await;
        (nodes, asked.nodes().await)
    };
    let ((facts, processes), (nodes, again)) = futures::join!(facts, nodes);
    seen.facts = facts.map(|facts| facts.map_err(|error| error.to_string()));
    (seen.nodes, seen.again) = (nodes, again);
    (
        seen.balancers,
        seen.agents,
        seen.control_nodes,
        seen.endpoints,
        seen.audit,
    ) = processes;
    seen
}

/// Notes whom we are and asks as that, if our certificate lets us.
fn ask(seen: &mut Seen, context: Context) -> Option<Asked> {
    let ours = credentials::Ours::of(&context, seen.now_ms);
    match Asked::new(context) {
        Ok(asked) => {
            seen.context = Ok(ours);
            Some(asked)
        }
        Err(error) => {
            seen.context = Err(error);
            None
        }
    }
}

async fn audit(asked: Option<&Asked>, facts: Option<&Facts>) -> Option<Result<Tail, String>> {
    let (asked, facts) = (asked?, facts?);
    let limit = u32::try_from(KEPT_ENTRIES).unwrap_or(u32::MAX);
    let tail = match asked.client.audit(limit, LOOK_TIME).await {
        Ok(tail) => tail,
        Err(error) => return Some(Err(error.to_string())),
    };
    let count = tail.count.unwrap_or(tail.entries.len() as u64);
    let checked = Tail::new(facts.cluster_id, count, &tail.entries, &tail.head);
    Some(checked.map_err(|fault| fault.to_string()))
}

async fn endpoints(urls: &Urls) -> Vec<(String, Result<(), String>)> {
    let asked = urls.endpoints.iter().map(async |(name, url)| {
        let answer = match http::get(url, "/health", LOOK_TIME).await {
            Ok(answer) if answer.status == 200 => Ok(()),
            Ok(answer) => Err(format!("{url}: {}", answer.problem())),
            Err(error) => Err(error.to_string()),
        };
        (name.clone(), answer)
    });
    futures::future::join_all(asked).await
}

#[cfg(test)]
mod tests;
