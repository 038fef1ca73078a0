//! The choice of a worker: the best by a pool's policy among those that may serve the request.

use std::cmp::{Ordering, Reverse};
use std::time::Duration;

use forebay_proto::{Incarnation, Now, WorkerId};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::index::Hit;
use crate::model::attention_pairs;
use crate::policy::{self, Candidate, Policy, Request, Score, rendezvous};
use crate::standing::{Access, Moment, Standing};
use crate::view::View;

/// Where a request goes, and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The start of the worker that it is placed on.
    pub incarnation: Incarnation,
    /// Its score by the policy.
    pub score: Score,
    /// Among how many workers it was chosen.
    pub candidates: usize,
    /// Tokens of the prompt that the worker is believed to hold.
    pub cached_tokens: u32,
    /// Predicted time to first token.
    pub ttft: Duration,
    /// Wait for a slot that the choice relies on; none: the policy does not predict.
    pub wait: Option<Duration>,
    /// Whether what was promised is expected to be kept there, whatever the policy looks at.
    pub feasible: bool,
    /// What it adds to the worker's backlog.
    pub work: Work,
}

impl Choice {
    /// Length of the prompt, as the decision took it.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
    pub const fn prompt_tokens(&self) -> u32 {
        self.work.context_tokens as u32
    }
}

/// What one request adds to a worker's backlog.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Prompt tokens to prefill.
    pub uncached_tokens: f64,
    /// Their attention pairs.
    pub pairs: f64,
    /// Tokens that its decode attends to.
    pub context_tokens: f64,
    /// It makes the copy that the worker, as a home of the request's family, was counted to hold.
    pub makes_copy: bool,
}

/// Why no worker was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoChoice {
    /// No worker in the facts serves this model.
    UnknownModel,
    /// There are workers, but none is reachable, open and not yet tried.
    NoCapacity,
    /// Each that could serve it is full.
    Busy,
}

/// The luck of one decision, drawn before it: all else of it follows from the view and the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draws {
    /// For the policy, or for the choice between two silent workers.
    pub policy: [u64; 2],
    /// Among equals.
    pub ties: u64,
}

impl Draws {
    pub(crate) fn of(rng: &mut impl Rng) -> Self {
        Self {
            policy: [rng.random(), rng.random()],
            ties: rng.random(),
        }
    }
}

/// A worker with its score.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ranked {
    /// Its place in the view, or among the candidates of a receipt.
    pub(crate) place: usize,
    pub(crate) worker: WorkerId,
    pub(crate) score: Score,
}

/// Buffers of the decisions, which are kept so that none of them allocates.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scratch {
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) places: Vec<usize>,
    scores: Vec<Score>,
    pub(crate) ranked: Vec<Ranked>,
}

/// Who was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Field {
    /// Those that may serve.
    pub(crate) candidates: usize,
    /// Requests that they have, as far as the policy asks.
    pub(crate) in_flight: u64,
    /// Someone could serve it and has no room.
    pub(crate) full: bool,
}

/// A decision, before it is told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decided {
    pub(crate) place: usize,
    pub(crate) score: Score,
    pub(crate) candidates: usize,
    /// Nothing but silence was there to choose from.
    pub(crate) silent: bool,
}

impl View {
    /// Picks a worker for a request by a policy.
    ///
    /// Where every reachable worker is suspect, the view says nothing: two are drawn and the one
    /// with fewer own bookings is taken (power of two choices, Mitzenmacher 2001), so that a pool is
    /// never stopped by silence alone.
    ///
    /// # Errors
    ///
    /// Returns why there is none.
    pub fn pick(
        &mut self,
        now: Now,
        request: &Request<'_>,
        policy: &dyn Policy,
        rng: &mut impl Rng,
    ) -> Result<Choice, NoChoice> {
        let now = self.tell(now);
        let decided = self.decide(now, request, policy, &Draws::of(rng));
        decided.map(|(decided, _)| self.choice(now, request, policy, &decided))
    }

    /// The workers that suit a request best, the best first: whom to ask, where the view alone is too old
    /// to say.
    pub fn best(
        &mut self,
        now: Now,
        request: &Request<'_>,
        policy: &dyn Policy,
        count: usize,
        rng: &mut impl Rng,
    ) -> Vec<WorkerId> {
        let (now, draws) = (self.tell(now), Draws::of(rng));
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.ranked.clear();
        self.score_all(now, request, policy, &draws, &mut scratch);
        let key = request.conversation.unwrap_or(draws.ties);
        // Equals in an order of this request's own: all balancers would ask the same ones.
        let place = |one: &Ranked| Reverse(rendezvous(key, one.worker));
        let by_score =
            |one: &Ranked, other: &Ranked| compared(one, other).then(place(one).cmp(&place(other)));
        scratch.ranked.sort_unstable_by(by_score);
        let best = scratch
            .ranked
            .iter()
            .take(count)
            .map(|one| one.worker)
            .collect();
        self.scratch = scratch;
        best
    }

    /// The shortest wait for a slot among workers that may serve a request; `None`: none can be reached.
    #[must_use]
    pub fn least_wait(&self, request: &Request<'_>) -> Option<Duration> {
        let reachable = self.reachable(request);
        reachable.map(|worker| worker.queueing().wait()).min()
    }

    /// Whether any worker is there to serve the request, now or once it has room.
    #[must_use]
    pub fn has_capacity(&self, request: &Request<'_>) -> bool {
        self.reachable(request)
            .any(|standing| !request.excludes(standing.worker))
    }

    /// Whether none of the only ones that a request may have takes anything now.
    #[must_use]
    pub fn is_closed(&self, now: Now, request: &Request<'_>) -> bool {
        let moment = Moment::of(now);
        let mut serving = self.serving(request).iter();
        !request.only.is_empty()
            && !serving.any(|place| {
                let standing = &self.standings[*place];
                let open = standing.access == Access::Open && !standing.suspect(moment);
                open && !request.excludes(standing.worker)
            })
    }

    fn reachable(&self, request: &Request<'_>) -> impl Iterator<Item = &Standing> {
        let serving = self.serving(request).iter();
        let standings = serving.map(|place| &self.standings[*place]);
        standings.filter(|standing| matches!(standing.access, Access::Open | Access::Full))
    }

    /// Leaves who was scored, and how, in the scratch.
    pub(crate) fn decide(
        &mut self,
        now: Now,
        request: &Request<'_>,
        policy: &dyn Policy,
        draws: &Draws,
    ) -> Result<(Decided, Field), NoChoice> {
        if self.serving(request).is_empty() {
            return Err(match request.zone {
                None => NoChoice::UnknownModel,
                Some(_) => NoChoice::NoCapacity,
            });
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.ranked.clear();
        let field = match policy.rule() {
            Some(rule) => self.narrow(now, request, policy, rule, &mut scratch.ranked),
            None => self.score_all(now, request, policy, draws, &mut scratch),
        };
        let age = |place: usize| self.standings[place].age(now);
        let decided = match best(&scratch.ranked, request.conversation, policy, draws, age) {
            Some(best) => Ok(Decided {
                place: best.place,
                score: best.score,
                candidates: field.candidates,
                silent: false,
            }),
            None if field.full => Err(NoChoice::Busy),
            None => self
                .two_choices(now, request, draws, &mut scratch.places)
                .ok_or(NoChoice::NoCapacity),
        };
        self.scratch = scratch;
        decided.map(|decided| (decided, field))
    }

    fn score_all(
        &self,
        now: Now,
        request: &Request<'_>,
        policy: &dyn Policy,
        draws: &Draws,
        scratch: &mut Scratch,
    ) -> Field {
        let (mut held, mut field) = (Held::of(request), Field::default());
        let moment = Moment::of(now);
        let context_tokens = self.context_tokens(request);
        scratch.candidates.clear();
        scratch.places.clear();
        for place in self.serving(request) {
            let standing = &self.standings[*place];
            let short = context_tokens > standing.longest;
            let out = short || standing.suspect(moment) || request.excludes(standing.worker);
            match standing.access {
                Access::Open if !out => {
                    let cached = held.by(standing.worker);
                    let home = held.as_home(standing.worker, policy);
                    let counted = standing.counted(moment, request, cached, home);
                    let at = scratch.candidates.len();
                    let candidate = standing.candidate(moment, request, (cached, counted), at);
                    field.in_flight += u64::from(candidate.queueing.present);
                    scratch.candidates.push(candidate);
                    scratch.places.push(*place);
                }
                Access::Full => field.full |= !out,
                Access::Open | Access::Closed | Access::Unreachable => {}
            }
        }
        field.candidates = scratch.candidates.len();
        let seen = policy::Field::of(&field, draws);
        scratch.scores.clear();
        policy.scores(request, &scratch.candidates, &seen, &mut scratch.scores);
        debug_assert_eq!(scratch.scores.len(), field.candidates, "{}", policy.name());
        let both = scratch.candidates.iter().zip(&scratch.places);
        let scored = both.zip(&scratch.scores);
        scratch
            .ranked
            .extend(scored.map(|((candidate, place), score)| Ranked {
                place: *place,
                worker: candidate.worker,
                score: *score,
            }));
        field
    }

    /// Of two that are drawn the one with fewer own bookings: of silent workers nothing else is known.
    /// Leaves the two in `places`.
    fn two_choices(
        &self,
        now: Now,
        request: &Request<'_>,
        draws: &Draws,
        places: &mut Vec<usize>,
    ) -> Option<Decided> {
        let moment = Moment::of(now);
        places.clear();
        places.extend(self.serving(request).iter().filter(|place| {
            let standing = &self.standings[**place];
            let open = matches!(standing.access, Access::Open | Access::Full);
            open && standing.suspect(moment) && !request.excludes(standing.worker)
        }));
        let silent = places.len();
        let two = draws.policy.map(|draw| draw as usize % silent.max(1));
        let [one, other] = two.map(|at| places.get(at).copied());
        places.clear();
        places.extend(one.into_iter().chain(other));
        let fewer = places
            .iter()
            .min_by_key(|place| self.standings[**place].own_bookings)?;
        Some(Decided {
            place: *fewer,
            score: Score::default(),
            candidates: silent,
            silent: true,
        })
    }

    pub(crate) fn choice(
        &self,
        now: Now,
        request: &Request<'_>,
        policy: &dyn Policy,
        decided: &Decided,
    ) -> Choice {
        let standing = &self.standings[decided.place];
        let mut held = Held::of(request);
        let cached_tokens = held.by(standing.worker);
        let home = held.as_home(standing.worker, policy);
        let counted = standing.counted(Moment::of(now), request, cached_tokens, home);
        let uncached_tokens = request.prompt_tokens - cached_tokens;
        let terms = standing.terms(Moment::of(now), request, cached_tokens);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
        let cached = cached_tokens as u32;
        Choice {
            incarnation: standing.incarnation,
            score: decided.score,
            candidates: decided.candidates,
            cached_tokens: cached,
            ttft: Duration::try_from_secs_f64(terms.ttft_ms / 1e3).unwrap_or(Duration::MAX),
            wait: policy.predicts().then(|| standing.queueing().wait()),
            feasible: terms.feasible(&request.targets),
            work: Work {
                uncached_tokens,
                pairs: attention_pairs(cached_tokens, uncached_tokens),
                context_tokens: request.prompt_tokens,
                makes_copy: !decided.silent && counted > cached_tokens,
            },
        }
    }
}

/// What workers hold of a prompt, asked in the order of their ids.
pub(crate) struct Held<'a> {
    hits: &'a [Hit],
    homes: &'a [WorkerId],
    /// What a home counts to hold.
    home_tokens: f64,
    /// The last token of a prompt is always computed.
    most: f64,
}

impl<'a> Held<'a> {
    pub(crate) fn of(request: &Request<'a>) -> Self {
        Self {
            hits: request.hits,
            homes: request.homes.map_or(&[], |homes| homes.workers),
            home_tokens: request.homes.map_or(0.0, |homes| homes.tokens.into()),
            most: (request.prompt_tokens - 1.0).max(0.0),
        }
    }

    #[inline]
    pub(crate) fn by(&mut self, worker: WorkerId) -> f64 {
        while let [first, rest @ ..] = self.hits {
            if first.worker > worker {
                break;
            }
            if first.worker == worker {
                return f64::from(first.tokens).min(self.most);
            }
            self.hits = rest;
        }
        0.0
    }

    /// What it is to hold as a home of the request's family, if the policy asks; zero: it is none.
    #[inline]
    pub(crate) fn as_home(&mut self, worker: WorkerId, policy: &dyn Policy) -> f64 {
        while let [first, rest @ ..] = self.homes {
            if *first > worker {
                break;
            }
            if *first == worker && policy.counts_homes() {
                return self.home_tokens.min(self.most);
            }
            self.homes = rest;
        }
        0.0
    }
}

/// The least score; within the policy's tolerance by the conversation, and else at random: a tie
/// broken by number would send everything to one worker.
pub(crate) fn best<'a>(
    ranked: &'a [Ranked],
    conversation: Option<u64>,
    policy: &dyn Policy,
    draws: &Draws,
    age: impl Fn(usize) -> Duration,
) -> Option<&'a Ranked> {
    let ties = Ties::of(ranked, conversation, policy, draws, age)?;
    let near = ranked.iter().filter(|one| ties.has(one));
    let near = near.map(|one| (one, ties.preference(one)));
    let preferred = near.min_by(|(_, one), (_, other)| one.compare(other));
    preferred.map(|(one, _)| one)
}

/// Those that are as good as the best, and in which order they are preferred.
pub(crate) struct Ties {
    least: Score,
    tolerance: f64,
    /// Whether the second field of a score counts.
    by_second: bool,
    key: u64,
}

impl Ties {
    pub(crate) fn of(
        ranked: &[Ranked],
        conversation: Option<u64>,
        policy: &dyn Policy,
        draws: &Draws,
        age: impl Fn(usize) -> Duration,
    ) -> Option<Self> {
        let least = ranked.iter().min_by(|one, other| compared(one, other))?;
        let tolerance = policy.tolerance(least.score, age(least.place));
        let conversation = conversation.filter(|_| tolerance > 0.0);
        Some(Self {
            least: least.score,
            tolerance,
            by_second: conversation.is_none(),
            key: conversation.unwrap_or(draws.ties),
        })
    }

    pub(crate) fn has(&self, one: &Ranked) -> bool {
        let close = one.score.tier == self.least.tier
            && one.score.first - self.least.first <= self.tolerance;
        one.score == self.least || (self.tolerance > 0.0 && close)
    }

    pub(crate) fn preference(&self, one: &Ranked) -> Preference {
        Preference {
            second: if self.by_second {
                one.score.second
            } else {
                0.0
            },
            hash: rendezvous(self.key, one.worker),
        }
    }
}

/// Where one stands among equals: less of `second` first, then more of `hash`.
#[derive(Clone, Copy)]
pub(crate) struct Preference {
    second: f64,
    hash: u64,
}

impl Preference {
    pub(crate) fn compare(&self, other: &Self) -> Ordering {
        let second = self.second.total_cmp(&other.second);
        second.then(other.hash.cmp(&self.hash))
    }
}

pub(crate) fn compared(one: &Ranked, other: &Ranked) -> Ordering {
    let order = one.score.partial_cmp(&other.score);
    order.unwrap_or(Ordering::Equal)
}
