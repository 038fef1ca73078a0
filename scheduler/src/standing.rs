//! How a worker stands in the choice: of everything that is known of it, what a policy may ask, made
//! ready when it changes and not when it is asked.

use std::time::Duration;

use forebay_proto::{Incarnation, Now, WorkerId};

use crate::load::Load;
use crate::model::{Backlog, Profile, Residuals};
use crate::pick::Work;
use crate::policy::{Candidate, Request};
use crate::terms::{Arrival, Outlook, Terms};
use crate::wait::Queueing;
use crate::worker::Worker;

/// Reports missed before a worker is suspect.
const SUSPECT_AFTER_INTERVALS: u32 = 3;
/// The least silence that makes one suspect.
const SUSPECT_AFTER: Duration = Duration::from_millis(150);
/// Over this share of that silence nothing is made of it.
const CALM: f64 = 2.0 / 3.0;

/// Whether it may serve, but for silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// It may.
    Open,
    /// It has no room.
    Full,
    /// Facts or its own word forbid it.
    Closed,
    /// No link stands to a start that may serve.
    Unreachable,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    pub(crate) worker: WorkerId,
    pub(crate) access: Access,
    pub(crate) incarnation: Incarnation,
    /// When it is suspect if nothing is heard until then, in milliseconds of the clock, and how long
    /// before that silence begins to count.
    pub(crate) suspect_after_ms: f64,
    alarm_ms: f64,
    /// None: there is no report.
    reported: Option<Now>,
    reported_ms: f64,
    profile: Profile,
    residuals: Residuals,
    queueing: Queueing,
    pub(crate) outlook: Outlook,
    /// As it was reported, but for `decodes` and `context_tokens`, in which releases are counted.
    backlog: Backlog,
    /// Tokens of the reported backlog that are prefilled in a millisecond.
    drain_per_ms: f64,
    /// What of the bookings is not reported.
    booked: Work,
    kv_tokens: f64,
    recent: Recent,
    pub(crate) own_bookings: usize,
    /// When it may be counted to hold what it is to hold, in milliseconds of the clock.
    home_from_ms: f64,
    /// The longest context that it takes, in tokens.
    pub(crate) longest: f64,
}

impl Standing {
    pub(crate) fn of(worker: &Worker) -> Self {
        let incarnation = worker.incarnation();
        let access = match incarnation {
            None => Access::Unreachable,
            Some(_) if !worker.open() => Access::Closed,
            Some(_) if worker.full() => Access::Full,
            Some(_) => Access::Open,
        };
        let (load, queueing) = (worker.load.as_ref(), worker.queueing());
        let interval = load.map_or(SUSPECT_AFTER, |load| load.interval);
        let profile = load.and_then(|load| load.model).unwrap_or_default();
        let residuals = load.map_or_else(Residuals::default, |load| load.residuals);
        let mut backlog = load.map_or_else(Backlog::default, |load| load.backlog);
        backlog.decodes = match load.and_then(|load| load.model) {
            Some(_) => (backlog.decodes - worker.beyond.over).max(0.0),
            // It says nothing of its tokens: requests are all that is known.
            None => queueing.present.into(),
        };
        let drain = |load: &Load| {
            let Backlog {
                pending_tokens,
                pending_pairs,
                ..
            } = load.backlog;
            // Time is what passes evenly: later tokens have more to attend to.
            let whole_ms = load
                .model?
                .prefill_ms(&load.backlog, pending_tokens, pending_pairs);
            (whole_ms > 0.0).then_some(pending_tokens / whole_ms)
        };
        let drain_per_ms = load.and_then(drain).unwrap_or(0.0);
        let mut booked = Work::default();
        if load.is_some() {
            booked = worker.beyond.work;
            backlog.context_tokens = (backlog.context_tokens + booked.context_tokens).max(0.0);
        }
        let kv_tokens = worker.known.spec.kv_tokens as f64;
        let patience = SUSPECT_AFTER.max(interval.saturating_mul(SUSPECT_AFTER_INTERVALS));
        Self {
            worker: worker.id(),
            access,
            incarnation: incarnation.unwrap_or(worker.known.incarnation),
            suspect_after_ms: ms(worker.heard + patience),
            alarm_ms: patience.as_secs_f64() * 1e3 * (1.0 - CALM),
            reported: load.map(|_| worker.reported),
            reported_ms: ms(worker.reported),
            profile,
            residuals,
            queueing,
            outlook: Outlook::of(&profile, residuals, &queueing, &backlog, kv_tokens),
            backlog,
            drain_per_ms,
            booked,
            kv_tokens,
            recent: worker.recent,
            own_bookings: worker.beyond.open,
            home_from_ms: if worker.beyond.copies > 0 {
                f64::INFINITY
            } else {
                ms(worker.copied)
            },
            longest: match worker.known.spec.max_context_tokens {
                0 => f64::INFINITY,
                tokens => f64::from(tokens),
            },
        }
    }

    /// Whether nothing was heard for so long that it may be dead.
    pub(crate) fn suspect(&self, at: Moment) -> bool {
        at.ms > self.suspect_after_ms
    }

    pub(crate) const fn queueing(&self) -> &Queueing {
        &self.queueing
    }

    /// How likely it is dead: nothing while no report is late, then linear in the silence.
    fn suspicion(&self, at: Moment) -> f64 {
        let left_ms = self.suspect_after_ms - at.ms;
        (1.0 - left_ms / self.alarm_ms).clamp(0.0, 1.0)
    }

    /// How old the report is; a worker that has sent none is as old as can be.
    pub(crate) fn age(&self, now: Now) -> Duration {
        self.reported.map_or(Duration::MAX, |at| now.since(at))
    }

    /// What a new request would find before it, in tokens: the report, less what was prefilled since,
    /// and the bookings that it does not contain.
    fn backlog(&self, now_ms: f64) -> Backlog {
        let mut backlog = self.backlog;
        if self.drain_per_ms > 0.0 && backlog.pending_tokens > 0.0 {
            let since_ms = (now_ms - self.reported_ms).max(0.0);
            let left = (backlog.pending_tokens - since_ms * self.drain_per_ms).max(0.0);
            backlog.pending_pairs *= left / backlog.pending_tokens;
            backlog.pending_tokens = left;
        }
        backlog.pending_tokens = (backlog.pending_tokens + self.booked.uncached_tokens).max(0.0);
        backlog.pending_pairs = (backlog.pending_pairs + self.booked.pairs).max(0.0);
        backlog
    }

    /// When the reported backlog is prefilled, tokens of it that are until then in a millisecond, with
    /// their pairs each, and what does not drain: tokens and pairs.
    pub(crate) fn drain(&self) -> Drain {
        let (reported, booked) = (&self.backlog, &self.booked);
        let (tokens, pairs) = (reported.pending_tokens, reported.pending_pairs);
        match self.reported {
            Some(_) if self.drain_per_ms > 0.0 && tokens > 0.0 => Drain {
                over_ms: self.reported_ms + tokens / self.drain_per_ms,
                tokens_per_ms: self.drain_per_ms,
                pairs_per_token: pairs / tokens,
                tokens: booked.uncached_tokens,
                pairs: booked.pairs,
            },
            _ => Drain {
                tokens: tokens + booked.uncached_tokens,
                pairs: pairs + booked.pairs,
                ..Drain::default()
            },
        }
    }

    /// What a request would find here of which this worker holds `cached` tokens.
    pub(crate) fn terms(&self, at: Moment, request: &Request<'_>, cached: f64) -> Terms {
        let backlog = self.backlog(at.ms);
        self.outlook.terms(&Arrival {
            pending_tokens: backlog.pending_tokens,
            pending_pairs: backlog.pending_pairs,
            prompt_tokens: request.prompt_tokens,
            longer_tokens: request.longer_tokens,
            cached_tokens: cached,
            suspicion: self.suspicion(at),
            ttft_target_ms: request.targets.ttft_ms,
        })
    }

    /// What of the prompt this worker is counted to hold, of which it holds `cached` tokens and is, as a home, to
    /// hold `home`: so that the copy is made there. Only while no copy is being made on it, and where promises are
    /// kept with what it truly holds.
    #[inline]
    pub(crate) fn counted(&self, at: Moment, request: &Request<'_>, cached: f64, home: f64) -> f64 {
        if home <= cached || at.ms < self.home_from_ms {
            return cached;
        }
        let truly = self.terms(at, request, cached);
        if truly.feasible(&request.targets) {
            home
        } else {
            cached
        }
    }

    /// The same and all else that a policy may ask, of one that holds and is counted to hold so much.
    pub(crate) fn candidate(
        &self,
        at: Moment,
        request: &Request<'_>,
        (cached, counted): (f64, f64),
        place: usize,
    ) -> Candidate {
        Candidate {
            worker: self.worker,
            place,
            cached_tokens: cached,
            counted_tokens: if counted > cached { counted } else { 0.0 },
            backlog: self.backlog(at.ms),
            profile: self.profile,
            residuals: self.residuals,
            queueing: self.queueing,
            age: self.age(at.now),
            suspicion: self.suspicion(at),
            kv_tokens: self.kv_tokens,
            recent_ms: self.recent.at(at.now),
            terms: self.terms(at, request, counted),
        }
    }
}

/// A backlog between two reports.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Drain {
    /// Since the zero of the clock.
    pub(crate) over_ms: f64,
    pub(crate) tokens_per_ms: f64,
    pub(crate) pairs_per_token: f64,
    /// What is left then.
    pub(crate) tokens: f64,
    pub(crate) pairs: f64,
}

/// The moment of a decision.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) now: Now,
    /// Since the zero of the clock.
    pub(crate) ms: f64,
}

impl Moment {
    pub(crate) fn of(now: Now) -> Self {
        Self { now, ms: ms(now) }
    }
}

/// Milliseconds since the zero of the clock.
fn ms(now: Now) -> f64 {
    now.since(Now::default()).as_secs_f64() * 1e3
}

/// Prefill time that was booked on a worker lately; fades, so that all of it weighs as the last three
/// minutes would.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Recent {
    ms: f64,
    at: Now,
}

impl Recent {
    const WINDOW: Duration = Duration::from_secs(180);

    pub(crate) fn add(&mut self, now: Now, load: Option<&Load>, work: &Work) {
        let profile = load.and_then(|load| load.model).unwrap_or_default();
        let added = profile.token_ms * work.uncached_tokens + profile.pair_ms * work.pairs;
        self.ms = self.at(now) + added;
        self.at = now;
    }

    pub(crate) fn at(&self, now: Now) -> f64 {
        if self.ms <= 0.0 {
            return 0.0;
        }
        let past = now.since(self.at).as_secs_f64() / Self::WINDOW.as_secs_f64();
        self.ms * (-past).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_booked_fades_in_minutes() {
        let at = |secs| Now::at(Duration::from_secs(secs));
        let work = Work {
            uncached_tokens: 1_000.0,
            ..Work::default()
        };
        let mut recent = Recent::default();
        recent.add(at(1), None, &work);
        let fresh = recent.at(at(1));
        assert!((fresh - 68.0).abs() < 1e-6);
        assert!(recent.at(at(181)) < fresh / 2.0);
        assert!(recent.at(at(1_801)) < fresh / 1_000.0);
        recent.add(at(181), None, &work);
        assert!(recent.at(at(181)) > fresh);
    }
}
