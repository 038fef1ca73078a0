//! Finds the best of a fleet without asking everybody: a lower bound of the cost rules most workers
//! out, and what is left is scored exactly.
//!
//! The bound is affine in the prompt, so that one pass over contiguous rows decides. It is the cost of
//! [`crate::policy`]'s own rule with the chunks of a prefill taken as fluid and without evictions and
//! suspicion, all of which only add. Nothing that could win, or tie for the conversation, is left out:
//! the choice is that of the full evaluation, which a property test holds it to.

use std::time::Duration;

use forebay_proto::{Now, WorkerId};

use crate::lineup::{Lineup, slack_ms};
use crate::model::attention_pairs;
use crate::pick::{Field, Held, Ranked};
use crate::policy::{Policy, Request, Rule, Score, cost};
use crate::standing::{Access, Moment, Standing};
use crate::view::View;

/// What rounding may do to a bound.
const SLACK: f64 = 1.0 + 1e-9;

/// The least that a placement on one worker costs, for any prompt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    suspect_after_ms: f64,
    /// When its reported backlog is prefilled, and prefill time of it that passes in a millisecond.
    over_ms: f64,
    passes_ms: f64,
    /// Wait for a slot, and what is before the prompt and does not pass.
    fixed_ms: f64,
    token_ms: f64,
    pair_ms: f64,
    /// What each token takes of its own, without the iterations' bases.
    own_token_ms: f64,
    /// Requests that are there.
    residents: f64,
    lineup: Lineup,
    ttft_p50: f64,
    ttft_p95: f64,
    /// From token to token before the context of the prompt, and what each token of that adds.
    decode_ms: f64,
    context_ms: f64,
    worker: WorkerId,
    access: Access,
    longest: f64,
}

impl Bound {
    pub(crate) fn of(standing: &Standing) -> Self {
        let (outlook, drain) = (&standing.outlook, standing.drain());
        let pace = &outlook.pace;
        let (token_ms, pair_ms) = (pace.least_token_ms(), pace.pair_ms);
        Self {
            suspect_after_ms: standing.suspect_after_ms,
            over_ms: drain.over_ms,
            passes_ms: drain.tokens_per_ms * (token_ms + drain.pairs_per_token * pair_ms),
            fixed_ms: outlook.wait_ms + drain.tokens * token_ms + drain.pairs * pair_ms,
            token_ms,
            pair_ms,
            own_token_ms: pace.token_ms,
            residents: outlook.residents,
            lineup: outlook.lineup,
            ttft_p50: outlook.residuals.ttft_p50,
            ttft_p95: outlook.residuals.ttft_p95,
            decode_ms: outlook.decode_ms,
            context_ms: outlook.context_ms,
            worker: standing.worker,
            access: standing.access,
            longest: standing.longest,
        }
    }

    /// What a prefill takes of its own.
    #[inline]
    fn own_ms(&self, tokens: f64, pairs: f64) -> f64 {
        tokens * self.own_token_ms + pairs * self.pair_ms
    }

    /// The least time to first token.
    #[inline]
    fn least_ttft_ms(&self, now_ms: f64, tokens: f64, pairs: f64, slack_ms: f64) -> f64 {
        let before = self.fixed_ms + (self.over_ms - now_ms).max(0.0) * self.passes_ms;
        let last = before + tokens * self.token_ms + pairs * self.pair_ms;
        last - self.lineup.behind_ms(slack_ms)
    }
}

impl View {
    /// Scores those workers that a rule might choose; the others are counted.
    pub(crate) fn narrow(
        &self,
        now: Now,
        request: &Request<'_>,
        policy: &dyn Policy,
        rule: Rule,
        ranked: &mut Vec<Ranked>,
    ) -> Field {
        let (at, mut held) = (Moment::of(now), Held::of(request));
        let (ttft_target, tpot_target) = (
            request.targets.ttft_ms * SLACK,
            request.targets.tpot_ms * SLACK,
        );
        let mut field = Field::default();
        let mut best = Score::WORST;
        // Whoever costs more is no tie however old the view of the best may be.
        let mut limit = f64::INFINITY;
        let context_tokens = self.context_tokens(request);
        // Most requests are of no family.
        let homes = request.homes.is_some() && policy.counts_homes();
        for place in self.serving(request) {
            let bound = &self.bounds[*place];
            if context_tokens > bound.longest {
                continue;
            }
            let silent = at.ms > bound.suspect_after_ms;
            if bound.access != Access::Open || silent || request.excludes(bound.worker) {
                let full = bound.access == Access::Full && !silent;
                field.full |= full && !request.excludes(bound.worker);
                continue;
            }
            field.candidates += 1;
            let cached = held.by(bound.worker);
            let (mut home, mut most) = (0.0, cached);
            if homes {
                home = held.as_home(bound.worker, policy);
                // The most that it may be counted to hold.
                most = cached.max(home);
            }
            let tokens = request.prompt_tokens - most;
            let pairs = attention_pairs(most, tokens);
            let own = bound.own_ms(tokens, pairs);
            let slack = slack_ms(request.targets.ttft_ms, own);
            let ttft = bound.least_ttft_ms(at.ms, tokens, pairs, slack);
            let tpot = bound.decode_ms + request.prompt_tokens * bound.context_ms;
            let late = ttft * bound.ttft_p95 > ttft_target || tpot > tpot_target;
            let tier = u32::from(late);
            let cost = cost(late, ttft * bound.ttft_p50, own, own * bound.residents);
            if tier > best.tier || (tier == best.tier && cost > limit) {
                continue;
            }
            let standing = &self.standings[*place];
            let counted = if homes {
                standing.counted(at, request, cached, home)
            } else {
                cached
            };
            let terms = standing.terms(at, request, counted);
            let score = rule(&terms, &request.targets);
            ranked.push(Ranked {
                place: *place,
                worker: bound.worker,
                score,
            });
            if score < best {
                best = score;
                limit = (best.first + policy.tolerance(best, Duration::MAX)) * SLACK;
            }
        }
        field
    }
}
