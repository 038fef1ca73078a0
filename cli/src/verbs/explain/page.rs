//! A decision as people read it: who was looked at, what was predicted, and why the others were not taken.

use forebay_scheduler::{Considered, Filtered, NoChoice, Outcome, Receipt};

use super::Placement;
use crate::output::{clock, table};

/// All placements, one after the other.
pub(super) fn page(placements: &[Placement]) -> String {
    let pages: Vec<String> = placements.iter().map(one).collect();
    pages.join("\n\n")
}

fn one(placement: &Placement) -> String {
    let receipt = &placement.receipt;
    let asked = &receipt.asked;
    let mut lines = vec![
        ("request", placement.request_id.clone()),
        ("balancer", of_balancer(placement)),
        ("asked for", asked_for(receipt)),
        ("outcome", outcome(placement)),
        ("known", known(receipt)),
        ("not scored", not_scored(&receipt.filtered)),
    ];
    if !asked.tried.is_empty() {
        let tried = asked.tried.iter().map(|id| {
            let name = placement.workers.get(&id.0.to_string()).cloned();
            name.unwrap_or_else(|| id.to_string())
        });
        let tried: Vec<String> = tried.collect();
        lines.push(("tried before", tried.join(", ")));
    }
    if !asked.apart.is_empty() {
        let apart = asked.apart.iter().map(|id| {
            let name = placement.workers.get(&id.0.to_string()).cloned();
            name.unwrap_or_else(|| id.to_string())
        });
        let apart: Vec<String> = apart.collect();
        lines.push(("kept apart from the suspects on", apart.join(", ")));
    }
    if let Some(before) = placement.waiting_before.filter(|before| *before > 0) {
        lines.push((
            "waiting",
            format!("{before} requests of the pool wait already and come first"),
        ));
    }
    if !receipt.drawn.is_empty() {
        let drawn = receipt.drawn.iter().map(|(incarnation, bookings)| {
            format!(
                "{} with {bookings} of our own",
                placement.name(*incarnation)
            )
        });
        let drawn: Vec<String> = drawn.collect();
        let why = "all workers are silent; of two that were drawn the one with fewer bookings";
        lines.push(("drawn", format!("{why}: {}", drawn.join(", "))));
    }
    if let Some(again) = placement.replayed {
        lines.push((
            "replayed",
            match (again.same, again.outcome) {
                (true, _) => "the same choice, made again here from the receipt alone".into(),
                (false, Some(other)) => format!("ANOTHER choice: {other:?}"),
                (false, None) => format!("this version has no policy {}", receipt.policy),
            },
        ));
    }
    let lines = lines
        .iter()
        .map(|(name, text)| format!("{name:<13} {text}"));
    let mut text = lines.collect::<Vec<_>>().join("\n");
    if !receipt.considered.is_empty() {
        text += &format!("\n\n{}", candidates(placement));
    }
    text
}

fn of_balancer(placement: &Placement) -> String {
    let at = clock(placement.at_ms);
    match placement.number {
        Some(number) => format!("{}, its placement {number}, {at}", placement.balancer),
        None => format!("{}, asked at {at}; nothing was sent", placement.balancer),
    }
}

fn asked_for(receipt: &Receipt) -> String {
    let asked = &receipt.asked;
    let mut text = format!("{}, {:.0} prompt tokens", asked.model, asked.prompt_tokens);
    if asked.longer_tokens > 0.0 {
        text += &format!(" (up to {:.0} more)", asked.longer_tokens);
    }
    if let Some(ttft) = asked.ttft_ms {
        text += &format!(", first token in {ttft:.0} ms");
    }
    if let Some(tpot) = asked.tpot_ms {
        text += &format!(", {tpot:.0} ms a token");
    }
    if let Some(conversation) = asked.conversation {
        text += &format!(", conversation {conversation:016x}");
    }
    if let Some(family) = asked.family {
        text += &format!(", family {family:016x}");
    }
    if let Some(zone) = &asked.zone {
        text += &format!(", in zone {zone}");
    }
    text
}

fn outcome(placement: &Placement) -> String {
    let receipt = &placement.receipt;
    match receipt.outcome {
        Outcome::Chosen(chosen) => format!(
            "{} ({chosen}) by {}, among {}; {}",
            placement.name(chosen),
            receipt.policy,
            receipt.eligible,
            match (&placement.ended, placement.number) {
                (Some(ended), _) => ended,
                (None, Some(_)) => "under way, or its client left",
                (None, None) => "not sent",
            }
        ),
        Outcome::Nobody(NoChoice::UnknownModel) => "nobody: no worker serves that model".into(),
        Outcome::Nobody(NoChoice::NoCapacity) => {
            "nobody: no worker that may serve it can be reached and takes requests".into()
        }
        Outcome::Nobody(NoChoice::Busy) => "nobody: all are full, it would wait".into(),
    }
}

fn known(receipt: &Receipt) -> String {
    let versions = receipt.versions;
    let [one, other] = receipt.draws.policy;
    format!(
        "facts {}, prefix index {}, turn {}, draws {one:016x} {other:016x} {:016x}",
        versions.facts_revision, versions.index_version, receipt.asked.turn, receipt.draws.ties
    )
}

fn not_scored(filtered: &Filtered) -> String {
    let Filtered {
        unreachable,
        closed,
        tried,
        apart,
        short,
        suspect,
        full,
        dearer,
        not_kept,
    } = *filtered;
    let parts = [
        (unreachable, "not connected"),
        (
            closed,
            "closed (cordoned, draining, joining, or the engine is down)",
        ),
        (tried, "tried before"),
        (apart, "busy with another suspect"),
        (short, "with too short a context"),
        (suspect, "silent"),
        (full, "full"),
        (dearer, "surely dearer than the choice"),
        (not_kept, "scored and not kept in the receipt"),
    ];
    let parts = parts.iter().filter(|(count, _)| *count > 0);
    let parts: Vec<String> = parts.map(|(count, why)| format!("{count} {why}")).collect();
    if parts.is_empty() {
        "nobody".into()
    } else {
        parts.join(", ")
    }
}

fn candidates(placement: &Placement) -> String {
    let receipt = &placement.receipt;
    let chosen = receipt
        .considered
        .iter()
        .find(|one| is_chosen(receipt, one));
    let mut sorted: Vec<&Considered> = receipt.considered.iter().collect();
    sorted.sort_by(|one, other| {
        let first = is_chosen(receipt, other).cmp(&is_chosen(receipt, one));
        let by_score = one.score.partial_cmp(&other.score);
        first.then(by_score.unwrap_or(std::cmp::Ordering::Equal))
    });
    let ms = |value: f64| format!("{value:.1}");
    let rows = sorted.into_iter().map(|one| {
        let candidate = &one.candidate;
        let terms = &candidate.terms;
        [
            placement.name(one.incarnation),
            ms(one.score.first),
            ms(terms.ttft_p50_ms),
            ms(terms.ttft_p95_ms),
            ms(terms.tpot_ms),
            ms(terms.wait_ms),
            ms(terms.own_ms),
            ms(terms.imposed_ms),
            ms(terms.evicted_ms),
            ms(terms.risk_ms),
            if candidate.counted_tokens > 0.0 {
                let (cached, counted) = (candidate.cached_tokens, candidate.counted_tokens);
                format!("{cached:.0} as {counted:.0}")
            } else {
                format!("{:.0}", candidate.cached_tokens)
            },
            format!(
                "{}/{}",
                candidate.queueing.present, candidate.queueing.slots
            ),
            format!("{:.0}%", terms.kv_used * 100.0),
            format!("{}ms", candidate.age.as_millis()),
            why(receipt, chosen, one),
        ]
    });
    table(
        [
            "WORKER", "COST", "TTFT", "P95", "TPOT", "WAIT", "PREFILL", "IMPOSED", "EVICTED",
            "RISK", "CACHED", "BUSY", "KV", "AGE", "WHY",
        ],
        rows,
    )
}

fn is_chosen(receipt: &Receipt, one: &Considered) -> bool {
    receipt.outcome == Outcome::Chosen(one.incarnation)
}

/// Why this one was taken, or not.
fn why(receipt: &Receipt, chosen: Option<&Considered>, one: &Considered) -> String {
    let Some(chosen) = chosen else {
        return String::new();
    };
    let kept = match (one.feasible, one.candidate.counted_tokens > 0.0) {
        (false, _) => "; a promise would be broken",
        (true, true) => "; as a home of the family, counted to hold it",
        (true, false) => "",
    };
    if is_chosen(receipt, one) {
        let nearer = receipt
            .considered
            .iter()
            .any(|other| other.score.tier == one.score.tier && other.score.first < one.score.first);
        let how = match (nearer, receipt.asked.conversation) {
            (false, _) => "chosen: the least cost",
            (true, Some(_)) => "chosen: within the tolerance of the least, by its conversation",
            (true, None) => "chosen: within the tolerance of the least, at random",
        };
        return format!("{how}{kept}");
    }
    let (dearer, tiers) = (
        one.score.first - chosen.score.first,
        one.score.tier.cmp(&chosen.score.tier),
    );
    let how = match tiers {
        std::cmp::Ordering::Greater => "a worse tier".to_owned(),
        std::cmp::Ordering::Less => "a better tier".to_owned(),
        std::cmp::Ordering::Equal if dearer > 0.0 => format!("dearer by {dearer:.1}"),
        std::cmp::Ordering::Equal if dearer < 0.0 => {
            format!("cheaper by {:.1}, which is within the tolerance", -dearer)
        }
        std::cmp::Ordering::Equal => "as good, and lost the tie".to_owned(),
    };
    format!("{how}{kept}")
}
