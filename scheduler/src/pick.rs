//! The choice of a worker: the best by a pool's policy among those that may serve the request.

use std::time::Duration;

use forebay_proto::{Incarnation, Now, WorkerId};
use rand::Rng;

use crate::model::Profile;
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

struct Scored {
    incarnation: Incarnation,
    candidate: Candidate,
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
        let mut serving = self
            .workers()
            .filter(|(_, worker)| worker.known.serves(request.model))
            .peekable();
        serving.peek().ok_or(NoChoice::UnknownModel)?;
        let mut candidates = Vec::new();
        let mut suspects = Vec::new();
        let (mut full, mut in_flight) = (false, 0);
        for (id, worker) in serving {
            let open = worker.open() && !request.tried.contains(&id);
            let Some(incarnation) = worker.incarnation().filter(|_| open) else {
                continue;
            };
            if worker.suspect(now) {
                suspects.push((incarnation, worker));
                continue;
            }
            let place = candidates.len();
            let candidate = candidate(now, request, place, incarnation, worker);
            if worker.full() {
                full = true;
                continue;
            }
            in_flight += u64::from(candidate.queueing.present);
            candidates.push(Scored {
                incarnation,
                candidate,
                score: Score::default(),
            });
        }
        let field = Field {
            candidates: candidates.len(),
            in_flight,
            draws: [rng.random(), rng.random()],
        };
        for scored in &mut candidates {
            scored.score = policy.score(request, &scored.candidate, &field);
        }
        match best(&candidates, request, policy, rng) {
            Some(best) => Ok(best.choice(request, policy, field.candidates)),
            None if full => Err(NoChoice::Busy),
            None => two_choices(now, request, &suspects, rng).ok_or(NoChoice::NoCapacity),
        }
    }

    /// The shortest wait for a slot among workers that serve a model; `None`: none can be reached.
    #[must_use]
    pub fn least_wait(&self, model: &str) -> Option<Duration> {
        let reachable = self.workers().filter(|(_, worker)| {
            worker.known.serves(model) && worker.open() && worker.incarnation().is_some()
        });
        reachable.map(|(_, worker)| worker.queueing().wait()).min()
    }

    /// Whether any worker is there to serve the request, now or once it has room.
    #[must_use]
    pub fn has_capacity(&self, model: &str, tried: &[WorkerId]) -> bool {
        self.workers().any(|(id, worker)| {
            worker.known.serves(model)
                && worker.open()
                && worker.incarnation().is_some()
                && !tried.contains(&id)
        })
    }
}

impl Scored {
    fn choice(&self, request: &Request<'_>, policy: &dyn Policy, candidates: usize) -> Choice {
        let Candidate {
            cached_tokens,
            backlog,
            profile,
            queueing,
            ..
        } = &self.candidate;
        let uncached_tokens = request.prompt_tokens - cached_tokens;
        let wait = queueing.wait();
        let ttft_ms = profile.ttft_ms(backlog, *cached_tokens, uncached_tokens);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
        let cached = *cached_tokens as u32;
        Choice {
            incarnation: self.incarnation,
            score: self.score,
            candidates,
            cached_tokens: cached,
            ttft: wait + Duration::try_from_secs_f64(ttft_ms / 1e3).unwrap_or(Duration::MAX / 2),
            wait: policy.predicts().then_some(wait),
            work: Work {
                uncached_tokens,
                pairs: crate::model::attention_pairs(*cached_tokens, uncached_tokens),
                context_tokens: request.prompt_tokens,
            },
        }
    }
}

fn candidate(
    now: Now,
    request: &Request<'_>,
    place: usize,
    incarnation: Incarnation,
    worker: &Worker,
) -> Candidate {
    let hit = request
        .hits
        .binary_search_by_key(&incarnation.worker, |hit| hit.worker)
        .map_or(0.0, |at| f64::from(request.hits[at].tokens));
    Candidate {
        worker: incarnation.worker,
        place,
        // The last token of a prompt is always computed.
        cached_tokens: hit.min(request.prompt_tokens - 1.0).max(0.0),
        backlog: worker.backlog(now),
        profile: worker.load.and_then(|load| load.model).unwrap_or_default(),
        queueing: worker.queueing(),
        age: worker.age(now),
    }
}

/// The least score; within the policy's tolerance by the conversation, and else at random: a tie
/// broken by number would send everything to one worker.
fn best<'a>(
    candidates: &'a [Scored],
    request: &Request<'_>,
    policy: &dyn Policy,
    rng: &mut impl Rng,
) -> Option<&'a Scored> {
    let compared = |one: &&Scored, other: &&Scored| {
        let (one, other) = (one.score, other.score);
        one.partial_cmp(&other).unwrap_or(std::cmp::Ordering::Equal)
    };
    let least = candidates.iter().min_by(compared)?;
    let tolerance = policy.tolerance(least.score, least.candidate.age);
    let near = |scored: &&Scored| {
        let exactly = scored.score == least.score;
        exactly || (tolerance > 0.0 && scored.score.first - least.score.first <= tolerance)
    };
    let near = candidates.iter().filter(near);
    match request.conversation.filter(|_| tolerance > 0.0) {
        Some(conversation) => {
            near.max_by_key(|scored| rendezvous(conversation, scored.candidate.worker))
        }
        None => near
            .map(|scored| (scored, rng.random::<u64>()))
            .min_by(|(one, draw), (other, other_draw)| {
                let second = one.score.second.total_cmp(&other.score.second);
                second.then(draw.cmp(other_draw))
            })
            .map(|(scored, _)| scored),
    }
}

fn two_choices(
    now: Now,
    request: &Request<'_>,
    reachable: &[(Incarnation, &Worker)],
    rng: &mut impl Rng,
) -> Option<Choice> {
    let mut draw = || {
        let at = rng.random_range(0..reachable.len().max(1));
        let (incarnation, worker) = reachable.get(at)?;
        Some(Scored {
            incarnation: *incarnation,
            candidate: candidate(now, request, at, *incarnation, worker),
            score: Score {
                first: worker.queueing().present.into(),
                second: 0.0,
            },
        })
    };
    let (one, other) = (draw()?, draw()?);
    let chosen = if one.score <= other.score { one } else { other };
    Some(chosen.choice(request, crate::policy::default(), reachable.len()))
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
