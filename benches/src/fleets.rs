//! Fleets to decide about.

use std::time::Duration;

use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Incarnation, Now, Revision, WorkerId};
use forebay_scheduler::index::Hit;
use forebay_scheduler::model::{Backlog, Profile, Residuals};
use forebay_scheduler::{Acceptance, Known, Load, View, Work};
use rand::Rng;
use rand::rngs::StdRng;

fn incarnation(worker: u32) -> Incarnation {
    Incarnation {
        worker: WorkerId(worker),
        grant: 1,
        start: 1,
    }
}

fn known(worker: u32) -> Known {
    Known {
        name: format!("w{worker}"),
        incarnation: incarnation(worker),
        spec: WorkerSpec {
            pool: "default".into(),
            advertise: "10.0.0.1:7420".into(),
            engine: "vllm".into(),
            models: vec!["m".into()],
            revision: String::new(),
            gpu_type: String::new(),
            gpu_count: 1,
            kv_tokens: 0,
            max_context_tokens: 0,
            adapters: vec![],
            zone: String::new(),
            labels: std::collections::BTreeMap::new(),
            slots: 64,
        },
        desired: Desired::Ready,
        departed: false,
    }
}

/// What a world has before it.
#[derive(Clone, Copy, Debug)]
pub enum Fleet {
    /// Random loads, and own bookings.
    Busy,
    /// Nothing.
    Idle,
}

/// A view of so many workers of 64 slots, numbered from 1, that serve the model `m`.
pub fn world(workers: u32, fleet: Fleet, rng: &mut StdRng) -> View {
    let mut view = View::default();
    view.set_known((1..=workers).map(known));
    for worker in 1..=workers {
        view.connected(Now::default(), incarnation(worker));
        let (running, pending_tokens) = match fleet {
            Fleet::Busy => (rng.random_range(0..56), rng.random_range(0.0..20_000.0)),
            Fleet::Idle => (0, 0.0),
        };
        let load = Load {
            incarnation: incarnation(worker),
            seq: 1,
            acceptance: Acceptance::Open,
            running,
            queued: 0,
            slots: 64,
            queue_limit: 64,
            service: Duration::from_secs(2),
            facts_revision: Revision(1),
            interval: Duration::from_millis(250),
            backlog: Backlog {
                pending_tokens,
                pending_pairs: pending_tokens * 500.0,
                decodes: running.into(),
                context_tokens: f64::from(running) * 4_000.0,
                ..Backlog::default()
            },
            model: Some(Profile::default()),
            residuals: Residuals::default(),
        };
        view.report(Now::default(), load);
        if matches!(fleet, Fleet::Busy) {
            for _ in 0..8 {
                view.book(WorkerId(worker), Work::default());
            }
        }
    }
    view
}

/// A part of a prompt, held by every tenth worker.
pub fn held_by_a_tenth(workers: u32, rng: &mut StdRng) -> Vec<Hit> {
    (1..=workers)
        .step_by(10)
        .map(|worker| Hit {
            worker: WorkerId(worker),
            chunks: 10,
            tokens: rng.random_range(64..4_000),
        })
        .collect()
}
