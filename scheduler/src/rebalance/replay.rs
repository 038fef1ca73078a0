//! One replay: every recorded request is placed anew by the rule, before workers that are models.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};

use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Family, Forecast, Incarnation, Millis, WorkerId};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::engine::{Engine, at};
use super::{Record, Recorded, Sum};
use crate::index::Hit;
use crate::model::Targets;
use crate::policy::{self, Request};
use crate::view::View;
use crate::worker::Known;

const MODEL: &str = "m";
/// Replays differ by the homes alone.
const SEED: u64 = 1;

/// What is the same in all replays of a plan.
pub(super) struct Stage {
    /// In the order of their arrival, with the times since the first.
    recorded: Vec<(f64, Recorded)>,
    engines: Vec<(Incarnation, crate::model::Profile)>,
    holders: BTreeMap<u64, BTreeSet<WorkerId>>,
    window: Millis,
    /// Records are of one conversation in so many: workers are that much slower, so that they are as busy.
    slower: f64,
}

/// What came of one replay.
pub(super) struct Played {
    pub(super) forecast: Forecast,
    /// What a family put on a worker, in milliseconds of work.
    pub(super) by_family: BTreeMap<(u64, WorkerId), f64>,
}

/// Where a conversation was last, and how much of it is there.
struct Talk {
    worker: WorkerId,
    /// As recorded.
    was_on: WorkerId,
    tokens: f64,
}

impl Stage {
    pub(super) fn new(
        records: &[Record],
        holders: &BTreeMap<u64, BTreeSet<WorkerId>>,
        window: Millis,
        most: usize,
    ) -> Self {
        let mut recorded: Vec<Recorded> = Vec::new();
        for record in records {
            let arrivals = record.arrivals.iter();
            recorded.extend(arrivals.map(|arrival| Recorded {
                arrival: *arrival,
                worker: record.worker,
                weight: f64::from(record.one_in.max(1)),
            }));
        }
        recorded.retain(|one| one.arrival.prompt_tokens > 0 && one.arrival.ms_ago <= window.0);
        recorded.sort_by_key(|one| (one.arrival.ms_ago, one.worker, one.arrival.conversation));
        recorded.truncate(most);
        let oldest = recorded.last().map_or(0, |one| one.arrival.ms_ago);
        let newest = recorded.first().map_or(0, |one| one.arrival.ms_ago);
        recorded.reverse();
        let weights: f64 = recorded.iter().map(|one| one.weight).sum();
        let slower = (weights / recorded.len().max(1) as f64).max(1.0);
        let timed = recorded.into_iter().map(|one| {
            let since = oldest - one.arrival.ms_ago;
            (since as f64, one)
        });
        let engines = records.iter().map(|record| {
            let incarnation = Incarnation {
                worker: record.worker,
                grant: 1,
                start: 1,
            };
            (incarnation, record.profile)
        });
        let mut engines: Vec<_> = engines.collect();
        engines.sort_by_key(|(incarnation, _)| incarnation.worker);
        engines.dedup_by_key(|(incarnation, _)| incarnation.worker);
        Self {
            recorded: timed.collect(),
            engines,
            holders: holders.clone(),
            // The stretch that is really covered.
            window: Millis((oldest - newest).max(1)),
            slower,
        }
    }

    pub(super) const fn len(&self) -> usize {
        self.recorded.len()
    }

    fn workers(&self) -> impl Iterator<Item = WorkerId> {
        self.engines
            .iter()
            .map(|(incarnation, _)| incarnation.worker)
    }

    /// What was recorded, without a replay: where requests were, and what was cached of them.
    pub(super) fn measured(&self) -> Forecast {
        let mut sum = Sum::of(self.workers());
        for (_, one) in &self.recorded {
            let Some((_, profile)) = self
                .engines
                .iter()
                .find(|(incarnation, _)| incarnation.worker == one.worker)
            else {
                continue;
            };
            let arrival = &one.arrival;
            let cached = f64::from(arrival.cached_tokens.min(arrival.prompt_tokens));
            let uncached = f64::from(arrival.prompt_tokens) - cached;
            let work_ms = profile.work_ms(cached, uncached, arrival.output_tokens.into());
            sum.add(one, one.worker, cached, work_ms);
        }
        Forecast {
            // The record does not say when first tokens came.
            in_time: 0,
            ..sum.forecast(self.window)
        }
    }

    /// Places every request anew, with these homes.
    pub(super) fn play(&self, families: &BTreeMap<u64, Family>) -> Played {
        let mut play = Play::new(self, families);
        let mut by_family: BTreeMap<(u64, WorkerId), f64> = BTreeMap::new();
        let mut sum = Sum::of(self.workers());
        for (since_ms, one) in &self.recorded {
            let Some(placed) = play.place(*since_ms, one) else {
                continue;
            };
            let Placed {
                worker,
                cached,
                ttft_ms,
                work_ms,
            } = placed;
            sum.add(one, worker, cached, work_ms);
            if one.arrival.ttft_target_ms > 0 {
                let target_ms = f64::from(one.arrival.ttft_target_ms) * self.slower;
                sum.promise(one, ttft_ms <= target_ms);
            }
            let family = by_family.entry((one.arrival.family, worker)).or_default();
            *family += one.weight * work_ms;
        }
        Played {
            forecast: sum.forecast(self.window),
            by_family,
        }
    }
}

struct Placed {
    worker: WorkerId,
    cached: f64,
    ttft_ms: f64,
    work_ms: f64,
}

/// A replay under way.
struct Play<'a> {
    stage: &'a Stage,
    families: &'a BTreeMap<u64, Family>,
    view: View,
    engines: Vec<Engine>,
    /// When engines change next, in microseconds, by their places: at most one for each change to come.
    due: BinaryHeap<Reverse<(u64, usize)>>,
    holders: BTreeMap<u64, BTreeSet<WorkerId>>,
    talks: HashMap<u64, Talk>,
    hits: Vec<Hit>,
    rng: StdRng,
    turn: u64,
}

impl<'a> Play<'a> {
    fn new(stage: &'a Stage, families: &'a BTreeMap<u64, Family>) -> Self {
        let mut view = View::default();
        view.set_known(
            stage
                .engines
                .iter()
                .map(|(incarnation, _)| known(*incarnation)),
        );
        let slow = |(incarnation, profile): &(Incarnation, crate::model::Profile)| {
            Engine::new(*incarnation, profile.at_speed(1.0 / stage.slower))
        };
        let mut engines: Vec<Engine> = stage.engines.iter().map(slow).collect();
        for engine in &mut engines {
            view.connected(at(0.0), engine.incarnation);
            view.report(at(0.0), engine.load(0.0));
        }
        Self {
            stage,
            families,
            view,
            engines,
            due: BinaryHeap::new(),
            holders: stage.holders.clone(),
            talks: HashMap::new(),
            hits: Vec::new(),
            rng: StdRng::seed_from_u64(SEED),
            turn: 0,
        }
    }

    fn place(&mut self, now_ms: f64, one: &Recorded) -> Option<Placed> {
        self.advance(now_ms);
        let arrival = &one.arrival;
        let prompt = f64::from(arrival.prompt_tokens);
        self.look_up(one);
        let true_hits = std::mem::take(&mut self.hits);
        let raised = self.raised(arrival.family, &true_hits);
        let key = self.conversation(arrival);
        let request = Request {
            prompt_tokens: prompt,
            targets: Targets {
                ttft_ms: match arrival.ttft_target_ms {
                    0 => f64::INFINITY,
                    ms => f64::from(ms) * self.stage.slower,
                },
                tpot_ms: f64::INFINITY,
            },
            hits: raised.as_ref().unwrap_or(&true_hits),
            conversation: Some(key),
            head: arrival.family,
            turn: self.turn,
            ..Request::of(MODEL)
        };
        self.turn += 1;
        let truly = |worker: WorkerId| {
            let held = true_hits.iter().find(|hit| hit.worker == worker);
            let held = held.map_or(0.0, |hit| f64::from(hit.tokens));
            held.min((prompt - 1.0).max(0.0))
        };
        let (policy, now) = (policy::default(), at(now_ms));
        let choice = self.view.pick(now, &request, policy, &mut self.rng);
        let mut worker = choice.ok()?.incarnation.worker;
        let place = |engines: &[Engine], worker: WorkerId| {
            engines.binary_search_by_key(&worker, |one| one.incarnation.worker)
        };
        let mut place_of = place(&self.engines, worker).ok()?;
        let late = |engine: &Engine| {
            let ttft_ms = engine.quote_ms(now_ms, truly(worker), prompt);
            ttft_ms > request.targets.ttft_ms
        };
        if raised.is_some() && late(&self.engines[place_of]) {
            // A copy is not made at the cost of what was promised.
            let request = Request {
                hits: &true_hits,
                ..request
            };
            let choice = self.view.pick(now, &request, policy, &mut self.rng);
            worker = choice.ok()?.incarnation.worker;
            place_of = place(&self.engines, worker).ok()?;
        }
        let cached = truly(worker);
        self.hits.clone_from(&true_hits);
        let engine = &mut self.engines[place_of];
        let output = f64::from(arrival.output_tokens);
        let ttft_ms = engine.take(now_ms, cached, prompt, output);
        // Of the worker as fast as it is.
        let work_ms = engine.profile.work_ms(cached, prompt - cached, output) / self.stage.slower;
        let load = engine.load(now_ms);
        self.view.report(at(now_ms), load);
        self.watch(place_of);
        self.remember(one, worker);
        Some(Placed {
            worker,
            cached,
            ttft_ms,
            work_ms,
        })
    }

    /// Engines do what they have to, and say so.
    fn advance(&mut self, now_ms: f64) {
        let now = micros(now_ms);
        while let Some(&Reverse((due, place))) = self.due.peek()
            && due <= now
        {
            self.due.pop();
            let engine = &mut self.engines[place];
            let at_ms = engine.next_ms();
            // It may have changed since this was noted, and was noted anew then.
            if micros(at_ms) == due {
                engine.advance(at_ms);
                let load = engine.load(at_ms);
                self.view.report(at(at_ms), load);
                self.watch(place);
            }
        }
    }

    /// Looks at an engine again when something of it changes.
    fn watch(&mut self, place: usize) {
        let next_ms = self.engines[place].next_ms();
        if next_ms.is_finite() {
            self.due.push(Reverse((micros(next_ms), place)));
        }
    }

    /// Who holds how much of a prompt.
    fn look_up(&mut self, one: &Recorded) {
        let arrival = &one.arrival;
        self.hits.clear();
        let own = self.own(one);
        let hit = |worker: WorkerId, tokens: u32| Hit {
            worker,
            chunks: 0,
            tokens,
        };
        let holders = self.holders.get(&arrival.family).into_iter().flatten();
        let holders = holders.map(|worker| hit(*worker, arrival.family_tokens));
        self.hits.extend(holders.filter(|hit| hit.tokens > 0));
        let Some((worker, tokens)) = own.filter(|(_, tokens)| *tokens > 0) else {
            return;
        };
        match self.hits.binary_search_by_key(&worker, |hit| hit.worker) {
            Ok(held) => self.hits[held].tokens = self.hits[held].tokens.max(tokens),
            Err(place) => self.hits.insert(place, hit(worker, tokens)),
        }
    }

    /// Where the conversation was, and what of the prompt is there.
    fn own(&self, one: &Recorded) -> Option<(WorkerId, u32)> {
        let arrival = &one.arrival;
        match self.talks.get(&arrival.conversation) {
            // As recorded, it stayed: it found what it found.
            Some(talk) if talk.was_on == one.worker => Some((talk.worker, arrival.cached_tokens)),
            Some(talk) => Some((talk.worker, super::whole(talk.tokens))),
            // It began before the record does.
            None if arrival.cached_tokens > arrival.family_tokens => {
                Some((one.worker, arrival.cached_tokens))
            }
            None => None,
        }
    }

    /// The hits with a home that has no copy yet counted as if it had one; none: there is no such home.
    fn raised(&self, family: u64, hits: &[Hit]) -> Option<Vec<Hit>> {
        let family = self.families.get(&family)?;
        let lacks = |home: &&WorkerId| {
            let held = hits.iter().find(|hit| hit.worker == **home);
            held.is_none_or(|hit| hit.tokens < family.tokens)
        };
        let lacking: Vec<WorkerId> = family.homes.iter().filter(lacks).copied().collect();
        if lacking.is_empty() {
            return None;
        }
        let mut raised: Vec<Hit> = hits.to_vec();
        raised.retain(|hit| !lacking.contains(&hit.worker));
        raised.extend(lacking.into_iter().map(|worker| Hit {
            worker,
            chunks: 0,
            tokens: family.tokens,
        }));
        raised.sort_unstable_by_key(|hit| hit.worker);
        Some(raised)
    }

    /// What near-ties go by: the conversation, where enough hold what comes before it.
    fn conversation(&self, arrival: &forebay_proto::wire::control::Arrival) -> u64 {
        let known = self.families.contains_key(&arrival.family);
        let holders = self.holders.get(&arrival.family).map_or(0, BTreeSet::len);
        if known || arrival.family == 0 || holders * 2 >= self.engines.len() {
            arrival.conversation
        } else {
            arrival.family
        }
    }

    fn remember(&mut self, one: &Recorded, worker: WorkerId) {
        let arrival = &one.arrival;
        if arrival.family != 0 {
            let holders = self.holders.entry(arrival.family).or_default();
            holders.insert(worker);
        }
        if arrival.conversation != 0 {
            let talk = Talk {
                worker,
                was_on: one.worker,
                tokens: arrival.prompt_tokens.into(),
            };
            self.talks.insert(arrival.conversation, talk);
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
const fn micros(ms: f64) -> u64 {
    (ms * 1e3) as u64
}

fn known(incarnation: Incarnation) -> Known {
    Known {
        name: format!("w{}", incarnation.worker.0),
        incarnation,
        spec: WorkerSpec {
            pool: "default".into(),
            advertise: String::new(),
            engine: String::new(),
            models: vec![MODEL.into()],
            revision: String::new(),
            gpu_type: String::new(),
            gpu_count: 1,
            kv_tokens: 0,
            max_context_tokens: 0,
            adapters: vec![],
            zone: String::new(),
            labels: BTreeMap::default(),
            slots: 1,
        },
        desired: Desired::Ready,
        departed: false,
    }
}
