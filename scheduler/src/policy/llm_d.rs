//! Baseline: the predicted-latency composite of llm-d's router (code of its plugins, May 2026 defaults).
//!
//! 1. Affinity gate: if workers hold at least 0.80 of the prompt, only they, unless the best of them
//!    answers more than 5 s later than the best other; one decision in a hundred explores all.
//! 2. Headroom is the target less the prediction. Those with both headrooms come first; one decision in a
//!    hundred tries the others. Without both: idle ones, then those late in tokens only, in the first
//!    token only, in both.
//! 3. The least of `0.8·TTFT + 0.2·TPOT` headroom, each from 0 to 1 over its tier: workers are packed up
//!    to the promise; where it is broken already, the least excess.
//!
//! Predictions are the latency model's, where theirs are a learned sidecar's. What was not promised
//! counts as promised at once, which makes it the least prediction.

use super::{Candidate, Field, Policy, Request, Score, each};

const AFFINITY: f64 = 0.80;
const MOST_TTFT_PENALTY_MS: f64 = 5_000.0;
const EXPLORE_ONE_IN: u64 = 100;
const TTFT_WEIGHT: f64 = 0.8;
const TPOT_WEIGHT: f64 = 0.2;
/// Behind every bucket of those that are late, and behind those.
const LAST_BUCKET: u32 = 5;
const GATED: u32 = 10;

pub(super) struct LlmD;

impl Policy for LlmD {
    fn name(&self) -> &'static str {
        "llm-d"
    }

    fn scores(
        &self,
        request: &Request<'_>,
        candidates: &[Candidate],
        field: &Field,
        scores: &mut Vec<Score>,
    ) {
        let gated = gate(request, candidates, field.draws[0]);
        let explores = field.draws[1].is_multiple_of(EXPLORE_ONE_IN);
        let mut kept = [Spread::default(), Spread::default()];
        for one in candidates.iter().filter(|one| gated.lets(one)) {
            let (ttft, tpot) = headroom(request, one);
            kept[usize::from(bucket(request, one) > 0)].take(ttft, tpot);
        }
        let positive_first = !explores || kept[1].none();
        each(candidates, scores, |one| {
            let (ttft, tpot) = headroom(request, one);
            let bucket = bucket(request, one);
            let tier = match bucket {
                0 if !positive_first => LAST_BUCKET,
                bucket => bucket,
            };
            let [ttft, tpot] = kept[usize::from(bucket > 0)].share(ttft, tpot);
            let least = TTFT_WEIGHT * ttft + TPOT_WEIGHT * tpot;
            let first = if bucket == 0 { least } else { -least };
            let out = if gated.lets(one) { 0 } else { GATED };
            Score::by(first, 0.0).in_tier(tier + out)
        });
    }
}

/// Whether only those pass that hold most of the prompt.
struct Gate {
    least_cached: f64,
}

impl Gate {
    fn lets(&self, one: &Candidate) -> bool {
        one.cached_tokens >= self.least_cached
    }
}

fn gate(request: &Request<'_>, candidates: &[Candidate], draw: u64) -> Gate {
    let open = Gate { least_cached: 0.0 };
    let least_cached = AFFINITY * request.prompt_tokens;
    if least_cached <= 0.0 || draw.is_multiple_of(EXPLORE_ONE_IN) {
        return open;
    }
    let sticky = Gate { least_cached };
    let best = |warm: bool| {
        let some = candidates.iter().filter(|one| sticky.lets(one) == warm);
        some.map(|one| one.terms.ttft_ms)
            .fold(f64::INFINITY, f64::min)
    };
    let (warm, other) = (best(true), best(false));
    let sticks = warm.is_finite() && warm - other <= MOST_TTFT_PENALTY_MS;
    if sticks { sticky } else { open }
}

fn headroom(request: &Request<'_>, one: &Candidate) -> (f64, f64) {
    let promised = |target: f64| if target.is_finite() { target } else { 0.0 };
    (
        promised(request.targets.ttft_ms) - one.terms.ttft_ms,
        promised(request.targets.tpot_ms) - one.terms.tpot_ms,
    )
}

/// Zero: on time in both. Else in which order those are tried that are late.
fn bucket(request: &Request<'_>, one: &Candidate) -> u32 {
    let (ttft, tpot) = headroom(request, one);
    match (ttft >= 0.0, tpot >= 0.0) {
        (true, true) => 0,
        _ if one.queueing.present == 0 => 1,
        (true, false) => 2,
        (false, true) => 3,
        (false, false) => 4,
    }
}

/// Least and most of two headrooms.
struct Spread([(f64, f64); 2]);

impl Default for Spread {
    fn default() -> Self {
        Self([(f64::INFINITY, f64::NEG_INFINITY); 2])
    }
}

impl Spread {
    fn take(&mut self, ttft: f64, tpot: f64) {
        for ((least, most), value) in self.0.iter_mut().zip([ttft, tpot]) {
            *least = least.min(value);
            *most = most.max(value);
        }
    }

    fn none(&self) -> bool {
        self.0[0].0 > self.0[0].1
    }

    /// Where values lie, from 0 to 1; where all are alike it says nothing.
    fn share(&self, ttft: f64, tpot: f64) -> [f64; 2] {
        let share = |(least, most): (f64, f64), value: f64| {
            let spread = most - least;
            if spread > 0.0 {
                (value - least) / spread
            } else {
                0.0
            }
        };
        [share(self.0[0], ttft), share(self.0[1], tpot)]
    }
}
