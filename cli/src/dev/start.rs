//! From processes to a fleet: the cluster is founded once, then requests have to be served.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forebay_control_client::{ClientError, ControlClient, InitError};
use forebay_link::Endpoint;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::{ApplyConfig, Observed};
use forebay_proto::{ClientId, ClusterId};
use tokio::time::{Instant, sleep};

use super::DevError;
use crate::context::{CellArgs, ContextArgs};
use crate::exit::{CliError, Exit};
use crate::http;
use crate::output::say;

/// Whom the fleet needs.
pub(super) struct Wanted {
    /// Balancers and where each says whether it is ready.
    pub(super) balancers: Vec<(String, SocketAddr)>,
    /// Names of workers.
    pub(super) workers: Vec<String>,
    /// Engines that run already, of the first of them.
    pub(super) engines: Vec<String>,
}

/// Founds the cluster on the nodes of the context, as soon as all of them answer.
pub(super) async fn found(dir: &Path, patience: Duration) -> Result<(), CliError> {
    let client = client(dir)?;
    let drawn = ClusterId(rand::random());
    let until = Instant::now() + patience;
    loop {
        match client.init(drawn, ASK).await {
            Ok(_) => return Ok(()),
            Err(InitError::Unreachable { .. } | InitError::Unfinished { .. })
                if Instant::now() < until =>
            {
                sleep(PAUSE).await;
            }
            // An earlier start founded it and was cut off before it noted that.
            Err(InitError::Initialised { .. }) if is_founded(&client).await => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Has every pool place by this policy, if it does not yet.
pub(super) async fn policy(dir: &Path, policy: &str, patience: Duration) -> Result<(), CliError> {
    let client = client(dir)?;
    let until = Instant::now() + patience;
    loop {
        match set_policy(&client, policy).await {
            Ok(()) => return Ok(()),
            Err(_) if Instant::now() < until => sleep(PAUSE).await,
            Err(error) => return Err(error.into()),
        }
    }
}

async fn set_policy(client: &ControlClient, policy: &str) -> Result<(), ClientError> {
    let facts = client.read(ASK).await?;
    let mut document = (*facts.config).clone();
    for pool in &mut document.pools {
        pool.policy = policy.to_owned();
    }
    if document == *facts.config {
        return Ok(());
    }
    let action = Action::ApplyConfig(ApplyConfig {
        config: document.to_wire(),
        expected_revision: facts.config_revision.0,
    });
    client.propose(action, "dev --policy", ASK).await?;
    Ok(())
}

async fn is_founded(client: &ControlClient) -> bool {
    let nodes = client.probe_all(ASK).await;
    let clusters: Vec<_> = nodes
        .iter()
        .map(|(_, status)| match status {
            Ok(status) if status.initialised => Some(status.cluster_id.clone()),
            Ok(_) | Err(_) => None,
        })
        .collect();
    clusters.iter().all(|id| id.is_some() && *id == clusters[0])
}

/// Who is registered, as far as the control plane answers.
pub(super) struct Registry(ControlClient);

impl Registry {
    /// Asks the control plane of a data directory.
    pub(super) fn open(dir: &Path) -> Result<Self, CliError> {
        Ok(Self(client(dir)?))
    }

    /// Whether a worker was ever registered; no answer is a no.
    pub(super) async fn has(&self, name: &str) -> Result<bool, CliError> {
        let facts = self.0.read(ASK).await;
        Ok(facts.is_ok_and(|facts| facts.workers.contains_key(name)))
    }

    /// Waits until a worker is registered; false when it is not in time.
    pub(super) async fn gets(&self, name: &str, until: Instant) -> Result<bool, CliError> {
        while Instant::now() < until {
            if self.has(name).await? {
                return Ok(true);
            }
            sleep(LOOK_AGAIN).await;
        }
        Ok(false)
    }
}

/// Waits until every worker and every balancer is ready.
pub(super) async fn ready(dir: &Path, wanted: Wanted, patience: Duration) -> Result<(), CliError> {
    let client = client(dir)?;
    let start = Instant::now();
    let mut told = start;
    loop {
        let reasons = missing(&client, &wanted).await;
        if reasons.is_empty() {
            return Ok(());
        }
        if start.elapsed() >= patience {
            return Err(DevError::NotReady {
                seconds: patience.as_secs(),
                reasons: reasons.join("; "),
                logs: dir.join("logs"),
            }
            .into());
        }
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            say(&format!("waiting: {}", reasons.join("; ")));
        }
        sleep(PAUSE).await;
    }
}

/// The first model that a balancer lists.
pub(super) async fn served(balancer: &str) -> Option<String> {
    let answer = http::get(balancer, "/v1/models", ASK).await.ok()?;
    let models: serde_json::Value = serde_json::from_slice(&answer.body).ok()?;
    models["data"][0]["id"].as_str().map(str::to_owned)
}

/// Why the fleet is not ready yet; empty when it is.
async fn missing(client: &ControlClient, wanted: &Wanted) -> Vec<String> {
    let mut reasons = vec![];
    match client.read(ASK).await {
        Err(error) => reasons.push(error.to_string()),
        Ok(facts) => {
            let serves = |name: &&String| {
                facts.workers.get(*name).is_some_and(|worker| {
                    worker.observed == Observed::Ready && !worker.lost && !worker.departed
                })
            };
            let engines = wanted.engines.iter().map(Some);
            let engines = engines.chain(std::iter::repeat(None));
            let absent = wanted.workers.iter().zip(engines);
            let absent = absent.filter(|(name, _)| !serves(name));
            reasons.extend(absent.map(|(name, engine)| match engine {
                Some(url) => format!("worker {name} is not ready: does an engine answer at {url}?"),
                None => format!("worker {name} is not ready"),
            }));
        }
    }
    for (name, admin) in &wanted.balancers {
        match http::get(&format!("http://{admin}"), "/readyz", ASK).await {
            Ok(answer) if answer.status == 200 => {}
            Ok(answer) => {
                let said = String::from_utf8_lossy(&answer.body);
                reasons.push(format!("balancer {name}: {}", said.trim()));
            }
            Err(error) => reasons.push(format!("balancer {name}: {error}")),
        }
    }
    reasons
}

/// The control plane as the operator of this data directory sees it.
fn client(dir: &Path) -> Result<ControlClient, CliError> {
    let context = ContextArgs {
        context: Some(PathBuf::from(dir).join("context.toml")),
        cell: CellArgs::default(),
        timeout: ASK.as_secs(),
    }
    .resolve()?;
    let endpoint = Endpoint::client(&context.credentials)
        .map_err(|error| CliError::because(Exit::Failed, error.to_string()))?;
    let id = ClientId(rand::random());
    Ok(ControlClient::new(
        endpoint,
        context.control,
        id,
        rand::random(),
    ))
}

const ASK: Duration = Duration::from_secs(2);
/// A start of an agent takes a few of these.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const PAUSE: Duration = Duration::from_millis(100);
const TELL_EVERY: Duration = Duration::from_secs(3);
