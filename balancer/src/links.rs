//! One link to each worker in the facts: dialled, kept, and dropped when its process is gone.
#![allow(clippy::disallowed_methods)] // the rim: this is where links are dialled and time passes

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_link::{
    Alpn, Backoff, Code, ConnectError, Endpoint, Expect, Link, Reachability, probe,
};
use forebay_proto::frame::Kind;
use forebay_proto::wire::work;
use forebay_proto::{Incarnation, Role, WorkerId};
use forebay_scheduler::Load;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::core::dispatch::LinkNumber;
use crate::fleet::Fleet;
use crate::residency;
use crate::shared::Shared;

const DIAL_PATIENCE: Duration = Duration::from_secs(2);
/// Dials that began just now: a thousand at once would all be late together and begin anew, for as long as
/// it takes.
const STARTING: usize = 16;
/// A dial that takes longer waits for its worker rather than for us, and another one may begin.
const START: Duration = Duration::from_millis(250);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// A link that stood this long was a good one.
const STEADY: Duration = Duration::from_secs(1);
const WATCH_INTERVAL: Duration = Duration::from_millis(50);
const PROBE_INTERVAL: Duration = Duration::from_millis(250);
const PROBE_PATIENCE: Duration = Duration::from_millis(100);
const BUDGET_WINDOW: Duration = Duration::from_secs(10);

/// A task that ends with its owner.
pub(crate) struct Task(JoinHandle<()>);

impl Task {
    pub(crate) fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(future))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The keepers of all links, by the worker's name.
pub(crate) struct Links {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    keepers: BTreeMap<String, (String, Task)>,
    starting: Arc<Semaphore>,
}

impl Links {
    pub(crate) fn new(shared: Arc<Shared>, endpoint: Endpoint) -> Self {
        Self {
            shared,
            endpoint,
            keepers: BTreeMap::new(),
            starting: Arc::new(Semaphore::new(STARTING)),
        }
    }

    /// Takes new facts over: dials who is new, forgets who is gone.
    pub(crate) fn follow(&mut self, fleet: &Fleet) {
        let named: BTreeSet<&str> = fleet.workers.iter().map(|w| w.name.as_str()).collect();
        self.shared.metrics.follow(named.iter().copied());
        for link in self.shared.set_facts(fleet) {
            link.close(Code::Superseded, "the facts name a later start");
        }
        self.keepers.retain(|name, _| named.contains(name.as_str()));
        self.shared
            .tried
            .lock()
            .retain(|name| named.contains(name.as_str()));
        for worker in &fleet.workers {
            let address = &worker.spec.advertise;
            let kept = self.keepers.get(&worker.name);
            if kept.is_none_or(|(dialled, _)| dialled != address) {
                let keeper = Keeper {
                    shared: self.shared.clone(),
                    endpoint: self.endpoint.clone(),
                    starting: self.starting.clone(),
                    name: worker.name.as_str().into(),
                    address: address.clone(),
                };
                let task = Task::spawn(keeper.run());
                self.keepers
                    .insert(worker.name.clone(), (address.clone(), task));
            }
        }
    }
}

/// Keeps the link to one worker.
struct Keeper {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    starting: Arc<Semaphore>,
    name: Arc<str>,
    address: String,
}

impl Keeper {
    async fn run(self) {
        let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
        let mut last_problem = String::new();
        loop {
            match self.dial().await {
                Ok(link) => {
                    let since = Instant::now();
                    self.serve(&link).await;
                    if since.elapsed() >= STEADY {
                        backoff.reset();
                    }
                    last_problem.clear();
                }
                Err(error) => {
                    // Said once, not at each try.
                    let problem = error.to_string();
                    if problem != last_problem {
                        tracing::warn!(worker = %self.name, problem, "a worker cannot be reached");
                        last_problem = problem;
                    }
                }
            }
            self.shared.tried.lock().insert(self.name.to_string());
            let wait = backoff.next(self.shared.dispatch().rng());
            tokio::time::sleep(wait).await;
        }
    }

    /// Dials when it is its turn.
    async fn dial(&self) -> Result<Link, ConnectError> {
        let turn = self.starting.acquire().await;
        let expect = Expect::named(Role::Agent, &self.name);
        let dialled = self
            .endpoint
            .connect(&self.address, Alpn::Work, &expect, DIAL_PATIENCE);
        let mut dialled = pin!(dialled);
        let soon = tokio::time::timeout(START, &mut dialled).await;
        drop(turn);
        match soon {
            Ok(dialled) => dialled,
            Err(_) => dialled.await,
        }
    }

    /// Uses a link until it ends.
    async fn serve(&self, link: &Link) {
        let Ok(incarnation) = Incarnation::from_wire(link.hello().incarnation.as_ref()) else {
            tracing::warn!(worker = %self.name, "an agent does not say which start it is");
            link.close(Code::Protocol, "say which incarnation you are");
            return;
        };
        if !self.belongs(incarnation.worker) {
            link.close(Code::Identity, "that is another worker's id");
            return;
        }
        let Some(standing) = Standing::new(self, incarnation, link) else {
            link.close(Code::Superseded, "a later start of this worker is known");
            return;
        };
        // In this task: what it knows is forgotten before another link of this worker stands.
        let following = residency::follow(self.shared.clone(), link.clone(), incarnation);
        self.shared.tried.lock().insert(self.name.to_string());
        tracing::info!(worker = %self.name, %incarnation, "connected");
        let listening = async {
            loop {
                match link.read_datagram().await {
                    Ok(frame) if frame.kind == Kind::Load => {
                        if let Ok(report) = frame.decode::<work::LoadReport>() {
                            self.shared.metrics.reports.inc();
                            self.shared.hear(&report, incarnation.worker);
                        }
                    }
                    Ok(frame) if frame.kind == Kind::Quote => {
                        if let Ok(quote) = frame.decode::<work::Quote>() {
                            self.shared.quoted(&quote, incarnation.worker);
                        }
                    }
                    Ok(_) => {}
                    Err(closed) => break closed,
                }
            }
        };
        let closed = tokio::select! {
            closed = listening => closed,
            never = following => match never {},
        };
        drop(standing);
        tracing::info!(worker = %self.name, %incarnation, %closed, "disconnected");
    }

    /// Whether the facts give this id to this name.
    fn belongs(&self, id: WorkerId) -> bool {
        self.shared.facts().is_some_and(|facts| {
            let mut workers = facts.fleet.workers.iter();
            workers.any(|known| known.incarnation.worker == id && *known.name == *self.name)
        })
    }
}

/// That a worker is connected, taken back when dropped.
struct Standing<'a> {
    keeper: &'a Keeper,
    incarnation: Incarnation,
    number: LinkNumber,
}

impl<'a> Standing<'a> {
    /// None: a later start is known.
    fn new(keeper: &'a Keeper, incarnation: Incarnation, link: &Link) -> Option<Self> {
        let Keeper { shared, name, .. } = keeper;
        let number = shared
            .change(|dispatch, now| dispatch.connected(now, incarnation, name, link.clone()))?;
        shared.metrics.links.inc();
        Some(Self {
            keeper,
            incarnation,
            number,
        })
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        let shared = &self.keeper.shared;
        shared.metrics.links.dec();
        shared.change(|dispatch, _| dispatch.disconnected(self.incarnation, self.number));
    }
}

impl Shared {
    /// Takes a report over that `worker` sent.
    pub(crate) fn hear(self: &Arc<Self>, report: &work::LoadReport, worker: WorkerId) {
        let Ok(load) = Load::from_wire(report) else {
            return;
        };
        if load.incarnation.worker == worker {
            self.change(|dispatch, now| dispatch.report(now, load));
        }
    }
}

/// Asks after silent workers, and turns the windows of the retry budgets, until it is dropped.
pub(crate) async fn watch(shared: Arc<Shared>) {
    let mut asked: BTreeMap<WorkerId, Instant> = BTreeMap::new();
    let mut ticks = tokio::time::interval(WATCH_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut turned = Instant::now();
    loop {
        ticks.tick().await;
        if turned.elapsed() >= BUDGET_WINDOW {
            turned = Instant::now();
            shared.budgets.lock().values_mut().for_each(|b| b.turn());
        }
        let suspects = shared.dispatch().suspects(shared.now());
        asked.retain(|_, at| at.elapsed() < PROBE_INTERVAL);
        for (incarnation, link) in suspects {
            if asked.contains_key(&incarnation.worker) {
                continue;
            }
            asked.insert(incarnation.worker, Instant::now());
            tokio::spawn(async move {
                if probe(link.remote(), PROBE_PATIENCE).await == Reachability::Gone {
                    tracing::warn!(%incarnation, "the worker's process is gone");
                    link.close(Code::Normal, "nobody listens at your address");
                }
            });
        }
    }
}
