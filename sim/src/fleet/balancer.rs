//! One balancer: its real view and index, and what it decides.

use std::sync::Arc;
use std::time::Duration;

use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::Desired;
use forebay_proto::wire::work::ResidencyDelta;
use forebay_proto::{Incarnation, Now, WorkerId};
use forebay_scheduler::asking::Asking;
use forebay_scheduler::homes::table::Table;
use forebay_scheduler::index::{Hit, IndexWriter};
use forebay_scheduler::model::Targets;
use forebay_scheduler::policy::{Policy, Request};
use forebay_scheduler::residency::{Cursor, Follower, Next, Op};
use forebay_scheduler::{BookingId, Choice, Known, Load, NoChoice, View};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::arrivals::Job;
use super::worker::Worker;
use super::{MODEL, Reports, Setup};

/// What of a worker's cache a balancer has not got yet.
pub(super) enum News {
    Nothing,
    Deltas(Vec<Arc<ResidencyDelta>>),
    Everything(Vec<forebay_proto::wire::work::ResidencySnapshot>),
}

struct Follow {
    follower: Follower,
    cursor: Option<Cursor>,
    /// The agent's state that was last read here.
    seq: u64,
}

/// A worker, and what it holds of a prompt by its own word.
pub(super) type Answer = (WorkerId, u32);

pub(super) struct Balancer {
    view: View,
    index: IndexWriter,
    follows: Vec<Follow>,
    hits: Vec<Hit>,
    pub(super) asking: Asking,
    turn: u64,
    rng: StdRng,
    /// Workers promise no report sooner.
    interval: Duration,
    /// Families and their homes, as agreed.
    pub(super) homes: Arc<Table>,
}

impl Balancer {
    pub(super) fn new(workers: &[Worker], now: Now, seed: u64, setup: &Setup) -> Self {
        let mut view = View::default();
        view.set_known(workers.iter().map(|worker| known(worker, setup.kv_tokens)));
        let mut balancer = Self {
            view,
            index: IndexWriter::default(),
            follows: Vec::new(),
            hits: Vec::new(),
            asking: Asking::default(),
            turn: seed,
            rng: StdRng::seed_from_u64(seed),
            interval: match setup.reports {
                Reports::Every(interval) => interval,
                Reports::Fresh | Reports::Deployed => Duration::ZERO,
            },
            homes: Arc::default(),
        };
        for worker in workers {
            balancer.follows.push(Follow::new(worker.incarnation()));
            balancer.view.connected(now, worker.incarnation());
            balancer.reported(now, worker.core.load());
        }
        balancer
    }

    /// Whether the state of a worker is another one than was last read with [`Balancer::read`].
    fn is_behind(&self, worker: &Worker) -> bool {
        let follow = &self.follows[worker.incarnation().worker.0 as usize];
        follow.seq != worker.core.seq()
    }

    /// Reads a worker's state as it is, without delay.
    pub(super) fn read(&mut self, now: Now, worker: &mut Worker) {
        if worker.alive {
            let news = if self.is_behind(worker) {
                self.news(worker)
            } else {
                News::Nothing
            };
            self.hear(now, worker.core.load(), news);
        }
    }

    /// What a worker's next message to this balancer carries of its cache.
    pub(super) fn news(&mut self, worker: &mut Worker) -> News {
        let follow = &mut self.follows[worker.incarnation().worker.0 as usize];
        follow.seq = worker.core.seq();
        let publisher = worker.core.publisher();
        publisher.flush();
        let next = publisher.since(follow.cursor);
        follow.cursor = Some(publisher.newest());
        match next {
            Next::Nothing => News::Nothing,
            Next::Deltas(deltas) => News::Deltas(deltas),
            Next::Snapshot(pieces) => News::Everything(pieces),
        }
    }

    /// A worker's message arrives.
    pub(super) fn hear(&mut self, now: Now, load: Load, news: News) {
        let worker = load.incarnation.worker;
        self.reported(now, load);
        let follower = &mut self.follows[worker.0 as usize].follower;
        let mut ops = Vec::new();
        let mut take = |taken: Result<Vec<Op>, _>| match taken {
            Ok(more) => ops.extend(more),
            Err(problem) => unreachable!("the simulated stream is in order: {problem}"),
        };
        match news {
            News::Nothing => {}
            News::Deltas(deltas) => deltas.iter().for_each(|delta| take(follower.delta(delta))),
            News::Everything(pieces) => pieces.iter().for_each(|one| take(follower.snapshot(one))),
        }
        for op in ops {
            match op {
                Op::Clear => self.index.clear(worker),
                Op::Store(chunk, tokens) => self.index.store(worker, chunk, tokens),
                Op::Remove(chunk) => self.index.remove(worker, chunk),
            }
        }
    }

    /// Silence until the next report is none.
    fn reported(&mut self, now: Now, mut load: Load) {
        load.interval = load.interval.max(self.interval);
        self.view.report(now, load);
    }

    /// What an answer of a worker says of its load.
    pub(super) fn told(&mut self, now: Now, load: Load) {
        self.reported(now, load);
    }

    /// The workers to ask about a job, at most so many.
    pub(super) fn best(
        &mut self,
        now: Now,
        job: &Job,
        targets: Targets,
        policy: &dyn Policy,
        count: usize,
    ) -> Vec<WorkerId> {
        self.look_up(job, &[]);
        let conversation = self.conversation(job);
        let Self {
            view, hits, rng, ..
        } = self;
        let request = request(job, targets, hits, conversation, self.turn);
        view.best(now, &request, policy, count, rng)
    }

    /// What names a job's conversation: nothing of what its family shares.
    fn conversation(&self, job: &Job) -> Option<u64> {
        let shared = self.homes.of(&job.blocks);
        let shared = shared.map_or(0, |family| family.chunks as usize);
        let own = job.blocks.get(shared..).unwrap_or_default();
        self.index.index().conversation(own, self.follows.len())
    }

    fn look_up(&mut self, job: &Job, answers: &[Answer]) {
        self.index.index().hits(&job.blocks, &mut self.hits);
        for (worker, cached_tokens) in answers {
            self.hits.retain(|hit| hit.worker != *worker);
            self.hits.push(Hit {
                worker: *worker,
                chunks: 0,
                tokens: *cached_tokens,
            });
        }
        self.hits.sort_unstable_by_key(|hit| hit.worker);
    }

    /// Decides where a job goes, among those who answered if anyone did, and books it there.
    pub(super) fn place(
        &mut self,
        now: Now,
        job: &Job,
        targets: Targets,
        policy: &dyn Policy,
        answers: &[Answer],
    ) -> Result<(Choice, BookingId), NoChoice> {
        self.look_up(job, answers);
        let only: Vec<WorkerId> = answers.iter().map(|(worker, _)| *worker).collect();
        let conversation = self.conversation(job);
        let family = self.homes.of(&job.blocks);
        let request = Request {
            only: &only,
            homes: family.map(|family| family.as_asked()),
            ..request(job, targets, &self.hits, conversation, self.turn)
        };
        let choice = self.view.pick(now, &request, policy, &mut self.rng)?;
        self.turn += 1;
        let booking = self.view.book(choice.incarnation.worker, choice.work);
        Ok((choice, booking))
    }

    pub(super) fn accepted(&mut self, booking: BookingId, seq: u64) {
        self.view.accepted(booking, seq);
    }

    pub(super) fn released(&mut self, booking: BookingId, seq: Option<u64>) {
        self.view.released(booking, seq);
    }

    pub(super) fn disconnected(&mut self, incarnation: Incarnation) {
        self.view.disconnected(incarnation);
        self.index.clear(incarnation.worker);
    }

    pub(super) fn connected(&mut self, now: Now, worker: &Worker) {
        let incarnation = worker.incarnation();
        self.follows[incarnation.worker.0 as usize] = Follow::new(incarnation);
        self.view.connected(now, incarnation);
        self.view.report(now, worker.core.load());
    }
}

impl Follow {
    fn new(incarnation: Incarnation) -> Self {
        Self {
            follower: Follower::new(incarnation),
            cursor: None,
            seq: 0,
        }
    }
}

fn request<'a>(
    job: &Job,
    targets: Targets,
    hits: &'a [Hit],
    conversation: Option<u64>,
    turn: u64,
) -> Request<'a> {
    Request {
        targets,
        prompt_tokens: f64::from(job.prompt_tokens),
        hits,
        conversation,
        head: job.blocks.first().copied().unwrap_or_default(),
        turn,
        ..Request::of(MODEL)
    }
}

fn known(worker: &Worker, kv_tokens: u64) -> Known {
    let WorkerId(number) = worker.incarnation().worker;
    Known {
        name: format!("w{}", number + 1),
        incarnation: worker.incarnation(),
        spec: WorkerSpec {
            pool: "default".into(),
            advertise: String::new(),
            engine: "model".into(),
            models: vec![MODEL.into()],
            revision: String::new(),
            gpu_type: String::new(),
            gpu_count: 1,
            kv_tokens,
            max_context_tokens: 0,
            adapters: vec![],
            zone: String::new(),
            labels: std::collections::BTreeMap::default(),
            slots: 1,
        },
        desired: Desired::Ready,
        departed: false,
    }
}

/// Messages take this long one way: most of them a little, one in a hundred much more.
pub(super) fn delay(rng: &mut StdRng) -> Duration {
    use rand::Rng;
    let usual = Duration::from_micros(150).mul_f64(rng.random_range(0.7..1.3));
    if rng.random_bool(0.01) {
        usual + Duration::from_millis(5)
    } else {
        usual
    }
}
