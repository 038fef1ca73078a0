//! A fleet as it can be seen from here: facts, control nodes, and what processes show of themselves.
//!
//! Every question has a bound, all are asked at once, and whoever does not answer is part of what is seen.

pub(crate) mod limit;
pub(crate) mod metrics;

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use serde::Deserialize;

use crate::http;
use metrics::Metrics;

/// One process, by its admin side.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    /// Its name in the context.
    pub(crate) name: String,
    /// What it shows, or why nothing is seen.
    pub(crate) seen: Result<Shown, String>,
}

/// What a process shows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shown {
    /// Why it should get no traffic; none: it is ready.
    pub(crate) reasons: Vec<String>,
    /// Its metrics.
    pub(crate) metrics: Metrics,
    /// Of a balancer: the workers as it sees them.
    pub(crate) workers: Vec<Worker>,
    /// Of a balancer: revision of the facts that it uses.
    pub(crate) revision: Option<u64>,
}

/// A worker as a balancer sees it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub(crate) struct Worker {
    pub(crate) name: String,
    /// The start to which a link stands.
    #[serde(default)]
    pub(crate) connected: Option<String>,
    /// Whether it takes requests, by its agent's word.
    #[serde(default)]
    pub(crate) acceptance: Option<String>,
    #[serde(default)]
    pub(crate) running: Option<u32>,
    #[serde(default)]
    pub(crate) queued: Option<u32>,
    #[serde(default)]
    pub(crate) slots: Option<u32>,
    #[serde(default)]
    pub(crate) seq: Option<u64>,
    /// Share of the KV cache that requests use; null: its size is not known.
    #[serde(default)]
    pub(crate) kv_used: Option<f64>,
    /// From token to token at present, by the latency model.
    #[serde(default)]
    pub(crate) tpot_ms: Option<f64>,
    #[serde(default)]
    pub(crate) residency: Option<String>,
}

#[derive(Deserialize)]
struct Ready {
    #[serde(default)]
    reasons: Vec<String>,
}

#[derive(Default, Deserialize)]
struct Workers {
    revision: Option<u64>,
    #[serde(default)]
    workers: Vec<Worker>,
}

/// Looks at processes, given their admin URLs by name. Each answers within `patience` or is not seen.
pub(crate) async fn processes(urls: &BTreeMap<String, String>, patience: Duration) -> Vec<Process> {
    let looks = urls.iter().map(async |(name, url)| Process {
        name: name.clone(),
        seen: look(url, patience).await,
    });
    join_all(looks).await
}

async fn look(url: &str, patience: Duration) -> Result<Shown, String> {
    let page = async |path: &str| {
        let answer = http::get(url, path, patience).await;
        answer.map_err(|error| error.to_string())
    };
    let ready = page("/readyz").await?;
    let readiness: Ready = serde_json::from_slice(&ready.body)
        .map_err(|_| format!("{url} answers, and is no admin side of forebay"))?;
    let metrics = page("/metrics").await?;
    // Only balancers have it.
    let workers = page("/debug/workers").await?;
    let Workers { revision, workers } = match workers.status {
        200 => serde_json::from_slice(&workers.body).unwrap_or_default(),
        _ => Workers::default(),
    };
    Ok(Shown {
        reasons: readiness.reasons,
        metrics: Metrics::parse(&String::from_utf8_lossy(&metrics.body)),
        workers,
        revision,
    })
}

/// Each worker once, by whichever balancer has heard most of it.
pub(crate) fn workers(balancers: &[Process]) -> BTreeMap<String, Worker> {
    let mut newest = BTreeMap::<String, Worker>::new();
    let seen = balancers.iter().filter_map(|one| one.seen.as_ref().ok());
    for worker in seen.flat_map(|shown| &shown.workers) {
        let known = newest.entry(worker.name.clone()).or_default();
        if (known.seq, known.connected.is_some()) <= (worker.seq, worker.connected.is_some()) {
            *known = worker.clone();
        }
    }
    newest
}
