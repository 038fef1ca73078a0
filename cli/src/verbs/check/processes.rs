//! Agents and balancers, by their own word.

use forebay_proto::wire::fleet::{Desired, Observed};

use super::Seen;
use super::report::Report;
use crate::look::{Process, Shown};

/// Adds what concerns agents, balancers and the clients' ports.
pub(super) fn check(seen: &Seen, report: &mut Report) {
    agents(seen, report);
    balancers(seen, report);
    if seen.endpoints.is_empty() {
        report.skip("endpoints.answer", "the context has no table [endpoints]");
        return;
    }
    let dead = seen.endpoints.iter().filter_map(|(name, answer)| {
        let problem = answer.as_ref().err()?;
        Some(format!("{name}: {problem}"))
    });
    report.fail(
        "endpoints.answer",
        &dead.collect::<Vec<_>>(),
        format!("{} clients' ports answer", seen.endpoints.len()),
        "start the balancer, or correct its URL in the context",
    );
}

/// Who does not show itself, and who says that it is not ready.
pub(super) fn readiness(processes: &[Process]) -> (Vec<String>, Vec<String>) {
    let silent = processes.iter().filter_map(|one| {
        let problem = one.seen.as_ref().err()?;
        Some(format!("{}: {problem}", one.name))
    });
    let unready = shown(processes).filter(|(_, shown)| !shown.reasons.is_empty());
    let unready = unready.map(|(name, shown)| format!("{name}: {}", shown.reasons.join(", ")));
    (silent.collect(), unready.collect())
}

fn shown(processes: &[Process]) -> impl Iterator<Item = (&str, &Shown)> {
    let seen = processes.iter();
    seen.filter_map(|one| Some((one.name.as_str(), one.seen.as_ref().ok()?)))
}

/// Names of those for which this holds, each with what there is to say.
fn those(processes: &[Process], is: impl Fn(&Shown) -> Option<String>) -> Vec<String> {
    let found = shown(processes).filter_map(|(name, shown)| Some((name, is(shown)?)));
    found
        .map(|(name, what)| format!("{name} {what}").trim_end().to_owned())
        .collect()
}

fn agents(seen: &Seen, report: &mut Report) {
    if seen.agents.is_empty() {
        for id in OF_AGENTS {
            report.skip(id, "the context has no table [agents]");
        }
        return;
    }
    let agents = &seen.agents;
    let (silent, unready) = readiness(agents);
    report.fail(
        "agents.reachable",
        &silent,
        format!("{} agents show themselves", agents.len()),
        "start it, look at its log and host, or correct its URL in the context",
    );
    report.fail(
        "agents.ready",
        &unready,
        "every agent that answers is ready",
        "the reason is the agent's own; its log has more",
    );
    let number = |shown: &Shown, name: &str| shown.metrics.sum(name);
    report.fail(
        "agents.engines",
        &those(agents, |shown| {
            (number(shown, "forebay_agent_engine_up")? < 0.5).then(String::new)
        }),
        "every engine answers its agent",
        "look at the engine's log; the agent refuses requests and keeps trying",
    );
    report.warn(
        "agents.residency",
        &those(agents, |shown| {
            (number(shown, "forebay_agent_residency_trusted")? < 0.5).then(String::new)
        }),
        "no agent's grade was lowered to blind",
        "see docs/operators.md, \"Hits are lost\"",
    );
    report.warn(
        "agents.unseen-arrivals",
        &those(agents, |shown| {
            let accepted = number(shown, "forebay_agent_accepted_total")?;
            let unseen = number(shown, "forebay_agent_unseen_arrivals_total")?;
            (accepted >= ENOUGH && unseen > MOST_UNSEEN * accepted)
                .then(|| format!("had {:.2} unseen arrivals a placement", unseen / accepted))
        }),
        "balancers hear of each other's placements in time",
        "reports do not keep up with placements: look at the network between agents and balancers, and at the agents' CPU",
    );
    report.warn(
        "agents.promises",
        &those(agents, |shown| {
            let judged = number(shown, "forebay_agent_ttft_predicted")?;
            let within = number(shown, "forebay_agent_ttft_within_p95")?;
            (judged >= ENOUGH && within < LEAST_WITHIN * judged).then(|| {
                format!(
                    "kept {:.0} % of what was promised at 95 %",
                    100.0 * within / judged
                )
            })
        }),
        "first tokens come as predicted",
        "the agent's --profile does not fit its engine, or somebody else uses the engine",
    );
}

fn balancers(seen: &Seen, report: &mut Report) {
    if seen.balancers.is_empty() {
        for id in OF_BALANCERS {
            report.skip(id, "the context has no table [balancers]");
        }
        return;
    }
    let balancers = &seen.balancers;
    let (silent, unready) = readiness(balancers);
    report.fail(
        "balancers.reachable",
        &silent,
        format!("{} balancers show themselves", balancers.len()),
        "start it, look at its log and host, or correct its URL in the context",
    );
    report.fail(
        "balancers.ready",
        &unready,
        "every balancer that answers is ready",
        "take it out of rotation until it is; the reason is its own",
    );
    facts_and_links(seen, report);
    let number = |shown: &Shown, name: &str| shown.metrics.sum(name);
    report.warn(
        "balancers.residency",
        &those(balancers, |shown| {
            let pending = number(shown, "forebay_balancer_residency_pending")?;
            let blind = number(shown, "forebay_balancer_residency_blind")?;
            (pending + blind > 0.0)
                .then(|| format!("does not know {pending:.0} caches and trusts {blind:.0} not"))
        }),
        "every balancer knows the caches of its workers",
        "see docs/operators.md, \"Hits are lost\"",
    );
    report.warn(
        "balancers.hits",
        &those(balancers, |shown| {
            let predicted = number(shown, "forebay_balancer_cached_tokens_predicted_total")?;
            let reported = number(shown, "forebay_balancer_cached_tokens_reported_total")?;
            (predicted > ENOUGH_TOKENS && reported < LEAST_HITS * predicted).then(|| {
                let share = 100.0 * reported / predicted;
                format!("found {share:.0} % of the cached tokens that it expected")
            })
        }),
        "caches hold what is expected of them",
        "see docs/operators.md, \"Hits are lost\" and \"How prompts are rendered\"",
    );
    report.warn(
        "balancers.queues",
        &those(balancers, |shown| {
            let queued = number(shown, "forebay_balancer_queued")?;
            (queued > 0.0).then(|| format!("has {queued:.0} requests waiting"))
        }),
        "nobody waits",
        "`forebay status` says what limits the fleet",
    );
}

fn facts_and_links(seen: &Seen, report: &mut Report) {
    let Some(Ok(facts)) = &seen.facts else {
        report.skip("balancers.facts", "the facts cannot be read");
        report.skip("balancers.links", "the facts cannot be read");
        return;
    };
    let revision = facts.revision.0;
    report.warn(
        "balancers.facts",
        &those(&seen.balancers, |shown| {
            let used = shown.revision.unwrap_or(0);
            (used < revision).then(|| format!("uses r{used}, and r{revision} was agreed on"))
        }),
        format!("all use r{revision}"),
        "it does not reach the control nodes: it goes on with the last facts; look at its log",
    );
    let serving = facts.workers.values().filter(|worker| {
        let serves = worker.observed == Observed::Ready && worker.desired == Desired::Ready;
        serves && !worker.departed && !worker.lost
    });
    let serving: Vec<&str> = serving.map(|worker| worker.name.as_str()).collect();
    report.fail(
        "balancers.links",
        &those(&seen.balancers, |shown| {
            let cut = shown
                .workers
                .iter()
                .filter(|worker| worker.connected.is_none());
            let cut = cut.filter(|worker| serving.contains(&worker.name.as_str()));
            let cut: Vec<&str> = cut.map(|worker| worker.name.as_str()).collect();
            (!cut.is_empty()).then(|| format!("does not reach {}", cut.join(", ")))
        }),
        "every balancer reaches every worker that serves",
        "look at the agent's --advertise address, and at UDP between the two",
    );
}

const OF_AGENTS: [&str; 6] = [
    "agents.reachable",
    "agents.ready",
    "agents.engines",
    "agents.residency",
    "agents.unseen-arrivals",
    "agents.promises",
];
const OF_BALANCERS: [&str; 7] = [
    "balancers.reachable",
    "balancers.ready",
    "balancers.facts",
    "balancers.links",
    "balancers.residency",
    "balancers.hits",
    "balancers.queues",
];
/// Fewer say nothing.
const ENOUGH: f64 = 200.0;
const ENOUGH_TOKENS: f64 = 100_000.0;
/// Above it, stale views cost goodput.
const MOST_UNSEEN: f64 = 0.3;
const LEAST_WITHIN: f64 = 0.8;
const LEAST_HITS: f64 = 0.8;
