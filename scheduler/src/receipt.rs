//! What one decision followed from, so that it can be explained, and made again offline.
//!
//! A receipt holds the inputs of every worker that was scored, not only the results, and
//! [`Receipt::replay`] predicts, scores and breaks ties anew. Of a fleet that a bound narrowed down it
//! keeps the best [`MOST_CONSIDERED`]; the others are counted. No text of the prompt is in it.

mod pack;

use forebay_proto::{Incarnation, Now, Revision, WorkerId};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::model::Targets;
use crate::pick::{self, Choice, Decided, Draws, NoChoice, Ranked, Ties, best, compared};
use crate::policy::{self, Candidate, Policy, Request, Score};
use crate::standing::{Access, Moment};
use crate::view::View;

pub use pack::Packed;

/// Workers in the receipt of a decision that was narrowed down: half of them the best by score, half
/// those that a tie would prefer.
pub const MOST_CONSIDERED: usize = 16;

/// One decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// The policy's name.
    pub policy: String,
    /// What the balancer knew.
    pub versions: Versions,
    /// What was asked for.
    pub asked: Asked,
    /// All luck that was in it.
    pub draws: Draws,
    /// How many may serve.
    pub eligible: usize,
    /// Requests that they have together, where the policy looked at all of them.
    pub in_flight: u64,
    /// How many were not scored, and why.
    pub filtered: Filtered,
    /// Those that were scored and kept; in their order among the eligible.
    pub considered: Vec<Considered>,
    /// Where all were silent: the two that were drawn, with own bookings.
    pub drawn: Vec<(Incarnation, usize)>,
    /// What came out.
    pub outcome: Outcome,
}

/// Versions of what a decision was made from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// Of the facts.
    pub facts_revision: Revision,
    /// Of the prefix index.
    pub index_version: u64,
}

/// A request, without what workers hold of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// Which model, or adapter.
    pub model: String,
    /// Length of the prompt.
    pub prompt_tokens: f64,
    /// How much longer it may be, at the 0.95 quantile.
    #[serde(default)]
    pub longer_tokens: f64,
    /// Promised time to first token; none: nothing was promised.
    pub ttft_ms: Option<f64>,
    /// Promised time from token to token.
    pub tpot_ms: Option<f64>,
    /// Names its conversation.
    pub conversation: Option<u64>,
    /// Keyed hash of its beginning.
    pub head: u64,
    /// Counts decisions for the model.
    pub turn: u64,
    /// Workers that were not to be asked again.
    pub tried: Vec<WorkerId>,
    /// Workers that ran what may kill their engine, as this one may.
    #[serde(default)]
    pub apart: Vec<WorkerId>,
    /// The zone that it had to stay in.
    #[serde(default)]
    pub zone: Option<String>,
    /// Its family, if that has homes.
    #[serde(default)]
    pub family: Option<u64>,
}

/// Workers that serve the model and were not scored, each counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filtered {
    /// No link stands to a start that may serve.
    pub unreachable: usize,
    /// Cordoned, draining, joining, or the engine is down.
    pub closed: usize,
    /// Already tried.
    pub tried: usize,
    /// They ran what may kill their engine, as this one may.
    #[serde(default)]
    pub apart: usize,
    /// Their context is shorter than the prompt.
    #[serde(default)]
    pub short: usize,
    /// Not heard for too long.
    pub suspect: usize,
    /// Slots and queue are taken.
    pub full: usize,
    /// Eligible, and by the bound dearer than what was chosen.
    pub dearer: usize,
    /// Scored, and not kept.
    pub not_kept: usize,
}

/// One worker that was scored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Considered {
    /// Which start of it.
    pub incarnation: Incarnation,
    /// What the policy saw, predictions included.
    pub candidate: Candidate,
    /// What it made of that.
    pub score: Score,
    /// Whether promises would be kept.
    pub feasible: bool,
}

/// What came out of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// This start was chosen.
    Chosen(Incarnation),
    /// None was.
    Nobody(NoChoice),
}

impl View {
    /// Picks as [`Self::pick`] does, by the same draws, and says why.
    pub fn explain(
        &mut self,
        now: Now,
        request: &Request<'_>,
        policy: &dyn Policy,
        rng: &mut impl Rng,
        versions: Versions,
    ) -> (Result<Choice, NoChoice>, Receipt) {
        let (now, draws) = (self.tell(now), Draws::of(rng));
        let decided = self.decide(now, request, policy, &draws);
        let field = decided.map_or_else(|_| pick::Field::default(), |(_, field)| field);
        let choice = decided.map(|(decided, _)| self.choice(now, request, policy, &decided));
        let decided = decided.ok().map(|(decided, _)| decided);
        let considered = if decided.is_some_and(|decided| !decided.silent) {
            self.considered(now, request, policy, &draws)
        } else {
            Vec::new()
        };
        let mut filtered = self.filtered(now, request);
        let scored = if decided.is_some() {
            self.scratch.ranked.len()
        } else {
            0
        };
        filtered.dearer = field.candidates.saturating_sub(scored);
        filtered.not_kept = scored.saturating_sub(considered.len());
        let receipt = Receipt {
            policy: policy.name().into(),
            versions,
            asked: Asked::of(request),
            draws,
            eligible: field.candidates,
            in_flight: field.in_flight,
            filtered,
            considered,
            drawn: self.drawn(decided.as_ref()),
            outcome: match &choice {
                Ok(choice) => Outcome::Chosen(choice.incarnation),
                Err(none) => Outcome::Nobody(*none),
            },
        };
        (choice, receipt)
    }

    /// Those that were scored. Where the policy compares candidates all are kept, else the best.
    fn considered(
        &self,
        now: Now,
        request: &Request<'_>,
        policy: &dyn Policy,
        draws: &Draws,
    ) -> Vec<Considered> {
        let scored = &self.scratch.ranked;
        let kept = if policy.rule().is_some() {
            let age = |place: usize| self.standings[place].age(now);
            let ties = Ties::of(scored, request.conversation, policy, draws, age);
            ties.map_or_else(Vec::new, |ties| most_telling(scored, &ties))
        } else {
            scored.clone()
        };
        let mut held = pick::Held::of(request);
        let considered = kept.iter().enumerate().map(|(at, one)| {
            let standing = &self.standings[one.place];
            let moment = Moment::of(now);
            let cached = held.by(one.worker);
            let home = held.as_home(one.worker, policy);
            let counted = standing.counted(moment, request, cached, home);
            let candidate = standing.candidate(moment, request, (cached, counted), at);
            Considered {
                incarnation: standing.incarnation,
                feasible: candidate.terms.feasible(&request.targets),
                candidate,
                score: one.score,
            }
        });
        considered.collect()
    }

    fn drawn(&self, decided: Option<&Decided>) -> Vec<(Incarnation, usize)> {
        let places = decided.filter(|decided| decided.silent);
        let places = places.map_or(&[][..], |_| &self.scratch.places);
        let drawn = places.iter().map(|place| &self.standings[*place]);
        drawn
            .map(|standing| (standing.incarnation, standing.own_bookings))
            .collect()
    }

    fn filtered(&self, now: Now, request: &Request<'_>) -> Filtered {
        let (mut filtered, moment) = (Filtered::default(), Moment::of(now));
        let context_tokens = self.context_tokens(request);
        for place in self.serving(request) {
            let standing = &self.standings[*place];
            match standing.access {
                Access::Unreachable => filtered.unreachable += 1,
                Access::Closed => filtered.closed += 1,
                Access::Open | Access::Full if context_tokens > standing.longest => {
                    filtered.short += 1;
                }
                Access::Open | Access::Full if request.apart.contains(&standing.worker) => {
                    filtered.apart += 1;
                }
                Access::Open | Access::Full if request.excludes(standing.worker) => {
                    filtered.tried += 1;
                }
                Access::Open | Access::Full if standing.suspect(moment) => filtered.suspect += 1,
                Access::Full => filtered.full += 1,
                Access::Open => {}
            }
        }
        filtered
    }
}

/// The best by score and those that a tie would prefer, in their order.
fn most_telling(scored: &[Ranked], ties: &Ties) -> Vec<Ranked> {
    let mut by_score = scored.to_vec();
    by_score.sort_by(compared);
    by_score.truncate(MOST_CONSIDERED / 2);
    let mut near: Vec<Ranked> = scored.iter().copied().filter(|one| ties.has(one)).collect();
    near.sort_by(|one, other| ties.preference(one).compare(&ties.preference(other)));
    near.truncate(MOST_CONSIDERED / 2);
    near.append(&mut by_score);
    near.sort_by_key(|one| one.worker);
    near.dedup_by_key(|one| one.worker);
    near
}

impl Receipt {
    /// Makes the decision again from what is written here; `None`: this version has no such policy.
    #[must_use]
    pub fn replay(&self) -> Option<Outcome> {
        let policy = policy::named(&self.policy)?;
        if let Outcome::Nobody(_) = self.outcome {
            return Some(Outcome::Nobody(self.nobody()));
        }
        let silent = self.drawn.iter().min_by_key(|(_, bookings)| *bookings);
        if let Some((fewer, _)) = silent {
            return Some(Outcome::Chosen(*fewer));
        }
        let asked = &self.asked;
        let request = asked.request();
        let mut candidates: Vec<_> = self.considered.iter().map(|one| one.candidate).collect();
        for candidate in &mut candidates {
            candidate.predict(&request);
        }
        let mut scores = Vec::new();
        policy.scores(&request, &candidates, &self.field(), &mut scores);
        let both = candidates.iter().zip(scores).enumerate();
        let ranked = both.map(|(place, (candidate, score))| Ranked {
            place,
            worker: candidate.worker,
            score,
        });
        let ranked: Vec<_> = ranked.collect();
        let age = |place: usize| candidates[place].age;
        let best = best(&ranked, asked.conversation, policy, &self.draws, age);
        Some(match best {
            Some(best) => Outcome::Chosen(self.considered[best.place].incarnation),
            None => Outcome::Nobody(self.nobody()),
        })
    }

    fn field(&self) -> policy::Field {
        policy::Field {
            candidates: self.eligible,
            in_flight: self.in_flight,
            draws: self.draws.policy,
        }
    }

    fn nobody(&self) -> NoChoice {
        let filtered = &self.filtered;
        let mut there = filtered.unreachable + filtered.closed + filtered.tried + filtered.suspect;
        there += filtered.short + filtered.apart + usize::from(self.asked.zone.is_some());
        match (filtered.full, there) {
            (0, 0) => NoChoice::UnknownModel,
            (0, _) => NoChoice::NoCapacity,
            _ => NoChoice::Busy,
        }
    }
}

impl Asked {
    fn of(request: &Request<'_>) -> Self {
        let promised = |ms: f64| ms.is_finite().then_some(ms);
        Self {
            model: request.model.into(),
            prompt_tokens: request.prompt_tokens,
            longer_tokens: request.longer_tokens,
            ttft_ms: promised(request.targets.ttft_ms),
            tpot_ms: promised(request.targets.tpot_ms),
            conversation: request.conversation,
            head: request.head,
            turn: request.turn,
            tried: request.tried.to_vec(),
            apart: request.apart.to_vec(),
            zone: request.zone.map(str::to_owned),
            family: request.homes.map(|homes| homes.chunk),
        }
    }

    fn request(&self) -> Request<'_> {
        Request {
            model: &self.model,
            tried: &self.tried,
            apart: &self.apart,
            zone: self.zone.as_deref(),
            only: &[],
            prompt_tokens: self.prompt_tokens,
            longer_tokens: self.longer_tokens,
            targets: Targets {
                ttft_ms: self.ttft_ms.unwrap_or(f64::INFINITY),
                tpot_ms: self.tpot_ms.unwrap_or(f64::INFINITY),
            },
            hits: &[],
            // Whom it counts as a home, each candidate says.
            homes: None,
            conversation: self.conversation,
            head: self.head,
            turn: self.turn,
        }
    }
}
