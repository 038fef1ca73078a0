//! One request from its placement to the last byte of its answer, failures before the first included.
//!
//! [`Exchange::run`] says events that a [`crate::reply::Reply`] passes on; when the client leaves, the exchange is
//! dropped, and with it the stream to the agent and every guard.
#![allow(clippy::disallowed_methods)] // the rim: this is where time passes

use std::sync::Arc;
use std::time::Duration;

use forebay_proto::Incarnation;
use forebay_proto::config::Pool;
use forebay_scheduler::NoChoice;
use forebay_scheduler::policy::Request;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::attempt::Ended;
use crate::body::Read;
use crate::core::dispatch::{Answer, Ask, Sought, Ticket};
use crate::core::error::{ApiError, Code};
use crate::core::head::Head;
use crate::core::limits::Running;
use crate::core::receipts;
use crate::core::retry::{Attempts, Failure, Next};
use crate::events::{Sink, Way};
use crate::metrics::Outcome;
use crate::prompt::{self, Fingerprinted};
use crate::shared::{Phase, Placement, Shared, Tracked, wall_clock};

/// How long a model without any reachable worker is waited for.
const GRACE: Duration = Duration::from_secs(2);
/// Until those that refused are asked once more.
const AFTER_REFUSALS: Duration = Duration::from_millis(10);
/// A client is never told to stay away for longer.
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// A waiting request looks for itself this often, for changes that are no events.
const LOOK: Duration = Duration::from_millis(250);

pub(crate) struct Exchange {
    pub(crate) shared: Arc<Shared>,
    pub(crate) tracked: Tracked,
    pub(crate) request_id: Arc<str>,
    /// Counts against the key's requests at once.
    pub(crate) _running: Running,
    pub(crate) tenant: Arc<str>,
    /// Where the request must stay.
    pub(crate) zone: Option<Arc<str>>,
    pub(crate) path: &'static str,
    pub(crate) head: Head,
    pub(crate) model: Arc<str>,
    pub(crate) pool_name: Arc<str>,
    pub(crate) pool: Pool,
    pub(crate) body: Read,
    pub(crate) revision: u64,
    /// What is known of the prompt; found at the start of [`Exchange::run`].
    pub(crate) prompt: Fingerprinted,
}

impl Exchange {
    /// Serves the request. Its events end with `End` or `Failed` unless nobody listens.
    pub(crate) async fn run(mut self, way: Way) {
        let mut sink = Sink::new(way, self.shared.settings.limits.stall);
        let served = self.serve(&mut sink).await;
        // Before the last event: once that is taken, this may be dropped.
        let outcome = match &served {
            Ok(()) => Some(Outcome::Complete),
            Err(_) if sink.stalled() => Some(Outcome::Stalled),
            Err(_) if sink.left() => None,
            Err(_) if sink.begun() => Some(Outcome::Broken),
            Err(error) => Some(Outcome::Error(error.code.row().code)),
        };
        if let Some(outcome) = outcome {
            self.tracked.ended(outcome);
        }
        match served {
            Ok(()) => sink.end().await,
            // It has been waited for already; the connection breaks off.
            Err(_) if sink.stalled() => {}
            Err(error) => sink.fail(error).await,
        }
    }

    /// Where it would go if it was sent now, and why.
    pub(crate) fn what_if(mut self) -> serde_json::Value {
        self.prompt = prompt::read(&self);
        let sought = Arc::new(prompt::seek(&self));
        let (shared, now) = (self.shared.clone(), self.shared.now());
        let (receipt, ahead) = {
            let mut dispatch = shared.dispatch();
            let ask = Ask {
                ticket: dispatch.arrive(),
                pool: self.pool_name.clone(),
                model: self.model.clone(),
                tried: Vec::new(),
                answers: Vec::new(),
                sought,
            };
            (dispatch.what_if(now, &ask), dispatch.waiting_in(&ask.pool))
        };
        self.tracked.ended(Outcome::WhatIf);
        let names = shared.names();
        serde_json::json!({
            "schema_version": 1,
            "request_id": &*self.request_id,
            "at_ms": wall_clock().0,
            "pool": &*self.pool_name,
            "waiting_before": ahead,
            "workers": receipts::named(&receipt, &names),
            "receipt": receipt,
        })
    }

    async fn serve(&mut self, sink: &mut Sink) -> Result<(), ApiError> {
        let mut attempts = Attempts::default();
        self.prompt = prompt::read(self);
        let mut line = Line {
            ticket: self.shared.dispatch().arrive(),
            until: Instant::now() + Duration::from_millis(self.pool.queue_timeout_ms.into()),
            failed: Vec::new(),
            refused: Vec::new(),
            sought: Arc::default(),
            answers: Vec::new(),
        };
        self.refuse_quarantined()?;
        self.budget(|budget| budget.admit());
        let mut must_queue = false;
        loop {
            self.tracked.phase(Phase::Queued);
            let mut stale = false;
            line.sought = Arc::new(prompt::seek(self));
            self.refuse_quarantined()?;
            let placement = self.place(&mut line).await?;
            // It may have waited for long.
            self.refuse_quarantined()?;
            let (worker, incarnation) = (placement.worker.clone(), placement.choice.incarnation);
            self.tracked.placed_on(&worker, attempts.number());
            self.tracked.phase(Phase::Prefill);
            let kept = placement.kept.clone();
            let _warming = self.warm(&placement);
            let ended = self
                .attempt(placement, attempts.number(), must_queue, sink)
                .await;
            if let Some(kept) = kept {
                kept.end(ended.word());
            }
            let (failure, error) = match ended {
                Ended::Complete => {
                    self.shared.metrics.placed(&worker, Outcome::Complete);
                    return Ok(());
                }
                Ended::Broken(error) => {
                    self.shared.metrics.placed(&worker, Outcome::Broken);
                    return Err(error);
                }
                Ended::Hopeless(error) => {
                    self.shared.metrics.placed(&worker, Outcome::Failed);
                    return Err(error);
                }
                Ended::Stale => {
                    self.shared.metrics.placed(&worker, Outcome::Refused);
                    self.shared.dispatch().asking.placed(true);
                    stale = true;
                    (Failure::NotStarted, full().after(self.likely_wait()))
                }
                Ended::Refused { for_good } => {
                    self.shared.metrics.placed(&worker, Outcome::Refused);
                    let list = if for_good {
                        &mut line.failed
                    } else {
                        &mut line.refused
                    };
                    list.push(incarnation);
                    (Failure::NotStarted, full().after(self.likely_wait()))
                }
                Ended::Failed(failure) => {
                    self.shared.metrics.placed(&worker, Outcome::Failed);
                    line.failed.push(incarnation);
                    (failure, died())
                }
            };
            let max_refusals = self.pool.max_refusals;
            match self.budget(|budget| attempts.after(failure, max_refusals, budget)) {
                Next::Again { must_queue: now } => must_queue = now,
                Next::GiveUp => return Err(error),
            }
            line.answers = if stale {
                self.ask_around(&line.ask(self, true)).await
            } else {
                Vec::new()
            };
            self.shared.metrics.retries.inc();
        }
    }

    /// Two engines died of it: no third one does.
    fn refuse_quarantined(&self) -> Result<(), ApiError> {
        if self.verdict().quarantined {
            self.shared.metrics.quarantined.inc();
            return Err(quarantined());
        }
        Ok(())
    }

    fn budget<T>(&self, change: impl FnOnce(&mut crate::core::retry::Budget) -> T) -> T {
        let mut budgets = self.shared.budgets.lock();
        change(budgets.entry(self.pool_name.clone()).or_default())
    }

    /// Books a worker, waiting in the pool's queue if need be.
    async fn place(&self, line: &mut Line) -> Result<Placement, ApiError> {
        let began = Instant::now();
        if let Some(placement) = self.try_place(&line.ask(self, true))? {
            self.shared.metrics.decided(began.elapsed());
            return Ok(placement);
        }
        // What was said is old before there is room.
        line.answers.clear();
        let _queued = Queued::new(&self.shared);
        let queue_limit = self.pool.queue_limit;
        if !line.refused.is_empty() {
            // Those that can be asked have refused. They are asked again, but not in a tight loop:
            // some reasons, such as memory for bodies, are not seen in a report.
            let avoiding = line.ask(self, true);
            let mut place = Waiting::join(&self.shared, &avoiding, queue_limit)?;
            if let Ok(Ok(placement)) = timeout(AFTER_REFUSALS, &mut place.woken).await {
                return Ok(placement);
            }
            line.refused.clear();
        }
        let ask = line.ask(self, false);
        let mut without_capacity: Option<Instant> = None;
        let mut place = Waiting::join(&self.shared, &ask, queue_limit)?;
        loop {
            let left = line.until.saturating_duration_since(Instant::now());
            match timeout(left.min(LOOK), &mut place.woken).await {
                Ok(Ok(placement)) => return Ok(placement),
                // Nobody else holds the other end while the request waits.
                Ok(Err(_)) => return Err(nobody()),
                Err(_) => {}
            }
            let found = self.shared.change(|dispatch, now| {
                let found = dispatch.place(now, &ask);
                if found.is_ok() {
                    dispatch.leave(&ask.pool, ask.ticket);
                }
                found
            });
            let now = Instant::now();
            match found {
                Ok(placed) => return Ok(Placement::new(&self.shared, placed)),
                Err(NoChoice::Busy) => {
                    without_capacity = None;
                    if now >= line.until {
                        return Err(waited().after(self.likely_wait()));
                    }
                }
                Err(NoChoice::NoCapacity | NoChoice::UnknownModel) => {
                    let since = *without_capacity.get_or_insert(now);
                    if now >= line.until || now - since >= GRACE {
                        return Err(if line.failed.is_empty() {
                            nobody()
                        } else {
                            died()
                        });
                    }
                }
            }
        }
    }

    /// When the first of the workers will have room, as far as is known.
    fn likely_wait(&self) -> Option<Duration> {
        let asked = Request {
            zone: self.zone.as_deref(),
            ..Request::of(&self.model)
        };
        let wait = self.shared.dispatch().view().least_wait(&asked)?;
        Some(wait.clamp(Duration::from_secs(1), LONGEST_RETRY))
    }

    fn try_place(&self, ask: &Ask) -> Result<Option<Placement>, ApiError> {
        let placed = self.shared.dispatch().place(self.shared.now(), ask);
        match placed {
            Ok(placed) => Ok(Some(Placement::new(&self.shared, placed))),
            Err(NoChoice::Busy | NoChoice::NoCapacity) => Ok(None),
            Err(NoChoice::UnknownModel) => Err(unknown_model()),
        }
    }
}

/// A request's place in the order of arrival.
struct Line {
    ticket: Ticket,
    until: Instant,
    failed: Vec<Incarnation>,
    refused: Vec<Incarnation>,
    sought: Arc<Sought>,
    /// Of those that were asked after the last refusal.
    answers: Vec<Answer>,
}

impl Line {
    fn ask(&self, exchange: &Exchange, also_refused: bool) -> Ask {
        let mut tried = self.failed.clone();
        if also_refused {
            tried.extend(&self.refused);
        }
        Ask {
            ticket: self.ticket,
            pool: exchange.pool_name.clone(),
            model: exchange.model.clone(),
            tried,
            answers: self.answers.clone(),
            sought: self.sought.clone(),
        }
    }
}

/// A place in the queue, left when dropped.
struct Waiting<'a> {
    shared: &'a Arc<Shared>,
    ask: &'a Ask,
    woken: oneshot::Receiver<Placement>,
}

impl<'a> Waiting<'a> {
    fn join(shared: &'a Arc<Shared>, ask: &'a Ask, limit: u32) -> Result<Self, ApiError> {
        let (wake, woken) = oneshot::channel();
        // A change between the first look and this would otherwise go unnoticed for a while.
        let joined = shared.change(|dispatch, _| dispatch.enqueue(ask.clone(), wake, limit));
        joined
            .then_some(Self { shared, ask, woken })
            .ok_or_else(|| {
                let wait = shared.dispatch().view().least_wait(&ask.request());
                let wait = wait.map(|wait| wait.clamp(Duration::from_secs(1), LONGEST_RETRY));
                full().after(wait)
            })
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut dispatch = self.shared.dispatch();
        dispatch.leave(&self.ask.pool, self.ask.ticket);
    }
}

struct Queued<'a>(&'a Shared);

impl<'a> Queued<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.metrics.queued.inc();
        Self(shared)
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.metrics.queued.dec();
    }
}

pub(crate) fn unknown_model() -> ApiError {
    ApiError::new(
        Code::ModelNotFound,
        "no worker of this fleet serves that model: GET /v1/models lists those that are served",
    )
    .about("model")
}

fn full() -> ApiError {
    ApiError::new(
        Code::Overloaded,
        "every worker and the queue for this model are full: try again later",
    )
}

fn quarantined() -> ApiError {
    ApiError::new(
        Code::Quarantined,
        "engines died each time while they served this very request, so it is not sent to another: change the request, or ask the operators of this fleet, who can let it through again",
    )
}

fn waited() -> ApiError {
    ApiError::new(
        Code::QueueTimeout,
        "no worker had room for this request in time: try again later",
    )
}

pub(crate) fn nobody() -> ApiError {
    ApiError::new(
        Code::NoCapacity,
        "no worker for this model can be reached at present: try again soon",
    )
}

pub(crate) fn died() -> ApiError {
    ApiError::new(
        Code::UpstreamError,
        "the worker failed, and the request was not, or not again, sent to another",
    )
}
