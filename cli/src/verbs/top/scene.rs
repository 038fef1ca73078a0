//! What is to be shown: rows of text and the numbers that they are sorted by.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use forebay_control_client::Facts;

use crate::look::limit::limited_by;
use crate::look::{self, Process, Shown};
use crate::verbs::ask::Node;
use crate::verbs::workers::state;

/// One look at the fleet.
#[derive(Default)]
pub(super) struct Seen {
    /// False before the first.
    pub(super) looked: bool,
    pub(super) at: Option<Instant>,
    pub(super) facts: Option<Facts>,
    pub(super) nodes: Vec<Node>,
    pub(super) balancers: Vec<Process>,
    pub(super) agents: Vec<Process>,
    /// Requests a second, by balancer, where there was a look before.
    pub(super) rates: BTreeMap<String, f64>,
}

impl Seen {
    /// Requests that each balancer had served by then.
    pub(super) fn requests(&self) -> BTreeMap<String, (Instant, f64)> {
        let served = self.balancers.iter().filter_map(|one| {
            let shown = one.seen.as_ref().ok()?;
            let served = shown.metrics.sum("forebay_balancer_requests_total");
            Some((one.name.clone(), (self.at?, served.unwrap_or(0.0))))
        });
        served.collect()
    }

    pub(super) fn rates_since(
        &self,
        before: &BTreeMap<String, (Instant, f64)>,
    ) -> BTreeMap<String, f64> {
        let rates = self
            .requests()
            .into_iter()
            .filter_map(|(name, (now, served))| {
                let (then, had) = before.get(&name)?;
                let seconds = now.saturating_duration_since(*then).as_secs_f64();
                // One that was started again counts from zero.
                (seconds > 0.0 && served >= *had).then(|| (name, (served - had) / seconds))
            });
        rates.collect()
    }
}

/// How the list of workers is shown.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sort {
    /// By which of [`COLUMNS`].
    pub(super) column: usize,
    /// The other way round.
    pub(super) reversed: bool,
    /// How many are scrolled away.
    pub(super) first: usize,
}

/// Of the list of workers.
pub(super) const COLUMNS: [&str; 9] = [
    "WORKER", "STATE", "RUN", "QUEUE", "SLOTS", "KV", "TTFT", "TPOT", "HIT",
];

/// A cell: its text, and what it is sorted by.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Cell {
    pub(super) text: String,
    number: Option<f64>,
}

/// All that is drawn.
pub(super) struct Scene {
    pub(super) title: String,
    pub(super) limit: String,
    /// Neither a control node nor a balancer answers.
    pub(super) nothing: bool,
    pub(super) sort: Sort,
    pub(super) workers: Vec<[Cell; COLUMNS.len()]>,
    pub(super) balancers: Vec<[String; 9]>,
    pub(super) control: Vec<[String; 6]>,
}

/// Of the list of balancers.
pub(super) const OF_BALANCERS: [&str; 9] = [
    "BALANCER", "STATE", "REQ/S", "RUN", "QUEUE", "TTFT", "P99", "HIT", "FACTS",
];
/// Of the list of control nodes.
pub(super) const OF_CONTROL: [&str; 6] = ["CONTROL", "ROLE", "TERM", "APPLIED", "HEARD", "PROBLEM"];

impl Scene {
    pub(super) fn of(seen: &Seen, sort: Sort) -> Self {
        let answering = seen.nodes.iter().filter(|node| node.status.is_ok()).count();
        let shown = shown(&seen.balancers).count();
        let nothing = seen.looked && answering + shown == 0;
        let (limit, why) = limited_by(seen.facts.is_some(), &seen.balancers);
        let mut workers = workers(seen);
        workers.sort_by(|one, other| {
            let order = compare(&one[sort.column], &other[sort.column]);
            let order = if sort.reversed {
                order.reverse()
            } else {
                order
            };
            order.then_with(|| compare(&one[0], &other[0]))
        });
        Self {
            title: title(seen),
            limit: if nothing {
                "nothing answers: neither a control node nor a balancer; see `forebay check`".into()
            } else if seen.looked {
                format!("limited by {}: {why}", limit.name())
            } else {
                "looking".into()
            },
            nothing,
            sort,
            workers,
            balancers: seen
                .balancers
                .iter()
                .map(|one| balancer(seen, one))
                .collect(),
            control: seen.nodes.iter().map(control).collect(),
        }
    }
}

fn title(seen: &Seen) -> String {
    let ready = shown(&seen.balancers).filter(|(_, shown)| shown.reasons.is_empty());
    let nodes = seen.nodes.iter().filter(|node| node.status.is_ok()).count();
    let revision = seen.facts.as_ref().map(|facts| facts.revision.to_string());
    format!(
        "forebay top   control {nodes}/{}, facts {}   balancers {}/{} ready",
        seen.nodes.len(),
        revision.unwrap_or_else(|| "not readable".into()),
        ready.count(),
        seen.balancers.len()
    )
}

fn shown(processes: &[Process]) -> impl Iterator<Item = (&str, &Shown)> {
    let seen = processes.iter();
    seen.filter_map(|one| Some((one.name.as_str(), one.seen.as_ref().ok()?)))
}

fn workers(seen: &Seen) -> Vec<[Cell; COLUMNS.len()]> {
    let reported = look::workers(&seen.balancers);
    let agents: BTreeMap<&str, &Shown> = shown(&seen.agents).collect();
    let mut names: BTreeSet<&str> = reported.keys().map(String::as_str).collect();
    if let Some(facts) = &seen.facts {
        names.extend(facts.workers.keys().map(String::as_str));
    }
    let rows = names.into_iter().map(|name| {
        let worker = reported.get(name).cloned().unwrap_or_default();
        let fact = seen
            .facts
            .as_ref()
            .and_then(|facts| facts.workers.get(name));
        let by_balancer = match (&worker.connected, &worker.acceptance) {
            (None, _) => "not connected",
            (Some(_), Some(acceptance)) => acceptance,
            (Some(_), None) => "silent",
        };
        let agreed = fact.map(|fact| state(fact));
        let says = match agreed {
            // The facts are not told of a link that is gone.
            Some("ready") if worker.connected.is_none() => "not connected",
            // Nor, for ten seconds, of an agent that fell silent.
            Some("ready") if silent(&seen.agents, name) => "agent silent",
            Some(agreed) => agreed,
            None => by_balancer,
        };
        let count = |count: Option<u32>| number(count.map(f64::from), |n| format!("{n:.0}"));
        let agent = agents.get(name);
        let ttft =
            agent.and_then(|shown| shown.metrics.quantile("forebay_agent_first_byte_ms", "0.5"));
        [
            text(name),
            text(says),
            count(worker.running),
            count(worker.queued),
            count(worker.slots),
            number(worker.kv_used, percent),
            number(ttft, ms),
            number(worker.tpot_ms, ms),
            number(hits(seen, name), percent),
        ]
    });
    rows.collect()
}

fn silent(agents: &[Process], name: &str) -> bool {
    agents
        .iter()
        .any(|agent| agent.name == name && agent.seen.is_err())
}

/// The share of prompt tokens that this worker had cached.
fn hits(seen: &Seen, worker: &str) -> Option<f64> {
    let sum = |name: &str| {
        let of = shown(&seen.balancers)
            .filter_map(|(_, shown)| shown.metrics.of(name, "worker", worker));
        of.reduce(|sum, one| sum + one)
    };
    let prompt = sum("forebay_balancer_worker_prompt_tokens_total")?;
    let cached = sum("forebay_balancer_worker_cached_tokens_total")?;
    (prompt > 0.0).then(|| cached / prompt)
}

fn balancer(seen: &Seen, process: &Process) -> [String; 9] {
    let mut row: [String; 9] = std::array::from_fn(|_| String::new());
    row[0].clone_from(&process.name);
    let Ok(shown) = &process.seen else {
        "no answer".clone_into(&mut row[1]);
        return row;
    };
    let metrics = &shown.metrics;
    let (prompt, cached) = (
        metrics
            .sum("forebay_balancer_prompt_tokens_total")
            .filter(|tokens| *tokens > 0.0),
        metrics.sum("forebay_balancer_cached_tokens_reported_total"),
    );
    let written = |value: Option<f64>, how: fn(f64) -> String| value.map_or_else(String::new, how);
    let whole = |value: f64| format!("{value:.0}");
    row[1] = if shown.reasons.is_empty() {
        "ready"
    } else {
        "not ready"
    }
    .into();
    row[2] = written(seen.rates.get(&process.name).copied(), |rate| {
        format!("{rate:.1}")
    });
    row[3] = written(metrics.sum("forebay_balancer_inflight"), whole);
    row[4] = written(metrics.sum("forebay_balancer_queued"), whole);
    row[5] = written(metrics.quantile("forebay_balancer_ttft_ms", "0.5"), ms);
    row[6] = written(metrics.quantile("forebay_balancer_ttft_ms", "0.99"), ms);
    row[7] = written(
        prompt.zip(cached).map(|(prompt, cached)| cached / prompt),
        percent,
    );
    row[8] = shown
        .revision
        .map_or_else(String::new, |revision| format!("r{revision}"));
    row
}

fn control(node: &Node) -> [String; 6] {
    let name = match node.name() {
        name if name.is_empty() => node.address.clone(),
        name => name,
    };
    match &node.status {
        Ok(status) => [
            name,
            status.role.clone(),
            status.term.to_string(),
            status.applied.to_string(),
            format!("{}ms", status.leader_heard_ms),
            status.problem.clone(),
        ],
        Err(error) => {
            let problem = crate::verbs::ask::without_address(&node.address, error);
            let nothing = String::new;
            [
                name,
                "no answer".into(),
                nothing(),
                nothing(),
                nothing(),
                problem,
            ]
        }
    }
}

fn text(text: &str) -> Cell {
    Cell {
        text: text.into(),
        number: None,
    }
}

fn number(value: Option<f64>, how: impl Fn(f64) -> String) -> Cell {
    Cell {
        text: value.map_or_else(|| "-".into(), how),
        number: value,
    }
}

fn percent(share: f64) -> String {
    format!("{:.0}%", share * 100.0)
}

fn ms(value: f64) -> String {
    match value {
        value if value >= 10_000.0 => format!("{:.1}s", value / 1_000.0),
        value => format!("{value:.0}ms"),
    }
}

/// Numbers go down, names go up, and what is not known comes last.
fn compare(one: &Cell, other: &Cell) -> Ordering {
    match (one.number, other.number) {
        (Some(one), Some(other)) => other.total_cmp(&one),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => one.text.cmp(&other.text),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::look::Worker;
    use crate::look::metrics::Metrics;

    /// One balancer that sees these workers: running, queued, slots, cache use.
    pub(in super::super) fn seen(workers: &[(&str, u32, u32, f64)]) -> Seen {
        let page = "forebay_balancer_inflight 7\nforebay_balancer_queued 2\nforebay_balancer_requests_total{outcome=\"complete\"} 50\nforebay_balancer_prompt_tokens_total 1000\nforebay_balancer_cached_tokens_reported_total 400\nforebay_balancer_ttft_ms{quantile=\"0.5\"} 120\nforebay_balancer_ttft_ms{quantile=\"0.99\"} 12000\nforebay_balancer_ttft_ms_count 50\nforebay_balancer_worker_prompt_tokens_total{worker=\"w1\"} 200\nforebay_balancer_worker_cached_tokens_total{worker=\"w1\"} 50\n";
        let workers = workers.iter().map(|(name, running, queued, kv)| Worker {
            name: (*name).into(),
            connected: Some("w1.1.1".into()),
            acceptance: Some("Open".into()),
            running: Some(*running),
            queued: Some(*queued),
            slots: Some(8),
            seq: Some(1),
            kv_used: Some(*kv),
            tpot_ms: Some(31.4),
            residency: None,
        });
        Seen {
            looked: true,
            at: None,
            balancers: vec![Process {
                name: "b1".into(),
                seen: Ok(Shown {
                    reasons: vec![],
                    metrics: Metrics::parse(page),
                    workers: workers.collect(),
                    revision: Some(12),
                }),
            }],
            ..Seen::default()
        }
    }

    fn order(column: usize, reversed: bool) -> Vec<String> {
        let seen = seen(&[("w1", 1, 5, 0.3), ("w2", 7, 0, 0.1), ("w3", 4, 5, 0.9)]);
        let sort = Sort {
            column,
            reversed,
            first: 0,
        };
        let scene = Scene::of(&seen, sort);
        scene
            .workers
            .iter()
            .map(|row| row[0].text.clone())
            .collect()
    }

    #[test]
    fn workers_are_sorted_by_any_column() {
        assert_eq!(order(0, false), ["w1", "w2", "w3"]);
        assert_eq!(order(0, true), ["w3", "w2", "w1"]);
        assert_eq!(order(2, false), ["w2", "w3", "w1"], "most running first");
        assert_eq!(order(3, false), ["w1", "w3", "w2"], "equals by name");
        assert_eq!(order(5, true), ["w2", "w1", "w3"]);
        assert_eq!(
            order(8, false),
            ["w1", "w2", "w3"],
            "what is not known comes last"
        );
    }

    #[test]
    fn a_rate_needs_two_looks_and_no_start_between() {
        let mut now = seen(&[]);
        let began = Instant::now();
        now.at = Some(began + std::time::Duration::from_secs(5));
        let since = |had: f64| {
            let before = BTreeMap::from([("b1".to_owned(), (began, had))]);
            now.rates_since(&before).get("b1").copied()
        };
        assert_eq!(since(40.0), Some(2.0));
        assert_eq!(since(60.0), None);
        assert_eq!(now.rates_since(&BTreeMap::new()), BTreeMap::new());
    }
}
