//! From a job's arrival to its end: questions, places, refusals.

use forebay_proto::WorkerId;
use forebay_scheduler::asking::PATIENCE;
use forebay_scheduler::model::Targets;
use forebay_scheduler::{BookingId, Load};
use forebay_worker_agent::core::Offer;

use super::super::balancer::Answer;
use super::super::worker::{Why, offer};
use super::super::{Check, Reports};
use super::agenda::Event;
use super::{KEEP, MAX_REFUSALS, Open, World};

impl World<'_> {
    /// A job is to be placed.
    pub(super) fn begin(&mut self, job: u32) {
        let first = matches!(self.setup.check, Check::AskFirst | Check::Reserve);
        if first && self.setup.policy.predicts() {
            self.ask(job);
        } else {
            self.place(job, &[]);
        }
    }

    /// Asks the best few about a job, as they seem.
    pub(super) fn ask(&mut self, job: u32) {
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

    pub(super) fn asked(&mut self, job: u32, question: u32, worker: u32) {
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

    pub(super) fn answered(&mut self, job: u32, question: u32, answer: Answer, load: Load) {
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

    pub(super) fn decide(&mut self, job: u32, question: u32) {
        if self.places[job as usize].question == question
            && let Some(open) = self.open.remove(&job)
        {
            self.place(job, &open.answers);
        }
    }

    /// The balancer of this job uses a worker.
    pub(super) fn used(&mut self, worker: u32, job: u32) {
        let balancer = self.balancer_of(job);
        let pair = &mut self.pairs[worker as usize][balancer];
        pair.cadence.used(self.now);
    }

    pub(super) fn targets(&self, job: u32) -> Targets {
        let what = &self.load.jobs[job as usize];
        let arrived = self.lives[job as usize].arrived;
        let spent_ms = self.now.since(arrived).as_secs_f64() * 1e3;
        Targets {
            ttft_ms: self.setup.slo.ttft_ms(what.prompt_tokens) - spent_ms,
            tpot_ms: self.setup.slo.tpot_ms,
        }
    }

    pub(super) fn place(&mut self, job: u32, answers: &[Answer]) {
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

    pub(super) fn offered(&mut self, job: u32, booking: BookingId, offer: &Offer) {
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
    pub(super) fn taken(&mut self, worker: u32, job: u32) {
        let balancer = self.balancer_of(job);
        let unseen = &mut self.unseen[worker as usize];
        self.missed += u64::from(unseen[balancer]);
        self.placed += 1;
        unseen.iter_mut().for_each(|one| *one += 1);
        unseen[balancer] = 0;
        self.follow(worker);
    }

    pub(super) fn refused(&mut self, job: u32, booking: BookingId, load: Option<Box<Load>>) {
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

    pub(super) fn over(&mut self, job: u32, booking: BookingId, why: Why, seq: u64, load: Load) {
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
}
