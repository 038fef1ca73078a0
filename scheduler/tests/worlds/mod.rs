//! Random fleets and requests, drawn from a seed.

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_proto::fleet::WorkerSpec;
use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Incarnation, Now, Revision, WorkerId};
use forebay_scheduler::homes::table::Homes;
use forebay_scheduler::index::Hit;
use forebay_scheduler::model::{Backlog, PROFILES, Residuals, Targets, attention_pairs};
use forebay_scheduler::policy::Request;
use forebay_scheduler::{Acceptance, Known, Lineup, Load, View, Work};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A view and what is asked of it.
pub(crate) struct World {
    pub(crate) view: View,
    /// Those that may serve: open, heard, not tried.
    #[allow(dead_code)] // not every test asks
    pub(crate) eligible: Vec<WorkerId>,
    pub(crate) now: Now,
    pub(crate) hits: Vec<Hit>,
    /// Those that are to hold the beginning of the prompt; most requests have none.
    pub(crate) homes: Vec<WorkerId>,
    pub(crate) home_tokens: u32,
    pub(crate) tried: Vec<WorkerId>,
    pub(crate) apart: Vec<WorkerId>,
    pub(crate) prompt_tokens: f64,
    pub(crate) targets: Targets,
    pub(crate) conversation: Option<u64>,
    pub(crate) turn: u64,
}

impl World {
    pub(crate) fn drawn(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let workers = rng.random_range(1..80);
        let alike = rng.random_bool(0.3);
        let kv_tokens = [0, 60_000, 400_000][rng.random_range(0..3)];
        let mut view = View::default();
        let cordoned: Vec<bool> = (0..workers).map(|_| rng.random_bool(0.05)).collect();
        view.set_known(
            (0..)
                .zip(&cordoned)
                .map(|(id, cordoned)| known(id, kv_tokens, *cordoned)),
        );
        let start = Now::at(Duration::from_secs(1_000));
        let mut eligible = Vec::new();
        let tried: Vec<WorkerId> = (0..rng.random_range(0..3))
            .map(|_| WorkerId(rng.random_range(0..workers)))
            .collect();
        let suspects = rng.random_range(0..4) / 2;
        let apart: Vec<WorkerId> = (0..suspects)
            .map(|_| WorkerId(rng.random_range(0..workers)))
            .collect();
        let now = start + Duration::from_millis(rng.random_range(0..600));
        let shared = rng.random();
        for id in 0..workers {
            let mut own = StdRng::seed_from_u64(if alike { shared } else { rng.random() });
            let reported = start + Duration::from_millis(own.random_range(0..200));
            let cut_off = rng.random_bool(0.05);
            if !cut_off {
                view.connected(reported, incarnation(id));
            }
            let mut load = load(id, &mut own);
            if rng.random_bool(0.05) {
                load.acceptance = Acceptance::Draining;
            }
            view.report(reported, load);
            for _ in 0..own.random_range(0..5) {
                let mut work = work(own.random_range(1.0..9_000.0));
                work.makes_copy = own.random_bool(0.1);
                let booking = view.book(WorkerId(id), work);
                match own.random_range(0..4) {
                    0 => view.accepted(booking, 5),
                    1 => {
                        view.accepted(booking, 5);
                        view.released(booking, Some(own.random_range(6..12)));
                    }
                    _ => {}
                }
            }
            let heard = now.since(reported) <= load.interval * 3;
            let open = !cordoned[id as usize] && load.acceptance == Acceptance::Open;
            let may = open && heard && !cut_off;
            let left_out = tried.contains(&WorkerId(id)) || apart.contains(&WorkerId(id));
            if may && !left_out {
                eligible.push(WorkerId(id));
            }
        }
        let hits = (0..workers).filter(|_| rng.random_bool(0.2));
        let hits: Vec<u32> = hits.collect();
        let hits = hits.into_iter().map(|id| Hit {
            worker: WorkerId(id),
            chunks: 1,
            tokens: rng.random_range(64..8_000),
        });
        let hits = hits.collect();
        let homes = (0..workers).filter(|_| rng.random_bool(0.3)).take(16);
        let homes: Vec<WorkerId> = homes.map(WorkerId).collect();
        let has_homes = rng.random_bool(0.4);
        let homes = if has_homes { homes } else { vec![] };
        let home_tokens = rng.random_range(1..10_000);
        let infinite = f64::INFINITY;
        Self {
            view,
            eligible,
            now,
            hits,
            homes,
            home_tokens,
            tried,
            apart,
            prompt_tokens: rng.random_range(0..12_000).into(),
            targets: Targets {
                ttft_ms: [infinite, 200.0, 2_000.0][rng.random_range(0..3)],
                tpot_ms: [infinite, 25.0, 60.0][rng.random_range(0..3)],
            },
            conversation: rng.random_bool(0.7).then(|| rng.random()),
            turn: rng.random_range(0..1_000),
        }
    }

    pub(crate) fn request(&self) -> Request<'_> {
        Request {
            model: "m",
            tried: &self.tried,
            apart: &self.apart,
            zone: None,
            only: &[],
            prompt_tokens: self.prompt_tokens,
            longer_tokens: self.prompt_tokens * (self.turn % 3) as f64 * 0.1,
            targets: self.targets,
            hits: &self.hits,
            homes: (!self.homes.is_empty()).then_some(Homes {
                chunk: 77,
                tokens: self.home_tokens,
                workers: &self.homes,
            }),
            conversation: self.conversation,
            head: self.turn * 31,
            turn: self.turn,
        }
    }
}

fn incarnation(worker: u32) -> Incarnation {
    Incarnation {
        worker: WorkerId(worker),
        grant: 1,
        start: 1,
    }
}

fn known(worker: u32, kv_tokens: u64, cordoned: bool) -> Known {
    let spec = WorkerSpec {
        pool: "default".into(),
        advertise: "127.0.0.1:7420".into(),
        engine: "openai".into(),
        models: vec!["m".into()],
        revision: String::new(),
        gpu_type: String::new(),
        gpu_count: 0,
        kv_tokens,
        max_context_tokens: 0,
        adapters: vec![],
        zone: String::new(),
        labels: BTreeMap::new(),
        slots: 16,
    };
    Known {
        name: format!("w{worker}"),
        incarnation: incarnation(worker),
        spec,
        desired: if cordoned {
            Desired::Cordoned
        } else {
            Desired::Ready
        },
        departed: false,
    }
}

fn load(worker: u32, rng: &mut StdRng) -> Load {
    let running = rng.random_range(0..16);
    let pending_tokens = rng.random_range(0.0..15_000.0) * f64::from(rng.random_range(0..2));
    let profile = PROFILES[rng.random_range(0..PROFILES.len())].1;
    let mut lineup = Lineup::default();
    for _ in 0..rng.random_range(0..5) {
        let start_in_ms = rng.random_range(-2_000.0..20_000.0);
        lineup.add(start_in_ms, rng.random_range(0.0..1_500.0));
    }
    Load {
        incarnation: incarnation(worker),
        seq: 9,
        acceptance: Acceptance::Open,
        running,
        queued: rng.random_range(0..5),
        slots: 16,
        queue_limit: 4,
        service: Duration::from_millis(rng.random_range(0..3_000)),
        facts_revision: Revision(1),
        interval: Duration::from_millis(rng.random_range(80..400)),
        backlog: Backlog {
            pending_tokens,
            pending_pairs: pending_tokens * rng.random_range(0.0..9_000.0),
            decodes: running.into(),
            context_tokens: f64::from(running) * rng.random_range(100.0..4_000.0),
            lineup,
        },
        model: rng
            .random_bool(0.9)
            .then(|| profile.at_speed(rng.random_range(0.5..2.0))),
        residuals: Residuals {
            ttft_p50: rng.random_range(0.8..1.2),
            ttft_p95: rng.random_range(1.2..2.0),
        },
    }
}

fn work(tokens: f64) -> Work {
    Work {
        uncached_tokens: tokens,
        pairs: attention_pairs(0.0, tokens),
        context_tokens: tokens,
        makes_copy: false,
    }
}
