//! One worker: the agent's real core before an engine that is a model.

use std::collections::HashMap;
use std::time::Duration;

use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Incarnation, Now, Revision, WorkerId};
use forebay_scheduler::Load;
use forebay_scheduler::model::{Profile, Targets, attention_pairs};
use forebay_worker_agent::core::{
    Core, Effect, End, Offer, PlacementId, Prompt, Question, Quote, Settings, Unstarted, Usage,
};

use super::MODEL;
use super::arrivals::Job;
use crate::model::{self, Arrival, Counts, Engine};

/// Requests that an agent holds at once. Far above what occurs: nothing is refused for room here.
const QUEUE_LIMIT: u32 = 1 << 20;
const NO_DEADLINE: Duration = Duration::from_secs(24 * 3_600);

/// What a worker is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Make {
    /// How fast its engine is.
    pub(super) engine: Profile,
    /// How fast its agent takes it to be.
    pub(super) believed: Profile,
    pub(super) kv_tokens: u64,
    pub(super) block_tokens: u32,
    pub(super) max_seqs: u32,
    /// The engine's own order instead of the agent's: whatever comes is given to it at once.
    pub(super) fcfs: bool,
}

/// What a worker says of a request.
pub(super) enum Said {
    First {
        job: u32,
        at: Now,
    },
    Over {
        job: u32,
        at: Now,
        why: Why,
        seq: u64,
        load: Box<Load>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    Complete,
    /// It never ran; it may go elsewhere.
    Unstarted,
}

struct Carried {
    job: u32,
    cached_tokens: u32,
}

pub(super) struct Worker {
    pub(super) core: Core,
    engine: Engine,
    make: Make,
    incarnation: Incarnation,
    carried: HashMap<PlacementId, Carried>,
    /// By the engine's number of a request, which is the job's.
    given: HashMap<u64, PlacementId>,
    events: Vec<model::Event>,
    /// What engines before a crash had done.
    before: Counts,
    /// The wake that counts; others are old.
    pub(super) wake: Option<Now>,
    pub(super) alive: bool,
    /// Places that are kept for those who asked.
    kept: Vec<Kept>,
}

struct Kept {
    job: u32,
    until: Now,
    tokens: f64,
    pairs: f64,
}

impl Worker {
    pub(super) fn new(id: u32, make: Make, now: Now) -> Self {
        let incarnation = Incarnation {
            worker: WorkerId(id),
            grant: 1,
            start: 1,
        };
        Self {
            core: core(make, incarnation, now),
            engine: engine(make),
            make,
            incarnation,
            carried: HashMap::new(),
            given: HashMap::new(),
            events: Vec::new(),
            before: Counts::default(),
            wake: None,
            alive: true,
            kept: Vec::new(),
        }
    }

    pub(super) const fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// All that its engines have done.
    pub(super) fn counts(&self) -> Counts {
        let (before, now) = (self.before, self.engine.counts());
        Counts {
            prompt_tokens: before.prompt_tokens + now.prompt_tokens,
            cached_tokens: before.cached_tokens + now.cached_tokens,
            prefilled_tokens: before.prefilled_tokens + now.prefilled_tokens,
            recomputed_tokens: before.recomputed_tokens + now.recomputed_tokens,
            output_tokens: before.output_tokens + now.output_tokens,
            preemptions: before.preemptions + now.preemptions,
            iterations: before.iterations + now.iterations,
            busy_ms: before.busy_ms + now.busy_ms,
        }
    }

    /// The process dies, and its engine's cache with it. Returns what it carried.
    pub(super) fn crash(&mut self) -> Vec<u32> {
        self.alive = false;
        self.wake = None;
        self.before = self.counts();
        self.engine = engine(self.make);
        self.given.clear();
        let mut jobs: Vec<u32> = self
            .carried
            .drain()
            .map(|(_, carried)| carried.job)
            .collect();
        jobs.sort_unstable();
        jobs
    }

    /// It starts again, cold.
    pub(super) fn restart(&mut self, now: Now) {
        self.incarnation.start += 1;
        self.core = core(self.make, self.incarnation, now);
        self.alive = true;
    }

    /// Its engine is so much slower or faster from here on; nobody is told.
    pub(super) fn set_speed(&mut self, speed: f64) {
        self.engine.set_profile(self.make.engine.at_speed(speed));
    }

    /// What a job would meet here, and how much of its prompt is here. With `keep`, those who ask within
    /// that time see it as taken.
    pub(super) fn quote(
        &mut self,
        now: Now,
        number: u32,
        job: &Job,
        keep: Option<Duration>,
    ) -> Quote {
        let question = Question {
            chunks: job.blocks.clone(),
            prompt_tokens: job.prompt_tokens,
        };
        let mut quote = self.core.quote(now, &question);
        self.kept.retain(|kept| kept.until > now);
        for kept in &self.kept {
            quote.load.backlog.pending_tokens += kept.tokens;
            quote.load.backlog.pending_pairs += kept.pairs;
        }
        if let Some(keep) = keep {
            let cached = f64::from(quote.cached_tokens);
            let tokens = f64::from(job.prompt_tokens) - cached;
            self.kept.push(Kept {
                job: number,
                until: now + keep,
                tokens,
                pairs: attention_pairs(cached, tokens),
            });
        }
        quote
    }

    /// A balancer offers a job. Call [`Worker::advance`] up to `now` before, and after it.
    pub(super) fn offer(
        &mut self,
        now: Now,
        number: u32,
        job: &Job,
        offer: &Offer,
    ) -> Result<(u64, Box<Load>), Box<Load>> {
        self.kept.retain(|kept| kept.job != number);
        let admitted = self.core.place(now, offer);
        let admitted = admitted.map_err(|refused| Box::new(refused.load))?;
        let carried = Carried {
            job: number,
            cached_tokens: 0,
        };
        self.carried.insert(admitted.id, carried);
        if admitted.starts {
            self.start(now, admitted.id, job);
        }
        Ok((admitted.report_seq, Box::new(admitted.load)))
    }

    fn start(&mut self, now: Now, id: PlacementId, job: &Job) {
        let Some(carried) = self.carried.get(&id) else {
            return;
        };
        let number = u64::from(carried.job);
        self.given.insert(number, id);
        let arrival = Arrival {
            id: number,
            prompt_tokens: job.prompt_tokens,
            blocks: job.blocks.clone(),
            output_tokens: job.output_tokens,
        };
        let taken = self.engine.arrive(now, arrival);
        assert!(taken, "a job larger than a worker's cache is not offered");
    }

    /// Lets time pass up to `now`; what the worker says meanwhile is added to `said`.
    pub(super) fn advance(&mut self, now: Now, jobs: &[Job], said: &mut Vec<Said>) {
        loop {
            self.engine.advance(now, &mut self.events);
            let events = std::mem::take(&mut self.events);
            for event in &events {
                self.hear(event, jobs, said);
            }
            self.events = events;
            self.events.clear();
            self.core.expire(now);
            let mut started = false;
            while let Some(effect) = self.core.poll_effect() {
                started |= self.carry_out(now, effect, jobs, said);
            }
            if !started {
                return;
            }
        }
    }

    fn carry_out(&mut self, now: Now, effect: Effect, jobs: &[Job], said: &mut Vec<Said>) -> bool {
        match effect {
            Effect::Start(id) => {
                let job = self.carried.get(&id).map(|carried| carried.job);
                if let Some(job) = job {
                    self.start(now, id, &jobs[job as usize]);
                }
                true
            }
            Effect::Over(id, why, ending) => {
                if let Some(Carried { job, .. }) = self.carried.remove(&id) {
                    assert_ne!(why, Unstarted::Deadline, "no job has a deadline");
                    said.push(Said::Over {
                        job,
                        at: now,
                        why: Why::Unstarted,
                        seq: ending.report_seq,
                        load: Box::new(ending.load),
                    });
                }
                false
            }
        }
    }

    fn hear(&mut self, event: &model::Event, jobs: &[Job], said: &mut Vec<Said>) {
        match *event {
            model::Event::First {
                id,
                at,
                cached_tokens,
            } => {
                let placement = self.given[&id];
                self.core.first_byte(at, placement);
                if let Some(carried) = self.carried.get_mut(&placement) {
                    carried.cached_tokens = cached_tokens;
                    said.push(Said::First {
                        job: carried.job,
                        at,
                    });
                }
            }
            model::Event::Token { .. } => {}
            model::Event::Finished { id, at } => {
                let Some(placement) = self.given.remove(&id) else {
                    return;
                };
                let Some(carried) = self.carried.remove(&placement) else {
                    return;
                };
                let job = &jobs[carried.job as usize];
                let usage = Usage {
                    prompt_tokens: Some(job.prompt_tokens),
                    cached_tokens: Some(carried.cached_tokens),
                    completion_tokens: Some(job.output_tokens),
                };
                self.core.usage(placement, usage);
                if let Some(ending) = self.core.end(at, placement, End::Complete) {
                    said.push(Said::Over {
                        job: carried.job,
                        at,
                        why: Why::Complete,
                        seq: ending.report_seq,
                        load: Box::new(ending.load),
                    });
                }
            }
        }
    }

    /// When [`Worker::advance`] is due next.
    pub(super) fn next_deadline(&self) -> Option<Now> {
        let engine = self.engine.next_deadline();
        let queue = self.core.next_deadline().filter(|_| self.core.queued() > 0);
        engine.into_iter().chain(queue).min()
    }
}

/// The offer of a job, but for what the choice says.
pub(super) fn offer(job: &Job, block_tokens: u32, incarnation: Incarnation) -> Offer {
    Offer {
        request_id: String::new(),
        incarnation,
        model: MODEL.to_owned(),
        path: String::new(),
        body_bytes: 0,
        deadline: NO_DEADLINE,
        expected_ttft: None,
        targets: Targets::NONE,
        must_queue: false,
        prompt: Prompt {
            chunks: job.blocks.clone(),
            bytes: u64::from(job.prompt_tokens) * BYTES_PER_TOKEN,
            chunk_bytes: block_tokens * BYTES_PER_TOKEN as u32,
            tokens: job.prompt_tokens,
        },
        max_tokens: 0,
        stream: true,
        cache_salt: None,
        zone: None,
        key_epoch: 0,
        shadow: false,
        named: None,
        tenant: String::new(),
    }
}

const BYTES_PER_TOKEN: u64 = 4;

fn core(make: Make, incarnation: Incarnation, now: Now) -> Core {
    let settings = Settings {
        slots: if make.fcfs {
            QUEUE_LIMIT
        } else {
            make.max_seqs
        },
        queue_limit: QUEUE_LIMIT,
        body_budget_bytes: u64::MAX,
        kv_tokens: make.kv_tokens,
        profile: Some(make.believed),
        at_once: make.fcfs,
    };
    let mut core = Core::new(settings, incarnation, u64::from(incarnation.start));
    core.facts(now, Desired::Ready, Revision(1));
    core.engine_up(&[MODEL.to_owned()]);
    core
}

fn engine(make: Make) -> Engine {
    Engine::new(model::Settings {
        profile: make.engine,
        kv_tokens: make.kv_tokens,
        block_tokens: make.block_tokens,
        max_seqs: make.max_seqs as usize,
        queue: QUEUE_LIMIT as usize,
    })
}
