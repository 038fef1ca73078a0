//! Workers and models, as the fleet agreed.

use std::collections::BTreeMap;

use forebay_control_client::{Facts, WorkerFact};
use forebay_proto::config::POLICIES;
use forebay_proto::wire::fleet::{Desired, Observed};
use forebay_scheduler::fingerprint::renderings;

use super::Seen;
use super::report::Report;

/// Adds what concerns the workers, by the facts.
pub(super) fn check(seen: &Seen, report: &mut Report) {
    let Some(Ok(facts)) = &seen.facts else {
        for id in IDS {
            report.skip(id, "the facts cannot be read");
        }
        return;
    };
    configuration(facts, report);
    let names = |is: &dyn Fn(&WorkerFact) -> bool| -> Vec<String> {
        let workers = facts.workers.values().filter(|worker| is(worker));
        workers.map(|worker| worker.name.clone()).collect()
    };
    let alive = |worker: &WorkerFact| !worker.departed && !worker.lost;
    let count = facts.workers.len();
    report.fail(
        "workers.lost",
        &names(&|worker| worker.lost && !worker.departed),
        format!("none of {count} is lost"),
        "look at its agent and host; it comes back by itself when its agent is heard",
    );
    report.warn(
        "workers.departed",
        &names(&|worker| worker.departed),
        "none said goodbye",
        "start its agent, or forget it: its agent stopped and said so",
    );
    report.fail(
        "workers.engines",
        &names(&|worker| alive(worker) && worker.observed == Observed::EngineDown),
        "every engine answers its agent",
        "look at the engine's log; the agent keeps trying",
    );
    report.warn(
        "workers.joining",
        &names(&|worker| alive(worker) && worker.observed == Observed::Joining),
        "none is joining",
        "it has not got its engine or its facts yet: look at its agent's log",
    );
    report.warn(
        "workers.cordoned",
        &names(&|worker| worker.desired == Desired::Cordoned),
        "none is cordoned",
        "whoever cordoned it is in `forebay audit tail`; undo it if nobody needs that any more",
    );
    draining(seen, facts, report);
    report.warn(
        "workers.in-force",
        &names(&|worker| alive(worker) && !worker.is_in_force()),
        "every agent has applied what operators want",
        "wait, or look at its agent's log",
    );
    models(facts, report);
    let refused = facts.suspects.values().filter(|one| one.is_quarantined());
    let refused = refused.map(|one| {
        let (name, shape) = (one.name(), &one.shape);
        format!("{name} of tenant {} ({shape})", one.tenant)
    });
    report.warn(
        "requests.quarantined",
        &refused.collect::<Vec<_>>(),
        "no request is refused because engines died of it",
        "engines died of it: `forebay quarantine show` says which; update them, then `forebay quarantine lift`",
    );
    let mut addresses = BTreeMap::<&str, Vec<&str>>::new();
    for worker in facts.workers.values().filter(|worker| !worker.departed) {
        let at = addresses.entry(&worker.spec.advertise).or_default();
        at.push(&worker.name);
    }
    let shared = addresses.iter().filter(|(_, names)| names.len() > 1);
    let shared = shared.map(|(address, names)| format!("{} share {address}", names.join(" and ")));
    report.fail(
        "workers.addresses",
        &shared.collect::<Vec<_>>(),
        "every worker has an address of its own",
        "give each agent its own --advertise, and remove workers that are no more",
    );
}

fn configuration(facts: &Facts, report: &mut Report) {
    let pools = &facts.config.pools;
    let unknown = pools
        .iter()
        .filter(|pool| !POLICIES.contains(&pool.policy.as_str()));
    let unknown = unknown.map(|pool| format!("pool {} has policy {:?}", pool.name, pool.policy));
    report.fail(
        "config.policies",
        &unknown.collect::<Vec<_>>(),
        "every pool has a policy that this version knows",
        "balancers that do not know it place by `forebay`: see `forebay config show`",
    );
    let empty = pools.iter().filter(|pool| {
        let mut workers = facts.workers.values();
        !workers.any(|worker| worker.spec.pool == pool.name)
    });
    let empty = empty.map(|pool| format!("pool {} has no workers", pool.name));
    report.warn(
        "config.pools",
        &empty.collect::<Vec<_>>(),
        format!("each of {} pools has workers", pools.len()),
        "start an agent with this --pool, or take the pool out of the configuration",
    );
    let alarms = facts.correlated_expiry.iter();
    let alarms = alarms.map(|pool| format!("more than 20 % of pool {pool} fell silent at once"));
    report.fail(
        "fleet.alarms",
        &alarms.collect::<Vec<_>>(),
        "no alarm is raised",
        "look at the network between the control nodes and that pool; none of its workers is taken as lost meanwhile",
    );
}

fn draining(seen: &Seen, facts: &Facts, report: &mut Report) {
    let long = facts.drains.values().filter(|drain| drain.is_active());
    let long = long.filter_map(|drain| {
        let minutes = seen.now_ms.saturating_sub(drain.began.0) / 60_000;
        let left = drain.workers.iter().filter(|one| one.drained.is_none());
        let left: Vec<&str> = left.map(|one| one.name.as_str()).collect();
        let deadline = if drain.overdue {
            ", past its deadline"
        } else {
            ""
        };
        (drain.overdue || minutes >= LONG_MINUTES).then(|| {
            format!(
                "{} waits for {} since {minutes} minutes{deadline}, by {}",
                drain.id,
                left.join(", "),
                drain.actor
            )
        })
    });
    report.warn(
        "workers.draining",
        &long.collect::<Vec<_>>(),
        "no drain takes long",
        "requests that run there may never end: `forebay drain status` says which; call it off or give it a deadline",
    );
}

fn models(facts: &Facts, report: &mut Report) {
    let mut models = BTreeMap::new();
    for worker in facts.workers.values() {
        let serves = !worker.departed
            && !worker.lost
            && worker.observed == Observed::Ready
            && worker.desired == Desired::Ready;
        for model in &worker.spec.models {
            *models.entry(model).or_insert(0_u32) += u32::from(serves);
        }
    }
    let without = models.iter().filter(|(_, ready)| **ready == 0);
    let without = without.map(|(model, _)| format!("{model} has no ready worker"));
    report.fail(
        "models.ready",
        &without.collect::<Vec<_>>(),
        format!("each of {} models has a ready worker", models.len()),
        "its requests get 503: see `forebay workers` for the state of each, and take back a cordon",
    );
    profiles(facts, report);
}

/// Who renders prompts otherwise than most workers of its pool.
fn profiles(facts: &Facts, report: &mut Report) {
    let present = facts.workers.values().filter(|worker| !worker.departed);
    let specs = present.map(|worker| (worker.id, &worker.spec));
    let mut differ = Vec::new();
    for ((pool, model), rendering) in renderings(specs) {
        let workers = facts.workers.values();
        let unlike = workers.filter(|worker| rendering.is_unlike(worker.id));
        let unlike: Vec<&str> = unlike.map(|worker| worker.name.as_str()).collect();
        match rendering.profile.map(|profile| profile.id()) {
            None => differ.push(format!(
                "{model} in {pool}: most of its workers have a render-profile that this version does not know"
            )),
            Some(profile) if !unlike.is_empty() => differ.push(format!(
                "{model} in {pool} is rendered {profile}, but otherwise by {}",
                unlike.join(", ")
            )),
            Some(_) => {}
        }
    }
    report.fail(
        "models.profiles",
        &differ,
        "workers of one model render prompts alike",
        "what these workers hold counts for nothing: give their engines the pool's chat template, or, where that is meant to change, all others the new one",
    );
}

const IDS: [&str; 14] = [
    "config.policies",
    "config.pools",
    "fleet.alarms",
    "workers.lost",
    "workers.departed",
    "workers.engines",
    "workers.joining",
    "workers.cordoned",
    "workers.draining",
    "workers.in-force",
    "models.ready",
    "models.profiles",
    "workers.addresses",
    "requests.quarantined",
];
const LONG_MINUTES: u64 = 10;
