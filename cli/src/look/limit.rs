//! What limits the fleet at this moment, by one rule of what is observed.
//!
//! The first that holds: facts cannot be read (`control`); no balancer is ready (`balancers`); no worker
//! serves (`workers`); at half of the workers that serve or more, requests use 90 % of the KV cache (`kv`);
//! 90 % of all slots are taken, or requests wait at every worker, whose agent lets no more in (`capacity`);
//! requests wait though a worker has room (`queue`); else `nothing`. Where no balancer can be asked, it is
//! `unknown`.

use serde::Serialize;

use super::{Process, Worker, workers};

/// What limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Limit {
    /// There is room, and nobody waits.
    Nothing,
    /// Nobody can be asked.
    Unknown,
    /// Nothing can be changed or registered; requests go on by the last facts.
    Control,
    /// No balancer takes requests.
    Balancers,
    /// No worker takes requests.
    Workers,
    /// KV caches are full of what is being served.
    Kv,
    /// The engines' slots are taken, or their agents let no more in.
    Capacity,
    /// Requests wait though there is room.
    Queue,
}

impl Limit {
    /// As documents print it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Unknown => "unknown",
            Self::Control => "control",
            Self::Balancers => "balancers",
            Self::Workers => "workers",
            Self::Kv => "kv",
            Self::Capacity => "capacity",
            Self::Queue => "queue",
        }
    }
}

/// From here on a cache, or a fleet's slots, count as full.
const FULL: f64 = 0.9;

/// What limits the fleet, and the numbers that say so.
pub(crate) fn limited_by(quorum: bool, balancers: &[Process]) -> (Limit, String) {
    if !quorum {
        let why =
            "the facts cannot be read: nothing can be changed; requests go on by the last ones";
        return (Limit::Control, why.into());
    }
    if balancers.is_empty() {
        let why = "no balancer is known: the context has no table [balancers]";
        return (Limit::Unknown, why.into());
    }
    let seen: Vec<_> = balancers
        .iter()
        .filter_map(|one| one.seen.as_ref().ok())
        .collect();
    let ready = seen.iter().filter(|shown| shown.reasons.is_empty()).count();
    if seen.is_empty() {
        return (
            Limit::Unknown,
            format!("none of {} balancers answers", balancers.len()),
        );
    }
    if ready == 0 {
        let reasons = seen[0].reasons.join("; ");
        let why = format!("none of {} balancers is ready: {reasons}", balancers.len());
        return (Limit::Balancers, why);
    }
    let workers = workers(balancers);
    let serving: Vec<&Worker> = workers.values().filter(|worker| serves(worker)).collect();
    if serving.is_empty() {
        let why = format!("none of {} workers takes requests", workers.len());
        return (Limit::Workers, why);
    }
    let sum = |of: fn(&Worker) -> Option<u32>| {
        let values = serving.iter().filter_map(|worker| of(worker));
        values.map(u64::from).sum::<u64>()
    };
    let (running, slots) = (sum(|one| one.running), sum(|one| one.slots));
    let at_agents = sum(|one| one.queued);
    let at_balancers: f64 = seen
        .iter()
        .filter_map(|shown| shown.metrics.sum("forebay_balancer_queued"))
        .sum();
    let full = serving
        .iter()
        .filter(|worker| worker.kv_used.is_some_and(|used| used >= FULL))
        .count();
    let waiting = format!("{at_balancers:.0} requests wait at balancers, {at_agents} at agents");
    let taken = format!("{running} of {slots} slots are taken");
    #[allow(clippy::cast_precision_loss)] // counts of requests
    let busy = running as f64 >= FULL * slots as f64 && slots > 0;
    if 2 * full >= serving.len() {
        let of = serving.len();
        return (
            Limit::Kv,
            format!("{full} of {of} KV caches are used to 90 %; {waiting}"),
        );
    }
    if busy {
        return (Limit::Capacity, format!("{taken}; {waiting}"));
    }
    if serving.iter().all(|worker| worker.queued > Some(0)) {
        let why = format!(
            "requests wait at each of {} workers: {waiting}; {taken}",
            serving.len()
        );
        return (Limit::Capacity, why);
    }
    if at_balancers + at_agents as f64 > 0.0 {
        return (Limit::Queue, format!("{waiting}, and {taken}"));
    }
    (Limit::Nothing, format!("{taken}, nobody waits"))
}

/// Whether a balancer may place on it.
pub(crate) fn serves(worker: &Worker) -> bool {
    worker.connected.is_some() && worker.acceptance.as_deref() == Some("Open")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::look::Shown;
    use crate::look::metrics::Metrics;

    /// `w1 running=3/4 queued=1 kv=0.5 closed`, one worker each.
    fn worker(text: &str) -> Worker {
        let mut worker = Worker {
            connected: Some("w1.1.1".into()),
            acceptance: Some("Open".into()),
            ..Worker::default()
        };
        for (at, part) in text.split_whitespace().enumerate() {
            match part.split_once('=') {
                None if at == 0 => worker.name = part.into(),
                None => worker.acceptance = Some("Cordoned".into()),
                Some(("running", value)) => {
                    let (running, slots) = value.split_once('/').unwrap();
                    worker.running = running.parse().ok();
                    worker.slots = slots.parse().ok();
                }
                Some(("queued", value)) => worker.queued = value.parse().ok(),
                Some((_, value)) => worker.kv_used = value.parse().ok(),
            }
        }
        worker
    }

    fn balancer(queued: u32, reasons: &[&str], workers: &[&str]) -> Process {
        Process {
            name: "b1".into(),
            seen: Ok(Shown {
                reasons: reasons.iter().map(ToString::to_string).collect(),
                metrics: Metrics::parse(&format!("forebay_balancer_queued {queued}\n")),
                workers: workers.iter().map(|text| worker(text)).collect(),
                revision: Some(1),
            }),
        }
    }

    fn check(queued: u32, workers: &[&str], limit: Limit, says: &str) {
        let (found, why) = limited_by(true, &[balancer(queued, &[], workers)]);
        assert_eq!(found, limit, "{why}");
        assert!(why.contains(says), "{why}");
    }

    #[test]
    fn the_rule_names_what_is_scarce_first() {
        let (idle, busy) = ("w1 running=1/4 kv=0.2", "w2 running=4/4 kv=0.5");
        check(
            0,
            &[idle],
            Limit::Nothing,
            "1 of 4 slots are taken, nobody waits",
        );
        check(0, &[idle, busy], Limit::Nothing, "5 of 8");
        check(0, &[busy], Limit::Capacity, "4 of 4 slots");
        check(7, &[busy], Limit::Capacity, "7 requests wait at balancers");
        check(
            7,
            &[idle],
            Limit::Queue,
            "7 requests wait at balancers, 0 at agents",
        );
        check(
            0,
            &["w3 running=1/4 queued=2", idle],
            Limit::Queue,
            "2 at agents",
        );
        check(
            0,
            &["w3 running=3/4 queued=2"],
            Limit::Capacity,
            "at each of 1 workers",
        );
        check(0, &["w3 running=1/4 kv=0.95", idle], Limit::Kv, "1 of 2");
        check(
            3,
            &["w1 running=4/4 kv=0.95"],
            Limit::Kv,
            "1 of 1 KV caches",
        );
        check(
            0,
            &["w1 running=1/4 kv=0.95", busy, "w3 running=0/4"],
            Limit::Nothing,
            "5 of 12",
        );
        check(
            0,
            &["w1 running=4/4 closed"],
            Limit::Workers,
            "none of 1 workers",
        );
    }

    #[test]
    fn what_cannot_be_seen_is_said() {
        let (limit, why) = limited_by(false, &[]);
        assert_eq!((limit, why.contains("facts")), (Limit::Control, true));
        assert_eq!(limited_by(true, &[]).0, Limit::Unknown);
        let dead = Process {
            seen: Err("refused".into()),
            ..balancer(0, &[], &[])
        };
        assert_eq!(
            limited_by(true, std::slice::from_ref(&dead)).0,
            Limit::Unknown
        );
        let (limit, why) = limited_by(true, &[dead, balancer(0, &["no facts yet"], &[])]);
        assert_eq!(limit, Limit::Balancers);
        assert!(why.contains("no facts yet"), "{why}");
    }
}
