//! The world of one run: arrivals, messages that take their time, workers, and what goes wrong.

mod agenda;
mod faults;
mod jobs;
mod reports;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::time::Duration;

use forebay_proto::Now;
use forebay_scheduler::BookingId;
use forebay_worker_agent::core::Cadence;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::arrivals::{Workload, mix};
use super::balancer::{Answer, Balancer, delay};
use super::homes::{self, Homes};
use super::measure::{Life, Outcome, Served, Told};
use super::worker::{Make, Said, Why, Worker};
use super::{Order, Reports, Setup};
use agenda::{Due, Event};

/// Until a balancer notices that a worker's process is gone.
const NOTICED: Duration = Duration::from_millis(5);
/// How long a worker that was asked keeps a place.
const KEEP: Duration = Duration::from_millis(10);
/// Refusals after which a worker has to queue the job.
const MAX_REFUSALS: u8 = 2;

/// Where a job is.
#[derive(Clone, Copy, Default)]
struct Place {
    worker: u32,
    booking: Option<BookingId>,
    refusals: u8,
    /// Counts its questions.
    question: u32,
}

/// A question that is not answered by all.
struct Open {
    left: usize,
    answers: Vec<Answer>,
}

/// What a balancer is told by a worker's reports, where they follow change.
#[derive(Clone, Copy, Default)]
struct Pair {
    cadence: Cadence,
    due: Option<Now>,
}

struct World<'a> {
    setup: &'a Setup,
    load: &'a Workload,
    now: Now,
    events: BinaryHeap<Reverse<Due>>,
    order: u64,
    workers: Vec<Worker>,
    balancers: Vec<Balancer>,
    /// Jobs of each balancer that no worker can take now.
    waiting: Vec<VecDeque<u32>>,
    places: Vec<Place>,
    lives: Vec<Life>,
    /// Jobs that are not over.
    left: usize,
    refusals: u64,
    /// Questions that were sent.
    asked: u64,
    open: HashMap<u32, Open>,
    /// By worker, then balancer.
    pairs: Vec<Vec<Pair>>,
    /// Placements that a worker took since a balancer heard of it last: by worker, then balancer.
    unseen: Vec<Vec<u32>>,
    /// Of these, those at the worker that a balancer placed on, in all.
    missed: u64,
    placed: u64,
    homes: Homes,
    copies: u64,
    rng: StdRng,
    said: Vec<Said>,
}

/// Runs a whole trace once.
#[must_use]
pub fn run(load: &Workload, setup: &Setup, rate: f64, seed: u64) -> Outcome {
    run_in_detail(load, setup, rate, seed).0
}

/// Runs a whole trace once, and says what became of each of its requests, in the trace's order.
#[must_use]
pub fn run_in_detail(
    load: &Workload,
    setup: &Setup,
    rate: f64,
    seed: u64,
) -> (Outcome, Vec<Served>) {
    let mut world = World::new(load, setup, seed);
    for (at, job) in load.arrivals(rate, setup.spread, seed) {
        let arrived = Now::at(at);
        world.lives[job as usize].arrived = arrived;
        if fits(setup, &load.jobs[job as usize]) {
            world.push(arrived, Event::Arrive(job));
        } else {
            // No worker could ever hold it.
            world.left -= 1;
        }
    }
    for (number, fault) in setup.faults.iter().enumerate() {
        world.push(Now::at(fault.at), Event::Fault(number));
    }
    if setup.homes {
        world.push(Now::default() + homes::EVERY, Event::Homes);
    }
    while world.left > 0
        && let Some(Reverse(Due(at, _, event))) = world.events.pop()
    {
        world.now = at;
        world.happen(event);
    }
    let counts: Vec<_> = world.workers.iter().map(Worker::counts).collect();
    let told = Told {
        refusals: world.refusals,
        questions: world.asked,
        unseen: world.missed as f64 / world.placed.max(1) as f64,
        families: world.homes.len(),
        copies: world.copies,
    };
    let outcome = Outcome::new(setup, load, &world.lives, &counts, told);
    (outcome, world.served())
}

fn fits(setup: &Setup, job: &super::arrivals::Job) -> bool {
    u64::from(job.prompt_tokens) + u64::from(job.output_tokens) <= setup.kv_tokens
}

impl<'a> World<'a> {
    fn new(load: &'a Workload, setup: &'a Setup, seed: u64) -> Self {
        let now = Now::default();
        let mut rng = StdRng::seed_from_u64(mix(seed ^ 0xF1EE7));
        let mut workers = Vec::new();
        for number in 0..setup.workers {
            let spread = setup.speed_spread;
            let speed = 1.0
                + if spread > 0.0 {
                    rng.random_range(-spread..spread)
                } else {
                    0.0
                };
            let make = Make {
                engine: setup.profile.at_speed(speed),
                believed: setup.profile,
                kv_tokens: setup.kv_tokens,
                block_tokens: load.block_tokens,
                max_seqs: setup.max_seqs,
                fcfs: setup.order == Order::Fcfs,
            };
            workers.push(Worker::new(number, make, now));
        }
        let balancers: Vec<Balancer> = (0..u64::from(setup.balancers))
            .map(|number| {
                let seed = mix(seed ^ mix(number + 1));
                Balancer::new(&workers, now, seed, setup)
            })
            .collect();
        let mut world = Self {
            setup,
            load,
            now,
            events: BinaryHeap::new(),
            order: 0,
            waiting: vec![VecDeque::new(); balancers.len()],
            workers,
            balancers,
            places: vec![Place::default(); load.len()],
            lives: vec![Life::default(); load.len()],
            left: load.len(),
            refusals: 0,
            asked: 0,
            open: HashMap::new(),
            pairs: vec![vec![Pair::default(); setup.balancers.into()]; setup.workers as usize],
            unseen: vec![vec![0; setup.balancers.into()]; setup.workers as usize],
            missed: 0,
            placed: 0,
            homes: Homes::default(),
            copies: 0,
            rng,
            said: Vec::new(),
        };
        for balancer in 0..setup.balancers {
            for worker in 0..setup.workers {
                let phase = match setup.reports {
                    Reports::Fresh => continue,
                    Reports::Every(interval) => interval.mul_f64(world.rng.random()),
                    Reports::Deployed => Duration::from_millis(250).mul_f64(world.rng.random()),
                };
                let due = Event::ReportDue(balancer, worker);
                world.pairs[worker as usize][usize::from(balancer)].due = Some(now + phase);
                world.push(now + phase, due);
            }
        }
        world
    }

    fn served(&self) -> Vec<Served> {
        let jobs = self.load.jobs.iter().zip(&self.lives).zip(&self.places);
        let served = jobs.map(|((job, life), place)| {
            let ms = |first: Now| first.since(life.arrived).as_secs_f64() * 1e3;
            let ttft_ms = life.first.map(ms);
            let target = self.setup.slo.ttft_ms(job.prompt_tokens);
            Served {
                arrived: life.arrived.since(Now::default()),
                prompt_tokens: job.prompt_tokens,
                worker: place.worker,
                ttft_ms,
                in_time: ttft_ms.is_some_and(|ms| ms <= target),
            }
        });
        served.collect()
    }

    fn push(&mut self, at: Now, event: Event) {
        self.order += 1;
        self.events.push(Reverse(Due(at, self.order, event)));
    }

    /// Sends a message.
    fn send(&mut self, event: Event) {
        let arrives = self.now + delay(&mut self.rng);
        self.push(arrives, event);
    }

    fn balancer_of(&self, job: u32) -> usize {
        (mix(u64::from(job)) % u64::from(self.setup.balancers)) as usize
    }

    fn holds(&self, job: u32, booking: BookingId) -> bool {
        self.places[job as usize].booking == Some(booking)
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive(job) => self.begin(job),
            Event::Asked(job, question, worker) => self.asked(job, question, worker),
            Event::Answered(job, question, answer, load) => {
                self.answered(job, question, answer, *load);
            }
            Event::Decide(job, question) => self.decide(job, question),
            Event::Offer(job, booking, offer) => self.offered(job, booking, &offer),
            Event::Taken(job, booking, seq, load) => {
                let balancer = self.balancer_of(job);
                let now = self.now;
                self.balancers[balancer].accepted(booking, seq);
                self.balancers[balancer].told(now, *load);
            }
            Event::Refused(job, booking, load) => self.refused(job, booking, load),
            Event::Over(job, booking, why, seq, load) => self.over(job, booking, why, seq, *load),
            Event::Lost(job, booking) => {
                let balancer = self.balancer_of(job);
                self.balancers[balancer].released(booking, None);
                if !self.holds(job, booking) {
                    return;
                }
                self.places[job as usize].booking = None;
                if self.lives[job as usize].first.is_some() {
                    // Its stream broke.
                    self.left -= 1;
                } else {
                    self.begin(job);
                }
            }
            Event::Report(balancer, message) => {
                let (load, news) = *message;
                let now = self.now;
                self.balancers[usize::from(balancer)].hear(now, load, news);
                self.let_in(usize::from(balancer));
            }
            Event::ReportDue(balancer, worker) => self.report(balancer, worker),
            Event::Wake(worker) => {
                if self.workers[worker as usize].wake == Some(self.now) {
                    self.advance(worker);
                }
            }
            Event::Homes => {
                let table = self.homes.assign(self.now, &self.workers);
                for balancer in &mut self.balancers {
                    balancer.homes = table.clone();
                }
                self.push(self.now + homes::EVERY, Event::Homes);
            }
            Event::Fault(number) => self.fault(number),
            Event::Mended(number) => self.mend(number),
        }
    }

    fn advance(&mut self, number: u32) {
        let worker = &mut self.workers[number as usize];
        let before = worker.core.seq();
        worker.advance(self.now, &self.load.jobs, &mut self.said);
        let changed = worker.core.seq() != before;
        let due = worker.next_deadline().map(|due| due.max(self.now));
        let wake = match due {
            // Nothing that was due now is left: what still says so waits for something else.
            Some(due) if due == self.now => Some(self.now + Duration::from_millis(1)),
            due => due,
        };
        if worker.wake != wake {
            worker.wake = wake;
            if let Some(at) = wake {
                self.push(at, Event::Wake(number));
            }
        }
        let mut said = std::mem::take(&mut self.said);
        for one in said.drain(..) {
            self.heard(one);
        }
        self.said = said;
        if changed {
            self.follow(number);
        }
    }

    fn heard(&mut self, said: Said) {
        let way = delay(&mut self.rng);
        match said {
            Said::First { job, at } => self.lives[job as usize].first = Some(at + way),
            Said::Over {
                job,
                at,
                why,
                seq,
                load,
            } => {
                if why == Why::Complete {
                    self.lives[job as usize].done = Some(at + way);
                }
                let worker = self.places[job as usize].worker;
                let balancer = self.balancer_of(job);
                self.unseen[worker as usize][balancer] = 0;
                self.used(worker, job);
                if let Some(booking) = self.places[job as usize].booking {
                    let over = Event::Over(job, booking, why, seq, load);
                    self.push((at + way).max(self.now), over);
                }
            }
        }
    }
}
