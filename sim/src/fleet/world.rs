//! The world of one run: arrivals, messages that take their time, workers, and what goes wrong.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::time::Duration;

use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Now, Revision, WorkerId};
use forebay_scheduler::asking::PATIENCE;
use forebay_scheduler::model::Targets;
use forebay_scheduler::{BookingId, Load};
use forebay_worker_agent::core::{Cadence, Offer};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::arrivals::{Workload, mix};
use super::balancer::{Answer, Balancer, News, delay};
use super::fault::{Fault, What};
use super::homes::{self, Homes};
use super::measure::{Life, Outcome, Served, Told};
use super::worker::{Make, Said, Why, Worker, offer};
use super::{Check, Order, Reports, Setup};

/// Until a balancer notices that a worker's process is gone.
const NOTICED: Duration = Duration::from_millis(5);
/// How long a worker that was asked keeps a place.
const KEEP: Duration = Duration::from_millis(10);
/// Refusals after which a worker has to queue the job.
const MAX_REFUSALS: u8 = 2;

enum Event {
    Arrive(u32),
    /// An offer reaches a worker.
    Offer(u32, BookingId, Box<Offer>),
    /// An agent's word reaches a balancer.
    Taken(u32, BookingId, u64, Box<Load>),
    Refused(u32, BookingId, Option<Box<Load>>),
    Over(u32, BookingId, Why, u64, Box<Load>),
    Lost(u32, BookingId),
    /// A question reaches a worker.
    Asked(u32, u32, u32),
    /// An answer reaches a balancer.
    Answered(u32, u32, Answer, Box<Load>),
    /// The balancer waits for no more answers.
    Decide(u32, u32),
    Report(u16, Box<(Load, News)>),
    ReportDue(u16, u32),
    Wake(u32),
    Fault(usize),
    Mended(usize),
    /// The leader looks at what is hot.
    Homes,
}

struct Due(Now, u64, Event);

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

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

    /// A job is to be placed.
    fn begin(&mut self, job: u32) {
        let first = matches!(self.setup.check, Check::AskFirst | Check::Reserve);
        if first && self.setup.policy.predicts() {
            self.ask(job);
        } else {
            self.place(job, &[]);
        }
    }

    /// Asks the best few about a job, as they seem.
    fn ask(&mut self, job: u32) {
        let number = self.balancer_of(job);
        let targets = self.targets(job);
        let what = &self.load.jobs[job as usize];
        let balancer = &mut self.balancers[number];
        let width = balancer.asking.width();
        let best = balancer.best(self.now, what, targets, self.setup.policy, width);
        if best.is_empty() {
            return self.place(job, &[]);
        }
        self.places[job as usize].question += 1;
        let question = self.places[job as usize].question;
        let open = Open {
            left: best.len(),
            answers: Vec::new(),
        };
        self.open.insert(job, open);
        for worker in best {
            self.asked += 1;
            self.send(Event::Asked(job, question, worker.0));
        }
        self.push(self.now + PATIENCE, Event::Decide(job, question));
    }

    fn asked(&mut self, job: u32, question: u32, worker: u32) {
        if !self.workers[worker as usize].alive {
            return;
        }
        self.advance(worker);
        self.used(worker, job);
        let keep = (self.setup.check == Check::Reserve).then_some(KEEP);
        let what = &self.load.jobs[job as usize];
        let quote = self.workers[worker as usize].quote(self.now, job, what, keep);
        let balancer = self.balancer_of(job);
        self.unseen[worker as usize][balancer] = 0;
        let answer = (WorkerId(worker), quote.cached_tokens);
        self.send(Event::Answered(job, question, answer, Box::new(quote.load)));
    }

    fn answered(&mut self, job: u32, question: u32, answer: Answer, load: Load) {
        let number = self.balancer_of(job);
        self.balancers[number].told(self.now, load);
        if self.places[job as usize].question != question {
            return;
        }
        let Some(open) = self.open.get_mut(&job) else {
            return;
        };
        open.answers.push(answer);
        open.left -= 1;
        if open.left == 0 {
            self.decide(job, question);
        }
    }

    fn decide(&mut self, job: u32, question: u32) {
        if self.places[job as usize].question == question
            && let Some(open) = self.open.remove(&job)
        {
            self.place(job, &open.answers);
        }
    }

    /// The balancer of this job uses a worker.
    fn used(&mut self, worker: u32, job: u32) {
        let balancer = self.balancer_of(job);
        let pair = &mut self.pairs[worker as usize][balancer];
        pair.cadence.used(self.now);
    }

    fn targets(&self, job: u32) -> Targets {
        let what = &self.load.jobs[job as usize];
        let arrived = self.lives[job as usize].arrived;
        let spent_ms = self.now.since(arrived).as_secs_f64() * 1e3;
        Targets {
            ttft_ms: self.setup.slo.ttft_ms(what.prompt_tokens) - spent_ms,
            tpot_ms: self.setup.slo.tpot_ms,
        }
    }

    fn place(&mut self, job: u32, answers: &[Answer]) {
        let number = self.balancer_of(job);
        let balancer = &mut self.balancers[number];
        if self.setup.reports == Reports::Fresh {
            for worker in &mut self.workers {
                balancer.read(self.now, worker);
            }
        }
        let targets = self.targets(job);
        let balancer = &mut self.balancers[number];
        let what = &self.load.jobs[job as usize];
        let Ok((choice, booking)) =
            balancer.place(self.now, what, targets, self.setup.policy, answers)
        else {
            self.waiting[number].push_back(job);
            return;
        };
        self.copies += u64::from(choice.work.makes_copy);
        let place = &mut self.places[job as usize];
        place.worker = choice.incarnation.worker.0;
        place.booking = Some(booking);
        let must_queue = place.refusals >= MAX_REFUSALS;
        let mut offer = offer(what, self.load.block_tokens, choice.incarnation);
        let checked = matches!(self.setup.check, Check::Veto | Check::Ask);
        let expected = checked && self.setup.policy.predicts();
        offer.expected_ttft = expected.then_some(choice.ttft);
        offer.targets = targets;
        offer.must_queue = must_queue;
        self.send(Event::Offer(job, booking, Box::new(offer)));
    }

    fn offered(&mut self, job: u32, booking: BookingId, offer: &Offer) {
        let number = self.places[job as usize].worker;
        if !self.workers[number as usize].alive {
            return self.send(Event::Refused(job, booking, None));
        }
        self.advance(number);
        self.used(number, job);
        let balancer = self.balancer_of(job);
        let what = &self.load.jobs[job as usize];
        match self.workers[number as usize].offer(self.now, job, what, offer) {
            Ok((seq, load)) => {
                self.advance(number);
                self.taken(number, job);
                self.balancers[balancer].asking.placed(false);
                self.send(Event::Taken(job, booking, seq, load));
            }
            Err(load) => {
                self.unseen[number as usize][balancer] = 0;
                self.balancers[balancer].asking.placed(true);
                self.send(Event::Refused(job, booking, Some(load)));
            }
        }
    }

    /// A worker took a job: what its balancer did not know of it counts, and the others do not know this.
    fn taken(&mut self, worker: u32, job: u32) {
        let balancer = self.balancer_of(job);
        let unseen = &mut self.unseen[worker as usize];
        self.missed += u64::from(unseen[balancer]);
        self.placed += 1;
        unseen.iter_mut().for_each(|one| *one += 1);
        unseen[balancer] = 0;
        self.follow(worker);
    }

    fn refused(&mut self, job: u32, booking: BookingId, load: Option<Box<Load>>) {
        let number = self.balancer_of(job);
        self.balancers[number].released(booking, None);
        if let Some(load) = load {
            self.balancers[number].told(self.now, *load);
        }
        self.refusals += 1;
        self.places[job as usize].refusals += 1;
        self.places[job as usize].booking = None;
        if self.setup.check == Check::Ask {
            self.ask(job);
        } else {
            self.begin(job);
        }
    }

    fn over(&mut self, job: u32, booking: BookingId, why: Why, seq: u64, load: Load) {
        let number = self.balancer_of(job);
        self.balancers[number].released(booking, Some(seq));
        self.balancers[number].told(self.now, load);
        if self.holds(job, booking) {
            match why {
                Why::Complete => self.left -= 1,
                Why::Unstarted => self.begin(job),
            }
        }
        self.let_in(number);
    }

    /// Places those who wait, as far as there is room.
    fn let_in(&mut self, balancer: usize) {
        for _ in 0..self.waiting[balancer].len() {
            let before = self.waiting[balancer].len();
            let Some(job) = self.waiting[balancer].pop_front() else {
                return;
            };
            self.place(job, &[]);
            if self.waiting[balancer].len() == before {
                self.waiting[balancer].rotate_right(1);
                return;
            }
        }
    }

    fn report(&mut self, balancer: u16, worker: u32) {
        let at = usize::from(balancer);
        let pair = &mut self.pairs[worker as usize][at];
        if pair.due != Some(self.now) {
            // An earlier one took its place.
            return;
        }
        pair.due = None;
        if self.workers[worker as usize].alive {
            self.advance(worker);
            let from = &mut self.workers[worker as usize];
            let load = match self.setup.reports {
                Reports::Fresh => None,
                Reports::Every(_) => Some(from.core.load()),
                Reports::Deployed => {
                    let cadence = &mut self.pairs[worker as usize][at].cadence;
                    from.core.report(self.now, cadence)
                }
            };
            if let Some(load) = load {
                let news = self.balancers[at].news(from);
                let loss = self.setup.report_loss;
                let lost = loss > 0.0 && self.rng.random_bool(loss);
                if !lost || !matches!(news, News::Nothing) {
                    self.unseen[worker as usize][at] = 0;
                    self.send(Event::Report(balancer, Box::new((load, news))));
                }
            }
        }
        let again = match self.setup.reports {
            Reports::Fresh => return,
            Reports::Every(interval) => self.now + interval,
            Reports::Deployed => self.due(worker, at),
        };
        self.remind(worker, at, again);
    }

    /// When a balancer is due its next report of a worker.
    fn due(&self, worker: u32, balancer: usize) -> Now {
        if !self.workers[worker as usize].alive {
            return self.now + Duration::from_millis(250);
        }
        let seq = self.workers[worker as usize].core.seq();
        let cadence = &self.pairs[worker as usize][balancer].cadence;
        cadence.due(seq).max(self.now)
    }

    fn remind(&mut self, worker: u32, balancer: usize, at: Now) {
        let pair = &mut self.pairs[worker as usize][balancer];
        if pair.due.is_none_or(|due| at < due) {
            pair.due = Some(at);
            let balancer = u16::try_from(balancer).unwrap_or(u16::MAX);
            self.push(at, Event::ReportDue(balancer, worker));
        }
    }

    /// A worker's state changed: reports follow, where they do.
    fn follow(&mut self, worker: u32) {
        if self.setup.reports == Reports::Deployed {
            for balancer in 0..self.balancers.len() {
                let due = self.due(worker, balancer);
                self.remind(worker, balancer, due);
            }
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

    fn fault(&mut self, number: usize) {
        let Fault { worker, what, .. } = self.setup.faults[number];
        let now = self.now;
        match what {
            What::Crash => {
                for job in self.workers[worker as usize].crash() {
                    if let Some(booking) = self.places[job as usize].booking {
                        self.push(now + NOTICED, Event::Lost(job, booking));
                    }
                }
                let incarnation = self.workers[worker as usize].incarnation();
                for balancer in &mut self.balancers {
                    balancer.disconnected(incarnation);
                }
            }
            What::Drain => {
                let core = &mut self.workers[worker as usize].core;
                core.facts(now, Desired::Draining, Revision(2 * number as u64 + 2));
                self.advance(worker);
            }
            What::Slow(speed) => self.workers[worker as usize].set_speed(speed),
        }
        if let Some(lasts) = self.setup.faults[number].lasts {
            self.push(now + lasts, Event::Mended(number));
        }
    }

    fn mend(&mut self, number: usize) {
        let Fault { worker, what, .. } = self.setup.faults[number];
        let now = self.now;
        match what {
            What::Crash => {
                self.workers[worker as usize].restart(now);
                for balancer in 0..self.balancers.len() {
                    self.balancers[balancer].connected(now, &self.workers[worker as usize]);
                    self.let_in(balancer);
                }
            }
            What::Drain => {
                let core = &mut self.workers[worker as usize].core;
                core.facts(now, Desired::Ready, Revision(2 * number as u64 + 3));
                self.advance(worker);
            }
            What::Slow(_) => self.workers[worker as usize].set_speed(1.0),
        }
    }
}
