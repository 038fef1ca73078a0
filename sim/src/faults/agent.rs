//! One agent: its disk, and the process on it, which is the agent's real core.

use std::collections::BTreeMap;
use std::sync::Arc;

use forebay_control_client::Facts;
use forebay_proto::wire::fleet::Observed;
use forebay_proto::{Incarnation, Now, Revision};
use forebay_worker_agent::core::{Cadence, Core, PlacementId, Settings, Standing, standing};
use rand::Rng as _;
use rand::rngs::StdRng;

use super::clients::Wants;

/// The model that every worker serves.
pub(super) const MODEL: &str = "m";

const SETTINGS: Settings = Settings {
    at_once: false,
    slots: 4,
    queue_limit: 4,
    body_budget_bytes: 1 << 20,
    kv_tokens: 0,
    profile: None,
};

pub(super) struct Agent {
    pub(super) name: String,
    /// On its disk: what it was granted, how often it was started, the newest facts.
    pub(super) held: Option<Incarnation>,
    pub(super) start: u32,
    pub(super) kept: Option<Arc<Facts>>,
    /// Of this start: when it was registered, if it was.
    pub(super) registered: Option<Revision>,
    /// It must stop: a newer start is registered.
    pub(super) superseded: bool,
    /// Once it knows which incarnation it is.
    pub(super) core: Option<Core>,
    /// To all balancers alike.
    pub(super) reports: Cadence,
    /// Counts its cores: what was meant for an earlier one is not for this one.
    pub(super) life: u64,
    /// Who waits for these: balancer, and its number of the placement.
    pub(super) placed: BTreeMap<PlacementId, (u32, u64)>,
}

impl Agent {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            held: None,
            start: 1,
            kept: None,
            registered: None,
            superseded: false,
            core: None,
            reports: Cadence::default(),
            life: 0,
            placed: BTreeMap::new(),
        }
    }

    /// An earlier start of this agent, from a copy of its disk.
    pub(super) fn copied(&self) -> Option<Self> {
        // A start is counted on the disk before it begins: no copy is of this one.
        let held = self.held.filter(|_| self.start > 1)?;
        let mut copy = Self {
            held: Some(held),
            start: held.start.min(self.start - 1),
            kept: self.kept.clone(),
            ..Self::new(self.name.clone())
        };
        copy.begin();
        Some(copy)
    }

    /// The process ends and starts again; `wiped`: on an empty disk.
    pub(super) fn restart(&mut self, wiped: bool) {
        if wiped {
            self.held = None;
            self.start = 0;
            self.kept = None;
        }
        self.start += 1;
        self.registered = None;
        self.superseded = false;
        self.begin();
    }

    /// A worker that was registered before serves at once, by the facts on its disk.
    fn begin(&mut self) {
        self.life += 1;
        self.core = None;
        self.placed.clear();
        let start = self.start;
        if let Some(own) = self.held.map(|held| Incarnation { start, ..held }) {
            self.is_now(own);
        }
    }

    fn is_now(&mut self, own: Incarnation) {
        let mut core = Core::new(SETTINGS, own, self.life);
        core.engine_up(&[MODEL.to_owned()]);
        self.core = Some(core);
        if let Some(kept) = self.kept.clone() {
            self.facts(Now::default(), &kept);
        }
    }

    /// The control plane registered it.
    pub(super) fn registered(&mut self, own: Incarnation, at: Revision) {
        self.held = Some(own);
        self.registered = Some(at);
        if self.core.as_ref().map(Core::incarnation) != Some(own) {
            self.is_now(own);
        }
    }

    /// New facts. Returns whether what it has to say of itself is another thing now.
    pub(super) fn facts(&mut self, now: Now, facts: &Arc<Facts>) -> bool {
        self.kept = Some(facts.clone());
        let Some(core) = &mut self.core else {
            return false;
        };
        let before = (core.applied_revision(), core.observed());
        match standing(facts, &self.name, core.incarnation(), self.registered) {
            Standing::NotYet => {}
            Standing::Wanted(desired) => core.facts(now, desired, facts.revision),
            Standing::Superseded(_) | Standing::Removed => {
                self.superseded = true;
                self.core = None;
                return true;
            }
        }
        before != (core.applied_revision(), core.observed())
    }

    /// What it asks the control plane for next.
    pub(super) fn wants(&mut self, now: Now, healing: bool, rng: &mut StdRng) -> Wants {
        let name = self.name.clone();
        let again = rng.random_bool(0.1);
        match &mut self.core {
            Some(core) if self.registered.is_some() && !again => {
                if rng.random_bool(0.05) && !healing {
                    core.engine_down(now);
                } else {
                    core.engine_up(&[MODEL.to_owned()]);
                }
                Wants::Renew {
                    name,
                    incarnation: core.incarnation(),
                    revision: core.applied_revision().0,
                    observed: observed(core.observed()),
                    in_flight: u32::try_from(core.in_flight()).unwrap_or(u32::MAX),
                }
            }
            _ => Wants::Register {
                name,
                held: self.held,
                start: self.start,
            },
        }
    }
}

fn observed(observed: Observed) -> i32 {
    observed.into()
}
