//! The choice of a worker: the best by a pool's policy among those that may serve the request.

use std::time::Duration;

use forebay_proto::{Incarnation, Now, WorkerId};
use rand::Rng;

use crate::model::{Profile, Residuals};
use crate::policy::{Candidate, Field, Policy, Request, Score, rendezvous};
use crate::view::{View, Worker};

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
}

/// Why no worker was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoChoice {
    /// No worker in the facts serves this model.
    UnknownModel,
    /// There are workers, but none is reachable, open and not yet tried.
    NoCapacity,
    /// Each that could serve it is full.
    Busy,
}

/// A worker that may serve the request. Small, because every pick has one for every worker: what a
/// policy sees is made when it is asked, and once more for the one that is chosen.
struct Eligible<'a> {
    incarnation: Incarnation,
    worker: &'a Worker,
    score: Score,
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
        &self,
        now: Now,
        request: &Request<'_>,
        policy: &dyn Policy,
        rng: &mut impl Rng,
    ) -> Result<Choice, NoChoice> {
        let mut serving = self.serving(request.model).peekable();
        serving.peek().ok_or(NoChoice::UnknownModel)?;
        let (mut eligible, mut suspects) = (Vec::new(), Vec::new());
        let (mut full, mut in_flight) = (false, 0);
        for worker in serving {
            let open = worker.open() && !request.tried.contains(&worker.id());
            let Some(incarnation) = worker.incarnation().filter(|_| open) else {
                continue;
            };
            let one = Eligible {
                incarnation,
                worker,
                score: Score::default(),
            };
            if worker.suspect(now) {
                suspects.push(one);
            } else if worker.full() {
                full = true;
            } else {
                in_flight += u64::from(worker.queueing().present);
                eligible.push(one);
            }
        }
        let field = Field {
            candidates: eligible.len(),
            in_flight,
            draws: [rng.random(), rng.random()],
        };
        for (place, one) in eligible.iter_mut().enumerate() {
            let candidate = one.candidate(now, request, place);
            one.score = policy.score(request, &candidate, &field);
        }
        match best(now, &eligible, request, policy, rng) {
            Some(best) => Ok(best.choice(now, request, policy, eligible.len())),
            None if full => Err(NoChoice::Busy),
            None => two_choices(&suspects, rng)
                .map(|one| one.choice(now, request, policy, suspects.len()))
                .ok_or(NoChoice::NoCapacity),
        }
    }

    /// The shortest wait for a slot among workers that serve a model; `None`: none can be reached.
    #[must_use]
    pub fn least_wait(&self, model: &str) -> Option<Duration> {
        let serving = self.serving(model);
        let reachable = serving.filter(|worker| worker.open() && worker.incarnation().is_some());
        reachable.map(|worker| worker.queueing().wait()).min()
    }

    /// Whether any worker is there to serve the request, now or once it has room.
    #[must_use]
    pub fn has_capacity(&self, model: &str, tried: &[WorkerId]) -> bool {
        self.serving(model).any(|worker| {
            worker.open() && worker.incarnation().is_some() && !tried.contains(&worker.id())
        })
    }
}

impl Eligible<'_> {
    #[inline]
    fn candidate(&self, now: Now, request: &Request<'_>, place: usize) -> Candidate {
        let worker = self.incarnation.worker;
        let held = request.hits.binary_search_by_key(&worker, |hit| hit.worker);
        let held = held.map_or(0.0, |at| f64::from(request.hits[at].tokens));
        let load = self.worker.load.as_ref();
        Candidate {
            worker,
            place,
            // The last token of a prompt is always computed.
            cached_tokens: held.min(request.prompt_tokens - 1.0).max(0.0),
            backlog: self.worker.backlog(now),
            profile: load.and_then(|load| load.model).unwrap_or_default(),
            residuals: load.map_or_else(Residuals::default, |load| load.residuals),
            queueing: self.worker.queueing(),
            age: self.worker.age(now),
        }
    }

    fn choice(
        &self,
        now: Now,
        request: &Request<'_>,
        policy: &dyn Policy,
        candidates: usize,
    ) -> Choice {
        let Candidate {
            cached_tokens,
            backlog,
            profile,
            queueing,
            ..
        } = self.candidate(now, request, 0);
        let uncached_tokens = request.prompt_tokens - cached_tokens;
        let wait = queueing.wait();
        let ttft_ms = profile.ttft_ms(&backlog, cached_tokens, uncached_tokens);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
        let cached = cached_tokens as u32;
        let prefill = Duration::try_from_secs_f64(ttft_ms / 1e3).unwrap_or(Duration::MAX);
        Choice {
            incarnation: self.incarnation,
            score: self.score,
            candidates,
            cached_tokens: cached,
            ttft: wait.saturating_add(prefill),
            wait: policy.predicts().then_some(wait),
            work: Work {
                uncached_tokens,
                pairs: crate::model::attention_pairs(cached_tokens, uncached_tokens),
                context_tokens: request.prompt_tokens,
            },
        }
    }
}

/// The least score; within the policy's tolerance by the conversation, and else at random: a tie
/// broken by number would send everything to one worker.
fn best<'a, 'v>(
    now: Now,
    eligible: &'a [Eligible<'v>],
    request: &Request<'_>,
    policy: &dyn Policy,
    rng: &mut impl Rng,
) -> Option<&'a Eligible<'v>> {
    let compared = |one: &&Eligible<'_>, other: &&Eligible<'_>| {
        let (one, other) = (one.score, other.score);
        one.partial_cmp(&other).unwrap_or(std::cmp::Ordering::Equal)
    };
    let least = eligible.iter().min_by(compared)?;
    let tolerance = policy.tolerance(least.score, least.worker.age(now));
    let near = |one: &&Eligible<'_>| {
        let exactly = one.score == least.score;
        exactly || (tolerance > 0.0 && one.score.first - least.score.first <= tolerance)
    };
    let near = eligible.iter().filter(near);
    match request.conversation.filter(|_| tolerance > 0.0) {
        Some(conversation) => {
            near.max_by_key(|one| rendezvous(conversation, one.incarnation.worker))
        }
        None => near
            .map(|one| (one, rng.random::<u64>()))
            .min_by(|(one, draw), (other, other_draw)| {
                let second = one.score.second.total_cmp(&other.score.second);
                second.then(draw.cmp(other_draw))
            })
            .map(|(one, _)| one),
    }
}

/// Of two that are drawn the one with fewer own bookings: of silent workers nothing else is known.
fn two_choices<'a, 'v>(silent: &'a [Eligible<'v>], rng: &mut impl Rng) -> Option<&'a Eligible<'v>> {
    let mut draw = || silent.get(rng.random_range(0..silent.len().max(1)));
    let (one, other) = (draw()?, draw()?);
    let fewer = one.worker.own_bookings() <= other.worker.own_bookings();
    Some(if fewer { one } else { other })
}

impl Profile {
    /// Prompt tokens that are prefilled in a millisecond beside these decodes.
    #[must_use]
    pub fn drain_per_ms(&self, decodes: f64, context: f64) -> f64 {
        let budget = f64::from(self.chunk_tokens.max(1));
        let chunk = (budget - decodes).max(budget / 4.0);
        chunk / self.iteration_ms(chunk, decodes, context, 0.0).max(1e-6)
    }
}
