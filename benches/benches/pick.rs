//! Question: what does picking a worker cost as the fleet grows, and how much of it is more than
//! looking at every load once?
//!
//! Workload: N workers of 64 slots, random loads in requests and tokens, 8 own bookings on each; one
//! model; a tenth of the workers hold a part of the prompt. Every policy is asked. Reference: the least
//! of N loads in a plain vector. `cargo bench -p forebay-benches --bench pick`.

#![allow(clippy::print_stdout)] // a benchmark's result

use std::hint::black_box;
use std::time::Duration;

use forebay_benches::Timed;
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Incarnation, Now, Revision, WorkerId};
use forebay_scheduler::index::Hit;
use forebay_scheduler::model::{Backlog, Profile, Residuals};
use forebay_scheduler::policy::{self, Request};
use forebay_scheduler::{Acceptance, Known, Load, View, Work};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const PICKS: usize = 20_000;

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

fn world(workers: u32, rng: &mut StdRng) -> View {
    let mut view = View::default();
    view.set_known((1..=workers).map(known));
    for worker in 1..=workers {
        view.connected(Now::default(), incarnation(worker));
        let running = rng.random_range(0..56);
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
                pending_tokens: rng.random_range(0.0..20_000.0),
                pending_pairs: 1e7,
                decodes: running.into(),
                context_tokens: f64::from(running) * 4_000.0,
            },
            model: Some(Profile::default()),
            residuals: Residuals::default(),
        };
        view.report(Now::default(), load);
        for _ in 0..8 {
            view.book(WorkerId(worker), Work::default());
        }
    }
    view
}

fn main() {
    println!(
        "{:>16} {:>8} {:>12} {:>12} {:>12} {:>8}",
        "policy", "workers", "p50", "p99", "plain p50", "ratio"
    );
    for (policy, workers) in policy::ALL
        .into_iter()
        .flat_map(|p| [(p, 10), (p, 100), (p, 1_000)])
    {
        let mut rng = StdRng::seed_from_u64(1);
        let view = world(workers, &mut rng);
        let hits: Vec<Hit> = (1..=workers)
            .step_by(10)
            .map(|worker| Hit {
                worker: WorkerId(worker),
                chunks: 10,
                tokens: 640,
            })
            .collect();
        let request = Request {
            prompt_tokens: 4_000.0,
            hits: &hits,
            conversation: Some(7),
            ..Request::of("m")
        };
        let now = Now::at(Duration::from_millis(100));
        let picked = Timed::run(PICKS, || {
            black_box(view.pick(now, &request, policy, &mut rng)).expect("all are open");
        });
        let loads: Vec<(u32, u64)> = (0..workers).map(|_| rng.random()).collect();
        let plain = Timed::run(PICKS, || {
            black_box(black_box(&loads).iter().min());
        });
        let (p50, p99) = (picked.quantile(0.5), picked.quantile(0.99));
        let reference = plain.quantile(0.5);
        let ratio = p50.as_secs_f64() / reference.as_secs_f64();
        let name = policy.name();
        println!("{name:>16} {workers:>8} {p50:>12?} {p99:>12?} {reference:>12?} {ratio:>8.1}");
    }
}
