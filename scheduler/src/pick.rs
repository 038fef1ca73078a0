//! The choice of a worker: the least predicted wait among those that may serve the request.

use std::time::Duration;

use forebay_proto::{Incarnation, Now, WorkerId};
use rand::Rng;

use crate::view::{View, Worker};

/// How well a worker suits a request. Least is best; fields compare from the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// Expected wait before the request starts.
    pub wait: Duration,
    /// Share of the slots that would be taken, in thousandths.
    pub occupancy: u32,
    /// Equals are spread at random: a tie broken by number would send everything to one worker.
    pub tie: u64,
    /// Makes the order total.
    pub worker: WorkerId,
}

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The start of the worker that it is placed on.
    pub incarnation: Incarnation,
    /// Why it is the best.
    pub rank: Rank,
}

/// Why no worker was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoChoice {
    /// No worker in the facts serves this model.
    UnknownModel,
    /// There are workers, but none is reachable, open and not yet tried.
    NoCapacity,
    /// Each that could serve it is full.
    Busy,
}

impl View {
    /// Picks a worker for a request to `model`, none of `tried`.
    ///
    /// Where every reachable worker is suspect, the view says nothing: two are drawn and the one
    /// with fewer own bookings is taken (power of two choices, Mitzenmacher 2001), so that a pool is
    /// never stopped by silence alone.
    ///
    /// # Errors
    ///
    /// Returns why there is none.
    pub fn pick(
        &self,
        now: Now,
        model: &str,
        tried: &[WorkerId],
        rng: &mut impl Rng,
    ) -> Result<Choice, NoChoice> {
        let mut serving = self
            .workers()
            .filter(|(_, worker)| worker.known.serves(model))
            .peekable();
        serving.peek().ok_or(NoChoice::UnknownModel)?;
        let reachable: Vec<_> = serving
            .filter(|(id, worker)| worker.open() && !tried.contains(id))
            .filter_map(|(_, worker)| Some((worker.incarnation()?, worker)))
            .collect();
        let mut best: Option<Choice> = None;
        let mut full = false;
        for (incarnation, worker) in reachable.iter().filter(|(_, worker)| !worker.suspect(now)) {
            if worker.full() {
                full = true;
                continue;
            }
            let choice = Choice {
                incarnation: *incarnation,
                rank: rank(*incarnation, worker, rng),
            };
            if best.is_none_or(|best| choice.rank < best.rank) {
                best = Some(choice);
            }
        }
        match best {
            Some(best) => Ok(best),
            None if full => Err(NoChoice::Busy),
            None => two_choices(&reachable, rng).ok_or(NoChoice::NoCapacity),
        }
    }
}

impl View {
    /// Whether any worker is there to serve the request, now or once it has room.
    #[must_use]
    pub fn has_capacity(&self, model: &str, tried: &[WorkerId]) -> bool {
        self.workers().any(|(id, worker)| {
            worker.known.serves(model)
                && worker.open()
                && worker.incarnation().is_some()
                && !tried.contains(&id)
        })
    }
}

fn rank(incarnation: Incarnation, worker: &Worker, rng: &mut impl Rng) -> Rank {
    let queueing = worker.queueing();
    let slots = u64::from(queueing.slots.max(1));
    let occupancy = (u64::from(queueing.present) + 1) * 1_000 / slots;
    Rank {
        wait: queueing.wait(),
        occupancy: u32::try_from(occupancy).unwrap_or(u32::MAX),
        tie: rng.random(),
        worker: incarnation.worker,
    }
}

fn two_choices(reachable: &[(Incarnation, &Worker)], rng: &mut impl Rng) -> Option<Choice> {
    let mut draw = || {
        let (incarnation, worker) = reachable.get(rng.random_range(0..reachable.len().max(1)))?;
        Some(Choice {
            incarnation: *incarnation,
            rank: rank(*incarnation, worker, rng),
        })
    };
    let (one, other) = (draw()?, draw()?);
    Some(if one.rank <= other.rank { one } else { other })
}
