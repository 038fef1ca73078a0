//! Four balancers before one fleet, beside one that has it to itself: the same requests at the same moments.
//! And one of the four killed in the middle, beside four that live.

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use forebay_scheduler::model::Profile;
use forebay_sim::fleet::{self, Reports, Setup, Spread, Workload};
use forebay_sim::replay::{self, OneRequest};
use forebay_sim::trace::{SAMPLES, Trace};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::Runtime;

use crate::figures::{Figures, in_engine_blocks};
use crate::harness::{Fleet, get, metric, within};

const WORKERS: u32 = 4;
/// As many as workers, so that most of what a worker gets is of others.
const MANY: u16 = 4;
const KV_TOKENS: u64 = 3_000_000;
/// Seeds of the simulated fleets beside the measured ones.
const SEEDS: u64 = 8;
/// The one that is killed, and its place among the targets.
const VICTIM: &str = "b2";
const VICTIMS_TURN: u64 = 1;
/// Of the long forms: chance moves the p99 of a few hundred requests by a tenth.
const TIMES: usize = 3;

/// What is offered, and how fast the engines are.
#[derive(Clone, Copy)]
struct Shape {
    /// A shipped sample.
    sample: &'static str,
    /// Of it; each copy has prompts of its own.
    requests: usize,
    copies: u32,
    /// From the first arrival to the last.
    seconds: f64,
    /// Longer answers are cut: a run ends with its last one.
    most_tokens: u32,
    /// Slower engines are as busy with fewer requests: two cores have to carry them.
    engine_speed: f64,
}

impl Shape {
    /// Conversations that come back soon: nine of ten tokens could be cached.
    const AGENTS: Self = Self {
        sample: "lmcache-agents",
        requests: 300,
        copies: 2,
        seconds: 100.0,
        most_tokens: 500,
        engine_speed: 0.5,
    };

    /// Long prompts of strangers, near to what the workers can do.
    const CONVERSATION: Self = Self {
        sample: "mooncake-conversation",
        requests: 300,
        copies: 1,
        seconds: 90.0,
        most_tokens: 1_000,
        engine_speed: 2.0,
    };

    /// The beginning of the first.
    const SHORT: Self = Self {
        requests: 100,
        copies: 1,
        seconds: 20.0,
        most_tokens: 200,
        ..Self::AGENTS
    };

    fn trace(self) -> Trace {
        let sample = SAMPLES.iter().find(|sample| sample.name == self.sample);
        let mut trace = sample.unwrap().read(Some(self.requests)).unwrap();
        let mut recorded = std::mem::take(&mut trace.requests);
        let mut rng = StdRng::seed_from_u64(1);
        for request in &mut recorded {
            request.at += trace.quantum.mul_f64(rng.random());
            request.output_tokens = request.output_tokens.min(self.most_tokens);
        }
        trace.quantum = Duration::ZERO;
        recorded.sort_by_key(|request| request.at);
        let last = recorded[recorded.len() - 1].at;
        for copy in 0..self.copies {
            // One begins in the middle of the other's pauses.
            let later = last.mul_f64(f64::from(copy) / 50.0);
            trace
                .requests
                .extend(recorded.iter().cloned().map(|mut request| {
                    request.at += later;
                    request.session = request.session.map(|of| format!("{of}, {copy}"));
                    for run in &mut request.blocks {
                        run.first += u64::from(copy) << 40;
                    }
                    request
                }));
        }
        trace.requests.sort_by_key(|request| request.at);
        let first = trace.requests[0].at;
        let span = trace.requests[trace.requests.len() - 1].at - first;
        for request in &mut trace.requests {
            request.at = (request.at - first).mul_f64(self.seconds / span.as_secs_f64());
        }
        trace
    }

    /// What the simulator says of so many balancers, for comparison.
    fn simulated(self, balancers: u16) -> Figures {
        let load = Workload::new(&in_engine_blocks(self.trace()));
        let setup = Setup {
            workers: WORKERS,
            balancers,
            reports: Reports::Deployed,
            profile: Profile::default().at_speed(self.engine_speed),
            kv_tokens: KV_TOKENS,
            // The arrivals are those of the trace.
            spread: Spread::Burst,
            ..Setup::default()
        };
        let seed = |seed| Figures::simulated(&fleet::run(&load, &setup, load.rate(), seed));
        let all: Vec<Figures> = (1..=SEEDS).map(seed).collect();
        all.iter().for_each(|one| one.print("seed"));
        let mean = Figures::mean(&all);
        mean.print(&format!("{balancers}, simulated"));
        mean
    }

    /// Sends it to a fleet of its own. Halfway, one balancer is killed and started again if so asked.
    fn measured(self, balancers: u16, hurt: bool) -> Measured {
        let fleet = self.fleet(balancers);
        let halfway = Duration::from_secs_f64(self.seconds / 2.0);
        let lines = thread::scope(|scope| {
            let replaying = scope.spawn(|| self.replay(&fleet));
            if hurt {
                thread::sleep(halfway);
                let killed = Instant::now();
                fleet.kill(VICTIM);
                fleet.start_again(&[VICTIM]);
                serving(&fleet, VICTIM);
                eprintln!("{VICTIM} is back after {:?}", killed.elapsed());
            }
            replaying.join().unwrap()
        });
        let who = if hurt { "with a death" } else { "measured" };
        let good: Vec<OneRequest> = lines
            .iter()
            .filter(|line| line.outcome == "ok")
            .cloned()
            .collect();
        let figures = Figures::measured(&good);
        figures.print(&format!("{balancers}, {who}"));
        let sum = |name: &str| -> f64 {
            let agents = fleet.of_role("agent").into_iter();
            agents
                .map(|agent| metric(&fleet.admin(&agent.name), name))
                .sum()
        };
        let accepted = sum("forebay_agent_accepted_total");
        eprintln!(
            "            unseen {:.3}, refused {:.3} a placement",
            sum("forebay_agent_unseen_arrivals_total") / accepted,
            sum("forebay_agent_refused_total") / accepted,
        );
        Measured { figures, lines }
    }

    fn fleet(self, balancers: u16) -> Fleet {
        let [workers, speed, kv_tokens, balancers] = [
            WORKERS.to_string(),
            self.engine_speed.to_string(),
            KV_TOKENS.to_string(),
            balancers.to_string(),
        ];
        let fleet = Fleet::start(&[
            "--workers",
            &workers,
            "--balancers",
            &balancers,
            "--engine-speed",
            &speed,
            "--engine-kv-tokens",
            &kv_tokens,
        ]);
        for balancer in fleet.of_role("balancer") {
            serving(&fleet, &balancer.name);
        }
        fleet
    }

    fn replay(self, fleet: &Fleet) -> Vec<OneRequest> {
        let mut lines = Vec::new();
        let balancers = fleet.of_role("balancer").into_iter();
        let targets = balancers.map(|one| format!("http://{}", one.addresses["http"]));
        let config = replay::Config {
            targets: targets.collect(),
            ..replay::Config::new(self.trace(), String::new())
        };
        let replaying = replay::run_each(config, |_| {}, |line| lines.push(line));
        let report = Runtime::new().unwrap().block_on(replaying).unwrap();
        eprintln!("sent late, in ms: {:?}", report.send_lag_ms);
        lines
    }

    /// A minute of the record, as long as it is here.
    fn minute(self) -> Duration {
        let sample = SAMPLES.iter().find(|sample| sample.name == self.sample);
        let recorded = sample.unwrap().read(Some(self.requests)).unwrap().requests;
        let span = recorded[recorded.len() - 1].at - recorded[0].at;
        Duration::from_secs_f64(60.0 * self.seconds / span.as_secs_f64())
    }
}

struct Measured {
    figures: Figures,
    lines: Vec<OneRequest>,
}

impl Measured {
    fn errors(&self) -> impl Iterator<Item = &OneRequest> {
        self.lines.iter().filter(|line| line.outcome != "ok")
    }

    fn without_errors(self) -> Self {
        assert_eq!(self.errors().count(), 0, "{:?}", self.errors().next());
        self
    }

    /// Only who used the dead balancer noticed, and it served again. From halfway on, for a minute of the
    /// record: how much more of the prompts was cached where nobody died, in points.
    fn lost_beside(&self, unhurt: &Self, shape: Shape) -> f64 {
        let is_victims = |line: &OneRequest| line.index % u64::from(MANY) == VICTIMS_TURN;
        for error in self.errors() {
            assert!(is_victims(error), "{error:?}");
        }
        let from = shape.seconds / 2.0 * 1e3;
        let until = from + shape.minute().as_secs_f64() * 1e3;
        let last = shape.seconds * 0.75 * 1e3;
        let later = self.lines.iter().filter(|line| line.intended_ms > last);
        assert!(
            later
                .clone()
                .any(|line| is_victims(line) && line.outcome == "ok"),
            "it never served again"
        );
        let within = |line: &&OneRequest| (from..until).contains(&line.intended_ms);
        let both = self.lines.iter().filter(within).filter_map(|hurt| {
            let other = unhurt.lines.iter().find(|line| line.index == hurt.index)?;
            Some((
                hurt.cached_tokens?,
                other.cached_tokens?,
                hurt.prompt_tokens?,
            ))
        });
        let [hurt, other, prompts] =
            both.fold([0; 3], |[a, b, c], (x, y, z)| [a + x, b + y, c + z]);
        let points = |tokens: u64| 100.0 * tokens as f64 / prompts as f64;
        eprintln!(
            "in the minute after, {prompts} tokens of prompts: cached {:.2} %, beside {:.2} %; {} errors in all",
            points(hurt),
            points(other),
            self.errors().count(),
        );
        points(other) - points(hurt)
    }
}

/// Waits until a balancer says that it serves.
fn serving(fleet: &Fleet, name: &str) {
    let admin = fleet.process(name).addresses["admin"].clone();
    within(Duration::from_secs(30), "a balancer serves", || {
        TcpStream::connect(&admin).ok()?;
        (get(&format!("http://{admin}/readyz")).0 == 200).then_some(())
    });
}

/// What is told of four over one, of the means of several runs.
fn of_one(what: &str, one: &[Measured], many: &[Measured], of: fn(&Figures) -> f64) -> f64 {
    let mean =
        |all: &[Measured]| all.iter().map(|run| of(&run.figures)).sum::<f64>() / all.len() as f64;
    let ratio = mean(many) / mean(one);
    eprintln!("{what}: {ratio:.3} of one balancer's");
    ratio
}

/// Asserts what is promised of many balancers beside one, of the means of all runs.
fn keeps_its_promise(one: &[Measured], many: &[Measured]) {
    let cached = of_one("cached", one, many, |figures| figures.cached);
    let p99 = of_one("ttft p99", one, many, |figures| figures.ttft_p99);
    of_one("ttft p90", one, many, |figures| figures.ttft_p90);
    of_one("ttft p50", one, many, |figures| figures.ttft_p50);
    assert!(cached >= 0.95, "{cached}");
    assert!(p99 <= 1.1, "{p99}");
}

/// Takes a quiet machine:
/// `cargo test -p forebay --test fleet many_balancers -- --ignored --nocapture --test-threads 1`
/// runs both of these; `docs/evidence/many-balancers.md` has figures.
#[test]
#[ignore = "needs a quiet machine and twenty minutes"]
fn four_balancers_find_what_one_finds_and_a_death_costs_two_points_for_a_minute() {
    let shape = Shape::AGENTS;
    for balancers in [1, MANY] {
        shape.simulated(balancers);
    }
    let (mut one, mut many, mut lost) = (Vec::new(), Vec::new(), 0.0);
    // In turn, so that what else the machine does meets all.
    for _ in 0..TIMES {
        one.push(shape.measured(1, false).without_errors());
        let unhurt = shape.measured(MANY, false).without_errors();
        lost += shape.measured(MANY, true).lost_beside(&unhurt, shape);
        many.push(unhurt);
    }
    keeps_its_promise(&one, &many);
    let mean = lost / TIMES as f64;
    eprintln!("a death costs {mean:.2} points");
    assert!(mean <= 2.0, "{mean}");
}

#[test]
#[ignore = "needs a quiet machine and twelve minutes"]
fn four_balancers_are_as_soon_as_one_under_long_prompts() {
    let shape = Shape::CONVERSATION;
    for balancers in [1, MANY] {
        shape.simulated(balancers);
    }
    let (mut one, mut many) = (Vec::new(), Vec::new());
    for _ in 0..TIMES {
        one.push(shape.measured(1, false).without_errors());
        many.push(shape.measured(MANY, false).without_errors());
    }
    keeps_its_promise(&one, &many);
}

/// Few requests and wide bounds: balancers that do not hear of each other's work lose a third of the hits,
/// and the p90 of a hundred requests moves by a tenth by chance alone, and by more on a busy machine.
#[test]
fn four_balancers_beside_one_and_a_death_among_them_for_a_short_while() {
    let shape = Shape::SHORT;
    let [one, many] = [1, MANY].map(|n| [shape.measured(n, false).without_errors()]);
    let cached = of_one("cached", &one, &many, |figures| figures.cached);
    let p90 = of_one("ttft p90", &one, &many, |figures| figures.ttft_p90);
    of_one("ttft p99", &one, &many, |figures| figures.ttft_p99);
    assert!(cached >= 0.9, "{cached}");
    assert!(p90 <= 2.0, "{p90}");
    let [many] = many;
    let lost = shape.measured(MANY, true).lost_beside(&many, shape);
    assert!(lost <= 10.0, "{lost}");
}
